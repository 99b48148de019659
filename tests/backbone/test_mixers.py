"""Every mixer as a layer against its equations: recurrences written out, special cases, extreme gates, transformers' Qwen3-Next.

The first half of the file is the yardstick: each mixer token by token and head by head in plain PyTorch, without the library's
operators. It takes one sequence alone (``x [S, D]``), so there is no padding, packing or cutting to get wrong.
"""

# Mixers are read by attributes that only some of them have.
# pyright: reportAttributeAccessIssue=false, reportOptionalSubscript=false, reportArgumentType=false
# pyright: reportOptionalMemberAccess=false, reportCallIssue=false, reportIndexIssue=false

import math

import pytest
import torch
from torch import Tensor

from latentcot.backbone import LayerState, SequenceContext
from latentcot.backbone.mixers import DeltaNet, GatedDeltaNet, Mixer
from latentcot.backbone.mixers.bounds import bounded_gate, stacked_bounds
from latentcot.backbone.mixers.deltanet import DeltaNetOptions
from latentcot.backbone.mixers.gated_deltanet import GatedDeltaNetOptions
from latentcot.kernels import Bidirectional, decay_attention


def silu(x: Tensor) -> Tensor:
    return x / (1 + torch.exp(-x))


FEATURES = {
    None: lambda x: x,
    "identity": lambda x: x,
    "silu": silu,
    "relu": lambda x: x.clamp(min=0),
    "elu": lambda x: torch.where(x > 0, x + 1, torch.exp(x.clamp(max=0))),
}


def rms(x: Tensor, weight: Tensor | None, eps: float = 1e-6) -> Tensor:
    y = x / torch.sqrt((x * x).mean(-1, keepdim=True) + eps)
    return y if weight is None else y * weight


def unit(x: Tensor) -> Tensor:
    return x / torch.sqrt((x * x).sum(-1, keepdim=True) + 1e-6)


def convolved(x: Tensor, taps: Tensor, both: bool) -> Tensor:
    """``x [S, width]``, ``taps [width, 1, W]``; ``both`` adds the same taps on the other side."""
    W, rows = taps.shape[-1], []
    for t in range(len(x)):
        row = torch.zeros_like(x[0])
        for distance in range(W):
            tap = taps[:, 0, W - 1 - distance]
            if t - distance >= 0:
                row = row + tap * x[t - distance]
            if both and distance and t + distance < len(x):
                row = row + tap * x[t + distance]
        rows.append(row)
    return torch.stack(rows)


def turned(x: Tensor, base: float, interleaved: bool = False) -> Tensor:
    """Rotary positions 0, 1, ... on ``x [S, H, width]``, pair by pair."""
    width, out = x.shape[-1], x.clone()
    for j in range(width // 2):
        a, b = (2 * j, 2 * j + 1) if interleaved else (j, j + width // 2)
        angle = torch.arange(len(x), dtype=x.dtype)[:, None] * base ** (-2 * j / width)
        out[..., a] = x[..., a] * angle.cos() - x[..., b] * angle.sin()
        out[..., b] = x[..., b] * angle.cos() + x[..., a] * angle.sin()
    return out


def recurrence(q: Tensor, k: Tensor, v: Tensor, alpha: Tensor, beta: Tensor | None) -> tuple[Tensor, Tensor]:
    """``q, k, alpha [S, H, K]``, ``v [S, H, V]``, ``beta [S, H]``: outputs ``[S, H, V]`` and the last state.

    Without beta nothing is erased.
    """
    S, H, K = q.shape
    state, rows = q.new_zeros(H, K, v.shape[-1]), []
    for t in range(S):
        state = alpha[t][:, :, None] * state
        written = v[t]
        if beta is not None:
            written = beta[t][:, None] * (v[t] - torch.einsum("hk,hkv->hv", k[t], state))
        state = state + k[t][:, :, None] * written[:, None, :]
        rows.append(K**-0.5 * torch.einsum("hk,hkv->hv", q[t], state))
    return torch.stack(rows), state


def mixed(
    q: Tensor, k: Tensor, v: Tensor, alpha: Tensor, beta: Tensor | None, both: bool, gate: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """One direction; or both, joined as each family says."""
    forward, state = recurrence(q, k, v, alpha, beta)
    if not both:
        return forward, state
    flipped = [x if x is None else x.flip(0) for x in (q, k, v, alpha, beta)]
    backward = recurrence(*flipped)[0].flip(0)  # type: ignore[arg-type]
    if beta is None:
        own = q.shape[-1] ** -0.5 * (q * k).sum(-1, keepdim=True) * v
        return forward + backward - own, None
    share = 0.5 if gate is None else gate[:, None]
    return share * forward + (1 - share) * backward, None


def oracle(mixer: Mixer, x: Tensor, bound: Tensor | None = None, both: bool = False) -> tuple[Tensor, Tensor | None]:
    """Output ``[S, D]`` of one sequence, and its last state (``[H, K, V]``; for HGRN ``[width]``; for attention nothing)."""
    return globals()[f"_{mixer.name}"](mixer, x, both, *([bound] if mixer.name.startswith("hgrn") else []))


def _project(m: Mixer, x: Tensor, names: str, both: bool, activation: str | None) -> list[Tensor]:
    rows = [x @ getattr(m, f"{name}_proj").weight.T for name in names]
    if m.options.use_short_conv:
        rows = [convolved(r, getattr(m, f"{n}_conv1d").weight, both) for n, r in zip(names, rows, strict=True)]
    return [FEATURES[activation](row) for row in rows]


def _heads(x: Tensor, heads: int, of: int) -> Tensor:
    """``[S, of · width]`` to ``[S, heads, width]``, each of the ``of`` repeated."""
    return x.unflatten(-1, (of, -1)).repeat_interleave(heads // of, 1)


def _hgrn(m, x: Tensor, both: bool, bound: Tensor | None):
    i, f = _project(m, x, "if", both, None)
    low = torch.zeros(m.width, dtype=x.dtype) if bound is None else bound
    alpha = low + (1 - low) / (1 + torch.exp(-f))
    h, rows = torch.zeros(m.width, dtype=x.dtype), []
    for t in range(len(x)):
        h = alpha[t] * h + (1 - alpha[t]) * silu(i[t])
        rows.append(h)
    y = rms(torch.stack(rows), m.g_norm.weight) * silu(x @ m.g_proj.weight.T)
    return y @ m.o_proj.weight.T, h


def _hgrn2(m, x: Tensor, both: bool, bound: Tensor | None):
    q, f, i = _project(m, x, "qfi", both, None)
    low = torch.zeros(m.heads * m.K, dtype=x.dtype) if bound is None else bound
    alpha = _heads(low + (1 - low) / (1 + torch.exp(-f)), m.heads, m.heads)
    o, state = mixed(_heads(silu(q), m.heads, m.heads), 1 - alpha, _heads(i, m.heads, m.heads), alpha, None, both)
    return rms(o.flatten(1), m.g_norm.weight) @ m.o_proj.weight.T, state


def _retnet(m, x: Tensor, both: bool):
    feature = FEATURES[m.options.feature_map]
    q = turned(feature(_heads(x @ m.q_proj.weight.T, m.heads, m.heads)), m.options.rope_theta)
    k = turned(feature(_heads(x @ m.k_proj.weight.T, m.heads, m.kv_heads)), m.options.rope_theta)
    v = _heads(x @ m.v_proj.weight.T, m.heads, m.kv_heads)
    gamma = torch.tensor([1 - 2.0 ** (-5 - h) for h in range(m.heads)], dtype=x.dtype)
    o, state = mixed(q, k, v, gamma[None, :, None].expand(len(x), m.heads, m.K), None, both)
    return _finish(m, o, x, "g_norm_swish_gate", "g_norm", m.options.use_output_gate), state


def _gla(m, x: Tensor, both: bool):
    q, k, v = _project(m, x, "qkv", both, "silu" if m.options.use_short_conv else None)
    feature = FEATURES[m.options.feature_map]
    logits = (x @ m.gk_proj[0].weight.T) @ m.gk_proj[1].weight.T + m.gk_proj[1].bias
    log_decay = -torch.log1p(torch.exp(-logits)) / 16
    if m.options.clamp_min is not None:
        log_decay = log_decay.clamp(min=m.options.clamp_min)
    o, state = mixed(
        _heads(feature(q), m.heads, m.heads),
        _heads(feature(k), m.heads, m.kv_heads),
        _heads(v, m.heads, m.kv_heads),
        _heads(log_decay.exp(), m.heads, m.kv_heads),
        None,
        both,
    )
    return _finish(m, o, x, "g_norm_swish_gate", "g_norm", m.options.use_output_gate), state


def _deltanet(m, x: Tensor, both: bool):
    q, k, v = _project(m, x, "qkv", both, None)
    feature = FEATURES[m.options.qk_activation]
    q, k, v = (_heads(y, m.heads, m.heads) for y in (feature(q), feature(k), silu(v)))
    q, k = (unit(y) if m.options.qk_norm == "l2" else y / (y.sum(-1, keepdim=True) + 1e-6) for y in (q, k))
    beta = torch.ones(len(x), m.heads, dtype=x.dtype)
    if m.options.use_beta:
        beta = 1 / (1 + torch.exp(-(x @ m.b_proj.weight.T)))
    beta = 2 * beta if m.options.allow_neg_eigval else beta
    gate = torch.sigmoid(m.direction) if m.options.combine == "gate" else None
    o, state = mixed(q, k, v, torch.ones_like(k), beta, both, gate)
    if not m.options.use_output_norm:
        o = o * silu(_heads(x @ m.g_proj.weight.T, m.heads, m.heads)) if m.options.use_gate else o
        return o.flatten(1) @ m.o_proj.weight.T, state
    return _finish(m, o, x, "o_norm", "o_norm", m.options.use_gate), state


def _gated_deltanet(m, x: Tensor, both: bool):
    q, k, v = _project(m, x, "qkv", both, "silu")
    q, k = (unit(_heads(y, m.heads, m.heads)).repeat_interleave(m.v_heads // m.heads, 1) for y in (q, k))
    beta = (2 if m.options.allow_neg_eigval else 1) / (1 + torch.exp(-(x @ m.b_proj.weight.T)))
    rate = torch.exp(m.A_log) * torch.log1p(torch.exp(x @ m.a_proj.weight.T + m.dt_bias))
    alpha = torch.exp(-rate)[:, :, None].expand(len(x), m.v_heads, m.K)
    gate = torch.sigmoid(m.direction) if m.options.combine == "gate" else None
    o, state = mixed(q, k, _heads(v, m.v_heads, m.v_heads), alpha, beta, both, gate)
    return _finish(m, o, x, "o_norm", "o_norm", m.options.use_gate), state


def _finish(m, o: Tensor, x: Tensor, gated: str, plain: str, gate: bool) -> Tensor:
    if not gate:
        return rms(o, getattr(m, plain).weight).flatten(1) @ m.o_proj.weight.T
    y = rms(o, getattr(m, gated).weight).flatten(1) * silu(x @ m.g_proj.weight.T)
    return y @ m.o_proj.weight.T


def _attention(m, x: Tensor, both: bool):
    q, k, v = (x @ p.weight.T + (0 if p.bias is None else p.bias) for p in (m.q_proj, m.k_proj, m.v_proj))
    q, k, v = _heads(q, m.heads, m.heads), _heads(k, m.heads, m.kv_heads), _heads(v, m.heads, m.kv_heads)
    if m.options.rope_theta is not None:
        q, k = (turned(y, m.options.rope_theta, m.options.rotary_layout == "interleaved") for y in (q, k))
    window, rows = m.options.window_size or len(x), []
    for t in range(len(x)):
        seen = slice(max(0, t - window + 1), min(len(x), t + window) if both else t + 1)
        weights = torch.softmax(torch.einsum("hk,shk->hs", q[t], k[seen]) * m.head_width**-0.5, -1)
        rows.append(torch.einsum("hs,shk->hk", weights, v[seen]))
    return torch.stack(rows).flatten(1) @ m.o_proj.weight.T, None


# -- the layer is the recurrence ---------------------------------------------------------------------------------------


def relative(actual: Tensor, expected: Tensor) -> float:
    assert actual.shape == expected.shape
    return float((actual.detach().double() - expected.detach()).norm() / expected.detach().norm().clamp_min(1e-30))


def state_of(after: LayerState | None) -> Tensor | None:
    """The part of a state that the oracles return."""
    assert after is not None
    return after.tensors.get("matrix", after.tensors.get("vector"))


@pytest.mark.parametrize("length", [1, 3, 70])
def test_a_layer_is_its_recurrence(layer, tokens, backend, length):
    """Outputs, last state and the gradients of every parameter, in fp64; 70 tokens are a chunk and a bit."""
    x = tokens(1, length).requires_grad_()
    leaves = [x, *layer.mixer.parameters()]
    o, after = layer(x, keep_state=True)
    expected, last = oracle(layer.mixer, x[0], layer.bound)
    assert relative(o[0], expected) < 1e-11
    upstream = torch.randn(expected.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    loss, wanted = (o[0] * upstream).sum(), (expected * upstream).sum()
    if last is not None:
        assert relative(state_of(after)[0], last) < 1e-11
        loss, wanted = loss + state_of(after).square().sum(), wanted + last.square().sum()
    got = torch.autograd.grad(loss, leaves, allow_unused=True)
    for actual, right in zip(got, torch.autograd.grad(wanted, leaves, allow_unused=True), strict=True):
        assert (actual is None) == (right is None)
        if right is not None:
            assert relative(actual, right) < 1e-8 or right.norm() < 1e-10


def test_fp32_stays_within_1e_5_of_the_recurrence(layer, tokens, backend):
    x = tokens(1, 70)
    expected, last = oracle(layer.mixer, x[0], layer.bound)
    o, after = layer.to(torch.float32)(x.float(), keep_state=True)
    assert relative(o[0], expected) < 1e-5
    if last is not None:
        assert relative(state_of(after)[0], last) < 1e-5


def test_seen_from_both_sides_a_layer_is_two_recurrences(layer, tokens):
    x = tokens(1, 37)
    if layer.mixer.name == "hgrn":
        with pytest.raises(ValueError, match="not defined"):
            layer(x, visibility=Bidirectional())
        return
    o, after = layer(x, visibility=Bidirectional())
    assert after is None
    assert relative(o[0], oracle(layer.mixer, x[0], layer.bound, both=True)[0]) < 1e-11


def test_uninitialised_memory_never_shows(layer, tokens, backend):
    """Every buffer that is asked for without contents holds NaN first."""
    x = tokens(2, 35)
    o, after = layer(x, keep_state=True)
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(3).isnan().all()
        poisoned, poisoned_after = layer(x, keep_state=True)
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.equal(o, poisoned)
    for name, tensor in after.tensors.items():
        assert torch.equal(tensor, poisoned_after[name])


# -- mixers that are one another ---------------------------------------------------------------------------------------


def test_gated_deltanet_without_decay_is_deltanet(tokens, backend):
    torch.manual_seed(0)
    plain = DeltaNet(24, DeltaNetOptions(num_heads=2, use_gate=True)).double()
    gated = GatedDeltaNet(24, GatedDeltaNetOptions(num_heads=2, head_dim=12)).double()
    missing = gated.load_state_dict(plain.state_dict(), strict=False).missing_keys
    assert sorted(missing) == ["A_log", "a_proj.weight", "dt_bias"]
    gated.A_log.data.fill_(-math.inf)
    x = tokens(2, 50)
    context = SequenceContext.build(2, 50, keep_state=True)
    (o, after), (expected, last) = gated(x, context), plain(x, context)
    torch.testing.assert_close(o, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(after["matrix"], last["matrix"], rtol=0, atol=1e-12)


def test_hgrn2_without_a_bound_is_gla_with_the_key_that_its_gate_leaves(make_layer, tokens, backend):
    mixer, x = make_layer("hgrn2").mixer, tokens(2, 40)
    mixer.layer_index = 0
    heads = (mixer.heads, mixer.K)
    f = mixer.f_proj(x).unflatten(-1, heads)
    o, _ = decay_attention(
        silu(mixer.q_proj(x)).unflatten(-1, heads), torch.sigmoid(-f), mixer.i_proj(x).unflatten(-1, heads),
        torch.nn.functional.logsigmoid(f), backend="reference",
    )  # fmt: skip
    expected = mixer.o_proj(mixer.g_norm(o.flatten(2)))
    torch.testing.assert_close(mixer(x, SequenceContext.build(2, 40))[0], expected, rtol=0, atol=1e-12)


def table(beta: float = 1.0) -> DeltaNet:
    """DeltaNet as a bare table: queries and keys are the inputs, values their images, nothing around it."""
    options = DeltaNetOptions(
        num_heads=1, use_short_conv=False, qk_activation="identity", use_output_norm=False, use_beta=beta != 1.0
    )
    mixer = DeltaNet(24, options).double()
    for projection in (mixer.q_proj, mixer.k_proj, mixer.o_proj):
        projection.weight.data.copy_(torch.eye(24))
    if beta != 1.0:  # the inputs are unit vectors, so the logit is the same at all of them
        mixer.b_proj.weight.data.fill_(math.log(beta / (1 - beta)) if beta else -1e4)
    return mixer


def test_deltanet_stores_orthonormal_keys_retrieves_and_overwrites_them(backend):
    mixer, keys = table(), torch.eye(24, dtype=torch.float64)
    order = [0, 1, 2, 3, 1, 0, 3] * 5  # 35 tokens: fewer take batched products in the compiled back end too
    o, after = mixer(keys[order][None], SequenceContext.build(1, 35, keep_state=True))
    image = silu(mixer.v_proj.weight.T) * 24**-0.5  # row j: the value of key j, scaled as a read is
    torch.testing.assert_close(o[0], image[order], rtol=0, atol=1e-5)  # 1e-6 stands inside the L2 norm
    mixer.v_proj.weight.data.neg_()
    changed, _ = mixer(keys[:1][None], SequenceContext.build(1, 1, keep_state=True), after)
    torch.testing.assert_close(changed[0, 0], (silu(mixer.v_proj.weight.T) * 24**-0.5)[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("beta", [0.3, 0.8])
def test_deltanet_with_orthonormal_keys_is_additive_attention_of_beta_v(backend, beta):
    mixer, x = table(beta), torch.eye(24, dtype=torch.float64)[None]
    o, after = mixer(x, SequenceContext.build(1, 24, keep_state=True))
    image = silu(mixer.v_proj.weight.T)
    torch.testing.assert_close(o[0], beta * 24**-0.5 * image, rtol=0, atol=1e-5)
    torch.testing.assert_close(after["matrix"][0, 0], beta * image, rtol=0, atol=1e-5)


def test_deltanet_that_writes_nothing_leaves_the_state_as_it_was(backend):
    mixer, keys = table(), torch.eye(24, dtype=torch.float64)[None, :5]
    _, before = mixer(keys, SequenceContext.build(1, 5, keep_state=True))
    silent = table(0.0)
    _, after = silent(keys, SequenceContext.build(1, 5, keep_state=True), before)
    assert torch.equal(after["matrix"], before["matrix"])


# -- extreme gates -----------------------------------------------------------------------------------------------------


def finite(layer, x: Tensor) -> Tensor:
    """Output; it, the state and all gradients are finite."""
    x = x.clone().requires_grad_()
    o, after = layer(x, keep_state=True)
    tensors = [o, *after.tensors.values()]
    gradients = torch.autograd.grad(sum(t.square().sum() for t in tensors), [x, *layer.mixer.parameters()])
    assert all(t.isfinite().all() for t in (*tensors, *gradients))
    return o.detach()


def test_gla_whose_gates_are_open_is_linear_attention_and_shut_sees_one_token(make_layer, tokens, backend):
    layer, x = make_layer("gla"), tokens(2, 70)
    mixer = layer.mixer
    q, k, v = (p(x).unflatten(-1, (2, -1)) for p in (mixer.q_proj, mixer.k_proj, mixer.v_proj))
    mixer.gk_proj[0].weight.data.zero_()
    for logit, log_decay in ((1e4, None), (-480.0, -30.0), (-1e6, -6e4)):
        mixer.gk_proj[1].bias.data.fill_(logit)
        if log_decay is None:
            o = torch.einsum("bthk,bshk,bshv,ts->bthv", q, k, v, torch.ones(70, 70).tril().double()) * mixer.K**-0.5
        else:
            o = (q * k).sum(-1, keepdim=True) * v * mixer.K**-0.5  # e^-30 of the token before is below 1e-12
        expected = mixer.o_proj(mixer.g_norm_swish_gate(o, mixer.g_proj(x).unflatten(-1, (2, -1))).flatten(2))
        assert relative(finite(layer, x), expected) < 1e-9


@pytest.mark.parametrize("name", ["hgrn", "hgrn2"])
@pytest.mark.parametrize("index", [0, 2])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_bounded_gates_at_both_ends_are_finite_and_right(make_layer, tokens, backend, name, index, dtype):
    """Half the channels remember everything (alpha = 1 exactly), the others forget all that their bound allows."""
    layer, x = make_layer(name), tokens(1, 40).abs()
    layer.mixer.layer_index = index
    weight = layer.mixer.f_proj.weight
    weight.data.fill_(300.0)
    weight.data[::2] = -300.0
    expected, _ = oracle(layer.mixer, x[0], layer.bound)
    assert relative(finite(layer.to(dtype), x.to(dtype)), expected[None]) < (1e-9 if dtype == torch.float64 else 1e-4)


@pytest.mark.parametrize("level", [-1e4, -60.0, 60.0, 1e4])
def test_gated_deltanet_forgets_nothing_or_everything(make_layer, tokens, backend, level):
    layer, x = make_layer("gated_deltanet"), tokens(1, 40)
    layer.mixer.dt_bias.data.fill_(level)
    layer.mixer.A_log.data.fill_(1.0)
    assert relative(finite(layer, x), oracle(layer.mixer, x[0])[0][None]) < 1e-9


# -- lower bounds ------------------------------------------------------------------------------------------------------


def test_bounds_rise_from_nothing_by_equal_steps_at_the_start_and_stay_below_one():
    L = 24
    at_start = stacked_bounds(torch.zeros(L, 3, dtype=torch.float64))
    torch.testing.assert_close(at_start, (torch.arange(L).double() / L)[:, None].expand(L, 3), rtol=0, atol=1e-14)
    weights = 5 * torch.randn(L, 50, dtype=torch.float64)
    P = weights.softmax(0)
    torch.testing.assert_close(stacked_bounds(weights), P.cumsum(0) - P[0], rtol=0, atol=1e-14)
    extreme = stacked_bounds(200 * torch.randn(L, 500))
    assert (extreme[0] == 0).all()
    assert (extreme.diff(dim=0) >= 0).all()
    assert (extreme <= 1).all()


def test_a_gate_and_what_it_leaves_make_one():
    f = torch.linspace(-40, 40, 81, dtype=torch.float64)[:, None]
    bound = torch.tensor([0.0, 1e-3, 0.5, 1 - 1e-9], dtype=torch.float64)
    for low in (None, bound):
        away, log_alpha = bounded_gate(f.expand(-1, 4), low)
        alpha = (0 if low is None else low) + (1 - (0 if low is None else low)) * torch.sigmoid(f)
        torch.testing.assert_close(log_alpha.exp(), alpha.expand(-1, 4), rtol=1e-9, atol=0)
        torch.testing.assert_close(1 - away, alpha.expand(-1, 4), rtol=0, atol=1e-15)


# -- an independent implementation -------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["torch_chunk_gated_delta_rule", "torch_recurrent_gated_delta_rule"])
@pytest.mark.parametrize("name", ["gated_deltanet", "gated_deltanet-grouped-negative"])
def test_gated_deltanet_is_what_transformers_makes_of_it(make_layer, tokens, form, name):
    """Qwen3-Next's plain-torch gated delta rule between our projections; fp32, outputs, state and gradients."""
    modeling = pytest.importorskip("transformers.models.qwen3_next.modeling_qwen3_next")
    if not hasattr(modeling, form):
        pytest.skip(f"this version of transformers has no {form}")
    layer = make_layer(name).to(torch.float32)
    m, x = layer.mixer, tokens(2, 130).float().requires_grad_()
    q, k, v = (
        torch.nn.functional.silu(
            torch.nn.functional.conv1d(p(x).mT, c.weight, padding=3, groups=c.weight.shape[0])[..., :130]
        ).mT.unflatten(-1, (heads, -1))
        for p, c, heads in (
            (m.q_proj, m.q_conv1d, m.heads), (m.k_proj, m.k_conv1d, m.heads), (m.v_proj, m.v_conv1d, m.v_heads),
        )
    )  # fmt: skip
    shared = m.v_heads // m.heads
    theirs, last = getattr(modeling, form)(
        q.repeat_interleave(shared, 2), k.repeat_interleave(shared, 2), v,
        g=-m.A_log.exp() * torch.nn.functional.softplus(m.a_proj(x) + m.dt_bias),
        beta=m.b_proj(x).sigmoid() * (2 if m.options.allow_neg_eigval else 1),
        output_final_state=True, use_qk_l2norm_in_kernel=True,
    )  # fmt: skip
    expected = _finish_rows(m, theirs, x)
    o, after = layer(x, keep_state=True)
    upstream = torch.randn(o.shape, generator=torch.Generator().manual_seed(1))
    leaves = [x, *(p for n, p in m.named_parameters() if n != "direction")]
    pairs = [(o, expected), (after["matrix"], last)]
    pairs += zip(*(torch.autograd.grad((y * upstream).sum(), leaves) for y in (o, expected)), strict=True)
    for actual, right in pairs:
        assert relative(actual, right.double()) < 1e-5


def _finish_rows(m, o: Tensor, x: Tensor) -> Tensor:
    return torch.stack([_finish(m, o[b], x[b], "o_norm", "o_norm", m.options.use_gate) for b in range(len(x))])
