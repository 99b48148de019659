"""The Atom feed as arXiv writes it. Source: arXiv API user's manual, section 3."""

import html
from collections.abc import Sequence
from datetime import datetime

from latentcot.catalog.feed_server.corpus import Paper

HEAD = """<?xml version="1.0" encoding="UTF-8"?>
<feed xmlns="http://www.w3.org/2005/Atom" xmlns:opensearch="http://a9.com/-/spec/opensearch/1.1/" xmlns:arxiv="http://arxiv.org/schemas/atom">
  <id>http://arxiv.org/api/{id}</id>
  <title>arXiv Query: {title}</title>
  <updated>{updated}</updated>
  <opensearch:itemsPerPage>{size}</opensearch:itemsPerPage>
  <opensearch:totalResults>{total}</opensearch:totalResults>
  <opensearch:startIndex>{start}</opensearch:startIndex>
"""


def text(value: str) -> str:
    """Text for an element or attribute."""
    return html.escape(value, quote=True)


def render(entries: Sequence[str], *, title: str, total: int, start: int, size: int, now: datetime) -> str:
    """A whole feed around rendered entries."""
    head = HEAD.format(id="demo", title=text(title), updated=stamp(now), size=size, total=total, start=start)
    return head + "".join(entries) + "</feed>\n"


def stamp(moment: datetime) -> str:
    return moment.strftime("%Y-%m-%dT%H:%M:%SZ")


def render_entry(paper: Paper, number: int | None = None) -> str:
    """One version of a paper (the latest by default)."""
    number = number or len(paper.versions)
    version = paper.versions[number - 1]
    address = paper.raw_id if paper.raw_id is not None else f"http://arxiv.org/abs/{paper.base}v{number}"
    withdrawn = "withdrawn" in (version.comment or "").lower()
    lines = [
        f"<id>{text(address)}</id>",
        f"<title>{text(version.title)}</title>",
        f"<updated>{stamp(version.updated)}</updated>",
        f'<link href="https://arxiv.org/abs/{paper.base}v{number}" rel="alternate" type="text/html"/>',
        f"<summary>{text(version.abstract)}</summary>",
        f"<published>{stamp(paper.published)}</published>",
        *(f"<author><name>{text(name)}</name></author>" for name in paper.authors),
        *(f'<category term="{text(name)}" scheme="http://arxiv.org/schemas/atom"/>' for name in paper.categories),
        *([f'<arxiv:primary_category term="{text(paper.categories[0])}"/>'] if paper.categories else []),
        *([f"<arxiv:comment>{text(version.comment)}</arxiv:comment>"] if version.comment else []),
        *([f"<arxiv:journal_ref>{text(version.journal_ref)}</arxiv:journal_ref>"] if version.journal_ref else []),
        *([f"<arxiv:doi>{text(version.doi)}</arxiv:doi>"] if version.doi else []),
        # A withdrawn version has no PDF.
        *(
            []
            if withdrawn
            else [
                f'<link href="https://arxiv.org/pdf/{paper.base}v{number}" rel="related" title="pdf" type="application/pdf"/>'
            ]
        ),
    ]
    return "  <entry>\n" + "".join(f"    {line}\n" for line in lines) + "  </entry>\n"


def render_error(reason: str, now: datetime) -> str:
    """An error is a feed too: one entry called Error, without a date of publication."""
    entry = (
        "  <entry>\n    <id>http://arxiv.org/api/errors#incorrect_query</id>\n    <title>Error</title>\n"
        f"    <summary>{text(reason)}</summary>\n    <updated>{stamp(now)}</updated>\n"
        '    <link href="http://arxiv.org/api/errors#incorrect_query" rel="alternate" type="text/html"/>\n'
        "    <author><name>arXiv api core</name></author>\n  </entry>\n"
    )
    return render([entry], title="error", total=1, start=0, size=1, now=now)
