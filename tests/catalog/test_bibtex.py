import re

import pytest
from pybtex.database import parse_string
from pybtex.richtext import Text

from latentcot.catalog import get, load_records
from latentcot.catalog.bibtex import author, entry, escape, export, is_confirmed, protect
from latentcot.catalog.record import Author, Venue


@pytest.fixture(scope="module")
def parsed():
    return parse_string(export(load_records()), "bibtex")


def shown(tex: str) -> str:
    """What a reader sees, by pybtex's own TeX decoder, which lacks one command."""
    tex = tex.replace(r"{\textasciicircum}", "\ufffc")
    return " ".join(str(Text.from_latex(tex)).replace("\xa0", " ").replace("\ufffc", "^").split())


def test_every_record_parses_and_no_key_is_lost(parsed):
    assert set(parsed.entries) == {record.citekey for record in load_records()}
    assert len(parsed.entries) == len(load_records())


def test_titles_round_trip(parsed):
    for record in load_records():
        tex = parsed.entries[record.citekey].fields["title"]
        if "$" not in record.title:  # mathematics stays TeX
            decoded = shown(tex).replace("–", "--").replace("’", "'")
            assert decoded == record.title.replace("’", "'").replace("–", "--"), record.key
        else:
            assert tex.replace("{", "").replace("}", "") == record.title.replace("{", "").replace("}", ""), record.key


def test_names_round_trip(parsed):
    for record in load_records():
        people = parsed.entries[record.citekey].persons.get("author", [])
        names = [
            " ".join(
                " ".join(part)
                for part in (p.first_names, p.middle_names, p.prelast_names, p.last_names, p.lineage_names)
                if part
            )
            for p in people
        ]
        assert [name.strip("{}") for name in names] == record.author_names, record.key


def test_capitals_are_protected(parsed):
    for record in load_records():
        bare = re.sub(r"\{[^{}]*(?:\{[^{}]*\}[^{}]*)*\}", "", parsed.entries[record.citekey].fields["title"])
        assert not any(char.isupper() for char in bare), record.key


def test_a_preprint_is_misc_with_its_identifiers(parsed):
    record = get("2502.21074")
    fields = parsed.entries[record.citekey].fields
    assert parsed.entries[record.citekey].type == ("inproceedings" if is_confirmed(record) else "misc")
    preprint = next(r for r in load_records() if r.ids.arxiv and r.venue is None and r.authors)
    fields = parsed.entries[preprint.citekey].fields
    assert parsed.entries[preprint.citekey].type == "misc"
    assert fields["eprint"] == preprint.ids.arxiv
    assert fields["archiveprefix"] == "arXiv"
    assert fields["doi"] == f"10.48550/arXiv.{preprint.ids.arxiv}"
    assert fields["year"] == str(preprint.year)
    assert "primaryclass" not in fields
    classified = entry(preprint.model_copy(update={"primary_category": "cs.LG"}))
    assert "primaryclass = {cs.LG}" in classified


def test_only_a_confirmed_venue_makes_proceedings():
    record = get("2406.07524")
    assert entry(record).startswith("@inproceedings{")
    assert "booktitle = {{NeurIPS 2024}}" in entry(record)
    venue = record.venue
    assert venue is not None
    for update in ({"status": None}, {"year": None}):
        doubtful = record.model_copy(update={"venue": venue.model_copy(update=update)})
        assert entry(doubtful).startswith("@misc{")
    journal = Venue(name="TMLR", year=2025, track=None, type="journal", status="published", source="x")
    assert "journal = {{TMLR}}" in entry(record.model_copy(update={"venue": journal}))
    findings = entry(get("acl-2023.findings-acl.454"))
    assert "booktitle = {{ACL 2023 Findings}}" in findings


def test_a_published_paper_that_is_not_on_arxiv_has_the_year_of_its_publication():
    text = entry(get("doi-10.1162_neco.1997.9.8.1735"))
    assert text.startswith("@article{")
    assert "year = {1997}" in text
    assert entry(get("2310.10605")).startswith("@misc{")  # on arXiv, and the journal's year is not known


def test_a_possible_submission_is_misc():
    assert entry(get("openreview-lebJ6wz1vj")).startswith("@misc{")


def test_unknown_authors_give_no_author_field():
    record = next(r for r in load_records() if r.authors is None)
    assert "author" not in entry(record)


@pytest.mark.parametrize(
    ("text", "tex"),
    [
        ("R&D at 5% of $10 #1 a_b", r"R\&D at 5\% of \$10 \#1 a\_b"),
        (r"R\&D", r"R\&D"),
        ("O($n^2$) steps_now", r"O($n^2$) steps\_now"),
        ("P^3 ~ x", r"P{\textasciicircum}3 {\textasciitilde} x"),
        ("a { b", r"a {\textbraceleft} b"),
        ("back\\ slash", r"back{\textbackslash} slash"),
        (r"Schr\"odinger", r"Schr\"odinger"),
        ("Łuß Nguyễn 王", "Łuß Nguyễn 王"),
    ],
)
def test_tex_is_escaped_exactly_once(text, tex):
    assert escape(text) == tex


def test_hostile_titles_still_parse():
    record = get("2412.06769")
    for title in (
        "}} @misc{evil, title = {x}",
        "a { b",
        "a \\",
        "\\} {",
        "100% @ # \" ' ,",
        "$a {b$ c}",
        "\\textbf{x",
        "\\{",
    ):
        text = entry(record.model_copy(update={"title": title, "authors": [Author(name="A, { B } and C", orcid=None)]}))
        parsed = parse_string(text + "\n" + entry(get("2406.07524")), "bibtex")
        assert len(parsed.entries) == 2, title


@pytest.mark.parametrize(
    ("name", "tex"),
    [
        ("Ada Okafor", "Okafor, Ada"),
        ("Samuel R. Bowman", "Bowman, Samuel R."),
        ("Benjamin Van Durme", "Van Durme, Benjamin"),
        ("M. Emrullah Ildiz", "M. Emrullah Ildiz"),
        ("María Emilia Granda", "María Emilia Granda"),
        ("Okafor, Ada", "Okafor, Ada"),
        ("Ada Okafor Jr.", "Okafor, Jr., Ada"),
        ("Anthropic", "{Anthropic}"),
        ("Research and Development", "{Research and Development}"),
        ("Sean O'Brien", "O'Brien, Sean"),
    ],
)
def test_names(name, tex):
    assert author(name) == tex


def test_words_with_capitals_are_braced_and_math_is_kept_whole():
    assert protect("Fast LLMs & iPhones now") == r"{Fast} {LLMs} \& {iPhones} now"
    assert protect("C$^2$DLM: fast") == "{C$^2$DLM: fast}"


def test_export_is_the_same_every_time_and_sorted():
    records = load_records()
    assert export(records) == export(records[::-1])
    keys = re.findall(r"^@\w+\{([^,]+),$", export(records), flags=re.M)
    assert keys == sorted(keys, key=str.lower)
