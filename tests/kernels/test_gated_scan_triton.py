"""The Triton gated scan, run by Triton's interpreter on the CPU, against the definition.

The checks live in interpreted_gated_scan.py and run once, in a process of their own: the interpreter is switched on by
a variable that Triton reads when it is imported, and must not leak into the other tests.
"""

# Operators are called with ** dictionaries of tensors, which a type checker cannot match with their parameters.
# pyright: reportArgumentType=false, reportCallIssue=false
# pyright: reportOptionalMemberAccess=false, reportOptionalSubscript=false

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed, so there is no interpreter to run the kernels in")

SCRIPT = Path(__file__).with_name("interpreted_gated_scan.py")
TOLERANCE = {"fp32": 1e-5, "fp16": 1e-3}  # the states are float32 in both; fp16 results are rounded once, to 11 bits
COMPARISONS = [
    f"compare-{dtype}-{case}"
    for dtype in TOLERANCE
    for case in ("S1-D16-state", "S7-D60-zero", "S7-D131-state", "S33-D16-state")
]


PARTS = [f"parts-{dtype}-{case}" for dtype in TOLERANCE for case in ("S16-D20-state", "S33-D20-state", "S27-D32-zero")]
HGRN = [
    f"hgrn-{dtype}-{case}"
    for dtype in TOLERANCE
    for case in ("S1-D16-bound", "S19-D60-bound", "S19-D20-free-parts", "S33-D20-bound-parts")
]


@pytest.fixture(scope="module")
def results():
    done = subprocess.run(
        [sys.executable, str(SCRIPT)],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def errors(results, name):
    found = results[name]
    assert isinstance(found, dict), found
    return found


@pytest.mark.parametrize("name", PARTS)
def test_time_cut_into_parts(name, results):
    """Few channels: parts of the sequence run at once, each from the summaries of those before it."""
    found = dict(errors(results, name))
    assert found.pop("parts") > 1
    for quantity, error in found.items():
        bound = TOLERANCE["fp32"] if quantity in ("state", "dh0") else TOLERANCE[name.split("-")[1]]
        assert error < bound, f"{quantity}: relative RMS {error:.2e}"


@pytest.mark.parametrize("name", [*HGRN, "hgrn-saturated"])
def test_hgrn_from_its_projections(name, results):
    found = errors(results, name)
    wanted = {"o", "state", "di", "df", "dh0"} | (set() if "free" in name else {"dbound"})
    assert set(found) == wanted
    narrow = "fp16" in name
    for quantity, error in found.items():
        # sums over tokens are formed from h rounded to the dtype of the output
        bound = TOLERANCE["fp16" if narrow and quantity not in ("state", "dh0") else "fp32"]
        assert error < bound, f"{quantity}: relative RMS {error:.2e}"


def test_growth_is_not_a_number(results):
    assert results["growth"] == [True, True, True]


def test_compiles_without_a_graph_break(results):
    assert results["compiled"] == [True, True]


def test_registration(results):
    assert results["registered"] is True, results["registered"]


@pytest.mark.parametrize("name", [*COMPARISONS, "packed-fp32", "packed-fp16", "packed-parts"])
def test_kernel_is_the_definition(name, results):
    found = errors(results, name)
    dtype = "fp16" if "fp16" in name else "fp32"
    assert {"o", "state", "dx", "dg"} <= set(found)
    assert ("dh0" in found) == ("zero" not in name)
    for quantity, error in found.items():
        bound = TOLERANCE["fp32"] if quantity in ("state", "dh0") else TOLERANCE[dtype]
        assert error < bound, f"{quantity}: relative RMS {error:.2e}"


def test_any_strides(results):
    found = errors(results, "strided")
    assert set(found) == {"dx", "dg"}
    assert all(error < 1e-5 for error in found.values()), found


def test_every_output_is_written(results):
    """Output buffers are filled with NaN beforehand; none may survive."""
    assert errors(results, "poisoned") == {"o": 0, "state": 0, "dx": 0, "dg": 0, "dh0": 0}


def test_extreme_gates(results):
    found = errors(results, "extreme")
    assert all(error < 1e-5 for error in found.values()), found


def test_asking_by_name_is_needed_on_a_cpu(results):
    """Even with the interpreter on, "auto" stays with the CPU's own back end."""
    assert results["explained"] == ["triton", "compiled" if find_spec("numba") else "chunked"]


def test_K_2_offset_arithmetic(results):
    """Rows times strides around 2^31, in the kernels' own offset function, from 32-bit rows and strides."""
    rows, strides = (349_525, 349_526, 1_048_575, 1_048_576), (6144, 6144, 2048, 2048)
    assert results["row_offsets"] == [row * stride for row, stride in zip(rows, strides, strict=True)]


def test_K_2_rows_beyond_two_to_the_31(results):
    """Three rows in a sparse file, the last one beginning at element 2^31 + 2, give what three adjacent rows give."""
    assert results["beyond_32_bits"] == [True, True]
