"""Every record through every format and back, read by parsers that are not ours."""

import csv
import io
import json
import re
from xml.etree import ElementTree

import feedparser
import jsonschema
import pytest
import rispy
from hypothesis import given, settings
from hypothesis import strategies as st
from lxml import etree  # pyright: ignore[reportAttributeAccessIssue]
from pybtex.database import parse_string

from latentcot.catalog import CatalogError, get, load_records, load_taxonomy
from latentcot.catalog.export import FORMATS, csl, feeds, lists, references, render, ris, tables
from latentcot.catalog.export.plain import one_line
from latentcot.catalog.record import Author, Record
from latentcot.catalog.store import CATALOG

RECORDS = load_records()
BY_CITEKEY = {record.citekey: record for record in RECORDS}
HOSTILE = '<b>&amp; ]]> "x" $O(n^2)$ \\textbf{y} % # _ ~ \u202e rtl {z} , ; \''


def changed(**update) -> Record:
    return get("2412.06769").model_copy(update=update)


@pytest.fixture(scope="module")
def validator():
    schema = json.loads((CATALOG / "schema" / "csl-data.schema.json").read_text(encoding="utf-8"))
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(schema)


@pytest.mark.parametrize("format", FORMATS)
def test_a_format_does_not_depend_on_the_order_of_records(format):
    some = RECORDS[::5]
    assert render(format, some) == render(format, some[::-1])


@pytest.mark.parametrize("format", FORMATS)
def test_no_records_is_a_valid_text(format):
    text = render(format, [])
    if format in ("csl", "json"):
        json.loads(text)
    if format in ("atom", "rss"):
        ElementTree.fromstring(text.encode())


def test_an_unknown_format_is_an_error():
    with pytest.raises(ValueError, match="bibtex"):
        render("endnote", RECORDS)


def test_every_record_goes_through_csl_json_and_back(validator):
    items = json.loads(render("csl", RECORDS))
    validator.validate(items)
    assert [item["id"] for item in items] == sorted(BY_CITEKEY, key=str.lower)
    for item in items:
        record = BY_CITEKEY[item["id"]]
        assert item["title"] == record.title
        names = [
            n.get("literal") or " ".join(n[p] for p in ("given", "family", "suffix") if p in n)
            for n in item.get("author", [])
        ]
        assert [name.replace(",", "") for name in names] == [name.replace(",", "") for name in record.author_names]
        assert ("author" in item) == (record.authors is not None)
        assert ("issued" in item) == (record.year is not None)
        assert ("DOI" in item) == bool(record.ids.doi or (record.ids.arxiv and item["type"] == "article"))


def test_the_schema_refuses_what_csl_json_does_not_know(validator):
    good = csl.item(get("2412.06769"))
    assert validator.is_valid([good])
    for bad in (
        {"type": "preprint"}, {"year": "2024"}, {"author": [{"name": "A B"}]}, {"author": []}, {"issued": "2024"},
        {"issued": {"date-parts": [[2024, 12, 1, 1]]}},
    ):  # fmt: skip
        assert not validator.is_valid([good | bad]), bad


def test_types_of_csl_follow_the_venue():
    assert csl.item(get("2412.06769"))["type"] == "paper-conference"
    assert csl.item(get("doi-10.1162_neco.1997.9.8.1735"))["type"] == "article-journal"
    preprint = csl.item(get("2507.06203"))
    assert preprint["type"] == "article"
    assert preprint["DOI"] == "10.48550/arXiv.2507.06203"
    assert preprint["issued"] == {"date-parts": [[2025, 7]]}


def test_every_record_goes_through_ris_and_back():
    text = render("ris", RECORDS)
    entries = rispy.loads(text)
    assert {entry["id"] for entry in entries} == set(BY_CITEKEY)
    assert len(entries) == len(RECORDS)
    for entry in entries:
        record = BY_CITEKEY[entry["id"]]
        assert entry["title"] == record.title
        assert len(entry.get("authors", [])) == len(record.author_names)
        for name, full in zip(entry.get("authors", []), record.author_names, strict=True):
            assert set(re.findall(r"\w+", name)) == set(re.findall(r"\w+", full))
        if record.year is not None:
            assert int(entry["year"]) in (record.year, record.venue.year if record.venue else None)
        assert entry["type_of_reference"] in ("UNPB", "CPAPER", "JOUR")


def test_the_lines_of_ris():
    text = render("ris", RECORDS)
    assert "\n" not in text.replace("\r\n", "")
    for line in text.split("\r\n"):
        assert line == "" or re.match(r"^[A-Z][A-Z0-9]  - ", line), line
    for block in text.strip().split("\r\n\r\n"):
        lines = block.split("\r\n")
        assert lines[0].startswith("TY  - ")
        assert lines[-1].strip() == "ER  -"
        assert sum(line.startswith("TY  - ") for line in lines) == 1
    entry = ris.entry(get("2412.06769"))
    assert entry.count("AU  - ") == len(get("2412.06769").author_names)
    assert ris.author("Ada Okafor Jr.") == "Okafor, Ada, Jr."


def test_every_record_goes_through_atom_and_back():
    text = render("atom", RECORDS)
    parsed = feedparser.parse(text.encode())
    assert not parsed.bozo
    assert len(parsed.entries) == len(RECORDS)
    tree = etree.fromstring(text.encode(), etree.XMLParser(resolve_entities=False))
    space = {"a": "http://www.w3.org/2005/Atom"}
    found = {}
    for entry in tree.findall("a:entry", space):
        names = [name.text for name in entry.findall("a:author/a:name", space)]
        found[entry.findtext("a:id", namespaces=space)] = entry.findtext("a:title", namespaces=space), names
        assert entry.find("a:updated", space) is not None
    for record in RECORDS:
        assert found[f"urn:latentcot:catalog:paper:{record.key}"] == (record.title, record.author_names)
    addresses = [link.get("href") for link in tree.iterfind(".//a:link", space)]
    assert all(str(address).startswith(("http://", "https://")) for address in addresses)


def test_every_record_goes_through_rss_and_back():
    text = feeds.rss(RECORDS, site="https://papers.example.org/")
    parsed = feedparser.parse(text.encode())
    assert not parsed.bozo
    assert parsed.version == "rss20"
    titles = {entry.id: entry.title for entry in parsed.entries}
    tree = etree.fromstring(text.encode())
    for item in tree.iterfind("./channel/item"):
        key = str(item.findtext("guid")).rpartition(":")[2]
        assert item.findtext("title") == get(key).title
        assert item.findtext("link") == f"https://papers.example.org/paper/{key}.html"
        assert item.find("guid").get("isPermaLink") == "false"  # type: ignore[union-attr]
    assert len(titles) == len(RECORDS)


def test_feeds_depend_on_the_day_a_paper_was_added_not_on_today():
    old, new = changed(key="2401.00001", added="2026-01-02"), changed(key="2401.00002", added="2026-03-04")
    text = feeds.atom([old, new])
    parsed = feedparser.parse(text)
    assert parsed.feed.updated == "2026-03-04T00:00:00Z"
    assert [entry.id.rpartition(":")[2] for entry in parsed.entries] == ["2401.00002", "2401.00001"]
    assert [entry.id.rpartition(":")[2] for entry in feedparser.parse(feeds.rss([old, new], limit=1)).entries] == [
        "2401.00002"
    ]
    with pytest.raises(ValueError, match="limit"):
        feeds.atom([old], limit=0)


def test_a_feed_names_a_date_of_publication_only_when_it_is_known_to_the_day():
    assert "<published>" not in feeds.atom([get("2412.06769")])
    known = get("2412.06769").published
    assert known is not None
    exact = known.model_copy(update={"value": "2024-12-09", "precision": "day"})
    assert "<published>2024-12-09T00:00:00Z</published>" in feeds.atom([changed(published=exact)])


def test_json_holds_everything():
    data = json.loads(render("json", RECORDS))
    assert data["schema_version"] == 1
    assert "CC0" in data["licence"]
    assert [Record.model_validate_json(json.dumps(entry)) for entry in data["records"]] == RECORDS


def test_csv_has_a_row_a_record():
    rows = list(csv.DictReader(io.StringIO(render("csv", RECORDS), newline="")))
    assert [row["key"] for row in rows] == [record.key for record in RECORDS]
    for row, record in zip(rows, RECORDS, strict=True):
        assert row["title"] == record.title
        assert row["authors"] == "; ".join(record.author_names)
        assert row["doi"] == (record.ids.doi or "")
        assert list(row) == list(tables.COLUMNS)


def test_the_markdown_list_holds_every_paper_once_under_its_leaf():
    markdown = pytest.importorskip("markdown")
    text = render("markdown", RECORDS)
    page = etree.HTML(markdown.markdown(text))
    headings = [h.text for h in page.iter("h3")]
    used = [
        leaf.name for leaf in load_taxonomy().leaves.values() if any(r.taxonomy.primary == leaf.slug for r in RECORDS)
    ]
    assert headings == used
    titles = ["".join(li.itertext()) for li in page.iter("li")]
    assert len(titles) == len(RECORDS)
    for record in RECORDS[::20]:
        assert any(title.startswith(record.title) for title in titles), record.title


def test_the_list_is_written_between_markers():
    text = f"# Papers\n\n{lists.BEGIN}\nold\n{lists.END}\n\nRest.\n"
    once = lists.between(text, "- new\n")
    assert once == f"# Papers\n\n{lists.BEGIN}\n\n- new\n\n{lists.END}\n\nRest.\n"
    assert lists.between(once, "- new\n") == once
    for bad in ("no marker", f"{lists.BEGIN} only", f"{lists.END} {lists.BEGIN}", text + lists.BEGIN):
        with pytest.raises(CatalogError, match="marker"):
            lists.between(bad, "- new")


def test_references_are_one_line_each():
    text = render("text", RECORDS)
    assert len(text.splitlines()) == len(RECORDS)
    line = references.reference(get("2412.06769"))
    assert line.startswith("Shibo Hao, ")
    assert line.endswith("COLM 2025. arXiv:2412.06769.")


@pytest.mark.parametrize("format", FORMATS)
def test_records_without_authors_leave_the_field_out(format, validator):
    text = render(format, [changed(authors=None)])
    assert "Hao," not in text.replace("Hao2024", "")
    assert "Shibo" not in text
    if format == "csl":
        assert "author" not in json.loads(text)[0]
    if format == "ris":
        assert "AU  -" not in text
    if format == "bibtex":
        assert "author" not in text


@pytest.mark.parametrize(
    "title", [HOSTILE, "a\r\nER  - \r\nTY  - JOUR", "x \x07 \x0b y", "}} @misc{evil,", "=1+1", "🤔 王 ﷺ"]
)
def test_hostile_titles_stay_titles(title, validator):
    record = changed(title=title, authors=[Author.model_construct(name=f"Ann {title}", orcid=None)], citekey="one")
    other = get("2507.06203")
    plain = one_line(title)
    items = json.loads(render("csl", [record, other]))
    validator.validate(items)
    assert {item["title"] for item in items} == {plain, other.title}
    entries = rispy.loads(render("ris", [record, other]))
    assert {entry["title"].strip() for entry in entries} == {plain, other.title}
    for name in ("atom", "rss"):
        text = render(name, [record, other])
        root = etree.fromstring(text.encode())
        titles = [element.text for element in root.iter() if etree.QName(element).localname == "title"]
        assert plain in titles
    assert len(parse_string(render("bibtex", [record, other]), "bibtex").entries) == 2
    rows = list(csv.DictReader(io.StringIO(render("csv", [record, other]), newline="")))
    assert plain in {row["title"] for row in rows}
    assert len(render("text", [record, other]).splitlines()) == 2
    assert "<b>" not in render("markdown", [record]).replace("\\<b\\>", "")


@settings(max_examples=40, deadline=None)
@given(title=st.text(min_size=1, max_size=80), name=st.text(min_size=1, max_size=40))
def test_any_text_gives_valid_files(title, name):
    title, name = " ".join(title.split()) or "x", " ".join(name.split()) or "x"
    record = changed(title=title, authors=[Author.model_construct(name=name, orcid=None)])
    etree.fromstring(render("atom", [record]).encode("utf-8"))
    etree.fromstring(render("rss", [record]).encode("utf-8"))
    assert len(rispy.loads(render("ris", [record]))) == 1
    assert len(json.loads(render("csl", [record]))) == 1
