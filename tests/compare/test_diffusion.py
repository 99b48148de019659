"""The diffusion study: layouts, arms of equal size, samplers, runs that pause and go on."""

import json
from dataclasses import replace

import pytest
import torch

from latentcot.compare import diffusion_run
from latentcot.compare.diffusion_arms import ARMS, SAMPLERS, PerPass, Sizes, make_arm, sampler_names, split_arm
from latentcot.compare.diffusion_problems import SudokuProblem, TextProblem
from latentcot.compare.diffusion_run import CanvasData, Paused, measure, run_arm
from latentcot.compare.diffusion_sudoku import PRESETS, main, run
from latentcot.reasoner import SPECIAL, StepContext
from latentcot.tasks.sudoku import grid_metrics
from latentcot.training import TrainConfig, count_parameters

SMALL = Sizes(layers=2, width=16, heads=2, mlp_width=64)
TRAIN = TrainConfig(steps=4, learning_rate=2e-3, warmup_steps=1, checkpoint_every=2)


@pytest.fixture(scope="module")
def sudoku():
    return SudokuProblem({"size": 4, "blanks": 6, "split_by": "pattern"}, puzzles=20, test=5)


@pytest.fixture(scope="module")
def chain():
    return TextProblem("chain", {"max_difficulty": 2, "modulus": 5, "distractors": 0, "variables": 4}, 50, 6, block=5)


def arm_of(name, problem):
    return make_arm(name, SMALL, problem.vocab_size, problem.length, problem.block)


def test_both_layouts_of_a_grid_are_the_same_puzzles(sudoku):
    whole, behind = sudoku.training(3, 8, 1, True), sudoku.training(3, 8, 1, False)
    assert whole.ids.shape == (8, 16)
    assert behind.ids.shape == (8, 32)
    assert torch.equal(behind.ids[:, 16:], whole.ids)
    assert torch.equal(behind.maskable[:, 16:], whole.maskable)
    assert not behind.maskable[:, :16].any()
    assert (whole.maskable.sum(1) == 6).all()
    clues = ~whole.maskable
    assert torch.equal(behind.ids[:, :16][clues], whole.ids[clues])
    assert (behind.ids[:, :16][whole.maskable] == sudoku.task.vocabulary.id(".")).all()
    assert not torch.equal(whole.ids, sudoku.training(4, 8, 1, True).ids)


def test_training_grids_obey_the_rules_and_gold_scores_one(sudoku):
    ids = sudoku.training(0, 32, 0, True).ids - (SPECIAL.count - 1)
    figures = grid_metrics(torch.ones_like(ids), ids, ids, 4)
    assert int(figures["violations"].sum()) == 0
    for whole in (True, False):
        gold = sudoku.test("6 blanks", whole).ids
        assert sudoku.score("6 blanks", gold, whole)["exact"] == 1.0
        wrong = gold.clone()
        wrong[0, -1] = wrong[0, -2]
        assert sudoku.score("6 blanks", wrong, whole)["exact"] == pytest.approx(0.8)


def test_text_has_one_length_and_gold_scores_one(chain):
    batch = chain.training(0, 16, 0, True)
    assert batch.real is not None
    assert batch.ids.shape[1] <= chain.length
    assert batch.maskable[:, -chain.text :].all()
    assert not batch.maskable[:, : -chain.text].any()
    assert (batch.ids[:, -1] == SPECIAL.eos).all()
    assert (batch.ids[~batch.real] == SPECIAL.pad).all()
    for name in chain.tests:
        gold = chain.test(name, True).ids
        assert chain.score(name, gold, True)["exact"] == 1.0
        assert chain.score(name, gold.masked_fill(gold == SPECIAL.ans, SPECIAL.eos), True)["exact"] == 0.0
    assert chain.tests == ("difficulty 1", "difficulty 2")


@pytest.mark.parametrize("way", ["autoregressive", "masked", "block"])
def test_stacks_have_equal_parameters(way, sudoku):
    sizes = Sizes()
    soft, mixed = (
        count_parameters(make_arm(f"{way}-{s}", sizes, sudoku.vocab_size, 32, 4)) for s in ("softmax", "hybrid")
    )
    assert abs(mixed - soft) / soft < 0.02


def test_grids9_stacks_have_equal_parameters():
    sizes = PRESETS["grids9"].sizes
    soft, mixed = (count_parameters(make_arm(f"masked-{s}", sizes, 21, 162, 9)) for s in ("softmax", "hybrid"))
    assert abs(mixed - soft) / soft < 0.02


@pytest.mark.parametrize("name", ARMS)
def test_given_tokens_stay_and_the_answer_does_not_leak(name, sudoku):
    arm = arm_of(name, sudoku).eval()
    canvas = sudoku.test("6 blanks", arm.whole)
    blind = replace(canvas, ids=canvas.ids.masked_fill(canvas.maskable, SPECIAL.pad))
    for sampler in sampler_names(arm.way):
        filled, nfe = arm.fill(canvas, SAMPLERS[sampler])
        assert torch.equal(filled[~canvas.maskable], canvas.ids[~canvas.maskable])
        assert not (filled == SPECIAL.mask).any()
        again, _ = arm.fill(blind, SAMPLERS[sampler])
        assert torch.equal(filled, again)
        assert int(nfe.min()) >= 1


def test_passes_are_counted(sudoku, chain):
    masked = arm_of("masked-softmax", sudoku).eval()
    canvas = sudoku.test("6 blanks", True)
    expected = {"confidence": 6, "2 a pass": 3, "random order": 6, "left to right": 6, "all at once": 1}
    for sampler, passes in expected.items():
        assert (masked.fill(canvas, SAMPLERS[sampler])[1] == passes).all(), sampler
    block = arm_of("block-softmax", sudoku).eval()
    behind = sudoku.test("6 blanks", False)
    blocks = behind.maskable[:, 16:].view(-1, 4, 4).any(2).sum(1)
    # the reading of the puzzle, a pass a block, a commit between two of them
    last = behind.maskable[:, 16:].view(-1, 4, 4).any(2)
    span = torch.tensor([int(row.nonzero()[-1]) for row in last])
    nfe = block.fill(behind, SAMPLERS["all at once"])[1]
    assert (nfe >= 2 * blocks).all()
    assert (nfe <= blocks + 1 + span).all()
    causal = arm_of("autoregressive-softmax", chain).eval()
    filled, nfe = causal.fill(chain.test("difficulty 2", False), SAMPLERS["left to right"])
    text = filled[:, -chain.text :]
    written = torch.where((text == SPECIAL.eos).any(1), (text == SPECIAL.eos).long().argmax(1) + 1, chain.text)
    assert torch.equal(nfe, written)


def test_autoregressive_filling_is_the_argmax_of_the_training_pass(sudoku):
    arm = arm_of("autoregressive-hybrid", sudoku).eval()
    canvas = sudoku.test("6 blanks", False)
    filled, _ = arm.fill(canvas, SAMPLERS["left to right"])
    with torch.no_grad():
        hidden = arm.backbone.model(filled)[0]
        logits = arm.backbone.lm_head(hidden)[:, :-1]
    logits[..., SPECIAL.mask] = -torch.inf
    open_ = canvas.maskable[:, 1:] & ((filled == SPECIAL.eos).long().cumsum(1)[:, :-1] == 0)
    assert torch.equal(logits.argmax(-1)[open_], filled[:, 1:][open_])


def test_positions_tell_cells_apart(sudoku):
    arm = arm_of("masked-softmax", sudoku).eval()
    canvas = sudoku.test("6 blanks", True)
    with torch.no_grad():
        before = arm.backbone(canvas.ids).logits
        arm.places.weight.zero_()
        assert not torch.allclose(arm.backbone(canvas.ids).logits, before)


@pytest.mark.parametrize("name", ARMS)
def test_every_arm_learns_from_text(name, chain):
    arm = arm_of(name, chain)
    batch = chain.training(0, 6, 0, arm.whole)
    context = StepContext(0, 1, arm.phases()[0], torch.Generator().manual_seed(0), 0, 1)
    out = arm.loss(batch, context)  # type: ignore[arg-type]
    out.loss.backward()
    assert out.flops > 0
    for weight in (arm.places.weight, arm.backbone.lm_head.weight):
        assert isinstance(weight.grad, torch.Tensor)
        assert float(weight.grad.abs().sum()) > 0


def test_a_paused_run_is_the_run_that_was_not(sudoku, tmp_path):
    whole, expected = run_arm(sudoku, "masked-softmax", SMALL, TRAIN, 4, tmp_path / "a")
    with pytest.raises(Paused, match="2 of 4"):
        run_arm(sudoku, "masked-softmax", SMALL, TRAIN, 4, tmp_path / "b", pause_after=1e-9)
    rest, found = run_arm(sudoku, "masked-softmax", SMALL, TRAIN, 4, tmp_path / "b")
    for one, other in zip(whole.state_dict().values(), rest.state_dict().values(), strict=True):
        assert torch.equal(one, other)
    assert found["solved"] == expected["solved"]
    assert found["training"]["steps"] == 4
    assert found["training"]["work_seconds"] > 0


def test_a_killed_run_keeps_count_of_the_work_before(sudoku, tmp_path):
    def die(step: int, of: int, loss: float, phase: str) -> None:
        if step == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_arm(sudoku, "masked-softmax", SMALL, TRAIN, 4, tmp_path, watch=die)
    spent = json.loads((tmp_path / "plan.json").read_text())["spent"]
    assert spent > 0
    _, found = run_arm(sudoku, "masked-softmax", SMALL, TRAIN, 4, tmp_path)
    assert found["training"]["work_seconds"] > spent


def test_what_starts_a_timing_is_not_taken_for_steps(sudoku, monkeypatch):
    """A start of 0.2 s and steps of 0.02 s: ten steps alone would be taken for twice as long as they are."""
    now = [0.0]
    monkeypatch.setattr(diffusion_run.Clock, "now", lambda self: now[0])
    monkeypatch.setattr(
        diffusion_run, "train", lambda arm, data, config: now.__setitem__(0, now[0] + 0.2 + 0.02 * config.steps)
    )
    arm = arm_of("masked-softmax", sudoku)
    steps = diffusion_run.steps_within(arm, CanvasData(sudoku, 4, 0, True), TRAIN, 40.0, "cpu")
    assert 0.97 * 0.8 * 2000 < steps <= 0.97 * 2000
    assert now[0] < 0.1 * 40
    assert diffusion_run.steps_within(arm, CanvasData(sudoku, 4, 0, True), TRAIN, 0.1, "cpu") >= 1


def test_data_do_not_depend_on_the_number_of_processes(sudoku):
    one = next(CanvasData(sudoku, 8, 0, True).stream(2))
    halves = [next(CanvasData(sudoku, 4, 0, True).stream(2, rank, 2)) for rank in (0, 1)]
    assert torch.equal(torch.cat([h.ids for h in halves]), one.ids)


def test_measure_has_every_sampler(sudoku):
    found = measure(arm_of("masked-hybrid", sudoku), sudoku, rows=2)
    assert set(found) == {"6 blanks"}
    assert set(found["6 blanks"]) == set(SAMPLERS)
    assert all(0 <= row["exact"] <= 1 and row["items"] == 5 for row in found["6 blanks"].values())


def test_the_command_runs_reads_its_puzzles_and_goes_on(tmp_path, capsys):
    puzzles = tmp_path / "puzzles.safetensors"
    common = ["--preset", "sanity4", "--limit", "10", "--test", "4", "--rows", "4", "--puzzles", str(puzzles)]
    main([*common, "--prepare", "--out", str(tmp_path)])
    assert puzzles.is_file()
    out = tmp_path / "run"
    main([*common, "--seconds", "0.3", "--out", str(out)])
    report = json.loads((out / "result.json").read_text())
    assert report["training"]["steps"] >= 1
    assert set(report["solved"]["12 blanks"]) == set(SAMPLERS)
    assert report["baselines"]["12 blanks"].keys() == {"look-up"}
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main([*common, "--seconds", "0.4", "--out", str(out)])
    assert stop.value.code == 2
    assert "another folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "sanity5"}, "preset: 'sanity5' given"),
        ({"arm": "masked"}, "arm: 'masked' given, expected one of autoregressive-softmax"),
        ({"seconds": 1.0, "steps": 1}, "give one of them"),
        ({"seconds": -1.0}, "seconds: -1.0 given"),
        ({"pause_after": 0.0}, "pause_after: 0.0 given"),
    ],
)
def test_bad_input_is_named(arguments, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        run(**{"name": "sanity4", "arm": "masked-softmax", "out": tmp_path, **arguments})


def test_bad_values_are_named():
    with pytest.raises(ValueError, match="count: expected an integer of at least 1"):
        PerPass(0)
    with pytest.raises(ValueError, match="arm"):
        split_arm("softmax-masked")
    with pytest.raises(ValueError, match="mlp_width"):
        make_arm("masked-hybrid", replace(SMALL, mlp_width=1), 20, 32, 4)
