"""The depth study: controls that are equal in what they claim, runs that resume, figures and verdicts that follow from them."""

import copy
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from latentcot.cli import app
from latentcot.compare.depth import (
    SCHEMA,
    STACKS,
    DepthJob,
    DepthStudy,
    SudokuPart,
    TokenPart,
    check_depth,
    default_depth,
    plan,
    quick_depth,
    run_depth_study,
    select_tasks,
    sudoku9_depth,
)
from latentcot.compare.depth_report import page, terminal_table, write_depth_report
from latentcot.compare.depth_runs import measure_puzzles, run_depth_job, without_nan
from latentcot.compare.depth_summary import (
    compare_figures,
    last_monitors,
    p_hop_bar,
    summarise_dial,
    summarise_stacks,
    verdicts,
)
from latentcot.compare.hybrid_ratio_summary import Figure
from latentcot.compare.jobs import load_job
from latentcot.recurrent_depth.recursive_solvers import (
    DeepSupervision,
    RecursiveSolver,
    SegmentOutput,
    SupervisionConfig,
)
from latentcot.training import count_parameters


def small() -> DepthStudy:
    study = quick_depth()
    parts: list[TokenPart | SudokuPart] = []
    for part in study.parts:
        if isinstance(part, TokenPart) and part.task == "p_hop":
            train = replace(part.train, steps=4, checkpoint_every=2, log_every=1)
            parts.append(replace(part, width=16, mlp_width=16, batch=8, items=12, train=train))
        elif isinstance(part, SudokuPart):
            sizes = {**part.sizes, "hidden_size": 16, "multiple_of": 16}
            training = replace(part.training, steps=4)
            parts.append(replace(part, sizes=sizes, training=training, puzzles=30, test=40, batch=8))
    return replace(study, parts=tuple(parts))


@pytest.fixture(scope="module")
def done(tmp_path_factory) -> tuple[Path, dict]:
    out = tmp_path_factory.mktemp("depth")
    threads = torch.get_num_threads()
    for job in plan(small(), out, 2):
        run_depth_job(job)
    torch.set_num_threads(threads)
    return out, run_depth_study(small(), out, seeds=2, jobs=1, console=Console(quiet=True))


def test_controls_are_equal_in_parameters_or_in_flops():
    for part in default_depth().parts:
        if isinstance(part, TokenPart):
            task = part.make_task()
            made = {stack: part.reasoner(stack, task, 0) for stack in STACKS}
            prompts = task.batch("test", range(4)).prompts
            cost = {stack: reasoner.answer(prompts).flops for stack, reasoner in made.items()}
            assert torch.equal(cost["looped"], cost["same_flops"])
        else:
            made = {stack: part.model(stack, 0) for stack in STACKS}
            price = {stack: RecursiveSolver(part.solver(stack)).flops(16) for stack in STACKS}
            assert price["looped"] == pytest.approx(price["same_flops"], rel=1e-9)
        size = {stack: count_parameters(model) for stack, model in made.items()}
        assert size["looped"] == size["same_parameters"] < size["same_flops"]


def test_one_turn_of_the_loop_is_the_control_of_equal_parameters():
    part = default_depth().parts[0]
    assert isinstance(part, TokenPart)
    task = part.make_task()
    looped, control = (part.reasoner(stack, task, 3) for stack in ("looped", "same_parameters"))
    control.load_state_dict(looped.state_dict())
    batch = task.batch("test", range(5))
    once = looped.recur(batch.prompts.ids, 1).logits  # type: ignore[operator]
    torch.testing.assert_close(once, control.backbone(input_ids=batch.prompts.ids).logits)


def test_results_hold_every_run_and_a_second_call_runs_nothing(done):
    out, results = done
    assert len(results["runs"]) == 2 * 3 * 2
    assert not list(out.rglob("checkpoint.safetensors"))
    stamps = {path: path.stat().st_mtime_ns for path in out.rglob("runs/*/result.json")}
    again = run_depth_study(small(), out, seeds=2, jobs=1, console=Console(quiet=True))
    assert again["runs"] == results["runs"]
    assert stamps == {path: path.stat().st_mtime_ns for path in stamps}
    for run in results["runs"]:
        measured = run["measured"]
        assert set(measured) == (
            {"by_level", "dial", "exit", "seconds"} if run["stack"] == "looped" else {"by_level", "seconds"}
        )
        for level, found in measured.get("exit", {}).items():
            items = measured["by_level"][level]["items"]
            assert sum(found["counts"].values()) == items
            assert found["mean"] == pytest.approx(sum(int(n) * c for n, c in found["counts"].items()) / items)


def test_a_killed_run_goes_on_from_its_checkpoint(done, tmp_path):
    _, results = done
    job = next(j for j in plan(small(), tmp_path, 2) if j.name == "p_hop-looped-seed1")

    def stop(name: str, step: int, of: int, what: str) -> None:
        if step == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_depth_job(job, stop)
    assert (job.folder / "checkpoint.safetensors").is_file()
    threads = torch.get_num_threads()
    resumed = run_depth_job(job)
    torch.set_num_threads(threads)
    whole = next(run for run in results["runs"] if run["name"] == job.name)
    assert resumed["training"]["history"] == whole["training"]["history"]
    assert resumed["measured"]["by_level"] == whole["measured"]["by_level"]
    assert load_job(replace(job, seed=1), SCHEMA) is not None
    with pytest.raises(ValueError, match="another configuration"):
        load_job(replace(job, seed=0), SCHEMA)


class Late:
    """Knows the targets after two segments and halts after three; a stand-in for a trained solver."""

    def __init__(self, puzzles):
        self.known = {tuple(i): t for i, t in zip(puzzles.inputs.tolist(), puzzles.targets, strict=True)}

    def model(self) -> DeepSupervision:
        known = self.known

        class Network(torch.nn.Module):
            def start(self, inputs):
                return torch.zeros(len(inputs["grid"]))

            def forward(self, state, inputs):
                answers = torch.stack([known[tuple(row)] for row in inputs["grid"].tolist()])
                answers = torch.where(state[:, None] >= 1, answers, inputs["grid"])
                return state + 1, SegmentOutput(torch.nn.functional.one_hot(answers, 6).float(), state - 1.5)

        return DeepSupervision(Network(), SupervisionConfig(segments=4))


def test_puzzles_are_counted_by_blanks_segment_by_segment():
    part = default_depth().parts[-1]
    assert isinstance(part, SudokuPart)
    test = part.make_task().grids("test", range(20))
    found = measure_puzzles(Late(test).model(), test, part, 4, 10.0, "cpu")
    blanks = {str(n) for n in (test.inputs == 1).sum(1).tolist()}
    assert set(found["by_level"]) == blanks
    assert {n: {s["accuracy"] for s in by.values()} for n, by in found["dial"].items()} == {
        "1": {0.0}, "2": {1.0}, "4": {1.0}, "8": {1.0}, "16": {1.0}
    }  # fmt: skip
    assert all(by["flops"] == 40.0 for by in found["by_level"].values())
    assert all(by["mean"] == 3.0 and by["counts"].keys() == {"3"} for by in found["exit"].values())


def test_figures_and_page(done, tmp_path):
    _, results = done
    assert [row.stack for row in summarise_stacks(results, "p_hop")] == list(STACKS)
    dial = summarise_dial(results, "sudoku")
    assert dial.trained == 8
    assert list(dial.accuracy) == [1, 2, 4, 8, 16]
    assert sum(dial.exit_counts.values()) == 2 * 40
    assert set(last_monitors([run for run in results["runs"] if run["name"] == "p_hop-looped-seed0"])) >= {
        "loss_at_one"
    }
    assert last_monitors([]) == {}
    path = write_depth_report(results, tmp_path)
    text = path.read_text()
    for line in (*verdicts(results), str(p_hop_bar(results)), "## p_hop", "## sudoku", "| blanks |", "best shortcut"):
        assert line in text
    pictures = sorted(p.name for p in (tmp_path / "depth").iterdir())
    assert pictures == [f"{task}-{kind}.png" for task in ("p_hop", "sudoku") for kind in ("dial", "exits", "levels")]
    assert all(f"(depth/{name})" in text for name in pictures)
    assert terminal_table(results).row_count == 6
    assert page(results).count("\n## ") == 5


def with_accuracy(results: dict, figures: dict[str, tuple[float, float]]) -> dict:
    """The p-hop runs with the given accuracy of both seeds at p = 1 (and the same at p = 2)."""
    changed = copy.deepcopy(results)
    for run in changed["runs"]:
        if run["task"] == "p_hop":
            value = figures[run["stack"]][run["seed"]]
            for levels in (run["measured"]["by_level"], *run["measured"].get("dial", {}).values()):
                for score in levels.values():
                    score["accuracy"] = value
    return changed


def test_verdicts_follow_from_figures_and_their_spread(done):
    _, results = done
    clear = with_accuracy(
        results, {"looped": (0.99, 0.98), "same_parameters": (0.5, 0.51), "same_flops": (0.985, 0.985)}
    )
    said = verdicts(clear)
    assert said[0].startswith("p_hop: the loop (0.985) beats same parameters (0.505;")
    assert "not told apart from same flops" in said[1] or "is level with same flops" in said[1]
    bar = p_hop_bar(clear)
    assert bar is not None
    assert "met at p = 1, 2, 3" in bar
    worse = with_accuracy(results, {"looped": (0.5, 0.51), "same_parameters": (0.9, 0.91), "same_flops": (0.5, 0.51)})
    assert "loses to same parameters" in verdicts(worse)[0]
    assert "not met" in str(p_hop_bar(worse))
    wide = with_accuracy(results, {"looped": (0.99, 0.3), "same_parameters": (0.5, 0.5), "same_flops": (0.5, 0.5)})
    assert "not told apart from" in verdicts(wide)[0]
    alone = {**clear, "runs": [run for run in clear["runs"] if run["seed"] == 0]}
    assert "one seed each, nothing is decided" in verdicts(alone)[0]
    assert compare_figures(Figure(0.5, 0.001, 3), Figure(0.5, 0.001, 3))[0] == "is level with"


def test_what_is_wrong_is_said_before_anything_runs(tmp_path):
    study = default_depth()
    check_depth(study)
    hop, *_, sudoku = study.parts
    assert isinstance(hop, TokenPart)
    assert isinstance(sudoku, SudokuPart)
    with pytest.raises(ValueError, match="at least one task"):
        check_depth(replace(study, parts=()))
    with pytest.raises(ValueError, match="named twice"):
        check_depth(replace(study, parts=(hop, hop)))
    with pytest.raises(ValueError, match="leaves out the number that is trained, 5"):
        check_depth(replace(study, parts=(replace(hop, recurrences=5),)))
    with pytest.raises(ValueError, match="rising numbers"):
        check_depth(replace(study, parts=(replace(hop, dial=(4, 2)),)))
    with pytest.raises(ValueError, match="must be even"):
        check_depth(replace(study, parts=(replace(sudoku, sizes={**sudoku.sizes, "layers": 1, "cycles": 1}),)))
    with pytest.raises(ValueError, match=r"tasks: \['p-hop'\] given, expected some of p_hop"):
        select_tasks(study, ["p-hop"])
    assert [p.task for p in select_tasks(study, ["mano", "chain"]).parts] == ["chain", "mano"]
    assert select_tasks(study, None) is study
    with pytest.raises(ValueError, match="seeds: at least 1"):
        run_depth_study(study, tmp_path, seeds=0)


def test_the_study_of_9x9_is_for_a_gpu(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="is for a GPU"):
        run_depth_study(sudoku9_depth(), tmp_path)
    part = sudoku9_depth().parts[0]
    assert isinstance(part, SudokuPart)
    assert part.solver("same_flops").layers == 21
    assert part.make_task().config.size == 9


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["depth", "--methods", "direct"], "--task chooses tasks"),
        (["depth", "--task", "maze"], "tasks: "),
        (["depth", "--steps", "3"], "--steps belongs to other comparisons"),
        (["depth-sudoku9", "--quick"], "--quick belongs to other studies"),
    ],
)
def test_the_command_line_refuses_what_does_not_belong(given, message, tmp_path):
    found = CliRunner().invoke(app, ["compare", *given, "--out", str(tmp_path)])
    assert isinstance(found.exception, ValueError)
    assert message in str(found.exception)


def test_the_control_of_equal_flops_may_have_a_rate_of_its_own():
    part = small().parts[-1]
    assert isinstance(part, SudokuPart)
    slower = replace(part, same_flops_rate=1e-5)
    for stack in STACKS:
        other = {"same_flops": 1e-5}.get(stack, part.training.learning_rate)
        assert slower.train(stack, 3) == replace(part.training, learning_rate=other, seed=3)
        one, two = (DepthJob(p, stack, 0).identity() for p in (replace(part, same_flops_rate=None), slower))
        assert (one == two) == (stack != "same_flops"), "results of the other stacks stay results of this study"


def test_names_and_numbers_that_are_none():
    jobs = plan(default_depth(), Path("out"), 2)
    assert len({job.name for job in jobs}) == len(jobs) == 4 * 3 * 2
    assert isinstance(jobs[0], DepthJob)
    assert json.loads(json.dumps(jobs[0].identity())) == jobs[0].identity()
    assert without_nan({"a": [float("nan"), 1.0]}) == {"a": [None, 1.0]}
