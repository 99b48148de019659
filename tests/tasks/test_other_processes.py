"""Data do not depend on the process or the machine: those of every task, made here and in one process with another hash seed."""

import hashlib
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

from latentcot.tasks import SPLITS, Task, make_task

# First digits of SHA-256 over 32 examples of each split: data must not change unnoticed, nor from machine to machine.
FINGERPRINTS: dict[str, str] = {
    "addition": "300e99aa8f",
    "addition-3-reverse-carries": "3287f78e35",
    "copy": "a2af3c0b23",
    "copy-bits": "51b6f42f9e",
    "group-S3": "4ba32db3ce",
    "group-S3-filled": "0b5fc187d2",
    "group-S5-tag": "170b8c8406",
    "group-A5": "06ae0f872e",
    "group-Z60-generators": "91f3acbd43",
    "group-parity": "e969e259ab",
    "chain-23": "435e157970",
    "chain-7": "3ebd4dca83",
    "mano": "232a365a7d",
    "mano-division": "09d9d145ce",
    "p_hop": "59379bd7cc",
    "prosqa": "6809236168",
    "prosqa_paper": "33cc345907",
    "prosqa_balanced": "1f95eb8870",
    "mqar": "e056645ad9",
}


def neighbour(name: str) -> ModuleType:
    """Another test file of this folder, for its settings."""
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


contract = neighbour("test_contract")


def fingerprint(task: Task) -> str:
    digest = hashlib.sha256()
    for split in SPLITS:
        for tensor in contract.flattened(task.batch(split, range(32))):
            digest.update(str(tuple(tensor.shape)).encode() + tensor.numpy().tobytes())
    return digest.hexdigest()[:10]


def data() -> dict[str, object]:
    """Fingerprints, or the data themselves where no fingerprint is kept, by task."""
    found: dict[str, object] = {
        key: fingerprint(make_task(name, **options)) for key, (name, options) in contract.VARIANTS.items()
    }
    found["mqar"] = neighbour("test_mqar").fingerprint()
    countdown = make_task("countdown")
    found["countdown"] = [
        [*e.prompt_ids, *e.answer_ids] for split in ("train", "test") for e in countdown.iterate(split, 0, 20)
    ]
    sudoku = make_task("sudoku", size=6)
    found["sudoku"] = sudoku.grids("val", [3]).inputs.tolist()  # pyright: ignore[reportAttributeAccessIssue]
    return found


def test_data_are_those_of_other_processes_and_machines():
    environment = {**os.environ, "PYTHONHASHSEED": "12345"}
    done = subprocess.run([sys.executable, __file__], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    here = data()
    assert json.loads(done.stdout) == here
    assert {key: here[key] for key in FINGERPRINTS} == FINGERPRINTS


if __name__ == "__main__":
    print(json.dumps(data()))
