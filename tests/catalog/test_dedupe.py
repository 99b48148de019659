from dataclasses import replace

import pytest

from latentcot.catalog.dedupe import Evidence, compare, near_pairs, same_title
from latentcot.catalog.text import bare_title, normal_title, slug

TITLE = "Reasoning with Latent Thoughts"


def verdict(one: Evidence, other: Evidence) -> tuple[str, str]:
    forward, backward = compare(one, other), compare(other, one)
    assert forward == backward
    return forward.outcome, forward.rule


def test_rule_1_same_arxiv_id_is_one_paper_whatever_the_titles():
    assert (
        verdict(Evidence("Inheritune", arxiv="2404.08634"), Evidence("When Attention Collapses", arxiv="2404.08634"))[0]
        == "same"
    )


def test_rule_1_two_arxiv_ids_are_never_merged_by_title():
    assert verdict(Evidence(TITLE, arxiv="2502.17416"), Evidence(TITLE, arxiv="2502.17417"))[0] == "review"


@pytest.mark.parametrize("kind", ["doi", "openreview", "acl"])
def test_rule_2_another_strong_id(kind):
    one = replace(Evidence("One"), **{kind: "x"})
    assert verdict(one, replace(Evidence("Other"), **{kind: "x"})) == ("same", kind)
    assert verdict(one, replace(Evidence("Other"), **{kind: "y"}))[0] == "different"


def test_rule_3_title_and_first_author_within_a_year():
    one = Evidence(TITLE, first_author="Nikunj Saunshi", year=2025)
    assert verdict(one, Evidence("reasoning with latent thoughts!", first_author="Saunshi, N.", year=2024))[0] == "same"
    assert verdict(one, Evidence(TITLE, first_author="Nikunj Saunshi", year=2023))[0] == "review"
    assert verdict(one, Evidence(TITLE, first_author="Ada Okafor", year=2025))[0] == "review"
    assert verdict(one, Evidence(TITLE, first_author="Nikunj Saunshi"))[0] == "review"


def test_rule_3_without_authors_needs_the_same_venue_or_list():
    one = Evidence(TITLE, first_author="Nikunj Saunshi", year=2025, venues=frozenset({"ICLR"}), lists=frozenset({"a"}))
    assert verdict(one, Evidence(TITLE, year=2025, venues=frozenset({"ICLR"})))[0] == "same"
    assert verdict(one, Evidence(TITLE, year=2025, lists=frozenset({"a"})))[0] == "same"
    assert verdict(one, Evidence(TITLE, year=2025, venues=frozenset({"ICML"}), lists=frozenset({"b"})))[0] == "review"
    assert verdict(one, Evidence(TITLE, year=2027, venues=frozenset({"ICLR"})))[0] == "review"


def test_rule_4_near_titles_go_to_review():
    long = "Uncovering latent chain of thought vectors in language models today"
    assert verdict(Evidence(long), Evidence(long.replace("today", "now today")))[0] == "review"
    assert verdict(Evidence("A name of many more words than three: " + TITLE), Evidence(TITLE))[0] == "review"
    assert verdict(Evidence("SoftCoT for reasoning"), Evidence("Masked diffusion for text"))[0] == "different"


def test_titles_are_compared_without_case_punctuation_tex_ligatures_and_leading_name():
    assert normal_title("Continuous diﬀusion for categorical data") == normal_title(
        "Continuous Diffusion for Categorical Data"
    )
    assert normal_title(r"\textbf{Łuß} é  --- 1") == "luss e 1"
    assert same_title("DeltaNet: Parallelizing Linear Transformers", "Parallelizing linear transformers")
    assert bare_title("d1: Scaling Up") == "d1 scaling up"  # too little would remain
    assert slug("An Overview: of Łódź models") == "an-overview-of-lodz-models"


def test_near_pairs_are_found_once_and_sorted():
    titles = [
        ("b", TITLE),
        ("a", TITLE + "!"),
        ("c", "Masked diffusion language models"),
        ("d", "Another thing entirely"),
    ]
    assert near_pairs(titles) == [("a", "b")]
