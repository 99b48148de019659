"""Related papers: deterministic, at most eight, never itself, with reasons that are really shared."""

import json

import pytest
from typer.testing import CliRunner

from latentcot.catalog import get, load_records, load_taxonomy
from latentcot.catalog.cli import papers_app
from latentcot.catalog.related import MOST, related_papers
from latentcot.catalog.search_words import Stemmer, words_of

RECORDS = load_records()
RELATED = related_papers(RECORDS)


def variant(key: str, title: str, **update):
    return get("2412.06769").model_copy(update={"key": key, "title": title, "other_titles": []} | update)


def test_every_record_has_at_most_eight_and_never_itself():
    assert set(RELATED) == {record.key for record in RECORDS}
    for key, found in RELATED.items():
        others = [one.key for one in found]
        assert len(others) <= MOST
        assert key not in others
        assert len(set(others)) == len(others)
        assert [one.score for one in found] == sorted((one.score for one in found), reverse=True)
        assert all(0 < one.score <= 1 for one in found)
    assert sum(map(len, RELATED.values())) > 7 * len(RECORDS)


def test_the_order_of_records_does_not_matter():
    some = RECORDS[::3]
    assert related_papers(some) == related_papers(some[::-1])


def test_the_terms_given_are_shared():
    stemmer = Stemmer()
    leaves = {f"topic “{leaf.name}”": slug for slug, leaf in load_taxonomy().leaves.items()}

    def stems(text: str) -> set[str]:
        return set(stemmer.stem(words_of(text)).values())

    for record in RECORDS[::7]:
        for one in RELATED[record.key]:
            other = get(one.key)
            assert one.terms
            for term in one.terms:
                if term in leaves:
                    assert leaves[term] in record.leaves
                    assert leaves[term] in other.leaves
                elif term.startswith("mechanism “"):
                    assert {term[11:-1]} <= set(record.facets.mechanism) & set(other.facets.mechanism)
                else:
                    assert stems(term) <= stems(record.title)
                    assert stems(term) <= stems(other.title)


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        ("1807.03819", "2405.16039"),  # Universal Transformers: MoEUT
        ("2510.04871", "2511.08653"),  # Tiny Networks: Tiny Recursive Models
        ("2506.21734", "2510.00355"),  # Hierarchical Reasoning Model: Perspectives
        ("doi-10.1162_neco.1997.9.8.1735", "2405.04517"),  # LSTM: xLSTM
        ("2502.12134", "2505.11484"),  # SoftCoT: SoftCoT++
    ],
)
def test_the_obvious_relative_is_there(key, expected):
    assert expected in [one.key for one in RELATED[key]]


def test_a_withdrawn_paper_is_not_recommended_but_has_relatives():
    records = [
        variant("2401.00001", "Looped whales"), variant("2401.00002", "Looped whales again", status="withdrawn"),
        variant("2401.00003", "Looped whales forever"), variant("2401.00004", "Other things", taxonomy=get("2312.00752").taxonomy),
    ]  # fmt: skip
    found = related_papers(records)
    assert [one.key for one in found["2401.00001"]] == ["2401.00003"]
    assert {one.key for one in found["2401.00002"]} == {"2401.00001", "2401.00003"}
    assert found["2401.00004"] == ()


def test_few_records_and_wrong_limits():
    assert related_papers([]) == {}
    assert related_papers(RECORDS[:1]) == {RECORDS[0].key: ()}
    assert all(len(found) <= 2 for found in related_papers(RECORDS[:50], limit=2).values())
    with pytest.raises(ValueError, match="limit"):
        related_papers(RECORDS, limit=0)


def test_the_command():
    runner = CliRunner()
    result = runner.invoke(papers_app, ["related", "1807.03819"])
    assert result.exit_code == 0
    assert "MoEUT" in result.stdout
    data = json.loads(runner.invoke(papers_app, ["related", "1807.03819", "--json"]).stdout)
    assert [one["key"] for one in data["related"]] == [one.key for one in RELATED["1807.03819"]]
    assert runner.invoke(papers_app, ["related", "nothing"]).exit_code == 2
