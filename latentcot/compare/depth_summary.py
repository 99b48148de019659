"""From the runs of a depth study to figures with their spread, and to sentences about whether the loop beat its controls.

A difference counts where it is larger than the spread over seeds explains (Student's t at 5 %, as in
:mod:`latentcot.compare.summary`). With one seed nothing is decided.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean
from typing import Any, Literal

from latentcot.compare.depth import STACKS
from latentcot.compare.hybrid_ratio_summary import Figure, difference, figure

Verdict = Literal["beats", "loses to", "is level with", "not told apart from"]
LEVEL = 0.02  # a difference that is certainly smaller than this counts as none
BAR_ABOVE, BAR_BELOW = 0.95, 0.60  # of p-hop: the loop at least, the same parameters less than


@dataclass(frozen=True)
class StackSummary:
    """One stack on one task, over seeds: accuracy as trained (mean over difficulties, and by difficulty), and what it cost."""

    task: str
    stack: str
    accuracy: Figure
    by_level: dict[int, Figure]
    parameters: int
    train_flops: float
    answer_flops: float
    passes: float


@dataclass(frozen=True)
class DialSummary:
    """The looped stack on one task: accuracy by number of recurrences and difficulty, and what it does under its exit rule."""

    task: str
    trained: int
    accuracy: dict[int, Figure]
    by_level: dict[int, dict[int, Figure]]
    exit_steps: dict[int, Figure]
    exit_accuracy: dict[int, Figure]
    exit_counts: dict[int, int]


def tasks_of(results: dict[str, Any]) -> list[str]:
    return list(dict.fromkeys(run["task"] for run in results["runs"]))


def runs_of(results: dict[str, Any], task: str, stack: str) -> list[dict[str, Any]]:
    return [run for run in results["runs"] if (run["task"], run["stack"]) == (task, stack)]


def trained_number(results: dict[str, Any], task: str) -> int:
    """Recurrences (or segments) that the looped stack was trained with."""
    part = results["parts"][task]
    return part["recurrences"] if part["kind"] == "TokenPart" else part["segments"]


def unit(results: dict[str, Any], task: str) -> str:
    return "recurrences" if results["parts"][task]["kind"] == "TokenPart" else "segments"


def _overall(levels: dict[str, Any]) -> float:
    """Share of right answers over all items."""
    items = sum(s["items"] for s in levels.values())
    return sum(s["accuracy"] * s["items"] for s in levels.values()) / items


def summarise_stacks(results: dict[str, Any], task: str) -> list[StackSummary]:
    """The stacks of a task, looped first."""
    rows = []
    for stack in STACKS:
        runs = runs_of(results, task, stack)
        if not runs:
            continue
        levels = [run["measured"]["by_level"] for run in runs]
        rows.append(
            StackSummary(
                task=task,
                stack=stack,
                accuracy=figure([_overall(found) for found in levels]),
                by_level={
                    int(d): figure([found[d]["accuracy"] for found in levels]) for d in sorted(levels[0], key=int)
                },
                parameters=runs[0]["parameters"],
                train_flops=mean(run["training"]["flops"] for run in runs),
                answer_flops=mean(mean(s["flops"] for s in found.values()) for found in levels),
                passes=mean(mean(s["passes"] for s in found.values()) for found in levels),
            )
        )
    return rows


def summarise_dial(results: dict[str, Any], task: str) -> DialSummary:
    """The looped stack at every setting of its dial."""
    runs = [run["measured"] for run in runs_of(results, task, "looped")]
    dials = [run["dial"] for run in runs]
    exits = [run["exit"] for run in runs]
    counts: dict[int, int] = {}
    for found in exits:
        for level in found.values():
            for n, count in level["counts"].items():
                counts[int(n)] = counts.get(int(n), 0) + count
    return DialSummary(
        task=task,
        trained=trained_number(results, task),
        accuracy={int(r): figure([_overall(dial[r]) for dial in dials]) for r in sorted(dials[0], key=int)},
        by_level={
            int(r): {int(d): figure([dial[r][d]["accuracy"] for dial in dials]) for d in sorted(dials[0][r], key=int)}
            for r in sorted(dials[0], key=int)
        },
        exit_steps={int(d): figure([found[d]["mean"] for found in exits]) for d in sorted(exits[0], key=int)},
        exit_accuracy={int(d): figure([found[d]["accuracy"] for found in exits]) for d in sorted(exits[0], key=int)},
        exit_counts=dict(sorted(counts.items())),
    )


def compare_figures(one: Figure, other: Figure) -> tuple[Verdict, float, float]:
    """What ``one`` does against ``other``, the difference, and how large it has to be to mean something."""
    gap, needed = difference(one, other)
    if min(one.seeds, other.seeds) < 2:
        return "not told apart from", gap, needed
    if abs(gap) > needed and abs(gap) > 0:
        return ("beats" if gap > 0 else "loses to"), gap, needed
    return ("is level with" if abs(gap) + needed <= LEVEL else "not told apart from"), gap, needed


def verdicts(results: dict[str, Any]) -> list[str]:
    """A sentence for each task and control."""
    sentences = []
    for task in tasks_of(results):
        rows = {row.stack: row for row in summarise_stacks(results, task)}
        for control in STACKS[1:]:
            if "looped" not in rows or control not in rows:
                continue
            one, other = rows["looped"].accuracy, rows[control].accuracy
            verdict, gap, needed = compare_figures(one, other)
            said = "one seed each, nothing is decided" if one.seeds < 2 else f"{gap:+.3f}, ± {needed:.3f} needed"
            sentences.append(
                f"{task}: the loop ({one.mean:.3f}) {verdict} {control.replace('_', ' ')} ({other.mean:.3f}; {said})."
            )
    return sentences


def p_hop_bar(results: dict[str, Any]) -> str | None:
    """Is there a p where the loop, asked with enough recurrences, has 95 % and the same parameters less than 60 %? In words."""
    if "p_hop" not in results["parts"]:
        return None
    control = {row.stack: row for row in summarise_stacks(results, "p_hop")}["same_parameters"].by_level
    dial = summarise_dial(results, "p_hop").by_level
    best = {p: max(((dial[r][p].mean, r) for r in dial), key=lambda found: (found[0], -found[1])) for p in control}
    met = [p for p, (accuracy, _) in best.items() if accuracy >= BAR_ABOVE and control[p].mean < BAR_BELOW]
    parts = [
        f"p = {p}: {accuracy:.3f} with {r} recurrences, {control[p].mean:.3f} without a loop"
        for p, (accuracy, r) in best.items()
    ]
    said = f"met at p = {', '.join(map(str, met))}" if met else "not met"
    return (
        f"Bar of p-hop (one looped layer at least {BAR_ABOVE:.0%} at a p where the same parameters once stay below {BAR_BELOW:.0%}): "
        f"{said} ({'; '.join(parts)})."
    )


def last_monitors(runs: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Means over seeds of the monitors that training logged last."""
    names = ("token_correlation", "relative_residual", "state_rms", "loss_at_one", "loss")
    rows = [next((h for h in reversed(run["training"]["history"]) if "state_rms" in h), None) for run in runs]
    kept = [row for row in rows if row is not None]
    return {name: mean(row[name] for row in kept) for name in names} if kept else {}
