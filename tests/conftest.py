"""Order of the test files: the longest first.

With ``--dist loadfile`` a worker takes a whole file, the next one in the order of collection (``--no-loadscope-reorder``). A long file
that starts last runs alone, with the other core idle; by default the files with the most tests start first, and the longest have few.
"""

from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
# More than about 40 s on one of two busy cores, longest first. A wrong place costs a little waiting, nothing else.
LONGEST = (
    "notebooks/test_notebooks.py",
    "compare/test_compare.py",
    "kernels/test_decay_attention_triton.py",
    "site/test_browser.py",
    "kernels/test_delta_rule_triton.py",
    "backbone/test_mixers_triton.py",
    "tasks/test_contract.py",
    "kernels/test_gated_scan_triton.py",
    "kernels/test_decode.py",
    "training/test_two_processes.py",
    "site/test_site.py",
    "backbone/test_speculative.py",
    "package/test_layout.py",
    "kernels/test_short_convolution_triton.py",
    "tasks/test_sudoku.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    place = {HERE / name: number for number, name in enumerate(LONGEST)}
    if missing := [str(path) for path in place if not path.is_file()]:
        raise pytest.UsageError(f"tests/conftest.py names test files that are not there: {', '.join(missing)}")
    items.sort(key=lambda item: place.get(item.path, len(place)))  # stable: all others keep their order
