"""A comparison from the command line: results, resume after a kill, and what bad input gets."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from latentcot import cli
from latentcot.compare import PRESETS, quickstart, with_options, write_report
from latentcot.compare.report import claim_sentences, main_table, markdown
from latentcot.compare.run import check, run_comparison
from latentcot.compare.summary import Claim, _item_error, baseline_columns, summarise
from latentcot.compare.worker import make_tasks

ALL = [m.name for m in quickstart().methods]


def in_a_process(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    code = "from latentcot.cli import main; main()"
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, cwd=cwd, timeout=300
    )


@pytest.fixture
def latentcot(tmp_path, monkeypatch, capfd):
    """The command line in this process, in ``tmp_path``; only starting a program and its end need a process of their own."""

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", ["latentcot", *arguments])
        capfd.readouterr()
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        assert isinstance(stopped.value.code, int)
        return subprocess.CompletedProcess(arguments, stopped.value.code, *capfd.readouterr())

    return run


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> tuple[Path, dict]:
    """Every method of the preset, a few steps each, two seeds of nothing but plumbing."""
    out = tmp_path_factory.mktemp("small")
    results = run_comparison(with_options(quickstart(), steps=10, items=60), out, seeds=1, jobs=2)
    write_report(results, out)
    return out, results


def test_results_hold_every_run_and_what_it_cost(small):
    out, results = small
    assert results == json.loads((out / "results.json").read_text())
    assert [run["method"] for run in results["runs"]] == ALL
    for run in results["runs"]:
        assert run["training"]["steps"] == 10
        assert run["training"]["examples"] == 10 * quickstart().batch_size
        assert run["training"]["flops"] > 0
        assert run["parameters"] > 1000
        for score in run["evaluation"]["by_difficulty"]:
            assert 0 <= score["accuracy"] <= 1
            assert score["sequential_passes"] >= 1
            assert score["flops"] > 0
    assert [s["difficulty"] for s in results["runs"][0]["evaluation"]["by_difficulty"]] == list(range(2, 17))


def test_every_method_starts_from_the_same_backbone_and_sees_the_same_examples(small):
    _, results = small
    identities = [{k: v for k, v in run["identity"].items() if k != "method"} for run in results["runs"]]
    assert all(i == identities[0] for i in identities)
    counts = {run["method"]: run["parameters"] for run in results["runs"]}
    assert (
        counts["direct"]
        == counts["cot"]
        == counts["coconut"]
        == counts["coconut_no_latents"]
        == counts["coconut_pause"]
        == counts["masked_diffusion"]
    )


def test_the_report_is_one_file_with_table_pictures_and_claims(small):
    out, results = small
    page = (out / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 3
    assert "http://" not in page
    assert "https://" not in page
    for name in ALL:
        assert name in page
    assert sorted(p.name for p in (out / "plots").iterdir()) == ["accuracy.png", "cost.png", "loss.png"]
    table = (out / "table.md").read_text()
    assert table == markdown(results)
    assert "chance" in table
    assert "heuristic" in table
    assert not list(out.rglob("*.tmp*"))


def test_claims_are_read_off_the_table(small):
    _, results = small
    rows = {row.method: row for row in summarise(results)}
    sentences = claim_sentences(results)
    assert sum("coconut " in s and "coconut_pause" in s for s in sentences) == 1
    chance, heuristic, _ = baseline_columns(results)
    assert list(chance) == list(heuristic) == list(range(2, 17)), "levels in order, as the plots draw them"
    for cells in main_table(results):
        assert float(cells["longest"]) == pytest.approx(rows[cells["method"]].longest, abs=5e-4)
    assert Claim("a", "b", 0.05, 0.02).verdict == "above"
    assert Claim("a", "b", -0.05, 0.02).verdict == "below"
    assert Claim("a", "b", 0.03, 0.02).verdict == "not told apart"


def test_a_finished_comparison_runs_nothing_again(small):
    out, results = small
    stamps = {p: p.stat().st_mtime_ns for p in (out / "runs").rglob("result.json")}
    again = run_comparison(with_options(quickstart(), steps=10, items=60), out, seeds=1, jobs=2)
    assert again["runs"] == results["runs"]
    assert stamps == {p: p.stat().st_mtime_ns for p in (out / "runs").rglob("result.json")}


def test_a_result_of_another_configuration_or_a_damaged_one_is_refused(small, tmp_path, latentcot):
    import shutil

    out, _ = small
    copy = tmp_path / "copy"
    shutil.copytree(out, copy)
    before = (copy / "results.json").read_bytes()
    with pytest.raises(ValueError, match="another configuration"):
        run_comparison(with_options(quickstart(), steps=11, items=60), copy, seeds=1, jobs=2)
    broken = copy / "runs" / "direct-seed0" / "result.json"
    broken.write_text(broken.read_text()[:100])
    done = latentcot("compare", "quickstart", "--steps", "10", "--items", "60", "--out", str(copy))
    assert done.returncode == 2
    assert "damaged" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert (copy / "results.json").read_bytes() == before


OFTEN = """
from dataclasses import replace
from latentcot.cli import main
from latentcot.compare import PRESETS, quickstart

def often():
    preset = quickstart()
    return replace(preset, batch_size=16, train=replace(preset.train, checkpoint_every=10, log_every=5))

PRESETS["quickstart"] = often
"""


def test_a_killed_comparison_continues_where_it_was(tmp_path, latentcot, monkeypatch):
    """SIGKILL of the whole process group in the middle of training; the second call resumes from the checkpoint."""
    named: dict = {"__name__": "often"}
    exec(OFTEN, named)  # the preset with smaller batches, and with a checkpoint after ten steps instead of 200
    arguments = ["compare", "quickstart", "--methods", "direct", "--steps", "80", "--items", "30"]
    command = [sys.executable, "-c", OFTEN + "main()", *arguments, "--out", str(tmp_path / "out")]
    first = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    checkpoint = tmp_path / "out" / "runs" / "direct-seed0" / "checkpoint.safetensors"
    deadline = time.monotonic() + 240
    while not checkpoint.exists() and first.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)  # waits for the checkpoint at step 10, nothing is measured
    os.killpg(first.pid, signal.SIGKILL)
    first.wait()
    assert checkpoint.exists()
    assert not (tmp_path / "out" / "results.json").exists()
    monkeypatch.setitem(PRESETS, "quickstart", named["often"])
    done = latentcot(*arguments, "--out", "out")
    assert done.returncode == 0, done.stderr
    resumed = json.loads((tmp_path / "out" / "results.json").read_text())["runs"][0]
    whole = run_comparison(
        with_options(named["often"](), steps=80, items=30, methods=["direct"]), tmp_path / "whole", jobs=2
    )["runs"][0]
    assert [h["loss"] for h in resumed["training"]["history"]] == [h["loss"] for h in whole["training"]["history"]]
    assert [s["correct"] for s in resumed["evaluation"]["by_difficulty"]] == [
        s["correct"] for s in whole["evaluation"]["by_difficulty"]
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["compare", "slowstart"], "unknown preset 'slowstart'"),
        (["compare", "quickstart", "--methods", "cott"], "did you mean 'cot'"),
        (["compare", "quickstart", "--methods", "cot,cot"], "named twice"),
        (["compare", "quickstart", "--methods", ""], "at least one"),
        (["compare", "quickstart", "--task", "gruop"], "group"),
        (["compare", "quickstart", "--seeds", "0"], "seeds"),
        (["compare", "quickstart", "--steps", "0"], "steps"),
        (["compare", "quickstart", "--methods", "direct", "--steps", "1", "--items", "0"], "items"),
        (["compare", "quickstart", "--nothing"], "nothing"),
        (["tasks", "chian"], "chain"),
        (["tasks", "group", "--split", "dev"], "split"),
    ],
    ids=lambda v: " ".join(v) if isinstance(v, list) else "",
)
def test_bad_input_is_one_line_and_exit_code_2(tmp_path, latentcot, arguments, message):
    done = latentcot(*arguments, *(["--out", "out"] if arguments[0] == "compare" else []))
    assert done.returncode == 2, done.stderr
    assert message in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["slowstart"], "unknown preset 'slowstart'"),
        (["hybrid-ratio", "--methods", "gla,gla"], "gla named twice"),
        (["--methods", ","], "at least one"),
        (["--jobs", "0"], "jobs"),
        (["--task", "gruop"], "did you mean 'group'"),
    ],
)
def test_what_can_be_refused_without_torch_is_refused_without_it(tmp_path, arguments, message):
    code = (
        "import sys\n"
        "from latentcot.cli import main\n"
        "try:\n"
        "    main()\n"
        "finally:\n"
        "    print(*sorted({'torch', 'transformers'} & set(sys.modules)))"
    )
    command = [sys.executable, "-c", code, "compare", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=300)
    assert done.returncode == 2, done.stderr
    assert message in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert done.stdout.strip() == ""
    assert not list(tmp_path.iterdir())


def test_the_command_line_knows_every_preset():
    assert set(cli.PRESETS) == set(PRESETS)


def test_a_file_in_place_of_the_folder_is_one_line_and_stays(tmp_path, latentcot):
    (tmp_path / "out").write_text("mine")
    with pytest.raises(ValueError, match="out is a file"):
        run_comparison(with_options(quickstart(), methods=["direct"], steps=1), tmp_path / "out")
    done = latentcot("compare", "quickstart", "--methods", "direct", "--steps", "1", "--out", "out")
    assert done.returncode == 2, done.stderr
    assert "out is a file" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert (tmp_path / "out").read_text() == "mine"


def test_no_command_shows_the_help_and_an_interrupt_says_how_to_go_on(tmp_path, latentcot, monkeypatch):
    done = in_a_process(cwd=tmp_path)
    assert done.returncode == 2
    assert "Usage" in done.stdout + done.stderr
    assert "error" not in done.stderr

    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("latentcot.compare.run_comparison", stop)
    done = latentcot("compare")
    assert done.returncode == 130
    assert "run the same command again to continue" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_damaged_checkpoint_is_one_line_and_nothing_is_written(tmp_path, latentcot):
    folder = tmp_path / "out" / "runs" / "direct-seed0"
    folder.mkdir(parents=True)
    (folder / "checkpoint.safetensors").write_bytes(b"not a checkpoint")
    done = latentcot("compare", "quickstart", "--methods", "direct", "--steps", "5", "--out", str(tmp_path / "out"))
    assert done.returncode == 2
    assert "damaged" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert [p.name for p in folder.iterdir()] == ["checkpoint.safetensors"]
    assert not (tmp_path / "out" / "results.json").exists()


def test_settings_that_do_not_fit_are_found_before_anything_runs():
    from latentcot.compare import MethodSpec

    comparison = quickstart()
    with pytest.raises(ValueError, match="core"):
        check(
            replace(
                comparison, methods=(MethodSpec("depth_recurrence", "latent", {"prelude": 9, "core": 0, "coda": 0}),)
            )
        )


def test_a_longest_trained_difficulty_without_test_items_is_found_before_anything_runs():
    few = {"group": "Z2", "min_difficulty": 1, "max_difficulty": 2, "data_seed": 1}
    with pytest.raises(ValueError, match="no test examples of difficulty 2"):
        check(replace(quickstart(), task_config=few))


def test_another_task_runs_on_its_own_levels(tmp_path, monkeypatch):
    """Several tokens a step, two options as answers, levels of its own: the whole way to the report."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0}, raising=False)  # one core: one worker of one thread
    methods = ["direct", "cot", "coconut", "masked_diffusion"]
    for name in ("chain", "prosqa_balanced"):
        comparison = with_options(quickstart(), steps=3, items=20, methods=methods, task=name)
        comparison = replace(comparison, batch_size=8)  # problems of these tasks take long to make
        results = run_comparison(comparison, tmp_path / name)
        write_report(results, tmp_path / name)
        assert [run["method"] for run in results["runs"]] == methods
        assert results["trained_to"] == make_tasks(comparison)[0].config.max_difficulty


def test_asking_the_same_item_again_makes_nothing_surer():
    few = [{"accuracy": 1.0, "items": 4, "distinct": 4}, {"accuracy": 0.5, "items": 100, "distinct": 100}]
    repeated = [few[0] | {"items": 100}, few[1]]
    assert _item_error(repeated) == _item_error(few)
    by_hand = ((5 / 6) * (1 / 6) / 4 + (51 / 102) * (51 / 102) / 100) ** 0.5 / 2
    assert _item_error(few) == pytest.approx(by_hand)
    assert _item_error([few[0]]) > 0.15, "four right answers of four are no certainty"


def test_one_seed_claims_less_than_three():
    """How many standard errors make a difference depends on the seeds behind them."""
    assert Claim("a", "b", 0.03, 0.01, seeds=1).verdict == "above"
    assert Claim("a", "b", 0.025, 0.01, seeds=3).verdict == "not told apart"
    assert Claim("a", "b", 0.03, 0.01, seeds=3).verdict == "above"
    assert Claim("a", "b", 0.03, 0.01, seeds=2).verdict == "not told apart"


def test_training_and_evaluation_tasks_share_splits():
    training, evaluation = make_tasks(quickstart())
    assert training.config.max_difficulty == 9
    assert evaluation.config.max_difficulty == 16
    example = training.example("train", 5)
    assert evaluation.split_of(example) == "train"
