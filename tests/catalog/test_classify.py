import pytest

from latentcot.catalog import get, load_records, load_taxonomy
from latentcot.catalog.classify import section_leaf, title_leaf
from latentcot.catalog.leaves import load_table

RULES = load_table("import_rules.json")


@pytest.mark.parametrize(
    ("title", "leaf"),
    [
        ("A Survey on Latent Reasoning", "beyond/surveys"),
        ("Latent Space Chain-of-Thought in Vision-Language Models", "beyond/multimodal"),
        ("Visualizing LLM Latent Space Geometry", "mechanisms/layer-roles"),
        ("LatentBreak: Jailbreaking Large Language Models", "beyond/safety"),
        ("Thought Communication in Multiagent Collaboration", "beyond/communication"),
        ("Looped Transformers for Length Generalization", "vertical/architecture"),
        ("Masked Diffusion for Text", "unbounded-depth/masked-diffusion"),
        ("Thoughtbubbles: an Unsupervised Method for Parallel Thinking in Latent Space", None),
    ],
)
def test_titles_are_read_by_rules(title, leaf):
    assert title_leaf(title, RULES) == leaf


def test_sections_match_by_prefix_of_their_last_element():
    loops = "huskydoge/Awesome-Loop-Models"
    assert section_leaf(loops, ("Architecture and Algorithm Designs",), RULES) == ("vertical/architecture", "listed")
    assert section_leaf(loops, ("Something else",), RULES) is None
    assert section_leaf("unknown/list", ("Surveys",), RULES) is None


def test_every_rule_points_at_a_leaf():
    leaves = set(load_taxonomy().leaves)
    named = {rule["leaf"] for name in ("sections", "title_rules", "seed_leaves") for rule in RULES[name]}
    named |= {leaf for rule in RULES["extra_leaves"] for leaf in rule["also"]} | {RULES["title_default"]}
    named |= set(RULES["leaf_mechanisms"]) | set(RULES["leaf_stages"])
    assert named <= leaves
    keys = {record.key for record in load_records()}
    assert {rule["key"] for name in ("extra_leaves", "seed_leaves", "official_code") for rule in RULES[name]} <= keys


def test_a_row_filed_twice_keeps_both_leaves():
    record = get("2412.06769")
    assert record.leaves[:2] == ["vertical/training-induced", "vertical/training-strategies"]


def test_a_hint_is_added_only_from_another_branch():
    two_hop = get("2402.07754")  # listed as diffusion twice, hinted as application
    assert two_hop.leaves == [
        "unbounded-depth/masked-diffusion-cached",
        "unbounded-depth/embedding-diffusion",
        "vertical/applications",
    ]
    assert get("2505.19245").leaves == ["mechanisms/expressivity"]  # hinted as analysis, read from the title


def test_facets_come_with_evidence_only():
    assert "continuous-thought" in get("2412.06769").facets.mechanism
    assert get("2510.20733").facets.mechanism == []
    assert all(bool(record.facets.artifacts) is record.has_code for record in load_records())
