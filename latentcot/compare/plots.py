"""Pictures of a comparison. Every line has a marker and a dash pattern of its own, so that none is told apart by colour alone."""

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from latentcot.compare.summary import MethodSummary, baseline_columns

STYLES = [
    ("#0072B2", "o", "-"),
    ("#D55E00", "s", "-"),
    ("#009E73", "^", "-"),
    ("#CC79A7", "D", "-"),
    ("#56B4E9", "v", "--"),
    ("#E69F00", "P", "--"),
    ("#000000", "X", "-"),
    ("#999999", "*", "-"),
]


def style(index: int) -> tuple[str, str, str]:
    return STYLES[index % len(STYLES)]


def draw_all(results: dict[str, Any], rows: Sequence[MethodSummary], folder: Path) -> dict[str, Path]:
    """Write ``accuracy.png``, ``cost.png`` and ``loss.png``; returns name -> file."""
    drawings = {"accuracy": _accuracy, "cost": _cost, "loss": _loss}
    return save_figures(
        {name: lambda axes, draw=draw: draw(axes, results, rows) for name, draw in drawings.items()}, folder
    )


def save_figures(drawings: Mapping[str, Callable[[Any], None]], folder: Path) -> dict[str, Path]:
    """Call each drawing with axes of its own and write ``<name>.png``; returns name -> file."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    folder.mkdir(parents=True, exist_ok=True)
    files = {}
    with plt.rc_context(
        {
            "figure.dpi": 130,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "font.size": 9,
            "svg.hashsalt": "latentcot",
        }
    ):
        for name, draw in drawings.items():
            figure, axes = plt.subplots(figsize=(7.2, 4.2), layout="constrained")
            draw(axes)
            path = folder / f"{name}.png"
            partial = folder / f"{name}.tmp.png"
            figure.savefig(partial, metadata={"Software": "latentcot"})
            plt.close(figure)
            os.replace(partial, path)
            files[name] = path
    return files


def _accuracy(axes: Any, results: dict[str, Any], rows: Sequence[MethodSummary]) -> None:
    chance, heuristic, heuristic_name = baseline_columns(results)
    for index, row in enumerate(rows):
        colour, marker, dash = style(index)
        axes.plot(
            list(row.by_difficulty),
            list(row.by_difficulty.values()),
            dash,
            color=colour,
            marker=marker,
            ms=4,
            lw=1.4,
            label=row.method,
        )
    axes.plot(list(chance), list(chance.values()), ":", color="0.4", lw=1, label="chance")
    axes.plot(list(heuristic), list(heuristic.values()), "-.", color="0.4", lw=1, label=f"heuristic ({heuristic_name})")
    if results["trained_to"] is not None and max(chance) > results["trained_to"]:
        axes.axvspan(results["trained_to"] + 0.5, max(chance) + 0.5, color="0.93", lw=0)
        axes.text(results["trained_to"] + 0.6, 1.03, "longer than trained", fontsize=8, color="0.35")
    axes.set(
        xlabel="difficulty",
        ylabel="accuracy (exact match)",
        ylim=(0, 1.08),
        xlim=(min(chance) - 0.5, max(chance) + 0.5),
    )
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)


def _cost(axes: Any, results: dict[str, Any], rows: Sequence[MethodSummary]) -> None:
    for index, row in enumerate(rows):
        colour, marker, _ = style(index)
        axes.scatter(
            row.sequential_passes,
            row.longest,
            s=60,
            color=colour,
            marker=marker,
            label=f"{row.method} ({row.flops / 1e6:.1f} MFLOP)",
        )
    axes.set(
        xlabel="sequential passes an answer waits for",
        ylabel=f"accuracy at difficulty {results['trained_to']}",
        ylim=(0, 1.05),
        xlim=(0, max(r.sequential_passes for r in rows) * 1.1 + 0.5),
    )
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)


def _loss(axes: Any, results: dict[str, Any], rows: Sequence[MethodSummary]) -> None:
    for index, row in enumerate(rows):
        colour, _, dash = style(index)
        history = next(run["training"]["history"] for run in results["runs"] if run["method"] == row.method)
        steps, losses = [h["step"] for h in history], [h["loss"] for h in history]
        window = max(1, len(losses) // 60)
        smooth = [
            sum(losses[max(0, i - window + 1) : i + 1]) / len(losses[max(0, i - window + 1) : i + 1])
            for i in range(len(losses))
        ]
        axes.plot(steps, smooth, dash, color=colour, lw=1.2, label=row.method)
    axes.set(
        xlabel="optimiser step", ylabel="training loss (nats a learned token; each method its own)", ylim=(0, None)
    )
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)
