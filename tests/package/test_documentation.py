"""The README does what it says, and every command has a help text and is mentioned."""

import re
from pathlib import Path

import pytest
import typer

from latentcot.cli import app

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


BACKBONE_PAGE = (ROOT / "docs" / "hybrid-backbone.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "code", re.findall(r"```python\n(.*?)```", README + BACKBONE_PAGE, re.DOTALL), ids=lambda c: c.splitlines()[-1][:40]
)
def test_examples_of_the_readme_and_the_backbone_page_run(code, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "README.md", "exec"), {})


def test_links_of_the_readme_lead_somewhere():
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target


def commands() -> list[tuple[str, str]]:
    found, open_groups = [], [("latentcot", typer.main.get_command(app))]
    while open_groups:
        name, group = open_groups.pop()
        for child, command in getattr(group, "commands", {}).items():
            full = f"{name} {child}"
            if hasattr(command, "commands"):
                open_groups.append((full, command))
            else:
                found.append((full, command.help or ""))
    return found


@pytest.mark.parametrize(("name", "text"), commands(), ids=[name for name, _ in commands()])
def test_every_command_has_help_and_is_mentioned(name, text):
    assert text.strip(), f"{name} has no help text"
    pages = [
        README,
        *(
            (ROOT / p).read_text(encoding="utf-8")
            for p in ("docs/getting-started.md", "catalog/README.md", "CONTRIBUTING.md")
        ),
    ]
    assert any(name in page for page in pages), f"{name} is mentioned nowhere"


def test_make_targets_named_in_the_readme_exist():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert {"quickstart", "test", "lab", "site", "lint", "gpu-test"} <= targets
    assert set(re.findall(r"make ([a-z-]+)", README)) <= targets


def test_ci_calls_make_test_and_nothing_else():
    lines = (ROOT / ".ci" / "run").read_text().splitlines()
    work = [line for line in lines if line.strip() and not line.startswith(("#", "set ", "cd "))]
    assert work == ["make test"]
