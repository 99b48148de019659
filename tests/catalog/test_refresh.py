"""What becomes of known papers: new versions, titles, withdrawals; and a refresh that dies anywhere."""

import json
from datetime import UTC, datetime

import pytest
from typer.testing import CliRunner

from latentcot.catalog import get
from latentcot.catalog.check import check_catalog
from latentcot.catalog.cli import papers_app
from latentcot.catalog.feed_server import Fault, Version, paper
from latentcot.catalog.feed_server.trial import PlainScorer, small_catalog, small_queries, tree
from latentcot.catalog.queue_store import Folders
from latentcot.catalog.refresh import RefreshReport, chosen, markdown, refresh
from latentcot.catalog.store import CatalogError, parse_record, write_record
from latentcot.catalog.update.report import Outcome

pytestmark = pytest.mark.allow_hosts(["127.0.0.1"])

KEYS = ("2402.07754", "2404.08634", "2405.15302", "2412.06769", "2508.03440")


class KilledError(BaseException):
    """Stands for SIGKILL."""


@pytest.fixture
def known(tmp_path) -> Folders:
    return small_catalog(tmp_path / "known", (*KEYS, "openreview-9Pba4rcQbE"))


@pytest.fixture
def feed(server):
    """The papers of the catalog as arXiv shows them: a second version each, the first author alone."""
    for key in KEYS:
        title = get(key).title
        first = paper(key, title, f"20{key[:2]}-{key[2:4]}-03", categories=("cs.CL", "cs.LG"))
        server.add(first.revised(Version(datetime(2026, 1, 20, tzinfo=UTC), title)))
    return server


def record(folders: Folders, key: str):
    path = folders.record_file(key)
    assert path is not None
    return parse_record(path.read_bytes(), key)


def again(folders: Folders, make_client, **rest) -> RefreshReport:
    place = Folders(folders.root)
    client = make_client(place, fresh=rest.pop("fresh", False), **rest.pop("client", {}))
    return refresh(place, client, chosen(place, []), **{"batch": 2, **rest})


def change(server, key: str, title: str | None = None, **rest) -> None:
    old = next(item for item in server.corpus.papers if item.base == key)
    server.add(old.revised(Version(datetime(2026, 2, 1, tzinfo=UTC), title or old.versions[-1].title, **rest)))


def test_versions_dates_categories_and_authors_are_filled_in(known, feed, make_client):
    report = again(known, make_client)
    assert report.outcome is Outcome.NEW
    assert (report.asked, report.answered, report.missing) == (5, 5, [])
    for key in KEYS:
        found = record(known, key)
        assert (found.version, found.categories, found.primary_category) == (2, ["cs.CL", "cs.LG"], "cs.CL")
        assert found.published is not None
        assert found.published.precision == "day"
        assert found.updated is not None
        assert found.updated.value == "2026-01-20"
    assert record(known, "openreview-9Pba4rcQbE") == get("openreview-9Pba4rcQbE")
    assert check_catalog(known.papers).problems == []
    assert all(len(seen.parameters["id_list"].split(",")) <= 2 for seen in feed.log)


def test_idempotent_a_second_refresh_changes_no_byte(known, feed, make_client, clock):
    again(known, make_client)
    before = tree(known.root)
    for fresh in (False, True):
        report = again(known, make_client, fresh=fresh)
        assert report.outcome is Outcome.NOTHING_NEW
        assert tree(known.root) == before
    clock.sleep(40 * 24 * 3600)
    assert again(known, make_client).outcome is Outcome.NOTHING_NEW
    assert tree(known.root) == before


def test_retitled_withdrawn_published_and_linked_papers(known, feed, make_client):
    again(known, make_client)
    change(feed, "2412.06769", "Coconut, Retitled")
    change(feed, "2402.07754", comment="This paper has been withdrawn by the authors")
    change(feed, "2404.08634", comment="Accepted at ICML 2026. Code: github.com/a/b", journal_ref=None)
    change(feed, "2405.15302", doi="10.1000/xyz")
    report = again(known, make_client, fresh=True)
    coconut = record(known, "2412.06769")
    assert coconut.title == "Coconut, Retitled"
    assert get("2412.06769").title in coconut.other_titles
    assert record(known, "2402.07754").status == "withdrawn"
    assert record(known, "2405.15302").ids.doi == "10.1000/xyz"
    assert "https://github.com/a/b" in [link.url for link in record(known, "2404.08634").links]
    text = markdown(report)
    assert "| `2402.07754` | status | active | withdrawn |" in text
    assert "Coconut, Retitled" in text
    assert {key for key, *_ in report.changes} == {"2412.06769", "2402.07754", "2404.08634", "2405.15302"}
    assert check_catalog(known.papers).problems == []


def test_resumable_and_atomic_a_refresh_that_dies_anywhere(known, feed, make_client, tmp_path, monkeypatch):
    import os

    again(known, make_client)
    expected = tree(known.root)
    real = os.replace
    for die_at in range(40):
        folders, count = small_catalog(tmp_path / f"{die_at}", (*KEYS, "openreview-9Pba4rcQbE")), 0

        def dying(*args, die_at=die_at):
            nonlocal count
            count += 1
            if count > die_at:
                raise KilledError
            return real(*args)

        monkeypatch.setattr(os, "replace", dying)
        try:
            again(folders, make_client)
            died = False
        except KilledError:
            died = True
        monkeypatch.undo()
        for path in folders.papers.glob("*/*.json"):
            parse_record(path.read_bytes(), path.name)
        again(folders, make_client)
        assert tree(folders.root) == expected, die_at
        if not died:
            break
    else:
        pytest.fail("the refresh never ended")
    assert die_at >= 8


@pytest.mark.parametrize(
    "faults",
    [
        [Fault("empty", times=2)],
        [Fault("short", count=1, times=1)],
        [Fault("status", status=500, size=2, times=10)],
        [Fault("damaged", times=2)],
    ],
    ids=["empty", "short", "pairs-fail", "damaged"],
)
def test_trouble_on_the_way_changes_nothing_in_the_end(faults, known, feed, make_client, tmp_path):
    again(known, make_client)
    expected = tree(known.root)
    folders = small_catalog(tmp_path / "other", (*KEYS, "openreview-9Pba4rcQbE"))
    feed.clear()
    feed.play(*faults)
    report = again(folders, make_client)
    assert report.problem is None, markdown(report)
    assert tree(folders.root) == expected


def test_what_does_not_answer_is_partial_or_failed(known, feed, make_client):
    feed.play(Fault("status", status=403, at=(2,)))
    report = again(known, make_client)
    assert report.outcome is Outcome.PARTIAL
    assert "refuses this client" in markdown(report)
    feed.clear()
    feed.play(Fault("status", status=403))
    before = tree(known.root)
    assert again(known, make_client, fresh=True).outcome is Outcome.FAILED
    assert tree(known.root) == before


def test_ids_that_arxiv_does_not_know_are_named(known, feed, make_client):
    feed.corpus.papers = [item for item in feed.corpus.papers if item.base != "2404.08634"]
    report = again(known, make_client)
    assert report.missing == ["2404.08634"]
    assert "Unknown to arXiv" in markdown(report)
    assert record(known, "2404.08634") == get("2404.08634")


def test_a_record_that_was_edited_meanwhile_keeps_the_edit(known, feed, make_client):
    place = Folders(known.root)
    records = chosen(place, ["2412.06769"])
    write_record(records[0].model_copy(update={"note": "Edited meanwhile."}), known.papers)
    refresh(place, make_client(place), records)
    found = record(known, "2412.06769")
    assert (found.note, found.version) == ("Edited meanwhile.", 2)


def test_a_dry_run_reports_and_writes_nothing(known, feed, make_client):
    before = tree(known.root)
    assert again(known, make_client, dry_run=True).outcome is Outcome.NEW
    assert tree(known.root) == before


def test_papers_are_chosen_by_any_name(known):
    assert [r.key for r in chosen(known, ["Ye2024Diffusion", "arXiv:2412.06769v2", "2412.06769"])] == [
        "2402.07754",
        "2412.06769",
    ]
    assert len(chosen(known, [])) == 5
    with pytest.raises(CatalogError, match="no paper is called 'nobody'"):
        chosen(known, ["nobody"])
    with pytest.raises(CatalogError, match="has no arXiv id"):
        chosen(known, ["openreview-9Pba4rcQbE"])


runner = CliRunner()


def run(folders: Folders, *arguments: str):
    return runner.invoke(papers_app, [arguments[0], "--catalog", str(folders.root), *arguments[1:]])


def test_command_refresh(known, feed, tmp_path):
    options = ["--feed", feed.url, "--gap", "0"]
    summary = tmp_path / "summary.md"
    done = run(known, "refresh", *options, "--summary", str(summary))
    assert done.exit_code == 10, done.output
    assert "# Catalog refresh: 5 of 5 papers changed" in summary.read_text(encoding="utf-8")
    assert done.stdout == ""
    assert run(known, "refresh", *options).exit_code == 0
    assert run(known, "refresh", "2412.06769", *options).stdout.startswith(
        "# Catalog refresh: nothing new about 1 papers"
    )
    feed.play(Fault("status", status=403))
    assert run(known, "refresh", *options, "--fresh").exit_code == 12


def test_command_update_and_its_exit_codes(folders, server, clock, tmp_path, monkeypatch):
    """0 nothing new, 10 new candidates, 11 partial, 12 failed; the summary to a file or standard output, the rest to stderr."""
    monkeypatch.setattr("latentcot.catalog.update.clock.SystemClock", lambda: clock)
    monkeypatch.setattr(
        "latentcot.catalog.update.scoring.default_scorer", lambda phrases: (PlainScorer(), "judged plainly")
    )
    queries = tmp_path / "queries.json"
    queries.write_text(small_queries().model_dump_json(), encoding="utf-8")
    options = ["--feed", server.url, "--gap", "0", "--queries", str(queries)]
    assert run(folders, "update", *options, "--dry-run").exit_code == 10
    assert not folders.queue.exists()
    server.play(Fault("status", status=500, start=3, times=None))
    partial = run(folders, "update", *options, "--fresh", "--budget", "8")
    assert partial.exit_code == 11, partial.output
    assert "partial (" in partial.stdout
    server.clear()
    done = run(folders, "update", *options, "--fresh")
    assert done.exit_code == 10, done.output
    assert done.stdout.startswith("# Catalog update: ")
    assert "* judged plainly" in done.stdout
    assert "requests" in done.stderr
    summary = tmp_path / "summary.md"
    again = run(folders, "update", *options, "--summary", str(summary))
    assert (again.exit_code, again.stdout) == (0, "")
    assert summary.read_text(encoding="utf-8").startswith("# Catalog update: nothing new")
    server.play(Fault("status", status=403))
    failed = run(folders, "update", *options, "--fresh")
    assert failed.exit_code == 12
    assert "failed: the server refuses" in failed.stderr
    missing = run(folders, "update", *options, "--summary", str(tmp_path / "no" / "where.md"))
    assert missing.exit_code == 2


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["update"], "asks for a contact"),
        (["update", "--contact", "nobody"], "expects a mail address"),
        (["update", "--contact", "a@b.org", "--gap", "1"], "at least 3 s"),
        (["update", "--feed", "nowhere"], "http(s)://host/path"),
        (["update", "--feed", "http://127.0.0.1:9/x", "--query", "nothing"], "no query is called"),
        (["update", "--feed", "http://127.0.0.1:9/x", "--overlap-days", "3"], "--overlap-days expects"),
        (["update", "--feed", "http://127.0.0.1:9/x", "--budget", "0"], "budget expects at least 1"),
        (["update", "--queries", "/does/not/exist"], "cannot be read"),
        (["refresh", "nobody"], "no paper is called"),
        (["refresh", "--no-metadata"], "nothing to do"),
        (["refresh", "--dry-run", "--links"], "--dry-run is for metadata"),
        (["stats", "--catalog", "/does/not/exist"], "is no catalog"),
    ],
    ids=lambda value: " ".join(value[:3]) if isinstance(value, list) else "",
)
def test_commands_bad_input_is_one_line_and_exit_code_2(arguments, told, folders, monkeypatch):
    monkeypatch.delenv("LATENTCOT_CONTACT", raising=False)
    result = run(folders, *arguments)
    assert result.exit_code == 2, result.output
    assert result.stderr.startswith("error: ")
    assert told in result.stderr
    assert result.stderr.count("\n") == 1


def test_command_stats(folders):
    found = json.loads(run(folders, "stats", "--json").stdout)
    assert found["records"]["papers"] == 3
    assert found["decisions"] == {
        "accepted": 0,
        "rejected": 0,
        "accepted share": None,
        "median days from submission to listing": None,
    }
    assert "papers" in run(folders, "stats").stdout


def test_damaged_files_of_the_curation_are_named(folders):
    for path, told in (
        (folders.queue / "2602.00001.json", "queue/2602.00001.json"),
        (folders.decisions / "2602.00001.json", "decisions/2602.00001.json"),
        (folders.watermarks, "watermarks.json"),
        (folders.health, "link_health.json"),
    ):
        path.parent.mkdir(exist_ok=True)
        for text in ("{", '{"key": 3}', "[]"):
            path.write_text(text, encoding="utf-8")
            problems = [str(problem) for problem in check_catalog(folders.papers).problems]
            assert any(problem.startswith(told) for problem in problems), (path, text, problems)
        result = run(folders, "stats")
        assert result.exit_code == 2
        assert told in result.stderr
        path.unlink()
