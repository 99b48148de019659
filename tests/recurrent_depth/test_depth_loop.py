"""The depth loop: equal to the written-out definition, cached = whole, padded = alone, batched exits = row by row."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from latentcot.backbone import HybridConfig, HybridForCausalLM, SequenceContext
from latentcot.recurrent_depth import DepthLoop, ExitRule, GradientWindow

TOLERANCE: dict[str, Any] = {"atol": 1e-10, "rtol": 1e-10}


@pytest.fixture
def loop(make_backbone) -> DepthLoop:
    return DepthLoop(make_backbone(), {"sampler": {"mean": 4}}).double()


@pytest.fixture
def settling(make_backbone) -> DepthLoop:
    """A loop that forgets its state fast, as trained ones do, so that rows settle within a few recurrences."""
    loop = DepthLoop(make_backbone(initializer_range=0.1)).double()
    with torch.no_grad():
        loop.adapter.weight[:, :32] *= 0.1
    return loop


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(11, 20, (3, 12), generator=torch.Generator().manual_seed(2))


@pytest.fixture
def start() -> torch.Tensor:
    return torch.randn(3, 12, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


# -- the definition --------------------------------------------------------------------------------------------------


def rms(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight


def huginn_block(block, x: torch.Tensor) -> torch.Tensor:
    """The published block from tensors alone: norms behind the residual, interleaved rotary, bias on q and k."""
    batch, length, width = x.shape
    heads, d = block.attn.heads, width // block.attn.heads
    n = rms(x, block.attn_norm.weight)
    angle = torch.arange(length).double()[:, None] * 50_000.0 ** (-torch.arange(0, d, 2).double() / d)
    turn = torch.polar(torch.ones_like(angle), angle)[None, :, None]

    def project(linear, rotate: bool):
        y = n @ linear.weight.T + (linear.bias if rotate else 0)
        y = y.view(batch, length, heads, d)
        if not rotate:
            return y
        return torch.view_as_real(torch.view_as_complex(y.unflatten(-1, (-1, 2)).contiguous()) * turn).flatten(-2)

    q, k, v = project(block.attn.q_proj, True), project(block.attn.k_proj, True), project(block.attn.v_proj, False)
    scores = torch.einsum("bshd,bthd->bhst", q, k) / math.sqrt(d)
    scores = scores.masked_fill(torch.ones(length, length).triu(1).bool(), -math.inf)
    mixed = torch.einsum("bhst,bthd->bshd", scores.softmax(-1), v).flatten(2)
    u = rms(x + mixed @ block.attn.o_proj.weight.T, block.attn_norm_2.weight)
    m = rms(u, block.mlp_norm.weight)
    gate = m @ block.mlp.gate_proj.weight.T
    mlp = (gate * gate.sigmoid() * (m @ block.mlp.up_proj.weight.T)) @ block.mlp.down_proj.weight.T
    return rms(u + mlp, block.mlp_norm_2.weight)


def test_huginn_shape_equals_the_written_out_definition(ids):
    torch.manual_seed(0)
    config = HybridConfig(
        vocab_size=20,
        hidden_size=32,
        num_hidden_layers=4,
        mixer="attention",
        norm_placement="sandwich_post_residual",
        attention={"num_heads": 4, "rope_theta": 50_000.0, "rotary_layout": "interleaved", "bias": "qk"},
        tie_word_embeddings=True,
        initializer_range=0.2,
    )
    model = DepthLoop(HybridForCausalLM(config), {"embedding_scale": "sqrt_width"}).double()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or name.endswith("bias"):
                parameter.add_(0.3 * torch.randn_like(parameter))
    s = torch.randn(3, 12, 32, dtype=torch.float64)
    body: Any = model.backbone.model
    e = huginn_block(body.layers[0], math.sqrt(32) * body.embeddings.weight[ids])
    state = s
    for _ in range(3):
        state = torch.cat([state, e], -1) @ model.adapter.weight.T
        state = huginn_block(body.layers[2], huginn_block(body.layers[1], state))
    coda = huginn_block(body.layers[3], rms(state, body.norm.weight))
    logits = rms(coda, body.norm.weight) @ body.embeddings.weight.T
    output = model.recur(ids, 3, initial_state=s)
    torch.testing.assert_close(output.final_state, state, **TOLERANCE)
    torch.testing.assert_close(output.logits, logits, **TOLERANCE)


def test_norm_inside_the_loop_is_another_model(make_backbone, ids, start):
    inside = DepthLoop(make_backbone(), {"readout": "every_recurrence"}).double()
    outside = DepthLoop(inside.backbone).double()
    outside.adapter = inside.adapter
    context = SequenceContext.build(3, 12)
    e, _ = inside.backbone.run(inside.embed(ids), context, slice(0, 1))
    s = start
    for _ in range(2):
        s, _ = inside.backbone.run(inside.adapter(s, e), context, slice(1, 3))
        s = inside.backbone.model.norm(s)
    expected = inside.backbone.head(inside.backbone.run(s, context, slice(3, 4))[0])
    torch.testing.assert_close(inside.recur(ids, 2, initial_state=start).logits, expected, **TOLERANCE)
    assert (outside.recur(ids, 2, initial_state=start).logits - expected).abs().max() > 1e-3


# -- determinism, extrapolation ----------------------------------------------------------------------------------------


def test_fixed_initial_state_is_deterministic(loop, ids, start):
    assert torch.equal(loop.recur(ids, 4, initial_state=start).logits, loop.recur(ids, 4, initial_state=start).logits)


def test_generator_decides_the_random_initial_state(loop, ids):
    def run(seed: int) -> torch.Tensor:
        return loop.recur(ids, 2, generator=torch.Generator().manual_seed(seed)).logits

    assert torch.equal(run(1), run(1))
    assert not torch.equal(run(1), run(2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_many_recurrences_stay_finite(make_backbone, ids, dtype):
    model = DepthLoop(make_backbone()).to(dtype)
    with torch.no_grad():
        output = model.recur(ids, 64, generator=torch.Generator().manual_seed(0))
    assert output.logits.isfinite().all()


def test_more_recurrences_change_the_result(loop, ids, start):
    one, two = (loop.recur(ids, r, initial_state=start).logits for r in (1, 2))
    assert (one - two).abs().max() > 1e-3


# -- states, padding, packing ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cuts", [[1] * 12, [5, 4, 1, 1, 1], [2, 10]], ids=str)
@pytest.mark.parametrize(("dtype", "atol"), [(torch.float64, 1e-10), (torch.float32, 5e-5)], ids=["fp64", "fp32"])
def test_any_cut_with_state_equals_one_pass(make_backbone, ids, start, cuts, dtype, atol):
    loop = DepthLoop(make_backbone(convolution_init="uniform")).to(dtype)
    for parameter in (
        loop.parameters()
    ):  # of ordinary size: wide weights make a loop amplify rounding, on some processors above the bound
        parameter.data *= 0.3 if parameter.dim() > 1 else 1.0
    whole = loop.recur(ids, 3, initial_state=start)
    state, logits, at = None, [], 0
    for n in cuts:
        output = loop.recur(ids[:, at : at + n], 3, initial_state=start[:, at : at + n], state=state, use_cache=True)
        state, at = output.state, at + n
        logits.append(output.logits)
    torch.testing.assert_close(torch.cat(logits, 1), whole.logits, atol=atol, rtol=0)
    assert state is not None
    assert set(state.entries) == {(0, 0), (3, 0)} | {(block, i) for block in (1, 2) for i in range(3)}


def test_state_of_another_depth_is_refused(loop, ids, start):
    state = loop.recur(ids, 3, initial_state=start, use_cache=True).state
    for r in (2, 4):
        with pytest.raises(ValueError, match=f"3 recurrences.*{r}"):
            loop.recur(ids[:, :1], r, state=state)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_batch_equals_each_row_alone(loop, ids, start, side):
    lengths = [12, 7, 3]
    mask = torch.zeros(3, 12, dtype=torch.bool)
    for row, n in enumerate(lengths):
        mask[row, 12 - n :] = side == "left"
        mask[row, :n] |= side == "right"
    together = loop.recur(ids, 3, initial_state=start, attention_mask=mask).logits
    for row in range(3):
        real = mask[row]
        alone = loop.recur(ids[row, real][None], 3, initial_state=start[row, real][None]).logits
        torch.testing.assert_close(together[row, real], alone[0], **TOLERANCE)


def test_packed_sequences_equal_each_alone(loop, ids, start):
    offsets = torch.tensor([0, 5, 12])
    packed = loop.recur(ids[:1], 3, initial_state=start[:1], cu_seqlens=offsets).logits
    for a, b in ((0, 5), (5, 12)):
        alone = loop.recur(ids[:1, a:b], 3, initial_state=start[:1, a:b]).logits
        torch.testing.assert_close(packed[:, a:b], alone, **TOLERANCE)


# -- gradients ---------------------------------------------------------------------------------------------------------


def prelude_gradient(loop: DepthLoop, ids: torch.Tensor, start: torch.Tensor, k: int | None) -> float:
    loop.zero_grad()
    logits = loop.recur(ids, 4, initial_state=start, window=GradientWindow(k)).logits
    F.cross_entropy(logits.flatten(0, 1), ids.flatten()).backward()
    parameters = loop.backbone.model.layers[0].parameters()
    return sum(float(p.grad.abs().sum()) for p in parameters if p.grad is not None)


def test_prelude_learns_only_through_the_window(loop, ids, start):
    assert prelude_gradient(loop, ids, start, 0) == 0
    assert loop.adapter.weight.grad is None
    assert any(p.grad is not None for p in loop.backbone.model.layers[3].parameters())  # the coda still learns
    assert prelude_gradient(loop, ids, start, 1) > 0


def test_truncation_equals_a_detached_state(loop, ids, start):
    """With k = 2 of 4 recurrences the gradient is that of two recurrences from the detached state s_2."""
    prelude_gradient(loop, ids, start, 2)
    truncated = {name: p.grad.clone() for name, p in loop.named_parameters() if p.grad is not None}
    half = loop.recur(ids, 2, initial_state=start).final_state.detach()
    loop.zero_grad()
    logits = loop.recur(ids, 2, initial_state=half).logits
    F.cross_entropy(logits.flatten(0, 1), ids.flatten()).backward()
    for name, p in loop.named_parameters():
        if p.grad is not None:
            torch.testing.assert_close(truncated[name], p.grad, **TOLERANCE)


# -- exits -------------------------------------------------------------------------------------------------------------

DIFFERENCES = ["latent_difference", "cosine", "kl", "min_p_kl", "entropy"]


@pytest.mark.parametrize("kind", DIFFERENCES)
def test_threshold_zero_never_leaves_and_infinity_leaves_at_min_steps(loop, ids, start, kind):
    never = loop.recur(ids, 6, initial_state=start, exit_rule=ExitRule(kind, 0.0))
    assert never.recurrences.tolist() == [6, 6, 6]
    torch.testing.assert_close(never.logits, loop.recur(ids, 6, initial_state=start).logits, **TOLERANCE)
    for least, every, leaves in ((1, 1, 1), (3, 1, 3), (3, 2, 4), (9, 1, 6)):
        rule = ExitRule(kind, math.inf, min_steps=least, check_every=every)
        assert loop.recur(ids, 6, initial_state=start, exit_rule=rule).recurrences.tolist() == [leaves] * 3


def test_argmax_with_one_leaves_first_and_with_more_than_r_never(loop, ids, start):
    def leave(n: int) -> list[int]:
        return loop.recur(ids, 6, initial_state=start, exit_rule=ExitRule("argmax", n)).recurrences.tolist()

    assert leave(1) == [1, 1, 1]
    assert leave(7) == [6, 6, 6]


@pytest.mark.parametrize("positions", ["last", "mean", "max"])
@pytest.mark.parametrize("kind", [*DIFFERENCES, "argmax"])
def test_batched_exit_equals_row_by_row(settling, ids, start, kind, positions):
    rule = ExitRule(kind, 3 if kind == "argmax" else None, positions=positions)
    mask = torch.ones(3, 12, dtype=torch.bool)
    mask[1, :5] = mask[2, :9] = False
    with torch.no_grad():
        together = settling.recur(ids, 12, initial_state=start, attention_mask=mask, exit_rule=rule)
        assert together.recurrences.min() < 12
        for row in range(3):
            real = mask[row]
            alone = settling.recur(ids[row, real][None], 12, initial_state=start[row, real][None], exit_rule=rule)
            assert together.recurrences[row] == alone.recurrences[0]
            torch.testing.assert_close(together.logits[row, real], alone.logits[0], **TOLERANCE)


def test_rows_leave_at_different_depths_and_stop_costing(settling, ids, start, monkeypatch):
    sizes: list[int] = []
    step = settling.step
    monkeypatch.setattr(settling, "step", lambda s, *rest: (sizes.append(len(s)), step(s, *rest))[1])
    mask = torch.ones(3, 12, dtype=torch.bool)
    mask[1, :5] = mask[2, :9] = False
    rule = ExitRule("latent_difference")
    output = settling.recur(ids, 15, initial_state=start, attention_mask=mask, exit_rule=rule)
    assert len(output.recurrences.unique()) > 1
    assert sum(sizes) == int(output.recurrences.sum())
    monkeypatch.undo()
    for row, r in enumerate(output.recurrences.tolist()):
        fixed = settling.recur(ids, r, initial_state=start, attention_mask=mask).logits
        torch.testing.assert_close(output.logits[row], fixed[row], **TOLERANCE)


@pytest.mark.parametrize("kind", ["kl", "entropy", "argmax"])
def test_a_row_that_leaves_at_a_check_is_not_decoded_again(settling, ids, start, kind, monkeypatch):
    """With gradient the coda runs once more behind the loop, without it what the check decoded is used: the same result."""
    rule = ExitRule(kind, 3 if kind == "argmax" else 0.02, check_every=2)
    decoded: list[int] = []
    finish = settling.finish
    monkeypatch.setattr(settling, "finish", lambda s, *rest: (decoded.append(len(s)), finish(s, *rest))[1])
    again = settling.recur(ids, 7, initial_state=start, exit_rule=rule)
    checks = again.recurrences.clamp(max=6) // 2
    assert again.reused is None
    assert sum(decoded) == int(checks.sum()) + 3
    decoded.clear()
    with torch.no_grad():
        once = settling.recur(ids, 7, initial_state=start, exit_rule=rule)
    assert once.recurrences.tolist() == again.recurrences.tolist()
    assert once.reused.tolist() == (once.recurrences < 7).tolist()
    assert any(once.reused)
    assert sum(decoded) == int(checks.sum()) + int((~once.reused).sum())
    torch.testing.assert_close(once.logits, again.logits, **TOLERANCE)
    torch.testing.assert_close(once.final_state, again.final_state, **TOLERANCE)


# -- refusals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"prelude": 1, "core": 0, "coda": 3}, "core"),
        ({"prelude": 2, "core": 2, "coda": 1}, r"2 \+ 2 \+ 1.*4 blocks"),
        ({"preludes": 1}, "prelude"),
        ({"exit_rule": "kld"}, "kl"),
        ({"exit_rule": {"kind": "kl", "treshold": 1.0}}, "threshold"),
        ({"injection": "none"}, "injection"),
        ({"embedding_scale": -1.0}, "embedding_scale"),
        ({"recurrences": 0}, "recurrences"),
        ({"gradient_window": -2}, "gradient_window"),
    ],
)
def test_bad_settings_are_refused_by_name(make_backbone, settings, words):
    with pytest.raises(ValueError, match=words):
        DepthLoop(make_backbone(), settings)


def test_bad_calls_are_refused_by_name(loop, ids, start):
    for r in (0, -1, 2.0, True):
        with pytest.raises(ValueError, match="recurrences"):
            loop.recur(ids, r)
    with pytest.raises(ValueError, match=r"initial_state: shape \[3, 11, 32\].*\[3, 12, 32\]"):
        loop.recur(ids, 2, initial_state=start[:, 1:])
    with pytest.raises(ValueError, match="exit_rule"):
        loop.recur(ids, 2, exit_rule=ExitRule("kl"), use_cache=True)
    with pytest.raises(ValueError, match="record"):
        loop.recur(ids, 2, record=(0,))
    with pytest.raises(ValueError, match="attention_mask"):
        loop.recur(ids, 2, attention_mask=torch.ones(3, 11))


def test_injection_none_works_from_the_embedding(make_backbone, ids):
    model = DepthLoop(make_backbone(), {"injection": "none", "initial_state": "embedding"}).double()
    context = SequenceContext.build(3, 12)
    e, _ = model.backbone.run(model.embed(ids), context, slice(0, 1))
    s, _ = model.backbone.run(e, context, slice(1, 3))
    torch.testing.assert_close(model.recur(ids, 1).final_state, s, **TOLERANCE)
