"""A sequence cut anywhere and carried on, and sequences packed into one row, give what one pass and a loop give."""

# Operators are called with ** dictionaries of tensors, which a type checker cannot match with their parameters.
# pyright: reportArgumentType=false, reportCallIssue=false
# pyright: reportOptionalMemberAccess=false, reportOptionalSubscript=false

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from latentcot.kernels import Bidirectional, decay_attention, delta_rule, gated_scan

OPERATORS = {"gated_scan": gated_scan, "decay_attention": decay_attention, "delta_rule": delta_rule}
CASES = [
    ("gated_scan", "token"),
    *(("decay_attention", gate) for gate in ("none", "head", "token", "channel")),
    *(("delta_rule", gate) for gate in ("none", "token", "channel")),
]
IDS = [f"{o}-{g}" for o, g in CASES]
CUTS = [0, 3, 4, 40, 106]  # sequences of 3, 1, 36 and 66 tokens: below and above every chunk length


def piece(arguments, a, b):
    """The tokens a … b-1; per-head gates have no time axis, and the state is the caller's."""
    tokens = {n: t for n, t in arguments.items() if n != "initial_state"}
    return {n: t if t is None or t.dim() == 1 else t[:, a:b] for n, t in tokens.items()}


@pytest.mark.parametrize(("operator", "gate"), CASES, ids=IDS)
@settings(max_examples=8, deadline=None, derandomize=True, database=None)
@given(cuts=st.lists(st.integers(0, 90), max_size=5))
def test_any_split_of_a_sequence_gives_the_same(operator, gate, cuts, random_inputs):
    arguments = random_inputs(operator, 2, 90, 2, 6, 5, gate=gate)
    function = OPERATORS[operator]
    whole, last = function(**arguments, output_state=True, backend="chunked")
    state, parts = arguments["initial_state"], []
    for a, b in pairwise([0, *sorted(cuts), 90]):
        o, state = function(**piece(arguments, a, b), initial_state=state, output_state=True, backend="chunked")
        parts.append(o)
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(state, last, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize(("operator", "gate"), CASES, ids=IDS)
def test_one_token_at_a_time_without_gradients_takes_the_step_and_agrees(operator, gate, random_inputs):
    arguments = random_inputs(operator, 2, 20, 2, 6, 5, gate=gate)
    function = OPERATORS[operator]
    whole, last = function(**arguments, output_state=True)
    state = arguments["initial_state"]
    with torch.no_grad():
        for t in range(20):
            o, state = function(**piece(arguments, t, t + 1), initial_state=state, output_state=True)
            torch.testing.assert_close(o[:, 0], whole[:, t], rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(state, last, rtol=1e-11, atol=1e-12)


def loop_over_sequences(function):
    def loop(initial_state=None, output_state=True, backend="auto", **tokens):
        outputs, states = [], []
        for n, (a, b) in enumerate(pairwise(CUTS)):
            state = None if initial_state is None else initial_state[n : n + 1]
            o, last = function(**piece(tokens, a, b), initial_state=state, output_state=output_state, backend=backend)
            outputs.append(o)
            states.append(last)
        return torch.cat(outputs, 1), torch.cat(states) if output_state else None

    return loop


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["fp64", "fp32"])
@pytest.mark.parametrize("with_state", [False, True], ids=["zero", "state"])
@pytest.mark.parametrize(("operator", "gate"), CASES, ids=IDS)
def test_packed_is_the_loop_over_sequences(operator, gate, with_state, dtype, random_inputs, evaluate, assert_same):
    arguments = random_inputs(operator, 1, CUTS[-1], 2, 16, 12, gate=gate, dtype=dtype, N=len(CUTS) - 1)
    function = OPERATORS[operator]
    cu_seqlens = torch.tensor(CUTS, dtype=torch.int32)
    expected = evaluate(loop_over_sequences(function), arguments, with_state=with_state, backend="chunked")
    for backend in ("chunked", "reference") if dtype == torch.float64 else ("chunked",):
        actual = evaluate(function, arguments, cu_seqlens=cu_seqlens, with_state=with_state, backend=backend)
        assert_same(actual, expected, dtype)


@pytest.mark.parametrize("visibility", [Bidirectional(), Bidirectional(gate="next")], ids=["own", "next"])
@pytest.mark.parametrize("gate", ["none", "head", "token", "channel"])
def test_packed_attention_in_both_directions(gate, visibility, random_inputs):
    arguments = random_inputs("decay_attention", 1, CUTS[-1], 2, 6, 5, gate=gate)
    arguments.pop("initial_state")
    packed, _ = decay_attention(**arguments, cu_seqlens=torch.tensor(CUTS), visibility=visibility)
    for a, b in pairwise(CUTS):
        alone, _ = decay_attention(**piece(arguments, a, b), visibility=visibility)
        torch.testing.assert_close(packed[:, a:b], alone, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("combine", ["average", "gate"])
@pytest.mark.parametrize("gate", ["none", "token", "channel"])
def test_packed_delta_rule_in_both_directions(gate, combine, random_inputs):
    arguments = random_inputs("delta_rule", 1, CUTS[-1], 2, 6, 5, gate=gate)
    arguments.pop("initial_state")
    options = {
        "visibility": Bidirectional(combine=combine),
        "direction_gate": torch.tensor([0.25, 1.0], dtype=torch.float64) if combine == "gate" else None,
    }
    packed, _ = delta_rule(**arguments, cu_seqlens=torch.tensor(CUTS), **options)
    for a, b in pairwise(CUTS):
        alone, _ = delta_rule(**piece(arguments, a, b), **options)
        torch.testing.assert_close(packed[:, a:b], alone, rtol=1e-11, atol=1e-12)


PADDED = [
    (operator, gate, visibility)
    for operator, gate in CASES
    for visibility in ("causal", "own", "next")
    if operator != "gated_scan" and gate != "head" and (operator, visibility) != ("delta_rule", "next")
]


@pytest.mark.parametrize(("operator", "gate", "visibility"), PADDED)
def test_neutral_padding_changes_no_real_output(operator, gate, visibility, random_inputs):
    """k, beta and log_decay are zero at the pads; q and v may hold anything."""
    function = OPERATORS[operator]
    arguments = random_inputs(operator, 2, 50, 2, 6, 5, gate=gate)
    for name in ("k", "beta", "log_decay"):
        if arguments.get(name) is not None:
            arguments[name][1, 30:] = 0.0
    options: dict
    if visibility == "causal":
        options = {"output_state": True, "initial_state": arguments.pop("initial_state")}
    else:
        options = {"visibility": Bidirectional(gate=visibility)}
        arguments.pop("initial_state")
    o, state = function(**arguments, **options)
    if "initial_state" in options:
        options["initial_state"] = options["initial_state"][1:]
    alone, last = function(**{n: None if t is None else t[1:, :30] for n, t in arguments.items()}, **options)
    torch.testing.assert_close(o[1:, :30], alone, rtol=1e-11, atol=1e-12)
    if state is not None:
        torch.testing.assert_close(state[1:], last, rtol=1e-11, atol=1e-12)
