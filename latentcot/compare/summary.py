"""From the runs of a comparison to the figures of its table, with their standard errors, and to what may be claimed."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt
from statistics import mean, stdev
from typing import Any

TWO_SIDED = {2: 4.30, 4: 2.78, 6: 2.45, 8: 2.31, 10: 2.23}
"""Standard errors between two means before they are told apart at 5 %, by degrees of freedom (Student's t)."""


def certain(seeds: int) -> float:
    """How many standard errors make a difference. With one seed only the items vary, and the normal 2 is used."""
    return 2.0 if seeds < 2 else TWO_SIDED.get(2 * (seeds - 1), 2.2)


@dataclass(frozen=True)
class MethodSummary:
    """One row of the table; means over seeds.

    ``by_difficulty``: accuracy at each difficulty. ``trained``: mean accuracy over the trained difficulties, ``longest`` at the
    longest of them, ``beyond`` over the longer ones. ``item_error``: standard error of ``trained`` that comes from the number of different
    test items. ``spread``: standard deviation of ``trained`` over seeds (``None`` with one seed). Costs are of one answer at
    ``longest``, training cost of one seed.
    """

    method: str
    role: str
    controls: tuple[str, ...]
    seeds: int
    by_difficulty: dict[int, float]
    trained: float
    longest: float
    beyond: float | None
    item_error: float
    spread: float | None
    tokens_emitted: float
    sequential_passes: float
    flops: float
    training_flops: float
    training_seconds: float
    parameters: int

    @property
    def error(self) -> float:
        """Standard error of ``trained``: from the items (which all seeds share) and, with several seeds, from the seeds."""
        from_seeds = 0.0 if self.spread is None else self.spread / sqrt(self.seeds)
        return sqrt(self.item_error**2 + from_seeds**2)


@dataclass(frozen=True)
class Claim:
    """Whether a latent method is above something: ``above``, ``below``, or ``not told apart`` by these runs."""

    method: str
    against: str
    difference: float
    error: float
    seeds: int = 1

    @property
    def verdict(self) -> str:
        if abs(self.difference) <= certain(self.seeds) * self.error:
            return "not told apart"
        return "above" if self.difference > 0 else "below"


def summarise(results: dict[str, Any]) -> list[MethodSummary]:
    """Rows in the order of the comparison."""
    trained_to = results["trained_to"]
    rows = []
    for spec in results["methods"]:
        runs = [run for run in results["runs"] if run["method"] == spec["name"]]
        per_seed = [{s["difficulty"]: s for s in run["evaluation"]["by_difficulty"]} for run in runs]
        difficulties = sorted(per_seed[0])
        inside = [d for d in difficulties if trained_to is None or d <= trained_to]
        outside = [d for d in difficulties if d not in inside]
        last = inside[-1]

        def over(levels: Sequence[int], scores: dict[int, dict[str, Any]]) -> float:
            return mean(scores[d]["accuracy"] for d in levels)

        trained = [over(inside, scores) for scores in per_seed]
        rows.append(
            MethodSummary(
                method=spec["name"],
                role=spec["role"],
                controls=tuple(spec["controls"]),
                seeds=len(runs),
                by_difficulty={d: mean(s[d]["accuracy"] for s in per_seed) for d in difficulties},
                trained=mean(trained),
                longest=mean(s[last]["accuracy"] for s in per_seed),
                beyond=mean(over(outside, s) for s in per_seed) if outside else None,
                item_error=mean(_item_error([scores[d] for d in inside]) for scores in per_seed),
                spread=stdev(trained) if len(trained) > 1 else None,
                tokens_emitted=mean(s[last]["tokens_emitted"] for s in per_seed),
                sequential_passes=mean(s[last]["sequential_passes"] for s in per_seed),
                flops=mean(s[last]["flops"] for s in per_seed),
                training_flops=mean(run["training"]["flops"] for run in runs),
                training_seconds=mean(run["training"]["seconds"] for run in runs),
                parameters=runs[0]["parameters"],
            )
        )
    return rows


def _item_error(scores: Sequence[dict[str, Any]]) -> float:
    """Standard error of the mean accuracy over levels. Repeats of a prompt count once; one success and one failure are added to each
    level, so that a level of four items which all came out right does not pass as certain."""
    total = 0.0
    for s in scores:
        share = (s["accuracy"] * s["distinct"] + 1) / (s["distinct"] + 2)
        total += share * (1 - share) / s["distinct"]
    return sqrt(total) / len(scores)


def claims(rows: Sequence[MethodSummary]) -> list[Claim]:
    """Each latent method against the floor and against each of its controls, on mean accuracy over the trained difficulties."""
    known = {row.method: row for row in rows}
    floors = [row.method for row in rows if row.role == "floor"]
    found = []
    for row in rows:
        if row.role != "latent":
            continue
        for other in dict.fromkeys([*floors, *row.controls]):
            if other in known and other != row.method:
                found.append(
                    Claim(
                        row.method,
                        other,
                        row.trained - known[other].trained,
                        sqrt(row.error**2 + known[other].error ** 2),
                        min(row.seeds, known[other].seeds),
                    )
                )
    return found


def baseline_columns(results: dict[str, Any]) -> tuple[dict[int, float], dict[int, float], str]:
    """Chance and the task's heuristic by difficulty, and the heuristic's name at the longest trained length."""
    by_difficulty = {d: results["baselines"][str(d)] for d in sorted(map(int, results["baselines"]))}
    longest = results["trained_to"] if results["trained_to"] in by_difficulty else max(by_difficulty)
    return (
        {d: b["chance"] for d, b in by_difficulty.items()},
        {d: b["heuristic"] for d, b in by_difficulty.items()},
        by_difficulty[longest]["heuristic_name"],
    )
