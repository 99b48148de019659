"""Every mixer on the Triton back end, in Triton's interpreter, which runs once, in a process of its own (interpreted_mixers.py)."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("interpreted_mixers.py")
MIXERS = ("hgrn", "retnet", "gla", "hgrn2", "deltanet", "gated_deltanet")
TOLERANCE = 1e-5  # relative RMS, fp32


@pytest.fixture(scope="module")
def results():
    pytest.importorskip("triton", reason="Triton is not installed, so there is no interpreter to run the kernels in")
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


def numbers(results, name: str) -> dict[str, float]:
    """What a check found; it raised nothing, and every operator it called ran in Triton."""
    found = results[name]
    assert isinstance(found, dict), found
    assert found.pop("operators") == ["triton"]
    assert found
    return found


@pytest.mark.parametrize("length", [1, 3, 20])
@pytest.mark.parametrize("mixer", MIXERS)
def test_a_layer_is_its_recurrence(mixer, length, results):
    assert max(numbers(results, f"recurrence-{mixer}-{length}").values()) < TOLERANCE


def test_value_heads_share_a_key_head(results):
    assert max(numbers(results, "recurrence-gated_deltanet-grouped-negative-20").values()) < TOLERANCE


@pytest.mark.parametrize("kind", ["segments", "tokens"])
@pytest.mark.parametrize("mixer", MIXERS)
def test_a_state_is_carried_on(mixer, kind, results):
    assert max(numbers(results, f"{kind}-{mixer}").values()) < TOLERANCE


@pytest.mark.parametrize("kind", ["packed", "padded"])
@pytest.mark.parametrize("mixer", MIXERS)
def test_sequences_side_by_side_are_as_if_alone(mixer, kind, results):
    found = numbers(results, f"{kind}-{mixer}")
    assert found.pop("leaked") == 0
    assert max(found.values()) < TOLERANCE


@pytest.mark.parametrize("mixer", ["hgrn", "retnet", "gla", "hgrn2", "gated_deltanet"])
def test_gates_at_their_ends_are_right_and_finite(mixer, results):
    assert max(numbers(results, f"extreme-{mixer}").values()) < TOLERANCE


def test_deltanet_is_a_table(results):
    found = numbers(results, "stores")
    assert found.pop("untouched") == 0
    assert max(found.values()) < TOLERANCE  # 1e-6 stands inside the L2 norm


@pytest.mark.parametrize("case", ["additive", "undecayed", "unbounded"])
def test_mixers_that_are_one_another(case, results):
    assert max(numbers(results, case).values()) < TOLERANCE


@pytest.mark.parametrize("mixer", MIXERS)
def test_uninitialised_memory_never_shows(mixer, results):
    assert numbers(results, f"poisoned-{mixer}") == {"same": 1.0}
