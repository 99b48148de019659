"""From the rows of one paper to its record."""

import re
from dataclasses import dataclass
from urllib.parse import urlsplit

from latentcot.catalog.classify import classify, facets
from latentcot.catalog.identifiers import Identifier, identify, parse_arxiv, record_key
from latentcot.catalog.import_report import Report
from latentcot.catalog.raw import SEEDS, Row
from latentcot.catalog.record import Ids, Link, PartialDate, Provenance, Record
from latentcot.catalog.store import normal_url
from latentcot.catalog.text import collapse, looks_like_slug, normal_title, slug, without_name
from latentcot.catalog.venues import Parsed, VenueClaim, VenueVerdict, parse_venue, settle

# Hosts whose page or file is the published paper itself.
PUBLISHERS = (
    "aclanthology.org", "doi.org", "dl.acm.org", "sciencedirect.com", "proceedings.neurips.cc", "papers.neurips.cc",
    "mdpi.com", "peerj.com", "ieeexplore.ieee.org",
)  # fmt: skip
_PAGES = (*PUBLISHERS, "papers.ssrn.com", "nips.cc", "neurips.cc", "researchgate.net", "storage.googleapis.com")
_FILE_ORDER = {"seeds": 0, "awesome_latent_cot": 1, "neighbours": 2, "horizon": 3}


@dataclass(frozen=True)
class Title:
    title: str
    row: Row
    confidence: str


@dataclass(frozen=True)
class Cluster:
    """All rows of one paper, in the order of the source files."""

    rows: tuple[Row, ...]

    @property
    def arxiv(self) -> str | None:
        return next((row.arxiv for row in self.rows if row.arxiv), None)

    @property
    def year(self) -> int | None:
        if self.arxiv:
            return int(parse_arxiv(self.arxiv).month[:4])
        return next((int(row.date[:4]) for row in self.rows if row.date), None)

    @property
    def venue_names(self) -> frozenset[str]:
        names = [parse_venue(row.venue).name for row in self.rows if row.venue]
        return frozenset(name for name in names if name)

    def title(self) -> Title:
        """The current title: arXiv's own where a tracker shows it, else a title whose id was checked, else any.

        Lists spell one title differently; the spelling with the most capitalised words is taken (one list lower-cases
        everything), at a tie the list that copies titles most faithfully.
        """
        usable = [row for row in self.rows if not looks_like_slug(row.title)] or list(self.rows)
        if shown := next((row for row in usable if row.title_on_arxiv), None):
            wanted, confidence = str(shown.title_on_arxiv), "high"
        else:
            checked = [row for row in usable if row.id_status == "agrees"]
            wanted, confidence = (checked or usable)[0].title, "high" if checked else "medium"
        spellings = [
            (spelling, row)
            for row in usable
            for text in (row.title_on_arxiv, row.title)
            if text
            for spelling in (tidy_title(text), without_name(tidy_title(text)))
        ]
        same = [pair for pair in spellings if normal_title(pair[0]) == normal_title(wanted)]
        best = max(same, key=lambda pair: (_capitals(pair[0]), -_FILE_ORDER[pair[1].file]))
        return Title(best[0], best[1], confidence)

    def other_titles(self, current: str) -> list[str]:
        """Titles whose normal form differs from the current one, each once."""
        seen = {normal_title(current)}
        found = []
        for row in self.rows:
            for text in (row.title, row.title_on_arxiv, *row.other_titles):
                if not text or looks_like_slug(text) or normal_title(tidy_title(text)) in seen:
                    continue
                seen.add(normal_title(tidy_title(text)))
                found.append(tidy_title(text))
        return found


def tidy_title(title: str) -> str:
    """White space, ligatures, and the ``=`` that one list writes for a colon."""
    return re.sub(r"(?<=\w)= (?=\w)", ": ", collapse(title))


def _capitals(title: str) -> int:
    if title.isupper():
        return 0
    return sum(word[0].isupper() for word in re.findall(r"[^\W\d_][^\s-]*", title))


def build_record(cluster: Cluster, rules: dict, dates: dict[str, str], report: Report) -> Record:
    """The record of a cluster. Its citation key is provisional until the importer has seen all keys."""
    title = cluster.title()
    verdict = _venue(cluster, rules, report)
    ids = _ids(cluster)
    key = _key(ids, title.title)
    links = _links(cluster, key, ids, rules, report)
    taxonomy, listed = classify(key, title.title, cluster.rows, rules)
    published, published_from = _published(cluster)
    authors_row = next((row for row in cluster.rows if row.authors), None)
    unknown = [rule["reason"] for rule in rules["title_unknown"] if rule["row"] in {row.ref for row in cluster.rows}]
    if unknown:
        report.note(key, "title", unknown[0])
    if verdict.conflict:
        taken = f"{verdict.venue.name} {verdict.venue.year}" if verdict.venue else None
        report.conflict(key, "venue", verdict.conflict, taken)
    provenance = {"title": _provenance(title.row, dates, "low" if unknown else title.confidence)}
    if authors_row:
        provenance["authors"] = _provenance(authors_row, dates, "medium")
    if published and published_from:
        provenance["published"] = _provenance(published_from, dates, "medium" if ids.arxiv else "low")
    if verdict.venue:
        row = next(row for row in cluster.rows if any(verdict.venue.source == entry.source for entry in row.listings))
        provenance["venue"] = _provenance(row, dates, verdict.confidence, verdict.venue.source)
    values = {
        "key": key,
        "ids": ids.model_dump(),
        "title": title.title,
        "other_titles": cluster.other_titles(title.title),
        "authors": _authors(authors_row),
        "published": published.model_dump() if published else None,
        "updated": None,
        "version": None,
        "status": "active",
        "superseded_by": None,
        "categories": [],
        "primary_category": None,
        "venue": verdict.venue.model_dump() if verdict.venue else None,
        "links": [link.model_dump() for link in links],
        "taxonomy": taxonomy.model_dump(),
        "facets": facets(title.title, taxonomy, listed, cluster.rows, links, rules).model_dump(),
        "runnable": [],
        "note": None,
        "citekey": "unassigned",
        "citekey_aliases": [],
        "sources": [
            {
                "source": entry.source,
                "ref": row.ref,
                "section": None if entry.source == SEEDS else " > ".join(entry.section),
            }
            for row in cluster.rows
            for entry in row.listings
        ],
        "provenance": {name: entry.model_dump() for name, entry in provenance.items()},
        "added": rules["import_date"],
        "decision": None,
    }
    return Record.model_validate(values)


def _authors(row: Row | None) -> list[dict] | None:
    if row is None or row.authors is None:
        return None
    return [{"name": collapse(name), "orcid": None} for name in row.authors]


def _provenance(row: Row, dates: dict[str, str], confidence: str, source: str | None = None) -> Provenance:
    name = source or row.listings[0].source
    return Provenance.model_validate({"source": name, "date": dates[name], "confidence": confidence})


def _ids(cluster: Cluster) -> Ids:
    found: dict[str, str] = {"arxiv": cluster.arxiv} if cluster.arxiv else {}
    for row in cluster.rows:
        if row.doi:
            found.setdefault("doi", row.doi.lower())
        for url in (row.url, *row.alt_urls):
            identifier = identify(url)
            if identifier and identifier.kind != "arxiv":
                found.setdefault(identifier.kind, identifier.value)
    return Ids.model_validate({name: found.get(name) for name in Ids.model_fields})


def _key(ids: Ids, title: str) -> str:
    for kind in ("arxiv", "doi", "openreview", "acl"):
        if value := getattr(ids, kind):
            return record_key(Identifier(kind, value))
    return f"x-{slug(title)}"


def _published(cluster: Cluster) -> tuple[PartialDate | None, Row | None]:
    """The month in the arXiv id, else the date as listed. The id's month is that of the announcement."""
    if cluster.arxiv:
        row = next(row for row in cluster.rows if row.arxiv == cluster.arxiv)
        return PartialDate(value=parse_arxiv(cluster.arxiv).month, precision="month"), row
    for row in cluster.rows:
        if row.date:
            precision = "month" if len(row.date) == 7 else "year"
            return PartialDate.model_validate({"value": row.date, "precision": precision}), row
    return None, None


def _venue(cluster: Cluster, rules: dict, report: Report) -> VenueVerdict:
    left_out = {rule["row"]: rule["reason"] for rule in rules["venues_left_out"]}
    completed = {rule["row"]: rule["venue"] for rule in rules["venues_completed"]}
    claims = []
    for row in cluster.rows:
        if not row.venue:
            continue
        if row.ref in left_out:
            report.note(cluster.arxiv or row.title, "venue", f"{row.venue} ({row.ref}) left out: {left_out[row.ref]}")
            continue
        text = completed.get(row.ref, row.venue)
        parsed = parse_venue(text)
        if parsed.name is None:
            continue
        parsed = _with_anthology_track(parsed, row)
        claims.append(VenueClaim(parsed, row.listings[0].source, row.ref, row.venue, _acceptance(cluster, row, parsed)))
    return settle(claims)


def _acceptance(cluster: Cluster, row: Row, parsed: Parsed) -> str | None:
    """``published`` where the row links the proceedings, ``None`` where nothing rules out a mere submission."""
    if _host_in(row.url, PUBLISHERS) or row.doi or parsed.type == "journal":
        return "published"
    if cluster.arxiv is None and all(_host_in(r.url, ("openreview.net",)) for r in cluster.rows):
        return None
    return "accepted"


def _with_anthology_track(parsed: Parsed, row: Row) -> Parsed:
    identifier = identify(row.url)
    if identifier and identifier.kind == "acl" and parsed.track is None:
        volume = identifier.value.split(".")[1] if "." in identifier.value else ""
        track = "findings" if volume.startswith("findings") else "srw" if volume.endswith("-srw") else None
        track = "main" if track is None and volume.endswith("-main") else track
        return Parsed(parsed.name, parsed.year, track, parsed.type)
    return parsed


def _host_in(url: str, hosts: tuple[str, ...]) -> bool:
    host = (urlsplit(url).hostname or "").removeprefix("www.")
    return any(host == name or host.endswith(f".{name}") for name in hosts)


def _links(cluster: Cluster, key: str, ids: Ids, rules: dict, report: Report) -> list[Link]:
    links: dict[tuple[str, str], Link] = {}

    def add(kind: str, url: str, official: bool | None, source: str) -> None:
        place = (kind, normal_url(url))
        value = {"kind": kind, "url": url.strip(), "official": official, "source": source, "checked": None}
        links.setdefault(place, Link.model_validate(value))

    if ids.arxiv:
        add("abs", f"https://arxiv.org/abs/{ids.arxiv}", True, cluster.rows[0].listings[0].source)
    judged = {(rule["row"], rule["field"]): rule["reason"] for rule in rules["links_left_out"]}
    # A link that is wrong in one row is wrong in every row of the paper: lists copy from each other.
    left_out = {
        normal_url(url): reason
        for row in cluster.rows
        for name in ("code_url", "project_url")
        if (url := getattr(row, name)) and (reason := judged.get((row.ref, name)))
    }
    official = {(rule["key"], normal_url(rule["url"])) for rule in rules["official_code"]}
    for row in cluster.rows:
        source = row.listings[0].source
        for url in (row.url, *row.alt_urls):
            _add_page(add, url, source)
        for name, kind in (("code_url", "code"), ("project_url", "project")):
            url = getattr(row, name)
            if url is None:
                continue
            if reason := left_out.get(normal_url(url)):
                report.link_left_out(key, row, url, reason)
                continue
            if kind == "project" and _host_in(url, ("github.com",)):
                kind = "code"
            known = True if row.file == "seeds" and kind == "code" else None
            add(kind, url.rstrip("/"), True if (key, normal_url(url)) in official else known, source)
        for url in row.related_code:
            add("code", url, False, source)
    found = list(links.values())
    listed = {normal_url(row.code_url) for row in cluster.rows if row.code_url}
    repositories = sorted(
        {link.url for link in found if link.kind == "code" and link.official is None and normal_url(link.url) in listed}
    )
    if len(repositories) > 1:
        report.conflict(key, "code", "; ".join(repositories), None)
    order = ("abs", "pdf", "openreview", "code", "project", "weights", "data", "video")
    return sorted(found, key=lambda link: (order.index(link.kind), link.official is not True, link.official is False))


def _add_page(add, url: str, source: str) -> None:
    identifier = identify(url)
    if identifier and identifier.kind == "arxiv":
        return  # written from the checked id, never from the listed address
    if identifier and identifier.kind == "openreview":
        add("openreview", f"https://openreview.net/forum?id={identifier.value}", None, source)
    elif identifier and identifier.kind == "acl":
        add("abs", f"https://aclanthology.org/{identifier.value}", None, source)
    elif urlsplit(url).path.endswith(".pdf"):
        add("pdf", url, None, source)
    elif _host_in(url, _PAGES):
        add("abs", url, None, source)
    else:
        add("project", url, None, source)
