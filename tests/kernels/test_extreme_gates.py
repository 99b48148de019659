"""Gates that forget everything, nothing, or everything on some channels only: exact limits, and never a NaN."""

# Operators are called with ** dictionaries of tensors, which a type checker cannot match with their parameters.
# pyright: reportArgumentType=false, reportCallIssue=false
# pyright: reportOptionalMemberAccess=false, reportOptionalSubscript=false

import pytest
import torch

from latentcot.kernels import decay_attention, delta_rule, gated_scan

OPERATORS = {"gated_scan": gated_scan, "decay_attention": decay_attention, "delta_rule": delta_rule}
CASES = [
    ("gated_scan", "token"),
    *(("decay_attention", gate) for gate in ("head", "token", "channel")),
    *(("delta_rule", gate) for gate in ("token", "channel")),
]
IDS = [f"{o}-{g}" for o, g in CASES]


def mixed(gate):
    """Long memory broken by strong resets: the pattern that a difference of running sums gets wrong."""
    gate = gate.clone().fill_(-0.01)
    if gate.dim() > 1:
        gate[:, ::7] = -300.0
        gate[:, 3::11] = -1e4
        gate[:, 5::9] = 0.0
    if gate.dim() == 4:
        gate[..., ::2] = 0.0  # alpha exactly 1 on half of the channels
    return gate


SETTINGS = {
    "zero": torch.zeros_like,
    "forgets": lambda g: torch.full_like(g, -30.0),
    "far-below": lambda g: torch.full_like(g, -1e6),
    "minus-infinity": lambda g: torch.full_like(g, -float("inf")),
    "mixed": mixed,
}


@pytest.mark.parametrize("S", [20, 70])
@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize(("operator", "gate"), CASES, ids=IDS)
def test_extreme_gates_agree_in_float32_and_have_finite_gradients(
    operator, gate, setting, S, random_inputs, evaluate, assert_same
):
    arguments = random_inputs(operator, 1, S, 2, 16, 12, gate=gate, dtype=torch.float32)
    arguments["log_decay"] = SETTINGS[setting](arguments["log_decay"])
    actual = evaluate(OPERATORS[operator], arguments, backend="chunked")
    assert all(bool(t.isfinite().all()) for t in actual.values())
    wide = {n: t.double() for n, t in arguments.items()}
    expected = evaluate(OPERATORS[operator], wide, backend="reference")
    if setting not in (
        "zero",
        "mixed",
    ):  # what e^-30 leaves of these gradients is below float32's reach beside the rest
        for name in ("d_log_decay", "d_initial_state"):
            assert actual.pop(name).abs().max() < 1e-9
            assert expected.pop(name).abs().max() < 1e-9
    assert_same(actual, expected, torch.float32)


@pytest.mark.parametrize("gate", ["head", "token", "channel"])
def test_no_decay_is_plain_linear_attention(gate, random_inputs):
    arguments = random_inputs("decay_attention", 2, 70, 2, 16, 12, gate=gate)
    arguments["log_decay"] = torch.zeros_like(arguments["log_decay"])
    o, state = decay_attention(**arguments, output_state=True)
    plain, last = decay_attention(**(arguments | {"log_decay": None}), output_state=True)
    torch.testing.assert_close(o, plain, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(state, last, rtol=1e-12, atol=1e-12)
    q, k, v, s0 = (arguments[n].transpose(1, 2) for n in ("q", "k", "v", "initial_state"))
    quadratic = ((q @ k.mT).tril() @ v + q @ arguments["initial_state"]) / 4
    torch.testing.assert_close(o.transpose(1, 2), quadratic, rtol=1e-11, atol=1e-11)
    assert s0.shape == (2, 16, 2, 12)


@pytest.mark.parametrize("gate", ["token", "channel"])
def test_gated_delta_rule_without_decay_is_the_delta_rule(gate, random_inputs):
    arguments = random_inputs("delta_rule", 2, 70, 2, 16, 12, gate=gate)
    arguments["log_decay"] = torch.zeros_like(arguments["log_decay"])
    o, state = delta_rule(**arguments, output_state=True)
    plain, last = delta_rule(**(arguments | {"log_decay": None}), output_state=True)
    torch.testing.assert_close(o, plain, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(state, last, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("operator", ["decay_attention", "delta_rule"])
def test_the_same_gate_on_every_channel_is_the_gate_per_token(operator, random_inputs):
    arguments = random_inputs(operator, 2, 70, 2, 16, 12, gate="token")
    o, state = OPERATORS[operator](**arguments, output_state=True)
    arguments["log_decay"] = arguments["log_decay"].unsqueeze(-1).expand(-1, -1, -1, 16)
    by_channel, last = OPERATORS[operator](**arguments, output_state=True)
    torch.testing.assert_close(by_channel, o, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(last, state, rtol=1e-12, atol=1e-12)


def test_one_row_does_not_change_another_bitwise(random_inputs):
    """No branch depends on the values of the batch: extreme gates in row 0 leave row 1 as it is, to the last bit."""
    for operator, gate in CASES[2:]:
        arguments = random_inputs(operator, 2, 40, 2, 16, 12, gate=gate, dtype=torch.float32)
        first, _ = OPERATORS[operator](**arguments)
        arguments["log_decay"] = arguments["log_decay"].clone()
        arguments["log_decay"][0] = -500.0
        second, _ = OPERATORS[operator](**arguments)
        assert torch.equal(first[1], second[1])
