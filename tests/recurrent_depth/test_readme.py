"""Every Python example of the folder's README runs as written."""

import re
from pathlib import Path

import pytest

import latentcot.recurrent_depth

README = Path(latentcot.recurrent_depth.__file__).resolve().with_name("README.md")
EXAMPLES = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)


def test_readme_has_examples():
    assert len(EXAMPLES) == 3


@pytest.mark.parametrize("source", EXAMPLES, ids=["huginn", "recur", "coconut"])
def test_readme_example_runs(source: str):
    exec(compile(source, str(README), "exec"), {})
