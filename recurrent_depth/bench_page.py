"""The page of the benchmark of early exits, from its numbers alone: :func:`page`."""

from collections.abc import Mapping
from typing import Any

INTRODUCTION = """\
How much of the time of full depth a loop takes whose rows leave when they have settled.
`python -m latentcot.recurrent_depth.bench` measures it and writes this page and `depth.json`.

"""

COLUMNS = """\
* **formula**: FLOPs of prelude, mean depth times adapter and core, checks, coda and head, over those at full depth. **FLOPs**: the
  same ratio as PyTorch counts what ran.
* **time**: with exits over the fastest full depth (no exits, states that hold exact entries only), and over the **same path** with its
  rule switched off. CPU time of one thread, which is the wall time of a machine that does nothing else; **wall** is the ratio of wall
  times of this run, with whatever else ran beside it.
* **floor**: time of the same blocks on exactly the rows at work, without criterion, choice of rows or writing, over full depth.
* **time / formula** is held against the bar, **time / floor** says what the machinery adds.
"""


def page(result: Mapping[str, Any]) -> str:
    """Markdown of one run's ``depth.json``."""
    e, sizes, bar = result["environment"], result["sizes"], result["bar"]
    dates = " and ".join(sorted({row.get("date", e["date"]) for row in result["rows"].values()}))
    lines = [
        "---",
        "hide: [navigation]",
        "description: Wall time and FLOPs of loops whose rows leave early, beside the formula and a floor",
        "---",
        "",
        "# Early exits",
        "",
        INTRODUCTION
        + f"{dates}, {e['machine']}, {e['threads']} thread, PyTorch {e['torch']}, Python {e['python']}, {e['dtype']}. "
        + f"{sizes['rows']} rows, prompts and sequences of {sizes['prompt']} tokens, width {sizes['width']}, "
        + f"vocabulary {sizes['vocab']}, "
        + f"at most {sizes['recurrences']} recurrences of two blocks; {sizes['tokens']} tokens decoded, the shortest of {sizes['repeats']} "
        + "repetitions, in which the variants take turns. Random weights; the threshold is set for a mean depth of about half.",
        "",
        "| case | mean depth | formula | FLOPs | time | wall | same path | floor | time / formula | time / floor |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, row in result["rows"].items():
        same = f"{row['exits'] / row['same path']:.2f}" if "same path" in row else "–"
        numbers = [row["formula"], row["flops"], row["exits"], row["wall"]]
        ratios = [row["floor"], row["of_formula"], row["of_floor"]]
        cells = [*(f"{n:.2f}" for n in numbers), same, *(f"{n:.2f}" for n in ratios)]
        lines.append(f"| {name} | {row['mean_depth']:.1f} | {' | '.join(cells)} |")
    lines += ["", COLUMNS, f"Bar: time / formula at most {bar}.", ""]
    missed = {n: r for n, r in result["rows"].items() if r["of_formula"] > bar}
    if missed:
        lines += ["## What is not reached", ""]
        for name, row in missed.items():
            why = (
                "the blocks alone miss it" if row["floor"] > bar * row["formula"] else "the blocks alone would reach it"
            )
            lines.append(
                f"- {name}: {row['of_formula']:.2f} times the formula; {why} ({row['floor'] / row['formula']:.2f}), "
                f"the machinery takes {row['of_floor']:.2f} times their time."
            )
        lines.append("")
    lines += ["## Depths", "", "Rows or tokens that left after 0, 1, 2, … recurrences:", ""]
    lines += [f"- {name}: {' '.join(map(str, row['depths']))}" for name, row in result["rows"].items()]
    return "\n".join(lines) + "\n"
