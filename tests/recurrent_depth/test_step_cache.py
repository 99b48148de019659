"""Look-up rules between recurrences: decoding = whole pass where a rule claims it, every rule against a brute-force
reference with tokens of different depths, batches with exits = rows alone, and the case of a token that stopped early."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from latentcot.backbone import ModelState
from latentcot.backbone.state import LayerState
from latentcot.reasoner import SPECIAL, AnswerLimits
from latentcot.recurrent_depth import DepthLoop, DepthRecurrence, ExitRule, StepCache
from latentcot.recurrent_depth.step_cache import policy_of

TOLERANCE: dict[str, Any] = {"atol": 1e-10, "rtol": 1e-10}
ATTENTION = {"mixers": ["attention"] * 4}
EXACT = [
    StepCache(),
    StepCache("latest"),
    StepCache("available"),
    StepCache("skip"),
    StepCache("compress_s", 6),
    StepCache("compress_r", 1),
    StepCache("anchor", 4),
]
NAMES = [policy.kind for policy in EXACT]


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(11, 20, (3, 9), generator=torch.Generator().manual_seed(2))


@pytest.fixture
def start() -> torch.Tensor:
    return 0.6 * torch.randn(3, 9, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


def decode(loop: DepthLoop, ids, start, depths, policy: StepCache | None, cuts=None, **more):
    """Token by token (or in ``cuts``), each with its own number of recurrences: logits and the state at the end. With gradient states
    are joined, without they grow in place; both say the same."""
    logits, state = decode_once(loop, ids, start, depths, policy, cuts, **more)
    with torch.no_grad():
        other, grown = decode_once(loop, ids, start, depths, policy, cuts, **more)
    bound = 1e-10 if logits.dtype == torch.float64 else 1e-5 * float(logits.detach().abs().max())
    torch.testing.assert_close(other, logits, atol=bound, rtol=0)
    assert state.entries.keys() == grown.entries.keys()
    for place, entry in state.entries.items():
        for name, tensor in entry.tensors.items():
            torch.testing.assert_close(
                grown.entries[place][name], tensor, atol=1e-9 if bound == 1e-10 else 1e-4, rtol=0
            )
    return logits, state


def decode_once(loop: DepthLoop, ids, start, depths, policy: StepCache | None, cuts=None, **more):
    state, logits, at = None, [], 0
    for n, depth in zip(cuts or [1] * ids.shape[1], depths, strict=True):
        piece = slice(at, at + n)
        output = loop.recur(
            ids[:, piece], depth, initial_state=start[:, piece], state=state, use_cache=True, step_cache=policy, **more
        )
        state, at = output.state, at + n
        logits.append(output.logits)
    assert state is not None
    return torch.cat(logits, 1), state


# -- decoding = whole pass ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cuts", [[1] * 9, [4, 1, 1, 3]], ids=["tokens", "chunks"])
@pytest.mark.parametrize("policy", EXACT, ids=NAMES)
@pytest.mark.parametrize("mixers", [ATTENTION, {}], ids=["attention", "hybrid"])
def test_exact_rules_decode_what_the_whole_pass_says(make_backbone, ids, start, mixers, policy, cuts):
    # of ordinary size: with the wide start of the other tests, rounding alone grows beyond the tolerance in fp32
    loop = DepthLoop(make_backbone(initializer_range=0.05, **mixers)).double()
    assert policy.exact(3, 2, linear=not mixers)
    for dtype, atol in ((torch.float64, 1e-10), (torch.float32, 1e-5)):
        loop = loop.to(dtype)
        whole = loop.recur(ids, 3, initial_state=start).logits
        logits, _ = decode(loop, ids, start, [3] * len(cuts), policy, cuts)
        scale = float(whole.detach().abs().max())  # the tolerance is that of logits of order one
        torch.testing.assert_close(logits / scale, whole / scale, atol=atol, rtol=0)


@pytest.mark.parametrize(
    "policy",
    [
        StepCache("always_last"),
        StepCache("random"),
        StepCache("compress_s", 2),
        StepCache("anchor", 2),
        StepCache("compress_r", 2),
    ],
    ids=lambda p: p.kind,
)
def test_rules_that_claim_nothing_differ_at_depth_and_agree_at_one(make_backbone, ids, start, policy):
    loop = DepthLoop(make_backbone(**ATTENTION)).double()
    assert not policy.exact(3, 2)
    logits, _ = decode(loop, ids, start, [3] * 9, policy)
    assert (logits - loop.recur(ids, 3, initial_state=start).logits).abs().max() > 1e-3
    if policy.exact(1, 2):
        logits, _ = decode(loop, ids, start, [1] * 9, policy)
        torch.testing.assert_close(logits, loop.recur(ids, 1, initial_state=start).logits, **TOLERANCE)


def test_one_shared_linear_state_is_exact_without_linear_blocks_only(make_backbone, ids, start):
    policy = StepCache("full", linear="last")
    assert policy.exact(3, 2)
    assert not policy.exact(3, 2, linear=True)
    for mixers, same in ((ATTENTION, True), ({}, False)):
        loop = DepthLoop(make_backbone(**mixers)).double()
        logits, state = decode(loop, ids, start, [3] * 9, policy)
        assert ((logits - loop.recur(ids, 3, initial_state=start).logits).abs().max() < 1e-9) == same
    assert sorted(place for place in state.entries if place[0] == 1) == [(1, 0)]  # 1 / r of the memory


# -- tokens of different depths, by brute force ------------------------------------------------------------------------


def norm(x, weight):
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight


def one_token(block, x, t: int, memory: dict, write: Any, read: Callable[[int], Any]):
    """A pre-norm block on one token x [D]: its key and value go to memory[t, write], and the query sees memory[t', read(t')]
    of earlier tokens where there is such an entry."""
    heads, d = block.attn.heads, len(x) // block.attn.heads
    n = norm(x, block.attn_norm.weight)
    q, k, v = ((p.weight @ n).view(heads, d) for p in (block.attn.q_proj, block.attn.k_proj, block.attn.v_proj))
    angle = t * 10_000.0 ** (-torch.arange(0, d, 2).double() / d)

    def turn(y):
        a, b = y.chunk(2, -1)
        return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1)

    q, own = turn(q), (turn(k), v)
    seen = [memory[p, read(p)] for p in range(t) if (p, read(p)) in memory] + [own]
    keys, values = (torch.stack(z) for z in zip(*seen, strict=True))
    weights = (torch.einsum("hd,thd->ht", q, keys) / math.sqrt(d)).softmax(-1)
    u = x + block.attn.o_proj.weight @ torch.einsum("ht,thd->hd", weights, values).flatten()
    m = norm(u, block.mlp_norm.weight)
    gate = block.mlp.gate_proj.weight @ m
    y = u + block.mlp.down_proj.weight @ (gate * gate.sigmoid() * (block.mlp.up_proj.weight @ m))
    return y, own


def brute_force(loop: DepthLoop, ids, start, depths, rule: Callable[[int, int, int, int], Any]):
    """Logits of one row; ``rule(u, i, j, d)``: where a query of layer step u looks for a token of depth d: a layer step, or
    ``None``. Compressed rules are written as the last layer step of the token with the same slot."""
    body: Any = loop.backbone.model
    before, memory, after, logits = {}, {}, {}, []
    for t, d in enumerate(depths):
        e, own = one_token(body.layers[0], body.embeddings.weight[ids[t]], t, before, 0, lambda p: 0)
        before[t, 0] = own
        s, mine = start[t], {}
        for i in range(d):
            s = loop.adapter.weight @ torch.cat([s, e])
            for j in range(2):
                u = 2 * i + j
                s, mine[u] = one_token(
                    body.layers[1 + j], s, t, memory, u, lambda p, u=u, i=i, j=j: rule(u, i, j, depths[p])
                )
        memory |= {(t, u): own for u, own in mine.items()}
        out, after_own = one_token(body.layers[3], norm(s, body.norm.weight), t, after, 0, lambda p: 0)
        after[t, 0] = after_own
        logits.append(loop.backbone.lm_head.weight @ norm(out, body.norm.weight))
    return torch.stack(logits)


def last_in_slot(slot: Callable[[int], int]):
    return lambda u, i, j, d: max((w for w in range(2 * d) if slot(w) == slot(u)), default=None)


RULES = {
    "latest": (StepCache("latest"), lambda u, i, j, d: 2 * min(i, d - 1) + j),
    "available": (StepCache("available"), lambda u, i, j, d: 2 * min(i, d - 1) + j),
    "always_last": (StepCache("always_last"), lambda u, i, j, d: 2 * (d - 1) + j),
    "skip": (StepCache("skip"), lambda u, i, j, d: u if i < d else None),
    "compress_s4": (StepCache("compress_s", 4), last_in_slot(lambda w: w % 4)),
    "compress_s3": (StepCache("compress_s", 3), last_in_slot(lambda w: w % 3)),  # blocks read one another
    "compress_r2": (StepCache("compress_r", 2), last_in_slot(lambda w: w // 2)),
    "compress_r4": (StepCache("compress_r", 4), last_in_slot(lambda w: w // 4)),
    "anchor2": (StepCache("anchor", 2), last_in_slot(lambda w: w if w < 2 else 2 + w % 2)),
}


@pytest.mark.parametrize("name", RULES)
def test_tokens_of_different_depths_read_what_the_rule_says(make_backbone, ids, start, name):
    policy, rule = RULES[name]
    loop = DepthLoop(make_backbone(**ATTENTION)).double()
    depths = [3, 1, 4, 2, 1, 5, 2, 3, 4]
    logits, state = decode(loop, ids[:1], start[:1], depths, policy)
    expected = brute_force(loop, ids[0], start[0], depths, rule)
    torch.testing.assert_close(logits[0], expected, **TOLERANCE)
    if policy.compressed:  # memory does not grow with r
        slots = [place for place in state.entries if place[0] == -1]
        assert (
            len(slots)
            == {"compress_s": policy.budget, "anchor": 4, "compress_r": 10 // policy.slots + 10 % policy.slots // 2}[
                policy.kind
            ]
        )


def test_random_reads_stored_entries_and_does_not_depend_on_the_cut_or_the_batch(make_backbone, ids, start):
    policy = StepCache("random", seed=1)
    depth = torch.tensor([[3, 1, 4, 0] * 50])
    position = torch.arange(200)[None]
    drawn = policy.source(2, 5, depth, position)
    assert bool(((drawn >= 0) == (depth > 0)).all())
    assert bool((drawn < depth.clamp(min=1)).all())
    assert sorted(drawn[depth == 4].unique().tolist()) == [0, 1, 2, 3]
    assert not torch.equal(drawn, policy.source(2, 6, depth, position))
    loop = DepthLoop(make_backbone(**ATTENTION)).double()
    together, _ = decode(loop, ids, start, [3] * 9, policy)
    alone, _ = decode(loop, ids[1:2], start[1:2], [3] * 9, policy)
    torch.testing.assert_close(together[1:2], alone, **TOLERANCE)


# -- a token that stopped early, in a linear layer ---------------------------------------------------------------------


class AdditiveBlock(nn.Module):
    """S <- S + v, o = S, with v the first channel of the input; says what it read."""

    norm_placement = "post"

    def __init__(self):
        super().__init__()
        self.outputs: list[float] = []

    def attn(self, hidden, context, state):
        before = torch.zeros(len(hidden), 1) if state is None else state["matrix"]
        after = before + hidden[:, -1, :1]
        return after[:, None].expand_as(hidden), LayerState("gla", {"matrix": after})

    def forward(self, hidden, context, state=None):
        mixed, after = self.attn(hidden, context, state)
        self.outputs.append(float(mixed[0, 0, 0]))
        return hidden, after


@pytest.mark.parametrize(
    ("policy", "first", "expected"),
    [
        (StepCache("latest", gaps="copy"), 2, [11, 21, 21, 21]),
        (StepCache("latest", gaps="hold"), 2, [11, 21, 1, 1]),
        (StepCache("latest"), 2, [11, 21, 21, 21]),
        (StepCache("skip"), 2, [11, 21, 1, 1]),
        (StepCache("latest", linear="last"), 2, [21, 21, 21, 21]),
        (StepCache("latest", linear="first"), 2, [11, 11, 11, 11]),
        (StepCache("latest", linear="last"), 4, [41, 41, 41, 41]),
        (StepCache("full"), 4, [11, 21, 31, 41]),
    ],
    ids=str,
)
def test_gaps_of_linear_states(make_backbone, monkeypatch, policy, first, expected):
    backbone = make_backbone(
        num_hidden_layers=3, mixers=["attention", "gla", "attention"], gla={"num_heads": 2}, hidden_size=32
    ).float()
    loop = DepthLoop(backbone, {"core": 1})
    block = AdditiveBlock()
    backbone.model.layers[1] = block  # type: ignore[assignment]
    values = iter([10.0, 20.0, 30.0, 40.0][:first] + [1.0] * 4)
    monkeypatch.setattr(loop.adapter, "forward", lambda s, e: torch.full_like(s, next(values)))
    token = torch.tensor([[11]])
    state = loop.recur(token, first, use_cache=True, step_cache=policy).state
    block.outputs.clear()
    loop.recur(token, 4, state=state, step_cache=policy)
    assert block.outputs == expected


def test_gaps_survive_the_file_and_full_refuses_them(make_backbone, ids, start, tmp_path):
    loop = DepthLoop(make_backbone(**ATTENTION)).double()
    policy = StepCache("skip")
    _, state = decode(loop, ids[:, :3], start[:, :3], [2, 1, 3], policy)
    state.save(tmp_path / "state.safetensors")
    loaded = ModelState.load(tmp_path / "state.safetensors", state.fingerprint)
    assert policy_of(loaded) == policy
    a, b = (
        loop.recur(ids[:, 3:4], 4, state=s, initial_state=start[:, 3:4], step_cache=policy).logits
        for s in (state, loaded)
    )
    assert torch.equal(a, b)
    with pytest.raises(ValueError, match=r"made by StepCache\(kind='skip'.*StepCache\(kind='latest'"):
        loop.recur(ids[:, 3:4], 4, state=loaded, step_cache=StepCache("latest"))
    exact = StepCache("full", linear="first")
    _, gaps = decode(loop, ids[:, :3], start[:, :3], [2, 2, 2], exact)
    with pytest.raises(ValueError, match=r"nothing at recurrence 3 of token 0 in row 0, which took 2.*'latest'"):
        loop.recur(ids[:, 3:4], 3, state=gaps, step_cache=exact)


# -- batches with exits ------------------------------------------------------------------------------------------------


@pytest.fixture
def settling(make_backbone) -> Callable[..., DepthLoop]:
    """Loops that forget their state at a rate that differs by token, so that rows settle at different depths."""

    def make(kind=DepthLoop, settings=None, **changes) -> Any:
        loop = kind(make_backbone(initializer_range=0.1, **changes), settings).double()
        with torch.no_grad():
            loop.adapter.weight[:, :32] *= 0.1
        return loop

    return make


@pytest.mark.parametrize(
    "policy",
    [
        StepCache("latest"),
        StepCache("latest", gaps="hold"),
        StepCache("latest", linear="last"),
        StepCache("latest", linear="first"),
        StepCache("skip"),
        StepCache("always_last"),
        StepCache("random"),
        StepCache("compress_s", 4),
        StepCache("anchor", 4),
    ],
    ids=lambda p: f"{p.kind}-{p.linear}-{p.gaps}",
)
@pytest.mark.parametrize("kind", ["latent_difference", "kl"])
def test_batched_decoding_with_exits_equals_row_by_row(settling, ids, start, policy, kind):
    loop = settling()
    rule = ExitRule(kind, {"latent_difference": 0.03, "kl": 1e-3}[kind])
    mask = torch.ones(3, 4, dtype=torch.bool)
    mask[1, :2] = False
    with torch.no_grad():

        def run(rows: slice, skip: int):
            state, logits, taken = None, [], []
            for piece in [slice(skip, 4), *(slice(t, t + 1) for t in range(4, 9))]:
                output = loop.recur(
                    ids[rows, piece],
                    10,
                    initial_state=start[rows, piece],
                    attention_mask=mask[rows, skip:] if state is None else None,
                    exit_rule=rule,
                    state=state,
                    use_cache=True,
                    logits_to_keep=1,
                    step_cache=policy,
                )
                state = output.state
                logits.append(output.logits[:, 0])
                taken.append(output.recurrences)
            return torch.stack(logits, 1), torch.stack(taken, 1)

        together, taken = run(slice(None), 0)
        assert len(taken.unique()) > 2
        assert bool((taken != taken[:1]).any())
        for row in range(3):
            alone, steps = run(slice(row, row + 1), 2 if row == 1 else 0)
            assert torch.equal(steps[0], taken[row])
            torch.testing.assert_close(alone[0], together[row], **TOLERANCE)


def test_rows_that_left_are_not_computed(settling, ids, start, monkeypatch):
    loop = settling()
    run, rows = loop.backbone.run, []
    policy, rule = StepCache("skip"), ExitRule("latent_difference", 0.05)
    state = loop.recur(
        ids[:, :4], 10, initial_state=start[:, :4], exit_rule=rule, use_cache=True, step_cache=policy
    ).state

    def counted(hidden, context, blocks=slice(None), *rest):
        rows.append((blocks.start, len(hidden)))
        return run(hidden, context, blocks, *rest)

    monkeypatch.setattr(loop.backbone, "run", counted)
    output = loop.recur(ids[:, 4:5], 10, initial_state=start[:, 4:5], exit_rule=rule, state=state, step_cache=policy)
    assert len(output.recurrences.unique()) > 1
    for block in (1, 2):
        assert sum(n for b, n in rows if b == block) == int(output.recurrences.sum())


def test_exits_that_never_fire_change_nothing(settling, ids, start):
    loop = settling()
    for policy in (StepCache("latest"), StepCache("skip")):
        never = {"exit_rule": ExitRule("kl", 0.0)}
        logits, _ = decode(loop, ids, start, [4] * 9, policy, **never)
        torch.testing.assert_close(logits, loop.recur(ids, 4, initial_state=start).logits, **TOLERANCE)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["latent_difference", "cosine", "kl", "min_p_kl", "entropy", "argmax"])
def test_decoded_tokens_leave_at_their_least_and_never_where_nothing_settles(settling, ids, start, kind):
    loop, policy = settling(), StepCache("latest")
    count = kind == "argmax"
    rules = [
        (ExitRule(kind, 1 if count else math.inf), 1),
        (ExitRule(kind, 1 if count else math.inf, min_steps=3), 3),
        (ExitRule(kind, 1 if count else math.inf, min_steps=3, check_every=2), 4),
        (ExitRule(kind, 7 if count else 0.0), 6),
    ]
    state = loop.recur(ids[:, :5], 6, initial_state=start[:, :5], use_cache=True, step_cache=policy).state
    for rule, leaves in rules:
        out = loop.recur(ids[:, 5:6], 6, initial_state=start[:, 5:6], state=state, exit_rule=rule, step_cache=policy)
        assert out.recurrences.tolist() == [leaves] * 3, rule
        fixed = loop.recur(ids[:, 5:6], leaves, initial_state=start[:, 5:6], state=state, step_cache=policy)
        torch.testing.assert_close(out.logits, fixed.logits, **TOLERANCE)


@pytest.mark.parametrize("policy", ["latest", "skip"])
def test_what_a_check_decoded_stays_in_the_state(settling, ids, start, policy, monkeypatch):
    """Rows that a check lets go have written their column of the coda; those that go on write it later, once more."""
    loop, rule = settling(DepthLoop, {}, **ATTENTION), ExitRule("kl", 0.02, check_every=2)
    policy = StepCache(policy)
    with torch.no_grad():
        state = loop.recur(ids[:, :5], 7, initial_state=start[:, :5], use_cache=True, step_cache=policy).state
        rows: list[int] = []
        finish = loop.finish
        monkeypatch.setattr(loop, "finish", lambda s, *rest: (rows.append(len(s)), finish(s, *rest))[1])
        piece = {"initial_state": start[:, 5:6], "exit_rule": rule, "state": state, "step_cache": policy}
        once = loop.recur(ids[:, 5:6], 7, **piece)
    checks = int((once.recurrences.clamp(max=6) // 2).sum())
    assert sum(rows) == checks + int((once.recurrences == 7).sum())
    assert any(once.reused)
    again = loop.recur(ids[:, 5:6], 7, **piece)  # with gradient: joined, and the coda runs behind the loop
    assert again.reused is None
    torch.testing.assert_close(once.logits, again.logits, **TOLERANCE)
    for place, entry in again.state.entries.items():
        for name, tensor in entry.tensors.items():
            torch.testing.assert_close(once.state.entries[place][name], tensor, **TOLERANCE)


def test_several_tokens_behind_a_shallow_row_of_a_deep_batch(settling, ids, start):
    """The state has recurrences deeper than any token of the row that was kept: later tokens that come there read copies, not zeros."""

    class FirstRow(ExitRule):
        def settled(self, value: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
            return torch.arange(len(mask)) < len(mask) - 1

    loop, policy = settling(DepthLoop, {}, **ATTENTION), StepCache("latest")

    def read(state, at, new, most, rows, rule=None):
        piece = slice(at, at + new)
        more = {} if rule is None else {"exit_rule": rule}
        begin = start[rows, piece]
        return loop.recur(
            ids[rows, piece], most, initial_state=begin, state=state, use_cache=True, step_cache=policy, **more
        )

    rule = FirstRow("latent_difference", 1.0, min_steps=2)
    with torch.no_grad():
        both = read(None, 0, 4, 6, slice(0, 2), rule)
        assert both.recurrences.tolist() == [2, 6]
        state = read(both.state.select([0]), 4, 2, 2, slice(0, 1)).state
        for name in ("keys", "values"):
            assert torch.equal(state.entries[1, 4][name], state.entries[1, 1][name])
        deep = read(state, 6, 1, 6, slice(0, 1))
    torch.testing.assert_close(deep.logits, read(state, 6, 1, 6, slice(0, 1)).logits, **TOLERANCE)


def test_gradients_through_a_pass_with_a_rule_are_those_of_the_plain_one(make_backbone, ids, start):
    loop = DepthLoop(make_backbone()).double()
    grads = []
    for policy in (StepCache(), StepCache("latest")):
        loop.zero_grad()
        loop.recur(ids, 3, initial_state=start, use_cache=True, step_cache=policy).logits.square().mean().backward()
        grads.append({n: p.grad.clone() for n, p in loop.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys()
    for name, g in grads[0].items():
        torch.testing.assert_close(grads[1][name], g, **TOLERANCE)


# -- answers -----------------------------------------------------------------------------------------------------------


def test_answers_from_the_state_equal_rows_alone_and_cost_what_they_ran(settling, make_batch):
    method = settling(
        DepthRecurrence, {"step_cache": "latest", "exit_rule": {"kind": "latent_difference", "threshold": 0.05}}
    )
    prompts = make_batch(2).prompts
    limits = AnswerLimits(knobs={"recurrences": 12})
    whole = method.answer(prompts, limits)
    for row in range(3):
        alone = method.answer(prompts.rows(torch.tensor([row])), limits)
        n = alone.info["text"].shape[1]
        assert torch.equal(alone.info["text"][0], whole.info["text"][row, :n])
        assert torch.equal(alone.info["steps"][0], whole.info["steps"][row, :n])
    taken, emitted = whole.info["steps"], whole.tokens_emitted
    assert whole.sequential_passes.tolist() == (taken.sum(1) + emitted).tolist()
    fixed = method.answer(prompts, AnswerLimits(knobs={"recurrences": 12, "exit_rule": "none"}))
    assert bool((whole.flops < fixed.flops).all())


@pytest.mark.parametrize("policy", ["latest", "skip", "full"])
def test_fixed_depth_answers_do_not_depend_on_the_rule(settling, make_batch, policy):
    method = settling(DepthRecurrence)
    prompts = make_batch(2).prompts
    plain = method.answer(prompts, AnswerLimits(knobs={"recurrences": 5}))
    other = method.answer(prompts, AnswerLimits(knobs={"recurrences": 5, "step_cache": policy}))
    assert torch.equal(plain.info["text"], other.info["text"])
    torch.testing.assert_close(plain.flops, other.flops)
    assert torch.equal(plain.sequential_passes, other.sequential_passes)


def test_warm_start_continues_from_the_state_of_the_token_before(settling, make_batch):
    method = settling(DepthRecurrence, {"warm_start": True})
    prompts = make_batch(2).prompts.rows(torch.tensor([0]))
    answer = method.answer(prompts, AnswerLimits(knobs={"recurrences": 3}))
    ids = torch.cat([prompts.ids, torch.tensor([[SPECIAL.ans]])], 1)
    mask = torch.cat([prompts.mask, torch.ones(1, 1, dtype=torch.bool)], 1)
    noise = method._noise(prompts, None)
    s0 = noise[(mask.long().cumsum(1) - 1).clamp(min=0)]
    first = method.recur(ids, 3, attention_mask=mask, initial_state=s0, use_cache=True)
    token = first.logits[0, -1].argmax()
    assert int(token) == int(answer.info["text"][0, 0])
    if int(token) != SPECIAL.eos:
        again = method.recur(token.view(1, 1), 3, initial_state=first.final_state[:, -1:], state=first.state)
        assert int(again.logits[0, -1].argmax()) == int(answer.info["text"][0, 1])
    with pytest.raises(ValueError, match=r"warm_start.*'latest'"):
        method.answer(prompts, AnswerLimits(knobs={"exit_rule": "kl"}))


# -- refusals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: StepCache("lastest"), "latest"),
        (lambda: StepCache("latest", 3), "budget"),
        (lambda: StepCache("compress_s", 0), "budget"),
        (lambda: StepCache(linear="all"), "per_step"),
        (lambda: StepCache(gaps="fill"), "copy"),
        (lambda: StepCache(seed=-1), "seed"),
    ],
)
def test_bad_values_are_refused_by_name(make, words):
    with pytest.raises(ValueError, match=words):
        make()


def test_bad_calls_are_refused_by_name(make_backbone, ids, start):
    loop = DepthLoop(make_backbone(attention={"num_heads": 4, "window_size": 4})).double()
    with pytest.raises(ValueError, match=r"skip.*window_size = 4.*'latest'"):
        loop.recur(ids, 2, use_cache=True, step_cache=StepCache("skip"))
    state = loop.recur(ids[:2], 2, use_cache=True, step_cache=StepCache("latest")).state
    with pytest.raises(ValueError, match="holds 2 rows, the input has 3"):
        loop.recur(ids, 2, state=state, step_cache=StepCache("latest"))
    with pytest.raises(ValueError, match="packed"):
        loop.recur(ids[:1], 2, use_cache=True, step_cache=StepCache("latest"), cu_seqlens=torch.tensor([0, 4, 9]))


def test_a_plain_state_can_be_continued_with_gaps(make_backbone, ids, start):
    loop = DepthLoop(make_backbone()).double()
    plain = loop.recur(ids[:, :5], 4, initial_state=start[:, :5], use_cache=True).state
    _, marked = decode(loop, ids[:, :5], start[:, :5], [4] * 5, StepCache("latest"))
    a, b = (
        loop.recur(ids[:, 5:6], 6, initial_state=start[:, 5:6], state=s, step_cache=StepCache("latest")).logits
        for s in (plain, marked)
    )
    torch.testing.assert_close(a, b, **TOLERANCE)
    with pytest.raises(ValueError, match=r"made by StepCache\(kind='full'"):
        loop.recur(ids[:, 5:6], 4, state=plain, step_cache=StepCache("compress_s"))
