"""Code of a paper: who names a repository, and whether the repository names the paper.

A repository that the paper's page on Hugging Face names (``githubRepo``) becomes a link that nobody has confirmed. It is *official* only
where its README names the arXiv id or the title. Repositories are not searched by title: forks and reimplementations would win.
"""

import json
from urllib.parse import quote

from latentcot.catalog.enrich.comments import repository
from latentcot.catalog.enrich.precedence import TRACKER, strength
from latentcot.catalog.enrich.web import Web, WebError
from latentcot.catalog.record import Link, Provenance, Record
from latentcot.catalog.store import normal_url
from latentcot.catalog.text import normal_title

TRACKER_API = "https://huggingface.co/api/papers"
README_HOST = "https://raw.githubusercontent.com"
READMES = ("README.md", "readme.md", "README.rst", "README")


def named_repository(record: Record, web: Web, api: str = TRACKER_API) -> Link | None:
    """The repository that the tracker names for the paper, as a link; ``None`` where it knows none."""
    answer = web.get(f"{api}/{quote(record.ids.arxiv or '', safe='')}")
    if answer.status == 404:
        return None
    if answer.status != 200:
        raise WebError(f"the tracker answered {answer.status}")
    try:
        data = json.loads(answer.body)
    except ValueError:
        raise WebError("the tracker's answer is no JSON") from None
    text = data.get("githubRepo") if isinstance(data, dict) else None
    url = repository(text) if isinstance(text, str) else None
    if url is None or normal_url(url) in {normal_url(link.url) for link in record.links}:
        return None
    return Link(kind="code", url=url, official=None, source=TRACKER, checked=None)


def names_the_paper(url: str, record: Record, web: Web, host: str = README_HOST) -> bool | None:
    """Whether the README of a GitHub repository names the paper; ``None`` where there is no README to read."""
    found = repository(url)
    if found is None or not found.startswith("https://github.com/"):
        return None
    path = found.removeprefix("https://github.com/")
    for name in READMES:
        answer = web.get(f"{host}/{path}/HEAD/{name}")
        if answer.status == 200:
            text = answer.body.decode("utf-8", errors="replace")
            titles = [normal_title(title) for title in (record.title, *record.other_titles)]
            plain = f" {normal_title(text)} "
            by_title = any(f" {title} " in plain for title in titles if len(title.split()) >= 4)
            return bool(record.ids.arxiv and record.ids.arxiv in text) or by_title
        if answer.status != 404:
            raise WebError(f"{host} answered {answer.status}")
    return None


def enrich_code(record: Record, web: Web, today: str, *, api: str = TRACKER_API, readmes: str = README_HOST) -> Record:
    """``record`` with a repository found, and with unconfirmed repositories confirmed where their README allows it."""
    old = record.provenance.get("links")
    if old is not None and strength(old.source) == 4:
        return record
    links = list(record.links)
    if (
        record.ids.arxiv
        and not any(link.kind == "code" for link in links)
        and (link := named_repository(record, web, api))
    ):
        links.append(link)
    confirmed = False
    for place, link in enumerate(links):
        if link.kind == "code" and link.official is None and names_the_paper(link.url, record, web, readmes):
            links[place] = link.model_copy(update={"official": True})
            confirmed = True
    if links == record.links:
        return record
    update: dict[str, object] = {"links": links}
    if confirmed:
        update["provenance"] = record.provenance | {
            "links": Provenance(source="README of the repository", date=today, confidence="high")
        }
    return Record.model_validate(record.model_copy(update=update).model_dump())
