"""The page of a depth study: figures with their spread, verdicts, the dial, exits, and plots; Markdown, as the site takes it."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from latentcot.compare.depth_grids import PICTURE, Found, grids_lines, read_grids, training_drawing
from latentcot.compare.depth_summary import (
    DialSummary,
    StackSummary,
    last_monitors,
    p_hop_bar,
    runs_of,
    summarise_dial,
    summarise_stacks,
    tasks_of,
    unit,
    verdicts,
)
from latentcot.compare.hybrid_ratio_report import written
from latentcot.compare.plots import save_figures, style
from latentcot.files import write_text


def _name(results: dict[str, Any]) -> str:
    """Of the page and of its plots' folder; the quick variant has those of the whole study."""
    return "depth-sudoku9" if results["study"]["name"] == "depth-sudoku9" else "depth"


def _large(number: float) -> str:
    for size, name in ((1e15, "PFLOP"), (1e12, "TFLOP"), (1e9, "GFLOP"), (1e6, "MFLOP"), (1e3, "kFLOP")):
        if number >= size:
            return f"{number / size:.3g} {name}"
    return f"{number:.0f} FLOP"


def terminal_table(results: dict[str, Any]) -> Table:
    """Accuracy and cost of every stack."""
    table = Table(title="A loop against its controls", box=SIMPLE_HEAD, padding=(0, 0, 0, 1), pad_edge=False)
    for name in ("task", "stack", "accuracy", "parameters", "an answer"):
        table.add_column(name, justify="left" if name in ("task", "stack") else "right", no_wrap=True)
    for task in tasks_of(results):
        for row in summarise_stacks(results, task):
            table.add_row(task, row.stack, written(row.accuracy), f"{row.parameters:,}", _large(row.answer_flops))
    return table


def claim_lines(results: dict[str, Any]) -> list[str]:
    """Verdicts against both controls, and the bar of p-hop where it ran."""
    bar = p_hop_bar(results)
    return verdicts(results) + ([] if bar is None else [bar])


def page(results: dict[str, Any], pictures: str = "depth", larger: Found | None = None) -> str:
    """The Markdown page; ``pictures`` is the folder of the plots as seen from it, ``larger`` what
    :func:`~latentcot.compare.depth_grids.read_grids` found."""
    study, machine = results["study"], results["machine"]
    seconds = sum(run["training"]["seconds"] for run in results["runs"])
    lines = [
        "---",
        "description: A loop over depth against the same parameters once and the same FLOPs without a loop",
        "---",
        "",
        "# A loop over depth against its controls",
        "",
        "Does it help to run the same blocks again and again, and is it the loop or the compute? Each looped stack stands beside its own "
        "blocks run once (same parameters) and beside as many blocks of their own as the loop has turns (same FLOPs), trained on the "
        "same examples for the same number of steps. Written by `latentcot compare depth`; every figure is read off its `results.json`.",
        "",
        "## What came out",
        "",
        *(f"* {line}" for line in claim_lines(results)),
        "",
        "*Beats* and *loses to* are said only where the difference is larger than the spread over seeds explains (Student's t at 5 %); "
        f"with {study['seeds']} seeds that needs a large one. These are stacks of a few thousand parameters and short trainings: the "
        "sentences are about these runs.",
        "",
        "## What was run",
        "",
        *(_setting(results, task) for task in tasks_of(results)),
        f"* {study['seeds']} seeds of everything; ± is the standard deviation over seeds. {len(results['runs'])} runs, {seconds / 60:.0f} "
        f"minutes of training in all, {machine['jobs']} side by side on {machine['cores']} cores ({machine['system']}, "
        f"{machine['device']}, torch {machine['torch']}), finished {results['finished'][:10]}. Seconds are not compared: the runs shared "
        "the machine.",
        "",
    ]
    for task in tasks_of(results):
        lines += _task_section(results, task, pictures)
    lines += [] if larger is None else grids_lines(larger, pictures)
    lines += ["## Repeat it", "", "```console", f"$ latentcot compare {study['name']}", "```", ""]
    return "\n".join(lines)


def _setting(results: dict[str, Any], task: str) -> str:
    part = results["parts"][task]
    options = ", ".join(f"{name} {value}" for name, value in part["options"].items())
    if part["kind"] == "TokenPart":
        return (
            f"* `{task}` ({options}): {part['layers']} block{'s' if part['layers'] > 1 else ''} of softmax attention, width "
            f"{part['width']}, {part['heads']} heads, MLP {part['mlp_width']}, {part['recurrences']} recurrences in training, no adapter, "
            f"s_0 = the embeddings; {part['train']['steps']} steps of {part['batch']} examples, learning rate "
            f"{part['train']['learning_rate']:g}; {part['items']} test examples of each difficulty."
        )
    sizes, training = part["sizes"], part["training"]
    rate = part.get("same_flops_rate")
    slower = "" if rate is None else f" (same flops: {rate:g}, since the deep network does not learn at the loop's)"
    return (
        f"* `{task}` ({options}, split by grid): TRM of width {sizes['hidden_size']}, {sizes.get('cycles', 3)} cycles of "
        f"{sizes.get('latent_updates', 6)} updates, {sizes.get('mixing', 'attention')} mixing, up to {part['segments']} segments; "
        f"{training['steps']} steps of {part['batch']} grids from {part['puzzles']} puzzles under fresh symmetries, learning "
        f"rate {training['learning_rate']:g}{slower}; {part['test']} test puzzles whose solutions belong to classes that training does not "
        "hold; accuracy = whole grids."
    )


def _task_section(results: dict[str, Any], task: str, pictures: str) -> list[str]:
    rows, what = summarise_stacks(results, task), unit(results, task)
    levels = sorted(rows[0].by_level)
    name = "blanks" if results["parts"][task].get("level") == "blanks" else "difficulty"
    without = results["baselines"][task]
    lines = [f"## {task}", ""]
    header = ["stack", "accuracy", *(f"{name} {d}" for d in levels), "parameters", "training", "an answer", "passes"]
    body = [
        [
            row.stack.replace("_", " "),
            written(row.accuracy),
            *(written(row.by_level[d]) for d in levels),
            f"{row.parameters:,}",
            _large(row.train_flops),
            _large(row.answer_flops),
            f"{row.passes:.1f}",
        ]
        for row in rows
    ]
    heuristic = [f"{without[str(d)]['heuristic']:.3f}" for d in levels]
    guess = "look-up in the training puzzles" if task == "sudoku" else "best shortcut"
    body.append([guess, "", *heuristic, "", "", "", ""])
    lines += _markdown(header, body)
    if any(row.stack == "looped" for row in rows):
        lines += _dial_section(results, task, summarise_dial(results, task), what, name, pictures)
    return lines


def _dial_section(
    results: dict[str, Any], task: str, dial: DialSummary, what: str, name: str, pictures: str
) -> list[str]:
    levels = sorted(dial.exit_steps)
    lines = ["", f"The loop asked with other numbers of {what} than the {dial.trained} that it was trained with:", ""]
    body = [
        [
            f"{r}{' (trained)' if r == dial.trained else ''}",
            written(dial.accuracy[r]),
            *(written(found[d]) for d in levels),
        ]
        for r, found in dial.by_level.items()
    ]
    lines += _markdown([what, "accuracy", *(f"{name} {d}" for d in levels)], body)
    part = results["parts"][task]
    rule = (
        f"exit rule `{part['exit_rule'].get('kind')}` below {part['exit_rule'].get('threshold'):g}, at most {max(part['dial'])}"
        if part["kind"] == "TokenPart"
        else f"its own halt logit, at most {part['segments']} segments"
    )
    lines += ["", f"Where it stops by itself ({rule}):", ""]
    lines += _markdown(
        [name, f"{what} taken", "accuracy then"],
        [[str(d), written(dial.exit_steps[d]), written(dial.exit_accuracy[d])] for d in levels],
    )
    shares = ", ".join(f"{n}: {count / sum(dial.exit_counts.values()):.0%}" for n, count in dial.exit_counts.items())
    lines += ["", f"Share of answers by number of {what}: {shares}.", ""]
    if monitors := last_monitors(runs_of(results, task, "looped")):
        lines += [
            f"Monitors at the end of training: token correlation {monitors['token_correlation']:.2f}, relative residual "
            f"{monitors['relative_residual']:.2f}, state RMS {monitors['state_rms']:.2f}, loss {monitors['loss_at_one']:.3f} with one "
            f"recurrence and {monitors['loss']:.3f} with {dial.trained}.",
            "",
        ]
    for kind, caption in (
        ("dial", f"Accuracy of the loop against {what}, by {name}; dotted: the number of training."),
        ("levels", f"Accuracy against {name}; bars are standard deviations over seeds."),
        ("exits", f"How many {what} the loop takes when it stops by itself, all seeds together."),
    ):
        lines += [f"![{task}: {caption}]({pictures}/{task}-{kind}.png)", "", caption, ""]
    return lines


def _markdown(header: Sequence[str], body: Sequence[Sequence[str]]) -> list[str]:
    lines = ["| " + " | ".join(header) + " |", "| --- |" + " ---: |" * (len(header) - 1)]
    return lines + ["| " + " | ".join(row) + " |" for row in body]


def write_depth_report(results: dict[str, Any], out: Path) -> Path:
    """Write ``depth.md`` and ``depth/*.png`` (of the GPU study ``depth-sudoku9``) into ``out``; returns the path of the page. Results of
    larger grids are read from ``depth/*.json`` there, see :mod:`~latentcot.compare.depth_grids`."""
    out.mkdir(parents=True, exist_ok=True)
    name = _name(results)
    larger = read_grids(out / name)
    drawings: dict[str, Callable[[Any], None]] = {}
    for task in tasks_of(results):
        rows, what = summarise_stacks(results, task), unit(results, task)
        level = "blanks" if results["parts"][task].get("level") == "blanks" else "difficulty"
        without = {int(d): b["heuristic"] for d, b in results["baselines"][task].items()}
        drawings[f"{task}-levels"] = lambda axes, r=rows, n=level, w=without: _levels(axes, r, n, w)
        if any(row.stack == "looped" for row in rows):
            dial = summarise_dial(results, task)
            drawings[f"{task}-dial"] = lambda axes, d=dial, u=what, n=level: _dial(axes, d, u, n)
            drawings[f"{task}-exits"] = lambda axes, d=dial, u=what: _exits(axes, d, u)
    if (drawing := training_drawing(larger)) is not None:
        drawings[PICTURE] = drawing
    save_figures(drawings, out / name)
    path = out / f"{name}.md"
    write_text(path, page(results, name, larger))
    return path


def _levels(axes: Any, rows: Sequence[StackSummary], name: str, without: dict[int, float]) -> None:
    for index, row in enumerate(rows):
        colour, marker, dash = style(index)
        y = [f.mean for f in row.by_level.values()]
        bars = [f.spread or 0.0 for f in row.by_level.values()]
        label = row.stack.replace("_", " ")
        axes.errorbar(
            list(row.by_level), y, bars, fmt=dash, color=colour, marker=marker, ms=5, lw=1.3, capsize=2, label=label
        )
    axes.plot(list(without), list(without.values()), "-.", color="0.4", lw=1, label="best shortcut")
    axes.set(xlabel=name, ylabel="accuracy", ylim=(-0.02, 1.05), xticks=list(without))
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)


def _dial(axes: Any, dial: DialSummary, what: str, name: str) -> None:
    settings = list(dial.by_level)
    for index, level in enumerate(sorted(dial.exit_steps)):
        colour, marker, dash = style(index)
        y = [dial.by_level[r][level].mean for r in settings]
        bars = [dial.by_level[r][level].spread or 0.0 for r in settings]
        axes.errorbar(
            settings, y, bars, fmt=dash, color=colour, marker=marker, ms=5, lw=1.3, capsize=2, label=f"{name} {level}"
        )
    axes.axvline(dial.trained, color="0.5", ls=":", lw=1)
    axes.set(xlabel=what, ylabel="accuracy", ylim=(-0.02, 1.05), xscale="log")
    axes.set_xticks(settings, [str(r) for r in settings], minor=False)
    axes.set_xticks([], minor=True)
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)


def _exits(axes: Any, dial: DialSummary, what: str) -> None:
    total = sum(dial.exit_counts.values())
    steps = range(1, max(dial.exit_counts) + 1)
    axes.bar(list(steps), [dial.exit_counts.get(n, 0) / total for n in steps], color=style(0)[0], width=0.7)
    axes.axvline(dial.trained, color="0.5", ls=":", lw=1)
    axes.set(xlabel=f"{what} taken", ylabel="share of answers", ylim=(0, 1.0), xticks=list(steps))
