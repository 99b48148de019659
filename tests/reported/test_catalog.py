"""Faults reported elsewhere for bibliographies and identifiers: none of them may happen here."""

import json
import re

import pytest
from pybtex.database import parse_string
from pydantic import ValidationError

from latentcot.catalog import Record, get, load_records
from latentcot.catalog.bibtex import export
from latentcot.catalog.identifiers import IdentifierError, parse_arxiv
from latentcot.catalog.names import base_citekey, key_stem, unique_citekey
from latentcot.catalog.record import Author

SURNAMES = {"Łuß-Ørsted": "LussOrsted", "Kadıoğlu": "Kadioglu", "Nguyễn": "Nguyen", "O'Dálaigh": "ODalaigh", "王": ""}
KEY = re.compile(r"^[A-Za-z][A-Za-z0-9_:-]*$")


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
