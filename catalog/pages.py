"""The paper pages of the site, written as plain Markdown from the records.

:func:`paper_pages` returns every page as ``{path below the site: text}``: the faceted index, one page a paper, one page
a branch and leaf, the taxonomy and the statistics. Nothing here depends on MkDocs; the only contract with the theme are
the front matter fields ``heading``, ``citation``, ``jsonld`` and ``scripts`` (see ``docs/theme/main.html``).

Text from records is data. :func:`escape` turns every character that means something to Markdown or HTML into a numeric
entity, which both leave alone, and the templates escape whatever is not marked.
"""

import json
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote, urlencode

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from latentcot.catalog.export import csl, feeds, ris
from latentcot.catalog.leaves import Branch, FacetSet, Leaf, Tree
from latentcot.catalog.pages_statistics import page_values
from latentcot.catalog.record import PartialDate, Record
from latentcot.catalog.related import related_papers

_SPECIAL = re.compile(r"[^\w\s.,;:()'/?%@-]|_", re.ASCII)
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ufeff\ufffe\uffff\ud800-\udfff]+")

STATUS_MEANING = {
    "listed": "The leaf was taken over from a published paper list and has not been checked by a person.",
    "proposed": "The leaf was proposed by a program and has not been checked by a person.",
    "reviewed": "A person has read the entry and confirmed the leaf.",
}
LINK_NAMES = {
    "abs": "Abstract page",
    "pdf": "PDF",
    "code": "Code",
    "project": "Project page",
    "weights": "Model weights",
    "data": "Data",
    "openreview": "OpenReview",
    "video": "Video",
}
NOT_STATED = "none"
FEED_LENGTH = 50  # entries of a feed, and of the page of new papers


def clean(text: str) -> str:
    """White space collapsed and control characters removed."""
    return " ".join(_CONTROL.sub(" ", text).split())


def escape(text: object) -> Markup:
    """``text`` so that neither Markdown nor HTML sees anything but letters in it, inside and outside of attributes."""
    return _escaped(str(text))


@lru_cache(maxsize=8192)  # names of topics, authors and venues come again and again
def _escaped(text: str) -> Markup:
    return Markup(_SPECIAL.sub(_entity, clean(text)).replace("'", "&#39;"))


def _entity(match: re.Match[str]) -> str:
    char = match.group()
    return char if ord(char) > 127 else f"&#{ord(char)};"


def escape_block(text: str) -> Markup:
    """As :func:`escape`, with line breaks and indentation kept: for the inside of ``<pre>``."""
    # A blank line would end the HTML block for some Markdown parsers.
    lines = (_CONTROL.sub(" ", line.expandtabs(2)).rstrip() for line in text.strip().splitlines())
    return Markup("\n").join(Markup(_SPECIAL.sub(_entity, line).replace("'", "&#39;")) for line in lines if line)


class Option(NamedTuple):
    """One value of a facet: what stands in the address, what is shown, how many papers, its values one level down."""

    value: str
    name: str
    count: int
    children: tuple["Option", ...] = ()


class IndexFacet(NamedTuple):
    slug: str
    name: str
    options: tuple[Option, ...]
    open: bool = False


@dataclass(frozen=True)
class SiteLinks:
    """What the paper pages know of the rest of the site; every function returns ``None`` where there is nothing.

    ``site_url`` is the address that feeds link to; without it they link to the papers themselves.
    """

    bibtex: Callable[[Record], str] | None = None
    module_page: Callable[[str], str | None] = field(default=lambda module: None)
    notebook_page: Callable[[str], str | None] = field(default=lambda path: None)
    corrections_url: str | None = None
    site_url: str | None = None


def paper_pages(
    records: Sequence[Record], tree: Tree, facets: FacetSet, links: SiteLinks | None = None
) -> dict[str, str]:
    """Every generated page about papers.

    Args:
        records: the records to show, in any order.
        tree: the taxonomy; each record's leaves must be in it.
        facets: the facet vocabularies, for the names of their values.
        links: where modules, notebooks and corrections are found on this site.

    Raises:
        ValueError: a record names a leaf that the taxonomy lacks, or two records share a key.
    """
    keys = Counter(record.key for record in records)
    if twice := [key for key, count in keys.items() if count > 1]:
        raise ValueError(f"records: keys must be distinct, given twice: {', '.join(twice[:5])}")
    known = tree.leaves
    for record in records:
        for slug in record.leaves:
            if slug not in known:
                raise ValueError(f"record {record.key}: leaf {slug!r} is not in the taxonomy")
    return _Pages(records, tree, facets, links or SiteLinks()).all()


class _Pages:
    def __init__(self, records: Sequence[Record], tree: Tree, facets: FacetSet, links: SiteLinks) -> None:
        self.records = sorted(records, key=_newest_first)
        self.tree = tree
        self.facets = facets
        self.links = links
        self.env = Environment(
            loader=FileSystemLoader(Path(__file__).parent / "templates"),
            autoescape=True,
            undefined=StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
        )
        self.env.filters.update(t=escape, block=escape_block, day=_day, slug=_value_slug)
        self.env.globals.update(
            tree=tree, leaves=tree.leaves, branch_of={leaf.slug: b for b in tree.branches for leaf in b.leaves},
            status_meaning=STATUS_MEANING, link_names=LINK_NAMES, topic_href=_topic_href, byline=_byline,
            venue_text=_venue_text, share=_share, total=len(self.records), keys={record.key for record in self.records},
        )  # fmt: skip
        self.related = related_papers(self.records)
        self.titles = {record.key: record.title for record in self.records}
        self.in_leaf: dict[str, list[Record]] = {slug: [] for slug in tree.leaves}
        for record in self.records:
            for slug in record.leaves:
                self.in_leaf[slug].append(record)

    def all(self) -> dict[str, str]:
        pages = {
            "papers/index.md": self.index(),
            "papers/new.md": self.new(),
            "papers/taxonomy.md": self.taxonomy(),
            "papers/statistics.md": self.statistics(),
        }
        for branch in self.tree.branches:
            pages[f"topic/{branch.slug}.md"] = self.branch(branch)
            for leaf in branch.leaves:
                pages[f"topic/{leaf.slug}.md"] = self.leaf(branch, leaf)
        for record in self.records:
            pages[f"paper/{record.key}.md"] = self.paper(record)
        return pages | self.feeds()

    def feeds(self) -> dict[str, str]:
        """Atom and RSS, of all papers and of every leaf."""
        found: dict[str, str] = {}
        parts = [("all", feeds.NAME, self.records)]
        parts += [(slug, f"{feeds.NAME}: {self.tree.leaves[slug].name}", held) for slug, held in self.in_leaf.items()]
        for slug, title, records in parts:
            options: dict[str, Any] = {"title": title, "slug": slug, "site": self.links.site_url, "limit": FEED_LENGTH}
            found[f"feeds/{slug}.atom.xml"] = feeds.atom(records, **options)
            found[f"feeds/{slug}.rss.xml"] = feeds.rss(records, **options)
        return found

    def new(self) -> str:
        front = {
            "heading": "What is new",
            "description": "Papers that came into the catalog last",
            "hide": ["toc"],
            "search": {"exclude": True},
        }
        days: dict[str, list[Record]] = {}
        for record in feeds.latest(self.records, FEED_LENGTH):
            days.setdefault(record.added, []).append(record)
        added = Counter(record.added for record in self.records)
        return self._render("new.md.j2", front, days=days, added=added)

    def _render(self, template: str, front: dict[str, Any], **values: Any) -> str:
        return _front_matter(front) + self.env.get_template(template).render(**values).strip() + "\n"

    def index(self) -> str:
        front = {
            "heading": "Papers",
            "description": f"{len(self.records)} papers on latent reasoning, by topic, mechanism, year and venue",
            "hide": ["navigation", "toc"],
            "scripts": ["assets/papers.js"],
            "search": {"exclude": True},
        }
        facet_names = ("mechanism", "stage", "modality")
        return self._render(
            "index.md.j2", front, records=self.records, facets=self._index_facets(), facet_names=facet_names,
            not_stated=NOT_STATED, has=_has,
        )  # fmt: skip

    def _index_facets(self) -> list[IndexFacet]:
        per_leaf = {slug: len(found) for slug, found in self.in_leaf.items()}
        topics = tuple(
            Option(branch.slug, branch.name, self._in_branch(branch),
                   tuple(Option(leaf.slug, leaf.name, per_leaf[leaf.slug]) for leaf in branch.leaves))
            for branch in self.tree.branches
        )  # fmt: skip
        facets = [IndexFacet("leaf", "Topic", topics, open=True)]
        for facet in self.facets.facets:
            if facet.slug not in ("mechanism", "stage", "modality"):
                continue
            counts = Counter(value for r in self.records for value in getattr(r.facets, facet.slug) or [NOT_STATED])
            options = [Option(value.slug, value.name, counts[value.slug]) for value in facet.values]
            options.append(Option(NOT_STATED, "not stated", counts[NOT_STATED]))
            facets.append(IndexFacet(facet.slug, facet.name, tuple(options)))
        years = Counter(str(record.year or NOT_STATED) for record in self.records)
        facets.append(IndexFacet("year", "Year", _options(years, sorted(years, reverse=True))))
        venues = Counter(record.venue.name if record.venue else NOT_STATED for record in self.records)
        facets.append(IndexFacet("venue", "Venue", _options(venues, sorted(venues, key=lambda v: (-venues[v], v)))))
        has = Counter(value for record in self.records for value in _has(record))
        facets.append(
            IndexFacet("has", "Available", (Option("code", "has code", has["code"]),
                                            Option("runnable", "runnable here", has["runnable"])), open=True)
        )  # fmt: skip
        status = Counter(record.taxonomy.status for record in self.records)
        options = tuple(Option(value, value, status[value]) for value in STATUS_MEANING)
        facets.append(IndexFacet("status", "Taxonomy status", options))
        return facets

    def _in_branch(self, branch: Branch) -> int:
        slugs = {leaf.slug for leaf in branch.leaves}
        return sum(not slugs.isdisjoint(record.leaves) for record in self.records)

    def taxonomy(self) -> str:
        front = {"heading": "Taxonomy", "description": "The topics under which papers are filed, and their definitions"}
        counts = {slug: len(found) for slug, found in self.in_leaf.items()}
        return self._render("taxonomy.md.j2", front, counts=counts, in_branch=self._in_branch)

    def branch(self, branch: Branch) -> str:
        front = {
            "heading": branch.name,
            "description": f"Latent reasoning papers: {escape(branch.name)}",
            "hide": ["navigation", "toc"],
        }
        counts = {leaf.slug: len(self.in_leaf[leaf.slug]) for leaf in branch.leaves}
        return self._render("branch.md.j2", front, branch=branch, counts=counts, found=self._in_branch(branch))

    def leaf(self, branch: Branch, leaf: Leaf) -> str:
        front = {"heading": leaf.name, "description": str(escape(leaf.definition)), "hide": ["navigation", "toc"]}
        return self._render("leaf.md.j2", front, branch=branch, leaf=leaf, records=self.in_leaf[leaf.slug])

    def statistics(self) -> str:
        front = {"heading": "Statistics", "description": "Number of papers by topic, year, source and status"}
        return self._render("statistics.md.j2", front, **page_values(self.records, self.tree, tuple(STATUS_MEANING)))

    def paper(self, record: Record) -> str:
        definition = self.tree.leaves[record.taxonomy.primary].name
        front = {
            "heading": clean(record.title),
            "description": str(escape(f"{record.title}: a paper on latent reasoning filed under {definition}")),
            "tags": [self.tree.leaves[slug].name for slug in record.leaves],
            "hide": ["navigation", "toc", "tags"],
            "scripts": ["assets/cite.js"],
            "citation": _citation(record),
            "jsonld": _json_ld(record),
        }
        cite = []
        if self.links.bibtex:
            cite = [
                ("bibtex", "BibTeX", self.links.bibtex(record)),
                ("ris", "RIS", ris.entry(record)),
                ("csl", "CSL-JSON", json.dumps([csl.item(record)], ensure_ascii=False, indent=1)),
            ]
        facet_names = {facet.slug: {v.slug: v.name for v in facet.values} for facet in self.facets.facets}
        values = [
            (facet.name, [facet_names[facet.slug].get(v, v) for v in getattr(record.facets, facet.slug)])
            for facet in self.facets.facets
        ]
        return self._render(
            "paper.md.j2", front, record=record, cite=cite, facet_values=[entry for entry in values if entry[1]],
            runnable=[self._runnable(entry) for entry in record.runnable],
            correction=self._correction(record), related=self.related[record.key], titles=self.titles,
        )  # fmt: skip

    def _runnable(self, entry: Any) -> dict[str, str | None]:
        notebook = self.links.notebook_page(entry.notebook) if entry.notebook else None
        return {
            "module": entry.module, "module_page": self.links.module_page(entry.module),
            "notebook": entry.notebook, "notebook_page": notebook, "test": entry.test,
        }  # fmt: skip

    def _correction(self, record: Record) -> str | None:
        if not self.links.corrections_url:
            return None
        body = f"Record {record.key}\n\nWhat is wrong:\n\nWhat is right, and where it says so:\n"
        query = {"title": f"Correction: {record.key}", "body": body}
        return f"{self.links.corrections_url}?{urlencode(query, quote_via=quote)}"


def _newest_first(record: Record) -> tuple[Any, ...]:
    value = record.published.value if record.published else str(record.year or "")
    # Digits are inverted so that one ascending sort gives newest date first, then title.
    return tuple(-ord(char) for char in value.ljust(10, "\x00")), record.title.casefold(), record.key


def _options(counts: Counter[str], order: Sequence[str]) -> tuple[Option, ...]:
    known = [value for value in order if value != NOT_STATED]
    options = [Option(_value_slug(value), value, counts[value]) for value in known]
    if counts[NOT_STATED]:
        options.append(Option(NOT_STATED, "not stated", counts[NOT_STATED]))
    return tuple(options)


def _value_slug(text: str) -> str:
    """A facet value as it stands in the address and in data attributes: no blanks."""
    return re.sub(r"[^\w.]+", "-", text.strip().casefold()).strip("-") or "x"


def _has(record: Record) -> list[str]:
    return ["code"] * record.has_code + ["runnable"] * bool(record.runnable)


def _topic_href(slug: str, up: str = "..") -> str:
    return f"{up}/topic/{slug}.html"


def _day(date: PartialDate | None) -> str:
    return date.value if date else "date unknown"


def _byline(record: Record, limit: int = 3) -> str:
    names = record.author_names
    if len(names) <= limit + 1:
        return ", ".join(names)
    return f"{', '.join(names[:limit])} and {len(names) - limit} more"


def _venue_text(record: Record) -> str | None:
    venue = record.venue
    if venue is None:
        return None
    text = f"{venue.name} {venue.year}" if venue.year else venue.name
    return f"{text} ({venue.track})" if venue.track and venue.track != "main" else text


def _share(count: int, whole: int) -> str:
    percent = 100 * count / whole if whole else 0.0
    return "< 1 %" if 0 < percent < 1 else f"{percent:.0f} %"


def _front_matter(front: dict[str, Any]) -> str:
    # JSON values are YAML values; every string has been cleaned of what YAML refuses.
    lines = [f"{key}: {json.dumps(value, ensure_ascii=False)}" for key, value in front.items()]
    return "---\n" + "\n".join(lines) + "\n---\n\n"


def _citation(record: Record) -> list[list[str]]:
    """The ``citation_*`` fields that reference managers read; what is unknown is left out."""
    fields = [["citation_title", clean(record.title)]]
    fields += [["citation_author", clean(name)] for name in record.author_names]
    if record.published:
        fields.append(["citation_publication_date", record.published.value.replace("-", "/")])
    if record.venue:
        kind = "citation_journal_title" if record.venue.type == "journal" else "citation_conference_title"
        fields.append([kind, clean(record.venue.name)])
    if record.ids.doi:
        fields.append(["citation_doi", clean(record.ids.doi)])
    if record.ids.arxiv:
        fields.append(["citation_arxiv_id", record.ids.arxiv])
        fields.append(["citation_pdf_url", f"https://arxiv.org/pdf/{record.ids.arxiv}"])
    if record.url:
        fields.append(["citation_abstract_html_url", record.url])
    return fields


def _json_ld(record: Record) -> dict[str, Any]:
    data: dict[str, Any] = {
        "@context": "https://schema.org",
        "@type": "ScholarlyArticle",
        "name": clean(record.title),
        "headline": clean(record.title),
    }
    if record.author_names:
        data["author"] = [{"@type": "Person", "name": clean(name)} for name in record.author_names]
    if record.published:
        data["datePublished"] = record.published.value
    identifiers = []
    if record.ids.arxiv:
        identifiers.append({"@type": "PropertyValue", "propertyID": "arXiv", "value": record.ids.arxiv})
    if record.ids.doi:
        identifiers.append({"@type": "PropertyValue", "propertyID": "DOI", "value": clean(record.ids.doi)})
    if identifiers:
        data["identifier"] = identifiers
    if record.url:
        data["url"] = record.url
    if record.venue:
        data["isPartOf"] = {"@type": "PublicationIssue", "name": clean(record.venue.name)}
    return data
