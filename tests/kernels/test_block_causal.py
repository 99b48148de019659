"""Block-causal forms against a token-by-token oracle written from their definitions, and against each other."""

# Operators are called with ** dictionaries of tensors, which a type checker cannot match with their parameters.
# pyright: reportArgumentType=false, reportCallIssue=false
# pyright: reportOptionalMemberAccess=false, reportOptionalSubscript=false

from functools import partial
from itertools import pairwise

import pytest
import torch

from latentcot.kernels import BlockCausal, Causal, decay_attention, delta_rule

FORMS = [
    (inside, write)
    for inside in ("softmax", "bilinear", "decayed", "additive")
    for write in ("recurrent", "order_free")
    if (inside, write) != ("decayed", "order_free")
]
OPERATORS = {"decay_attention": decay_attention, "delta_rule": delta_rule}
CASES = [("decay_attention", g) for g in ("none", "head", "token", "channel")]
CASES += [("delta_rule", g) for g in ("none", "token", "channel")]
S = 11


def oracle(
    q, k, v, log_decay=None, initial_state=None, beta=None, *, length, inside, write, output_state=True, mix=None
):
    """One token after the other, one block after the other: ``(o, last state)``."""
    B, S, H, K = q.shape
    if k.dim() == 4:
        k, v, beta = k.unsqueeze(2), v.unsqueeze(2), None if beta is None else beta.unsqueeze(2)
    Hv, V = v.shape[-2:]
    q, k = q.repeat_interleave(Hv // H, 2), k.repeat_interleave(Hv // H, 3)
    g = torch.zeros(B, S, Hv, K, dtype=q.dtype)
    if log_decay is not None:
        g = g + (log_decay if log_decay.dim() == 4 else log_decay.unsqueeze(-1))
    scale = K**-0.5

    def step(state, t):
        state = g[:, t].exp().unsqueeze(-1) * state
        for r in range(k.shape[2]):
            u = v[:, t, r]
            if beta is not None:
                u = beta[:, t, r].unsqueeze(-1) * (u - (k[:, t, r].unsqueeze(-2) @ state).squeeze(-2))
            state = state + k[:, t, r].unsqueeze(-1) * u.unsqueeze(-2)
        return state

    def read(t, state):
        return scale * (q[:, t].unsqueeze(-2) @ state).squeeze(-2)

    def scan(tokens, state):
        out = {}
        for t in tokens:
            state = step(state, t)
            out[t] = read(t, state)
        return out, state

    def order_free(tokens, state):
        kept = torch.stack([g[:, t] for t in tokens]).sum(0).exp().unsqueeze(-1) * state
        keys = torch.stack([k[:, t, r] for t in tokens for r in range(k.shape[2])], 2)  # [B,Hv,rows,K]
        values = torch.stack([v[:, t, r] for t in tokens for r in range(k.shape[2])], 2)
        if beta is None:
            return kept + keys.mT @ values
        weighted = torch.stack([beta[:, t, r] for t in tokens for r in range(k.shape[2])], 2).unsqueeze(-1) * keys
        return torch.linalg.solve(torch.eye(K, dtype=q.dtype) + keys.mT @ weighted, kept + weighted.mT @ values)

    def both(forward, backward, t):
        if beta is None:
            return forward[t] + backward[t] - scale * (q[:, t] * k[:, t, 0]).sum(-1, keepdim=True) * v[:, t, 0]
        w = torch.full((Hv, 1), 0.5, dtype=q.dtype) if mix is None else mix.unsqueeze(-1)
        return w * forward[t] + (1 - w) * backward[t]

    zero = torch.zeros(B, Hv, K, V, dtype=q.dtype)
    state = zero if initial_state is None else initial_state
    outputs = []
    for first in range(0, S, length):
        tokens = list(range(first, min(first + length, S)))
        forward, recurrent = scan(tokens, state)
        after = recurrent if write == "recurrent" else order_free(tokens, state)
        alone, backward = scan(tokens, zero)[0], scan(tokens[::-1], zero)[0]
        for t in tokens:
            if inside == "softmax":
                scores = torch.stack([(q[:, t] * k[:, j, 0]).sum(-1) for j in tokens], -1) / K**0.5
                weights = scores.softmax(-1)
                own = sum(weights[..., i : i + 1] * v[:, j, 0] for i, j in enumerate(tokens))
                outputs.append(read(t, state) + own)
            elif inside == "bilinear":
                outputs.append(read(t, state) + both(alone, backward, t))
            elif inside == "decayed":
                outputs.append(both(forward, backward, t))
            else:
                outputs.append(read(t, after))
        state = after
    return torch.stack(outputs, 1), state


def values_of(operator, random_inputs, **options):
    """Inputs of one call: H = 2, K = 5, V = 4 (the keys of 4 tokens are fewer than K, of 6 more)."""
    B, S_ = options.pop("B", 2), options.pop("S", S)
    return random_inputs(operator, B, S_, 2, 5, 4, **options)


@pytest.mark.parametrize("length", [1, 3, 4, 6, S, S + 5])
@pytest.mark.parametrize(("inside", "write"), FORMS)
@pytest.mark.parametrize(("operator", "gate"), CASES)
def test_outputs_states_and_gradients(operator, gate, inside, write, length, random_inputs, evaluate, assert_same):
    arguments = values_of(operator, random_inputs, gate=gate)
    expected = evaluate(oracle, arguments, length=length, inside=inside, write=write)
    visibility = BlockCausal(length, inside, write)
    actual = evaluate(OPERATORS[operator], arguments, visibility=visibility, backend="chunked")
    assert_same(actual, expected, torch.float64)


@pytest.mark.parametrize("length", [4, S + 5])
@pytest.mark.parametrize(("inside", "write"), FORMS)
@pytest.mark.parametrize(("operator", "gate"), CASES)
def test_the_reference_back_end_too(operator, gate, inside, write, length, random_inputs, evaluate, assert_same):
    arguments = values_of(operator, random_inputs, gate=gate)
    visibility = BlockCausal(length, inside, write)
    expected = evaluate(oracle, arguments, with_state=False, length=length, inside=inside, write=write)
    actual = evaluate(OPERATORS[operator], arguments, with_state=False, visibility=visibility, backend="reference")
    assert_same(actual, expected, torch.float64)


@pytest.mark.parametrize("options", [{"Hv": 4}, {"R": 2}, {"R": 2, "Hv": 4}], ids=["grouped", "R", "both"])
@pytest.mark.parametrize(("inside", "write"), FORMS)
@pytest.mark.parametrize("gate", ["none", "token", "channel"])
def test_grouped_heads_and_reflections(gate, inside, write, options, random_inputs, evaluate, assert_same):
    arguments = values_of("delta_rule", random_inputs, gate=gate, **options)
    visibility = BlockCausal(4, inside, write)
    if inside == "softmax" and "R" in options:
        with pytest.raises(
            ValueError, match=r"softmax' is not defined for several reflections a token \(k has an axis R = 2"
        ):
            delta_rule(**arguments, visibility=visibility)
        return
    for backend in ("chunked", "reference"):
        actual = evaluate(delta_rule, arguments, visibility=visibility, backend=backend)
        assert_same(actual, evaluate(oracle, arguments, length=4, inside=inside, write=write), torch.float64)


@pytest.mark.parametrize(("inside", "write"), [f for f in FORMS if f[0] in ("bilinear", "decayed")])
def test_a_direction_gate_weighs_the_scans(inside, write, random_inputs):
    arguments, mix = values_of("delta_rule", random_inputs), torch.tensor([0.2, 1.0], dtype=torch.float64)
    expected, _ = oracle(**arguments, length=4, inside=inside, write=write, mix=mix)
    actual, _ = delta_rule(**arguments, visibility=BlockCausal(4, inside, write), direction_gate=mix)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("with_state", [False, True], ids=["zero", "state"])
@pytest.mark.parametrize(("inside", "write"), FORMS)
@pytest.mark.parametrize(
    ("operator", "gate"), [c for c in CASES if c not in (("decay_attention", "none"), ("delta_rule", "none"))]
)
def test_packed_is_the_loop_over_sequences(
    operator, gate, inside, write, with_state, random_inputs, evaluate, assert_same
):
    cuts = [0, 9, 10, 14, 20]  # blocks of 4 begin anew in each: 4+4+1, 1, 4, 4+2
    arguments = values_of(operator, random_inputs, gate=gate, B=1, S=20, N=4)
    function = partial(OPERATORS[operator], visibility=BlockCausal(4, inside, write))

    def loop(initial_state=None, output_state=True, **tokens):
        parts = []
        for n, (a, b) in enumerate(pairwise(cuts)):
            piece = {name: t if t is None or t.dim() == 1 else t[:, a:b] for name, t in tokens.items()}
            state = None if initial_state is None else initial_state[n : n + 1]
            parts.append(function(**piece, initial_state=state, output_state=output_state))
        return torch.cat([o for o, _ in parts], 1), torch.cat([s for _, s in parts])

    actual = evaluate(function, arguments, with_state=with_state, cu_seqlens=torch.tensor(cuts))
    assert_same(actual, evaluate(loop, arguments, with_state=with_state), torch.float64)


@pytest.mark.parametrize(("inside", "write"), FORMS)
@pytest.mark.parametrize(("operator", "gate"), CASES)
def test_cut_between_blocks_and_carried_on(operator, gate, inside, write, random_inputs):
    arguments = values_of(operator, random_inputs, gate=gate)
    function = partial(OPERATORS[operator], visibility=BlockCausal(4, inside, write), output_state=True)
    whole, last = function(**arguments)
    state, parts = arguments.pop("initial_state"), []
    for a, b in ((0, 8), (8, 11)):
        piece = {n: t if t is None or t.dim() == 1 else t[:, a:b] for n, t in arguments.items()}
        o, state = function(**piece, initial_state=state)
        parts.append(o)
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(state, last, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("length", [3, 8])  # fewer keys than channels, and more
@pytest.mark.parametrize("inside", ["softmax", "additive"])
@pytest.mark.parametrize("operator", OPERATORS)
def test_an_order_free_write_knows_no_order(operator, inside, length, random_inputs):
    arguments = values_of(operator, random_inputs, gate="token", S=2 * length)
    turned = torch.randperm(length, generator=torch.Generator().manual_seed(3))
    order = torch.cat([turned, length + turned])
    function = partial(OPERATORS[operator], visibility=BlockCausal(length, inside, "order_free"), output_state=True)
    o, state = function(**arguments)
    permuted = {n: t[:, order] for n, t in arguments.items() if n != "initial_state"}
    o_permuted, same = function(**permuted, initial_state=arguments["initial_state"])
    torch.testing.assert_close(same, state, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(o_permuted, o[:, order], rtol=1e-12, atol=1e-12)
    _, other = OPERATORS[operator](**permuted, initial_state=arguments["initial_state"], output_state=True)
    assert (other - state).abs().max() > 1e-2  # where order counts, it shows


def test_an_order_free_write_minimises_its_objective(random_inputs):
    for length in (3, 8):
        arguments = values_of("delta_rule", random_inputs, gate="channel", S=length)
        _, state = delta_rule(**arguments, visibility=BlockCausal(length, "additive", "order_free"), output_state=True)
        k, v, beta = (arguments[n].transpose(1, 2) for n in ("k", "v", "beta"))  # [B,H,S,...]
        old = arguments["log_decay"].sum(1).exp().unsqueeze(-1) * arguments["initial_state"]
        new = state.clone().requires_grad_()
        loss = 0.5 * (new - old).square().sum() + 0.5 * (beta.unsqueeze(-1) * (k @ new - v).square()).sum()
        (slope,) = torch.autograd.grad(loss, new)
        assert slope.abs().max() < 1e-12


def test_one_token_written_order_free_has_a_rescaled_beta(random_inputs):
    arguments = values_of("delta_rule", random_inputs, gate="token")
    arguments["k"] = 1.7 * arguments["k"]
    o, state = delta_rule(**arguments, visibility=BlockCausal(1, "additive", "order_free"), output_state=True)
    beta = arguments["beta"]
    arguments["beta"] = beta / (1 + beta * arguments["k"].square().sum(-1))
    expected, last = delta_rule(**arguments, output_state=True)
    torch.testing.assert_close(o, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(state, last, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("length", [3, 8])
def test_betas_of_zero_have_exact_gradients(length, random_inputs, evaluate, assert_same):
    arguments = values_of("delta_rule", random_inputs, gate="channel")
    arguments["beta"][:, ::2] = 0.0
    for inside in ("softmax", "additive"):
        actual = evaluate(delta_rule, arguments, visibility=BlockCausal(length, inside, "order_free"))
        assert_same(
            actual, evaluate(oracle, arguments, length=length, inside=inside, write="order_free"), torch.float64
        )


@pytest.mark.parametrize("gate", ["head", "token", "channel"])
def test_blocks_of_one_token_that_decay_are_causal(gate, random_inputs):
    arguments = values_of("decay_attention", random_inputs, gate=gate)
    actual, last = decay_attention(**arguments, visibility=BlockCausal(1, "decayed"), output_state=True)
    expected, state = decay_attention(**arguments, visibility=Causal(), output_state=True)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(last, state, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("inside", "write"), [f for f in FORMS if f[0] != "softmax"])
def test_without_decay_it_is_a_block_mask(inside, write, random_inputs):
    arguments = values_of("decay_attention", random_inputs, gate="none")
    arguments.pop("initial_state")
    actual, _ = decay_attention(**arguments, visibility=BlockCausal(4, inside, write), scale=0.3)
    block = torch.arange(S) // 4
    scores = torch.einsum("bihk,bjhk->bhij", arguments["q"], arguments["k"]) * (block[:, None] >= block)
    expected = 0.3 * torch.einsum("bhij,bjhv->bihv", scores, arguments["v"])
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("inside", "write"), FORMS)
@pytest.mark.parametrize(("operator", "gate"), [c for c in CASES if c[1] in ("token", "channel")])
def test_a_full_reset_inside_a_block(operator, gate, inside, write, random_inputs, evaluate):
    arguments = values_of(operator, random_inputs, gate=gate)
    arguments["log_decay"][:, [1, 4, 6]] = float("-inf")
    expected, last = oracle(**arguments, length=4, inside=inside, write=write)
    actual = evaluate(OPERATORS[operator], arguments, visibility=BlockCausal(4, inside, write))
    torch.testing.assert_close(actual["o"], expected, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(actual["state"], last, rtol=1e-11, atol=1e-12)
    assert all(t.isfinite().all() for t in actual.values())


@pytest.mark.parametrize(("inside", "write"), FORMS)
@pytest.mark.parametrize("operator", OPERATORS)
def test_no_token_sees_a_later_block(operator, inside, write, random_inputs):
    arguments = values_of(operator, random_inputs, gate="channel")
    function = partial(OPERATORS[operator], visibility=BlockCausal(4, inside, write))
    o, _ = function(**arguments)
    for n in ("k", "v", "log_decay"):
        arguments[n] = arguments[n].clone()
        arguments[n][:, 6] = -torch.rand_like(arguments[n][:, 6])
    changed = (function(**arguments)[0] - o).abs().amax((0, 2, 3))
    assert torch.equal(changed > 1e-6, torch.arange(S) >= 4)  # all of its own block and of the later ones


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("inside", "write"), FORMS)
def test_narrow_inputs_are_computed_in_float32(inside, write, dtype, random_inputs):
    for operator, function in OPERATORS.items():
        arguments = values_of(operator, random_inputs, gate="token", dtype=dtype)
        o, state = function(**arguments, visibility=BlockCausal(4, inside, write), output_state=True)
        wide, last = function(
            **{n: t.float() for n, t in arguments.items()}, visibility=BlockCausal(4, inside, write), output_state=True
        )
        assert o.dtype == dtype
        assert state.dtype == torch.float32
        assert torch.equal(o, wide.to(dtype))
        assert torch.equal(state, last)


@pytest.mark.parametrize("length", [4, 8])
@pytest.mark.parametrize(("inside", "write"), FORMS)
@pytest.mark.parametrize(("operator", "gate"), [c for c in CASES if c[1] in ("token", "channel")])
def test_float32_keeps_its_digits(operator, gate, inside, write, length, random_inputs, evaluate, assert_same):
    arguments = values_of(operator, random_inputs, gate=gate, dtype=torch.float32)
    actual = evaluate(OPERATORS[operator], arguments, visibility=BlockCausal(length, inside, write))
    wide = {n: t.double() for n, t in arguments.items()}
    assert_same(actual, evaluate(oracle, wide, length=length, inside=inside, write=write), torch.float32)


@pytest.mark.parametrize("length", [24, 70])
@pytest.mark.parametrize(("inside", "write"), FORMS)
@pytest.mark.parametrize(("operator", "gate"), [c for c in CASES if c[1] in ("token", "channel")])
def test_blocks_across_the_borders_of_chunks(operator, gate, inside, write, length, random_inputs):
    arguments = values_of(operator, random_inputs, gate=gate, B=1, S=150)
    function = partial(OPERATORS[operator], visibility=BlockCausal(length, inside, write), output_state=True)
    actual, last = function(**arguments, backend="chunked")
    expected, state = function(**arguments, backend="reference")
    torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(last, state, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("operator", OPERATORS)
def test_empty_sequences_keep_their_state(operator, random_inputs):
    arguments = values_of(operator, random_inputs, gate="token", S=0)
    o, state = OPERATORS[operator](**arguments, visibility=BlockCausal(4), output_state=True)
    assert o.shape == (2, 0, 2, 4)
    assert torch.equal(state, arguments["initial_state"])
    assert state is not arguments["initial_state"]


@pytest.mark.parametrize(
    ("inside", "write"), [("softmax", "order_free"), ("additive", "order_free"), ("decayed", "recurrent")]
)
@pytest.mark.parametrize("operator", OPERATORS)
def test_second_derivatives(operator, inside, write, random_inputs):
    arguments = random_inputs(operator, 1, 3, 1, 2, 2, gate="token")
    names = [n for n in arguments if n != "initial_state"]
    leaves = [arguments[n].requires_grad_() for n in names]

    def function(*tensors):
        return OPERATORS[operator](**dict(zip(names, tensors, strict=True)), visibility=BlockCausal(2, inside, write))[
            0
        ]

    assert torch.autograd.gradgradcheck(function, leaves)


@pytest.mark.parametrize(("inside", "write"), [("softmax", "recurrent"), ("additive", "order_free")])
@pytest.mark.parametrize("operator", OPERATORS)
def test_compiles_as_one_graph(operator, inside, write, random_inputs, evaluate, assert_same):
    arguments = values_of(operator, random_inputs, gate="none")
    function = partial(OPERATORS[operator], visibility=BlockCausal(4, inside, write))
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    assert_same(evaluate(compiled, arguments), evaluate(function, arguments), torch.float64)
    torch.compiler.reset()


def test_a_direction_gate_without_two_scans_is_refused(random_inputs):
    arguments = values_of("delta_rule", random_inputs)
    for inside in ("softmax", "additive"):
        with pytest.raises(ValueError, match=r"direction_gate is used with .* inside='bilinear' or 'decayed' only"):
            delta_rule(**arguments, visibility=BlockCausal(4, inside), direction_gate=torch.ones(2))
    with pytest.raises(ValueError, match=r"direction_gate has shape \(3,\), expected \[H_v\] = \(2,\)"):
        delta_rule(**arguments, visibility=BlockCausal(4, "decayed"), direction_gate=torch.ones(3))
