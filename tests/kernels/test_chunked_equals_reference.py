"""The chunk-parallel forms against the step-by-step definitions: outputs, last state, every gradient."""

# Operators are called with ** dictionaries of tensors, which a type checker cannot match with their parameters.
# pyright: reportArgumentType=false, reportCallIssue=false
# pyright: reportOptionalMemberAccess=false, reportOptionalSubscript=false

import pytest
import torch

from latentcot.kernels import decay_attention, delta_rule, gated_scan
from latentcot.kernels.decay_attention import chunked as decay_attention_chunked
from latentcot.kernels.decay_attention import reference as decay_attention_reference
from latentcot.kernels.delta_rule import chunked as delta_rule_chunked
from latentcot.kernels.delta_rule import reference as delta_rule_reference

OPERATORS = {"gated_scan": gated_scan, "decay_attention": decay_attention, "delta_rule": delta_rule}
CASES = [
    ("gated_scan", "token"),
    *(("decay_attention", gate) for gate in ("none", "head", "token", "channel")),
    *(("delta_rule", gate) for gate in ("none", "token", "channel")),
]
WIDTHS = {1: (96, 16), 7: (60, 96), 63: (16, 60), 64: (16, 16), 65: (60, 16), 200: (16, 16)}  # S -> K, V


@pytest.mark.parametrize("with_state", [False, True], ids=["zero", "state"])
@pytest.mark.parametrize("S", sorted(WIDTHS))
@pytest.mark.parametrize(("operator", "gate"), CASES, ids=[f"{o}-{g}" for o, g in CASES])
def test_chunked_is_the_definition(operator, gate, S, with_state, random_inputs, evaluate, assert_same):
    K, V = WIDTHS[S]
    narrow = random_inputs(operator, 2 if S < 10 else 1, S, 2, K, V, gate=gate, dtype=torch.float32)
    wide = {name: None if t is None else t.double() for name, t in narrow.items()}
    function = OPERATORS[operator]
    # The definition in float32 would round as well: the yardstick of both dtypes is float64.
    expected = evaluate(function, wide, with_state=with_state, backend="reference")
    for arguments, dtype in ((wide, torch.float64), (narrow, torch.float32)):
        actual = evaluate(function, arguments, with_state=with_state, backend="chunked")
        assert actual["o"].dtype == dtype
        assert actual["state"].dtype == dtype
        assert_same(actual, expected, dtype)


@pytest.mark.parametrize("chunk_size", [1, 2, 3, 16, 31, 128])
@pytest.mark.parametrize("gate", ["none", "token", "channel"])
def test_every_chunk_size_gives_the_same(gate, chunk_size, random_inputs, evaluate, assert_same):
    arguments = random_inputs("decay_attention", 2, 37, 2, 16, 20, gate=gate)

    def attention(q, k, v, log_decay, initial_state, output_state):
        return decay_attention_chunked.decay_attention(q, k, v, log_decay, 0.3, initial_state, chunk_size=chunk_size)

    def attention_steps(q, k, v, log_decay, initial_state, output_state):
        return decay_attention_reference.decay_attention(q, k, v, log_decay, 0.3, initial_state)

    assert_same(evaluate(attention, arguments), evaluate(attention_steps, arguments), torch.float64)
    arguments = random_inputs("delta_rule", 2, 37, 2, 16, 20, gate=gate)

    def delta(q, k, v, beta, log_decay, initial_state, output_state):
        return delta_rule_chunked.delta_rule(q, k, v, beta, log_decay, 0.3, initial_state, chunk_size=chunk_size)

    def delta_steps(q, k, v, beta, log_decay, initial_state, output_state):
        k, v, beta = k.unsqueeze(2), v.unsqueeze(2), beta.unsqueeze(2)
        return delta_rule_reference.delta_rule(q, k, v, beta, log_decay, 0.3, initial_state)

    assert_same(evaluate(delta, arguments), evaluate(delta_steps, arguments), torch.float64)


@pytest.mark.parametrize("gate", ["none", "token", "channel"])
@pytest.mark.parametrize(("R", "H", "Hv"), [(1, 1, 1), (2, 1, 3), (3, 2, 4), (None, 2, 6)])
def test_reflections_and_grouped_values(R, H, Hv, gate, random_inputs, evaluate, assert_same):
    arguments = random_inputs("delta_rule", 2, 35, H, 16, 12, gate=gate, R=R, Hv=Hv)
    actual = evaluate(delta_rule, arguments, backend="chunked")
    assert_same(actual, evaluate(delta_rule, arguments, backend="reference"), torch.float64)


@pytest.mark.parametrize("backend", ["chunked", "reference"])
def test_grouped_values_repeat_each_key_head(backend, random_inputs):
    arguments = random_inputs("delta_rule", 1, 9, 2, 8, 5, Hv=6)
    o, state = delta_rule(**arguments, output_state=True, backend=backend)
    for head in range(6):
        one = {n: t[..., head : head + 1, :] for n, t in arguments.items() if n == "v"}
        one |= {n: arguments[n][..., head // 3 : head // 3 + 1, :] for n in ("q", "k")}
        one |= {n: arguments[n][..., head : head + 1] for n in ("beta", "log_decay")}
        alone, last = delta_rule(**one, initial_state=arguments["initial_state"][:, head : head + 1], output_state=True)
        torch.testing.assert_close(o[:, :, head : head + 1], alone, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(state[:, head : head + 1], last, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("operator", "gate"), CASES, ids=[f"{o}-{g}" for o, g in CASES])
def test_second_derivatives(operator, gate, random_inputs):
    """Gradient states differentiate through a gradient; the hand-written backward passes must allow it."""
    arguments = random_inputs(operator, 1, 3, 1, 2, 2, gate=gate)
    tensors = {n: t.requires_grad_() for n, t in arguments.items() if t is not None}

    def call(*values):
        inputs = dict.fromkeys(arguments) | dict(zip(tensors, values, strict=True))
        if inputs["log_decay"] is not None:
            inputs["log_decay"] = -inputs["log_decay"].square()  # finite differences must not step above zero
        return OPERATORS[operator](**inputs, output_state=True, backend="chunked")

    assert torch.autograd.gradgradcheck(call, tuple(tensors.values()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize(("operator", "gate"), CASES, ids=[f"{o}-{g}" for o, g in CASES])
def test_narrow_inputs_are_computed_in_float32(operator, gate, dtype, random_inputs):
    arguments = random_inputs(operator, 2, 40, 2, 16, 16, gate=gate, dtype=torch.float32)
    narrow = {n: None if t is None else t.to(dtype) for n, t in arguments.items()}
    o, state = OPERATORS[operator](**narrow, output_state=True)
    wide = {n: None if t is None else t.float() for n, t in narrow.items()}
    expected, expected_state = OPERATORS[operator](**wide, output_state=True)
    assert o.dtype == dtype
    assert state.dtype == torch.float32
    assert torch.equal(o, expected.to(dtype))
    assert torch.equal(state, expected_state)


def test_autocast_does_not_reach_inside(random_inputs):
    arguments = random_inputs("delta_rule", 2, 20, 2, 16, 16, dtype=torch.float32)
    expected, state = delta_rule(**arguments, output_state=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual, actual_state = delta_rule(**arguments, output_state=True)
    assert torch.equal(actual, expected)
    assert torch.equal(actual_state, state)
