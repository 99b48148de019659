"""The norms: the kernels in Triton's interpreter and the PyTorch path against the formula, zero rows included.

The interpreter runs once, in a process of its own (see test_gated_scan_triton.py).
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from latentcot.kernels.normalisation import gated_rms_norm, l2_norm

SCRIPT = Path(__file__).with_name("interpreted_normalisation.py")
TOLERANCE = {"fp32": 1e-5, "fp16": 1e-3}  # sums are float32 in both; fp16 results are rounded once, to 11 bits


@pytest.fixture(scope="module")
def results():
    pytest.importorskip("triton", reason="Triton is not installed, so there is no interpreter to run the kernels in")
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


CASES = [
    f"{dtype}-{operator}-{shape}"
    for dtype in TOLERANCE
    for operator in ("l2", "rms")
    for shape in ("1x16", "3x5x60", "2x3x2x128", "2x131")
] + ["fp32-rms-wide", "fp32-rms-plain", "fp32-rms-weight", "fp32-rms-sigmoid", "fp32-rms-tiles"]


@pytest.mark.parametrize("name", CASES)
def test_kernel_is_the_formula(name, results):
    found = results[name]
    assert isinstance(found, dict), found
    wanted = {"y", "dx"}
    if "rms" in name and "plain" not in name:
        wanted |= {"dweight"} if "weight" in name else {"dweight", "dgate"}
    assert set(found) == wanted
    for quantity, error in found.items():
        assert error < TOLERANCE[name.split("-")[0]], f"{quantity}: relative RMS {error:.2e}"


def test_any_strides(results):
    assert isinstance(results["strided"], list), results["strided"]
    assert max(results["strided"]) < 1e-5


def test_K_3_zero_rows(results):
    found = results["zero_rows"]
    assert isinstance(found, dict), found
    assert found["y"][0] == [0.0, 0.0]
    assert found["dk"][0] == pytest.approx([1000.0, 1000.0], rel=1e-6)
    # of 0.2 * (1 - 0.84) and 0.2 * (1 - 1.12): differences that cost float32 a digit
    assert found["dk"][1] == pytest.approx([0.0320000061, -0.0239999906], abs=1e-7)
    assert found["z"] == [[0.0] * 4] * 2
    assert found["dx"] == [pytest.approx([1000.0] * 4, rel=1e-6)] * 2


def test_squares_are_taken_in_float32(results):
    assert results["large_halves"] is True


def test_every_output_is_written(results):
    assert results["poisoned"] == [0] * 6


def test_registration_and_compilation(results):
    assert results["registered"] is True, results["registered"]


@pytest.fixture
def data():
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((3, 4, 6), (6,), (3, 4, 6))]


def test_gated_rms_norm_is_the_norm_then_the_gate(data):
    x, weight, gate = data
    expected = F.rms_norm(x, (6,), weight, 1e-6)
    torch.testing.assert_close(gated_rms_norm(x, weight), expected, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(gated_rms_norm(x, weight, gate), expected * F.silu(gate), rtol=1e-13, atol=1e-13)
    gated = gated_rms_norm(x, weight, gate, activation="sigmoid")
    torch.testing.assert_close(gated, expected * gate.sigmoid(), rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(gated_rms_norm(x, None), F.rms_norm(x, (6,), None, 1e-6), rtol=1e-13, atol=1e-13)


def test_gated_rms_norm_has_derivatives(data):
    leaves = [t.requires_grad_() for t in data]
    assert torch.autograd.gradcheck(lambda *tensors: gated_rms_norm(*tensors, eps=1e-3), leaves)


def test_gated_rms_norm_rounds_once(data):
    x, weight, gate = (t.bfloat16() for t in data)
    expected = gated_rms_norm(x.float(), weight.float(), gate.float()).bfloat16()
    assert torch.equal(gated_rms_norm(x, weight, gate), expected)


def test_bad_arguments(data):
    x, weight, gate = data
    with pytest.raises(ValueError, match=r"weight has shape \(5,\), expected \[D\] = \(6,\)"):
        gated_rms_norm(x, weight[:5])
    with pytest.raises(ValueError, match=r"gate has shape \(3, 3, 6\), expected the shape of x = \(3, 4, 6\)"):
        gated_rms_norm(x, weight, gate[:, 1:])
    with pytest.raises(ValueError, match="expected > 0"):
        gated_rms_norm(x, weight, eps=0.0)
    with pytest.raises(ValueError, match="activation is 'relu'"):
        gated_rms_norm(x, weight, gate, activation="relu")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="backend is 'fast'"):
        l2_norm(x, backend="fast")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="l2_norm: backend='triton' cannot run"):
        l2_norm(x, backend="triton")
