"""Identifiers of papers: arXiv, DOI, OpenReview and ACL Anthology, read from ids, addresses and citations.

Identity of an arXiv paper is (archive, number). The version is data about the record, the subject class of an old
identifier (``math.GT``) is not part of it, and a missing archive is never guessed: text that cannot be read raises
:class:`IdentifierError`, which says why.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal
from urllib.parse import parse_qs, unquote, urlsplit

# Archives that issued identifiers before April 2007, the closed ones included.
_OLD_ARCHIVES = """
acc-phys adap-org alg-geom ao-sci astro-ph atom-ph bayes-an chao-dyn chem-ph cmp-lg comp-gas cond-mat cs dg-ga funct-an
gr-qc hep-ex hep-lat hep-ph hep-th math math-ph mtrl-th nlin nucl-ex nucl-th patt-sol physics plasm-ph q-alg q-bio
quant-ph solv-int supr-con
"""
OLD_ARCHIVES = frozenset(_OLD_ARCHIVES.split())

_ARXIV_HOST = re.compile(r"^(?:(?:www|export|browse|[a-z]{2})\.)?arxiv\.org$|^(?:www\.)?alphaxiv\.org$")
_ARXIV_PATH = re.compile(r"^/(?:abs|pdf|html|format|ps|src|e-print|overview|forum)/(?P<rest>.+)$")
_ARXIV_DOI = re.compile(r"^10\.48550/arxiv\.(?P<rest>.+)$", re.IGNORECASE)
_NEW = re.compile(r"^(?P<yymm>[0-9]{4})\.(?P<number>[0-9]+)(?P<version>v[0-9]{1,4})?$")
_OLD = re.compile(
    r"^(?P<archive>[a-z]+(?:-[a-z]+)?)(?:\.[a-z]{2}|\.[a-z]+(?:-[a-z]+)?)?/(?P<number>[0-9]+)(?P<version>v[0-9]{1,4})?$"
)
_DOI = re.compile(r"^10\.\d{4,9}/\S+$")
_OPENREVIEW = re.compile(r"^[A-Za-z0-9_-]{6,24}$")
_ACL = re.compile(r"^(?:\d{4}\.[a-z0-9]+(?:[-_][a-z0-9]+)*\.\d+|[A-Z]\d{2}-\d{4,5})$")

Kind = Literal["arxiv", "doi", "openreview", "acl"]


class IdentifierError(ValueError):
    """The text is no identifier of the kind that was asked for; the message says why."""


@dataclass(frozen=True)
class ArxivId:
    """An arXiv paper (``base``) and, where the text named one, its version."""

    base: str
    version: int | None = None

    def __str__(self) -> str:
        return self.base if self.version is None else f"{self.base}v{self.version}"

    @property
    def yymm(self) -> str:
        """Year and month in which the identifier was issued, two digits each."""
        return self.base.rpartition("/")[2][:4]

    @property
    def month(self) -> str:
        """The same as ``YYYY-MM``; arXiv began in 1991, so 91 to 99 belong to the last century."""
        year = int(self.yymm[:2])
        return f"{1900 + year if year >= 91 else 2000 + year}-{self.yymm[2:]}"


@dataclass(frozen=True)
class Identifier:
    """A strong identifier: its kind, its canonical value and, for arXiv, the version that was named."""

    kind: Kind
    value: str
    version: int | None = None


def parse_arxiv(text: str) -> ArxivId:
    """Read an arXiv identifier from an id, a citation (``arXiv:...``), an address or an arXiv DOI.

    Raises :class:`IdentifierError` for anything else: another host, a number without its archive, a number of digits
    that its year did not have, a month outside 01 to 12, version 0.
    """
    if not isinstance(text, str):
        raise TypeError(f"text must be a string, given {type(text).__name__}")
    given = " ".join(text.split())
    body = re.sub(r"\s*\[[A-Za-z.-]+\]$", "", given)  # "arXiv:1502.04623v2 [cs.CV]" as printed on the paper
    body = re.sub(r"^arxiv:\s*", "", body, flags=re.IGNORECASE)
    body = _strip_address(body, given)
    body = re.sub(r"\.pdf$", "", body, flags=re.IGNORECASE).rstrip("/")
    lowered = body.lower()
    if match := _NEW.match(lowered):
        return _new_style(match, given)
    if match := _OLD.match(lowered):
        return _old_style(match, given)
    if re.fullmatch(r"[0-9]{7}(?:v[0-9]+)?", lowered):
        raise IdentifierError(
            f"{given!r} is an old arXiv number without its archive (expected for example 'cs/{lowered[:7]}'): "
            "several archives used the same numbers, so it names no paper"
        )
    raise IdentifierError(
        f"{_short(given)} is not an arXiv identifier (expected YYMM.NNNNN, YYMM.NNNN or archive/YYMMNNN)"
    )


def _strip_address(body: str, given: str) -> str:
    """The part of an address or DOI that holds the identifier; text that is no address comes back unchanged."""
    doi = re.sub(r"^(?:https?://)?(?:dx\.)?doi\.org/|^doi:\s*", "", body, flags=re.IGNORECASE)
    if match := _ARXIV_DOI.match(doi):
        return re.split(r"[?#]", match["rest"])[0]
    if "://" not in body and not re.match(r"^(?:[a-z]+\.)?(?:arxiv|alphaxiv)\.org/", body, flags=re.IGNORECASE):
        return re.split(r"[?#]", body)[0]
    try:
        parts = urlsplit(body if "://" in body else f"https://{body}")
        host = (parts.hostname or "").lower()
    except ValueError as error:
        raise IdentifierError(f"{_short(given)} is not a readable address: {error}") from None
    if not _ARXIV_HOST.match(host):
        raise IdentifierError(f"{_short(given)} is an address of {host or 'no host'}, not of arXiv")
    match = _ARXIV_PATH.match(unquote(parts.path))
    if not match:
        raise IdentifierError(f"{_short(given)} is an arXiv address that names no paper (expected /abs/ or /pdf/)")
    return match["rest"]


def _new_style(match: re.Match[str], given: str) -> ArxivId:
    yymm, number = match["yymm"], match["number"]
    _check_month(yymm, given)
    if yymm < "0704":
        raise IdentifierError(f"{given!r}: identifiers of the form YYMM.NNNN begin with 0704, given {yymm}")
    digits = 4 if yymm <= "1412" else 5
    if len(number) != digits:
        raise IdentifierError(
            f"{given!r}: an identifier of {yymm} has {digits} digits after the dot, given {len(number)} ({number})"
        )
    if int(number) == 0:
        raise IdentifierError(f"{given!r}: arXiv numbers begin with 1, given {number}")
    return ArxivId(f"{yymm}.{number}", _version(match["version"], given))


def _old_style(match: re.Match[str], given: str) -> ArxivId:
    archive, number = match["archive"], match["number"]
    if archive not in OLD_ARCHIVES:
        raise IdentifierError(f"{given!r}: {archive!r} is not an archive that issued old arXiv identifiers")
    if len(number) != 7:
        raise IdentifierError(f"{given!r}: an old identifier has 7 digits after the archive, given {len(number)}")
    _check_month(number[:4], given)
    if "0703" < number[:4] < "9107":
        raise IdentifierError(f"{given!r}: old identifiers run from 9107 to 0703, given {number[:4]}")
    if int(number[4:]) == 0:
        raise IdentifierError(f"{given!r}: arXiv numbers begin with 1, given {number[4:]}")
    return ArxivId(f"{archive}/{number}", _version(match["version"], given))


def _check_month(yymm: str, given: str) -> None:
    if not "01" <= yymm[2:] <= "12":
        raise IdentifierError(f"{given!r}: {yymm[2:]} is no month (the first four digits are YYMM, given {yymm})")


def _version(text: str | None, given: str) -> int | None:
    if text is None:
        return None
    if int(text[1:]) == 0:
        raise IdentifierError(f"{given!r}: versions begin with v1, given {text}")
    return int(text[1:])


def parse_doi(text: str) -> str:
    """A DOI in lower case (DOIs ignore case), from a bare DOI, ``doi:...``, a resolver or an ACM address."""
    body = text.strip()
    body = re.sub(
        r"^(?:https?://)?(?:dx\.)?doi\.org/|^doi:\s*|^(?:https?://)?(?:www\.)?dl\.acm\.org/doi/(?:abs/|pdf/|full/)?",
        "",
        body,
        flags=re.IGNORECASE,
    )
    body = re.split(r"[?#]", unquote(body))[0].rstrip("/.,;")
    if not _DOI.match(body):
        raise IdentifierError(f"{_short(text)} is not a DOI (expected 10.<registrant>/<name>)")
    return body.lower()


def parse_openreview(text: str) -> str:
    """The forum id in an OpenReview address (``/forum?id=``, ``/pdf?id=``); its letters keep their case."""
    body = text.strip()
    parts = urlsplit(body if "://" in body else f"https://{body}")
    if (parts.hostname or "").lower().removeprefix("www.") != "openreview.net":
        raise IdentifierError(f"{_short(text)} is not an OpenReview address")
    values = parse_qs(parts.query).get("id", [])
    if len(values) != 1 or not _OPENREVIEW.match(values[0]):
        raise IdentifierError(f"{_short(text)} names no OpenReview forum (expected ?id=...)")
    return values[0]


def parse_acl(text: str) -> str:
    """An ACL Anthology id (``2025.findings-emnlp.669``, ``P19-1001``), bare or from an Anthology address."""
    body = re.sub(
        r"^(?:https?://)?(?:www\.)?(?:aclanthology\.org|aclweb\.org/anthology)/", "", text.strip(), flags=re.IGNORECASE
    )
    body = re.sub(r"\.(?:pdf|bib)$", "", re.split(r"[?#]", body)[0].rstrip("/"))
    if not _ACL.match(body):
        raise IdentifierError(f"{_short(text)} is not an ACL Anthology id")
    return body


def identify(text: str) -> Identifier | None:
    """The strong identifier that ``text`` holds, or ``None``: arXiv first, then DOI, OpenReview and ACL Anthology."""
    text = text.strip()
    try:
        arxiv = parse_arxiv(text)
        return Identifier("arxiv", arxiv.base, arxiv.version)
    except IdentifierError:
        pass
    parsers: dict[Kind, Callable[[str], str]] = {"doi": parse_doi, "openreview": parse_openreview, "acl": parse_acl}
    for kind, parse in parsers.items():
        try:
            return Identifier(kind, parse(text))
        except ValueError:  # IdentifierError, or an address that urlsplit refuses
            continue
    return None


def record_key(identifier: Identifier) -> str:
    """The permanent key of a record with this identifier; a file name too: awkward characters become ``_``."""
    if identifier.kind == "arxiv":
        return identifier.value.replace("/", "_")
    return f"{identifier.kind}-{re.sub(r'[^A-Za-z0-9._-]', '_', identifier.value)}"


def _short(text: str) -> str:
    return repr(text if len(text) <= 80 else text[:77] + "...")
