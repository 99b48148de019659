"""Text of records is data: a hostile record goes through the whole build and comes out as text."""

import json
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest
from lxml import html

from latentcot.catalog import Record, load_facets, load_records, load_taxonomy
from latentcot.catalog.pages import SiteLinks, escape, paper_pages
from latentcot.site import build_site
from latentcot.site_pages import API_PACKAGES, api_page

HOSTILE = (
    "<script>alert(1)</script> & \"double\" 'single' $O(n^{2})$ _under_ *star* **bold** `code` "
    "[link](javascript:alert(1)) ![image](x.png) {{ config.site_name }} {% raw %} </title></h1></div></li> "
    "~~gone~~ ^2^ \\frac{1}{2} # no heading | pipe ==mark== :smile: &lt; &#60; <!-- comment --> "
    '--8<-- "mkdocs.yml" <https://example.org> {: .class } ``` [^1] naïve Ω 🙂'
)
LINK = "https://example.org/a?x=1&y='z'`w`*v*"


def hostile_records() -> list[Record]:
    base = load_records()[0].model_dump(mode="json")
    record = base | {
        "key": "x-hostile",
        "title": HOSTILE,
        "other_titles": [f"Other {HOSTILE}"],
        "authors": [{"name": f"Author {HOSTILE}", "orcid": None}] * 5,
        "note": HOSTILE[:270].strip(),
        "citekey": "hostile",
        "status": "withdrawn",
        "venue": {"name": f"Venue {HOSTILE}", "year": 2025, "track": None, "type": "journal"}
        | {"status": None, "source": "s"},
        "ids": dict.fromkeys(base["ids"]) | {"doi": f"10.1/{HOSTILE}"},
        "links": [{"kind": "code", "url": LINK, "official": True, "source": "s", "checked": None}],
        "sources": [{"source": HOSTILE, "ref": HOSTILE, "section": HOSTILE}],
        "runnable": [{"module": "latentcot.kernels", "notebook": "notebooks/none.ipynb", "test": "tests/<b>.py"}],
    }
    return [Record.model_validate_json(json.dumps(record)), load_records()[1]]


@pytest.fixture(scope="module")
def hostile_site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hostile")
    stubs = {f"{api_page(name)}.md": f"# {name}\n" for name in API_PACKAGES} | {"reference/index.md": "# Reference\n"}
    with pytest.MonkeyPatch.context() as patch:  # the reference has nothing to do with records and costs seconds
        patch.setattr("latentcot.site_pages.api_pages", lambda root: stubs)
        report = build_site(folder / "site", notebooks="none", work=folder / "work", records=hostile_records())
    assert report.warnings == ()
    return folder / "site"


def parse(path: Path) -> html.HtmlElement:
    return html.fromstring(path.read_bytes().decode("utf-8"))


def test_a_hostile_title_is_shown_as_it_stands(hostile_site: Path) -> None:
    page = parse(hostile_site / "paper/x-hostile.html")
    heading = page.xpath("//article//h1")[0]
    assert "".join(heading.xpath("./text()")) == HOSTILE
    assert [child.get("class") for child in heading] == ["headerlink"]
    assert page.xpath("string(//title)") == f"{HOSTILE} - latentcot"
    assert page.xpath("//meta[@name='citation_title']/@content") == [HOSTILE]
    assert json.loads(page.xpath("string(//script[@type='application/ld+json'])"))["name"] == HOSTILE
    assert HOSTILE in page.xpath("string(//meta[@name='description']/@content)")


def test_hostile_fields_add_no_element_to_the_page(hostile_site: Path) -> None:
    page = parse(hostile_site / "paper/x-hostile.html")
    article = page.xpath("//article")[0]
    assert not article.xpath(".//script | .//img | .//em | .//del | .//sup | .//mark | .//b | .//table")
    allowed = ("../", "https://example.org/a", "#")
    assert all(link.startswith(allowed) for link in article.xpath(".//a/@href"))
    assert LINK in article.xpath(".//a/@href")
    assert not page.xpath("//script[contains(text(), 'alert(1)')][not(@type='application/ld+json')]")
    for text in (f"Author {HOSTILE}", f"Other {HOSTILE}", f"Venue {HOSTILE}", f"10.1/{HOSTILE}", "tests/<b>.py"):
        assert text in " ".join(article.text_content().split())


@pytest.mark.parametrize("page", ["papers/index.html", "topic"])
def test_lists_show_a_hostile_title_as_it_stands(hostile_site: Path, page: str) -> None:
    primary = hostile_records()[0].taxonomy.primary
    document = parse(hostile_site / (f"topic/{primary}.html" if page == "topic" else page))
    titles = [link.text_content() for link in document.xpath("//a[@class='lc-title']")]
    assert HOSTILE in titles
    assert not document.xpath("//ol[contains(@class,'lc-papers')]//script")


def test_the_search_index_holds_no_live_markup(hostile_site: Path) -> None:
    documents = json.loads((hostile_site / "search/search_index.json").read_text(encoding="utf-8"))["docs"]
    found = [entry for entry in documents if entry["location"].startswith("paper/x-hostile")]
    assert found
    for entry in found:
        assert "<script" not in entry["title"] + entry["text"]
        assert "<img" not in entry["title"] + entry["text"]


@pytest.mark.parametrize(
    "text",
    ["*a*", "_a_", "`a`", "<b>", "a & b", "[a](b)", "# a", "a | b", "$x^2$", "{: .c}", "\\frac", "~~a~~"],
)
def test_escape_leaves_nothing_for_markdown(text: str) -> None:
    markdown = pytest.importorskip("markdown")
    rendered = markdown.markdown(f"x {escape(text)} y", extensions=["attr_list", "md_in_html", "tables", "footnotes"])
    fragment = html.fromstring(rendered)
    assert fragment.text_content() == f"x {text} y"
    assert len(fragment) == 0


def test_a_correction_link_appears_only_when_an_address_is_configured() -> None:
    record = load_records()[0]
    tree, facets = load_taxonomy(), load_facets()
    path = f"paper/{record.key}.md"
    assert "Suggest a correction" not in paper_pages([record], tree, facets)[path]
    links = SiteLinks(corrections_url="https://example.org/issues/new")
    text = paper_pages([record], tree, facets, links)[path]
    assert f"https://example.org/issues/new?title=Correction%3A%20{record.key}" in text


def test_runnable_entries_link_to_the_pages_that_exist() -> None:
    record = hostile_records()[0]
    links = SiteLinks(module_page=lambda module: "reference/api/kernels.html", notebook_page=lambda path: None)
    text = paper_pages([record], load_taxonomy(), load_facets(), links)["paper/x-hostile.md"]
    assert '<a href="../reference/api/kernels.html"><code>latentcot.kernels</code></a>' in text
    assert "<li>notebook <code>notebooks/none.ipynb</code></li>" in text


def test_records_that_share_a_key_or_name_an_unknown_leaf_are_refused() -> None:
    record = load_records()[0]
    with pytest.raises(ValueError, match=f"given twice: {record.key}"):
        paper_pages([record, record], load_taxonomy(), load_facets())
    stray = record.model_copy(update={"taxonomy": record.taxonomy.model_copy(update={"primary": "no/leaf"})})
    with pytest.raises(ValueError, match=r"leaf 'no/leaf' is not in the taxonomy"):
        paper_pages([stray], load_taxonomy(), load_facets())


def test_the_same_records_give_the_same_pages_in_any_order() -> None:
    records = load_records()[:40]
    tree, facets = load_taxonomy(), load_facets()
    assert paper_pages(records, tree, facets) == paper_pages(list(reversed(records)), tree, facets)


def markdown_of(docstring: str) -> str:
    """What the griffe extension of the theme makes of a docstring."""
    pytest.importorskip("griffe")
    path = Path(__file__).parents[2] / "docs/theme/plain_roles.py"
    spec = spec_from_file_location("plain_roles", path)
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.as_markdown(docstring)


@pytest.mark.parametrize(
    ("docstring", "markdown"),
    [
        (r"See :meth:`Thing.do` and :class:`~a.b.Thing`.", "See `Thing.do` and `a.b.Thing`."),
        (r"With :math:`\sigma` open.", r"With $\sigma$ open."),
        ("First.\n\n.. math:: a\n    b\n\nThen.", "First.\n\n\n$$\na b\n$$\n\nThen."),
        ("  .. math::\n\n      a, \\\\\n      b", "\n  $$\n  \\begin{aligned} a, \\\\ b \\end{aligned}\n  $$\n"),
        (".. code-block:: text\n\n    a\n      :math:`x`\n", "\n```text\na\n  :math:`x`\n```\n"),
        (
            "==== =====\nkind value\n==== =====\na    :math:`|x|`\n     and on\nb|c  :func:`f`\n==== =====\nEnd.",
            "\n| kind | value |\n| --- | --- |\n| a | $ \\vert x \\vert $ and on |\n| b\\|c | `f` |\n\nEnd.",
        ),
        ("==== ====\nno table", "==== ====\nno table"),
    ],
)
def test_docstrings_lose_their_sphinx_markup(docstring: str, markdown: str) -> None:
    assert markdown_of(docstring) == markdown
