"""The compiled CPU steps against the definitions: outputs, last state, every gradient, in every kind of call."""

# Operators are called with ** dictionaries of tensors, which a type checker cannot match with their parameters.
# pyright: reportArgumentType=false, reportCallIssue=false

import os

import pytest
import torch

pytest.importorskip("numba", reason="Numba is not installed, so there is no compiled CPU path")

from latentcot.kernels import cpu_decay_attention, cpu_delta_rule, cpu_gated_scan, cpu_threads
from latentcot.kernels.decay_attention import reference as decay_attention_reference
from latentcot.kernels.delta_rule import reference as delta_rule_reference
from latentcot.kernels.gated_scan import reference as gated_scan_reference

CASES = [
    ("gated_scan", "token"),
    *(("decay_attention", gate) for gate in ("none", "head", "token", "channel")),
    *(("delta_rule", gate) for gate in ("none", "token", "channel")),
]
IDS = [f"{o}-{g}" for o, g in CASES]
WIDTHS = {1: (96, 16), 7: (60, 21), 31: (16, 60), 32: (3, 2), 33: (17, 4), 65: (60, 16), 200: (16, 16)}  # S -> K, V


def by_steps(operator):
    """The definition with the signature that ``evaluate`` calls."""
    if operator == "gated_scan":
        return lambda x, log_decay, initial_state, output_state: gated_scan_reference.gated_scan(
            x, log_decay, initial_state
        )
    if operator == "decay_attention":
        return lambda q, k, v, log_decay, initial_state, output_state: decay_attention_reference.decay_attention(
            q, k, v, log_decay, 0.3, initial_state
        )
    return lambda q, k, v, beta, log_decay, initial_state, output_state: delta_rule_reference.delta_rule(
        q, k.unsqueeze(2), v.unsqueeze(2), beta.unsqueeze(2), log_decay, 0.3, initial_state
    )


def compiled(operator):
    if operator == "gated_scan":
        return lambda x, log_decay, initial_state, output_state: cpu_gated_scan.gated_scan(x, log_decay, initial_state)
    if operator == "decay_attention":
        return lambda q, k, v, log_decay, initial_state, output_state: cpu_decay_attention.decay_attention(
            q, k, v, log_decay, 0.3, initial_state, output_state=output_state
        )
    return lambda q, k, v, beta, log_decay, initial_state, output_state: cpu_delta_rule.delta_rule(
        q, k, v, beta, log_decay, 0.3, initial_state, output_state=output_state
    )


@pytest.mark.parametrize("with_state", [False, True], ids=["zero", "state"])
@pytest.mark.parametrize("S", sorted(WIDTHS))
@pytest.mark.parametrize(("operator", "gate"), CASES, ids=IDS)
def test_compiled_is_the_definition(operator, gate, S, with_state, random_inputs, evaluate, assert_same):
    K, V = WIDTHS[S]
    narrow = random_inputs(operator, 2, S, 2, K, V, gate=gate, dtype=torch.float32)
    wide = {name: None if t is None else t.double() for name, t in narrow.items()}
    expected = evaluate(by_steps(operator), wide, with_state=with_state)
    for arguments, dtype in ((wide, torch.float64), (narrow, torch.float32)):
        actual = evaluate(compiled(operator), arguments, with_state=with_state)
        assert actual["o"].dtype == dtype
        assert_same(actual, expected, dtype)


@pytest.mark.parametrize("setting", ["zero", "forgets", "minus-infinity", "resets"])
@pytest.mark.parametrize(("operator", "gate"), [c for c in CASES if c[1] != "none"])
def test_extreme_gates(operator, gate, setting, random_inputs, evaluate, assert_same):
    """Resets in the middle of long memory, on some channels only: nothing comes through them and nothing is a NaN."""
    narrow = random_inputs(operator, 2, 70, 2, 16, 12, gate=gate, dtype=torch.float32)
    g = narrow["log_decay"].fill_({"zero": 0.0, "forgets": -30.0}.get(setting, -0.01))
    if setting == "minus-infinity":
        g.fill_(-float("inf"))
    elif setting == "resets" and g.dim() > 1:
        g[:, ::7] = -300.0
        g[:, 3::11] = -float("inf")
        if g.dim() == 4:
            g[..., ::2] = 0.0
    actual = evaluate(compiled(operator), narrow)
    assert all(bool(t.isfinite().all()) for t in actual.values())
    if setting == "minus-infinity":  # the definition multiplies by e^-inf = 0 as well
        assert not actual["d_log_decay"].any()
        assert not actual["d_initial_state"].any()
        actual.pop("d_log_decay")
        actual.pop("d_initial_state")
    expected = evaluate(by_steps(operator), {n: t.double() for n, t in narrow.items()})
    if setting == "forgets":  # what e^-30 leaves of these gradients is below float32's reach beside the rest
        for name in ("d_log_decay", "d_initial_state"):
            assert actual.pop(name).abs().max() < 1e-9
    assert_same(actual, {n: expected[n] for n in actual}, torch.float32)


@pytest.mark.parametrize("operator", ["decay_attention", "delta_rule"])
def test_constant_gates_do_not_drift_over_a_long_memory(operator, random_inputs, evaluate, assert_same):
    """e^g = 0.99977 rounded to float32 is wrong by up to 3e-8: 1e-4 after 4000 multiplications, unless corrected."""
    narrow = random_inputs(operator, 1, 3000, 1, 2, 2, dtype=torch.float32)
    narrow["log_decay"].fill_(-2.3e-4)
    if operator == "delta_rule":
        narrow["beta"].mul_(1e-3)  # keys of two channels would erase everything within a few tokens
    actual, _ = compiled(operator)(**narrow, output_state=True)
    expected, _ = by_steps(operator)(**{n: t.double() for n, t in narrow.items()}, output_state=True)
    assert float((actual.double() - expected).norm() / expected.norm()) < 2e-6


@pytest.mark.parametrize(("operator", "gate"), CASES, ids=IDS)
def test_second_derivatives(operator, gate, random_inputs):
    arguments = random_inputs(operator, 1, 3, 1, 2, 2, gate=gate)
    tensors = {n: t.requires_grad_() for n, t in arguments.items() if t is not None}

    def call(*values):
        inputs = dict.fromkeys(arguments) | dict(zip(tensors, values, strict=True))
        if inputs["log_decay"] is not None:
            inputs["log_decay"] = -inputs["log_decay"].square()  # finite differences must not step above zero
        return compiled(operator)(**inputs, output_state=True)

    assert torch.autograd.gradgradcheck(call, tuple(tensors.values()))


@pytest.mark.parametrize("output_state", [False, True])
def test_second_derivatives_without_a_state(output_state, random_inputs):
    arguments = random_inputs("decay_attention", 1, 3, 1, 2, 2, gate="none")
    tensors = [arguments[n].requires_grad_() for n in ("q", "k", "v")]

    def call(q, k, v):
        return compiled("decay_attention")(q, k, v, None, None, output_state)[0]

    assert torch.autograd.gradgradcheck(call, tensors)


@pytest.mark.parametrize(("operator", "gate"), CASES, ids=IDS)
def test_threads_and_other_rows_change_no_bit(operator, gate, random_inputs, evaluate, monkeypatch):
    arguments = random_inputs(operator, 3, 40, 2, 16, 12, gate=gate, dtype=torch.float32)
    alone = evaluate(compiled(operator), arguments)
    monkeypatch.setattr(cpu_threads, "WORTH_A_THREAD", 1)
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    torch.set_num_threads(2)
    try:
        shared = evaluate(compiled(operator), arguments)
    finally:
        torch.set_num_threads(1)
    for name in alone:
        assert torch.equal(alone[name], shared[name]), name
    row = {n: t if t is None or t.dim() == 1 else t[1:2] for n, t in arguments.items()}
    o, state = compiled(operator)(**row, output_state=True)
    assert torch.equal(o, alone["o"][1:2])
    assert torch.equal(state, alone["state"][1:2])


@pytest.mark.parametrize(("operator", "gate"), CASES, ids=IDS)
def test_every_element_is_written(operator, gate, random_inputs, evaluate, monkeypatch):
    empty = torch.Tensor.new_empty
    arguments = random_inputs(operator, 2, 37, 2, 17, 5, gate=gate, dtype=torch.float32)
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *a, **k: empty(*a, **k).fill_(float("nan")))
    monkeypatch.setattr(torch, "empty", lambda *a, **k: torch.full(*a, float("nan"), **k))
    found = evaluate(compiled(operator), arguments)
    assert all(not bool(t.isnan().any()) for t in found.values())


@pytest.mark.parametrize(("operator", "gate"), CASES, ids=IDS)
def test_strided_inputs(operator, gate, random_inputs):
    arguments = random_inputs(operator, 2, 37, 2, 16, 5, gate=gate)
    expected, _ = compiled(operator)(**arguments, output_state=True)
    strided = {
        n: None if t is None else torch.stack([t, torch.full_like(t, float("nan"))], -1)[..., 0]
        for n, t in arguments.items()
    }
    actual, _ = compiled(operator)(**strided, output_state=True)
    assert torch.equal(actual, expected)


def test_what_is_missing_is_named(monkeypatch):
    assert cpu_threads.missing_for_compiled(torch.ones(1)) is None
    reasons = []
    torch.func.vmap(lambda t: reasons.append(cpu_threads.missing_for_compiled(t)) or t)(torch.ones(2))
    assert "torch.func" in reasons[0]
    monkeypatch.setattr(cpu_threads, "_numba_installed", lambda: False)
    assert "pip install 'latentcot[cpu]'" in str(cpu_threads.missing_for_compiled())


def test_short_sequences_are_left_to_the_products_unless_gates_are_per_channel():
    token, channel = torch.zeros(1, 20, 2), torch.zeros(1, 20, 2, 4)
    assert not cpu_threads.worth_compiling("decay_attention", 20, None)
    assert not cpu_threads.worth_compiling("delta_rule", 20, token)
    assert cpu_threads.worth_compiling("delta_rule", 20, channel)
    assert cpu_threads.worth_compiling("decay_attention", 64, token)
    assert cpu_threads.worth_compiling("gated_scan", 1, token)


def test_a_failure_in_another_thread_reaches_the_caller(monkeypatch):
    monkeypatch.setattr(cpu_threads, "WORTH_A_THREAD", 1)
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    torch.set_num_threads(2)
    done = []

    def kernel(first, last, fail):
        done.extend(range(first, last))
        if fail and last == 7:
            raise RuntimeError("piece 7")

    try:
        cpu_threads.spread(kernel, 20, 1e9, False)
        assert sorted(done) == list(range(20))
        with pytest.raises(RuntimeError, match="piece 7"):
            cpu_threads.spread(kernel, 20, 1e9, True)
    finally:
        torch.set_num_threads(1)
