"""The Triton delta rule, run by Triton's interpreter on the CPU, against the definition.

The checks live in interpreted_delta_rule.py and run once, in a process of their own: the interpreter is switched on by
a variable that Triton reads when it is imported, and must not leak into the other tests.
"""

# Operators are called with ** dictionaries of tensors, which a type checker cannot match with their parameters.
# pyright: reportArgumentType=false, reportCallIssue=false
# pyright: reportOptionalMemberAccess=false, reportOptionalSubscript=false

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from latentcot.kernels.delta_rule.fused import gated_delta_net

pytest.importorskip("triton", reason="Triton is not installed, so there is no interpreter to run the kernels in")

SCRIPT = Path(__file__).with_name("interpreted_delta_rule.py")
TOLERANCE = {"fp32": (1e-5, 1e-4), "fp16": (3e-3, 2e-2)}  # relative RMS: everything but the gates, the gates
ALL = {"o", "state", "d_q", "d_k", "d_v", "d_beta"}
CASES = {
    "S1", "S5", "S15", "S16", "S17", "S39", "S39-C32", "S71-C32", "S135-C64", "S135-C64-block", "S600-windows",
    "S600-mixed-windows", "S1-channel", "S17-channel", "S39-channel", "S70-channel-C32", "S300-channel-windows",
}  # fmt: skip


@pytest.fixture(scope="module")
def results():
    done = subprocess.run(
        [sys.executable, str(SCRIPT)],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def found_in(results, name):
    found = results[name]
    assert isinstance(found, dict), found
    return found


def assert_close(found, dtype="fp32"):
    assert set(found) >= ALL
    others, gates = TOLERANCE[dtype]
    for quantity, error in found.items():
        assert error < (gates if quantity == "d_log_decay" else others), f"{quantity}: relative RMS {error:.2e}"


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("case", sorted(CASES))
def test_kernels_are_the_definition(case, dtype, results):
    assert_close(found_in(results, f"compare-{dtype}-{case}"), dtype)


def test_every_case_ran(results):
    assert {f"compare-{dtype}-{case}" for case in CASES for dtype in TOLERANCE} == {
        name for name in results if name.startswith("compare")
    }


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_packed_sequences_are_the_loop_over_them(dtype, results):
    assert_close(found_in(results, f"packed-{dtype}"), dtype)
    if dtype == "fp32":
        assert_close(found_in(results, f"packed-{dtype}-channel"), dtype)


@pytest.mark.parametrize("gate", ["token", "channel"])
@pytest.mark.parametrize("kind", ["zero", "resets", "large", "infinite"])
def test_extreme_gates(kind, gate, results):
    found = found_in(results, f"gates-{kind}-{gate}")
    assert "d_log_decay" in found
    assert_close(found)


@pytest.mark.parametrize("gate", ["token", "channel"])
@pytest.mark.parametrize("rate", [8, 30])
def test_everything_forgotten(rate, gate, results):
    """Gradients of gates of 1e-13, too, have their digits."""
    assert_close(found_in(results, f"forgotten-{rate}-{gate}"))


@pytest.mark.parametrize("gate", ["token", "channel"])
@pytest.mark.parametrize("value", ["0.1", "nan"])
def test_what_is_no_log_decay_shows(value, gate, results):
    """Everything from the token on is NaN, in its own row and nowhere else."""
    assert results[f"no_decay-{value}-{gate}"] == [1, 1, 0, 1, 0]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("kind", ["zero", "tiny"])
def test_extreme_strengths(kind, dtype, results):
    assert_close(found_in(results, f"strengths-{dtype}-{kind}"), dtype)


@pytest.mark.parametrize("gate", ["none", "channel"])
def test_one_key_repeated_with_beta_near_two(gate, results):
    """70 reflections of one direction never forget a rounding, whichever way the chunk is solved. Powers of A, which
    grow like binomial coefficients, would be wrong by many orders.
    """
    error, by_substitution = results[f"repeated-fp32-{gate}"]
    assert error < 4 * by_substitution < 1.2e-4
    error, _ = results[f"repeated-fp16-{gate}"]
    assert error < 0.1  # about 2^-11, the rounding of fp16, times 70


@pytest.mark.parametrize("gate", ["token", "channel"])
def test_segments_are_the_single_pass(gate, results):
    assert_close(found_in(results, f"split-{gate}"))


@pytest.mark.parametrize("gate", ["token", "channel"])
def test_any_strides(gate, results):
    found = found_in(results, f"strided-{gate}")
    assert set(found) == {"o", "d_q", "d_k", "d_v", "d_beta", "d_log_decay"}
    assert all(error < 1e-5 for error in found.values()), found


@pytest.mark.parametrize("gate", ["none", "token", "channel"])
def test_every_output_is_written(gate, results):
    """Output buffers are filled with NaN beforehand; none may survive."""
    gates = {"d_log_decay"} if gate != "none" else set()
    assert found_in(results, f"poisoned-{gate}") == dict.fromkeys(ALL | gates | {"d_initial_state"}, 0)


@pytest.mark.parametrize("gate", ["token", "channel"])
def test_keeping_nothing_for_a_backward_changes_nothing(gate, results):
    assert results[f"without_gradients-{gate}"] == [True, True, False]


def test_gradients_of_one_result_or_one_input(results):
    found = found_in(results, "some_gradients")
    assert len(found) == 7
    assert all(error < 1e-5 for error in found.values()), found


def test_mixed_dtypes(results):
    """Results are exact in 32 bits; a gradient is rounded once, to its input's dtype."""
    found = found_in(results, "mixed_dtypes")
    bounds = {"d_q": 1e-3, "d_k": 4e-3, "d_beta": 4e-3, "d_log_decay": 1e-3}
    for quantity, error in found.items():
        assert error < bounds.get(quantity, 1e-5), f"{quantity}: relative RMS {error:.2e}"


@pytest.mark.parametrize("far", ["chunks", "tokens"])
def test_K_2_rows_beyond_two_to_the_31(far, results):
    assert results[f"beyond_32_bits-{far}"] == [True, True]


@pytest.mark.parametrize("gate", ["token", "channel"])
def test_one_graph_under_the_compiler(gate, results):
    found = found_in(results, f"compiled-{gate}")
    assert set(found) == ALL | {"d_log_decay", "d_initial_state"}
    assert all(found.values()), found


def test_registration(results):
    found = found_in(results, "registered")
    assert len(found) == 7
    assert set(found.values()) == {"SUCCESS"}, found


def test_second_derivatives_raise(results):
    assert "no autograd formula was registered" in results["second_derivative"]


FUSED = ("S5", "S39", "S71", "S135", "S300")
FUSED_GATES = ("d_a", "d_A_log", "d_dt_bias")


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("case", [*(f"fused-{{}}-{case}" for case in FUSED), "fused_packed-{}", "fused_lengths-{}"])
def test_fused_mixer_is_the_composition(case, dtype, results):
    """Norms and gates inside the kernels, against l2_norm and delta_rule in float64."""
    found = found_in(results, case.format(dtype))
    assert len(found) == 10
    others, gates = TOLERANCE[dtype]
    for quantity, error in found.items():
        assert error < (gates if quantity in FUSED_GATES else others), f"{quantity}: relative RMS {error:.2e}"


def test_fused_mixer_writes_every_output(results):
    found = found_in(results, "fused_poisoned")
    assert len(found) == 10
    assert not any(found.values()), found


def test_fused_mixer_is_one_graph_under_the_compiler(results):
    found = found_in(results, "fused_compiled")
    assert len(found) == 10
    assert all(found.values()), found


def test_registration_of_the_fused_mixer(results):
    found = found_in(results, "fused_registered")
    assert len(found) == 7
    assert set(found.values()) == {"SUCCESS"}, found


def mixer_inputs(S=21, K=8, V=12, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    H, Hv = 2, 4
    shapes = {"q": (2, S, H, K), "k": (2, S, H, K), "v": (2, S, Hv, V), "a": (2, S, Hv), "b": (2, S, Hv)}
    shapes |= {"A_log": (Hv,), "dt_bias": (Hv,)}
    return {n: torch.randn(shape, generator=generator, dtype=dtype).requires_grad_() for n, shape in shapes.items()}


@pytest.mark.parametrize("doubled", [False, True])
def test_mixer_on_the_cpu_is_the_definition(doubled):
    """Written out token by token, without the operators that it composes."""
    inputs = mixer_inputs()
    q, k, v, a, b, A_log, dt_bias = inputs.values()
    o, state = gated_delta_net(*inputs.values(), allow_neg_eigval=doubled, output_state=True)
    memory, expected = torch.zeros(2, 4, 8, 12, dtype=torch.float64), []
    for t in range(q.shape[1]):
        query, key = ((x[:, t] / (x[:, t].square().sum(-1, keepdim=True) + 1e-6).sqrt()) for x in (q, k))
        query, key = query.repeat_interleave(2, 1), key.repeat_interleave(2, 1)
        beta = (1 + doubled) / (1 + torch.exp(-b[:, t]))
        decay = torch.exp(-A_log.exp() * torch.log1p(torch.exp(a[:, t] + dt_bias)))
        memory = decay[..., None, None] * memory
        write = beta[..., None] * (v[:, t] - torch.einsum("bhk,bhkv->bhv", key, memory))
        memory = memory + key[..., None] * write[..., None, :]
        expected.append(8**-0.5 * torch.einsum("bhk,bhkv->bhv", query, memory))
    expected = torch.stack(expected, 1)
    torch.testing.assert_close(o, expected, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(state, memory, rtol=1e-10, atol=1e-12)
    actual = torch.autograd.grad(o.square().sum() + state.sum(), list(inputs.values()))
    wanted = torch.autograd.grad(expected.square().sum() + memory.sum(), list(inputs.values()))
    for found, reference in zip(actual, wanted, strict=True):
        torch.testing.assert_close(found, reference, rtol=1e-8, atol=1e-10)


def test_mixer_names_what_does_not_fit():
    inputs = {n: t.detach() for n, t in mixer_inputs().items()}
    for name, letters in (("a", r"\[B,S,H_v\]"), ("A_log", r"\[H_v\]"), ("dt_bias", r"\[H_v\]"), ("k", r"\[B,S,H,K\]")):
        with pytest.raises(ValueError, match=rf"gated_delta_net: {name} has shape .* expected {letters}"):
            gated_delta_net(**{**inputs, name: inputs[name][..., None, :]})
    with pytest.raises(TypeError, match=r"gated_delta_net: b has dtype torch\.int64"):
        gated_delta_net(**{**inputs, "b": inputs["b"].long()})
