"""Politeness and patience: gaps, budget, waits, and when a server is left alone. Against the local feed server."""

from itertools import pairwise

import pytest

from latentcot.catalog.feed_server import Fault
from latentcot.catalog.feed_server.trial import (
    tree,
)
from latentcot.catalog.store import CatalogError
from latentcot.catalog.update.cache import PageCache
from latentcot.catalog.update.client import FeedClient, Politeness, StoppedError
from latentcot.catalog.update.report import Outcome
from latentcot.catalog.update.summary import markdown

pytestmark = pytest.mark.allow_hosts(["127.0.0.1"])


def test_polite_gaps_one_connection_and_a_descriptive_agent(make_updater, server, clock):
    server.play(Fault("short", at=(2,), count=1), Fault("empty", at=(4,)), Fault("status", status=503, at=(6,)))
    run = make_updater()
    run.run()
    times = [seen.at for seen in server.log]
    gaps = [later - earlier for earlier, later in pairwise(times)]
    histogram = {edge: sum(1 for gap in gaps if edge <= gap < edge * 10) for edge in (0.003, 0.03, 0.3, 3, 30)}
    assert len(gaps) > 10
    assert sum(histogram[edge] for edge in (0.003, 0.03, 0.3)) == 0
    assert min(gaps) >= 3.0
    assert histogram[3] + histogram[30] == len(gaps)
    assert server.most_at_once == 1
    assert run.client.log.gaps() == gaps
    assert all("latentcot/" in seen.headers["User-Agent"] for seen in server.log)
    assert all(seen.parameters["sortOrder"] == "ascending" for seen in server.log)


def test_polite_across_runs_restarting_is_no_way_around_the_gap(make_updater, server, clock):
    make_updater().run()
    times = len(server.log)
    make_updater(fresh=True).run()
    assert server.log[times].at - server.log[times - 1].at >= 3.0


def test_polite_a_run_has_a_budget_and_a_later_one_goes_on(make_updater, server, folders, expected):
    report = make_updater(budget=4).run()
    assert report.outcome is Outcome.PARTIAL
    assert len(server.log) == 4
    assert "budget of 4 requests is spent" in markdown(report)
    for _ in range(6):
        before = len(server.log)
        report = make_updater(budget=4).run()
        assert len(server.log) - before <= 4
        if report.outcome in (Outcome.NOTHING_NEW, Outcome.NEW):
            break
    assert tree(folders.root) == expected


def test_polite_a_contact_is_needed_for_any_other_machine(clock, folders):
    cache = PageCache(folders.cache, clock)
    with pytest.raises(CatalogError, match="asks for a contact"):
        FeedClient("https://export.arxiv.org/api/query", clock=clock, cache=cache)
    client = FeedClient("https://export.arxiv.org/api/query", clock=clock, cache=cache, contact="ada@example.org")
    assert "mailto:ada@example.org" in client._headers["User-Agent"]
    for bad in ("ada", "ada@example.org\r\nX: y", "", "ada bo@example.org"):
        with pytest.raises(CatalogError, match="expects a mail address"):
            FeedClient("https://export.arxiv.org/api/query", clock=clock, cache=cache, contact=bad)
    with pytest.raises(CatalogError, match="at least 3 s, given 1"):
        FeedClient("https://a.org/q", clock=clock, cache=cache, contact="a@b.org", politeness=Politeness(gap=1))


@pytest.mark.parametrize(
    ("fault", "waits"),
    [
        (Fault("status", status=503, retry_after="7"), [7.0]),
        (Fault("status", status=429, retry_after="Wed, 18 Feb 2026 06:02:00 GMT"), [120.0]),
        (Fault("status", status=503, times=2), [(30, 45), (60, 90)]),
        (Fault("status", status=429, retry_after="soon"), [(30, 45)]),
        (Fault("hang", seconds=1.5), [(30, 45)]),
        (Fault("close"), [(30, 45)]),
        (Fault("cut"), [(30, 45)]),
        (Fault("damaged"), [(30, 45)]),
    ],
    ids=lambda value: f"{value.kind}-{value.retry_after}-{value.times}" if isinstance(value, Fault) else "",
)
def test_patient_retry_after_is_honoured_else_waits_grow(fault, waits, make_client, server, clock):
    server.play(fault)
    client = make_client(read_timeout=0.5 if fault.kind == "hang" else 20.0)
    page = client.page({"search_query": "cat:cs.LG", "start": 0, "max_results": 2})
    assert page.arrived == 2
    long = [seconds for seconds in clock.slept if seconds > 3]
    assert len(long) == len(waits) + (fault.status == 429 and fault.kind == "status" and long[-1] == 15.0)
    for seconds, wanted in zip(long, waits, strict=False):
        if isinstance(wanted, tuple):
            assert wanted[0] <= seconds <= wanted[1]
        else:
            assert seconds == pytest.approx(wanted, abs=0.01)


def test_patient_after_a_429_the_gaps_are_15_seconds(make_client, server):
    server.play(Fault("status", status=429, retry_after="1"))
    client = make_client()
    for start in (0, 2, 4):
        client.page({"search_query": "cat:cs.LG", "start": start, "max_results": 2})
    assert client.log.gaps()[0] >= 3
    assert min(client.log.gaps()[1:]) >= 15


def test_a_server_that_asks_for_hours_ends_the_run(make_updater, server):
    server.play(Fault("status", status=429, retry_after="7200"))
    report = make_updater().run()
    assert report.outcome is Outcome.FAILED
    assert "asks to wait 7200 s" in markdown(report)
    assert len(server.log) == 1


def test_a_server_that_keeps_saying_no_is_left_alone(make_updater, server):
    server.play(Fault("status", status=429, retry_after="1", times=None))
    report = make_updater(attempts=20).run()
    assert report.outcome is Outcome.FAILED
    assert len(server.log) == 8
    server.clear()
    server.play(Fault("status", status=406))
    assert make_updater().run().outcome is Outcome.FAILED
    assert len(server.log) == 1
    server.clear()
    server.play(Fault("redirect"))
    report = make_updater().run()
    assert "has changed" in markdown(report)
    assert len(server.log) == 1


def test_a_server_that_does_not_answer_is_not_asked_a_hundred_times(make_updater, server, clock):
    server.play(Fault("close", times=None))
    report = make_updater().run()
    assert report.outcome is Outcome.FAILED
    assert len(server.log) == 5
    assert "the server does not answer" in markdown(report)
    assert [line.name for line in report.queries] == ["latent", "loops"]
    server.clear()
    server.play(Fault("status", status=500, times=None))
    report = make_updater().run()
    assert report.outcome is Outcome.FAILED
    assert len(server.log) == 12
    assert "12 requests in a row brought nothing" in markdown(report)


def test_errors_of_the_network_are_told_in_a_few_words(make_client):
    client = make_client(url="http://127.0.0.1:9/api/query", attempts=1)
    with pytest.raises(StoppedError) as caught:
        client.page({"search_query": "x" * 500, "start": 0, "max_results": 2})
    assert len(str(caught.value)) < 150
    assert "127.0.0.1:9" in str(caught.value)
    assert "search_query" not in str(caught.value)


def test_an_answer_that_drips_or_never_ends_is_cut_off(make_client, server, clock):
    ticks = iter(range(10**9))
    clock.monotonic = lambda: float(next(ticks))  # every look at the clock is a second later
    server.play(Fault("drip", seconds=0.0, times=None))
    client = make_client(attempts=1, answer_timeout=3.0, gap=0.0)
    with pytest.raises(Exception, match="took longer than 3 s"):
        client.page({"search_query": "cat:cs.LG", "start": 0, "max_results": 50})
    server.clear()
    client = make_client(attempts=1, max_bytes=100, gap=0.0)
    with pytest.raises(Exception, match="longer than 100 bytes"):
        client.page({"search_query": "cat:cs.LG", "start": 0, "max_results": 50})
