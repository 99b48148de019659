"""Venues, code and links: what counts as a claim, who may overwrite whom, and that no enricher stops anything."""

import json
from datetime import UTC, date, datetime
from itertools import pairwise
from typing import Any

import pytest

from latentcot.catalog import get
from latentcot.catalog.enrich import runner
from latentcot.catalog.enrich.arxiv import merge_entry
from latentcot.catalog.enrich.code import enrich_code
from latentcot.catalog.enrich.comments import (
    code_addresses,
    is_withdrawn,
    repository,
    venue_in_comment,
    venue_in_reference,
)
from latentcot.catalog.enrich.health import Failure, due, look_at, read_health, write_health
from latentcot.catalog.enrich.precedence import ARXIV, PERSON, PUBLISHER, TRACKER, may_replace
from latentcot.catalog.enrich.runner import EnrichReport, isolated, run_code, run_health
from latentcot.catalog.enrich.web import SpentError, Web, WebError, public_host
from latentcot.catalog.feed_server import Page
from latentcot.catalog.feed_server.trial import tree
from latentcot.catalog.record import Link, Provenance, Record, dump_record
from latentcot.catalog.store import parse_record, write_record
from latentcot.catalog.update.atom import Entry

LIST = "multimodal-art-projection/LatentCoT-Horizon"
COCONUT = get("2412.06769")


@pytest.mark.parametrize(
    ("comment", "name", "year", "track"),
    [
        ("Accepted at ICLR 2026", "ICLR", 2026, None),
        ("Accepted to NeurIPS'25, 30 pages", "NeurIPS", 2025, None),
        ("To appear in ACL 2025 Findings", "ACL", 2025, "findings"),
        ("camera-ready for EMNLP 2025 (main)", "EMNLP", 2025, "main"),
        ("12 pages. Accepted as a spotlight at the ICML 2025 workshop on tokens", "ICML", 2025, "workshop"),
        ("Published in Transactions; accepted to TMLR 2025", "TMLR", 2025, None),
        ("accepted by NIPS 2017", "NeurIPS", 2017, None),
    ],
)
def test_comments_that_state_acceptance(comment, name, year, track):
    found = venue_in_comment(comment, ARXIV)
    assert found is not None
    venue = found.venue
    assert (venue.name, venue.year, venue.track, venue.status, found.confidence) == (
        name,
        year,
        track,
        "accepted",
        "medium",
    )
    assert (venue.type == "workshop") == (track == "workshop")


@pytest.mark.parametrize(
    "comment",
    [
        None,
        "",
        "Submitted to ICLR 2026",
        "Under review at NeurIPS 2025",
        "ICLR 2026",
        "Accepted to a journal of ours, 2025",
        "Accepted at ICLR",
        "Rejected from ICML 2025, accepted nowhere",
        "Accepted to ICLR 2026; accepted to ICML 2026",
        "extended version of a paper accepted at AAAI 2024",
        "We were accepted in 2025 and like logics",
        "Accepted to Iclrish 2025",
    ],
)
def test_comments_that_state_none(comment):
    assert venue_in_comment(comment, ARXIV) is None


def test_journal_references():
    found = venue_in_reference("Neural Computation 37 (2025) 12-40", ARXIV)
    assert found is not None
    assert (found.venue.name, found.venue.year, found.venue.status, found.confidence) == (
        "Neural Computation",
        2025,
        "published",
        "high",
    )
    assert venue_in_reference("Journal of Unheard Results 3 (2025)", ARXIV) is None
    assert venue_in_reference("Proceedings of ICLR or ICML 2025", ARXIV) is None


@pytest.mark.parametrize(
    ("comment", "expected"),
    [
        ("This paper has been withdrawn by the authors due to an error in Lemma 2", True),
        ("Withdrawn", True),
        ("withdrawn by arXiv administrators due to plagiarism", True),
        ("We withdraw this paper", True),
        ("The submission was withdrawn from arXiv", True),
        ("Withdrawn from ICLR 2025, now at ICML 2025", False),
        ("This paper was withdrawn from the workshop", False),
        ("on money withdrawn at machines", False),
        (None, False),
    ],
)
def test_withdrawals(comment, expected):
    assert is_withdrawn(comment) is expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Code at https://github.com/okafor/thought.", ["https://github.com/okafor/thought"]),
        ("https://github.com/a/b/tree/main/c and (github.com/a/b.git)", ["https://github.com/a/b"]),
        ("https://github.com/a https://github.com/topics/x https://example.org/a/b", []),
        ("http://gitlab.com/x/y, https://github.com/../z", ["https://gitlab.com/x/y"]),
        ("https://github.com/a/<script>", []),
        ("https://evil.example/github.com/a/b https://[::1", []),
        (None, []),
    ],
)
def test_addresses_of_code(text, expected):
    assert code_addresses(text) == expected


def test_repositories():
    assert repository("https://www.github.com/A/b.git#readme") == "https://github.com/A/b"
    assert repository("javascript:alert(1)") is None


def provenance(source: str, confidence: str = "high", day: str = "2026-01-01") -> Provenance:
    return Provenance.model_validate({"source": source, "date": day, "confidence": confidence})


def test_precedence_a_person_always_wins_and_the_weaker_never_overwrites():
    order = [TRACKER, LIST, PUBLISHER, ARXIV, PERSON]
    for weak, one in enumerate(order):
        for strong, other in enumerate(order):
            replaced = may_replace(provenance(one), provenance(other), known=True)
            assert replaced is (strong >= weak), (one, other)
            if one == PERSON and other != PERSON:
                assert not may_replace(provenance(one), provenance(other), known=False)  # a person's null too
    assert may_replace(provenance(LIST), provenance(TRACKER), known=False)
    assert not may_replace(None, provenance(ARXIV), known=True)
    assert may_replace(provenance(f"{PERSON}:Ada"), provenance(PERSON), known=True)
    assert not may_replace(provenance(LIST, "medium"), provenance("another/list", "low"), known=True)
    assert may_replace(provenance(LIST, "low"), provenance("another/list", "high"), known=True)


def entry(**changes: Any) -> Entry:
    values: dict[str, Any] = {
        "base": "2412.06769",
        "version": 3,
        "title": COCONUT.title,
        "abstract": "We think. https://github.com/a/b",
        "authors": ("Shibo Hao", "Sainbayar Sukhbaatar"),
        "published": datetime(2024, 12, 9, 18, tzinfo=UTC),
        "updated": datetime(2025, 11, 3, 4, tzinfo=UTC),
        "primary_category": "cs.CL",
        "categories": ("cs.CL",),
    }
    return Entry(**{**values, **changes})


def test_merging_fills_in_what_was_not_known_with_provenance():
    merge = merge_entry(COCONUT, entry(), set())
    found = merge.record
    assert found.published is not None
    assert (found.published.value, found.published.precision, found.version) == ("2024-12-09", "day", 3)
    assert found.categories == ["cs.CL"]
    assert found.author_names == ["Shibo Hao", "Sainbayar Sukhbaatar"]
    for name in ("published", "version", "authors"):
        assert found.provenance[name] == Provenance(source=ARXIV, date="2025-11-03", confidence="high")
    assert "https://github.com/a/b" in [link.url for link in found.links]
    assert found.citekey == COCONUT.citekey
    again = merge_entry(found, entry(), set())
    assert again.record == found
    assert again.changes == []
    assert merge_entry(found, entry(version=2, title="Old"), set()).record == found


def test_merging_keeps_both_titles_and_what_a_person_wrote():
    retitled = merge_entry(COCONUT, entry(title="Coconut, Retitled"), set()).record
    assert (retitled.title, retitled.other_titles[-1]) == ("Coconut, Retitled", COCONUT.title)
    back = merge_entry(retitled, entry(version=4), set()).record
    assert back.title == COCONUT.title
    assert "Coconut, Retitled" in back.other_titles
    assert COCONUT.title not in back.other_titles
    mine = COCONUT.model_copy(
        update={
            "title": "As I Write It",
            "provenance": COCONUT.provenance | {"title": provenance(PERSON), "authors": provenance(PERSON)},
            "authors": None,
        }
    )
    merge = merge_entry(mine, entry(), set())
    assert merge.record.title == "As I Write It"
    assert merge.record.authors is None
    assert any("As I Write It is kept" in text for text in merge.conflicts)


def test_merging_withdrawals_and_superseded_papers():
    gone = merge_entry(COCONUT, entry(comment="This paper has been withdrawn"), set()).record
    assert gone.status == "withdrawn"
    assert merge_entry(gone, entry(version=4), set()).record.status == "active"
    old = COCONUT.model_copy(update={"status": "superseded", "superseded_by": "2402.07754"})
    assert merge_entry(old, entry(comment="withdrawn"), set()).record.status == "superseded"


def test_merging_venues():
    bare = COCONUT.model_copy(
        update={"venue": None, "provenance": {k: v for k, v in COCONUT.provenance.items() if k != "venue"}}
    )
    first = merge_entry(bare, entry(comment="Accepted at COLM 2025"), set()).record
    assert first.venue is not None
    assert (first.venue.name, first.provenance["venue"].confidence) == ("COLM", "medium")
    other = merge_entry(first, entry(version=4, comment="Accepted at ICML 2025"), set())
    assert other.record.venue == first.venue
    assert "COLM 2025 is kept" in other.conflicts[0]
    printed = merge_entry(first, entry(version=4, journal_ref="Proceedings of COLM 2025"), set()).record
    assert printed.venue is not None
    assert printed.venue.status == "published"
    person = first.model_copy(update={"venue": None, "provenance": first.provenance | {"venue": provenance(PERSON)}})
    assert merge_entry(person, entry(comment="Accepted at COLM 2025"), set()).record.venue is None


def test_a_nicer_citation_key_becomes_an_alias():
    anonymous = COCONUT.model_copy(
        update={"authors": None, "citekey": "arxiv_2412_06769", "citekey_aliases": [], "provenance": {}}
    )
    found = merge_entry(anonymous, entry(), set()).record
    assert (found.citekey, found.citekey_aliases) == ("arxiv_2412_06769", ["Hao2024Training"])
    assert merge_entry(anonymous, entry(), {"hao2024training"}).record.citekey_aliases == []
    assert merge_entry(found, entry(), set()).record == found


@pytest.fixture
def web(server, clock) -> Web:
    return Web("test", clock, may_ask=lambda host: host == "127.0.0.1")


def with_links(*links: Link) -> Record:
    return COCONUT.model_copy(update={"links": list(links)})


def code(url: str, official: bool | None = None) -> Link:
    return Link(kind="code", url=url, official=official, source=LIST, checked=None)


@pytest.mark.allow_hosts(["127.0.0.1"])
def test_code_is_official_only_where_the_readme_names_the_paper(server, web):
    where = {"api": f"{server.root}/papers", "readmes": server.root}
    server.pages["/papers/2412.06769"] = Page(
        200, json.dumps({"githubRepo": "https://github.com/someone/coconut"}).encode()
    )
    found = enrich_code(with_links(), web, "2026-02-18", **where)
    assert [(link.url, link.official, link.source) for link in found.links] == [
        ("https://github.com/someone/coconut", None, TRACKER)
    ]
    server.pages["/someone/coconut/HEAD/README.md"] = Page(200, b"A reimplementation of something")
    assert enrich_code(found, web, "2026-02-18", **where) == found
    server.pages["/someone/coconut/HEAD/README.md"] = Page(200, f"# {COCONUT.title.upper()}\n".encode())
    confirmed = enrich_code(found, web, "2026-02-18", **where)
    assert confirmed.links[0].official is True
    assert confirmed.provenance["links"].source == "README of the repository"
    assert enrich_code(confirmed, web, "2026-03-01", **where) == confirmed
    by_id = with_links(code("https://github.com/x/y"))
    server.pages["/x/y/HEAD/readme.md"] = Page(200, b"see arxiv.org/abs/2412.06769")
    assert enrich_code(by_id, web, "2026-02-18", **where).links[0].official is True
    theirs = with_links(code("https://github.com/x/y", official=False))
    assert enrich_code(theirs, web, "2026-02-18", **where) == theirs
    person = by_id.model_copy(update={"provenance": {"links": provenance(PERSON)}})
    assert enrich_code(person, web, "2026-02-18", **where) == person


@pytest.mark.allow_hosts(["127.0.0.1"])
@pytest.mark.parametrize(
    "body",
    [
        b"[]",
        b'{"githubRepo": 3}',
        b'{"githubRepo": "javascript:x"}',
        b'{"githubRepo": "https://evil.example/a/b"}',
    ],
)
def test_a_tracker_that_talks_nonsense_adds_nothing(body, server, web):
    server.pages["/papers/2412.06769"] = Page(200, body)
    record = with_links()
    assert enrich_code(record, web, "2026-02-18", api=f"{server.root}/papers", readmes=server.root) == record
    server.pages["/papers/2412.06769"] = Page(200, b"no json")
    with pytest.raises(WebError, match="no JSON"):
        enrich_code(record, web, "2026-02-18", api=f"{server.root}/papers", readmes=server.root)


@pytest.mark.allow_hosts(["127.0.0.1"])
def test_isolation_a_failing_enricher_stops_nothing(folders, server, web, monkeypatch):
    report = EnrichReport()
    records = folders.records()
    monkeypatch.setattr(runner, "enrich_code", lambda *args, **kwargs: 1 / 0)
    run_code(folders, records * 4, web, report, "2026-02-18")
    assert "gave up after 5 failures" in report.problems[-1]
    isolated("code", report, lambda: 1 / 0)  # type: ignore[arg-type, return-value]
    assert report.problems[-1] == "code: ZeroDivisionError: division by zero"
    with pytest.raises(KeyboardInterrupt):
        isolated("code", report, lambda: (_ for _ in ()).throw(KeyboardInterrupt()))
    monkeypatch.setattr(runner, "look_at", lambda *args, **kwargs: 1 / 0)
    run_health(folders, records, web, report, date(2026, 2, 18), everything=True)
    assert "ZeroDivisionError" in report.problems[-1]


@pytest.mark.allow_hosts(["127.0.0.1"])
def test_run_code_writes_and_leaves_what_was_edited_meanwhile(folders, server, web):
    record = with_links()
    write_record(record, folders.papers)
    server.pages["/papers/2412.06769"] = Page(200, b'{"githubRepo": "https://github.com/someone/coconut"}')
    report = EnrichReport()
    where = {"api": f"{server.root}/papers", "readmes": server.root}
    run_code(folders, [record], web, report, "2026-02-18", **where)
    assert report.changed == ["2412.06769"]
    path = folders.record_file("2412.06769")
    assert path is not None
    found = parse_record(path.read_bytes(), "x")
    assert len(found.links) == 1
    assert path.read_bytes() == dump_record(found).encode()
    edited = found.model_copy(update={"note": "Mine."})
    write_record(edited, folders.papers)
    server.pages["/someone/coconut/HEAD/README.md"] = Page(200, b"2412.06769")
    run_code(folders, [found], web, report, "2026-02-18", **where)
    assert "was edited meanwhile" in report.problems[-1]
    assert parse_record(path.read_bytes(), "x") == edited


@pytest.mark.allow_hosts(["127.0.0.1"])
def test_links_are_dead_after_two_different_days_and_come_back(server, web, clock):
    url, table = f"{server.root}/page", {}
    archive = f"{server.root}/archive"
    copy = {"archived_snapshots": {"closest": {"available": True, "url": "http://web.archive.org/web/2020/x"}}}
    server.pages["/archive"] = Page(200, json.dumps(copy).encode())

    def look(day: str) -> Failure | None:
        look_at(url, table, web, day, archive=archive)
        return table.get(url)

    first = look("2026-02-18")
    assert first is not None
    assert not first.dead
    same_day = look("2026-02-18")
    assert same_day is not None
    assert not same_day.dead
    second = look("2026-02-19")
    assert second is not None
    assert second.dead
    assert second.archived == "http://web.archive.org/web/2020/x"
    server.pages["/page"] = Page(200, b"back", head_status=405)  # HEAD is not liked: GET decides
    assert look("2026-02-20") is None
    for status in (403, 429, 500, 503):
        server.pages["/page"] = Page(status)
        assert look("2026-02-21") is None, status
    server.pages["/page"] = Page(410)
    assert look("2026-02-22") is not None


@pytest.mark.allow_hosts(["127.0.0.1"])
def test_link_health_is_written_once_and_forgets_links_that_are_gone(folders, server, web):
    record = with_links(
        code(f"{server.root}/gone"),
        Link(kind="abs", url="https://arxiv.org/abs/2412.06769", official=True, source=LIST, checked=None),
    )
    for other in folders.records():
        write_record(other.model_copy(update={"links": []}), folders.papers)
    write_record(record, folders.papers)
    report, day = EnrichReport(), date(2026, 2, 18)
    run_health(folders, folders.records(), web, report, day, everything=True)
    assert report.looked_at == 1  # arXiv's own pages are not asked for
    before = tree(folders.root)
    run_health(folders, folders.records(), web, report, day, everything=True)
    assert tree(folders.root) == before
    assert list(read_health(folders)) == [f"{server.root}/gone"]
    write_record(record.model_copy(update={"links": []}), folders.papers)
    run_health(folders, folders.records(), web, report, day, everything=True)
    assert read_health(folders) == {}


@pytest.mark.allow_hosts(["127.0.0.1"])
def test_a_working_link_is_noted_in_its_record_once_in_ninety_days(folders, server, web):
    url = f"{server.root}/works"
    server.pages["/works"] = Page(200, b"here")
    for other in folders.records():
        write_record(other.model_copy(update={"links": []}), folders.papers)
    write_record(with_links(code(url)), folders.papers)

    def noted(day: str) -> str | None:
        run_health(folders, folders.records(), web, EnrichReport(), date.fromisoformat(day), everything=True)
        path = folders.record_file("2412.06769")
        assert path is not None
        return parse_record(path.read_bytes(), "x").links[0].checked

    assert noted("2026-01-01") == "2026-01-01"
    assert noted("2026-03-31") == "2026-01-01"
    assert noted("2026-04-01") == "2026-04-01"
    del server.pages["/works"]
    assert noted("2026-08-01") == "2026-04-01"
    assert not folders.health.read_text(encoding="utf-8").startswith("{}")


def test_every_link_has_its_turn_within_thirty_days():
    record = with_links(*(code(f"https://github.com/a/b{number}") for number in range(200)))
    turns = [due([record], {}, date.fromordinal(740000 + day)) for day in range(30)]
    assert sorted(url for urls in turns for url in urls) == sorted(link.url for link in record.links)
    failing = {"https://github.com/a/b7": Failure(failed=["2026-01-01"], reason="status 404", archived=None)}
    assert all("https://github.com/a/b7" in due([record], failing, date.fromordinal(740000 + day)) for day in range(30))


def test_an_empty_table_is_not_written(folders):
    assert write_health(folders, {}) is False
    assert not folders.health.exists()
    folders.health.write_text("[]", encoding="utf-8")
    with pytest.raises(ValueError, match="is no table of links"):
        read_health(folders)


@pytest.mark.allow_hosts(["127.0.0.1"])
def test_the_web_is_asked_politely_and_never_inside_the_local_network(server, web, clock):
    server.pages["/a"] = Page(200, b"hello")
    for _ in range(3):
        web.get(f"{server.root}/a")
    times = [seen.at for seen in server.log]
    assert min(later - earlier for earlier, later in pairwise(times)) >= web.gap
    strict = Web("test", clock)
    with pytest.raises(WebError, match="not on the public internet"):
        strict.get(f"{server.root}/a")
    for url in ("http://169.254.169.254/x", "http://10.0.0.1/", "http://[::1]/"):
        with pytest.raises(WebError, match="not on the public internet"):
            strict.get(url)
    for url in ("file:///etc/passwd", "ftp://a.b/c", "nothing"):
        with pytest.raises(WebError, match="no address of the web"):
            strict.get(url)
    web.budget = web.asked
    with pytest.raises(SpentError):
        web.get(f"{server.root}/a")
    assert public_host("127.0.0.1") is False
