"""The cost model against its worked numbers, against states that were made, and against the FLOPs of layers; the benchmark's dry run."""

import json

import pytest
import torch

from latentcot.backbone import HybridConfig, HybridForCausalLM, preset
from latentcot.diffusion_reasoning import bench
from latentcot.diffusion_reasoning.block_diffusion import BlockDiffusionModel
from latentcot.diffusion_reasoning.block_diffusion.cost import block_cost, layer_costs

GIB, MIB = 2**30, 2**20


def of_1_3b(**pattern) -> HybridConfig:
    """24 layers of width 2048, 8 linear heads of 256 x 256, attention with a key for every query head."""
    return preset("gated_deltanet-1.3b-pure", **pattern)


@pytest.mark.parametrize(
    ("tokens", "read", "sizes"),
    [
        (4096, 1.07e9, [0.75 * GIB, 0.28 * GIB, 0.16 * GIB, 78 * MIB, 48 * MIB]),
        (32768, 8.59e9, [6.0 * GIB, 2.03 * GIB, 1.04 * GIB, 302 * MIB, 48 * MIB]),
        (131072, 34.4e9, [24 * GIB, 8.03 * GIB, 4.04 * GIB, 1.04 * GIB, 48 * MIB]),
    ],
)
def test_the_worked_numbers_of_the_1_3b_class(tokens, read, sizes):
    """Past read of a layer for 32 tokens; caches of 24, 8, 4, 1 and no attention layers, without convolutions."""
    plain = {"gated_deltanet": {"use_short_conv": False}}
    stacks = [{"mixer": "attention"}, *({"attention_layers": list(range(n))} for n in (8, 4, 1)), {}]
    for pattern, size in zip(stacks, sizes, strict=True):
        costs = layer_costs(of_1_3b(**pattern, **plain), 32, tokens)
        total = sum(c.past_bytes for c in costs)
        # the worked numbers are rounded: to a hundredth of a GiB, or to a MiB
        assert abs(total - size) <= (0.5 * MIB if size < 0.5 * GIB and size % MIB == 0 else 0.005 * GIB)
        for cost in costs:
            full = cost.past_bytes != 2 * MIB
            assert cost.past_read == pytest.approx(read if full else 34e6, rel=0.02)
            assert cost.in_block == 4 * 32 * 32 * 2048
    # one linear layer keeps 2 MiB, and a full layer's past costs as much as its projections and MLP near 12.5k tokens
    full, linear = layer_costs(of_1_3b(attention_layers=[0], **plain), 32, 12_500)[:2]
    assert linear.past_bytes == 2 * MIB
    assert full.past_read == pytest.approx(full.projections, rel=0.05)


def test_only_attention_pays_for_the_past():
    config = of_1_3b(attention_layers=[3])
    short, long = (layer_costs(config, 32, t) for t in (1024, 32768))
    for n, (a, b) in enumerate(zip(short, long, strict=True)):
        assert (a == b) == (n != 3)
    total = block_cost(config, 32, 1024)
    assert total.denoise == pytest.approx(sum(c.denoise for c in short))
    with pytest.raises(ValueError, match="hgrn has no softmax"):
        layer_costs(HybridConfig(20, 16, 1, "hgrn", intermediate_size=24), 4, 8)
    with pytest.raises(ValueError, match="block_length, context"):
        layer_costs(config, 0, 8)


@pytest.mark.parametrize("mixer", ["retnet", "gla", "hgrn2", "deltanet", "gated_deltanet"])
def test_the_bytes_are_those_of_a_state_that_was_made(mixer):
    torch.manual_seed(0)
    config = HybridConfig(
        20, 16, 2, mixers=[mixer, "attention"], intermediate_size=24, attention={"num_heads": 2}, gla={"num_heads": 2},
        retnet={"num_heads": 2}, hgrn2={"num_heads": 2}, deltanet={"num_heads": 2}, gated_deltanet={"num_heads": 2, "head_dim": 8},
    )  # fmt: skip
    for dtype in (torch.float32, torch.bfloat16):
        model = BlockDiffusionModel(HybridForCausalLM(config).to(dtype), 4, 6)
        with torch.no_grad():
            state = model.commit(torch.full((3, 10), 9), model.init_state(3))
        assert state.nbytes == 3 * block_cost(config, 4, 10, dtype).past_bytes


def test_the_benchmark_runs_dry_and_keeps_other_runs(tmp_path):
    files = ["--json", str(tmp_path / "cost.json"), "--page", str(tmp_path / "cost.md")]
    (tmp_path / "cost.json").write_text(json.dumps({"runs": []}), encoding="utf-8")
    bench.main(["--device", "cpu", "--quick", "--layers", "4", "--block-length", "8", *files])
    run = json.loads((tmp_path / "cost.json").read_text(encoding="utf-8"))["runs"][0]
    assert [(r["stack"], r["context"]) for r in run["rows"]] == [(s, t) for s in bench.STACKS for t in (64, 256)]
    for row in run["rows"]:
        assert row["state_bytes"] == row["state_bytes_model"]
        assert row["denoise_ms"] > 0
    linear = [r["state_bytes"] for r in run["rows"] if r["stack"] == "linear"]
    assert linear[0] == linear[1]
    page = (tmp_path / "cost.md").read_text(encoding="utf-8")
    assert "| softmax | 256 |" in page
    assert "No run on a GPU" in page
    assert bench.flatness(run["rows"], "linear") >= 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--contexts", "0"], "expected a positive integer"),
        (["--width", "100"], "multiples of 64 and 4"),
        (["--json", "nowhere/x.json"], "there is no folder nowhere"),
    ],
)
def test_bad_options_end_with_code_2(arguments, message, capsys):
    with pytest.raises(SystemExit) as caught:
        bench.main(["--device", "cpu", *arguments])
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


def test_a_foreign_json_file_is_left_alone(tmp_path, capsys):
    file = tmp_path / "cost.json"
    file.write_text("[1, 2]", encoding="utf-8")
    with pytest.raises(SystemExit) as caught:
        bench.main(["--device", "cpu", "--quick", "--json", str(file), "--page", str(tmp_path / "cost.md")])
    assert caught.value.code == 2
    assert "holds no runs" in capsys.readouterr().err
    assert file.read_text(encoding="utf-8") == "[1, 2]"
