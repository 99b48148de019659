"""Both directions against a quadratic oracle of their own, written pair by pair from the definition."""

# Operators are called with ** dictionaries of tensors, which a type checker cannot match with their parameters.
# pyright: reportArgumentType=false, reportCallIssue=false
# pyright: reportOptionalMemberAccess=false, reportOptionalSubscript=false

import pytest
import torch

from latentcot.kernels import (
    Bidirectional,
    BlockCausal,
    Causal,
    decay_attention,
    delta_rule,
    gated_scan,
    short_convolution,
)

GATES = ["none", "head", "token", "channel"]


def gates_by_channel(log_decay, q):
    """Any form of log-decay as ``[B,S,H,K]``."""
    B, S, H, K = q.shape
    if log_decay is None:
        return torch.zeros(B, S, H, K, dtype=q.dtype)
    if log_decay.dim() < 4:
        log_decay = log_decay.unsqueeze(-1)
    return log_decay.expand(B, S, H, K)


def pairwise_oracle(q, k, v, log_decay, scale, between):
    """``o_i = scale sum_j (q_i exp(sum of g over between(i, j))) . k_j v_j``, over all j."""
    g = gates_by_channel(log_decay, q)
    B, S, H, _ = q.shape
    o = torch.zeros(B, S, H, v.shape[-1], dtype=q.dtype)
    for i in range(S):
        for j in range(S):
            decay = torch.exp(g[:, between(i, j)].sum(1))
            o[:, i] += scale * (q[:, i] * decay * k[:, j]).sum(-1, keepdim=True) * v[:, j]
    return o


def own(i, j):  # forwards the gates after j up to i; backwards, time reversed, those from j-1 down to i
    return slice(j + 1, i + 1) if j <= i else slice(i, j)


def following(i, j):  # the same gates in both directions: exp(-|G_i - G_j|)
    return slice(min(i, j) + 1, max(i, j) + 1)


@pytest.mark.parametrize("backend", ["chunked", "reference"])
@pytest.mark.parametrize("S", [1, 2, 21, 70])
@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize(("name", "between"), [("own", own), ("next", following)], ids=["own", "next"])
def test_attention_in_both_directions(name, between, gate, S, backend, random_inputs):
    arguments = random_inputs("decay_attention", 1, S, 2, 5, 4, gate=gate)
    arguments.pop("initial_state")
    actual, state = decay_attention(**arguments, visibility=Bidirectional(gate=name), backend=backend)
    assert state is None
    expected = pairwise_oracle(**arguments, scale=5**-0.5, between=between)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


def test_the_two_gates_are_different_operators(random_inputs):
    arguments = random_inputs("decay_attention", 1, 12, 1, 5, 4, gate="token")
    arguments.pop("initial_state")
    first, _ = decay_attention(**arguments, visibility=Bidirectional())
    second, _ = decay_attention(**arguments, visibility=Bidirectional(gate="next"))
    assert (first - second).abs().max() > 0.1


def test_gate_next_is_symmetric_under_reversal(random_inputs):
    arguments = random_inputs("decay_attention", 2, 23, 2, 5, 4, gate="channel")
    arguments.pop("initial_state")
    o, _ = decay_attention(**arguments, visibility=Bidirectional(gate="next"))
    turned = {n: t.flip(1) for n, t in arguments.items()}
    turned["log_decay"] = turned["log_decay"].roll(1, dims=1)  # the gate between two neighbours stays between them
    mirrored, _ = decay_attention(**turned, visibility=Bidirectional(gate="next"))
    torch.testing.assert_close(mirrored.flip(1), o, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", ["chunked", "reference"])
@pytest.mark.parametrize("R", [None, 2])
@pytest.mark.parametrize("gate", ["none", "token", "channel"])
@pytest.mark.parametrize("weights", [None, [0.0, 1.0], [0.3, 0.5]], ids=["average", "ends", "gate"])
def test_delta_rule_in_both_directions(weights, gate, R, backend, random_inputs):
    arguments = random_inputs("delta_rule", 2, 33, 2, 8, 5, gate=gate, R=R)
    arguments.pop("initial_state")
    forward, _ = delta_rule(**arguments, backend="reference")
    turned = {n: None if t is None else t.flip(1) for n, t in arguments.items()}
    backward = delta_rule(**turned, backend="reference")[0].flip(1)
    if weights is None:
        expected = (forward + backward) / 2
        options = {"visibility": Bidirectional()}
    else:
        mix = torch.tensor(weights, dtype=torch.float64)
        expected = mix[:, None] * forward + (1 - mix[:, None]) * backward
        options = {"visibility": Bidirectional(combine="gate"), "direction_gate": mix}
    actual, state = delta_rule(**arguments, **options, backend=backend)
    assert state is None
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
    if weights is None:
        again, _ = delta_rule(**arguments, visibility=Bidirectional(combine="average"), backend=backend)
        assert torch.equal(again, actual)


def test_values_are_frozen_and_checked():
    assert Bidirectional() == Bidirectional(gate="own", combine=None)
    assert hash(Causal()) == hash(Causal())
    with pytest.raises(AttributeError):
        Bidirectional().gate = "next"  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(ValueError, match="gate is 'both'"):
        Bidirectional(gate="both")
    with pytest.raises(ValueError, match="combine is 'sum'"):
        Bidirectional(combine="sum")
    assert BlockCausal(4) == BlockCausal(length=4, inside="softmax", write="recurrent")
    for length in (0, -1, 2.0, True):
        with pytest.raises(ValueError, match="length is"):
            BlockCausal(length)
    with pytest.raises(ValueError, match="inside is 'mean'"):
        BlockCausal(4, inside="mean")
    with pytest.raises(ValueError, match="write is 'never'"):
        BlockCausal(4, write="never")
    with pytest.raises(ValueError, match="inside='decayed' with write='order_free' is not defined"):
        BlockCausal(4, inside="decayed", write="order_free")


def calls(random_inputs):
    scan = random_inputs("gated_scan", 1, 4, 1, 3, 3)
    attention = random_inputs("decay_attention", 1, 4, 1, 3, 3)
    delta = random_inputs("delta_rule", 1, 4, 1, 3, 3)
    convolution = {"x": torch.randn(1, 4, 3), "weight": torch.randn(3, 4), "initial_state": torch.randn(1, 3, 3)}
    return [(gated_scan, scan), (decay_attention, attention), (delta_rule, delta), (short_convolution, convolution)]


def test_block_causal_is_refused_where_it_is_not_defined(random_inputs):
    for function, arguments in calls(random_inputs):
        arguments.pop("initial_state")
        if function in (decay_attention, delta_rule):
            continue
        with pytest.raises(
            ValueError, match=f"{function.__name__}: BlockCausal is not defined for this operator; decay"
        ):
            function(**arguments, visibility=BlockCausal(2))


def test_states_belong_to_the_causal_direction(random_inputs):
    for function, arguments in calls(random_inputs)[1:]:
        with pytest.raises(ValueError, match="a state belongs to the causal direction"):
            function(**arguments, visibility=Bidirectional())
        arguments.pop("initial_state")
        with pytest.raises(ValueError, match="a state belongs to the causal direction"):
            function(**arguments, visibility=Bidirectional(), output_state=True)


def test_combinations_that_no_operator_defines(random_inputs):
    (_, scan), (_, attention), (_, delta), _ = calls(random_inputs)
    for arguments in (scan, attention, delta):
        arguments.pop("initial_state")
    with pytest.raises(ValueError, match="gated_scan: Bidirectional is not defined"):
        gated_scan(**scan, visibility=Bidirectional())
    with pytest.raises(ValueError, match="combine='average' is for the delta rule"):
        decay_attention(**attention, visibility=Bidirectional(combine="average"))
    with pytest.raises(ValueError, match="gate='next'\\) is not defined for the delta rule"):
        delta_rule(**delta, visibility=Bidirectional(gate="next"))
    with pytest.raises(ValueError, match="needs direction_gate of shape \\[H_v\\]"):
        delta_rule(**delta, visibility=Bidirectional(combine="gate"))
    with pytest.raises(ValueError, match="direction_gate is used with Bidirectional"):
        delta_rule(**delta, direction_gate=torch.ones(1))
    with pytest.raises(TypeError, match="not the class"):
        delta_rule(**delta, visibility=Causal)
