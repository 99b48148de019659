"""The page of the diffusion study: tables, accuracy against passes, and who wins; Markdown, so that the site can take it as it is."""

import json
import math
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from latentcot.compare.diffusion import default_diffusion
from latentcot.compare.diffusion_arms import SAMPLERS
from latentcot.compare.plots import save_figures, style
from latentcot.files import write_text

FOLDER = "diffusion"
GRIDS9 = "grids9-*.json"  # results of diffusion_sudoku on a GPU, beside the plots


@dataclass(frozen=True)
class Cell:
    """An arm with a sampler on one part, mean over seeds: ``exact`` by test set, mean passes, how many answers each share is of."""

    part: str
    arm: str
    sampler: str
    exact: dict[str, float]
    nfe: float
    items: int
    seeds: int
    by_seed: tuple[float, ...] = ()
    """Mean over the test sets of each seed."""

    @property
    def mean(self) -> float:
        """Over the test sets."""
        return mean(self.exact.values())

    @property
    def error(self) -> float:
        """Standard error of :attr:`mean` over test items; models of other seeds vary more."""
        return math.sqrt(sum(p * (1 - p) for p in self.exact.values()) / self.items / self.seeds) / len(self.exact)


def cells(results: dict[str, Any], part: str) -> list[Cell]:
    """Every arm and sampler of a part, in the study's order."""
    runs = [run for run in results["runs"] if run["part"] == part]
    found = []
    for arm in dict.fromkeys(run["arm"] for run in runs):
        group = [run["solved"] for run in runs if run["arm"] == arm]
        tests = sorted(group[0], key=lambda name: [int(word) if word.isdigit() else 0 for word in name.split()])
        for sampler in (name for name in SAMPLERS if name in group[0][tests[0]]):
            rows = {test: [solved[test][sampler] for solved in group] for test in tests}
            found.append(
                Cell(
                    part,
                    arm,
                    sampler,
                    {test: mean(r["exact"] for r in rows[test]) for test in tests},
                    mean(r["nfe"] for test in tests for r in rows[test]),
                    int(rows[tests[0]][0]["items"]),
                    len(group),
                    tuple(mean(solved[test][sampler]["exact"] for test in tests) for solved in group),
                )
            )
    return found


def best(found: list[Cell], way: str) -> Cell | None:
    """The cell of a way of generating with the highest mean; fewer passes among equals."""
    group = [cell for cell in found if cell.arm.split("-")[0] == way]
    return max(group, key=lambda c: (c.mean, -c.nfe)) if group else None


def not_apart(one: Cell, other: Cell) -> str | None:
    """Why the figures do not tell two cells apart, or ``None`` where they do: by more than two standard errors of the test items, the mean
    of one is above that of the other, and so is every seed of the one above every seed of the other."""
    error = math.hypot(one.error, other.error)
    if abs(one.mean - other.mean) <= 2 * error:
        return f"no difference beyond twice its standard error of {error:.3f}"
    above, below = (one, other) if one.mean > other.mean else (other, one)
    if above.by_seed and below.by_seed:
        of_a_seed = math.hypot(one.error * math.sqrt(one.seeds), other.error * math.sqrt(other.seeds))
        if min(above.by_seed) - max(below.by_seed) <= 2 * of_a_seed:
            return "not told apart by their seeds"
    return None


def share(cell: Cell) -> str:
    """The mean of a cell, with those of its seeds where there are several."""
    seeds = f" (seeds {', '.join(f'{value:.3f}' for value in cell.by_seed)})" if len(cell.by_seed) > 1 else ""
    return f"{cell.mean:.3f}{seeds}"


def order_line(found: list[Cell], title: str) -> str | None:
    """Any order against left to right at equal parameters, by the figures; ``None`` where only one of them ran."""
    masked, causal = best(found, "masked"), best(found, "autoregressive")
    if masked is None or causal is None:
        return None
    gap = masked.mean - causal.mean
    verdict = not_apart(masked, causal) or (
        f"{'any order' if gap > 0 else 'left to right'} wins by {100 * abs(gap):.1f} points"
    )
    return (
        f"{title}: {verdict}: masked diffusion {share(masked)}, `{masked.arm}`, {masked.sampler}, {masked.nfe:.1f} passes; "
        f"autoregression {share(causal)}, `{causal.arm}`, {causal.nfe:.1f} passes."
    )


def stack_line(runs: list[dict[str, Any]], found: list[Cell], title: str) -> str | None:
    """Block diffusion on the hybrid stack against softmax attention alone, both by confidence, with the steps that each made in its time
    and autoregression as the control; ``None`` where one of both did not run."""
    pair = {cell.arm: cell for cell in found if cell.sampler == "confidence"}
    hybrid, softmax = pair.get("block-hybrid"), pair.get("block-softmax")
    if hybrid is None or softmax is None:
        return None
    gap = hybrid.mean - softmax.mean
    verdict = (
        not_apart(hybrid, softmax)
        or f"the {'hybrid' if gap > 0 else 'softmax'} stack wins by {100 * abs(gap):.1f} points"
    )
    steps = {
        cell.arm: mean(run["training"]["steps"] for run in runs if run["arm"] == cell.arm) for cell in (hybrid, softmax)
    }
    figures = ", ".join(
        f"{cell.arm.split('-')[1]} {share(cell)} after {steps[cell.arm]:.0f} steps" for cell in (hybrid, softmax)
    )
    causal = {cell.arm.split("-")[1]: cell for cell in found if cell.arm.startswith("autoregressive-")}
    control = ", ".join(f"{stack} {share(causal[stack])}" for stack in ("hybrid", "softmax") if stack in causal)
    return f"{title}, block diffusion by confidence: {verdict}: {figures}" + (
        f"; autoregression: {control}." if control else "."
    )


def without_training(part: dict[str, Any]) -> str:
    """What the best baseline of every test set has, in words: a claim below it is none."""
    best_there = [max(figures.values(), default=0.0) for figures in part["baselines"].values()]
    return f"without training {sum(best_there) / len(best_there):.3f}"


def sampler_lines(found: list[Cell], title: str) -> list[str]:
    """On the masked softmax arm: confidence against random order, and what the threshold saves."""
    by = {cell.sampler: cell for cell in found if cell.arm == "masked-softmax"}
    if not by:
        return []
    one, random, some = by["confidence"], by["random order"], by["threshold 0.9"]
    left, once = by["left to right"], by["all at once"]
    return [
        f"{title}, one model (`masked-softmax`): by confidence {one.mean:.3f}, in random order {random.mean:.3f}, left to right "
        f"{left.mean:.3f}; threshold 0.9 {some.mean:.3f} in {some.nfe:.1f} of {one.nfe:.1f} passes; all at once {once.mean:.3f}."
    ]


def claim_lines(results: dict[str, Any]) -> list[str]:
    """What the figures say, one sentence each."""
    lines = []
    for part in results["parts"]:
        found = cells(results, part["name"])
        runs = [run for run in results["runs"] if run["part"] == part["name"]]
        compared = (order_line(found, part["title"]), stack_line(runs, found, part["title"]))
        lines += [f"{line[:-1]}; {without_training(part)}." for line in compared if line is not None]
        lines += sampler_lines(found, part["title"])
    return lines


def diffusion_table(results: dict[str, Any]) -> Table:
    """The best sampler of every arm."""
    table = Table(title="Solved, by arm (best sampler)", box=SIMPLE_HEAD, padding=(0, 0, 0, 1), pad_edge=False)
    for name in ("part", "arm", "sampler", "solved", "passes"):
        table.add_column(name, justify="left" if name in ("part", "arm", "sampler") else "right", no_wrap=True)
    for part in results["parts"]:
        found = cells(results, part["name"])
        for arm in dict.fromkeys(cell.arm for cell in found):
            cell = max((c for c in found if c.arm == arm), key=lambda c: (c.mean, -c.nfe))
            table.add_row(part["name"], arm, cell.sampler, f"{cell.mean:.3f}", f"{cell.nfe:.1f}")
    return table


def _part_lines(results: dict[str, Any], part: dict[str, Any], pictures: str) -> list[str]:
    found, sizes = cells(results, part["name"]), part["sizes"]
    runs = [run for run in results["runs"] if run["part"] == part["name"]]
    tests = list(found[0].exact)
    time = "" if part["seconds"] is None else f", {part['seconds']:g} s of a processor each"
    lines = [
        f"## {part['title']}",
        "",
        part["claim"],
        "",
        f"{sizes['layers']} layers of width {sizes['width']}, {part['rows']} rows a step, learning rate {part['train']['learning_rate']:g}"
        f"{time}. {found[0].items} answers a test set.",
        "",
        "| arm | parameters | steps | training TFLOP | processor seconds |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for run in runs:
        training = run["training"]
        seed = f" (seed {run['seed']})" if results["seeds"] > 1 else ""
        lines.append(
            f"| {run['arm']}{seed} | {run['parameters']:,} | {training['steps']:,} | {training['flops'] / 1e12:.2f} | "
            f"{training['work_seconds']:.0f} |"
        )
    lines += [
        "",
        "| arm | sampler | passes | " + " | ".join(tests) + " |",
        "| --- | --- | ---: |" + " ---: |" * len(tests),
    ]
    for cell in found:
        lines.append(
            f"| {cell.arm} | {cell.sampler} | {cell.nfe:.1f} | "
            + " | ".join(f"{cell.exact[test]:.3f}" for test in tests)
            + " |"
        )
    for name in dict.fromkeys(name for test in tests for name in part["baselines"][test]):
        figures = [part["baselines"][test].get(name) for test in tests]
        lines.append(f"| *{name}* | – | 0 | " + " | ".join("–" if f is None else f"{f:.3f}" for f in figures) + " |")
    caption = f"Share solved against passes, mean over the test sets: {part['title']}"
    return [*lines, "", f"![{caption}]({pictures}/{part['name']}.png)", "", caption + ".", ""]


def grids9_lines(found: list[dict[str, Any]], pictures: str) -> list[str]:
    """The section about 9x9, from results of :mod:`latentcot.compare.diffusion_sudoku`."""
    lines = ["## Sudoku 9x9, unseen classes", ""]
    command = "python -m latentcot.compare.diffusion_sudoku --preset grids9 --arm masked-softmax --device cuda --seconds 150 --out out/9"
    if not found:
        return [*lines, "Not run here: it is for a GPU.", "", "```console", f"$ {command}", "```", ""]
    first = found[0]
    tests = list(first["solved"])
    lines += [
        "54 blanks, 1000 training puzzles under fresh symmetries, 1000 test puzzles whose grids belong to other classes up to all "
        "symmetries: this is the claim.",
        "",
        f"{first['sizes']['layers']} layers of width {first['sizes']['width']}, {first['rows']} rows a step; {first['machine']['device']}, "
        f"torch {first['machine']['torch']}, {first['written'][:10]}.",
        "",
        "| arm | parameters | steps | seconds | sampler | passes | solved | blanks right |",
        "| --- | ---: | ---: | ---: | --- | ---: | ---: | ---: |",
    ]
    for run in found:
        for sampler, row in run["solved"][tests[0]].items():
            training = run["training"]
            lines.append(
                f"| {run['arm']} | {run['parameters']:,} | {training['steps']:,} | {training['work_seconds']:.0f} | {sampler} | "
                f"{row['nfe']:.1f} | {row['exact']:.3f} | {row['blank_accuracy']:.3f} |"
            )
    solved = first["baselines"][tests[0]]["look-up"]
    lines += ["", f"The look-up baseline solves {solved:.3f}.", ""]
    line = order_line(_grids9_cells(found), "Sudoku 9x9")
    if line is not None:
        lines += [line, ""]
    return [
        *lines,
        f"![Share of 9x9 puzzles solved against passes]({pictures}/grids9.png)",
        "",
        "```console",
        f"$ {command}",
        "```",
        "",
    ]


def _grids9_cells(found: list[dict[str, Any]]) -> list[Cell]:
    return [cell for run in found for cell in cells({"runs": [{**run, "part": "grids9"}]}, "grids9")]


def diffusion_page(results: dict[str, Any], grids9: list[dict[str, Any]], pictures: str = FOLDER) -> str:
    """The Markdown page; ``pictures`` is the folder of the plots as seen from it."""
    work = sum(run["training"]["work_seconds"] for run in results["runs"])
    lines = [
        "# Any order or left to right",
        "",
        "Autoregression, masked diffusion and block diffusion, each on a softmax stack and on a hybrid one with gated delta rule layers "
        "(every second layer is full attention), with equal parameters and equal time to train. Written by `latentcot compare "
        "diffusion`; every figure is read off its `results.json`.",
        "",
        "* *Passes* (NFE): network passes that an answer waits for. Autoregression: one a token that is not given. Block diffusion: with "
        "the reading of the prompt and one commit a block.",
        "* Samplers are greedy: the surest token a pass (`confidence`), the two surest, all with a probability of at least 0.9, random "
        "order, left to right, all at once (of a block, in block diffusion).",
        "* Grids are trained as grids: clues are given and never noised, blanks are filled; each training puzzle comes under a random "
        "symmetry. Autoregression and block diffusion read the puzzle first and write a second grid, whose clues they are given too.",
        f"* {results['seeds']} seed{'s' if results['seeds'] > 1 else ': differences of a few points say nothing'}; {work / 60:.0f} "
        f"processor minutes of training in all ({machines(results)}), finished {results['finished'][:10]}. "
        "Equal time depends on the machine, and the steps that fit are counted beforehand by timing some: the tables have steps, FLOPs and "
        "the seconds that they took in the end.",
        "",
        "## What the figures say",
        "",
        *(f"* {line}" for line in claim_lines(results)),
        "",
    ]
    for part in results["parts"]:
        lines += _part_lines(results, part, pictures)
    lines += grids9_lines(grids9, pictures)
    lines += ["## Repeat it", "", "```console", f"$ latentcot compare diffusion{_options(results)}", "```", ""]
    return "\n".join(lines)


def machines(results: dict[str, Any]) -> str:
    """What the runs were made on, and which parts where, if that differs."""
    made: dict[str, list[str]] = {}
    for run in results["runs"]:
        machine = run.get("machine", results["machine"])
        parts = made.setdefault(f"{machine['system']}, torch {machine['torch']}", [])
        if run["part"] not in parts:
            parts.append(run["part"])
    if len(made) < 2:
        return next(iter(made), "no runs")
    return "; ".join(f"{', '.join(parts)}: {machine}" for machine, parts in made.items())


def _options(results: dict[str, Any]) -> str:
    """What the command had to be given: where parts or arms of the study are missing, and for more than one seed."""
    study = default_diffusion()
    parts = [part["name"] for part in results["parts"]]
    arms = list(dict.fromkeys(arm for part in results["parts"] for arm in part["arms"]))
    every_part = len(parts) == len(study.parts)
    every_arm = all(
        len(part["arms"]) == len(own.arms)
        for part in results["parts"]
        for own in study.parts
        if own.name == part["name"]
    )
    given = ("" if every_part else f" --task {','.join(parts)}") + ("" if every_arm else f" --methods {','.join(arms)}")
    return given + (f" --seeds {results['seeds']}" if results["seeds"] > 1 else "")


def write_diffusion_report(results: dict[str, Any], out: Path) -> Path:
    """Write ``diffusion.md`` and ``diffusion/*.png`` into ``out``; returns the path of the page. Results of 9x9 runs are read from
    ``diffusion/grids9-*.json``."""
    folder = out / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    grids9 = [json.loads(path.read_text()) for path in sorted(folder.glob(GRIDS9))]
    pictured = {part["name"]: cells(results, part["name"]) for part in results["parts"]}
    if grids9:
        pictured["grids9"] = _grids9_cells(grids9)
    drawings = {name: partial(_against_passes, found=found) for name, found in pictured.items()}
    save_figures(drawings, folder)
    path = out / "diffusion.md"
    write_text(path, diffusion_page(results, grids9))
    return path


def _against_passes(axes: Any, found: list[Cell]) -> None:
    for index, arm in enumerate(dict.fromkeys(cell.arm for cell in found)):
        colour, marker, dash = style(index)
        group = [cell for cell in found if cell.arm == arm]
        # the samplers that go by confidence make a line; the two fixed orders are points of their own
        line = sorted((c for c in group if c.sampler not in ("random order", "left to right")), key=lambda c: c.nfe)
        if line:
            axes.plot(
                [c.nfe for c in line],
                [c.mean for c in line],
                dash,
                color=colour,
                marker=marker,
                ms=5,
                lw=1.2,
                label=arm,
            )
        others = [c for c in group if c not in line]
        axes.scatter(
            [c.nfe for c in others],
            [c.mean for c in others],
            s=36,
            marker=marker,
            facecolors="none" if line else colour,
            edgecolors=colour,
            label=None if line else arm,
        )
    axes.set(
        xlabel="passes (hollow: random order, left to right)",
        ylabel="share solved, mean over test sets",
        xlim=(0, None),
        ylim=(0, 1.05),
    )
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)
