"""The built site as files: what is there, what it weighs, where its links lead, what it would fetch."""

import gzip
import json
import re
from functools import cache
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from urllib.parse import unquote, urlsplit

import feedparser
import pytest
from lxml import html

from latentcot.catalog import load_records, load_taxonomy
from latentcot.catalog.export import csl, feeds, ris
from latentcot.catalog.pages import FEED_LENGTH, clean
from latentcot.catalog.related import related_papers
from latentcot.site_pages import API_PACKAGES, api_page

LISTS = (
    "index.html",
    "papers/index.html",
    "papers/new.html",
    "papers/taxonomy.html",
    "papers/statistics.html",
    "how-it-works.html",
)


@cache
def parsed(path: Path) -> html.HtmlElement:
    return html.fromstring(path.read_bytes().decode("utf-8"))


def pages(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.html"))


def weight(path: Path) -> int:
    return len(gzip.compress(path.read_bytes(), 6))


def test_every_record_leaf_and_package_has_its_page(site_folder: Path) -> None:
    assert {path.stem for path in (site_folder / "paper").glob("*.html")} == {record.key for record in load_records()}
    for branch in load_taxonomy().branches:
        for slug in (branch.slug, *(leaf.slug for leaf in branch.leaves)):
            assert (site_folder / f"topic/{slug}.html").is_file(), slug
    for name in API_PACKAGES:
        assert (site_folder / f"{api_page(name)}.html").is_file(), name
    for name in (*LISTS, "getting-started.html", "learn/index.html", "results/index.html", "reference/cli.html"):
        assert (site_folder / name).is_file(), name


def test_a_paper_page_weighs_less_than_20_kb(site_folder: Path) -> None:
    heavy = {path.name: weight(path) for path in (site_folder / "paper").glob("*.html") if weight(path) >= 20_000}
    assert not heavy


def test_the_index_weighs_less_than_200_kb(site_folder: Path) -> None:
    assert weight(site_folder / "papers/index.html") < 200_000


def test_every_internal_link_leads_somewhere(site_folder: Path) -> None:
    anchors: dict[Path, set[str]] = {}
    broken: list[str] = []
    for page in pages(site_folder):
        if page.name == "404.html":  # served for any address, so its links start at the root of the server
            continue
        for element, attribute, link, _ in parsed(page).iterlinks():
            parts = urlsplit(str(link))
            if parts.scheme or parts.netloc or element.tag in ("use", "image"):
                continue
            target = (page.parent / unquote(parts.path)).resolve() if parts.path else page
            if target.is_dir():
                target = target / "index.html"
            where = f"{page.relative_to(site_folder)}: {element.tag} {attribute}={link}"
            if not target.is_file() or site_folder.resolve() not in target.parents:
                broken.append(where)
            elif parts.fragment and target.suffix == ".html":
                if target not in anchors:
                    anchors[target] = {str(value) for value in parsed(target).xpath("//@id | //a/@name")}
                if unquote(parts.fragment) not in anchors[target]:
                    broken.append(where)
    assert not broken, f"{len(broken)} broken links, the first: {broken[:5]}"


def test_no_page_fetches_from_another_host(site_folder: Path) -> None:
    fetched = "//script/@src | //img/@src | //img/@srcset | //source/@src | //iframe/@src | //link/@href"
    for page in pages(site_folder):
        links = [urlsplit(link) for link in parsed(page).xpath(fetched)]
        outside = [link.geturl() for link in links if link.scheme not in ("", "data") or link.netloc]
        assert not outside, f"{page.relative_to(site_folder)}: {outside}"
    for sheet in site_folder.rglob("*.css"):
        assert not re.search(r"(?:url\(|@import\s+)['\"]?(?:https?:)?//", sheet.read_text(encoding="utf-8")), sheet.name


def test_pages_have_one_first_heading_and_skip_no_level(site_folder: Path) -> None:
    papers = sorted((site_folder / "paper").glob("*.html"))
    topics = sorted((site_folder / "topic").rglob("*.html"))
    for page in [*(site_folder / name for name in LISTS), *papers[::40], *topics]:
        headings = parsed(page).xpath("//article//*[self::h1 or self::h2 or self::h3 or self::h4]")
        levels = [int(heading.tag[1]) for heading in headings]
        assert levels.count(1) == 1, page
        assert levels[0] == 1, page
        assert all(b <= a + 1 for a, b in pairwise(levels)), page


def test_paper_pages_stay_out_of_the_navigation(site_folder: Path) -> None:
    page = parsed(site_folder / "index.html")
    assert not [link for link in page.xpath("//nav//a/@href") if "paper/" in link.replace("papers/", "")]


def test_paper_pages_say_what_the_record_says(site_folder: Path) -> None:
    for record in load_records():
        page = parsed(site_folder / f"paper/{record.key}.html")
        article = page.xpath("//article")[0]
        text = " ".join(article.text_content().split())
        heading = "".join(article.xpath(".//h1")[0].xpath("./text()"))
        assert heading == clean(record.title)
        assert page.xpath("string(//title)") == f"{clean(record.title)} - latentcot"
        assert page.xpath("//meta[@name='citation_title']/@content") == [clean(record.title)]
        assert page.xpath("//meta[@name='citation_author']/@content") == [clean(name) for name in record.author_names]
        data = json.loads(page.xpath("string(//script[@type='application/ld+json'])"))
        assert data["name"] == clean(record.title)
        assert ("The authors have not been fetched yet" in text) == (record.authors is None)
        assert ("Withdrawn." in text) == (record.status == "withdrawn")
        assert ("Superseded." in text) == (record.status == "superseded")
        assert f"{record.taxonomy.status.capitalize()}:" in text
        assert load_taxonomy().leaves[record.taxonomy.primary].definition in text
        if record.note:
            assert clean(record.note) in text
        for link in record.links:
            assert link.url in article.xpath(".//a/@href")
        for entry in record.runnable:
            assert "Runnable here" in text
            assert all(name in text for name in (entry.module, entry.notebook, entry.test) if name)


def test_the_plain_list_holds_every_paper_newest_first(site_folder: Path) -> None:
    items = parsed(site_folder / "papers/index.html").xpath("//ol[@id='lc-papers']/li")
    records = {record.key: record for record in load_records()}
    links = [link for item in items for link in item.xpath("./a/@href")]
    assert sorted(link.removeprefix("../paper/").removesuffix(".html") for link in links) == sorted(records)
    dates = [item.get("data-date") for item in items]
    assert dates == sorted(dates, reverse=True)


def test_facet_counts_are_those_of_the_records(site_folder: Path) -> None:
    page = parsed(site_folder / "papers/index.html")
    boxes = page.xpath("//form[@id='lc-form']//input[@type='checkbox']")
    shown = {(box.get("name"), box.get("value")): int(box.getparent().xpath("string(./output)")) for box in boxes}
    assert len(shown) == len(boxes), "two boxes share name and value"
    records = load_records()
    for slug in load_taxonomy().leaves:
        assert shown["leaf", slug] == sum(slug in record.leaves for record in records)
    assert shown["has", "code"] == sum(record.has_code for record in records)
    for facet in ("year", "venue", "status"):
        assert sum(count for (name, _), count in shown.items() if name == facet) == len(records), facet
    labelled = set(page.xpath("//form[@id='lc-form']//label/@for"))
    for field in page.xpath("//form[@id='lc-form']//*[self::input or self::select]"):
        assert field.xpath("ancestor::label") or field.get("id") in labelled, "an input without a label"


def test_feeds_of_all_papers_and_of_every_leaf(site_folder: Path) -> None:
    records = {record.key: record for record in load_records()}
    for slug in ("all", *load_taxonomy().leaves):
        held = [record for record in records.values() if slug == "all" or slug in record.leaves]
        for kind in ("atom", "rss"):
            parsed_feed = feedparser.parse((site_folder / f"feeds/{slug}.{kind}.xml").read_bytes())
            assert not parsed_feed.bozo
            assert len(parsed_feed.entries) == min(FEED_LENGTH, len(held)), slug
            for entry in parsed_feed.entries:
                assert records[entry.id.rpartition(":")[2]] in held
    page = parsed(site_folder / "topic/vertical/architecture.html")
    assert "../../feeds/vertical/architecture.atom.xml" in page.xpath("//article//a/@href")
    assert page.xpath("//link[@type='application/atom+xml']/@href") == ["../../feeds/all.atom.xml"]


def test_related_papers_are_linked_with_what_they_share(site_folder: Path) -> None:
    records = load_records()
    related = related_papers(records)
    for record in records[::25]:
        page = parsed(site_folder / f"paper/{record.key}.html")
        items = page.xpath("//ul[@class='lc-related']/li")
        assert [item.xpath("string(./a/@href)") for item in items] == [f"{one.key}.html" for one in related[record.key]]
        for item, one in zip(items, related[record.key], strict=True):
            assert all(clean(term) in " ".join(item.text_content().split()) for term in one.terms)


def test_every_paper_page_holds_its_citation_in_three_formats(site_folder: Path) -> None:
    for record in load_records()[::10]:
        page = parsed(site_folder / f"paper/{record.key}.html")
        ris_text = page.xpath("string(//pre[@id='lc-ris'])")
        assert [line.rstrip() for line in ris_text.splitlines()] == [
            line.rstrip() for line in ris.entry(record).splitlines()
        ]
        assert json.loads(page.xpath("string(//pre[@id='lc-csl'])")) == [csl.item(record)]
        assert record.citekey in page.xpath("string(//pre[@id='lc-bibtex'])")


def test_the_page_of_new_papers(site_folder: Path) -> None:
    page = parsed(site_folder / "papers/new.html")
    shown = [
        link.removeprefix("../paper/").removesuffix(".html") for link in page.xpath("//a[@class='lc-title']/@href")
    ]
    assert shown == [record.key for record in feeds.latest(load_records(), FEED_LENGTH)]


def test_statistics_add_up(site_folder: Path) -> None:
    page = parsed(site_folder / "papers/statistics.html")
    tables = {table.xpath("string(./caption)"): table for table in page.xpath("//table")}
    captions = ("Papers by primary leaf", "Papers by year of first publication", "How the leaf of an entry came about")
    for caption in captions:
        numbers = [int(text) for text in tables[caption].xpath("./tbody/tr/td[1]/text()")]
        assert sum(numbers) == len(load_records()), caption


@pytest.mark.parametrize("name", API_PACKAGES)
def test_reference_pages_show_what_a_package_exports(site_folder: Path, name: str) -> None:
    import importlib

    module = importlib.import_module(name)
    page = parsed(site_folder / f"{api_page(name)}.html")
    text = page.xpath("//article")[0].text_content()
    headings = " ".join(page.xpath("//article//*[self::h2 or self::h3]/@id"))
    for export in getattr(module, "__all__", []):
        if not isinstance(getattr(module, export), ModuleType):
            assert export in text, export
            assert f".{export}" in headings, export


@pytest.mark.parametrize("name", API_PACKAGES)
def test_reference_pages_show_formulas_and_tables_not_their_source(site_folder: Path, name: str) -> None:
    page = html.fromstring((site_folder / f"{api_page(name)}.html").read_bytes().decode("utf-8"))
    for element in page.xpath("//pre | //details | //math"):
        element.drop_tree()
    text = page.xpath("//article")[0].text_content()
    raw = re.findall(r":\w+:[`\\][^\n]*|\.\. [\w-]+::[^\n]*|={6,}|\\math\w+|\\frac", text)
    assert not raw, raw[:5]
    assert not page.xpath("//*[@class='lc-math']/code"), "TeX that could not be converted"


def test_the_command_line_reference_shows_every_command_and_option(site_folder: Path) -> None:
    import typer

    from latentcot.cli import app

    text = parsed(site_folder / "reference/cli.html").xpath("//article")[0].text_content()
    todo = [("latentcot", typer.main.get_command(app))]
    seen = 0
    while todo:
        path, command = todo.pop()
        assert path in text
        assert command.help, f"{path} has no help"
        for param in command.params:
            if param.param_type_name == "option":
                assert all(name in text for name in param.opts), (path, param.opts)
                seen += 1
        todo += [(f"{path} {name}", child) for name, child in getattr(command, "commands", {}).items()]
    assert seen > 10
