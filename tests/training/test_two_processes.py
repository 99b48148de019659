"""Two processes on one machine (``accelerate launch``, gloo) train what one process trains with the same global batch."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import ByT5Tokenizer

from latentcot.training.packing import tokenize_corpus

SCRIPT = '''
import json, sys
from pathlib import Path
import torch
from latentcot.backbone import HybridConfig, HybridForCausalLM
from latentcot.training import TrainConfig, train
from latentcot.training.language import LanguageModel
from latentcot.training.packing import PackedText, TokenizedText

class Data(PackedText):
    """Stops, as if killed, in front of the batch that ``stop`` names."""
    stop = None
    def stream(self, start, rank=0, world_size=1):
        for number, batch in enumerate(super().stream(start, rank, world_size), start):
            if number == self.stop:
                raise SystemExit(7)
            yield batch

from accelerate import PartialState

text, folder = Path(sys.argv[1]), Path(sys.argv[2])
torch.set_num_threads(1)
for run in sys.argv[3:]:
    name, _, stop = run.partition(":")
    out = folder / name
    torch.manual_seed(0)
    model = LanguageModel(HybridForCausalLM(HybridConfig(
        vocab_size=259, hidden_size=16, num_hidden_layers=2, period=2, attention={"num_heads": 2},
        gated_deltanet={"num_heads": 1, "head_dim": 8}, intermediate_size=16)))
    data = Data(TokenizedText(text), 16, 4)
    object.__setattr__(data, "stop", int(stop) if stop else None)
    seen = []
    report = train(model, data, TrainConfig(steps=6, warmup_steps=2, checkpoint_every=2, log_every=1), out,
                   watch=lambda step, of, loss, phase: seen.append(step))
    rank = PartialState().process_index
    (out / f"report{rank}.json").write_text(json.dumps({
        "processes": PartialState().num_processes, "watched": seen, "examples": report.examples, "flops": report.flops,
        "losses": [h["loss"] for h in report.history]}))
    torch.save(model.state_dict(), out / f"weights{rank}.pt")
'''


def launched(folder: Path, processes: int, *runs: str) -> int:
    """Train each of ``runs``, ``NAME`` or ``NAME:BATCH`` to stop in front of a batch, one after the other in the same processes."""
    script = folder / "script.py"
    script.write_text(SCRIPT)
    command = [sys.executable, str(script)]
    if processes > 1:
        # --cpu starts one process only; with ACCELERATE_USE_CPU the launcher of several takes gloo.
        launcher = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_machines", "1"]
        options = ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
        command = [*launcher, "--num_processes", str(processes), *options, str(script)]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [*command, str(folder / "text"), str(folder), *runs],
        capture_output=True,
        text=True,
        env=environment,
        timeout=300,
    )
    if done.returncode and not any(":" in run for run in runs):
        raise AssertionError(done.stderr[-3000:])
    return done.returncode


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("processes")
    # Documents of very different lengths: labels fall unevenly on the processes.
    documents = [f"document {i} " + "abcdefgh"[i % 8] * (1 + 13 * i % 29) for i in range(30)]
    tokenize_corpus(folder / "text", documents, ByT5Tokenizer(extra_ids=0))
    launched(folder, 1, "one")
    assert launched(folder, 2, "two", "cut:3") != 0
    assert (folder / "cut" / "checkpoint.safetensors").is_file()
    assert not (folder / "cut" / "report0.json").exists()
    launched(folder, 2, "cut")
    return folder


def report(folder: Path, rank: int = 0) -> dict:
    return json.loads((folder / f"report{rank}.json").read_text())


def weights(folder: Path, rank: int = 0) -> dict[str, torch.Tensor]:
    return torch.load(folder / f"weights{rank}.pt", weights_only=True)


def test_two_processes_are_one_with_the_same_global_batch(runs):
    one, two = report(runs / "one"), report(runs / "two")
    assert (one["processes"], two["processes"]) == (1, 2)
    assert two["losses"] == pytest.approx(one["losses"], rel=1e-5)
    assert (two["examples"], two["flops"]) == (one["examples"], pytest.approx(one["flops"]))
    expected = weights(runs / "one")
    for name, value in weights(runs / "two").items():
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-5, msg=name)


def test_both_processes_end_with_the_same_weights_and_one_of_them_reports(runs):
    assert report(runs / "two", 0)["watched"] == [1, 2, 3, 4, 5, 6]
    assert report(runs / "two", 1)["watched"] == []
    assert report(runs / "two", 0)["losses"] == report(runs / "two", 1)["losses"]
    other = weights(runs / "two", 1)
    assert all(torch.equal(value, other[name]) for name, value in weights(runs / "two", 0).items())


def test_a_killed_pair_goes_on_to_the_same_bits(runs):
    assert report(runs / "cut")["losses"] == report(runs / "two")["losses"]
    expected = weights(runs / "two")
    assert all(torch.equal(value, expected[name]) for name, value in weights(runs / "cut").items())
    whole, cut = (load_file(runs / name / "checkpoint.safetensors") for name in ("two", "cut"))
    assert whole.keys() == cut.keys()
    assert all(torch.equal(value, cut[name]) for name, value in whole.items())
