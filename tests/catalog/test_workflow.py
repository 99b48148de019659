"""The scheduled workflow: what it may do, when it runs, and its scripts, which are run here against the local feed server."""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer

from latentcot.catalog.cli import papers_app
from latentcot.catalog.feed_server import Fault
from latentcot.catalog.feed_server.trial import tree

yaml = pytest.importorskip("yaml")

ROOT = Path(__file__).resolve().parents[2]
FILE = ROOT / ".github" / "workflows" / "catalog.yml"
TEXT = FILE.read_text(encoding="utf-8")
WORKFLOW: dict[Any, Any] = yaml.safe_load(TEXT)
JOB = WORKFLOW["jobs"]["update"]
STEPS: dict[str, dict[str, Any]] = {step["name"]: step for step in JOB["steps"] if "name" in step}
SCRIPTS = {name: step["run"] for name, step in STEPS.items() if "run" in step}


def test_it_may_change_contents_and_pull_requests_and_nothing_else():
    assert WORKFLOW["permissions"] == {"contents": "write", "pull-requests": "write"}
    assert "permissions" not in JOB
    assert WORKFLOW["concurrency"] == {"group": "catalog", "cancel-in-progress": False}
    assert JOB["timeout-minutes"] <= 60


def test_it_runs_after_the_announcement_at_an_odd_minute_and_by_hand():
    triggers = WORKFLOW[True]  # YAML reads the word "on" as true
    assert set(triggers) == {"schedule", "workflow_dispatch"}
    minute, hour, _, _, days = triggers["schedule"][0]["cron"].split()
    assert int(minute) % 15
    assert 4 <= int(hour) <= 8
    assert days == "1-5"
    assert triggers["workflow_dispatch"]["inputs"]["dry_run"]["default"] is True


def test_actions_are_pinned_by_commit_with_their_version_beside():
    uses = re.findall(r"uses: *(\S+)(.*)", TEXT)
    assert len(uses) == 3
    for action, comment in uses:
        assert re.fullmatch(r"actions/[a-z-]+@[0-9a-f]{40}", action), action
        assert re.search(r"# v\d+\.\d+\.\d+$", comment), action


def test_forks_read_and_change_nothing():
    assert "vars.CATALOG_LIVE != 'true'" in JOB["env"]["DRY_RUN"]
    assert STEPS["Pull request"]["if"] == "env.DRY_RUN != 'true'"


def test_scripts_take_nothing_from_expressions_and_are_sound_shell():
    for name, script in SCRIPTS.items():
        assert "${{" not in script, name
        done = subprocess.run(["bash", "-n"], input=script, capture_output=True, text=True)
        assert done.returncode == 0, (name, done.stderr)


def test_commands_and_options_exist():
    commands = typer.main.get_command(papers_app).commands  # type: ignore[attr-defined]
    found = re.findall(r"latentcot\.catalog (\w+)(.*)", "\n".join(SCRIPTS.values()))
    assert {name for name, _ in found} == {"update", "refresh", "check"}
    for script in SCRIPTS.values():
        called = re.search(r"latentcot\.catalog (\w+)", script)
        if called:
            known = {option for parameter in commands[called[1]].params for option in parameter.opts}
            assert set(re.findall(r"(?<=[\s(])--[a-z-]+", script)) - {"--quiet", "--force"} <= known, script


def run(step: str, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    values = {
        **os.environ,
        "PATH": path,
        "RUNNER_TEMP": str(folder),
        "GITHUB_OUTPUT": str(folder / "output"),
        "GITHUB_STEP_SUMMARY": str(folder / "step-summary.md"),
        "LATENTCOT_CONTACT": "https://example.org/owner/name",
        "FRESH": "false",
        **environment,
    }
    # The shell of a workflow's steps.
    command = ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", SCRIPTS[step]]
    cwd = environment.get("CWD", str(ROOT))
    return subprocess.run(command, capture_output=True, text=True, env=values, cwd=cwd)


@pytest.mark.allow_hosts(["127.0.0.1"])
def test_the_update_step_against_the_feed_server(server, folders, tmp_path):
    where = {"LATENTCOT_CATALOG": str(folders.root), "LATENTCOT_FEED": server.url, "CATALOG_GAP": "0"}
    before = tree(folders.root)
    dry = run("Update", tmp_path, DRY_RUN="true", **where)
    assert dry.returncode == 0, dry.stderr
    assert tree(folders.root) == before
    assert (tmp_path / "step-summary.md").read_text(encoding="utf-8").startswith("# Catalog update: ")
    server.clear()
    server.play(Fault("status", status=403))
    refused = run("Update", tmp_path, DRY_RUN="false", **where)
    assert refused.returncode == 0, refused.stderr  # the last step tells, after the pull request
    assert (tmp_path / "output").read_text(encoding="utf-8").splitlines()[-1] == "code=12"
    assert "https://example.org/owner/name" in server.log[-1].headers["User-Agent"]
    wrong = run("Update", tmp_path, DRY_RUN="false", **{**where, "LATENTCOT_CATALOG": str(tmp_path / "nowhere")})
    assert wrong.returncode == 2
    assert run("Say so when the run was not complete", tmp_path, CODE="11").returncode == 1


def git(folder: Path, *arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, check=True).stdout


def test_the_pull_request_step_pushes_one_branch_and_never_the_default_one(tmp_path):
    origin, work, programs = tmp_path / "origin.git", tmp_path / "work", tmp_path / "bin"
    git(tmp_path, "init", "--quiet", "--bare", "--initial-branch=main", str(origin))
    git(tmp_path, "clone", "--quiet", str(origin), str(work))
    (work / "catalog").mkdir()
    (work / "catalog" / "a.json").write_text("{}", encoding="utf-8")
    git(work, "switch", "--quiet", "-c", "main")
    git(work, "add", ".")
    git(work, "-c", "user.name=A", "-c", "user.email=a@b.org", "commit", "--quiet", "-m", "first")
    git(work, "push", "--quiet", "-u", "origin", "main")
    programs.mkdir()
    gh = programs / "gh"
    # A stand-in that notes how it was called; `pr list` answers with what is in the file `open`.
    gh.write_text(
        f'#!/bin/sh\necho "$@" >> {tmp_path}/calls\ncase "$2" in list) cat {tmp_path}/open;; esac\n', encoding="utf-8"
    )
    gh.chmod(0o755)
    (tmp_path / "open").write_text("", encoding="utf-8")
    (tmp_path / "summary.md").write_text("# Catalog update: 1 new candidate\n\n$(touch bad) `x`\n", encoding="utf-8")
    environment = {
        "CWD": str(work),
        "BASE": "main",
        "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}",
        "DRY_RUN": "false",
    }
    before = git(origin, "rev-parse", "main")

    nothing = run("Pull request", tmp_path, **environment)
    assert nothing.returncode == 0, nothing.stderr
    assert "nothing changed" in nothing.stdout
    assert not (tmp_path / "calls").exists()

    (work / "catalog" / "b.json").write_text("{}", encoding="utf-8")
    (work / "elsewhere.txt").write_text("not part of it", encoding="utf-8")
    done = run("Pull request", tmp_path, **environment)
    assert done.returncode == 0, done.stderr
    assert git(origin, "rev-parse", "main") == before
    assert git(origin, "diff", "--name-only", "main", "catalog/update").split() == ["catalog/b.json"]
    assert git(origin, "log", "-1", "--format=%s", "catalog/update").strip() == "Catalog update: 1 new candidate"
    assert "pr create --base main --head catalog/update" in (tmp_path / "calls").read_text(encoding="utf-8")
    assert not (work / "bad").exists()

    (tmp_path / "open").write_text("7\n", encoding="utf-8")
    git(work, "switch", "--quiet", "main")
    (work / "catalog" / "c.json").write_text("{}", encoding="utf-8")
    again = run("Pull request", tmp_path, **environment)
    assert again.returncode == 0, again.stderr
    assert (tmp_path / "calls").read_text(encoding="utf-8").splitlines()[-1].startswith("pr edit catalog/update")
    assert git(origin, "diff", "--name-only", "main", "catalog/update").split() == ["catalog/c.json"]


def test_the_cron_line_of_the_page_calls_the_same_commands():
    page = (ROOT / "docs" / "curating.md").read_text(encoding="utf-8")
    lines = [line for line in page.splitlines() if re.match(r"\d+ \d+ \* \* ", line)]
    assert len(lines) == 2
    assert "latentcot papers update" in lines[0]
    assert "latentcot papers refresh" in lines[1]
    for line in lines:
        assert int(line.split()[0]) % 15
