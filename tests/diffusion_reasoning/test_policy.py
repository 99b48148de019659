"""Policy gradient: estimators against enumeration and hand masks, the objective, rollouts, learning, bad input."""

# Options go through dictionaries of mixed types, and weights of modules are tensors: a type checker can not know either.
# pyright: reportCallIssue=false, reportArgumentType=false, reportAttributeAccessIssue=false

import itertools
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from latentcot.backbone import HybridConfig, HybridForCausalLM
from latentcot.diffusion_reasoning import DiffusionGenerationConfig, diffusion_generate
from latentcot.diffusion_reasoning.block_diffusion import BlockDiffusionModel
from latentcot.diffusion_reasoning.policy import DiffuGRPO, PolicyBatch
from latentcot.diffusion_reasoning.policy_estimators import (
    Coupled,
    Elbo,
    OneStep,
    PathProbability,
    Rollout,
    find_estimator,
)

MASK, EOS, VOCAB = 6, 2, 12


class Table(nn.Module):
    """Logits of position i from what the canvas holds, by a small bilinear form: every token counts."""

    def __init__(self, length: int = 8, seed: int = 0):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.weight = nn.Parameter(torch.randn(length, VOCAB, length, VOCAB, generator=generator, dtype=torch.float64))
        self.seen: list[Tensor] = []

    def forward(self, z: Tensor, attention_mask: Tensor) -> Tensor:
        self.seen.append(z)
        held = torch.nn.functional.one_hot(z, VOCAB).double() * attention_mask[..., None]
        n = z.shape[1]
        return torch.einsum("bjw,jwiv->biv", held, self.weight[:n, :, :n])


def backbone(seed: int = 0) -> HybridForCausalLM:
    torch.manual_seed(seed)
    config = HybridConfig(
        VOCAB, 16, 2, mixers=["gla", "attention"], intermediate_size=24, attention={"num_heads": 2}, gla={"num_heads": 2},
        initializer_range=0.3,
    )  # fmt: skip
    return HybridForCausalLM(config).double().eval()


def sampler(n: int = 4, **options: Any) -> DiffusionGenerationConfig:
    return DiffusionGenerationConfig(n, mask_id=MASK, eos_id=EOS, **{"temperature": 1.0, **options})


def some_rollout(rows: int = 3, prompt: int = 4, new: int = 4) -> Rollout:
    sequences = torch.randint(7, VOCAB, (rows, prompt + new), generator=torch.Generator().manual_seed(1))
    completion = (torch.arange(prompt + new) >= prompt).expand(rows, -1)
    return Rollout(
        sequences, completion, torch.ones_like(completion), completion, torch.arange(rows) // 3, torch.arange(rows)
    )


def logp(model: Table, z: Tensor, tokens: Tensor) -> Tensor:
    """``[L]`` of one row, the mask token left out."""
    with torch.no_grad():
        logits = model(z[None], torch.ones_like(z[None], dtype=torch.bool))[0]
    logits[:, MASK] = -torch.inf
    return logits.log_softmax(-1).gather(-1, tokens[:, None])[:, 0]


# -- estimators --------------------------------------------------------------------------------------------------------


def test_one_step_masks_the_completion_and_what_the_seed_says_of_the_prompt():
    model, rollout = Table(), some_rollout(200)
    found = OneStep()(model, rollout, MASK, 5)
    z = model.seen[-1]
    assert (z[:, 4:] == MASK).all()
    assert abs(float((z[:, :4] == MASK).double().mean()) - 0.15) < 0.05
    for row in range(3):
        expected = logp(model, z[row], rollout.sequences[row]) * rollout.completion[row]
        torch.testing.assert_close(found[row].detach(), expected)
    OneStep()(model, rollout, MASK, 5)
    assert torch.equal(model.seen[-1], z)
    OneStep()(model, rollout, MASK, 6)
    assert not torch.equal(model.seen[-1], z)
    OneStep(0.0)(model, rollout, MASK, 5)
    assert torch.equal(model.seen[-1][:, :4], rollout.sequences[:, :4])


def test_the_elbo_is_that_of_all_orders():
    """Mean over many seeds against the sum over all subsets; exact with one completion token; l is stratified."""
    model, rollout = Table(6), some_rollout(1, 3, 3)
    tokens = rollout.sequences[0]
    expected = 0.0
    for size in (1, 2, 3):
        subsets = list(itertools.combinations((3, 4, 5), size))
        for hidden in subsets:
            z = tokens.clone()
            z[list(hidden)] = MASK
            expected += float(logp(model, z, tokens)[list(hidden)].sum()) * (3 / size) / len(subsets) / 3
    many = rollout.select(torch.zeros(4000, dtype=torch.long))
    many = replace(many, row=torch.arange(4000))
    with torch.no_grad():
        found = Elbo(1)(model, many, MASK, 0).sum(1)
        assert abs(float(found.mean()) - expected) < 4 * float(found.std()) / math.sqrt(4000)
        model.seen.clear()
        Elbo(3)(model, many, MASK, 1)
        counts = torch.stack([(z == MASK).sum(1) for z in model.seen]).sort(0).values
        assert (counts == torch.tensor([[1], [2], [3]])).all()  # n = A: each number once
        one = some_rollout(2, 5, 1)
        a, b = (Elbo(2)(model, one, MASK, s) for s in (0, 1))
    torch.testing.assert_close(a, b)


def test_coupled_counts_every_token_once_a_pair():
    model, rollout = Table(), some_rollout(50)
    Coupled(2)(model, rollout, MASK, 3)
    for first, second in (model.seen[:2], model.seen[2:4]):
        hidden = (first == MASK), (second == MASK)
        assert torch.equal(hidden[0] ^ hidden[1], rollout.completion)
        assert not (hidden[0] & hidden[1]).any()
    assert not torch.equal(model.seen[0], model.seen[2])


def test_the_path_has_the_probability_of_what_was_drawn():
    """Against the log-probabilities of the logits that the sampler saw, token by token."""
    model, seen = Table(), []
    policy = DiffuGRPO(model, sampler(4, order="random", quota="threshold", threshold=0.4), estimator="path", beta=0.0)
    rollout = policy.rollout(some_rollout(2).sequences[:, :4], n=3)
    assert rollout.path is not None
    with torch.no_grad():
        found = policy.logprobs(model, rollout, 0)
    for row in range(6):
        states = [z[r.tolist().index(row)] for r, z in rollout.path if row in r.tolist()] + [rollout.sequences[row]]
        total = torch.zeros(8, dtype=torch.float64)
        for before, after in itertools.pairwise(states):
            new = (before == MASK) & (after != MASK)
            seen.append(int(new.sum()))
            total += logp(model, before, rollout.sequences[row]) * new
        torch.testing.assert_close(found[row].double(), total)
    assert max(seen) > 1  # several tokens in one pass
    part = rollout.select(torch.tensor([4, 1]))
    with torch.no_grad():
        torch.testing.assert_close(policy.logprobs(model, part, 0), found[[4, 1]])


@pytest.mark.parametrize("estimator", [OneStep(), Elbo(3), Coupled(2)], ids=["one_step", "elbo", "coupled"])
@pytest.mark.parametrize("blocks", [False, True], ids=["whole", "blocks"])
def test_a_part_of_the_batch_and_a_padded_row_are_estimated_as_alone(estimator, blocks):
    model = BlockDiffusionModel(backbone(), 3, MASK) if blocks else backbone()
    rollout = some_rollout(3)
    padded = Rollout(
        nn.functional.pad(rollout.sequences, (3, 0)),
        *(nn.functional.pad(t, (3, 0)) for t in (rollout.completion, rollout.real, rollout.valid)),
        rollout.prompt_of,
        rollout.row,
    )
    with torch.no_grad():
        whole = estimator(model, rollout, MASK, 4)
        part = estimator(model, rollout.select(torch.tensor([2, 0])), MASK, 4)
        shifted = estimator(model, padded, MASK, 4)
    torch.testing.assert_close(part, whole[[2, 0]], rtol=0, atol=1e-10)
    torch.testing.assert_close(shifted[:, 3:], whole, rtol=0, atol=1e-10)
    assert not shifted[:, :3].any()
    assert (whole[:, 4:] != 0).any(1).all()


def test_a_block_model_gives_the_one_step_estimates_of_all_blocks_in_one_pass():
    """Each block's tokens given the clean tokens of the blocks before it."""
    model, rollout = BlockDiffusionModel(backbone(), 4, MASK), some_rollout(2, 4, 8)
    found = OneStep(0.0)(model, rollout, MASK, 0)
    state = model.init_state(2)
    for a in (0, 4, 8):
        piece = slice(a, a + 4)
        if a:
            logits = model.denoise(torch.full((2, 4), MASK), state).clone()
            logits[..., MASK] = -torch.inf
            expected = logits.log_softmax(-1).gather(-1, rollout.sequences[:, piece, None])[..., 0]
            torch.testing.assert_close(found[:, piece], expected, rtol=0, atol=1e-10)
        state = model.commit(rollout.sequences[:, piece], state)


# -- the objective -----------------------------------------------------------------------------------------------------


def prepared(model, estimator="one_step", beta=0.04, **options) -> tuple[DiffuGRPO, PolicyBatch]:
    policy = DiffuGRPO(model, sampler(4), estimator=estimator, group=3, beta=beta, inner_updates=2, **options)
    rollout = some_rollout(6)
    rewards = torch.tensor([1.0, 0.0, 0.5, 2.0, 2.0, -1.0], dtype=torch.float64)
    return policy, policy.prepare(rollout, rewards)


@pytest.mark.parametrize("ratio", ["token", "sequence"])
@pytest.mark.parametrize("estimator", ["one_step", "elbo", "coupled"])
def test_at_the_first_update_the_ratio_is_one_and_the_gradient_that_of_the_weighted_log_probability(estimator, ratio):
    model = Table()
    policy, batch = prepared(model, estimator, ratio=ratio)
    out = policy.loss(batch, 0)
    assert torch.equal(out.ratio, torch.ones_like(out.ratio))
    assert float(out.kl) == 0
    assert float(out.clipped) == 0
    found = torch.autograd.grad(out.loss, model.weight)[0]
    logprobs = policy.logprobs(model, batch.rollout, batch.seeds[0])
    valid = batch.rollout.valid
    weighted = -(logprobs * batch.advantages[:, None] * valid).sum() / valid.sum()
    torch.testing.assert_close(found, torch.autograd.grad(weighted, model.weight)[0], rtol=1e-9, atol=1e-12)


def test_the_objective_by_hand_after_the_policy_has_moved():
    """Clipped and unclipped tokens, KL from a reference of its own, valid tokens alone."""
    model = Table()
    policy, batch = prepared(model, beta=0.3, ref=Table(seed=4), clip=0.2)
    valid = batch.rollout.valid.clone()
    valid[1, 6:] = False
    batch = replace(batch, rollout=replace(batch.rollout, valid=valid))
    with torch.no_grad():
        model.weight += 0.05 * torch.randn(model.weight.shape, generator=torch.Generator().manual_seed(2))
    out = policy.loss(batch, 1)
    current = policy.logprobs(model, batch.rollout, batch.seeds[1]).detach()
    assert batch.reference is not None
    total, kl, stopped, count = 0.0, 0.0, 0, 0
    for row in range(6):
        for i in range(8):
            if not valid[row, i]:
                continue
            r = math.exp(float(current[row, i] - batch.old[1][row, i]))
            a = float(batch.advantages[row])
            delta = float(batch.reference[1][row, i] - current[row, i])
            total += min(r * a, min(max(r, 0.8), 1.2) * a) - 0.3 * (math.exp(delta) - delta - 1)
            kl += math.exp(delta) - delta - 1
            stopped += min(max(r, 0.8), 1.2) * a < r * a
            count += 1
    assert float(out.loss.detach()) == pytest.approx(-total / count)
    assert float(out.kl) == pytest.approx(kl / count)
    assert float(out.kl) > 0
    assert 0 < stopped < count
    assert float(out.clipped) == pytest.approx(stopped / count)


def test_updates_share_masks_between_policies_and_differ_from_one_another():
    model = Table()
    policy, batch = prepared(model)
    assert isinstance(policy.ref, Table)
    model.seen.clear()
    policy.ref.seen.clear()
    policy.prepare(batch.rollout, torch.zeros(6))
    assert all(torch.equal(a, b) for a, b in zip(model.seen, policy.ref.seen, strict=True))
    assert not torch.equal(model.seen[0], model.seen[1])
    policy.loss(batch, 1)
    assert torch.equal(model.seen[-1], model.seen[1])
    policy.iteration += 1
    assert set(policy.prepare(batch.rollout, torch.zeros(6)).seeds).isdisjoint(batch.seeds)


def test_advantages_are_rewards_minus_the_mean_of_their_group():
    _, batch = prepared(Table())
    assert batch.advantages.tolist() == [0.5, -0.5, 0.0, 1.0, 1.0, -2.0]


# -- rollouts and learning ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("blocks", [False, True], ids=["whole", "blocks"])
def test_rollouts_are_the_samplers_completions(blocks):
    model = BlockDiffusionModel(backbone(), 3, MASK) if blocks else backbone()
    policy = DiffuGRPO(model, sampler(6), group=4, beta=0.0)
    prompts = some_rollout(2).sequences[:, :4]
    mask = torch.tensor([[True] * 4, [False, True, True, True]])
    rollout = policy.rollout(prompts, attention_mask=mask)
    assert rollout.sequences.shape == (8, 10)
    assert torch.equal(rollout.sequences[:, :4], prompts.repeat_interleave(4, 0))
    assert rollout.prompt_of.tolist() == [0] * 4 + [1] * 4
    assert not (rollout.sequences == MASK).any()
    assert len({tuple(s.tolist()) for s in rollout.sequences}) > 4
    again = policy.rollout(prompts, attention_mask=mask)
    assert torch.equal(rollout.sequences, again.sequences)
    policy.iteration = 1
    assert not torch.equal(rollout.sequences, policy.rollout(prompts, attention_mask=mask).sequences)
    for row in range(8):
        new = rollout.sequences[row, 4:].tolist()
        length = new.index(EOS) + 1 if EOS in new else 6
        assert rollout.valid[row].tolist() == [False] * 4 + [True] * length + [False] * (6 - length)


@pytest.mark.parametrize("kind", ["whole", "blocks"])
def test_the_reward_goes_up(kind):
    """A reward for every 9: a few iterations on the network itself, and the sampler draws more of them."""
    model: nn.Module = backbone() if kind == "whole" else BlockDiffusionModel(backbone(), 4, MASK)
    policy = DiffuGRPO(model, sampler(4, steps=2), group=16, inner_updates=2, beta=0.01, max_grad_norm=1.0)
    optimiser = torch.optim.AdamW(model.parameters(), 5e-3)
    prompts = some_rollout(2).sequences[:, :4]

    def nines(rollout: Rollout) -> Tensor:
        return ((rollout.sequences == 9) & rollout.valid).double().sum(1)

    logs = [policy.iterate(optimiser, prompts, nines) for _ in range(10)]
    assert [log["iteration"] for log in logs] == list(range(1, 11))
    first, last = (sum(log["reward"] for log in part) / 3 for part in (logs[:3], logs[-3:]))
    assert last > first + 0.8
    assert logs[-1]["kl"] > 0


def test_a_run_goes_on_where_it_was():
    """Iteration and reference are saved: the next completions and masks are those of an uninterrupted run."""
    model, prompts = backbone(), some_rollout(2).sequences[:, :4]
    policy = DiffuGRPO(model, sampler(4), group=2, inner_updates=1, sync_every=2)
    optimiser = torch.optim.SGD(model.parameters(), 0.1)
    for _ in range(3):
        policy.iterate(optimiser, prompts, lambda r: r.sequences.double().sum(1))
    again_model = backbone()
    again_model.load_state_dict(model.state_dict())
    again = DiffuGRPO(again_model, sampler(4), group=2, inner_updates=1, sync_every=2)
    again.load_state_dict(policy.state_dict())
    batches = []
    for p in (policy, again):
        rollout = p.rollout(prompts)
        batches.append(p.prepare(rollout, torch.ones(4)))
    assert torch.equal(batches[0].rollout.sequences, batches[1].rollout.sequences)
    assert batches[0].seeds == batches[1].seeds
    for a, b in zip((*batches[0].old, *batches[0].reference), (*batches[1].old, *batches[1].reference), strict=True):  # type: ignore[misc]
        assert torch.equal(a, b)
    assert not torch.equal(batches[0].old[0], batches[0].reference[0])  # type: ignore[index]
    policy.sync_reference()
    after = policy.prepare(rollout, torch.ones(4))
    assert torch.equal(after.old[0], after.reference[0])  # type: ignore[index]


def test_bad_input_is_named():
    model = Table()
    for options, message in (
        ({"group": 1}, "group: expected an integer >= 2"),
        ({"clip": 0.0}, "clip: expected a finite number above 0"),
        ({"beta": -1.0}, "beta: expected a finite number >= 0"),
        ({"inner_updates": 0}, "inner_updates"),
        ({"ratio": "mean"}, "ratio: 'mean'"),
        ({"estimator": "exact"}, "estimator: unknown 'exact'"),
        ({"estimator": PathProbability(0.5)}, r"scores at temperature 0\.5, but the sampler draws at 1\.0"),
    ):
        with pytest.raises(ValueError, match=message):
            DiffuGRPO(model, sampler(), **options)
    with pytest.raises(ValueError, match="length of a completion"):
        DiffuGRPO(model, sampler(0))
    for value in (lambda: Elbo(0), lambda: Coupled(0), lambda: OneStep(1.0), lambda: PathProbability(0.0)):
        with pytest.raises(ValueError, match="expected"):
            value()
    assert find_estimator("elbo") == Elbo()
    policy, batch = prepared(model, beta=0.0)
    with pytest.raises(ValueError, match=r"rewards: shape \[2\]"):
        policy.prepare(batch.rollout, torch.zeros(2))
    with pytest.raises(ValueError, match="rewards: row 3 is not finite"):
        policy.prepare(batch.rollout, torch.tensor([0, 0, 0, float("nan"), 0, 0]))
    with pytest.raises(ValueError, match="update: 2 given"):
        policy.loss(batch, 2)
    with pytest.raises(ValueError, match="no reference"):
        policy.sync_reference()
    with pytest.raises(ValueError, match="path was not recorded"):
        PathProbability()(model, batch.rollout, MASK, 0)
    with pytest.raises(ValueError, match="keeps no path"):
        DiffuGRPO(BlockDiffusionModel(backbone(), 3, MASK), sampler(), beta=0.0).rollout(
            batch.rollout.sequences[:, :4], record=True
        )
    with pytest.raises(ValueError, match="at least one completion"):
        policy.rollout(batch.rollout.sequences[:, :4], n=0)
    with pytest.raises(ValueError, match="do not agree"):
        policy.load_state_dict({"iteration": 1, "ref": {}})
    assert diffusion_generate(model, batch.rollout.sequences[:, :4], sampler()).sequences.shape == (6, 8)


@pytest.mark.parametrize(
    "options",
    [
        {"top_p": 0.5},
        {"top_k": 2},
        {"guidance": 1.0},
        {"carry": "hidden"},
        {"logits_eos_inf": True},
        {"max_nfe": 3},
        {"quota": "bernoulli", "steps": 4},
    ],
    ids=lambda options: next(iter(options)),
)
def test_a_path_is_scored_only_where_its_tokens_are_plain_draws(options: dict[str, Any]):
    with pytest.raises(ValueError, match=f"sampler: {next(iter(options))} = .* which its tokens must be drawn from"):
        DiffuGRPO(Table(), sampler(**options), estimator="path", beta=0.0)
    DiffuGRPO(Table(), sampler(**options), estimator="elbo", beta=0.0)


def test_a_network_that_reads_the_time_is_refused():
    model = Table()
    model.time_conditioning = True  # type: ignore[assignment]
    with pytest.raises(ValueError, match="model: it reads the time"):
        OneStep()(model, some_rollout(), MASK, 0)
