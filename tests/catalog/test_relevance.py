"""The relevance scorer: what it says, how well, that training gives the committed model, and bad input."""

import json
import math
import subprocess
import sys

import numpy as np
import pytest
from typer.testing import CliRunner

from latentcot.catalog import CatalogError, load_records, load_taxonomy
from latentcot.catalog.cli import papers_app
from latentcot.catalog.relevance import VERSION, score
from latentcot.catalog.relevance.concepts import FAMILIES, concepts_in, load_concepts, priors
from latentcot.catalog.relevance.data import (
    DECISIONS,
    Paper,
    all_papers,
    background_papers,
    families_of,
    known_papers,
    rejected_papers,
)
from latentcot.catalog.relevance.evaluate import CUTS, auroc, calibrate, judge, measure, threshold_at, wilson
from latentcot.catalog.relevance.features import GRAM_LENGTH, Rarity, features, grams, normal_text
from latentcot.catalog.relevance.keywords import keyword_score
from latentcot.catalog.relevance.logistic import Sparse, fit_logistic
from latentcot.catalog.relevance.make import REPORT_FILE
from latentcot.catalog.relevance.model import MODEL_FILE, load_model, read_model, save_model
from latentcot.catalog.relevance.train import Corpus, fit


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """What the committed model was trained on; papers that came later change nothing until it is trained anew."""
    about = load_model().about
    records = [record for record in load_records() if record.added <= about["last_added"]]
    return Corpus(all_papers(records, DECISIONS if about["rejected"] else tmp_path_factory.mktemp("none")))


@pytest.fixture(scope="module")
def last_cut(corpus):
    """A model that knows what is before the last cut, and the later papers as it judges them."""
    first, last = CUTS[-1]
    model = fit(corpus.part(lambda paper: paper.month < first))
    return model, judge(model, corpus.part(lambda paper: first <= paper.month <= last))


@pytest.fixture(scope="module")
def report():
    return json.loads(REPORT_FILE.read_text(encoding="utf-8"))


# What it says.


@pytest.mark.parametrize(
    ("title", "branch"),
    [
        ("Elastic-Depth Looped Transformers", "vertical"),
        ("Reasoning with Continuous Thoughts in Small Models", "vertical"),
        ("Remasking Helps Masked Diffusion Language Models Plan", "unbounded-depth"),
        ("A Gated Delta Rule for Linear Attention", "horizontal"),
    ],
)
def test_titles_of_the_field_are_relevant_and_go_to_their_branch(title, branch):
    found = score(title)
    assert found.relevant
    assert found.leaf.split("/")[0] == branch
    assert found.leaves[0].leaf == found.leaf
    assert any(reason.startswith("+ ") for reason in found.reasons)


@pytest.mark.parametrize(
    "title",
    [
        "Human-in-the-Loop Annotation of Clinical Notes",
        "Stable Diffusion Image Editing with Masks",
        "Latent Dirichlet Allocation for Legal Documents",
        "A Survey of Traffic Forecasting with Recurrent Neural Networks",
        "Thinking Like a Student: Reflective Planning in a Course",
    ],
)
def test_trap_words_alone_are_not_relevant(title):
    found = score(title)
    assert not found.relevant
    assert found.probability < 0.1


def test_a_score_is_complete_and_always_the_same():
    title = "Scaling Latent Reasoning in Recurrent-Depth Transformers"
    found = score(title)
    assert found == score(title)
    assert 0 <= found.probability <= 1
    assert len(found.leaves) == 3
    assert len({proposal.leaf for proposal in found.leaves}) == 3
    assert all(proposal.leaf in load_taxonomy().leaves for proposal in found.leaves)
    shares = [proposal.share for proposal in found.leaves]
    assert shares == sorted(shares, reverse=True)
    assert sum(shares) <= 1 + 1e-9
    keys = {record.key for record in load_records()}
    assert found.nearest
    assert all(near.key in keys and near.shared for near in found.nearest)


def test_reasons_name_the_words_that_showed_them_with_their_sign():
    reasons = score("Masked Diffusion for Video Restoration").reasons
    assert "+ masked or discrete diffusion (Masked Diffusion)" in reasons
    assert "− pictures, sound or motion (Video)" in reasons
    assert score("Zxqv").reasons == ("no term of the field",)


def test_a_known_title_is_nearest_to_itself():
    record = next(record for record in load_records() if record.key == "2502.05171")
    assert score(record.title).nearest[0].key == record.key
    assert score(record.title).nearest[0].cosine == pytest.approx(1, abs=1e-3)


def test_an_abstract_can_raise_a_score_and_never_lowers_it():
    title = "Think Harder"
    abstract = (
        "We train looped transformers that reuse their layers. The recurrent depth lets the model reason in latent space. "
        "Our model is trained on text. It works."
    )
    alone, both = score(title), score(title, abstract)
    assert both.probability > alone.probability
    assert both.reasons[0].startswith("+ the abstract")
    assert score(title, "We study cooking with fish. It is a fine dish. We had a good time.") == alone
    assert score(title, "") == alone
    assert score(title, None) == alone


# How well, on papers later than what it knows.


def test_bars_on_later_papers(last_cut):
    _, judged = last_cut
    found = measure(judged)["families"]
    assert found["latent"]["papers"] >= 50
    assert found["latent"]["scorer_auroc"] >= 0.98
    assert found["latent"]["scorer_recall"] >= 0.85
    assert found["looped"]["scorer_recall"] >= 0.70
    assert found["diffusion"]["scorer_recall"] >= 0.95
    for family in ("latent", "looped", "diffusion"):
        assert found[family]["scorer_auroc"] > found[family]["keywords_auroc"]
        assert found[family]["scorer_recall"] > found[family]["keywords_recall"]


def test_the_report_holds_what_is_measured(last_cut, report):
    _, judged = last_cut
    reported = report["cuts"][-1]
    measured = measure(judged)
    for family, entry in measured["families"].items():
        for name, value in entry.items():
            assert reported["families"][family][name] == pytest.approx(value, abs=0.005), (family, name)
    assert set(reported["kinds"]) == {"random", "trap", "near"}
    assert reported["at_chosen"]["false_positives"] < 0.03  # the threshold was chosen on earlier months
    assert [cut["from"] for cut in report["cuts"]] == [first for first, _ in CUTS]


def test_the_model_of_a_cut_saw_nothing_of_its_months(corpus):
    for first, last in CUTS:
        assert all(p.month < first for p in corpus.part(lambda paper, first=first: paper.month < first).papers)
        later = corpus.part(lambda paper, first=first, last=last: first <= paper.month <= last).papers
        assert later
        assert all(first <= paper.month <= last for paper in later)


def test_the_threshold_that_ships_is_the_last_cuts(last_cut):
    _, judged = last_cut
    model = load_model()
    assert model.threshold == pytest.approx(threshold_at(judged.scores[judged.negative], 0.01), abs=0.05)
    above = judged.scores[judged.negative] > model.threshold
    assert above.mean() <= 0.015


def test_probabilities_are_calibrated_where_they_were_fitted(last_cut):
    _, judged = last_cut
    slope, offset = calibrate(judged)
    keep = np.array([paper.families != {"broad"} for paper in judged.papers])
    p = 1 / (1 + np.exp(-(slope * judged.scores[keep] + offset)))
    assert p.mean() == pytest.approx((~judged.negative[keep]).mean(), abs=0.01)


# Training.


def test_training_gives_the_committed_model(corpus):
    trained, shipped = fit(corpus), load_model()
    assert set(trained.families) == set(shipped.families) == set(FAMILIES)
    titles = [paper.title for paper in corpus.papers[::40]]
    mine = np.array([trained.decision(title) for title in titles])
    theirs = np.array([shipped.decision(title) for title in titles])
    assert np.abs(mine - theirs).max() < 0.05  # weights are written with three decimals; sums may differ by machine
    assert shipped.about["positives"] == sum(bool(paper.families) for paper in corpus.papers)


def test_the_model_file_is_canonical_and_small(tmp_path):
    again = tmp_path / "relevance.json"
    assert save_model(load_model(), again)
    assert again.read_bytes() == MODEL_FILE.read_bytes()
    assert not save_model(load_model(), again)
    assert sum(path.stat().st_size for path in MODEL_FILE.parent.iterdir()) < 1_500_000


def test_rejected_candidates_become_negatives(tmp_path):
    def decide(key, verdict, reason, title):
        decision = {
            "key": key,
            "verdict": verdict,
            "reason": reason,
            "candidate": {"title": title, "published": "2026-02-03T10:00:00Z"},
        }
        (tmp_path / f"{key}.json").write_text(json.dumps(decision))

    decide("2602.00001", "rejected", "off-topic", "Latent Spaces of Cooking")
    decide("2602.00002", "rejected", "duplicate", "Looped Transformers Again")
    decide("2602.00003", "accepted", None, "Looped Transformers")
    found = rejected_papers(tmp_path)
    assert [(paper.title, paper.kind, paper.month) for paper in found] == [
        ("Latent Spaces of Cooking", "rejected", "2026-02")
    ]
    papers = all_papers(load_records(), tmp_path)
    assert sum(paper.kind == "rejected" for paper in papers) == 1
    (tmp_path / "2602.00004.json").write_text("{")
    with pytest.raises(CatalogError, match=r"2602\.00004\.json"):
        rejected_papers(tmp_path)


def test_a_rejection_lowers_the_score_of_its_like():
    positive = [Paper(f"Latent reasoning of kind {i} in models", "2025-01", frozenset({"latent"})) for i in range(20)]
    negative = [Paper(f"Cooking dish number {i} with fish", "2025-01", frozenset(), kind="random") for i in range(80)]
    title = "Latent reasoning about soup and sauces"
    plain = fit(Corpus(positive + negative), leaves=False)
    rejected = [
        Paper(f"Latent reasoning about soup {i} of the day", "2025-02", frozenset(), kind="rejected") for i in range(5)
    ]
    taught = fit(Corpus(positive + negative + rejected), leaves=False)
    assert taught.decision(title) < plain.decision(title) - 0.5


def test_context_papers_are_no_positives():
    for record in load_records():
        assert (families_of(record) == frozenset()) == (record.taxonomy.primary == "beyond/context")
    assert {paper.key for paper in known_papers(load_records())}.isdisjoint(
        record.key for record in load_records() if record.taxonomy.primary == "beyond/context"
    )


def test_background_is_whole_and_knows_no_record():
    papers = background_papers()
    assert len(papers) == 8116
    assert {kind: sum(paper.kind == kind for paper in papers) for kind in ("random", "trap", "near")} == {
        "random": 5000,
        "trap": 3000,
        "near": 116,
    }
    assert len({paper.key for paper in papers}) == len(papers)


# The parts.


def test_logistic_regression_reaches_the_minimum():
    """Against a dense Newton's method written out here."""
    rng = np.random.default_rng(0)
    dense = rng.normal(size=(60, 5)) * (rng.random((60, 5)) < 0.6)
    target = (dense @ np.array([2.0, -1.0, 0.5, 0.0, 1.0]) + rng.normal(size=60) > 0).astype(float)
    weight, prior, c = rng.uniform(0.5, 2.0, 60), np.array([1.0, 0.0, -1.0, 0.0, 3.0]), 0.7
    rows = Sparse.of([{j: float(v) for j, v in enumerate(row) if v} for row in dense], 5)
    beta, b = fit_logistic(rows, target, weight, prior, c=c, tolerance=1e-8, most_steps=500)
    x = np.hstack([dense, np.ones((60, 1))])
    theta, pull, center = np.zeros(6), np.diag([1 / c] * 5 + [0.0]), np.append(prior, 0.0)
    for _ in range(100):
        p = 1 / (1 + np.exp(-x @ theta))
        gradient = x.T @ (weight * (p - target)) + pull @ (theta - center)
        theta -= np.linalg.solve(x.T @ (x * (weight * p * (1 - p))[:, None]) + pull, gradient)
    np.testing.assert_allclose(np.append(beta, b), theta, atol=1e-6)


def test_without_evidence_weights_stay_at_the_prior():
    rows = Sparse.of([{0: 1.0}, {0: 1.0}, {0: 1.0}, {0: 1.0}], 2)
    beta, _ = fit_logistic(rows, np.array([1.0, 0.0, 1.0, 0.0]), np.ones(4), np.array([0.0, 4.0]))
    assert beta[1] == pytest.approx(4.0)


def test_sparse_rows_are_taken_in_order():
    rows = Sparse.of([{0: 1.0}, {}, {1: 2.0, 2: 3.0}], 3).take(np.array([2, 0, 1]))
    assert rows.starts.tolist() == [0, 2, 3, 3]
    assert rows.columns.tolist() == [1, 2, 0]
    assert rows.values.tolist() == [2.0, 3.0, 1.0]


def test_auroc_and_threshold_by_hand():
    assert auroc(np.array([2.0, 1.0]), np.array([1.0, 0.0])) == pytest.approx((1 + 1 + 0.5 + 1) / 4)
    scores = np.arange(200.0)
    assert (scores > threshold_at(scores, 0.01)).sum() == 2
    assert (np.ones(200) > threshold_at(np.ones(200), 0.01)).sum() == 0
    with pytest.raises(ValueError, match="both kinds"):
        auroc(np.array([]), np.array([1.0]))
    with pytest.raises(ValueError, match="rate"):
        threshold_at(scores, 1.0)


def test_wilsons_interval_against_its_equation():
    for found, of in ((0, 5), (3, 7), (48, 53), (16, 16)):
        for end in wilson(found, of):  # the ends solve (p - share)² = z² p (1 - p) / n
            assert (end - found / of) ** 2 == pytest.approx(1.959964**2 * end * (1 - end) / of, abs=1e-9)
    with pytest.raises(ValueError, match="given 4 of 3"):
        wilson(4, 3)


def test_features_are_scaled_and_ignore_dashes_and_ligatures():
    rarity = Rarity.fit([grams("looped transformers"), grams("looped models")], 1)
    values = features("Looped transformers", rarity)
    length = math.sqrt(sum(value**2 for name, value in values.items() if name[0] != "k"))
    assert length == pytest.approx(GRAM_LENGTH)
    assert values["k:looped model"] == 1.0
    assert normal_text("Depth–recurrent  di\ufb00usion\n") == "Depth-recurrent diffusion"
    assert features("Unknown words only here", rarity) == {}


def test_concepts():
    assert "looped model" in concepts_in("LoopFormer and looped language models")
    assert "looped model" not in concepts_in("Human-in-the-loop language models")
    assert "diffusion language model" in concepts_in("FOCUS: DLLMs Know")
    assert "diffusion language model" not in concepts_in("Long-Context Diffusion Policies")
    names = [concept.name for concept in load_concepts()]
    assert len(set(names)) == len(names)
    assert set(priors()) == set(FAMILIES)
    assert all(priors()[family] for family in ("latent", "looped", "diffusion", "linear", "mechanisms", "broad"))


def test_the_keyword_rule():
    strong, weak, none = (
        keyword_score(t).points for t in ("Looped Transformers", "Recurrent Depths of Cooking", "Fish")
    )
    assert strong > weak > none == 0
    assert keyword_score("Latent reasoning").terms[0] == "latent reasoning"


# Bad input and surroundings.


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ((3,), TypeError, "title: expected a string, given int"),
        (("A title", 3), TypeError, "abstract: expected a string or None, given int"),
        (("",), ValueError, "title: expected some text"),
        ((" \n\t",), ValueError, "title: expected some text"),
    ],
)
def test_wrong_arguments(arguments, error, match):
    with pytest.raises(error, match=match):
        score(*arguments)


@pytest.mark.parametrize(
    "title",
    [
        "x" * 10_000_000,
        "latent " * 100_000,
        "<script>alert('loop')</script>",
        "\u202ereversed loop\u202c",
        "\x00\x01",
        "a\ud800b",
        "循环 变换器",
    ],
    ids=["10 MB", "one word", "script", "right to left", "control", "surrogate", "Chinese"],
)
def test_hostile_titles_are_scored_like_any_other(title):
    found = score(title, title)
    assert 0 <= found.probability <= 1


def test_damaged_models_and_data_are_refused(tmp_path):
    with pytest.raises(CatalogError, match="train-relevance"):
        read_model(tmp_path / "none.json")
    bad = tmp_path / "bad.json"
    for text in ("{", "[]", '{"format": 99}', '{"format": 1}'):
        bad.write_text(text)
        with pytest.raises(CatalogError, match="train it anew"):
            read_model(bad)
    titles = tmp_path / "background.tsv"
    titles.write_text("2401.00001\trandom\tA title\n2401.00002\tunheard\tAnother\n")
    with pytest.raises(CatalogError, match="line 2"):
        background_papers(titles)
    with pytest.raises(CatalogError, match="is missing"):
        background_papers(tmp_path / "none.tsv")
    with pytest.raises(ValueError, match="positives and negatives"):
        fit(Corpus([Paper("A title", "2025-01", frozenset(), kind="random")]))


def test_scoring_imports_neither_torch_nor_numpy():
    code = (
        "import sys; from latentcot.catalog.relevance import score; score('Looped transformers'); "
        "print([name for name in ('torch', 'numpy', 'transformers') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    assert VERSION >= 1


def test_the_command_scores_titles():
    runner = CliRunner()
    found = runner.invoke(papers_app, ["score", "--json", "Looped", "Transformers"])
    assert found.exit_code == 0
    data = json.loads(found.output)
    assert data["relevant"] is True
    assert data["leaves"][0]["leaf"] == "vertical/architecture"
    piped = runner.invoke(papers_app, ["score", "-"], input="Looped Transformers\n\nCooking with Fish\n")
    assert piped.exit_code == 0
    assert "below the threshold: Cooking with Fish" in piped.output
    assert runner.invoke(papers_app, ["score", "-"], input="\n").exit_code == 2
    assert runner.invoke(papers_app, ["train-relevance", "--output", "/nonexistent/place"]).exit_code == 2
