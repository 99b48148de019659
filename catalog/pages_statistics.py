"""The statistics page of the site: the values of its template, and the figure of papers over time.

The figure is drawn as one row of bars a branch, so that nothing hangs on colour; the same numbers stand in the table
below it. It is plain SVG in the page: no script, no request.
"""

from collections import Counter
from collections.abc import Sequence
from typing import Any

from markupsafe import Markup, escape

from latentcot.catalog.leaves import Tree
from latentcot.catalog.record import Record
from latentcot.catalog.statistics import EARLIER, statistics

FAMILY_NAMES = {
    "latent": "Latent reasoning",
    "looped": "Looped models",
    "diffusion": "Diffusion language models",
    "linear": "Linear-time sequence models",
    "mechanisms": "Mechanisms in the layers",
    "broad": "Latent in a broad sense",
}
KIND_NAMES = {
    "random": "At random",
    "trap": "With a trap word (latent, loop, thinking …)",
    "near": "Nearest neighbours: explicit efficient reasoning",
    "rejected": "Rejected by a curator",
}
_ROW, _TALLEST, _BAR, _STEP, _APART = 84, 52, 36, 42, 24


def page_values(records: Sequence[Record], tree: Tree, status_order: Sequence[str]) -> dict[str, Any]:
    """What ``statistics.md.j2`` shows."""
    years = Counter(str(record.year) if record.year else "unknown" for record in records)
    status = Counter(record.taxonomy.status for record in records)
    known = {
        "authors known": sum(record.authors is not None for record in records),
        "full date known": sum(r.published is not None and r.published.precision == "day" for r in records),
        "venue known": sum(record.venue is not None for record in records),
        "has a code link": sum(record.has_code for record in records),
        "runnable here": sum(bool(record.runnable) for record in records),
        "has our note": sum(record.note is not None for record in records),
        "withdrawn or superseded": sum(record.status != "active" for record in records),
    }
    numbers = statistics(records, tree)
    return {
        "primary": Counter(record.taxonomy.primary for record in records),
        "years": [(year, years[year]) for year in sorted(years, reverse=True)],
        "status": [(value, status[value]) for value in status_order],
        "coverage": known,
        "more": numbers,
        "figure": timeline_figure(numbers["labels"], numbers["branches"], {b.slug: b.name for b in tree.branches}),
        "family_names": FAMILY_NAMES,
        "kind_names": KIND_NAMES,
        "percent": percent,
    }


def percent(share: float | None, digits: int = 0) -> str:
    """``0.9057`` → ``91 %``; a dash for what is not known."""
    return "–" if share is None else f"{100 * share:.{digits}f} %"


def timeline_figure(labels: Sequence[str], branches: dict[str, list[int]], names: dict[str, str]) -> Markup:
    """One row of bars a branch, quarters from left to right; every bar tells its number when pointed at."""
    highest = max((count for counts in branches.values() for count in counts), default=0) or 1
    # The first bar holds all earlier years and stands apart.
    places = [i * _STEP + (_APART if i else 0) for i in range(len(labels))]
    width, height = places[-1] + _STEP + 12, len(branches) * _ROW + 20
    parts = [
        f'<svg class="lc-timeline" viewBox="0 0 {width} {height}" width="100%" role="img" '
        f'aria-label="Papers by quarter and branch; the table below has the numbers" fill="currentColor" font-size="11">'
    ]
    for row, (slug, counts) in enumerate(branches.items()):
        base, name = (row + 1) * _ROW, escape(names[slug])
        parts.append(f'<text x="0" y="{base - _ROW + 16}" font-weight="bold">{name}</text>')
        for x, label, count in zip(places, labels, counts, strict=True):
            tall = round(_TALLEST * count / highest, 1)
            parts.append(f"<g><title>{name}, {escape(label)}: {count}</title>")
            parts.append(f'<rect x="{x}" y="{base - tall:.1f}" width="{_BAR}" height="{tall}" fill-opacity="0.55"/>')
            if count:
                middle = f'x="{x + _BAR // 2}" y="{base - tall - 2:.1f}" text-anchor="middle" font-size="9"'
                parts.append(f"<text {middle}>{count}</text>")
            parts.append("</g>")
        parts.append(f'<path d="M0 {base}H{width}" stroke="currentColor" stroke-opacity="0.4"/>')
    for x, label in zip(places, labels, strict=True):
        if label == EARLIER or label.endswith("-1"):
            text = "earlier" if label == EARLIER else label[:4]
            parts.append(f'<text x="{x}" y="{height - 4}">{text}</text>')
    return Markup("".join(parts) + "</svg>")
