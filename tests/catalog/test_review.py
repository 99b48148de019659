"""Deciding: by function, by flags, and by keys in a pseudo-terminal; interrupted anywhere, undone at any time."""

import json
import os
import pty
import select
import subprocess
import sys
import time
from datetime import UTC, datetime
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from latentcot.catalog import find, load_taxonomy
from latentcot.catalog.acceptance import settle, writing
from latentcot.catalog.check import check_catalog
from latentcot.catalog.cli import papers_app
from latentcot.catalog.feed_server.trial import PlainScorer, small_catalog, tree
from latentcot.catalog.queue_store import (
    REASONS,
    Candidate,
    Folders,
    Near,
    read_candidate,
    read_decision,
    read_queue,
    write_candidate,
)
from latentcot.catalog.review import accept, find_candidate, reject, undo
from latentcot.catalog.review_terminal import Session
from latentcot.catalog.store import CatalogError, parse_record, write_record

DAY = "2026-02-18"


class KilledError(BaseException):
    """Stands for SIGKILL."""


def candidate(number: int = 1, **changes) -> Candidate:
    values = {
        "key": f"2602.{number:05d}",
        "arxiv": f"2602.{number:05d}",
        "version": 1,
        "title": f"Latent Thought of Kind {number}",
        "authors": ["Ada Okafor", "Łukasz Łuß-Ørsted"],
        "abstract": "We think without words. Code: https://github.com/okafor/thought.",
        "published": f"2026-02-{number:02d}T10:00:00Z",
        "updated": f"2026-02-{number:02d}T10:00:00Z",
        "comment": "Accepted to ICLR 2026 (oral), 12 pages",
        "journal_ref": None,
        "doi": None,
        "code": ["https://github.com/okafor/thought"],
        "primary_category": "cs.CL",
        "categories": ["cs.CL", "cs.LG"],
        "queries": ["latent"],
        "near": [],
        "score": PlainScorer()(f"Latent Thought of Kind {number}", None),
        "prefilled": False,
        "again": None,
    }
    return Candidate.model_validate(values | changes)


@pytest.fixture
def queued(folders) -> Folders:
    for number in (1, 2, 3):
        write_candidate(folders, candidate(number))
    return folders


def record(folders: Folders, key: str):
    path = folders.record_file(key)
    assert path is not None
    return parse_record(path.read_bytes(), key)


def clean(folders: Folders) -> list[str]:
    return [str(problem) for problem in check_catalog(folders.papers).problems]


def test_accepting_makes_a_record_that_passes_the_check(queued):
    decision = accept(
        queued, candidate(), leaf="vertical/feedback", also=["vertical/applications"], by="Ada", date=DAY, note="Short."
    )
    found = record(queued, "2602.00001")
    assert found.taxonomy.primary == "vertical/feedback"
    assert (found.taxonomy.also, found.taxonomy.status) == (["vertical/applications"], "reviewed")
    assert found.citekey == "Okafor2026Latent"
    assert found.author_names == ["Ada Okafor", "Łukasz Łuß-Ørsted"]
    assert found.published is not None
    assert found.published.value == "2026-02-01"
    assert found.venue is not None
    assert (found.venue.name, found.venue.year, found.venue.track, found.venue.status) == (
        "ICLR",
        2026,
        "oral",
        "accepted",
    )
    assert [link.url for link in found.links] == [
        "https://arxiv.org/abs/2602.00001",
        "https://github.com/okafor/thought",
    ]
    assert found.decision == "decisions/2602.00001.json"
    assert (queued.root / found.decision).is_file()
    assert decision.candidate.abstract is None
    assert found.note == "Short."
    assert sorted(read_queue(queued)) == ["2602.00002", "2602.00003"]
    assert clean(queued) == []
    assert "We think" not in (queued.root / found.decision).read_text(encoding="utf-8")


def test_citation_keys_do_not_collide(queued):
    for number in (1, 2, 3):
        accept(queued, candidate(number), leaf="vertical/feedback", by="Ada", date=DAY)
    keys = [record(queued, f"2602.{number:05d}").citekey for number in (1, 2, 3)]
    assert keys == ["Okafor2026Latent", "Okafor2026Latenta", "Okafor2026Latentb"]


@pytest.mark.parametrize("action", ["accept", "reject"])
def test_undo_brings_everything_back(action, queued):
    before = tree(queued.root)
    if action == "accept":
        accept(queued, candidate(), leaf="vertical/feedback", by="Ada", date=DAY)
    else:
        reject(queued, candidate(), reason="explicit-cot", by="Ada", date=DAY)
    assert tree(queued.root) != before
    undo(queued, "2602.00001")
    assert tree(queued.root) == before


def test_undo_without_the_cache_loses_only_the_abstract(queued):
    reject(queued, candidate(), reason="off-topic", by="Ada", date=DAY)
    for path in (queued.cache / "abstracts").iterdir():
        path.unlink()
    undo(queued, "2602.00001")
    assert read_candidate(queued, "2602.00001") == candidate(abstract=None)


@pytest.mark.parametrize("damage", [b"", b"{", b"\xff\xfe", b"[]"])
def test_undo_with_a_damaged_cache_loses_only_the_abstract(damage, queued):
    accept(queued, candidate(), leaf="vertical/feedback", by="Ada", date=DAY)
    (queued.cache / "abstracts" / "2602.00001.json").write_bytes(damage)
    undo(queued, "2602.00001")
    assert find_candidate(queued, "2602.00001") == candidate(abstract=None)


def test_notes_are_one_line_without_control_characters(queued):
    note = " two\nlines\x1b[31m \t red "
    accept(queued, candidate(), leaf="vertical/feedback", by="Ada", date=DAY, note=note)
    assert record(queued, "2602.00001").note == "two lines [31m red"
    decision = reject(queued, candidate(2), reason="off-topic", by="Ada", date=DAY, note="\n\x07")
    assert decision.note is None


def test_undo_does_not_remove_what_somebody_has_edited(queued):
    accept(queued, candidate(), leaf="vertical/feedback", by="Ada", date=DAY)
    write_record(record(queued, "2602.00001").model_copy(update={"note": "Edited."}), queued.papers)
    with pytest.raises(CatalogError, match="has changed since it was accepted"):
        undo(queued, "2602.00001")
    assert record(queued, "2602.00001").note == "Edited."


@pytest.mark.parametrize("action", ["accept", "reject", "merge", "undo"])
@pytest.mark.parametrize("call", ["fsync", "replace", "unlink"])
def test_atomic_a_decision_that_dies_anywhere_is_carried_out_or_never_was(action, call, tmp_path, monkeypatch):
    def act(folders: Folders) -> None:
        paper = read_candidate(folders, "2602.00001") or candidate()
        if action == "accept":
            accept(folders, paper, leaf="vertical/feedback", by="Ada", date=DAY)
        elif action == "merge":
            accept(folders, paper, leaf="vertical/feedback", by="Ada", date=DAY, into="2412.06769")
        elif action == "reject":
            reject(folders, paper, reason="off-topic", by="Ada", date=DAY)
        else:
            undo(folders, "2602.00001")

    def fresh(name: str) -> Folders:
        folders = small_catalog(tmp_path / name)
        write_candidate(folders, candidate())
        if action == "undo":
            accept(folders, candidate(), leaf="vertical/feedback", by="Ada", date=DAY)
        return Folders(folders.root)

    sound = fresh("sound")
    before = tree(sound.root)
    act(sound)
    after = tree(sound.root)
    real = getattr(os, call)
    for die_at in range(12):
        folders, count = fresh(f"{die_at}"), 0

        def dying(*args, die_at=die_at, **kwargs):
            nonlocal count
            count += 1
            if count > die_at:
                raise KilledError
            return real(*args, **kwargs)

        monkeypatch.setattr(os, call, dying)
        try:
            act(folders)
            died = False
        except KilledError:
            died = True
        monkeypatch.undo()
        again = Folders(folders.root)
        with writing(again):
            pass
        assert tree(folders.root) in (before, after), die_at
        if not died:
            break
    else:
        pytest.fail("the action never ended")
    assert tree(folders.root) == after


def test_settle_carries_out_what_was_decided(queued):
    accept(queued, candidate(), leaf="vertical/feedback", by="Ada", date=DAY)
    path = queued.record_file("2602.00001")
    assert path is not None
    text = path.read_bytes()
    path.unlink()
    write_candidate(queued, candidate())
    assert any("there is no record" in problem for problem in clean(queued))
    assert any("was accepted" in problem for problem in clean(queued))
    assert settle(queued) == ["2602.00001"]
    assert path.read_bytes() == text
    assert settle(queued) == []
    assert clean(queued) == []


def test_merging_adds_and_replaces_nothing(queued):
    known = record(queued, "openreview-9Pba4rcQbE")
    paper = candidate(near=[Near(key=known.key, rule="near titles")])
    accept(queued, paper, leaf="vertical/feedback", by="Ada", date=DAY, into=known.key)
    merged = record(queued, known.key)
    assert merged.ids.arxiv == "2602.00001"
    assert merged.title == known.title
    assert merged.other_titles[-1] == paper.title
    assert merged.taxonomy == known.taxonomy
    assert queued.record_file("2602.00001") is None
    assert clean(queued) == []
    with pytest.raises(CatalogError, match="take that back by hand"):
        undo(queued, "2602.00001")


def test_bad_decisions_are_refused_before_anything_is_written(queued):
    before = tree(queued.root)
    with pytest.raises(CatalogError, match="no leaf has the slug 'vertical/feedbak'; close: vertical/feedback"):
        accept(queued, candidate(), leaf="vertical/feedbak", by="Ada", date=DAY)
    with pytest.raises(CatalogError, match="--reason expects one of off-topic"):
        reject(queued, candidate(), reason="boring", by="Ada", date=DAY)
    with pytest.raises(CatalogError, match="the reason is duplicate"):
        reject(queued, candidate(), reason="off-topic", by="Ada", date=DAY, duplicate_of="2412.06769")
    with pytest.raises(CatalogError, match="no paper is called"):
        reject(queued, candidate(), reason="duplicate", by="Ada", date=DAY, duplicate_of="2412.99999")
    with pytest.raises(CatalogError, match="note"):
        reject(queued, candidate(), reason="other", by="Ada", date=DAY, note="x" * 281)
    for nothing in (None, "", " \n"):
        with pytest.raises(CatalogError, match="say why in a note"):
            reject(queued, candidate(), reason="other", by="Ada", date=DAY, note=nothing)
    for nothing in (None, "", " \n"):
        with pytest.raises(CatalogError, match="say why in a note"):
            reject(queued, candidate(), reason="other", by="Ada", date=DAY, note=nothing)
    with pytest.raises(CatalogError, match="note"):
        accept(queued, candidate(), leaf="vertical/feedback", by="Ada", date=DAY, note="x" * 281)
    known = candidate(key="2412.06769", arxiv="2412.06769")
    with pytest.raises(CatalogError, match="is a record already"):
        accept(queued, known, leaf="vertical/feedback", by="Ada", date=DAY)
    assert tree(queued.root) == before
    with pytest.raises(CatalogError, match="no candidate is called"):
        find_candidate(queued, "../../etc/passwd")


def test_a_decision_records_the_earlier_one(queued):
    reject(queued, candidate(), reason="off-topic", by="Ada", date=DAY)
    again = candidate(title="Another Title", again="rejected before under another title")
    write_candidate(queued, again)
    assert settle(queued) == []
    accept(queued, again, leaf="vertical/feedback", by="Bo", date="2026-03-01")
    found = read_decision(queued, "2602.00001")
    assert found is not None
    assert found.earlier == ["2026-02-18 rejected: off-topic (Ada)"]


runner = CliRunner()


def run(*arguments: str):
    return runner.invoke(papers_app, ["review", *arguments], env={"LATENTCOT_CURATOR": "Ada"})


def test_flags_list_show_accept_reject_and_undo(queued):
    where = ["--catalog", str(queued.root)]
    listed = json.loads(run("list", "--json", *where).stdout)
    assert [item["key"] for item in listed] == ["2602.00001", "2602.00002", "2602.00003"]
    assert "Latent Thought of Kind 2" in run("list", *where).stdout
    shown = run("show", "arXiv:2602.00001v1", *where).stdout
    assert "We think without words" in shown
    assert "vertical/feedback" in shown
    assert json.loads(run("show", "2602.00001", "--json", *where).stdout)["key"] == "2602.00001"
    done = run("accept", "https://arxiv.org/abs/2602.00001", *where)
    assert (done.exit_code, done.stdout) == (0, "2602.00001 accepted under vertical/feedback\n")
    assert run("reject", "2602.00002", "--reason", "other-latent", *where).exit_code == 0
    assert "stands in the queue again" in run("undo", "2602.00002", *where).stdout
    found = read_decision(queued, "2602.00001")
    assert found is not None
    assert found.by == "Ada"
    assert clean(queued) == []


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["accept", "2602.99999"], "no candidate is called"),
        (["accept", "2602.00001", "--leaf", "nowhere"], "no leaf has the slug"),
        (["reject", "2602.00001", "--reason", "boring"], "--reason expects"),
        (["reject", "2602.00001", "--reason", "other"], "say why in a note"),
        (["undo", "2602.00001"], "has no decision"),
        (["undo", "x"], "is not an arXiv identifier"),
        (["accept", "2602.00001", "--by", " "], "who decides"),
    ],
    ids=lambda value: " ".join(value[:2]) if isinstance(value, list) else "",
)
def test_flags_bad_input_is_one_line_and_exit_code_2(arguments, told, queued):
    before = tree(queued.root)
    result = run(*arguments, "--catalog", str(queued.root))
    assert result.exit_code == 2, result.output
    assert result.stderr.startswith("error: ")
    assert told in result.stderr
    assert result.stderr.count("\n") == 1
    assert tree(queued.root) == before


def test_flags_no_catalog(tmp_path):
    result = run("list", "--catalog", str(tmp_path))
    assert result.exit_code == 2
    assert "is no catalog" in result.stderr


def sit(folders: Folders, *keys: str, lines: tuple[str, ...] = (), opened: list[str] | None = None) -> str:
    """A sitting with prepared keys; returns what was shown."""
    pressed, typed, screen = iter(keys), iter(lines), StringIO()
    session = Session(
        folders,
        "Ada",
        DAY,
        Console(file=screen, width=110, highlight=False),
        key=lambda: next(pressed, "end"),
        line=lambda prompt: next(typed),
        browse=lambda url: opened is not None and (opened.append(url) or True),
    )
    session.run()
    return screen.getvalue()


def test_keys_accept_reject_open_and_move(queued):
    opened: list[str] = []
    shown = sit(queued, "o", "n", "p", "a", "r", "1", "q", opened=opened)
    assert opened == ["https://arxiv.org/abs/2602.00001"]
    assert "2602.00001 accepted under vertical/feedback" in shown
    assert "2602.00002 rejected: off-topic" in shown
    assert "2 decisions, 1 papers left" in shown
    assert sorted(read_queue(queued)) == ["2602.00003"]
    assert clean(queued) == []


def test_keys_leaf_by_number_slug_and_part(queued):
    slugs = list(load_taxonomy().leaves)
    sit(queued, "l", "l", "l", "q", lines=("2", "beyond/safety", "fixed"))
    filed = [record(queued, f"2602.{number:05d}").taxonomy.primary for number in (1, 2, 3)]
    assert filed == [slugs[1], "beyond/safety", "unbounded-depth/fixed-point"]
    assert "names no one leaf" in sit(small_queue(queued), "l", "q", lines=("diffusion",))


def small_queue(folders: Folders) -> Folders:
    write_candidate(folders, candidate(9))
    return folders


def test_keys_undo_goes_back_through_the_session(queued):
    before = tree(queued.root)
    shown = sit(queued, "a", "r", "2", "a", "u", "u", "u", "u", "q")
    assert tree(queued.root) == before
    assert "nothing was decided in this session" in shown
    assert "0 decisions, 3 papers left" in shown


def test_keys_duplicate_merge_cancel_and_help(queued):
    assert find("2412.06769")
    shown = sit(queued, "r", "x", "?", "v", "9", "r", "4", "m", "m", "q", lines=("2412.06769", "", "2402.07754"))
    assert "not rejected" in shown
    assert "undo the last decision" in shown
    decision = read_decision(queued, "2602.00001")
    assert decision is not None
    assert decision.duplicate_of == "2412.06769"
    assert record(queued, "2402.07754").other_titles[-1] == "Latent Thought of Kind 2"


def test_keys_hostile_text_is_shown_as_text(queued):
    write_candidate(
        queued, candidate(4, title="[bold red]x[/] [link=file:///etc]y[/link]", score=PlainScorer()("latent", None))
    )
    shown = sit(queued, "n", "n", "n", "q")
    assert "[bold red]x[/]" in shown


def test_a_session_in_a_pseudo_terminal(queued):
    """The real command, real keys, arrows included."""
    command = [sys.executable, "-m", "latentcot.catalog", "review", "--catalog", str(queued.root), "--by", "Ada"]
    master, slave = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "100", "LINES": "60"}
    child = subprocess.Popen(command, stdin=slave, stdout=slave, stderr=slave, env=environment, close_fds=True)
    os.close(slave)
    screen = b""

    def wait_for(text: str) -> None:
        nonlocal screen
        deadline = time.monotonic() + 60
        while text.encode() not in screen:
            assert time.monotonic() < deadline, screen.decode(errors="replace")[-2000:]
            if select.select([master], [], [], 0.2)[0]:
                screen += os.read(master, 65536)

    try:
        wait_for("1 of 3")
        os.write(master, b"\x1b[C")  # right
        wait_for("2 of 3")
        os.write(master, b"a")
        wait_for("2602.00002 accepted under vertical/feedback")
        wait_for("2 of 2")
        os.write(master, b"r")
        wait_for("explicit-cot: reasons in words")
        os.write(master, b"2")
        wait_for("2602.00003 rejected: explicit-cot")
        os.write(master, b"u")
        wait_for("2602.00003 stands in the queue again")
        os.write(master, b"l")
        wait_for("empty cancels")
        os.write(master, b"fixed-point\n")
        wait_for("2602.00003 accepted under unbounded-depth/fixed-point")
        os.write(master, b"q")
        wait_for("2 decisions, 1 papers left")
        assert child.wait(timeout=30) == 0
    finally:
        child.kill()
        os.close(master)
    assert sorted(read_queue(queued)) == ["2602.00001"]
    assert clean(queued) == []


def test_a_session_through_a_pipe(queued):
    command = [sys.executable, "-m", "latentcot.catalog", "review", "--catalog", str(queued.root), "--by", "Ada"]
    done = subprocess.run(command, input="a\nr\n1\nq\n", capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "2 decisions, 1 papers left" in done.stdout


def test_reasons_have_meanings_and_dates_are_days():
    assert all(REASONS.values())
    assert datetime.fromisoformat(DAY).replace(tzinfo=UTC)
    assert Path(DAY).name == DAY
