"""Graded queries, known items, and text that no one should be able to break the search with.

``graded_queries.json`` was written by reading the records, before any ranking of its queries was looked at. Only its
"tune" part was looked at when the ranking was worked on; the "held-out" part is scored alone.
"""

import json
from pathlib import Path
from statistics import fmean

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from latentcot.catalog import CatalogError, get, load_records
from latentcot.catalog.search import SearchIndex, default_index, search
from latentcot.catalog.search_quality import ndcg, reciprocal_rank
from latentcot.catalog.search_text import Wanted, find_spans, snippet
from latentcot.catalog.search_topics import TopicWords
from latentcot.catalog.search_words import (
    Stemmer,
    fold,
    hump_words,
    index_words,
    load_terms,
    make_terms,
    method_names,
    query_words,
)

AWKWARD = [
    "latent",
    "of",
    "NEAR/3",
    '"a',
    "OR",
    "-x",
    "C++",
    "2412.06769v3",
    "10.1/x",
    "ﬁ",
    "é",
    "İ",
    "ß",
    "𝔏",
    "\u202e",
    "王",
]
QUERIES = json.loads((Path(__file__).parent / "graded_queries.json").read_text(encoding="utf-8"))


def keys(query: str, limit: int = 50) -> list[str]:
    return [hit.record.key for hit in search(query, limit=limit).hits]


def topics(part: str) -> list[float]:
    return [ndcg(keys(t["query"], 10), t["grades"]) for t in QUERIES["topics"] if t["part"] == part]


def items(*names: str) -> list[float]:
    return [reciprocal_rank(keys(item["query"]), item["key"]) for name in names for item in QUERIES[name]]


def test_the_graded_set_is_as_large_as_it_says_and_half_of_it_is_held_out():
    assert len(QUERIES["topics"]) >= 40
    assert [t["part"] for t in QUERIES["topics"]].count("held-out") * 2 == len(QUERIES["topics"])
    known = {record.key for record in load_records()}
    for topic in QUERIES["topics"]:
        assert set(topic["grades"]) <= known
        assert set(topic["grades"].values()) <= {1, 2, 3}


@pytest.mark.parametrize(
    "part",
    [
        "tune",
        pytest.param("held-out", marks=pytest.mark.xfail(strict=True, reason="0.81 on 2026-11-30, see docs/log.md")),
    ],
)
def test_graded_queries_reach_the_aim(part):
    assert fmean(topics(part)) >= 0.85


def test_held_out_queries_do_not_get_worse():
    assert fmean(topics("held-out")) >= 0.81


def test_all_graded_queries_together_do_not_get_worse():
    assert fmean(topics("tune") + topics("held-out")) >= 0.84


def test_chances_of_topics_by_hand():
    words = TopicWords([["scan", "a"], ["scan", "b", "scan"], ["scan", "loop"], ["loop", "c"]], ["m", "m", "v", "v"])
    # scan: 2 of 2 and 1 of 2 papers, 3 of 4 in all; with 2 papers of the average: (2 + 1.5) / 4 and (1 + 1.5) / 4.
    assert words.chances(["scan"]) == pytest.approx({"m": 3.5 / 6, "v": 2.5 / 6})
    # loop: (0 + 1) / 4 and (2 + 1) / 4.
    assert words.chances(["scan", "loop", "scan", "new"]) == pytest.approx({"m": 3.5 / 11, "v": 7.5 / 11})
    assert words.chances(["new"]) == {}
    assert TopicWords([], []).chances(["scan"]) == {}


def test_known_items_come_first():
    assert fmean(items("items")) >= 0.95


def test_papers_are_found_by_names_that_their_titles_lack():
    assert fmean(items("names")) >= 0.95


def test_ndcg_and_reciprocal_rank_by_hand():
    grades = {"a": 3, "b": 1}
    assert ndcg(["a", "b"], grades) == 1.0
    assert ndcg(["x", "y"], grades) == 0.0
    # DCG of "b", "a": 1 / log2(2) + 7 / log2(3) = 5.4165; of the best order: 7 + 1 / log2(3) = 7.6309.
    assert ndcg(["b", "a"], grades) == pytest.approx(5.41650 / 7.63093, abs=1e-5)
    assert ndcg(["b", "a"], grades, k=1) == pytest.approx(1 / 7)
    assert reciprocal_rank(["x", "a"], "a") == 0.5
    assert reciprocal_rank(["x"], "a") == 0.0
    with pytest.raises(ValueError, match="grade"):
        ndcg(["a"], {"a": 0})


@settings(max_examples=150, deadline=None)
@given(
    st.one_of(
        st.text(max_size=60),
        st.text(alphabet=st.sampled_from("\"'*()^:-+~<>{}[]\\ \x00ANDORNEARlatent"), max_size=60),
        st.lists(st.sampled_from(AWKWARD)).map(" ".join),
    )
)  # fmt: skip
def test_no_query_raises_and_spans_lie_in_the_title(query):
    result = search(query, limit=5)
    assert result.total >= len(result.hits)
    for hit in result.hits:
        assert all(0 <= a < b <= len(hit.record.title) for a, b in hit.spans)
        assert hit.marked("", "") == hit.record.title
    assert search(query, limit=5) == result


def test_every_hit_has_some_of_the_query_and_scores_go_down():
    for topic in QUERIES["topics"]:
        scores = [hit.score for hit in search(topic["query"], limit=40).hits]
        assert scores == sorted(scores, reverse=True)
        assert all(score > 0 for score in scores)


def test_abstracts_are_searched_and_shown_in_a_snippet():
    records = [get("2412.06769"), get("2502.05171")]
    abstract = "We begin with many words that say little. " * 6 + "Then a wombat burrows, and the <b>wombat</b> sleeps."
    index = SearchIndex(records, {"2412.06769": abstract})
    (hit,) = index.search("wombats").hits
    assert hit.record.key == "2412.06769"
    assert hit.snippet is not None
    assert "[wombat] burrows" in hit.snippet.marked("[", "]")
    assert hit.snippet.text.startswith("… ")
    assert len(hit.snippet.text) <= 210
    assert index.search("recurrent depth").hits[0].snippet is None


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=300), st.text(alphabet="abc é", max_size=4))
def test_snippets_are_parts_of_the_text(text, word):
    found = snippet(text, Wanted({fold(word)}, "", [word]), length=60)
    if found is not None:
        assert found.text.removeprefix("… ").removesuffix(" …") in text
        assert all(0 <= a < b <= len(found.text) for a, b in found.spans)


def test_counts_of_the_found_papers():
    counts = default_index().counts("looped transformers")
    hits = search("looped transformers", limit=None).hits
    assert counts["leaf"]["vertical/architecture"] == sum("vertical/architecture" in h.record.leaves for h in hits)
    assert sum(counts["year"].values()) == len(hits)
    assert counts["has"]["code"] == sum(h.record.has_code for h in hits)
    assert counts["mechanism"]["loop"] == sum("loop" in h.record.facets.mechanism for h in hits)


def test_words():
    assert index_words("Multi-hop Reasoning: naïve Straße") == {
        "multi",
        "hop",
        "multihop",
        "reasoning",
        "naive",
        "strasse",
    }
    assert hump_words("UniVLA d2Cache MEMORYLLM plain Title") == {"uni", "vla", "cache"}
    assert query_words("Optimisation of raised RAISED it") == ["optimization", "of", "raised", "it"]
    assert Stemmer().stem(["looped", "loops", "x y"]) == {"looped": "loop", "loops": "loop", "x y": "x y"}
    assert find_spans("Straße und Straßen", Wanted({"strasse"})) == ((0, 6),)


def test_the_tables_are_sound():
    known = {record.key for record in load_records()}
    assert set(method_names().values()) <= known
    terms = load_terms()
    assert all(0 < factor <= 1 for others in terms.others.values() for _, factor in others)
    for bad in (
        {},
        {"ignored": [], "dull": [], "same": [[" "]], "near": {}},
        {"ignored": 3, "dull": [], "same": [], "near": {}},
    ):
        with pytest.raises(CatalogError, match=r"search_terms\.json"):
            make_terms(bad)


def test_an_empty_index_and_one_paper():
    assert SearchIndex([]).search("latent").match == "none"
    assert SearchIndex([]).search("").total == 0
    assert [hit.record.key for hit in SearchIndex([get("2412.06769")]).search("latent").hits] == ["2412.06769"]
