"""The properties that the updater promises, each against the local feed server."""

import json
import signal
import subprocess
import sys
import textwrap
import time
from datetime import UTC, datetime, timedelta
from itertools import pairwise

import pytest

from latentcot.catalog import find
from latentcot.catalog.check import check_catalog
from latentcot.catalog.feed_server import Fault, Version, paper
from latentcot.catalog.feed_server.trial import (
    busy_papers,
    small_catalog,
    small_queries,
    tree,
)
from latentcot.catalog.queue_store import Folders, read_candidate, read_queue
from latentcot.catalog.review import accept, reject
from latentcot.catalog.store import CatalogError
from latentcot.catalog.update import updater as updater_module
from latentcot.catalog.update.cache import PageCache, arxiv_day, one_run
from latentcot.catalog.update.queries import read_watermarks
from latentcot.catalog.update.report import Outcome
from latentcot.catalog.update.summary import harmless, markdown
from latentcot.catalog.update.updater import slices_of

pytestmark = pytest.mark.allow_hosts(["127.0.0.1"])


class KilledError(BaseException):
    """Stands for SIGKILL inside one process: no handler for ordinary errors may catch it."""


def test_new_papers_become_candidates_with_score_reasons_and_queries(make_updater, folders, expected):
    report = make_updater().run()
    assert report.outcome is Outcome.NEW
    assert [line.problem for line in report.queries] == [None, None]
    queue = read_queue(folders)
    assert len(queue) == len(report.new) == 8
    both = queue["2602.00002"]
    assert both.queries == ["latent", "loops"]
    assert queue["2602.00001"].queries == ["latent"]
    assert both.score.probability == 0.9
    assert both.score.reasons == ["title: latent"]
    assert both.published == "2026-02-03T01:30:00Z"
    assert tree(folders.root) == expected
    marks = read_watermarks(folders.watermarks)
    assert {name: mark.until for name, mark in marks.items()} == {
        "latent": "2026-02-09T07:30:00Z",
        "loops": "2026-02-09T07:30:00Z",
    }


def test_idempotent_a_second_run_on_the_same_feed_changes_no_byte(make_updater, folders, clock, expected):
    make_updater().run()
    for fresh in (False, True):
        report = make_updater(fresh=fresh).run()
        assert report.outcome is Outcome.NOTHING_NEW
        assert tree(folders.root) == expected
    clock.sleep(26 * 3600)  # another day: other windows, the same papers
    assert make_updater().run().outcome is Outcome.NOTHING_NEW
    assert tree(folders.root) == expected


def test_the_same_query_is_not_sent_twice_a_day(make_updater, server, clock):
    make_updater().run()
    asked = len(server.log)
    assert asked > 4
    second = make_updater()
    second.run()
    repeated = [seen.parameters for seen in server.log[asked:]]
    # Pages with papers come from the cache. What is asked again is empty: such a page may have
    # been a bad hour; and the control query, because the window begins later now.
    assert second.client.log.cached == 5
    assert {outcome for _, _, outcome in second.client.log.requests} <= {"0 entries of 0", "1 entries of 3"}
    assert len(repeated) < asked / 2
    clock.sleep(24 * 3600)
    make_updater().run()
    assert len(server.log) > asked + len(repeated)


def requests_of_a_run(make_updater, server, where: Folders) -> int:
    make_updater(where).run()
    number = len(server.log)
    server.clear()
    return number


def test_resumable_killed_at_every_page_and_started_again(make_updater, server, tmp_path, expected, monkeypatch):
    number = requests_of_a_run(make_updater, server, small_catalog(tmp_path / "count"))
    assert number == 8
    for kill_at in range(number):
        folders = small_catalog(tmp_path / f"killed-{kill_at}")
        run = make_updater(folders)
        send, sent = run.client._send, []

        def dying(url, send=send, sent=sent, kill_at=kill_at):
            if len(sent) == kill_at:
                raise KilledError
            sent.append(url)
            return send(url)

        monkeypatch.setattr(run.client, "_send", dying)
        with pytest.raises(KilledError):
            run.run()
        again = make_updater(folders)
        again.run()
        assert tree(folders.root) == expected, f"killed at request {kill_at}"


def test_atomic_fails_at_every_write_and_at_every_rename(make_updater, tmp_path, expected, monkeypatch):
    """Each os.fsync and os.replace in turn is the last thing the process does; what is on disk is whole, and a new run ends as always."""
    import os

    real = {"fsync": os.fsync, "replace": os.replace}
    for name in real:
        calls = 0

        def counting(*args, name=name):
            nonlocal calls
            calls += 1
            return real[name](*args)

        run = make_updater(small_catalog(tmp_path / f"count-{name}"))
        monkeypatch.setattr(os, name, counting)
        run.run()
        monkeypatch.undo()
        assert calls >= 16
        for fail_at in range(calls):
            folders = small_catalog(tmp_path / f"{name}-{fail_at}")
            done = 0

            def dying(*args, name=name, fail_at=fail_at):
                nonlocal done
                done += 1
                if done > fail_at:
                    raise KilledError
                return real[name](*args)

            run = make_updater(folders)
            monkeypatch.setattr(os, name, dying)
            with pytest.raises(KilledError):
                run.run()
            monkeypatch.undo()
            for path in folders.root.rglob("*.json"):
                json.loads(path.read_text(encoding="utf-8"))  # whole, whatever happened
            assert {*tree(folders.root)} <= {*expected}
            make_updater(folders).run()
            assert tree(folders.root) == expected, f"{name} {fail_at}"


def test_resumable_after_a_real_kill_and_no_temporary_names_stay(
    server, folders, clock, make_updater, expected, tmp_path
):
    server.play(Fault("hang", at=(5,), seconds=30))
    code = textwrap.dedent(f"""
        from pathlib import Path
        from latentcot.catalog.feed_server.trial import FakeClock, PlainScorer, small_queries
        from latentcot.catalog.queue_store import Folders
        from latentcot.catalog.update.cache import PageCache, one_run
        from latentcot.catalog.update.client import FeedClient
        from latentcot.catalog.update.updater import Updater
        clock, folders = FakeClock(), Folders(Path({str(folders.root)!r}))
        with one_run(folders.cache):
            client = FeedClient({server.url!r}, clock=clock, cache=PageCache(folders.cache, clock))
            Updater(folders, client, small_queries(), PlainScorer()).run()
    """)
    child = subprocess.Popen([sys.executable, "-c", code])
    deadline = time.monotonic() + 60
    while len(server.log) < 6 and time.monotonic() < deadline:
        time.sleep(0.02)
    child.send_signal(signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL
    assert len(server.log) == 6
    # A write that was cut short leaves its temporary name; the next run removes it.
    (folders.queue / ".2602.00001.json.abc123").write_text("{", encoding="utf-8")
    with one_run(folders.cache):  # the lock died with its holder
        make_updater().run()
    assert tree(folders.root) == expected


def test_whatever_lies_in_the_cache_of_another_day_stops_nothing(folders, clock):
    pages = folders.cache / "pages"
    kept = pages / arxiv_day(clock.now())
    for place in (kept, pages / "2020-01-01" / "folder", pages / "2021-01-01"):
        place.mkdir(parents=True)
        (place / "stray.txt").write_text("x")
    (pages / "2022-01-01").write_text("a file")
    PageCache(folders.cache, clock).remove_old()
    assert [path.name for path in pages.iterdir()] == [kept.name]
    assert (kept / "stray.txt").is_file()


def test_two_runs_at_the_same_time_are_refused(folders):
    with one_run(folders.cache), pytest.raises(CatalogError, match="one connection at a time"), one_run(folders.cache):
        pass


@pytest.mark.parametrize(
    ("fault", "outcome"),
    [
        (Fault("status", status=500, times=None), Outcome.FAILED),
        (Fault("status", status=403), Outcome.FAILED),
        (Fault("error", status=400, times=None), Outcome.FAILED),
        (Fault("error", status=200, times=None), Outcome.FAILED),
        (Fault("empty", start=3, times=None), Outcome.PARTIAL),
        (Fault("total", count=2, times=None), Outcome.FAILED),
        (Fault("total", count=-2, times=None), Outcome.PARTIAL),
        (Fault("status", status=429, start=3, times=None), Outcome.PARTIAL),
        (Fault("close", start=3, times=None), Outcome.PARTIAL),
    ],
    ids=lambda value: f"{value.kind}{value.status}{value.count}" if isinstance(value, Fault) else "",
)
def test_watermark_safety_what_was_not_read_to_the_end_is_read_again(
    fault, outcome, make_updater, server, folders, expected
):
    """A run that fails leaves the watermark behind what it has not read, and the next good run ends as if nothing had been."""
    server.play(fault)
    report = make_updater().run()
    assert report.outcome is outcome, markdown(report)
    marks = {name: mark.until for name, mark in read_watermarks(folders.watermarks).items()}
    assert all(until <= "2026-01-31T00:00:00Z" for until in marks.values()), marks
    assert "incomplete" in markdown(report)
    server.clear()
    make_updater().run()
    assert tree(folders.root) == expected


def test_late_arrivals_are_found_by_the_overlap(make_updater, server, folders, clock):
    make_updater().run()
    late = paper("2602.07777", "Latent reasoning that moderation kept", "2026-02-08T12:00", categories=("cs.LG",))
    server.add(late)
    newer = paper("2602.08888", "Latent thought after that", "2026-02-20T12:00", categories=("cs.LG",))
    server.add(newer)
    clock.sleep(3 * 24 * 3600)
    assert {item.key for item in make_updater().run().new} == {"2602.07777", "2602.08888"}
    # The watermark stands at 20 February now. A paper submitted 12 days before and announced today is still found.
    twelve_days = paper("2602.09999", "Latent reasoning held back", "2026-02-08T13:00", categories=("cs.LG",))
    server.add(twelve_days)
    clock.sleep(24 * 3600)
    report = make_updater().run()
    assert [item.key for item in report.new] == ["2602.09999"]
    assert read_watermarks(folders.watermarks)["latent"].until == "2026-02-20T12:00:00Z"


def test_diff_friendly_one_new_paper_is_one_new_file_and_the_watermarks(make_updater, server, folders, clock):
    make_updater().run()
    before = tree(folders.root)
    server.add(paper("2602.04444", "Latent reasoning by one paper", "2026-02-18T01:00", categories=("cs.CL",)))
    clock.sleep(24 * 3600)
    make_updater().run()
    after = tree(folders.root)
    assert {name for name in after if after[name] != before.get(name)} == {"queue/2602.04444.json", "watermarks.json"}
    assert set(before) <= set(after)


@pytest.mark.parametrize(
    "faults",
    [
        [Fault("empty", start=3, times=4)],
        [Fault("empty", at=(2, 3), times=2)],
        [Fault("short", count=1, times=5)],
        [Fault("status", status=500, start=3, size=3, times=None)],
        [Fault("damaged", start=0, size=3, times=None)],
        [Fault("total", count=40, at=(2,))],
        [Fault("total", count=-4, at=(2,))],
    ],
    ids=[
        "empty-page",
        "empty-first-page",
        "short-pages",
        "one-pair-fails",
        "pair-damaged",
        "total-high-once",
        "total-low-once",
    ],
)
def test_trouble_on_the_way_changes_nothing_in_the_end(faults, make_updater, server, folders, expected):
    server.play(*faults)
    report = make_updater(budget=400).run()
    assert report.outcome is Outcome.NEW, markdown(report)
    assert tree(folders.root) == expected


def test_one_damaged_entry_is_found_and_the_rest_of_the_catalog_is_read(make_updater, server, folders, expected):
    """A page that never becomes readable is cut down; what stands before it and in other queries comes in, and the run says partial."""
    server.play(
        *(Fault("damaged", start=2, size=size, times=None) for size in (1, 2, 3)),
        Fault("damaged", start=0, size=3, times=None),
    )
    report = make_updater(budget=400).run()
    assert report.outcome is Outcome.PARTIAL
    assert "not well-formed" in markdown(report)
    assert {"2602.00001", "2602.00002"} <= set(read_queue(folders))
    server.clear()
    make_updater(budget=400).run()
    assert tree(folders.root) == expected


def test_empty_windows_ask_a_busy_category(make_updater, server, folders, clock):
    server.corpus.papers = busy_papers()
    report = make_updater().run()
    assert report.outcome is Outcome.NOTHING_NEW
    assert all(
        seen.parameters["max_results"] == "1"
        for seen in server.log
        if seen.parameters["search_query"].startswith("cat:cs.LG AND")
    )
    server.corpus.papers = []  # a bad hour: nothing at all, on a Wednesday
    clock.sleep(24 * 3600)
    before = tree(folders.root)
    report = make_updater().run()
    assert report.outcome is Outcome.FAILED
    assert "both empty" in markdown(report)
    assert tree(folders.root) == before
    clock.sleep(3 * 24 * 3600)  # on a Sunday it is not certain that anything is wrong
    report = make_updater().run()
    assert report.failed is None
    assert report.queries[0].problem


def test_entries_outside_the_window_and_from_the_future_are_left_out(make_updater, server, folders, monkeypatch):
    stray = paper("2602.06666", "Latent reasoning of the future", "2099-01-01", categories=("cs.LG", "cs.CL"))
    real = server.corpus.search
    monkeypatch.setattr(
        server.corpus, "search", lambda query, now: [*real(query, now), *([stray] if "latent" in query else [])]
    )
    report = make_updater().run()
    assert "2602.06666" not in read_queue(folders)
    assert "outside the window" in markdown(report)
    assert read_watermarks(folders.watermarks)["latent"].until == "2026-02-09T07:30:00Z"


def test_known_papers_are_not_proposed(make_updater, server, folders):
    coconut = find("2412.06769")
    assert coconut is not None
    server.add(
        paper("2412.06769", "Latent thought, another title", "2026-02-10", categories=("cs.CL",)),
        paper(
            "2602.01111",
            coconut.title,
            "2026-02-10",
            categories=("cs.CL",),
            authors=("Shibo Hao",),
            abstract="latent reasoning",
        ),
    )
    report = make_updater().run()
    queue = read_queue(folders)
    assert "2412.06769" not in queue
    assert report.known >= 1
    # An equal title under another arXiv id is a person's question.
    assert queue["2602.01111"].near[0].key == "2412.06769"
    assert "two arXiv ids" in queue["2602.01111"].near[0].rule
    assert "2602.01111" in markdown(report)


def test_a_paper_known_under_another_identifier_is_reported_not_queued(make_updater, server, folders):
    record = find("openreview-9Pba4rcQbE")
    assert record is not None
    known = record.model_copy(update={"ids": record.ids.model_copy(update={"doi": "10.1000/latent.1"})})
    from latentcot.catalog.store import write_record

    write_record(known, folders.papers)
    version = Version(datetime(2026, 2, 11, tzinfo=UTC), "Latent reasoning, published", doi="10.1000/LATENT.1")
    server.add(paper("2602.03333", "x", "2026-02-11", categories=("cs.CL",)).__class__("2602.03333", (version,)))
    report = make_updater().run()
    assert "2602.03333" not in read_queue(folders)
    assert report.other_ids[0][1].key == "openreview-9Pba4rcQbE"
    assert "`2602.03333` is `openreview-9Pba4rcQbE`" in markdown(report)


def test_below_the_threshold_nothing_is_queued(make_updater, server, folders):
    server.add(paper("2602.05555", "Loops in knitting", "2026-02-11", categories=("cs.LG",)))
    report = make_updater().run()
    assert "2602.05555" not in read_queue(folders)
    assert report.below == 1


def test_a_rejected_paper_comes_back_only_with_another_title_or_category(make_updater, server, folders, clock):
    make_updater().run()
    candidate = read_candidate(folders, "2602.00001")
    assert candidate is not None
    reject(Folders(folders.root), candidate, reason="off-topic", by="Ada", date="2026-02-18")
    report = make_updater(fresh=True).run()
    assert report.outcome is Outcome.NOTHING_NEW
    assert report.rejected == 1
    old = next(item for item in server.corpus.papers if item.base == "2602.00001")
    server.add(old.revised(Version(datetime(2026, 2, 18, tzinfo=UTC), old.versions[0].title.upper(), "new abstract")))
    assert make_updater(fresh=True).run().outcome is Outcome.NOTHING_NEW  # another version, the same title
    server.add(old.revised(Version(datetime(2026, 2, 18, tzinfo=UTC), "Latent reasoning after all")))
    report = make_updater(fresh=True).run()
    assert [item.key for item in report.new] == ["2602.00001"]
    assert "rejected on 2026-02-18" in (report.new[0].again or "")
    assert make_updater(fresh=True).run().outcome is Outcome.NOTHING_NEW


@pytest.mark.parametrize("verdict", ["accepted", "rejected"])
def test_what_a_curator_decides_while_the_feed_is_read_stays_decided(verdict, make_updater, folders, monkeypatch):
    """2602.00002 is found by both queries; between them somebody judges it."""
    run = make_updater()
    real = run.client.page

    def page(parameters, **rest):
        candidate = read_candidate(folders, "2602.00002")
        if "cs.CL" not in parameters["search_query"] and candidate is not None:
            curator = Folders(folders.root)
            if verdict == "accepted":
                accept(curator, candidate, leaf="vertical/feedback", by="Ada", date="2026-02-18")
            else:
                reject(curator, candidate, reason="off-topic", by="Ada", date="2026-02-18")
        return real(parameters, **rest)

    monkeypatch.setattr(run.client, "page", page)
    run.run()
    assert "2602.00002" not in read_queue(folders)
    assert len(read_queue(folders)) == 7
    assert check_catalog(folders.papers).problems == []


def test_a_new_version_of_a_candidate_updates_it_and_an_old_one_does_not(make_updater, server, folders):
    make_updater().run()
    old = next(item for item in server.corpus.papers if item.base == "2602.00001")
    server.add(old.revised(Version(datetime(2026, 2, 18, tzinfo=UTC), "Latent thought, retitled", "x")))
    report = make_updater(fresh=True).run()
    assert report.outcome is Outcome.NOTHING_NEW
    assert report.changed == ["2602.00001"]
    found = read_candidate(folders, "2602.00001")
    assert found is not None
    assert (found.version, found.title) == (2, "Latent thought, retitled")
    server.add(old)  # a replica that lags behind
    make_updater(fresh=True).run()
    assert read_candidate(folders, "2602.00001") == found


def test_a_changed_query_is_read_from_the_beginning(make_updater, server, folders):
    make_updater().run()
    wider = small_queries(
        queries=[
            {
                "name": "latent",
                "categories": ["cs.LG"],
                "phrases": ["latent reasoning", "latent thought", "latent weather"],
            }
        ]
    )
    server.add(paper("2602.02222", "Latent weather", "2026-01-20", categories=("cs.LG",)))
    report = make_updater(queries=wider).run()
    assert [item.key for item in report.new] == ["2602.02222"]
    assert "has changed" in markdown(report)


def test_a_large_window_is_cut_in_two(make_updater, server, folders, expected):
    report = make_updater(queries=small_queries(largest_window=2)).run()
    assert report.outcome is Outcome.NEW
    assert tree(folders.root) == expected
    windows = {seen.parameters["search_query"].rpartition("submittedDate")[2] for seen in server.log}
    assert len(windows) > 6


def test_a_dry_run_writes_nothing(make_updater, folders):
    before = tree(folders.root)
    report = make_updater(dry_run=True).run()
    assert len(report.new) == 8
    assert tree(folders.root) == before


def test_prefilled_only_above_the_high_threshold_and_never_decided(make_updater, folders):
    make_updater(queries=small_queries(prefill_threshold=0.8)).run()
    assert all(candidate.prefilled for candidate in read_queue(folders).values())
    assert not folders.decisions.exists()


def test_slices_do_not_depend_on_where_reading_begins():
    config = small_queries()
    now = datetime(2026, 11, 29, 6, tzinfo=UTC)
    first = slices_of(config.start, now, config)
    assert first[0].start == config.start - timedelta(days=14)
    assert first[-1].end == datetime(2026, 11, 29, 23, 59, tzinfo=UTC)
    for until in (config.start, datetime(2026, 5, 5, 7, tzinfo=UTC), now):
        found = slices_of(until, now, config)
        assert all(b.start - a.end == timedelta(minutes=1) for a, b in pairwise(found))
        assert found[0].start <= until - timedelta(days=14)
        assert found[-1].end - found[-1].start >= timedelta(days=14)
        assert {w for w in found[1:]} <= set(first)


def test_a_watermark_in_the_future_fails_loudly(make_updater, clock):
    make_updater().run()
    clock._start -= timedelta(days=60)
    report = make_updater().run()
    assert report.outcome is Outcome.FAILED
    assert "is the clock right?" in markdown(report)


def test_only_named_queries_and_a_wrong_name(make_updater):
    assert [line.name for line in make_updater().run(["loops"]).queries] == ["loops"]
    with pytest.raises(CatalogError, match="no query is called 'nothing'; there are latent, loops"):
        make_updater().run(["nothing"])


def test_the_summary_is_the_same_for_the_same_findings_and_makes_text_harmless(make_updater, server, tmp_path):
    one = markdown(make_updater(small_catalog(tmp_path / "one")).run())
    two = markdown(make_updater(small_catalog(tmp_path / "two"), fresh=True).run())
    assert one == two
    assert one.startswith("# Catalog update: 8 new candidates")
    for text in (
        "<script>",
        "[x](javascript:y)",
        "@someone",
        "#12",
        "https://a.b",
        "| a |",
        "`x`",
        "![x](y)",
        "&lt;b&gt;",
    ):
        safe = harmless(text)
        assert not set("<>[]`|#!") & set(safe.replace("&#", ""))
        assert "@s" not in safe
        assert "://a" not in safe


def test_the_queries_that_ship_are_sound_and_understood(clock):
    from latentcot.catalog.feed_server.corpus import parse_query
    from latentcot.catalog.update.queries import load_queries

    config = load_queries()
    coconut = paper("2412.06769", "Training Large Language Models to Reason in a Continuous Latent Space", "2024-12-09")
    assert any(parse_query(query.text)(coconut) for query in config.queries)
    # arXiv takes addresses of some thousand characters; a POST would be needed beyond.
    assert all(len(query.text) < 3000 for query in config.queries)
    assert updater_module.SATURDAY == 5
