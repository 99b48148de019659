"""The Triton decay attention and HGRN2's mixer, run by Triton's interpreter on the CPU, against the definition.

The checks live in interpreted_decay_attention.py and run once, in a process of their own: the interpreter is switched
on by a variable that Triton reads when it is imported, and must not leak into the other tests.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed, so there is no interpreter to run the kernels in")

SCRIPT = Path(__file__).with_name("interpreted_decay_attention.py")
TOLERANCE = {"fp32": (1e-5, 1e-4), "fp16": (1e-3, 2e-2)}  # relative RMS: everything but the gates, the gates
GATES = ("none", "head", "token", "channel")
OF_GATES = ("d_log_decay", "d_f", "d_lower_bound")
BARE = {"o", "d_q", "d_k", "d_v"}
ALL = BARE | {"state", "d_initial_state"}
CASES = {"S1": ALL, "S5": BARE | {"state"}, "S16": BARE | {"state"}, "S37": ALL, "S300-windows": BARE | {"state"}}
VISIBILITIES = ("causal", "own", "next", "block-softmax", "block-bilinear", "block-decayed", "block-additive")


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


def with_gate(quantities, gate):
    return set(quantities) | (set() if gate == "none" else {"d_log_decay"})


def assert_close(found, quantities, dtype="fp32"):
    assert set(found) == set(quantities)
    others, gates = TOLERANCE[dtype]
    for quantity, error in found.items():
        bound = gates if quantity.split()[0] in OF_GATES else others
        assert error < bound, f"{quantity}: relative RMS {error:.2e}"


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("case", CASES)
def test_kernels_are_the_definition(case, gate, dtype, results):
    assert_close(found_in(results, f"compare-{dtype}-{gate}-{case}"), with_gate(CASES[case], gate), dtype)


def test_every_case_ran(results):
    assert {f"compare-{dtype}-{gate}-{case}" for dtype in TOLERANCE for gate in GATES for case in CASES} == {
        name for name in results if name.startswith("compare")
    }


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("gate", GATES)
def test_right_to_left_is_the_definition_flipped(gate, dtype, results):
    assert_close(found_in(results, f"reverse-{dtype}-{gate}"), with_gate(BARE, gate), dtype)


@pytest.mark.parametrize("gate", [g for g in GATES if g != "channel"])
def test_right_to_left_from_a_state(gate, results):
    found = found_in(results, f"reverse_state-{gate}")
    assert_close(found, with_gate(BARE | {"d_initial_state"}, gate))


def test_right_to_left_per_channel_refuses_a_state(results):
    assert "ValueError: decay_attention: right to left with one decay per channel" in results["reverse_state-channel"]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("gate", GATES)
def test_packed_sequences_are_the_loop_over_them(gate, dtype, results):
    assert_close(found_in(results, f"packed-{dtype}-{gate}"), with_gate(ALL, gate), dtype)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("gate", GATES[1:])
def test_strong_gates(gate, dtype, results):
    """Gates down to -60: far beyond what scaling a chunk from its middle can hold.

    Constants of -14 and -35 leave 1e-6 and less of the initial state, where float16 has no digits: its gradient is
    compared in float32 alone.
    """
    found, expected = found_in(results, f"strong-{dtype}-{gate}"), with_gate(ALL, gate)
    if (gate, dtype) == ("head", "fp16"):
        assert found.pop("d_initial_state") < 1
        expected.remove("d_initial_state")
    assert_close(found, expected, dtype)


@pytest.mark.parametrize("gate", ["token", "channel"])
def test_full_resets(gate, results):
    """A gate of -inf: no NaN from the difference of two infinities."""
    assert_close(found_in(results, f"infinite-{gate}"), with_gate(ALL, gate))


@pytest.mark.parametrize("gate", ["token", "channel"])
def test_growth_shows_as_nan(gate, results):
    """Everything from the token on is NaN, in its own row and nowhere else."""
    assert results[f"growth-{gate}"] == [1, 1, 0, 1, 0]


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("visibility", VISIBILITIES)
def test_operator_on_triton_is_the_reference(visibility, gate, results):
    """Rows of a batch and a packed row."""
    quantities = with_gate(BARE if visibility in ("own", "next") else ALL, gate)
    both = quantities | {f"{quantity} packed" for quantity in quantities}
    assert_close(found_in(results, f"operator-{gate}-{visibility}"), both)


@pytest.mark.parametrize(
    ("name", "gate"),
    [*(("poisoned", gate) for gate in GATES), ("poisoned_reverse", "token"), ("poisoned_reverse", "channel")],
)
def test_every_output_is_written(name, gate, results):
    """Output buffers are filled with NaN beforehand; none may survive."""
    written = with_gate(ALL, gate)
    if (name, gate) == ("poisoned_reverse", "channel"):  # takes no state
        written = written - {"d_initial_state"}
    assert found_in(results, f"{name}-{gate}") == dict.fromkeys(written, 0)


@pytest.mark.parametrize("gate", ["token", "channel"])
def test_any_strides(gate, results):
    assert_close(found_in(results, f"strided-{gate}"), with_gate(BARE, gate))


@pytest.mark.parametrize("gate", GATES)
def test_gradients_of_one_result_add_up(gate, results):
    found = found_in(results, f"some_gradients-{gate}")
    assert_close(found, with_gate(ALL - {"o", "state"}, gate))


@pytest.mark.parametrize("gate", GATES)
def test_runs_repeat_to_the_bit(gate, results):
    assert found_in(results, f"repeated_runs-{gate}") == dict.fromkeys(with_gate(ALL | {"plain"}, gate), True)


@pytest.mark.parametrize("gate", ["token", "channel"])
def test_one_graph_under_the_compiler(gate, results):
    assert found_in(results, f"compiled-{gate}") == dict.fromkeys(with_gate(ALL, gate), True)


@pytest.mark.parametrize("gate", ["token", "channel", "bound"])
def test_registration(gate, results):
    found = found_in(results, f"registered-{gate}")
    assert len(found) == 7
    assert set(found.values()) == {"SUCCESS"}, found


def test_second_derivatives_raise(results):
    assert "first derivatives only" in results["second_derivative"]


def test_widths_that_do_not_fit_are_named(results):
    names = ["decay_attention", "hgrn2_attention"] * 2
    widths = ["K = 257 and v has V = 16"] * 2 + ["K = 16 and v has V = 513"] * 2
    for message, name, width in zip(results["too_wide"], names, widths, strict=True):
        assert message.startswith(f"{name}: q, k have {width}; the Triton kernels take K <= 256 and V <= 512")


FUSED = ("S1", "S37", "S37-unbounded", "S37-unbounded-wide", "S37-zero", "S20-high", "S140-windows")
FUSED_ALL = {"o", "state", "d_q", "d_f", "d_i", "d_lower_bound", "d_initial_state"}


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("case", [*(f"fused-{{}}-{case}" for case in FUSED), "fused_packed-{}"])
def test_fused_mixer_is_the_composition(case, dtype, results):
    """Activations and gates inside the kernels, against silu, sigmoid and decay attention in float64.

    A bound of exactly zero weighs its tokens by exp(-f): the gradient has few digits there, and is not compared.
    """
    found = found_in(results, case.format(dtype))
    if "zero" in case:
        found = {name: error for name, error in found.items() if name != "d_lower_bound"}
    missing = {"d_lower_bound"} if "unbounded" in case or "zero" in case else set()
    assert_close(found, FUSED_ALL - missing, dtype)


def test_fused_mixer_writes_every_output(results):
    assert found_in(results, "fused_poisoned") == dict.fromkeys(FUSED_ALL, 0)


def test_fused_mixer_is_one_graph_under_the_compiler(results):
    assert found_in(results, "fused_compiled") == dict.fromkeys(FUSED_ALL, True)
