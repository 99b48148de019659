"""The two-stream pass against inference block by block, and against pairs of tokens written out from the definition."""

# Operators are called with ** dictionaries of tensors, which a type checker cannot match with their parameters.
# pyright: reportArgumentType=false, reportCallIssue=false
# pyright: reportOptionalMemberAccess=false, reportOptionalSubscript=false

from itertools import pairwise

import pytest
import torch

from latentcot.kernels import BlockCausal, decay_attention, delta_rule
from latentcot.kernels.two_stream import Stream, block_two_stream

FORMS = [
    (inside, write)
    for inside in ("softmax", "bilinear", "decayed", "additive")
    for write in ("recurrent", "order_free")
    if (inside, write) != ("decayed", "order_free")
]
CASES = [("decay_attention", g) for g in ("none", "head", "token", "channel")]
CASES += [("delta_rule", g) for g in ("none", "token", "channel")]
S = 10


def two_streams(random_inputs, operator, *, B=2, S=S, N=None, **options):
    """Tensors of both streams by name, ``c_q`` … ``n_beta``, and an initial state."""
    tensors = {}
    for label, seed in (("c_", 0), ("n_", 7)):
        arguments = random_inputs(operator, B, S, 2, 5, 4, seed=seed, N=N, **options)
        state = arguments.pop("initial_state")
        tensors |= {label + n: t for n, t in arguments.items() if t is not None}
    return tensors | {"initial_state": state}


def stream(tensors, label, a=0, b=None):
    """The tokens a … b-1 of one stream as keyword arguments."""
    names = ("q", "k", "v", "log_decay", "beta")
    found = {n: tensors[label + n] for n in names if label + n in tensors}
    return {n: t if t.dim() == 1 else t[:, a:b] for n, t in found.items()}


def in_one_pass(tensors, length, inside, write, **options):
    clean, noisy = Stream(**stream(tensors, "c_")), Stream(**stream(tensors, "n_"))
    return block_two_stream(clean, noisy, length, inside, tensors.get("initial_state"), True, write=write, **options)


def block_by_block(tensors, length, inside, write, backend="reference", **options):
    """Each block is denoised twice from the same state, then its clean tokens are committed."""
    function = delta_rule if "c_beta" in tensors else decay_attention
    state, clean, noisy = tensors.get("initial_state"), [], []
    form = {"visibility": BlockCausal(length, inside, write), "backend": backend, **options}
    for a in range(0, tensors["c_q"].shape[1], length):
        first, _ = function(**stream(tensors, "n_", a, a + length), initial_state=state, **form)
        again, _ = function(**stream(tensors, "n_", a, a + length), initial_state=state, **form)
        assert torch.equal(first, again)
        noisy.append(again)
        o, state = function(**stream(tensors, "c_", a, a + length), initial_state=state, output_state=True, **form)
        clean.append(o)
    return torch.cat(clean, 1), torch.cat(noisy, 1), state


def evaluated(function, tensors, *arguments, **options):
    """Both outputs, the state, and the gradients of a random projection of all three."""
    leaves = {n: t.clone().requires_grad_() for n, t in tensors.items()}
    results = function(leaves, *arguments, **options)
    generator = torch.Generator().manual_seed(5)
    loss = sum((r * torch.randn(r.shape, generator=generator, dtype=torch.float64)).sum() for r in results)
    gradients = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    gradients = [torch.zeros_like(t) if g is None else g for g, t in zip(gradients, leaves.values(), strict=True)]
    named = {f"d_{n}": g for n, g in zip(leaves, gradients, strict=True)}
    return dict(zip(("o_clean", "o_noisy", "state"), results, strict=True)) | named


@pytest.mark.parametrize("length", [1, 3, 4, 6, S, S + 4])
@pytest.mark.parametrize(("inside", "write"), FORMS)
@pytest.mark.parametrize(("operator", "gate"), CASES)
def test_one_pass_is_inference_block_by_block(operator, gate, inside, write, length, random_inputs, assert_same):
    tensors = two_streams(random_inputs, operator, gate=gate)
    actual = evaluated(in_one_pass, tensors, length, inside, write)
    assert_same(actual, evaluated(block_by_block, tensors, length, inside, write), torch.float64)


@pytest.mark.parametrize(("inside", "write"), FORMS)
@pytest.mark.parametrize(("operator", "gate"), CASES)
def test_the_reference_back_end_too(operator, gate, inside, write, random_inputs, assert_same):
    tensors = two_streams(random_inputs, operator, gate=gate)
    tensors.pop("initial_state")
    actual = evaluated(in_one_pass, tensors, 4, inside, write, backend="reference")
    assert_same(actual, evaluated(block_by_block, tensors, 4, inside, write), torch.float64)


@pytest.mark.parametrize("options", [{"Hv": 4}, {"R": 2}, {"R": 2, "Hv": 4}], ids=["grouped", "R", "both"])
@pytest.mark.parametrize(("inside", "write"), FORMS)
def test_grouped_heads_and_reflections(inside, write, options, random_inputs, assert_same):
    tensors = two_streams(random_inputs, "delta_rule", gate="channel", **options)
    if inside == "softmax" and "R" in options:
        with pytest.raises(
            ValueError, match="block_two_stream: inside='softmax' is not defined for several reflections"
        ):
            in_one_pass(tensors, 4, inside, write)
        return
    actual = evaluated(in_one_pass, tensors, 4, inside, write)
    assert_same(actual, evaluated(block_by_block, tensors, 4, inside, write), torch.float64)


@pytest.mark.parametrize(("inside", "write"), FORMS)
@pytest.mark.parametrize("operator", ["decay_attention", "delta_rule"])
def test_the_clean_stream_is_the_block_causal_call(operator, inside, write, random_inputs):
    tensors = two_streams(random_inputs, operator, gate="token")
    clean, _, last = in_one_pass(tensors, 4, inside, write)
    function = decay_attention if operator == "decay_attention" else delta_rule
    expected, state = function(
        **stream(tensors, "c_"),
        initial_state=tensors["initial_state"],
        output_state=True,
        visibility=BlockCausal(4, inside, write),
    )
    torch.testing.assert_close(clean, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(last, state, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("inside", "write"), FORMS)
@pytest.mark.parametrize("gate", ["none", "token", "channel"])
def test_noisy_outputs_pair_by_pair(gate, inside, write, random_inputs):
    """Decay attention in quadratic form: each weight is the exponential of the gates between its two tokens."""
    L, tensors = 4, two_streams(random_inputs, "decay_attention", gate=gate)
    tensors.pop("initial_state")
    _, noisy, _ = in_one_pass(tensors, L, inside, write)
    q, k, v, clean_k, clean_v = (tensors[n] for n in ("n_q", "n_k", "n_v", "c_k", "c_v"))
    gates = {}
    for label in ("c_", "n_"):
        g = tensors.get(label + "log_decay", torch.zeros_like(q))
        gates[label] = g if g.dim() == 4 else g.unsqueeze(-1).expand_as(q)

    def weight(i, key, *between):  # between: (stream, first gate, behind the last gate)
        decay = sum((gates[label][:, a:b].sum(1) for label, a, b in between), torch.zeros_like(q[:, 0]))
        return 5**-0.5 * (q[:, i] * decay.exp() * key).sum(-1, keepdim=True)

    for i in range(S):
        first, last = i // L * L, min(i // L * L + L, S)
        expected = torch.zeros_like(v[:, 0])
        for j in range(first):  # clean tokens of earlier blocks, decayed to the start of the block of i
            begins = j // L * L + L if write == "order_free" else j + 1
            own = {"decayed": [("n_", first, i + 1)], "additive": [("n_", first, last)]}.get(inside, [])
            expected += weight(i, clean_k[:, j], ("c_", begins, first), *own) * clean_v[:, j]
        for j in range(first, last):  # noisy tokens of the same block
            if inside == "softmax":
                continue
            if inside == "additive":
                between = ("n_", last if write == "order_free" else j + 1, last)
            else:
                between = ("n_", j + 1, i + 1) if j <= i else ("n_", i, j)
            expected += weight(i, k[:, j], between) * v[:, j]
        if inside == "softmax":
            scores = torch.einsum("bhk,bjhk->bhj", q[:, i], k[:, first:last]) / 5**0.5
            expected += torch.einsum("bhj,bjhv->bhv", scores.softmax(-1), v[:, first:last])
        torch.testing.assert_close(noisy[:, i], expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("inside", "write"), FORMS)
@pytest.mark.parametrize("operator", ["decay_attention", "delta_rule"])
def test_a_noisy_loss_reaches_clean_tokens_of_earlier_blocks_only(operator, inside, write, random_inputs):
    tensors = two_streams(random_inputs, operator, gate="token")
    names = ["c_k", "c_v", "c_log_decay"] + (["c_beta"] if operator == "delta_rule" else [])
    for n in names:
        tensors[n].requires_grad_()
    _, noisy, _ = in_one_pass(tensors, 4, inside, write)
    probe = torch.randn(2, 2, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    gradients = torch.autograd.grad((noisy[:, 6] * probe).sum(), [tensors[n] for n in names])  # a token of block 1
    for gradient in gradients:
        reached = gradient.flatten(2).abs().amax((0, 2))
        assert (reached[4:] == 0).all()
        assert (reached[1:4] > 1e-6).all()  # (the gate of token 0 acts on the initial state alone, but acts)
    with torch.no_grad():  # central difference in one clean value of block 0
        slopes = []
        for h in (1e-5, -1e-5):
            moved = dict(tensors, c_v=tensors["c_v"].clone())
            moved["c_v"][1, 2, 1, 3] += h
            slopes.append((in_one_pass(moved, 4, inside, write)[1][:, 6] * probe).sum())
    exact = gradients[names.index("c_v")][1, 2, 1, 3]
    torch.testing.assert_close((slopes[0] - slopes[1]) / 2e-5, exact, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize(("inside", "write"), FORMS)
@pytest.mark.parametrize("operator", ["decay_attention", "delta_rule"])
def test_a_noisy_token_is_seen_in_its_own_block_only(operator, inside, write, random_inputs):
    tensors = two_streams(random_inputs, operator, gate="channel")
    before = in_one_pass(tensors, 4, inside, write)
    for n in ("n_k", "n_v"):
        tensors[n] = tensors[n].clone()
        tensors[n][:, 5] = torch.flip(tensors[n][:, 5], (-1,))
    clean, noisy, state = in_one_pass(tensors, 4, inside, write)
    assert torch.equal(clean, before[0])
    assert torch.equal(state, before[2])
    changed = (noisy - before[1]).abs().amax((0, 2, 3)) > 1e-9
    assert torch.equal(changed, (torch.arange(S) >= 4) & (torch.arange(S) < 8))


@pytest.mark.parametrize("with_state", [False, True], ids=["zero", "state"])
@pytest.mark.parametrize(("inside", "write"), FORMS)
@pytest.mark.parametrize(("operator", "gate"), [c for c in CASES if c[1] in ("head", "token")])
def test_packed_is_the_loop_over_sequences(operator, gate, inside, write, with_state, random_inputs, assert_same):
    cuts = [0, 9, 10, 14, 20]
    tensors = two_streams(random_inputs, operator, gate=gate, B=1, S=20, N=4)
    if not with_state:
        tensors.pop("initial_state")

    def loop(tensors, *form):
        parts = []
        for n, (a, b) in enumerate(pairwise(cuts)):
            piece = {m: t if t.dim() == 1 else t[:, a:b] for m, t in tensors.items() if m != "initial_state"}
            if with_state:
                piece["initial_state"] = tensors["initial_state"][n : n + 1]
            parts.append(in_one_pass(piece, *form))
        clean, noisy, state = zip(*parts, strict=True)
        return torch.cat(clean, 1), torch.cat(noisy, 1), torch.cat(state)

    actual = evaluated(in_one_pass, tensors, 4, inside, write, cu_seqlens=torch.tensor(cuts))
    assert_same(actual, evaluated(loop, tensors, 4, inside, write), torch.float64)


@pytest.mark.parametrize("operator", ["decay_attention", "delta_rule"])
def test_right_padded_rows_are_the_rows_alone(operator, random_inputs):
    """Lengths keep padded keys, which are zero, out of the softmax inside a block; a row may hold nothing but padding."""
    tensors = two_streams(random_inputs, operator, gate="token", B=3)
    lengths = torch.tensor([S, 6, 0])
    for name in set(tensors) - {"initial_state"}:
        real = torch.arange(S) < lengths[:, None]
        tensors[name] = tensors[name] * real.view(3, S, *[1] * (tensors[name].dim() - 2))
    clean, noisy, state = in_one_pass(tensors, 4, "softmax", "recurrent", lengths=lengths)
    function = delta_rule if operator == "delta_rule" else decay_attention
    single, _ = function(**stream(tensors, "c_"), visibility=BlockCausal(4), initial_state=tensors["initial_state"],
                         lengths=lengths)  # fmt: skip
    for row, n in enumerate(lengths.tolist()):
        alone = {m: t[row : row + 1] if m == "initial_state" else t[row : row + 1, :n] for m, t in tensors.items()}
        expected = in_one_pass(alone, 4, "softmax", "recurrent")
        for got, right in zip((clean[row, :n], noisy[row, :n], state[row]), expected, strict=True):
            torch.testing.assert_close(got, right[0], rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(single[row, :n], expected[0][0], rtol=1e-12, atol=1e-12)
    with pytest.raises(ValueError, match="lengths belong to BlockCausal"):
        function(**stream(tensors, "c_"), lengths=lengths)


@pytest.mark.parametrize(("inside", "write"), [f for f in FORMS if f[0] in ("bilinear", "decayed")])
def test_a_direction_gate_weighs_the_scans_of_both_streams(inside, write, random_inputs):
    tensors = two_streams(random_inputs, "delta_rule", gate="token")
    mix = torch.tensor([0.2, 1.0], dtype=torch.float64)
    actual = in_one_pass(tensors, 4, inside, write, direction_gate=mix)
    expected = block_by_block(tensors, 4, inside, write, direction_gate=mix)
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("operator", ["decay_attention", "delta_rule"])
def test_the_softmax_form_needs_no_gates_of_noisy_tokens(operator, random_inputs):
    tensors = two_streams(random_inputs, operator, gate="token")
    expected = in_one_pass(tensors, 4, "softmax", "recurrent")
    bare = {n: t for n, t in tensors.items() if n not in ("n_log_decay", "n_beta")}
    for a, e in zip(in_one_pass(bare, 4, "softmax", "recurrent"), expected, strict=True):
        assert torch.equal(a, e)


@pytest.mark.parametrize(("inside", "write"), FORMS)
def test_the_scale_is_that_of_the_linear_reads(inside, write, random_inputs):
    for operator in ("decay_attention", "delta_rule"):
        tensors = two_streams(random_inputs, operator, gate="token")
        actual = in_one_pass(tensors, 4, inside, write, scale=0.3)
        for a, e in zip(actual, block_by_block(tensors, 4, inside, write, scale=0.3), strict=True):
            torch.testing.assert_close(a, e, rtol=1e-12, atol=1e-12)


def test_dtypes_states_and_empty_sequences(random_inputs):
    tensors = two_streams(random_inputs, "delta_rule", gate="token", dtype=torch.bfloat16)
    clean, noisy, state = in_one_pass(tensors, 4, "softmax", "recurrent")
    assert clean.dtype == noisy.dtype == torch.bfloat16
    assert state.dtype == torch.float32
    assert block_two_stream(Stream(**stream(tensors, "c_")), Stream(**stream(tensors, "n_")), 4)[2] is None
    empty = {n: t if n == "initial_state" else t[:, :0] for n, t in tensors.items()}
    clean, noisy, state = in_one_pass(empty, 4, "softmax", "recurrent")
    assert clean.shape == noisy.shape == (2, 0, 2, 4)
    torch.testing.assert_close(state, tensors["initial_state"].float(), rtol=0, atol=0)


BAD = {
    "length": ({}, {"length": 0}, "length is 0, expected a whole number"),
    "inside": ({}, {"inside": "mean"}, "inside is 'mean'"),
    "undefined": ({}, {"inside": "decayed", "write": "order_free"}, "with write='order_free' is not defined"),
    "one beta": ({"c_beta": None}, {}, "noisy.beta is given but clean.beta is not"),
    "other beta": ({"n_beta": None}, {"inside": "bilinear"}, "clean.beta is given but noisy.beta is not"),
    "lengths": (
        {"n_q": torch.zeros(2, 9, 2, 5)},
        {},
        r"noisy.q has shape \(2, 9, 2, 5\), expected the shape of clean.q = \(2, 10, 2, 5\)",
    ),
    "gates": ({"c_log_decay": -torch.ones(2)}, {}, r"block_two_stream: clean: log_decay has shape \(2,\)"),
    "growth": (
        {"n_log_decay": torch.ones(2, S, 2)},
        {"inside": "decayed"},
        "noisy: log_decay has the value 1, expected",
    ),
    "state": (
        {"initial_state": torch.zeros(2, 2, 5, 5)},
        {},
        r"initial_state has shape \(2, 2, 5, 5\), expected \[N,H_v",
    ),
    "offsets": ({}, {"cu_seqlens": torch.tensor([0, S])}, "B must be 1; it is 2"),
    "gate": ({}, {"direction_gate": torch.ones(2)}, "direction_gate is used with"),
    "backend": ({}, {"backend": "fast"}, "backend is 'fast', expected one of"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named(case, random_inputs):
    changes, options, message = BAD[case]
    tensors = two_streams(random_inputs, "delta_rule", gate="token", dtype=torch.float32) | changes
    tensors = {n: t for n, t in tensors.items() if t is not None}
    form = {"length": 4, "inside": "softmax", "write": "recurrent"} | options
    with pytest.raises(ValueError, match=message):
        in_one_pass(tensors, **form)


def test_bad_types_are_named(random_inputs):
    tensors = two_streams(random_inputs, "decay_attention", gate="token")
    clean, noisy = Stream(**stream(tensors, "c_")), Stream(**stream(tensors, "n_"))
    with pytest.raises(TypeError, match="noisy is a tuple, expected a Stream"):
        block_two_stream(clean, tuple(noisy), 4)
    with pytest.raises(TypeError, match=r"noisy\.k is None, expected a torch\.Tensor"):
        block_two_stream(clean, noisy._replace(k=None), 4)
    with pytest.raises(TypeError, match=r"block_two_stream: clean\.v has dtype torch\.int64, expected a floating"):
        block_two_stream(clean._replace(v=clean.v.long()), noisy, 4)
    with pytest.raises(ValueError, match="direction_gate is for the delta rule"):
        block_two_stream(clean, noisy, 4, "bilinear", direction_gate=torch.ones(2, dtype=torch.float64))
