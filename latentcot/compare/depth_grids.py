"""The section of the depth page about solvers of Sudoku trained by the clock, from results that lie beside the plots.

================ ====================================================================================================================
file             what
================ ====================================================================================================================
solver-*.json    reports of :mod:`latentcot.recurrent_depth.recursive_solvers.sudoku_run` (``result.json``)
sudoku9-*.json   results of ``latentcot compare depth-sudoku9``, a run each (``runs/*/result.json``); one that was cut short has
                 ``"finished": false`` with its ``training`` (``steps``, ``of``, ``loss``) and nothing measured
================ ====================================================================================================================
"""

import json
from pathlib import Path
from typing import Any

from latentcot.compare.plots import style

GRIDS = {
    "sanity4": "4x4, sanity",
    "classes4": "4x4, classes",
    "grids6": "6x6",
    "grids9": "9x9",
    "extreme9": "9x9",
}
PICTURE = "grids9-training"
Found = dict[str, list[dict[str, Any]]]


def read_grids(folder: Path) -> Found:
    """The results in ``folder``: ``solver`` and ``study``, each in order of its files' names."""
    return {
        name: [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob(pattern))]
        for name, pattern in (("solver", "solver-*.json"), ("study", "sudoku9-*.json"))
    }


def grids_lines(found: Found, pictures: str) -> list[str]:
    """The section, or nothing where there are no results."""
    if not found["solver"] and not found["study"]:
        return []
    return [
        "## Sudoku by TRM, 4x4 to 9x9",
        "",
        "Accuracy is the share of 1000 puzzles whose whole grid is right. On 6x6 and 9x9 the test's solutions belong to classes (up to all "
        "symmetries of the grid) that training does not hold: a claim about solving. On 4x4 there is none to make: *sanity* has unseen "
        "clue patterns of grids that training has seen and shows that training works, *classes* has the 4 of 12 "
        "classes up to relabelling that training does not hold (up to all symmetries there are two).",
        "",
        *(_solver_lines(found["solver"], pictures) if found["solver"] else []),
        *(_study_lines(found["study"]) if found["study"] else []),
    ]


def _solver_lines(runs: list[dict[str, Any]], pictures: str) -> list[str]:
    lines = [
        "TRM, trained by the clock (`python -m latentcot.recurrent_depth.recursive_solvers.sudoku_run`), one seed each:",
        "",
        *(
            f"* {GRIDS.get(run['preset'], run['preset'])}: {run['task']['blanks']} blanks, {run['puzzles']:,} training puzzles under "
            f"fresh symmetries, width {run['solver']['hidden_size']}, {run['parameters']:,} parameters, batches of {run['batch']}, "
            f"{_machine(run)}."
            for run in {run["preset"]: run for run in runs}.values()
        ),
        "",
        "| grid | seconds | steps | all segments | stops by itself | segments | twice as many | last weights | look-up |",
        "| --- |" + " ---: |" * 8,
    ]
    for run in runs:
        test = run["test"]
        lines.append(
            f"| {GRIDS.get(run['preset'], run['preset'])} | {run['seconds']:.0f} | {run['steps']:,} | "
            f"{run['test_without_halting']['exact']:.3f} | {test['exact']:.3f} | {test['segments']:.1f} | "
            f"{run['test_longer']['exact']:.3f} | {run['test_last_weights']['exact']:.3f} | {run['baselines']['lookup']:.3f} |"
        )
    segments = " or ".join(str(n) for n in sorted({run["supervision"]["segments"] for run in runs}))
    lines += [
        "",
        f"*All segments*: as many as in training ({segments}), as the published evaluations do; *stops by itself*: the halt logit decides, "
        "a puzzle at a time; *last weights*: without the weight average, stopping by itself.",
        "",
    ]
    runs = [run for run in runs if not run["preset"].endswith("4")]  # all of 4x4 falls to singles
    levels = sorted({name for run in runs for name in run["test"] if name.startswith("exact_d")})
    lines += [
        "By difficulty (guesses that a fixed solver needs; 1: none, 2: up to 5, 3: up to 20, 4: more), all segments:",
        "",
        "| grid | seconds | " + " | ".join(name.removeprefix("exact_d") for name in levels) + " |",
        "| --- | ---: |" + " ---: |" * len(levels),
    ]
    for run in runs:
        cells = [
            f"{run['test_without_halting'][name]:.3f} ({run['test_without_halting'][name.replace('exact', 'puzzles')]:.0f})"
            if name in run["test_without_halting"]
            else "–"
            for name in levels
        ]
        lines.append(
            f"| {GRIDS.get(run['preset'], run['preset'])} | {run['seconds']:.0f} | " + " | ".join(cells) + " |"
        )
    lines += ["", "In brackets: how many test puzzles.", ""]
    if any(GRIDS.get(run["preset"]) == "9x9" for run in runs):
        caption = "Training grids of 9x9 that are right when a row leaves, against steps"
        lines += [f"![{caption}]({pictures}/{PICTURE}.png)", "", caption + ".", ""]
    return lines


def _machine(run: dict[str, Any]) -> str:
    machine = run["machine"]
    return f"{machine['device']}, torch {machine['torch']}{', compiled blocks' if machine.get('compiled') else ''}"


def _study_lines(runs: list[dict[str, Any]]) -> list[str]:
    done = [run for run in runs if run.get("finished", True)]
    levels = sorted({level for run in done for level in run["measured"]["by_level"]}, key=int)
    lines = [
        "The loop against its own network once, and against a network as costly as a segment, for the same number of steps on 9x9 "
        "(`latentcot compare depth-sudoku9`, one seed):",
        "",
        "| stack | accuracy | "
        + " | ".join(f"difficulty {level}" for level in levels)
        + " | parameters | steps | loss | seconds |",
        "| --- | ---: |" + " ---: |" * (len(levels) + 4),
    ]
    for run in runs:
        training, name = run["training"], run["stack"].replace("_", " ")
        if not run.get("finished", True):
            cells = " | ".join("–" for _ in levels)
            lines.append(
                f"| {name} | not measured | {cells} | {run['parameters']:,} | {training['steps']:,} of {training['of']:,} | "
                f"{training['loss']:.2f} | {training['seconds']:.0f} |"
            )
            continue
        by_level = run["measured"]["by_level"]
        items = sum(row["items"] for row in by_level.values())
        overall = sum(row["accuracy"] * row["items"] for row in by_level.values()) / items
        lines.append(
            f"| {name} | {overall:.3f} | "
            + " | ".join(f"{by_level[level]['accuracy']:.3f}" for level in levels)
            + f" | {run['parameters']:,} | {training['steps']:,} | {training['history'][-1]['loss']:.2f} | {training['seconds']:.0f} |"
        )
    looped = next((run for run in done if "dial" in run["measured"]), None)
    if looped is not None:
        shares = ", ".join(
            f"{segments}: {sum(r['accuracy'] * r['items'] for r in rows.values()) / sum(r['items'] for r in rows.values()):.3f}"
            for segments, rows in sorted(looped["measured"]["dial"].items(), key=lambda pair: int(pair[0]))
        )
        lines += ["", f"The loop after other numbers of segments than in training: {shares}."]
    for run in runs:
        if not run.get("finished", True):
            lines += ["", f"{run['stack'].replace('_', ' ').capitalize()}: {run['note']}"]
    return [*lines, ""]


def training_drawing(found: Found) -> Any:
    """A drawing of the share of training grids that are right against steps, or ``None`` where no 9x9 run has any."""
    runs = [run for run in found["solver"] if GRIDS.get(run["preset"]) == "9x9"]
    # the longest alone: a shorter one of the same seed took the same steps
    runs = sorted(runs, key=lambda run: run["steps"])[-1:]
    if not runs:
        return None

    def draw(axes: Any) -> None:
        for index, run in enumerate(runs):
            rows = [row for row in run["history"] if row["exact"] == row["exact"]]
            colour, _, dash = style(index)
            axes.plot([r["step"] for r in rows], [r["exact"] for r in rows], dash, color=colour, lw=1.3, label="grids")
            colour, _, dash = style(index + 1)
            axes.plot([r["step"] for r in rows], [r["cells"] for r in rows], dash, color=colour, lw=1.3, label="cells")
        axes.set(xlabel="optimiser step", ylabel="right when a row leaves (training)", ylim=(0, 1.02))
        axes.legend(loc="lower right", frameon=False)

    return draw
