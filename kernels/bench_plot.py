"""The picture of the kernel benchmark: forward + backward at the anchor shape, once for light pages, once for dark.

One horizontal bar a row and implementation, a line where the floor is and one where the bar is that was set. Every
series has a hatch of its own, so that none is told apart by colour alone, and every bar carries its number.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

THEMES = {
    "light": {"text": "#24292f", "line": "#767b84", "colours": ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00")},
    "dark": {"text": "#e6e9ef", "line": "#b3bac5", "colours": ("#56B4E9", "#F0894E", "#4FCB9F", "#E3A3C8", "#F0C050")},
}
HATCHES = ("", "///", "...", "xx", "\\\\\\")


def bars(rows: Sequence[dict[str, Any]]) -> list[tuple[str, list[tuple[str, float]], float | None, float | None]]:
    """(row, [(implementation, ms)], floor, bar) of every row whose forward + backward was measured."""
    found = []
    for row in rows:
        ours = row["ours"].get("both")
        if ours is None:
            continue
        series = [("this library", ours["ms"])]
        for peer in row["peers"]:
            if "both" in peer:
                series.append((peer["peer"], peer["both"]["ms"]))
        fastest: dict[str, float] = {}
        for name, ms in series:  # of a peer's several forms the fastest
            fastest[name] = min(ms, fastest.get(name, ms))
        bar = row["bar_ms"] and row["bar_ms"]["both"]
        found.append((row["name"], list(fastest.items()), ours.get("floor_ms"), bar))
    return found


def draw(rows: Sequence[dict[str, Any]], stem: Path) -> bool:
    """Write ``stem-light.svg`` and ``stem-dark.svg``; False, and nothing written, where there is nothing to show."""
    content = bars(rows)
    if not content:
        return False
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = list(dict.fromkeys(name for _, series, _, _ in content for name, _ in series))
    height = 0.8 / len(names)
    largest = max(ms for _, series, _, _ in content for _, ms in series)
    for theme, look in THEMES.items():
        with plt.rc_context(
            {
                "svg.hashsalt": "latentcot",
                "font.size": 9,
                "text.color": look["text"],
                "axes.labelcolor": look["text"],
                "xtick.color": look["text"],
                "ytick.color": look["text"],
                "axes.edgecolor": look["line"],
                "hatch.linewidth": 0.6,
            }
        ):
            figure, axes = plt.subplots(figsize=(7.6, 0.6 + 0.28 * len(names) * len(content)), layout="constrained")
            labelled: set[str] = set()

            def once(label: str, labelled: set[str] = labelled) -> str | None:
                new = label not in labelled
                labelled.add(label)
                return label if new else None

            for index, (_, series, floor, bar) in enumerate(content):
                for name, ms in series:
                    at = names.index(name)
                    y = index - 0.4 + (at + 0.5) * height
                    axes.barh(
                        y, ms, height * 0.9, label=once(name),
                        color=look["colours"][at % len(HATCHES)], hatch=HATCHES[at % len(HATCHES)], edgecolor=look["text"],
                        linewidth=0.4,
                    )  # fmt: skip
                    beside = bar if bar and 0 <= bar - ms < 0.06 * largest else ms  # not across the line
                    axes.annotate(f"{ms:.3g}", (beside, y), (3, 0), textcoords="offset points", va="center", fontsize=8)
                for value, dash, label in ((floor, ":", "floor"), (bar, "-", "bar")):
                    if value is not None:
                        axes.plot(
                            [value, value], [index - 0.45, index + 0.45], dash, color=look["text"], linewidth=1.6,
                            label=once(label),
                        )  # fmt: skip
            axes.set_yticks(range(len(content)), [name for name, *_ in content])
            axes.invert_yaxis()
            axes.set_xlabel("forward + backward, ms (less is better)")
            axes.spines[["top", "right"]].set_visible(False)
            axes.margins(x=0.08)
            figure.legend(frameon=False, loc="outside upper center", ncols=len(names) + 2, fontsize=8)
            path = stem.with_name(f"{stem.name}-{theme}.svg")
            figure.savefig(path, transparent=True, metadata={"Date": None})
            plt.close(figure)
    return True
