"""Faults reported elsewhere for bibliographies and identifiers: none of them may happen here."""

import json
import re
from datetime import UTC, datetime

import pytest
from pybtex.database import parse_string
from pydantic import ValidationError

from latentcot.catalog import Record, find, get, load_records
from latentcot.catalog.bibtex import export
from latentcot.catalog.enrich.arxiv import merge_entry
from latentcot.catalog.export import render
from latentcot.catalog.feed_server import Paper, Version
from latentcot.catalog.feed_server.feed import render as render_atom
from latentcot.catalog.feed_server.feed import render_entry
from latentcot.catalog.feed_server.trial import small_catalog
from latentcot.catalog.identifiers import IdentifierError, parse_arxiv
from latentcot.catalog.names import base_citekey, key_stem, unique_citekey
from latentcot.catalog.queue_store import Candidate, Folders, write_candidate
from latentcot.catalog.record import Author
from latentcot.catalog.review import accept, undo
from latentcot.catalog.store import parse_record
from latentcot.catalog.update.atom import Entry, parse_feed
from latentcot.catalog.update.known import Known

NOW = datetime(2026, 2, 10, tzinfo=UTC)
SURNAMES = {"Łuß-Ørsted": "LussOrsted", "Kadıoğlu": "Kadioglu", "Nguyễn": "Nguyen", "O'Dálaigh": "ODalaigh", "王": ""}
KEY = re.compile(r"^[A-Za-z][A-Za-z0-9_:-]*$")


def candidate_by(number: int, author: str) -> Candidate:
    """A candidate with one author."""
    values = {
        "key": f"2602.{number:05d}", "arxiv": f"2602.{number:05d}", "version": 1, "title": f"Latent Thought {number}",
        "authors": [author], "abstract": None, "published": "2026-02-10T00:00:00Z", "updated": "2026-02-10T00:00:00Z",
        "comment": None, "journal_ref": None, "doi": None, "code": [], "primary_category": "cs.CL", "categories": ["cs.CL"],
        "queries": ["q"], "near": [], "prefilled": False, "again": None,
        "score": {"probability": 0.9, "leaves": [], "reasons": [], "scorer": "test"},
    }  # fmt: skip
    return Candidate.model_validate(values)


def record_in(folders: Folders, key: str) -> Record:
    path = folders.record_file(key)
    assert path is not None
    return parse_record(path.read_bytes(), key)


def render_feed(*ids: str) -> bytes:
    """A feed with an entry for each id, as arXiv writes it."""
    entries = [
        render_entry(Paper("2602.00001", (Version(NOW, f"Paper {text}"),), raw_id=f"http://arxiv.org/abs/{text}"))
        for text in ids
    ]
    return render_atom(entries, title="t", total=len(ids), start=0, size=10, now=NOW).encode()


@pytest.mark.parametrize(("surname", "stem"), SURNAMES.items())
def test_P_1_key_stems_of_surnames_outside_ascii(surname, stem):
    assert key_stem(surname) == stem
    key = base_citekey("2402.07754", "The Title of it", [f"Ada {surname}"], 2024)
    assert key == (f"{stem}2024Title" if stem else "arxiv_2402_07754")
    assert KEY.match(key)


def test_P_1_keys_fall_back_to_the_paper_itself():
    assert base_citekey("2402.07754", "Title", ["王"], 2024) == "arxiv_2402_07754"
    assert base_citekey("2402.07754", "Title", None, 2024) == "arxiv_2402_07754"
    assert base_citekey("math_0309136", "Title", None, 2003) == "math_0309136"
    assert base_citekey("doi-10.1000_x", "Title", None, None) == "doi_10_1000_x"


def test_P_1_keys_are_unique_and_collisions_get_letters():
    taken = {"ye2024diffusion"}
    assert unique_citekey("Ye2024Diffusion", taken) == "Ye2024Diffusiona"
    assert unique_citekey("Ye2024Diffusion", taken | {"ye2024diffusiona"}) == "Ye2024Diffusionb"
    keys = [record.citekey.lower() for record in load_records()]
    assert len(set(keys)) == len(keys)
    assert all(KEY.match(record.citekey) for record in load_records())


def test_P_1_the_export_parses_with_the_names_intact():
    record = get("2402.07754")
    names = [f"Ada {surname}" for surname in SURNAMES]
    taken: set[str] = set()
    records = []
    for number, name in enumerate(names):
        key = unique_citekey(base_citekey(f"2402.{number:05d}", record.title, [name], 2024), taken)
        taken.add(key.lower())
        records.append(record.model_copy(update={"citekey": key, "authors": [Author(name=name, orcid=None)]}))
    parsed = parse_string(export(records), "bibtex")
    assert len(parsed.entries) == len(names)
    found = sorted(str(entry.persons["author"][0]) for entry in parsed.entries.values())
    assert found == sorted(f"{surname}, Ada" for surname in SURNAMES)


def test_P_1_a_key_that_was_given_never_changes(tmp_path):
    """Not when a paper is accepted anew, not when its authors become known, not when another paper takes the nicer key first."""
    folders = small_catalog(tmp_path / "catalog")
    given = {}
    for number, surname in enumerate(SURNAMES, 1):
        candidate = candidate_by(number, f"Ada {surname}")
        write_candidate(folders, candidate)
        accept(folders, candidate, leaf="vertical/feedback", by="Ada", date="2026-02-18")
        given[candidate.key] = record_in(folders, candidate.key).citekey
    assert list(given.values()) == [
        "LussOrsted2026Latent",
        "Kadioglu2026Latent",
        "Nguyen2026Latent",
        "ODalaigh2026Latent",
        "arxiv_2602_00005",
    ]
    for key in given:
        record = record_in(folders, key)
        entry = Entry(key, 2, "Another Title", None, ("Bo Lind",), NOW, NOW)
        assert merge_entry(record, entry, set()).record.citekey == record.citekey
    undo(folders, "2602.00001")
    accept(folders, candidate_by(1, "Ada Łuß-Ørsted"), leaf="vertical/feedback", by="Bo", date="2026-03-01")
    assert record_in(folders, "2602.00001").citekey == given["2602.00001"]
    parsed = parse_string(export(folders.records()), "bibtex")
    assert set(given.values()) <= set(parsed.entries)
    names = {str(parsed.entries[key].persons["author"][0]) for key in given.values()}
    assert names == {f"{surname}, Ada" for surname in SURNAMES}


def test_P_1_the_whole_shipped_export_parses():
    parsed = parse_string(export(load_records()), "bibtex")
    assert len(parsed.entries) == len(load_records())


def test_P_2_ris_that_other_programs_read():
    rispy = pytest.importorskip("rispy")
    first = get("2402.07754").model_copy(
        update={
            "authors": [Author(name=name, orcid=None) for name in ("Okafor, Ada", "Lind, Bo")],
            "title": "One title\nin two lines",
        }
    )
    text = render("ris", [first, get("2412.06769")])
    lines = text.split("\r\n")
    assert "\n" not in text.replace("\r\n", "")
    entries = [entry for entry in text.split("\r\n\r\n") if entry]
    assert len(entries) == 2
    for entry in entries:
        rows = entry.strip("\r\n").split("\r\n")
        assert rows[0].startswith("TY  - ")
        assert rows[-1] == "ER  - "
        assert all(re.match(r"[A-Z][A-Z0-9]  - ", row) for row in rows)
    assert "TI  - One title in two lines" in lines
    assert [line for line in lines if line.startswith("AU  - ")][-2:] == ["AU  - Okafor, Ada", "AU  - Lind, Bo"]
    read = rispy.loads(text)
    assert len(read) == 2
    assert read[-1]["authors"] == ["Okafor, Ada", "Lind, Bo"]  # entries are sorted by citation key
    # With a bare ER the same reader finds no record: that is the fault.
    assert rispy.loads(text.replace("ER  - \r\n", "ER\r\n")) == []


@pytest.mark.parametrize("authors", ["Okafor, Ada", ["Okafor, Ada"], {"name": "Okafor, Ada"}, [["Okafor"]]])
def test_P_2_a_string_where_a_list_of_authors_belongs_is_a_validation_error(authors):
    data = get("2402.07754").model_dump(mode="json") | {"authors": authors}
    with pytest.raises(ValidationError, match="authors"):
        Record.model_validate_json(json.dumps(data))
    with pytest.raises(ValidationError, match="authors"):
        Record.model_validate(data)


@pytest.mark.parametrize(
    ("text", "base", "version"),
    [
        ("atom-ph/9601001", "atom-ph/9601001", None),
        ("https://arxiv.org/abs/quant-ph/0112019v1", "quant-ph/0112019", 1),
        ("cond-mat/9901001v12", "cond-mat/9901001", 12),
        ("https://arxiv.org/pdf/2505.02915v1.pdf?download=1", "2505.02915", 1),
        ("arXiv:1502.04623", "1502.04623", None),
        ("1412.6980", "1412.6980", None),
    ],
)
def test_P_3_identifiers_are_read(text, base, version):
    parsed = parse_arxiv(text)
    assert (parsed.base, parsed.version) == (base, version)


def test_P_3_a_version_is_no_new_paper_and_an_archive_is_part_of_the_identity():
    """Through the feed, the queue and the look-up: one paper a number and archive, whatever version or class is named."""
    found = parse_feed(render_feed("math.GT/0309136v2", "math/0309136v3", "hep-th/0309136v1", "2412.06769v9"))
    assert [entry.key for entry in found.entries] == ["math_0309136", "math_0309136", "hep-th_0309136", "2412.06769"]
    assert [entry.version for entry in found.entries] == [2, 3, 1, 9]
    known = Known(load_records())
    assert known.match(found.entries[3])[0].key == "2412.06769"
    for text in (
        "2412.06769",
        "arXiv:2412.06769v1",
        "https://arxiv.org/pdf/2412.06769v3.pdf?download=1",
        "10.48550/arXiv.2412.06769",
    ):
        record = find(text)
        assert record is not None
        assert record.key == "2412.06769"
    numbers = parse_feed(render_feed("0112019v1", "1412.06980v1", "1501.0123v1", "2513.00001v1", "2505.02915v0"))
    assert numbers.entries == ()
    assert len(numbers.refused) == 5
    assert "without its archive" in numbers.refused[0].reason


def test_P_3_a_subject_class_is_not_part_of_the_identity():
    assert parse_arxiv("math.GT/0309136") == parse_arxiv("math/0309136")
    assert parse_arxiv("MATH.GT/0309136v2").base == "math/0309136"


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("0112019", "without its archive"),
        ("1412.06980", "4 digits"),
        ("1501.0123", "5 digits"),
        ("2513.00001", "no month"),
        ("2505.02915v0", "versions begin with v1"),
    ],
)
def test_P_3_what_is_wrong_is_refused_with_the_reason(text, why):
    with pytest.raises(IdentifierError, match=why):
        parse_arxiv(text)
