"""The page of a ratio study: tables with spread, three plots, five claims; Markdown, so that the site can take it as it is."""

from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from latentcot.compare.hybrid_ratio import TRANSFORMER, ratio_name
from latentcot.compare.hybrid_ratio_summary import CellSummary, Figure, study_claims, summarise_cells
from latentcot.compare.plots import save_figures, style
from latentcot.files import write_text

PICTURES = {
    "state": "Recall at the most pairs against bytes of state after a whole sequence (one sequence, float32, keys and values included).",
    "loss": "Loss on held-out text against the number of full-attention layers; bars are standard deviations over seeds.",
    "recall": "Recall at the most pairs against the number of full-attention layers; bars are standard deviations over seeds.",
}


def written(figure: Figure) -> str:
    """``0.812 ± 0.010``; the spread is left out where there is one seed."""
    return f"{figure.mean:.3f}" + ("" if figure.spread is None else f" ± {figure.spread:.3f}")


def table_rows(results: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Header and one row a cell."""
    cells = summarise_cells(results)
    pairs = sorted(cells[0].recall)
    header = [
        "mixer",
        "ratio",
        "full layers",
        *(f"recall, {n} pairs" for n in pairs),
        "loss (nats a byte)",
        "state bytes",
        "parameters",
    ]
    body = [
        [
            cell.mixer,
            ratio_name(cell.period),
            str(cell.full_layers),
            *(written(cell.recall[n]) for n in pairs),
            written(cell.loss),
            f"{cell.mqar_bytes:,}",
            f"{cell.parameters:,}",
        ]
        for cell in cells
    ]
    return header, body


def terminal_table(results: dict[str, Any]) -> Table:
    """Recall at the most pairs, loss, and state of each cell."""
    table = Table(title="Recall and loss by ratio", box=SIMPLE_HEAD, padding=(0, 0, 0, 1), pad_edge=False)
    for name in ("stack", "recall", "loss", "state bytes"):
        table.add_column(name, justify="left" if name == "stack" else "right", no_wrap=True)
    for cell in summarise_cells(results):
        table.add_row(cell.name, written(cell.recall[max(cell.recall)]), written(cell.loss), f"{cell.mqar_bytes:,}")
    return table


def claim_lines(results: dict[str, Any]) -> list[str]:
    """The five claims with their verdicts, one sentence each."""
    return [f"{c.number}. {c.statement} {c.verdict}: {c.because}." for c in study_claims(results)]


def page(results: dict[str, Any], pictures: str = "hybrid-ratio") -> str:
    """The Markdown page; ``pictures`` is the folder of the plots as seen from it."""
    study, text, machine = results["study"], results["text"], results["machine"]
    mqar, seconds = study["mqar"], sum(run["training"]["seconds"] for run in results["runs"])
    most, layers = max(study["pairs"]), study["layers"]
    heads = f"{study['heads']} head{'s' if study['heads'] > 1 else ''}"
    rates = " or ".join(f"{rate:g}" for rate in study["mqar_rates"])
    chosen = ", the better one on validation sequences" if len(study["mqar_rates"]) > 1 else ""
    lines = [
        "# Hybrid ratio, in small",
        "",
        "How many full-attention layers does a linear-attention model need? After *A Systematic Analysis of Hybrid Linear Attention* "
        "(arXiv:2507.06457), with stacks that train in seconds. Written by `latentcot compare hybrid-ratio`; every figure is read off its "
        "`results.json`.",
        "",
        "## What was run",
        "",
        f"* {layers} layers of width {study['width']}, {heads}, MLP {study['mlp_width']}, tied embeddings; "
        f"layer i is full attention if (i + 1) mod r = 0. The study's 24-1, 12-1, 6-1 and 3-1 are r = 24, 12, 6 and 3: of these "
        f"{layers} layers hold {', '.join(ratio_name(p) for p in _periods(results)) or 'none'}, "
        "beside pure and nothing but full attention.",
        f"* Recall: MQAR with {mqar['length']} tokens, {mqar['min_difficulty']} to {mqar['max_difficulty']} pairs, "
        f"{mqar['vocabulary']} ids, "
        f"filler `{mqar['filler']}`; {study['mqar_train']['steps']} steps of {study['mqar_batch']} sequences, "
        f"learning rate {rates}{chosen}; "
        f"accuracy over queries of {study['items']} test sequences for each number of pairs.",
        f"* Text: bytes of {text['source']} ({text['bytes']:,} bytes in {text['documents']} documents), rows of {study['text_length']} "
        f"bytes; {study['text_train']['steps']} steps of {study['text_batch']} rows, "
        f"learning rate {study['text_train']['learning_rate']:g}; "
        f"loss on rows of the last tenth, which no run trains on.",
        f"* {study['seeds']} seeds of everything; ± is the standard deviation over seeds. "
        f"{len(results['runs'])} runs, {seconds / 60:.0f} minutes of training in all, {machine['jobs']} side by side on {machine['cores']} "
        f"cores ({machine['system']}, torch {machine['torch']}), finished {results['finished'][:10]}.",
        "",
        "## Claims of the study",
        "",
        "*Seen* and *not seen* are decided by the program, and only where a difference is larger than the spread over seeds explains. "
        "They are about these runs, not about models of a billion parameters.",
        "",
        "| claim | in these runs | because |",
        "| --- | --- | --- |",
        *(f"| {c.number}. {c.statement} | **{c.verdict}** | {c.because} |" for c in study_claims(results)),
        "",
        "## Figures",
        "",
    ]
    header, body = table_rows(results)
    lines += ["| " + " | ".join(header) + " |", "| --- | --- |" + " ---: |" * (len(header) - 2)]
    lines += ["| " + " | ".join(row) + " |" for row in body]
    lines += [
        "",
        f"State bytes: after {mqar['length']} tokens of one sequence. Chance of a query is {2 / mqar['vocabulary']:.3f}.",
        "",
    ]
    for name, caption in PICTURES.items():
        lines += [f"![{caption}]({pictures}/{name}.png)", "", caption.replace("the most pairs", f"{most} pairs"), ""]
    lines += ["## Repeat it", "", "```console", "$ latentcot compare hybrid-ratio", "```", ""]
    return "\n".join(lines)


def _periods(results: dict[str, Any]) -> list[int]:
    return sorted({run["period"] for run in results["runs"] if run["period"] not in (None, 1)}, reverse=True)


def write_ratio_report(results: dict[str, Any], out: Path) -> Path:
    """Write ``hybrid-ratio.md`` and ``hybrid-ratio/*.png`` into ``out``; returns the path of the page."""
    out.mkdir(parents=True, exist_ok=True)
    cells = summarise_cells(results)
    save_figures(
        {
            "state": lambda axes: _state(axes, cells),
            "loss": lambda axes: _by_layers(axes, cells, "loss on held-out text (nats a byte)", lambda c: c.loss),
            "recall": lambda axes: _by_layers(
                axes, cells, f"recall at {max(cells[0].recall)} pairs", lambda c: c.recall[max(c.recall)]
            ),
        },
        out / "hybrid-ratio",
    )
    path = out / "hybrid-ratio.md"
    write_text(path, page(results))
    return path


def _by_mixer(cells: list[CellSummary]) -> dict[str, list[CellSummary]]:
    groups: dict[str, list[CellSummary]] = {}
    for cell in cells:
        groups.setdefault(cell.mixer, []).append(cell)
    return groups


def _state(axes: Any, cells: list[CellSummary]) -> None:
    for index, (mixer, group) in enumerate(_by_mixer(cells).items()):
        colour, marker, dash = style(index)
        x, y = [c.mqar_bytes for c in group], [c.recall[max(c.recall)].mean for c in group]
        axes.plot(x, y, dash, color=colour, marker=marker, ms=5, lw=1, label=mixer)
    axes.set(
        xscale="log",
        xlabel="state bytes of one sequence",
        ylabel=f"recall at {max(cells[0].recall)} pairs",
        ylim=(0, 1.05),
    )
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)


def _by_layers(axes: Any, cells: list[CellSummary], label: str, measure: Any) -> None:
    groups = _by_mixer(cells)
    for index, (mixer, group) in enumerate(groups.items()):
        colour, marker, dash = style(index)
        y = [measure(c).mean for c in group]
        bars = [measure(c).spread or 0.0 for c in group]
        if mixer == TRANSFORMER:
            axes.axhline(y[0], color=colour, ls=":", lw=1.2, label=f"{mixer} ({group[0].full_layers} full)")
        else:
            x = [c.full_layers for c in group]
            axes.errorbar(x, y, bars, fmt=dash, color=colour, marker=marker, ms=5, lw=1.2, capsize=2, label=mixer)
    mixed = [c for c in cells if c.mixer != TRANSFORMER]
    ticks = {c.full_layers: ratio_name(c.period) for c in mixed}
    axes.set_xticks(list(ticks), [f"{n}\n{name}" for n, name in ticks.items()])
    axes.set(xlabel="full-attention layers, and the ratio", ylabel=label)
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)
