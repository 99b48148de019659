"""Faults of recurrent-depth and latent-thought code reported elsewhere, as tests (see the case ids in the names)."""

from dataclasses import replace

import pytest
import torch

from latentcot.backbone import HybridConfig, HybridForCausalLM
from latentcot.backbone.state import LayerState
from latentcot.reasoner import AnswerLimits, PromptBatch, StepContext, TaskBatch, TaskLimits
from latentcot.recurrent_depth import DepthRecurrence, ExitRule, Ouro
from latentcot.recurrent_depth.example_queue import ExampleQueue
from latentcot.recurrent_depth.latent_thoughts import Coconut, CoconutPause
from latentcot.recurrent_depth.recursive_solvers import (
    DeepSupervision,
    RecursiveSolver,
    SolverTraining,
    SupervisionConfig,
    train_solver,
    trm,
)

METHODS = {
    "depth_recurrence": (DepthRecurrence, {"sampler": {"mean": 3}}),
    "coconut": (Coconut, {"latents_per_step": 2, "max_stage": 3}),
    "coconut_pause": (CoconutPause, {"latents_per_step": 2, "max_stage": 3}),
}


def make(name: str):
    torch.manual_seed(0)
    config = HybridConfig(
        vocab_size=20,
        hidden_size=32,
        num_hidden_layers=4,
        period=4,
        attention={"num_heads": 4},
        gated_deltanet={"num_heads": 2, "head_dim": 16},
        initializer_range=0.2,
    )
    kind, settings = METHODS[name]
    return kind(HybridForCausalLM(config), settings).double()


@pytest.fixture
def batch() -> TaskBatch:
    """Three examples whose chains have 1, 2 and 5 steps."""
    ids = torch.tensor([[11, 12, 13], [14, 15, 16], [17, 18, 19]])
    counts = torch.tensor([1, 2, 5])
    return TaskBatch(
        prompts=PromptBatch(ids, torch.ones_like(ids, dtype=torch.bool), TaskLimits(20, 3, 5, 1, 1)),
        steps=torch.randint(11, 20, (3, 5, 1), generator=torch.Generator().manual_seed(0)),
        step_mask=(torch.arange(5) < counts[:, None])[..., None],
        answer_ids=torch.tensor([[11], [12], [13]]),
        answer_mask=torch.ones(3, 1, dtype=torch.bool),
        difficulty=counts,
        index=torch.arange(3),
    )


@pytest.mark.parametrize("stage", [3, 4])
@pytest.mark.parametrize("name", ["coconut", "coconut_pause"])
def test_R_2_latents_are_six_for_every_chain_in_training_and_answering(name, batch, stage, monkeypatch):
    model = make(name)
    fed: list[int] = []
    think, opening = model.think, model._opening
    monkeypatch.setattr(model, "think", lambda prompts, n: (fed.extend([n] * len(prompts)), think(prompts, n))[1])

    def counted(prompts, n):
        segments = opening(prompts, n)
        fed.extend([] if segments is None else (segments[-1].ids == 10).sum(1).tolist())
        return segments

    monkeypatch.setattr(model, "_opening", counted)
    phase = model.phases()[stage]
    model.loss(batch, StepContext(0, 1, phase, torch.Generator().manual_seed(0)))
    assert fed == [6, 6, 6]
    fed.clear()
    passes = [model.answer(batch.prompts.rows(torch.tensor([row]))).sequential_passes for row in range(3)]
    assert fed == [6, 6, 6]
    assert len({int(p) for p in passes}) == 1


@pytest.mark.parametrize("name", METHODS)
def test_R_2_answers_do_not_depend_on_gold_steps(name, batch):
    model = make(name)
    empty = replace(batch, steps=batch.steps[:, :0], step_mask=batch.step_mask[:, :0])
    nonsense = replace(batch, steps=torch.full_like(batch.steps, 19), step_mask=torch.ones_like(batch.step_mask))
    whole = model.answer(batch.prompts)
    for changed in (empty, nonsense):
        output = model.answer(changed.prompts)
        assert torch.equal(output.ids, whole.ids)
        assert torch.equal(output.sequential_passes, whole.sequential_passes)
        assert torch.equal(output.flops, whole.flops)


def test_R_3_rows_that_stop_at_different_depths_equal_the_rows_alone():
    model = make("depth_recurrence")
    with torch.no_grad():
        model.adapter.weight[:, :32] *= 0.02  # forget the state fast, so that rows settle
    ids = torch.tensor([[11, 12, 13, 14], [14, 15, 16, 19]])
    start = torch.randn(2, 4, 32, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    start *= torch.tensor([100.0, 1e-4])[:, None, None]  # one row has far to go
    rule = ExitRule("latent_difference", 0.1)
    together = model.recur(ids, 20, initial_state=start, exit_rule=rule)
    assert together.recurrences.unique().numel() == 2
    for row in range(2):
        alone = model.recur(ids[row : row + 1], 20, initial_state=start[row : row + 1], exit_rule=rule)
        assert alone.recurrences[0] == together.recurrences[row]
        torch.testing.assert_close(alone.logits[0], together.logits[row], atol=1e-10, rtol=0)


def test_R_3_a_depth_that_was_never_stored_raises():
    model = make("depth_recurrence")
    ids = torch.tensor([[11, 12, 13]])
    state = model.recur(ids, 2, use_cache=True).state
    with pytest.raises(ValueError, match="2 recurrences"):
        model.recur(ids, 4, state=state)
    with pytest.raises(ValueError, match="gaps"):
        model.recur(ids, 4, exit_rule=ExitRule("kl"), use_cache=True)


@pytest.mark.parametrize("cuts", [(5, 4, 1, 1, 1), (1,) * 12, (2, 10)], ids=str)
def test_S_1_recurrent_depth_state_continues_with_any_number_of_tokens(cuts):
    model = make("depth_recurrence")
    ids = torch.randint(11, 20, (2, 12), generator=torch.Generator().manual_seed(0))
    start = torch.randn(2, 12, 32, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    whole = model.recur(ids, 2, initial_state=start).logits
    state, parts, at = None, [], 0
    for n in cuts:
        output = model.recur(ids[:, at : at + n], 2, initial_state=start[:, at : at + n], state=state, use_cache=True)
        state, at = output.state, at + n
        parts.append(output.logits)
    torch.testing.assert_close(torch.cat(parts, 1), whole, atol=1e-10, rtol=0)


def test_R_2_an_explicit_number_of_latents_is_the_same_for_every_row(batch):
    model = make("coconut")
    output = model.answer(batch.prompts, AnswerLimits(knobs={"latents": 3}))
    assert output.sequential_passes.tolist() == [4, 4, 4]


# -- carried states and the rows they belong to -------------------------------------------------------------------


def solver_with_halts(halts: list[list[bool]]) -> DeepSupervision:
    """A real recursive solver whose rows halt when the list says so, segment by segment."""
    torch.manual_seed(0)
    config = trm(6, 10, hidden_size=32, num_heads=4, multiple_of=16, prefix=2, cycles=1, latent_updates=2)
    model = DeepSupervision(RecursiveSolver(config).double(), SupervisionConfig(segments=8, explore=0.0))
    said = iter(halts)
    model.module.halts = lambda output: torch.tensor(next(said))  # type: ignore[assignment]
    return model


def test_R_1_a_free_row_starts_anew_and_a_busy_one_keeps_inputs_labels_and_state():
    grids = torch.randint(1, 6, (4, 10), generator=torch.Generator().manual_seed(1))  # a, b, c, d
    labels = torch.randint(1, 6, (4, 10), generator=torch.Generator().manual_seed(2))
    queue = ExampleQueue(4, lambda chosen: ({"grid": grids[list(chosen)]}, labels[list(chosen)]), seed=None)
    model = solver_with_halts([[True, False], [False, False], [False, True]])
    carry = model.begin(*queue.take(torch.zeros(2, dtype=torch.bool)))
    results = []
    for _ in range(3):
        inputs, targets = queue.take(carry.halted)
        result, carry = model(carry, inputs, targets)
        results.append(result)
        if len(results) == 2:  # [c from the initial state, b from its own carry]
            assert torch.equal(carry.inputs["grid"], grids[[2, 1]])
            assert torch.equal(carry.targets, labels[[2, 1]])
            assert carry.segments.tolist() == [1, 2]
    assert queue.given == 3  # d waits
    inputs, targets = queue.take(carry.halted)
    assert torch.equal(inputs["grid"][1], grids[3])
    # b after n segments of company is b alone, and so is c from its first segment on
    for row, example, begins in ((1, 1, 0), (0, 2, 1)):
        alone = solver_with_halts([[False]] * 3)
        one = {"grid": grids[example : example + 1]}, labels[example : example + 1]
        kept = alone.begin(*one)
        for result in results[begins:]:
            single, kept = alone(kept, *one)
            torch.testing.assert_close(single.logits[0], result.logits[row], atol=1e-6, rtol=0)


def test_R_1_an_epoch_is_the_data_set_whenever_rows_are_free():
    size = 7
    queue = ExampleQueue(size, lambda chosen: torch.tensor(chosen), seed=3)
    generator, seen = torch.Generator().manual_seed(0), []
    while queue.given < 3 * size:
        free = torch.rand(4, generator=generator) < 0.4
        given = queue.take(free)
        assert given.shape == (4,)
        seen += given[free].tolist()
    for epoch in range(3):
        assert sorted(seen[epoch * size : (epoch + 1) * size]) == list(range(size))
    assert seen[:size] != seen[size : 2 * size]
    with pytest.raises(ValueError, match="free: shape"):
        queue.take(torch.ones(4))


def test_R_1_training_takes_as_many_examples_as_rows_are_free_also_over_a_break(tmp_path):
    size, rows = 5, 3
    grids = torch.randint(1, 6, (size, 10), generator=torch.Generator().manual_seed(1))

    def trained(file, steps):
        def make(chosen):
            return {"grid": grids[list(chosen)]}, grids[list(chosen)]

        queue = ExampleQueue(size, make, seed=2)
        torch.manual_seed(0)
        config = trm(6, 10, hidden_size=32, num_heads=4, multiple_of=16, prefix=2, cycles=1, latent_updates=1)
        model = DeepSupervision(RecursiveSolver(config), SupervisionConfig(segments=3, explore=0.5))
        training = SolverTraining(steps=steps, learning_rate=1e-3, warmup_steps=1, average=None)
        done = train_solver(model, queue, training, rows=rows, checkpoint=file, log_every=1)
        return done, queue

    whole, queue = trained(None, 12)
    assert rows * 12 / 3 <= queue.given < rows * 12, "busy rows take nothing"
    cut, _ = trained(tmp_path / "run", 5)
    assert cut.steps == 5
    again, taken_up = trained(tmp_path / "run", 12)
    assert taken_up.given == queue.given
    for one, other in zip(whole.model.state_dict().values(), again.model.state_dict().values(), strict=True):
        assert torch.equal(one, other)
    assert [row["loss"] for row in again.history] == [row["loss"] for row in whole.history]
    # the examples that were started, in order, are whole epochs of the data set
    order = [queue.index(n) for n in range(2 * size)]
    assert sorted(order[:size]) == sorted(order[size:]) == list(range(size))


def test_R_1_a_queue_needs_the_rows_of_a_batch():
    model = solver_with_halts([])
    queue = ExampleQueue(2, lambda chosen: chosen)
    with pytest.raises(ValueError, match="a queue needs it"):
        train_solver(model, queue, SolverTraining(steps=1))
    with pytest.raises(ValueError, match="brings its own"):
        train_solver(model, lambda step: ({}, torch.zeros(1)), SolverTraining(steps=1), rows=2)


def test_R_1_answering_starts_every_example_from_the_initial_state():
    model = solver_with_halts([[False, False]] * 10)
    grids = torch.randint(1, 6, (2, 10), generator=torch.Generator().manual_seed(1))
    inputs = {"grid": grids}
    before = model.solve(inputs, segments=3, record=True)
    carry = model.begin(inputs, grids)
    _, carry = model(carry, inputs, grids)  # a training step in between leaves nothing behind
    after = model.solve(inputs, segments=3, record=True)
    for a, b in zip(before.history, after.history, strict=True):
        assert torch.equal(a, b)


# -- R-3 in stacks that are looped as a whole --------------------------------------------------------------------------


class AdditiveBlock(torch.nn.Module):
    """S <- S + v, o = S, with v the first channel of the input; says what it read."""

    norm_placement = "post"

    def __init__(self):
        super().__init__()
        self.outputs: list[float] = []

    def attn(self, hidden, context, state):
        after = hidden[:, -1, :1] + (0 if state is None else state["matrix"])
        return after[:, None].expand_as(hidden), LayerState("gla", {"matrix": after})

    def forward(self, hidden, context, state=None):
        mixed, after = self.attn(hidden, context, state)
        self.outputs.append(float(mixed[0, 0, 0]))
        return hidden, after


@pytest.mark.parametrize(("gaps", "expected"), [("copy", [11, 21, 21, 21]), ("hold", [11, 21, 1, 1])])
def test_R_3_what_a_token_that_stopped_at_loop_2_leaves_for_loops_3_and_4(gaps, expected, monkeypatch, tmp_path):
    config = HybridConfig(vocab_size=20, hidden_size=8, num_hidden_layers=1, mixer="gla", gla={"num_heads": 2})
    model = Ouro(HybridForCausalLM(config), {"steps": 4, "gaps": gaps})
    block = AdditiveBlock()
    model.backbone.model.layers[0] = block  # type: ignore[assignment]
    #        prompt (writes nothing)      first token: 10, 20, stops      second token
    inputs = iter([0.0, 0.0, 0.0, 0.0, 10.0, 20.0, 1.0, 1.0, 1.0, 1.0])

    def given(like):
        return torch.full((*like.shape[:2], 8), next(inputs, 0.0))

    monkeypatch.setattr(model.backbone, "embed", given)
    normed = iter(
        [True] * 3 + [False] + [True] + [False] + [True] * 3 + [False]
    )  # the last step of a token feeds no other
    monkeypatch.setattr(model.backbone.model.norm, "forward", lambda h: given(h) if next(normed) else h)
    gates = iter([-60.0, 60.0] + [-60.0] * 4)
    token = torch.tensor([[11]])
    monkeypatch.setattr(model.gate, "forward", lambda h: h[..., :1] * 0)
    states = model.unroll(token, use_cache=True).states
    assert states is not None
    monkeypatch.setattr(model.gate, "forward", lambda h: torch.full((*h.shape[:2], 1), next(gates)))
    _, states, taken = model.read_token(token, states, 0.5)
    assert taken.tolist() == [2]
    block.outputs.clear()
    model.read_token(token, states, 0.5)
    assert block.outputs == expected
