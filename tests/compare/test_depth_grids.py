"""The section about larger grids says what the result files hold, and the published ones can be read."""

import json
import re
from pathlib import Path

from latentcot.compare.depth_grids import PICTURE, grids_lines, read_grids, training_drawing
from latentcot.compare.plots import save_figures

PUBLISHED = Path(__file__).parents[2] / "docs" / "studies" / "depth"


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_published_runs_are_in_the_section_and_on_the_page():
    found = read_grids(PUBLISHED)
    lines = grids_lines(found, "depth")
    page = (PUBLISHED.parent / "depth.md").read_text(encoding="utf-8")
    assert "\n".join(lines) in page
    assert {"sanity4", "classes4", "grids6", "grids9"} == {run["preset"] for run in found["solver"]}
    for run in found["solver"]:
        row = next(cells(x) for x in lines if f"| {run['seconds']:.0f} | {run['steps']:,} |" in x)
        assert row[4] == f"{run['test']['exact']:.3f}"
        assert row[3] == f"{run['test_without_halting']['exact']:.3f}"
        puzzles = [n for name, n in run["test"].items() if name.startswith("puzzles_d")]
        assert sum(puzzles) == run["test_puzzles"]


def test_a_run_that_was_cut_short_claims_no_accuracy(tmp_path):
    cut = {
        "stack": "same_flops",
        "finished": False,
        "parameters": 7,
        "training": {"steps": 3, "of": 4, "loss": 2.5, "seconds": 9.0},
        "note": "out of time.",
    }
    done = {
        "stack": "looped",
        "parameters": 7,
        "training": {"steps": 4, "seconds": 9.0, "history": [{"loss": 0.5}]},
        "measured": {
            "by_level": {"1": {"accuracy": 1.0, "items": 3}, "2": {"accuracy": 0.0, "items": 1}},
            "dial": {"1": {"1": {"accuracy": 0.0, "items": 3}, "2": {"accuracy": 0.0, "items": 1}}},
        },
    }
    (tmp_path / "sudoku9-a.json").write_text(json.dumps(done))
    (tmp_path / "sudoku9-b.json").write_text(json.dumps(cut))
    lines = grids_lines(read_grids(tmp_path), "depth")
    looped, same = (next(cells(x) for x in lines if x.startswith(f"| {name} ")) for name in ("looped", "same flops"))
    assert looped[1] == "0.750", "weighted by puzzles"
    assert same[1:4] == ["not measured", "–", "–"]
    assert not any(re.search(r"\d\.\d{3}", cell) for cell in same)
    assert "Same flops: out of time." in lines


def test_no_results_no_section(tmp_path):
    assert grids_lines(read_grids(tmp_path), "depth") == []
    assert training_drawing(read_grids(tmp_path)) is None


def test_the_curve_of_training_is_drawn(tmp_path):
    save_figures({PICTURE: training_drawing(read_grids(PUBLISHED))}, tmp_path)
    assert (tmp_path / f"{PICTURE}.png").stat().st_size > 5000
