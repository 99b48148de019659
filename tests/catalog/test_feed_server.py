"""The feed server speaks as arXiv does, misbehaves as told, and what it sends is read as data from a stranger."""

import time
from datetime import UTC, datetime
from typing import Any

import pytest
import requests

from latentcot.catalog.feed_server import (
    KINDS,
    Fault,
    FeedServer,
    Page,
    QueryError,
    Version,
    load_papers,
    paper,
    parse_fault,
)
from latentcot.catalog.feed_server.__main__ import main
from latentcot.catalog.feed_server.corpus import parse_query
from latentcot.catalog.feed_server.trial import FakeClock, busy_papers, sample_papers, tree
from latentcot.catalog.queue_store import read_queue
from latentcot.catalog.update.atom import DamagedFeedError, Entry, clean, parse_feed
from latentcot.catalog.update.report import Outcome
from latentcot.catalog.update.summary import markdown

pytestmark = pytest.mark.allow_hosts(["127.0.0.1"])

NOW = datetime(2026, 2, 18, 6, tzinfo=UTC)


def fetch(server: FeedServer, **parameters: Any) -> requests.Response:
    return requests.get(server.url, params=parameters, timeout=20)


def test_the_arxiv_package_reads_the_same_papers(server):
    """An independent reader of the same feeds: ids, titles, authors, dates, categories, paging."""
    arxiv = pytest.importorskip("arxiv")
    query = "(cat:cs.CL OR cat:cs.LG) AND (ti:latent OR abs:latent)"
    client = arxiv.Client(page_size=3, delay_seconds=0, num_retries=0)
    client.query_url_format = f"{server.url}?{{}}"
    theirs = list(
        client.results(
            arxiv.Search(
                query=query,
                max_results=None,
                sort_by=arxiv.SortCriterion.SubmittedDate,
                sort_order=arxiv.SortOrder.Ascending,
            )
        )
    )
    ours = parse_feed(fetch(server, search_query=query, start=0, max_results=50).content).entries
    assert len(theirs) == len(ours) == 8
    for one, other in zip(theirs, ours, strict=True):
        assert one.get_short_id() == f"{other.base}v{other.version}"
        assert one.title == other.title
        assert [author.name for author in one.authors] == list(other.authors)
        assert (one.published, one.updated) == (other.published, other.updated)
        assert (one.primary_category, one.categories) == (other.primary_category, list(other.categories))


def test_feedparser_reads_it_too(server):
    feedparser = pytest.importorskip("feedparser")
    parsed = feedparser.parse(fetch(server, search_query="cat:cs.LG", start=0, max_results=4).content)
    assert not parsed.bozo
    assert len(parsed.entries) == 4
    assert parsed.feed.opensearch_totalresults == "68"


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        ('ti:"latent thought"', True),
        ("ti:Latent-Thought", True),
        ('ti:"thought latent"', False),
        ("cat:cs.CL", True),
        ("cat:cs.*", True),
        ("cat:math.CO", False),
        ("au:okafor AND cat:cs.LG", True),
        ("cat:cs.CL ANDNOT ti:latent", False),
        ("(ti:loops OR abs:words) AND cat:cs.CL", True),
        ("submittedDate:[202602010000 TO 202602012359]", True),
        ("submittedDate:[202602020000 TO 202602022359]", False),
        ("all:words", True),
    ],
)
def test_queries(query, expected):
    found = paper(
        "2602.00001", "A Latent Thought", "2026-02-01T12:00", abstract="Without words.", categories=("cs.CL", "cs.LG")
    )
    assert parse_query(query)(found) is expected


@pytest.mark.parametrize(
    "query", ["", "(", "ti:a AND", "nofield", "xx:a", "submittedDate:[2026 TO 2027]", "ti:a ti:b", "ti:a)", ')"(']
)
def test_queries_that_cannot_be_read_are_error_feeds(query, server):
    with pytest.raises(QueryError):
        parse_query(query)
    if query:
        answer = fetch(server, search_query=query)
        assert answer.status_code == 400
        assert parse_feed(answer.content).error


def test_versions_by_id_and_unknown_ids(server):
    old = sample_papers()[0]
    server.add(old.revised(Version(datetime(2026, 2, 17, tzinfo=UTC), "Latent thought, retitled")))
    both = parse_feed(fetch(server, id_list="2602.00001v1,2602.00001", max_results=5).content).entries
    assert [(entry.version, entry.title == "Latent thought, retitled") for entry in both] == [(1, False), (2, True)]
    assert both[1].published == both[0].published < both[1].updated
    unknown = fetch(server, id_list="2602.99999")
    assert (unknown.status_code, parse_feed(unknown.content).entries) == (200, ())
    assert fetch(server, id_list="26.1").status_code == 400
    assert fetch(server, search_query="cat:cs.LG", max_results=2001).status_code == 400
    assert fetch(server, search_query="cat:cs.LG", start=29999, max_results=2).status_code == 400
    assert fetch(server).status_code == 400


def test_a_paper_is_shown_when_it_is_announced():
    clock = FakeClock()
    held = paper("2602.00001", "Held", "2026-02-01", announced=datetime(2026, 2, 19, tzinfo=UTC))
    with FeedServer([held], clock=clock) as server:
        assert parse_feed(fetch(server, search_query="ti:held").content).total == 0
        clock.sleep(24 * 3600)
        assert parse_feed(fetch(server, search_query="ti:held").content).total == 1


def test_every_kind_of_trouble(server):
    def once(fault: Fault, **extra: Any) -> requests.Response:
        server.clear()
        server.play(fault)
        options: dict[str, Any] = {"timeout": 20} | extra
        return requests.get(
            server.url, params={"search_query": "cat:cs.LG", "start": "0", "max_results": "5"}, **options
        )

    answer = once(Fault("status", status=429, retry_after="9"))
    assert (answer.status_code, answer.headers["Retry-After"]) == (429, "9")
    assert "Retry-After" not in once(Fault("status", status=503)).headers
    with pytest.raises(requests.Timeout):
        once(Fault("hang", seconds=3), timeout=0.3)
    for fault in (Fault("close"), Fault("cut")):
        with pytest.raises((requests.ConnectionError, requests.exceptions.ChunkedEncodingError)):
            once(fault)
    page = parse_feed(once(Fault("empty")).content)
    assert (page.arrived, page.total) == (0, 68)
    assert parse_feed(once(Fault("short", count=2)).content).arrived == 2
    assert parse_feed(once(Fault("total", count=7)).content).total == 75
    for status in (200, 400):
        answer = once(Fault("error", status=status))
        assert answer.status_code == status
        assert parse_feed(answer.content).error == "the server has had enough"
    with pytest.raises(DamagedFeedError, match="not well-formed"):
        parse_feed(once(Fault("damaged")).content)
    assert once(Fault("redirect"), allow_redirects=False).status_code == 301
    assert once(Fault("body", body=b"hello")).content == b"hello"
    begun = time.monotonic()
    assert parse_feed(once(Fault("drip", seconds=0)).content).arrived == 5
    assert time.monotonic() - begun < 60
    assert set(KINDS) >= {"status", "hang", "empty", "short", "total", "error"}
    server.clear()
    assert parse_feed(once(Fault("empty", start=99)).content).arrived == 5  # met by no request


def test_other_pages_and_head(server):
    server.pages["/readme"] = Page(200, b"hello", head_status=405)
    assert requests.get(f"{server.root}/readme", timeout=20).text == "hello"
    assert requests.head(f"{server.root}/readme", timeout=20).status_code == 405
    assert requests.get(f"{server.root}/nothing", timeout=20).status_code == 404


def test_faults_from_the_command_line(capsys):
    assert parse_fault("status,status=429,at=2+3,retry_after=7,times=always") == Fault(
        "status", status=429, at=(2, 3), retry_after="7", times=None
    )
    for bad in ("nothing", "status,x=1", "status,at"):
        with pytest.raises(ValueError, match="expects"):
            parse_fault(bad)
    assert main(["--fault", "nothing"]) == 2
    assert capsys.readouterr().err.startswith("error: kind expects")
    assert main(["--papers", "/does/not/exist.json"]) == 2


# What a hostile or broken feed may hold. Nothing of it may be executed, expanded, or written outside the catalog.

FEED = (
    '<feed xmlns="http://www.w3.org/2005/Atom" xmlns:o="http://a9.com/-/spec/opensearch/1.1/" '
    'xmlns:x="http://arxiv.org/schemas/atom"><o:totalResults>1</o:totalResults>{}</feed>'
)
ENTRY = (
    "<entry><id>{id}</id><title>{title}</title><published>2026-02-10T00:00:00Z</published><updated>2026-02-10T00:00:00Z</updated>"
    "<summary>{summary}</summary><author><name>{author}</name></author><category term='cs.CL'/>{more}</entry>"
)


def feed(**values: str) -> bytes:
    fields = {
        "id": "http://arxiv.org/abs/2602.00001v1",
        "title": "Latent",
        "summary": "S",
        "author": "A B",
        "more": "",
    } | values
    return FEED.format(ENTRY.format(**fields)).encode()


def only(data: bytes) -> Entry:
    page = parse_feed(data)
    assert page.refused == ()
    return page.entries[0]


def refusal(data: bytes) -> str:
    page = parse_feed(data)
    assert page.entries == ()
    return page.refused[0].reason


BOMB = (
    b'<?xml version="1.0"?><!DOCTYPE f [<!ENTITY a "aaaaaaaaaa"><!ENTITY b "&a;&a;&a;&a;&a;&a;&a;&a;&a;&a;">'
    b'<!ENTITY c "&b;&b;&b;&b;&b;&b;&b;&b;&b;&b;">]>' + feed(title="&c;")
)
OUTSIDE = b'<?xml version="1.0"?><!DOCTYPE f [<!ENTITY e SYSTEM "file:///etc/passwd">]>' + feed(title="&e;")


@pytest.mark.parametrize(
    "data",
    [
        BOMB,
        OUTSIDE,
        BOMB.decode().encode("utf-16"),
        b'<!DOCTYPE feed SYSTEM "http://127.0.0.1/x.dtd">' + feed(),
        b"<html><body>busy</body></html>",
        b"",
        b"\x00\x01\x02",
        feed()[:-20],
        b"<feed xmlns='http://www.w3.org/2005/Atom'></feed>",
        b"<a>" * 100_000,
        FEED.replace("<o:totalResults>1</o:totalResults>", "<o:totalResults>-1</o:totalResults>").encode(),
    ],
    ids=[
        "entity-bomb",
        "file-entity",
        "utf-16-bomb",
        "dtd",
        "html",
        "empty",
        "zeros",
        "cut",
        "no-total",
        "deep",
        "negative-total",
    ],
)
def test_hostile_feeds_are_refused_as_a_whole(data):
    with pytest.raises(DamagedFeedError) as caught:
        parse_feed(data)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300
    assert "root:" not in str(caught.value)


@pytest.mark.parametrize(
    ("values", "why"),
    [
        ({"title": "Latent " * 1_500_000}, "characters, expected at most 1,000"),
        ({"title": "  "}, "the title is empty"),
        ({"id": "http://arxiv.org/abs/../../../etc/passwdv1"}, "not an arXiv identifier"),
        ({"id": "http://arxiv.org/abs/2602.00001v1/../../x"}, "not an arXiv identifier"),
        ({"id": "file:///etc/passwd"}, "not of arXiv"),
        ({"id": "http://evil.example/abs/2602.00001v1"}, "not of arXiv"),
        ({"id": "http://arxiv.org/abs/2602.00001"}, "names no version"),
        ({"id": ""}, "not an arXiv identifier"),
        ({"author": "A" * 500}, "name of an author has 500 characters"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_hostile_entries_are_refused_and_the_others_are_read(values, why):
    assert why in refusal(feed(**values))
    good = ENTRY.format(id="http://arxiv.org/abs/2602.00002v1", title="Good", summary="", author="A B", more="")
    page = parse_feed(feed(**values).replace(b"</feed>", good.encode() + b"</feed>"))
    assert [entry.base for entry in page.entries] == ["2602.00002"]
    assert len(page.refused[0].name) <= 80


@pytest.mark.parametrize(
    "when", ["yesterday", "2026-02-10", "2026-02-10T00:00:00", "0001-01-01T00:00:00Z", "9999-01-01T00:00:00Z", ""]
)
def test_dates_that_cannot_be_trusted_are_refused(when):
    assert "published" in refusal(feed().replace(b"<published>2026-02-10T00:00:00Z", f"<published>{when}".encode()))


def test_invalid_utf_8_spoils_only_the_text_that_holds_it():
    assert "no text" in refusal(feed(title="Latent @@").replace(b"@@", b"\xff\xfe"))
    found = only(feed(summary="Words @@ words").replace(b"@@", b"\xc3\x28\xff"))
    assert found.abstract is None
    assert only(feed(summary="Words")).abstract == "Words"
    assert "no text" in refusal(feed(title="Latent &#1; x"))
    assert "no text" in refusal(feed(title="Latent &#x0B; x"))


def test_script_and_direction_marks_become_harmless_text():
    assert only(feed(title="&lt;script&gt;alert(1)&lt;/script&gt; Latent")).title == "<script>alert(1)</script> Latent"
    assert only(feed(title="Latent \u202egnisoner\u202c \u2066x\u2069 \u200b\ufeffy")).title == "Latent gnisoner x y"
    assert clean("a\u200fb\n\tc\u0301") == "ab ć"
    assert only(feed(title="خوارزمية Latent")).title == "خوارزمية Latent"  # letters of right-to-left scripts stay
    assert refusal(feed(title="<b>Latent</b>")) == "the title is empty"  # markup is no text


def test_codes_that_are_no_categories_and_odd_dois_are_left_out():
    more = (
        "<category term='68T50'/><category term='I.2.7'/><category term='stat.ML'/><category term='../x'/>"
        "<x:primary_category term='cs.CL'/><x:doi>10.48550/arXiv.2602.00001 and 10.1000/ABC-1</x:doi>"
    )
    found = only(feed(more=more))
    assert (found.categories, found.primary_category, found.doi) == (("cs.CL", "stat.ML"), "cs.CL", "10.1000/abc-1")
    assert only(feed(more="<x:doi>10.48550/arXiv.2602.00001</x:doi>")).doi is None
    assert only(feed(more="<x:doi>&lt;script&gt;</x:doi>")).doi is None


def test_a_comment_that_is_too_long_is_cut_and_one_that_is_no_text_left_out():
    assert only(feed(more="<x:comment>" + "c" * 3000 + "</x:comment>")).comment == "c" * 2000
    assert only(feed(more="<x:comment>&#2;</x:comment>")).comment is None


def test_prefixes_do_not_matter():
    data = (
        feed(more="<x:comment>C</x:comment>")
        .replace(b"xmlns:x", b"xmlns:zz")
        .replace(b"<x:", b"<zz:")
        .replace(b"</x:", b"</zz:")
    )
    assert only(data).comment == "C"


def test_a_hostile_feed_writes_nothing_outside_the_catalog(make_updater, server, folders, tmp_path):
    """The whole way: hostile entries among good ones, through the updater, the queue and the summary."""
    hostile = [
        paper(
            "2602.07001",
            "<script>alert('latent thought')</script> | @team #1 ![x](http://evil.example/a.png)",
            "2026-02-11",
        ),
        paper("2602.07002", "Latent thought", "2026-02-11", raw_id="http://arxiv.org/abs/../../../../tmp/evilv1"),
        paper("2602.07003", "Latent thought " + "x" * (10 * 2**20), "2026-02-11"),
        paper("2602.07004", "Latent thought \u202ereversed\u202c", "2026-02-11"),
        paper("2602.07005", "Latent thought & <b>bold</b> ]]> \"'", "2026-02-11", authors=("<img src=x>", "B" * 400)),
    ]
    server.add(*hostile)
    report = make_updater().run()
    assert report.outcome is Outcome.NEW
    queue = read_queue(folders)
    assert {"2602.07001", "2602.07004"} <= set(queue)
    assert not {"2602.07002", "2602.07003", "2602.07005"} & set(queue)
    assert len(report.refused) == 3
    assert queue["2602.07004"].title == "Latent thought reversed"
    text = markdown(report)
    assert "<script>" not in text
    assert "![x]" not in text
    assert "@team" not in text
    assert "evil.example/a" not in text.replace("\u2060", "") or "://\u2060evil" in text
    assert len(text) < 20_000
    outside = {path for path in tree(tmp_path) if not path.startswith("catalog/")}
    assert outside == set()
    assert all(name.startswith(("papers/", "queue/", "watermarks.json")) for name in tree(folders.root))


def test_an_answer_beyond_the_limit_is_not_taken_in(make_updater, server):
    server.play(Fault("body", body=b"x" * 100_000, times=None))
    report = make_updater(max_bytes=50_000, attempts=2).run()
    assert report.outcome is Outcome.FAILED
    assert "longer than 50,000 bytes" in markdown(report)


def test_the_bundled_papers_are_real_and_readable():
    found = load_papers()
    assert len(found) > 60
    assert len({item.base for item in found}) == len(found)
    assert busy_papers()
