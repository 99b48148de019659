"""From the runs of a ratio study to figures with their spread, and to what the study's five claims look like in them.

A claim is *seen* or *not seen* only where the difference it is about is larger than the spread over seeds explains (Student's t at
5 %, as in :mod:`latentcot.compare.summary`), and *not testable* where the runs can not answer: one seed, a missing cell, a spread as
large as the difference, or nothing learned at all. The paper's claims are about 24 layers and a billion parameters: a verdict here
is about these runs and no others.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import sqrt
from statistics import mean, stdev
from typing import Any, Literal

from latentcot.compare.hybrid_ratio import TRANSFORMER, ratio_name
from latentcot.compare.summary import certain

Verdict = Literal["seen", "not seen", "not testable at this size"]
UNTESTABLE: Verdict = "not testable at this size"
FLAT = 0.02  # largest relative spread of validation loss over ratios that still counts as flat
LEARNED = 0.5  # recall of the transformer at the fewest pairs below which nothing was learned
FLAT_MIXERS = ("gla", "hgrn2", "deltanet", "gated_deltanet")
POOR, STRONG = ("hgrn", "retnet"), ("hgrn2", "deltanet", "gated_deltanet", "gla")


@dataclass(frozen=True)
class Figure:
    """Mean over seeds, standard deviation over seeds (``None`` with one), and their number."""

    mean: float
    spread: float | None
    seeds: int

    @property
    def error(self) -> float:
        """Standard error of the mean; infinite with one seed, which says nothing of another."""
        return float("inf") if self.spread is None else self.spread / sqrt(self.seeds)


def figure(values: Sequence[float]) -> Figure:
    """Of one value a seed."""
    return Figure(mean(values), stdev(values) if len(values) > 1 else None, len(values))


def difference(one: Figure, other: Figure) -> tuple[float, float]:
    """``one - other`` and how large it has to be to mean something."""
    seeds = min(one.seeds, other.seeds)
    return one.mean - other.mean, certain(seeds) * sqrt(one.error**2 + other.error**2)


@dataclass(frozen=True)
class CellSummary:
    """One stack: recall by pairs (at the learning rate that validation chose for each seed), loss on text, and its size."""

    mixer: str
    period: int | None
    full_layers: int
    recall: dict[int, Figure]
    loss: Figure
    mqar_bytes: int
    text_bytes: int
    parameters: int
    rates: tuple[float, ...]

    @property
    def name(self) -> str:
        return self.mixer if self.mixer == TRANSFORMER else f"{self.mixer} {ratio_name(self.period)}"


def summarise_cells(results: dict[str, Any]) -> list[CellSummary]:
    """Every cell in the order of the study: mixers, pure first."""
    study = results["study"]
    groups: dict[tuple[str, int | None], list[dict[str, Any]]] = {}
    for run in results["runs"]:
        groups.setdefault((run["mixer"], run["period"]), []).append(run)
    order = {mixer: i for i, mixer in enumerate([*study["mixers"], TRANSFORMER])}
    cells = []
    for (mixer, period), runs in sorted(groups.items(), key=lambda item: (order[item[0][0]], -(item[0][1] or 10**9))):
        chosen = [best_rate(found) for found in by_seed(run for run in runs if run["part"] == "mqar")]
        text = [run for run in runs if run["part"] == "text"]
        layers = study["layers"]
        cells.append(
            CellSummary(
                mixer=mixer,
                period=period,
                full_layers=0 if period is None else layers // period,
                recall={
                    int(n): figure([run["measured"]["recall"][n] for run in chosen])
                    for n in chosen[0]["measured"]["recall"]
                },
                loss=figure([run["measured"]["loss"] for run in text]),
                mqar_bytes=chosen[0]["measured"]["state_bytes"],
                text_bytes=text[0]["measured"]["state_bytes"],
                parameters=text[0]["parameters"],
                rates=tuple(run["rate"] for run in chosen),
            )
        )
    return cells


def by_seed(runs: Iterable[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    groups: dict[int, list[dict[str, Any]]] = {}
    for run in runs:
        groups.setdefault(run["seed"], []).append(run)
    return [groups[seed] for seed in sorted(groups)]


def best_rate(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The run of one cell and seed whose learning rate did best on validation sequences; test sequences have no say."""
    return max(runs, key=lambda run: (mean(run["measured"]["validation"].values()), -run["rate"]))


@dataclass(frozen=True)
class StudyClaim:
    """One of the five claims, what these runs say of it, and the figures behind that."""

    number: int
    statement: str
    verdict: Verdict
    because: str


def study_claims(results: dict[str, Any]) -> list[StudyClaim]:
    """The five claims of the study, decided from the figures."""
    cells = summarise_cells(results)
    return [decide(cells) for decide in (flat_loss, rising_recall, ranking_changes, poor_and_strong, aggregation)]


def _family(cells: Sequence[CellSummary], mixer: str) -> list[CellSummary]:
    """A mixer's cells, fewest full layers first."""
    return sorted((c for c in cells if c.mixer == mixer), key=lambda c: c.full_layers)


def _pairs(cell: CellSummary) -> int:
    return max(cell.recall)


def _untestable(cells: Sequence[CellSummary], recall: bool) -> str | None:
    """Why no claim can be decided, if so."""
    if any(c.loss.seeds < 2 for c in cells):
        return "one seed: nothing says how much another would change"
    whole = [c for c in cells if c.mixer == TRANSFORMER]
    if recall:
        fewest = min(whole[0].recall) if whole else 0
        if not whole or whole[0].recall[fewest].mean < LEARNED:
            found = f" ({whole[0].recall[fewest].mean:.2f} at {fewest} pairs)" if whole else ""
            return f"the transformer itself did not learn recall in this training{found}"
    return None


def flat_loss(cells: Sequence[CellSummary]) -> StudyClaim:
    """1. Largest against smallest mean loss of each mixer over its ratios, as a share of the smallest."""
    statement = (
        "Language-model loss is nearly flat in the ratio (within 2 %) for GLA, HGRN2, DeltaNet and Gated DeltaNet."
    )
    families = {m: _family(cells, m) for m in FLAT_MIXERS if len(_family(cells, m)) > 1}
    if why := _untestable(cells, recall=False) or (None if families else "none of the four mixers has two ratios here"):
        return StudyClaim(1, statement, UNTESTABLE, why)
    verdicts, parts = [], []
    for mixer, family in families.items():
        best, worst = min(family, key=lambda c: c.loss.mean), max(family, key=lambda c: c.loss.mean)
        gap, needed = difference(worst.loss, best.loss)
        share, slack = gap / best.loss.mean, needed / best.loss.mean
        parts.append(f"{mixer} {share:.1%} ± {slack:.1%}")
        verdicts.append(True if share + slack <= FLAT else False if share - slack > FLAT else None)
    because = "spread of the loss over ratios: " + ", ".join(parts)
    return StudyClaim(1, statement, _combine(verdicts), because)


def rising_recall(cells: Sequence[CellSummary]) -> StudyClaim:
    """2. Mean recall over mixers at each number of full layers: it has to rise from pure to the most, and the last step has to be the
    smaller part of the rise."""
    statement = "Recall rises with the number of full layers and saturates near 3-1 to 6-1."
    mixers = sorted({c.mixer for c in cells} - {TRANSFORMER})
    counts = sorted({c.full_layers for c in cells if c.mixer != TRANSFORMER})
    if why := _untestable(cells, recall=True) or (None if len(counts) > 2 else "fewer than three ratios in this stack"):
        return StudyClaim(2, statement, UNTESTABLE, why)
    level = {n: _pooled([c for c in cells if c.mixer in mixers and c.full_layers == n]) for n in counts}
    rise, needed = difference(level[counts[-1]], level[counts[0]])
    last, last_needed = difference(level[counts[-1]], level[counts[-2]])
    first, _ = difference(level[counts[-2]], level[counts[0]])
    shown = ", ".join(f"{n} full: {f.mean:.3f}" for n, f in level.items())
    because = (
        f"mean over mixers, {shown}; rise {rise:+.3f} (± {needed:.3f}), last step {last:+.3f} (± {last_needed:.3f})"
    )
    if abs(rise) <= needed:
        return StudyClaim(2, statement, UNTESTABLE, because)
    if rise < 0 or last - last_needed > first:
        return StudyClaim(2, statement, "not seen", because)
    return StudyClaim(2, statement, "seen" if last + last_needed < rise else UNTESTABLE, because)


def ranking_changes(cells: Sequence[CellSummary]) -> StudyClaim:
    """3. Two mixers of which one is better pure and the other better in a hybrid, both by more than the spread, on text or on recall."""
    statement = "The ranking of pure models does not carry over to hybrids."
    if why := _untestable(cells, recall=False):
        return StudyClaim(3, statement, UNTESTABLE, why)
    swaps, kept, open_pairs = [], 0, 0
    mixers = sorted({c.mixer for c in cells} - {TRANSFORMER})
    measures = {"loss": lambda c: c.loss}
    if _untestable(cells, recall=True) is None:
        measures["recall"] = lambda c: c.recall[_pairs(c)]
    for what, measure in measures.items():
        for i, one in enumerate(mixers):
            for other in mixers[i + 1 :]:
                a, b = _family(cells, one), _family(cells, other)
                if a[0].full_layers or b[0].full_layers:
                    continue
                pure, needed = difference(measure(a[0]), measure(b[0]))
                for x, y in zip(a[1:], b[1:], strict=False):
                    mixed, wanted = difference(measure(x), measure(y))
                    if abs(pure) <= needed or abs(mixed) <= wanted:
                        open_pairs += 1
                    elif pure * mixed < 0:
                        swaps.append(
                            f"{one} and {other} at {ratio_name(x.period)} ({what} {pure:+.3f} pure, {mixed:+.3f} mixed)"
                        )
                    else:
                        kept += 1
    because = f"pairs told apart in both: {len(swaps)} swapped, {kept} kept; {open_pairs} not told apart"
    if swaps:
        return StudyClaim(3, statement, "seen", because + "; " + "; ".join(swaps[:3]))
    return StudyClaim(3, statement, "not seen" if kept > open_pairs else UNTESTABLE, because)


def poor_and_strong(cells: Sequence[CellSummary]) -> StudyClaim:
    """4. HGRN and RetNet below the transformer with one full layer, and some gated or delta mixer not below it with the most."""
    statement = (
        "HGRN and RetNet recall stays poor without many full layers; gated and delta families reach the transformer."
    )
    if why := _untestable(cells, recall=True):
        return StudyClaim(4, statement, UNTESTABLE, why)
    whole = next(c for c in cells if c.mixer == TRANSFORMER)
    goal = whole.recall[_pairs(whole)]
    verdicts: list[bool | None] = []
    parts = [f"transformer {goal.mean:.3f}"]
    for mixers, at, poor in ((POOR, 1, True), (STRONG, -1, False)):
        for mixer in mixers:
            family = _family(cells, mixer)
            if len(family) < 2:
                continue
            cell = family[at]
            gap, needed = difference(goal, cell.recall[_pairs(cell)])
            parts.append(f"{cell.name} {cell.recall[_pairs(cell)].mean:.3f} (gap {gap:+.3f} ± {needed:.3f})")
            below = True if gap > needed and gap > 0.1 else False if gap + needed < 0.1 else None
            verdicts.append(below if poor or below is None else not below)
    named = {c.mixer for c in cells}
    if not verdicts or not named & set(POOR) or not named & set(STRONG):
        return StudyClaim(4, statement, UNTESTABLE, "mixers of both groups are needed")
    return StudyClaim(4, statement, _combine(verdicts), ", ".join(parts))


def aggregation(cells: Sequence[CellSummary]) -> StudyClaim:
    """5. Needs common-word and frequent-word tasks, which a stack of this size does not learn in the time."""
    return StudyClaim(
        5,
        "Aggregation tasks (common words, frequent words) do not depend on the ratio.",
        UNTESTABLE,
        "the study in small trains no aggregation task",
    )


def _pooled(cells: Sequence[CellSummary]) -> Figure:
    """Mean over cells of their recall; errors of independent cells add in squares."""
    figures = [c.recall[_pairs(c)] for c in cells]
    spread = sqrt(sum((f.spread or 0.0) ** 2 for f in figures)) / len(figures)
    return Figure(mean(f.mean for f in figures), spread, min(f.seeds for f in figures))


def _combine(verdicts: Sequence[bool | None]) -> Verdict:
    """Seen when every part is, not seen when one certainly is not, otherwise open."""
    if any(v is False for v in verdicts):
        return "not seen"
    return "seen" if verdicts and all(v is True for v in verdicts) else UNTESTABLE
