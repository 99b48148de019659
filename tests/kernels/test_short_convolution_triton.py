"""The Triton short convolution, run by Triton's interpreter on the CPU, and the entry for q, k and v.

The interpreter runs once, in a process of its own (see test_gated_scan_triton.py).
"""

# Operators are called with ** dictionaries of tensors, which a type checker cannot match with their parameters.
# pyright: reportArgumentType=false, reportCallIssue=false

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from latentcot.kernels import Bidirectional, short_convolution
from latentcot.kernels.convolution import short_convolution_qkv

SCRIPT = Path(__file__).with_name("interpreted_convolution.py")
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
    f"{dtype}-{case}"
    for dtype in TOLERANCE
    for case in (
        "S1-D16-W4-causal-silu", "S2-D20-W4-causal-silu", "S9-D131-W4-causal-linear", "S37-D20-W3-causal-silu",
        "S9-D20-W8-causal-silu", "S9-D20-W2-both-silu", "S3-D20-W4-both-linear", "S37-D20-W4-both-silu",
        "causal-packed", "both-packed", "causal-padded", "both-padded", "causal-empty", "both-empty", "qkv-causal",
    )
] + ["fp32-pieces-causal", "fp32-pieces-both", "fp32-no_state", "fp32-qkv-both", "fp32-qkv-packed"]  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_kernel_is_the_definition(name, results):
    found = results[name]
    assert isinstance(found, dict), found
    assert {"y", "dx", "dweight"} <= set(found)
    assert ("state" in found) == ("both" not in name)
    assert ("dstate" in found) == ("both" not in name and "no_state" not in name)
    for quantity, error in found.items():
        bound = TOLERANCE["fp32" if quantity in ("state", "dstate") else name.split("-")[0]]
        assert error < bound, f"{quantity}: relative RMS {error:.2e}"


def test_K_1_chunks_shorter_than_the_window(results):
    difference, same_state = results["chunks"]
    assert difference < 1e-6
    assert same_state


def test_every_output_is_written(results):
    assert results["poisoned"] == [0] * 10


def test_registration_and_compilation(results):
    assert results["registered"] is True, results["registered"]


def test_what_the_kernels_do_not_serve(results):
    wide, precise, unknown = results["refused"]
    assert "the kernels serve 2 … 8 taps, not 9" in wide
    assert "torch.float64" in precise
    assert "backend is 'fast', expected one of" in unknown


@pytest.fixture
def parts():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 7, 12, generator=generator, dtype=torch.float64)
    weight = torch.randn(12, 4, generator=generator, dtype=torch.float64)
    return x, weight, (3, 4, 5)


@pytest.mark.parametrize("both", [False, True])
def test_qkv_is_one_convolution_of_all_three(parts, both):
    x, weight, widths = parts
    options = {"visibility": Bidirectional()} if both else {"output_state": True}
    expected, last = short_convolution(x, weight, **options)
    q, k, v, state = short_convolution_qkv(*x.split(widths, -1), *weight.split(widths), **options)
    assert torch.equal(torch.cat([q, k, v], -1), expected)
    assert (state is None) == both
    assert both or torch.equal(state, last)


def test_qkv_names_what_does_not_fit(parts):
    x, weight, widths = parts
    q, k, v = x.split(widths, -1)
    taps = weight.split(widths)
    with pytest.raises(ValueError, match=r"weight_k has shape \(3, 4\), expected \[D_k,W\] = \(4, 4\)"):
        short_convolution_qkv(q, k, v, taps[0], taps[0], taps[2])
    with pytest.raises(ValueError, match=r"v has shape \(2, 6, 5\), expected \[B,S,D_v\]"):
        short_convolution_qkv(q, k, v[:, 1:], *taps)
    with pytest.raises(TypeError, match=r"k has dtype torch\.float32 and q has torch\.float64"):
        short_convolution_qkv(q, k.float(), v, *taps)
