"""A bibliography against the catalog: what is known, likely, missing, and what cannot be read."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from latentcot.catalog import CatalogError, get, load_records
from latentcot.catalog.export import render
from latentcot.catalog.from_bib import Entry, Matcher, compare_bib, parse_bib, read_bib

MATCHER = Matcher(load_records())


def one(text: str):
    entries, problems = parse_bib(text)
    assert not problems
    assert len(entries) == 1
    return MATCHER.match(entries[0])


def test_our_own_export_is_known_entirely():
    entries, problems = parse_bib(render("bibtex", load_records()))
    assert not problems
    compared = compare_bib(entries, score=False)
    assert compared.counts == {"known": len(load_records()) - compared.counts["likely"],
                               "likely": compared.counts["likely"], "missing": 0}  # fmt: skip
    for found in compared.found:
        assert found.record is not None
        assert found.record.citekey == found.entry.key
        assert found.remark is None
    # Without any id, date or author there is nothing but the title, and a person has to look.
    assert all(not (f.entry.arxiv or f.entry.doi or f.entry.addresses) for f in compared.found if f.outcome == "likely")


@pytest.mark.parametrize(
    "fields",
    [
        "eprint={2412.06769}, archiveprefix={arXiv}", "eprint={2412.06769v2}", "url={https://arxiv.org/abs/2412.06769v1}",
        "journal={arXiv preprint arXiv:2412.06769}", "doi={10.48550/arXiv.2412.06769}", "note={arXiv: 2412.06769 [cs.CL]}",
        "howpublished={\\url{https://arxiv.org/pdf/2412.06769.pdf}}", "volume={abs/2412.06769}, journal={CoRR}, url={http://arxiv.org/abs/2412.06769}",
        "url={https://openreview.net/forum?id=Itxz7S4Ip3}",
    ],
)  # fmt: skip
def test_an_identifier_anywhere_makes_an_entry_known(fields):
    found = one(f"@misc{{a, title={{Something}}, {fields}}}")
    assert found.outcome == "known"
    assert found.record == get("2412.06769")
    assert found.remark is not None  # the title is another


def test_title_first_author_and_year_make_an_entry_known():
    title = "{T}raining {L}arge Language Models to Reason in a Continuous Latent Space"
    found = one(f"@article{{a, title={{{title}}}, author={{Hao, Shibo and others}}, year={{2025}}}}")
    assert (found.outcome, found.rule, found.record) == ("known", "title and first author", get("2412.06769"))


def test_an_accent_in_tex_is_a_letter():
    found = one(
        "@misc{a, title={Do {L}anguage Models Use Their Depth Efficiently?}, author={R{\\'o}bert Csord{\\'a}s}, year=2025}"
    )
    assert found.outcome == "known"
    assert found.record == get("2505.13898")


@pytest.mark.parametrize(
    "fields", ["author={Nobody, Ann}, year={2024}", "year={2024}", "author={Hao, Shibo}, year={2015}"]
)  # fmt: skip
def test_an_equal_title_alone_is_likely(fields):
    title = "Training Large Language Models to Reason in a Continuous Latent Space"
    found = one(f"@misc{{a, title={{{title}}}, {fields}}}")
    assert (found.outcome, found.record) == ("likely", get("2412.06769"))


def test_another_paper_is_missing_and_gets_a_proposal(monkeypatch):
    from types import SimpleNamespace

    judged = SimpleNamespace(probability=0.75, leaf="vertical/architecture", reasons=("+ looped",))
    monkeypatch.setattr("latentcot.catalog.relevance.score", lambda title: judged)
    compared = compare_bib([Entry("a", "A title that nobody wrote about anything"), Entry("b", "", arxiv="2301.99999")])
    assert [found.outcome for found in compared.found] == ["missing", "missing"]
    assert compared.found[0].proposal is not None
    assert compared.found[0].proposal.leaf == "vertical/architecture"
    assert compared.found[1].proposal is None


def test_damaged_entries_are_told_and_the_others_read():
    text = (
        "@misc{good, title={One}}\n@misc{bad, = {x}}\n@misc{good, title={Again}}\n@misc{last, title={Two}, month=jan}"
    )
    entries, problems = parse_bib(text)
    assert [entry.key for entry in entries] == ["good", "last"]
    assert any("syntax error" in problem for problem in problems)
    assert any("repeated" in problem for problem in problems)
    assert parse_bib("just words")[1] == ["no BibTeX entry was found in the file"]
    assert parse_bib("") == ([], [])
    assert "neither title nor identifier" in parse_bib("@misc{a, year=2024}")[1][0]


@pytest.mark.parametrize("broken", ["title={One, year=2020", "title={One {x}, year={2020}", "title={One"])
def test_an_entry_that_is_never_closed_takes_no_other_with_it(broken):
    good = '@string{v = "Venue"}\n\n@misc{good, title={Before}}\n'
    entries, problems = parse_bib(
        f"{good}@misc{{bad, {broken}\n\n@misc{{a, title={{Two}}, journal=v}}\n @misc(b, title={{Three}})"
    )
    assert [(entry.key, entry.venue) for entry in entries] == [("good", None), ("a", "Venue"), ("b", None)]
    assert problems == ["the entry in line 4 is not closed: passed over"]
    entries, problems = parse_bib(f"{good}@misc{{bad, {broken}")
    assert [entry.key for entry in entries] == ["good"]
    assert problems == ["the entry in line 4 is not closed: passed over"]


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(CatalogError, match="not there"):
        read_bib(tmp_path / "no.bib")
    with pytest.raises(CatalogError, match="folder"):
        read_bib(tmp_path)
    (tmp_path / "latin.bib").write_bytes("@misc{a, title={Café}}".encode("latin-1"))
    entries, problems = read_bib(tmp_path / "latin.bib")
    assert entries[0].title == "Café"
    assert "Latin-1" in problems[0]


@settings(max_examples=60, deadline=None)
@given(st.text(alphabet=st.sampled_from("@{}\\,=\"'#%$ab1 \n~^_&()"), max_size=120))
def test_no_text_raises(text):
    entries, _ = parse_bib("@misc{a, title={" + text)
    for entry in [*entries, *parse_bib(text)[0]]:
        MATCHER.match(entry)
