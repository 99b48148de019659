"""The ten papers that the project starts from: all are records, two are core, the rest are shelved where they belong."""

import pytest

from latentcot.catalog import find, load_records, load_taxonomy

CORE = {
    "2507.06203": "beyond/surveys",
    "2507.06457": "beyond/hybrid-attention",
}
NEIGHBOURS = {"2501.16085": "unbounded-depth/hybrid-ar-diffusion"}
# Spiking and neuromorphic models, data attribution, bottlenecks in distributed networks, time series.
CONTEXT = (
    "2406.03046",
    "2410.04454",
    "2410.09650",
    "2410.15217",
    "2501.13492",
    "2503.08703",
    "2503.18002",
)
SEED_SOURCE = "latentcot/seeds"


def test_all_ten_have_a_record_and_nothing_else_claims_to_be_a_seed():
    wanted = {*CORE, *NEIGHBOURS, *CONTEXT}
    assert len(wanted) == 10
    named = {record.key for record in load_records() if any(source.source == SEED_SOURCE for source in record.sources)}
    assert named == wanted


@pytest.mark.parametrize(("key", "leaf"), [*CORE.items(), *NEIGHBOURS.items()])
def test_core_papers_and_neighbours_stand_under_their_topic(key, leaf):
    record = find(key)
    assert record is not None
    assert record.taxonomy.primary == leaf
    assert "beyond/context" not in record.leaves


def test_two_seeds_are_core_and_the_study_is_runnable():
    assert len(CORE) == 2
    study = find("2507.06457")
    assert study is not None
    assert study.runnable  # the hybrid study is reproduced here
    survey = find("2507.06203")
    assert survey is not None
    assert {branch.slug for branch in load_taxonomy().branches} >= {"vertical", "horizontal", "mechanisms"}
    assert load_taxonomy().backbone  # the survey's sections are the taxonomy


@pytest.mark.parametrize("key", CONTEXT)
def test_the_rest_are_background_and_said_to_be(key):
    record = find(key)
    assert record is not None
    assert record.leaves == ["beyond/context"]
    assert record.facets.mechanism == []
    definition = load_taxonomy().leaves["beyond/context"].definition
    assert "not latent reasoning" in definition


def test_only_background_papers_are_in_the_context_leaf():
    """The leaf is no rest basket: whatever else comes there needs a person's decision."""
    for record in load_records():
        if "beyond/context" in record.leaves:
            assert record.key in CONTEXT or record.decision is not None
