"""The decode kernels in Triton's interpreter, which runs once, in a process of its own (see test_gated_scan_triton.py)."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("interpreted_decode.py")
TOLERANCE = {"fp32": 1e-5, "fp16": 1e-3}  # states are float32 in both; fp16 outputs are rounded once, to 11 bits


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


@pytest.mark.parametrize(
    "name",
    [
        *(f"decode-{dtype}-{case}" for dtype in TOLERANCE for case in ("square", "odd", "grouped", "no_window")),
        "decode-fp32-doubled",
        "decode-fp32-poisoned",
    ],
)
def test_a_token_of_gated_deltanet_is_the_definition(name, results):
    found, dtype = results[name], name.split("-")[1]
    assert isinstance(found, dict), found
    assert found["o"] < TOLERANCE[dtype]
    assert found["state"] < TOLERANCE["fp32"]
    assert found["ring"] == 0  # raw inputs, not a number changed


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_the_gate_of_the_mlp(dtype, results):
    found = results[f"swiglu-{dtype}"]
    assert isinstance(found, dict), found
    assert found["y"] < TOLERANCE[dtype]


def test_layouts_that_are_not_read_are_named(results):
    found = results["refused"]
    assert isinstance(found, list), found
    names = ["state", "state", "ring", "ring", "projected", "projected", "swiglu"]
    assert len(found) == len(names)
    for name, message in zip(names, found, strict=True):
        assert name in message
        assert "given" in message


PRODUCTS = ["none", "rms", "heads", "one_head", "swiglu", "rms-bare", "heads-bare", "swiglu-bare", "large"]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("case", PRODUCTS)
def test_a_product_with_what_stands_around_it(case, dtype, results):
    found = results[f"product-{dtype}-{case}"]
    assert isinstance(found, dict), found
    assert found["y"] < TOLERANCE[dtype]


def test_what_a_product_takes(results):
    *takes, wide, block, warps = results["product-limits"]
    assert takes == [True, False, False, False]
    assert (wide, block, warps) == (4096, 2, 8)


def test_products_that_do_not_fit_are_named(results):
    found = results["products_refused"]
    assert isinstance(found, list), found
    names = ["before", "head", "head", "head", "rows", "x has", "weight", "norm", "residual", "x has"]
    assert len(found) == len(names)
    for name, message in zip(names, found, strict=True):
        assert name in message
        assert "expected" in message


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("case", ["half", "interleaved", "none"])
def test_queries_are_turned_and_keys_and_values_stored(case, dtype, results):
    found = results[f"store-{dtype}-{case}"]
    assert isinstance(found, dict), found
    assert max(found["q"], found["k"]) < TOLERANCE[dtype]
    assert found["v"] == 0  # copied, not a number changed


def test_stores_that_do_not_fit_are_named(results):
    found = results["stores_refused"]
    assert isinstance(found, list), found
    names = ["values", "projected", "dtype", "angles", "angles"]
    assert len(found) == len(names)
    for name, message in zip(names, found, strict=True):
        assert name in message
        assert "expected" in message


@pytest.mark.parametrize("stack", ["pre", "hybrid", "post"])
def test_a_whole_engine_on_these_kernels_is_the_model(stack, results):
    found = results[f"engine-{stack}"]
    assert isinstance(found, dict), found
    assert "one Triton launch" in found["paths"][0]
    assert found["logits"] < 2e-5
