"""The written result of a comparison: table (Markdown and terminal), plots, and one self-contained ``report.html``."""

import base64
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from rich.box import SIMPLE_HEAD
from rich.table import Table

from latentcot.backbone import HybridConfig
from latentcot.compare.plots import draw_all
from latentcot.compare.summary import MethodSummary, baseline_columns, claims, summarise
from latentcot.files import write_text

COLUMNS = (
    "method",
    "role",
    "trained",
    "longest",
    "beyond",
    "chance",
    "heuristic",
    "tokens",
    "passes",
    "MFLOP",
    "train TFLOP",
    "parameters",
    "train s",
)


def main_table(results: dict[str, Any]) -> list[dict[str, str]]:
    """One dict of strings a method, keyed by ``COLUMNS``. Chance and heuristic stand at the longest trained difficulty."""
    chance, heuristic, _ = baseline_columns(results)
    longest = results["trained_to"]
    return [_cells(row, chance[longest], heuristic[longest]) for row in summarise(results)]


def _cells(row: MethodSummary, chance: float, heuristic: float) -> dict[str, str]:
    spread = "" if row.spread is None else f" ± {row.spread:.3f}"
    values = (
        row.method,
        row.role,
        f"{row.trained:.3f}{spread}",
        f"{row.longest:.3f}",
        "–" if row.beyond is None else f"{row.beyond:.3f}",
        f"{chance:.3f}",
        f"{heuristic:.3f}",
        f"{row.tokens_emitted:.1f}",
        f"{row.sequential_passes:.1f}",
        f"{row.flops / 1e6:.2f}",
        f"{row.training_flops / 1e12:.3f}",
        f"{row.parameters:,}",
        f"{row.training_seconds:.0f}",
    )
    return dict(zip(COLUMNS, values, strict=True))


def difficulty_table(results: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of accuracy by difficulty: methods, chance and the heuristic as columns."""
    rows = summarise(results)
    chance, heuristic, name = baseline_columns(results)
    header = ["difficulty", *(r.method for r in rows), "chance", f"heuristic ({name})"]
    body = []
    for d in rows[0].by_difficulty:
        mark = "" if results["trained_to"] is None or d <= results["trained_to"] else " *"
        body.append(
            [f"{d}{mark}", *(f"{r.by_difficulty[d]:.3f}" for r in rows), f"{chance[d]:.3f}", f"{heuristic[d]:.3f}"]
        )
    return header, body


def terminal_table(results: dict[str, Any]) -> Table:
    """The columns that fit a terminal of 80; ``table.md`` and the page have all of them."""
    limit = results["trained_to"]
    titles = {
        "method": "method",
        "trained": f"d<={limit}",
        "longest": f"d={limit}",
        "beyond": f"d>{limit}",
        "chance": "chance",
        "heuristic": "heur.",
        "tokens": "tok.",
        "passes": "pass.",
        "MFLOP": "MFLOP",
    }
    title = "Accuracy by difficulty d, and what one answer costs"
    table = Table(title=title, box=SIMPLE_HEAD, padding=(0, 0, 0, 1), pad_edge=False)
    for name, heading in titles.items():
        table.add_column(heading, justify="left" if name == "method" else "right", no_wrap=True)
    for cells in main_table(results):
        table.add_row(*(cells[name].split(" ± ")[0] for name in titles))
    return table


def explanation(results: dict[str, Any]) -> list[str]:
    """What the columns mean, in sentences."""
    c = results["comparison"]
    longest = results["trained_to"]
    options = ", ".join(f"{name} = {value}" for name, value in c["task_config"].items())
    return [
        f"Every method thinks with the same backbone ({_backbone_words(c['backbone'])}) and sees the same "
        f"{c['train']['steps']} × {c['batch_size']} training examples of task “{c['task']}” ({options}); seeds: {c['seeds']}.",
        f"trained: mean accuracy over difficulties up to {longest} (± standard deviation over seeds); longest: at difficulty {longest}; "
        f"beyond: mean over longer ones, up to {c['evaluate_to']}. Exact match on test items that share no object with training.",
        f"chance and heuristic (the best guess that needs no reasoning) stand at difficulty {longest}.",
        f"tokens, passes and MFLOP are of one answer at difficulty {longest}: tokens written (thinking text included, latent slots not), "
        "network passes that wait for one another, forward FLOPs by formula (2 a multiply-add). "
        "train TFLOP counts three forwards a step; seconds depend on the machine, the other columns do not.",
    ]


def _backbone_words(backbone: dict[str, Any]) -> str:
    config = HybridConfig(**backbone)
    return f"{config.num_hidden_layers} layers of width {config.hidden_size}: {', '.join(config.mixers)}"


def claim_sentences(results: dict[str, Any]) -> list[str]:
    """What these runs say of each latent method, read off the table."""
    sentences = []
    if results["comparison"]["seeds"] < 2:
        sentences.append(
            "One training run of each method: standard errors hold the choice of test items, not how much another seed would change; "
            "--seeds 3 repeats everything."
        )
    for c in claims(summarise(results)):
        figures = f"difference {c.difference:+.3f}, standard error {c.error:.3f}"
        match c.verdict:
            case "above":
                sentences.append(f"{c.method} is above {c.against} ({figures}).")
            case "below":
                sentences.append(f"{c.method} is below {c.against} ({figures}).")
            case _:
                sentences.append(f"{c.method} and {c.against} are not told apart by these runs ({figures}).")
    return sentences


def markdown(results: dict[str, Any]) -> str:
    """The table as a Markdown page."""
    lines = [f"# {results['comparison']['title']}", ""]
    lines += [f"* {sentence}" for sentence in explanation(results)]
    lines += ["", "| " + " | ".join(COLUMNS) + " |", "|" + " --- |" * len(COLUMNS)]
    lines += ["| " + " | ".join(cells.values()) + " |" for cells in main_table(results)]
    header, body = difficulty_table(results)
    lines += ["", "## Accuracy by difficulty", "", "| " + " | ".join(header) + " |", "|" + " ---: |" * len(header)]
    lines += ["| " + " | ".join(row) + " |" for row in body]
    lines += ["", "\\* longer than any training example", "", "## What these runs say", ""]
    lines += [f"* {sentence}" for sentence in claim_sentences(results)]
    return "\n".join(lines) + "\n"


def write_report(results: dict[str, Any], out: Path) -> Path:
    """Write ``table.md``, ``plots/*.png`` and ``report.html`` into ``out``; returns the path of the page."""
    pictures = draw_all(results, summarise(results), out / "plots")
    write_text(out / "table.md", markdown(results))
    header, body = difficulty_table(results)
    template = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    ).from_string(files("latentcot").joinpath("templates/report.html.jinja").read_text(encoding="utf-8"))
    page = template.render(
        results=results,
        title=results["comparison"]["title"],
        columns=COLUMNS,
        table=main_table(results),
        header=header,
        body=body,
        explanation=explanation(results),
        claims=claim_sentences(results),
        pictures={name: base64.b64encode(path.read_bytes()).decode() for name, path in pictures.items()},
        machine=results["machine"],
    )
    path = out / "report.html"
    write_text(path, page)
    return path
