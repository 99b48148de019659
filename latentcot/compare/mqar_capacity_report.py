"""Table, plot and page of the capacity study (:mod:`latentcot.compare.mqar_capacity`)."""

from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from latentcot.compare.plots import save_figures, style
from latentcot.files import write_text


@dataclass(frozen=True)
class CapacityCell:
    """One stack at its best learning rate: mean over seeds for each test setting."""

    mixer: str
    width: int
    rates: tuple[float, ...]
    accuracy: tuple[float, ...]
    spread: tuple[float | None, ...]
    state_bytes: tuple[int, ...]
    parameters: int


def capacity_cells(results: dict[str, Any]) -> list[CapacityCell]:
    """In the study's order; stacks without runs are left out.

    For each seed the learning rate with the best mean on validation sequences counts.
    """
    study = results["study"]
    cells = []
    for mixer in study["mixers"]:
        for width in study["widths"]:
            runs = [r for r in results["runs"] if (r["mixer"], r["width"]) == (mixer, width)]
            if not runs:
                continue
            best = [
                max((r for r in runs if r["seed"] == seed), key=lambda r: (mean(r["validation"]), -r["rate"]))
                for seed in range(study["seeds"])
            ]
            columns = list(zip(*(r["test"] for r in best), strict=True))
            cells.append(
                CapacityCell(
                    mixer,
                    width,
                    tuple(r["rate"] for r in best),
                    tuple(mean(c) for c in columns),
                    tuple(stdev(c) if len(c) > 1 else None for c in columns),
                    tuple(best[0]["state_bytes"]),
                    best[0]["parameters"],
                )
            )
    return cells


def _names(results: dict[str, Any]) -> list[str]:
    return [f"{s['length']} / {s['pairs']}" for s in results["study"]["tested"]]


def capacity_table(results: dict[str, Any]) -> Table:
    """Accuracy of every stack by test setting."""
    table = Table(title="MQAR capacity: accuracy over queries", box=SIMPLE_HEAD, padding=(0, 0, 0, 1), pad_edge=False)
    for name in ("mixer", "width", *_names(results), "state bytes"):
        table.add_column(name, justify="left" if name == "mixer" else "right", no_wrap=True)
    for cell in capacity_cells(results):
        table.add_row(cell.mixer, str(cell.width), *(f"{a:.3f}" for a in cell.accuracy), f"{cell.state_bytes[0]:,}")
    return table


def capacity_page(results: dict[str, Any], pictures: str = "mqar-capacity") -> str:
    """The Markdown page; ``pictures`` is the folder of the plots as seen from it."""
    study, machine = results["study"], results["machine"]
    names = _names(results)
    trained = ", ".join(f"{s['length']} / {s['pairs']}" for s in study["trained"])
    examples = sum(s["train"] for s in study["trained"])
    passes = study["train"]["steps"] * study["batch_size"] / examples
    rates = " or ".join(f"{rate:g}" for rate in study["rates"])
    lines = [
        "# How much a state holds",
        "",
        "Multi-query associative recall with one mixture for training and harder settings for testing: accuracy over queries against the "
        "bytes of the state. Written by `latentcot compare mqar-capacity`; every figure is read off its `results.json`.",
        "",
        f"* Stacks of {study['layers']} layers, one head of the whole width, MLP of {study['mlp_ratio']} times the width, tied embeddings"
        + (
            ", a short convolution in every mixer but RetNet and full attention." if study["short_convolution"] else "."
        ),
        f"* Trained on tokens / pairs {trained}: {examples:,} examples, {passes:.1f} passes ({study['train']['steps']} steps of "
        f"{study['batch_size']}), learning rate {rates}, the better one on validation sequences. The published protocol has 32 passes "
        "and four learning rates, so accuracies here are lower bounds of what a stack can reach.",
        f"* {study['items']} test sequences a setting; {study['seeds']} seed{'s' if study['seeds'] > 1 else ''}"
        f"{', ± is the standard deviation' if study['seeds'] > 1 else ': differences of a few points say nothing'}.",
        f"* {machine['device']}, torch {machine['torch']}, finished {results['finished'][:10]}.",
        "",
        f"![Mean accuracy over the settings against state bytes, one line a mixer]({pictures}/capacity.png)",
        "",
        "Mean accuracy over all test settings. State of one sequence in float32; for full attention, whose keys and values grow, after "
        f"{study['tested'][-1]['length']} tokens.",
        "",
        "| mixer | width | " + " | ".join(names) + " | state bytes |",
        "| --- | ---: |" + " ---: |" * (len(names) + 1),
    ]
    for cell in capacity_cells(results):
        figures = [
            f"{a:.3f}" + ("" if s is None else f" ± {s:.3f}") for a, s in zip(cell.accuracy, cell.spread, strict=True)
        ]
        size = f"{cell.state_bytes[0]:,}"
        if cell.state_bytes[-1] != cell.state_bytes[0]:
            size += f" to {cell.state_bytes[-1]:,}"
        lines.append(f"| {cell.mixer} | {cell.width} | " + " | ".join(figures) + f" | {size} |")
    planned = len(study["mixers"]) * len(study["widths"])
    if len(found := capacity_cells(results)) < planned:
        lines += ["", f"{len(found)} of the study's {planned} stacks were run."]
    lines += ["", "## Repeat it", "", "```console", "$ latentcot compare mqar-capacity", "```", ""]
    return "\n".join(lines)


def write_capacity_report(results: dict[str, Any], out: Path) -> Path:
    """Write ``mqar-capacity.md`` and ``mqar-capacity/capacity.png`` into ``out``; returns the path of the page."""
    out.mkdir(parents=True, exist_ok=True)
    cells = capacity_cells(results)

    def draw(axes: Any) -> None:
        for index, mixer in enumerate(dict.fromkeys(cell.mixer for cell in cells)):
            colour, marker, dash = style(index)
            group = [cell for cell in cells if cell.mixer == mixer]
            x, y = [c.state_bytes[-1] for c in group], [mean(c.accuracy) for c in group]
            axes.plot(x, y, dash, color=colour, marker=marker, ms=5, lw=1.2, label=mixer)
        axes.set(
            xscale="log", xlabel="state bytes of one sequence", ylabel="accuracy, mean over settings", ylim=(0, 1.05)
        )
        axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)

    save_figures({"capacity": draw}, out / "mqar-capacity")
    path = out / "mqar-capacity.md"
    write_text(path, capacity_page(results))
    return path
