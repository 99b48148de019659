"""``papers train-relevance``: measure the cuts in time, fit on everything, write model and report."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from latentcot.catalog.record import Record, dump_json
from latentcot.catalog.relevance.data import all_papers
from latentcot.catalog.relevance.evaluate import CUTS, FALSE_POSITIVES, calibrate, cuts_in_time, threshold_at
from latentcot.catalog.relevance.model import MODEL_FILE, Model, save_model
from latentcot.catalog.relevance.score import propose_leaves
from latentcot.catalog.relevance.train import Corpus, fit
from latentcot.catalog.store import CATALOG, load_records, write_atomic

REPORT_FILE = CATALOG / "data" / "relevance_report.json"


def _proposed(model: Model, values: dict[str, float]) -> list[str]:
    return [proposal.leaf for proposal in propose_leaves(model, values)]


def make_model(
    records: list[Record] | None = None,
    model_file: Path = MODEL_FILE,
    report_file: Path = REPORT_FILE,
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Train the scorer and write its model and report; returns the report.

    The threshold and the probabilities that ship are those of the last cut: its model had not seen the months that
    fixed them. The model that ships is fitted on all papers.

    Raises:
        CatalogError: the background titles or a decision cannot be read.
        ValueError: the papers do not reach the months of the cuts.
    """
    say("reading titles")
    records = load_records() if records is None else records
    corpus = Corpus(all_papers(records))
    cuts, judged = cuts_in_time(corpus, _proposed, say)
    slope, offset = calibrate(judged)
    threshold = threshold_at(judged.scores[judged.negative], FALSE_POSITIVES)
    say("fitting on all papers")
    model = fit(corpus)
    positives = sum(bool(paper.families) for paper in corpus.papers)
    rejected = sum(paper.kind == "rejected" for paper in corpus.papers)
    about = {
        "positives": positives,
        "negatives": len(corpus.papers) - positives,
        "rejected": rejected,
        "last_added": max(record.added for record in records),
        "threshold_from": f"{CUTS[-1][0]} to {CUTS[-1][1]}",
        "false_positives_at_threshold": FALSE_POSITIVES,
    }
    model = replace(model, slope=slope, offset=offset, threshold=threshold, about=about)
    report = {"about": about, "threshold_probability": round(model.probability(threshold), 4), "cuts": cuts}
    save_model(model, model_file)
    write_atomic(report_file, dump_json(report))
    return report


def report_lines(report: dict[str, Any]) -> list[str]:
    """The report's numbers for a terminal, one line a family and cut."""
    lines = [
        f"{report['about']['positives']} papers of the catalog, {report['about']['negatives']} other titles, "
        f"{report['about']['rejected']} of them rejected candidates"
    ]
    for cut in report["cuts"]:
        lines.append(f"papers of {cut['from']} to {cut['to']}, {cut['negatives']} other titles (recall at 1 % of them)")
        for family, entry in cut["families"].items():
            lines.append(
                f"  {family:<10} {entry['papers']:>4} papers: AUROC {entry['scorer_auroc']:.3f}, "
                f"recall {entry['scorer_recall']:.2f}; keyword rule {entry['keywords_auroc']:.3f}, "
                f"{entry['keywords_recall']:.2f}"
            )
    return lines
