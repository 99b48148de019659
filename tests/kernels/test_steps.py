"""One-token steps: the kernels in Triton's interpreter and the PyTorch steps against the definitions, in place or not.

The interpreter runs once, in a process of its own (see test_gated_scan_triton.py).
"""

# Operators are called with ** dictionaries of tensors, which a type checker cannot match with their parameters.
# pyright: reportArgumentType=false, reportCallIssue=false, reportOptionalMemberAccess=false

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from latentcot.kernels.decay_attention import reference as decay_reference
from latentcot.kernels.decay_attention.step import decay_attention_step
from latentcot.kernels.delta_rule import reference as delta_reference
from latentcot.kernels.delta_rule.step import delta_rule_step
from latentcot.kernels.gated_scan.step import gated_scan_step

SCRIPT = Path(__file__).with_name("interpreted_steps.py")
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


KERNELS = [
    *(
        f"decay-{dtype}-{case}"
        for dtype in TOLERANCE
        for case in ("none-16x16-state", "fixed-12x20-state", "head-16x24-state", "channel-12x20-state", "channel-16x16-zero")
    ),
    *(
        f"delta-{dtype}-{case}"
        for dtype in TOLERANCE
        for case in (
            "none-16x16-R1-state", "head-12x20-R2-state", "channel-12x20-R3-state", "head-16x16-R1-zero",
            "channel-12x16-R2-zero",
        )
    ),
    "decay-fp32-in_place", "delta-fp32-in_place", "scan-fp32-state", "scan-fp16-zero", "scan-fp16-in_place",
]  # fmt: skip


@pytest.mark.parametrize("name", KERNELS)
def test_kernel_is_the_definition(name, results):
    found = results[name]
    assert isinstance(found, dict), found
    assert found["o"] < TOLERANCE[name.split("-")[1]]
    assert found["state"] < TOLERANCE["fp32"]


def test_narrow_and_wide_tiles(results):
    found = results["many_states"]
    assert isinstance(found, dict), found
    assert found["blocks"] == [8, 32]
    assert max(found["o"], found["state"]) < 1e-5


def test_every_output_is_written(results):
    assert results["poisoned"] == [0, 0, 0, 0, 0, 0]


def test_states_that_can_not_be_overwritten(results):
    missing, narrow, turned = results["refused"]
    assert "state is None" in missing
    assert "torch.float16" in narrow
    assert "strides" in turned


def test_growth_is_not_a_number(results):
    assert results["growth"] == [False, True, False, True]


def test_registration_and_compilation(results):
    assert results["registered"] is True, results["registered"]


def draw(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("gate", ["none", "fixed", "head", "channel"])
def test_decay_attention_step(gate, in_place):
    q, k, v, state = (draw(2, 3, *n, seed=i) for i, n in enumerate(((4,), (4,), (5,), (4, 5))))
    g = {"none": None, "fixed": (3,), "head": (2, 3), "channel": (2, 3, 4)}[gate]
    g = None if g is None else -draw(*g, seed=9).abs()
    tokens = g if gate in ("none", "fixed") else g.unsqueeze(1)
    expected = decay_reference.decay_attention(q[:, None], k[:, None], v[:, None], tokens, 0.3, state)
    given = state.clone()
    o, after = decay_attention_step(q, k, v, g, 0.3, given, in_place=in_place)
    torch.testing.assert_close(o, expected[0][:, 0], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(after, expected[1], rtol=1e-12, atol=1e-12)
    assert (after is given) == in_place
    assert in_place or torch.equal(given, state)


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("R", [1, 3])
@pytest.mark.parametrize("with_state", [False, True])
@pytest.mark.parametrize("gate", ["none", "head", "channel"])
def test_delta_rule_step(gate, with_state, R, in_place):
    if in_place and not with_state:
        pytest.skip("nothing to write into")
    q, k, v, beta = draw(2, 2, 4, seed=0), draw(2, R, 2, 4, seed=1) / 2, draw(2, R, 4, 5, seed=2), draw(2, R, 4, seed=3)
    state = draw(2, 4, 4, 5, seed=4) if with_state else None
    g = {"none": None, "head": (2, 4), "channel": (2, 4, 4)}[gate]
    g = None if g is None else -draw(*g, seed=9).abs()
    tokens = [None if t is None else t.unsqueeze(1) for t in (q, k, v, beta, g)]
    expected = delta_reference.delta_rule(*tokens, 0.3, state)
    given = None if state is None else state.clone()
    o, after = delta_rule_step(q, k, v, beta, g, 0.3, given, in_place=in_place)
    torch.testing.assert_close(o, expected[0][:, 0], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(after, expected[1], rtol=1e-12, atol=1e-12)
    assert not in_place or after is given
    assert in_place or given is None or torch.equal(given, state)


def test_gated_scan_step():
    x, g, state = draw(2, 5, seed=0), -draw(2, 5, seed=1).abs(), draw(2, 5, seed=2)
    expected = g.exp() * state + x
    torch.testing.assert_close(gated_scan_step(x, g, state)[1], expected)
    o, after = gated_scan_step(x, g, state, in_place=True)
    assert after is state
    assert o.data_ptr() != state.data_ptr()  # the next step must not change an output already returned
    torch.testing.assert_close(after, expected)
    torch.testing.assert_close(o, expected)


@pytest.mark.parametrize("step", ["gated_scan_step", "decay_attention_step", "delta_rule_step"])
def test_in_place_needs_a_state(step):
    q = torch.zeros(1, 1, 4)
    arguments = {
        "gated_scan_step": (gated_scan_step, (q[0], q[0])),
        "decay_attention_step": (decay_attention_step, (q, q, q, None, 1.0)),
        "delta_rule_step": (delta_rule_step, (q, q[None], q[None], q[..., 0][None], None, 1.0)),
    }
    function, given = arguments[step]
    with pytest.raises(ValueError, match=f"{step}: in_place=True needs a state"):
        function(*given, in_place=True)
