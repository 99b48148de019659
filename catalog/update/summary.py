"""The summary of a run in Markdown, for a pull request or a mail. Texts from the feed are made harmless first."""

import html
import re

from latentcot.catalog.queue_store import Candidate
from latentcot.catalog.update.report import QueryLine, UpdateReport

SHOWN = 200
_MARKDOWN = re.compile(r"[\\`*_\[\]#!|~<>&$^]")


def harmless(text: str, limit: int = 300) -> str:
    """``text`` as plain text in Markdown: no markup, no mention, no reference to an issue, no address that becomes a link."""
    text = text if len(text) <= limit else text[: limit - 1] + "…"
    text = _MARKDOWN.sub(lambda match: f"&#{ord(match.group())};", html.unescape(" ".join(text.split())))
    # A word joiner is invisible; behind it "@name", "www." and "https://" mean nothing to the site that shows the summary.
    return re.sub(r"(@|://|www\.|&#35;|GH-)", "\\1\u2060", text)


def markdown(report: UpdateReport) -> str:
    """The whole summary. It depends on what was found, not on when or how fast."""
    lines = [f"# Catalog update: {report.headline}", ""]
    lines += [
        "| query | window | papers | pages | new | read until | result |",
        "| --- | --- | ---: | ---: | ---: | --- | --- |",
    ]
    lines += [_query_row(line) for line in report.queries]
    if report.new:
        lines += [
            "",
            f"## New candidates ({len(report.new)})",
            "",
            "| paper | title | relevance | proposed leaf | why |",
            "| --- | --- | ---: | --- | --- |",
        ]
        ranked = sorted(report.new, key=lambda item: (-item.score.probability, item.key))
        lines += [_candidate_row(candidate) for candidate in ranked[:SHOWN]]
        if len(ranked) > SHOWN:
            lines += ["", f"and {len(ranked) - SHOWN} more in `queue/`."]
        lines += ["", "Review them with `latentcot papers review`."]
    lines += _list("Candidates whose metadata changed", [f"`{key}`" for key in report.changed])
    lines += _list(
        "Known under another identifier",
        [f"`{key}` is `{match.key}` ({harmless(match.rule)})" for key, match in report.other_ids],
    )
    lines += _list(
        "Possibly known (to be judged in the review)",
        [f"`{key}` and `{match.key}`: {harmless(match.rule)}" for key, match in report.near],
    )
    lines += _list("Refused", [f"{harmless(item.name)}: {harmless(item.reason)}" for item in report.refused])
    lines += _list("Notes", [harmless(note, 600) for note in report.notes])
    lines += [
        "",
        f"Known papers met again: {report.known}; rejected before: {report.rejected}; below the threshold: {report.below}.",
    ]
    return "\n".join(lines) + "\n"


def _query_row(line: QueryLine) -> str:
    result = "complete" if line.problem is None else f"**incomplete**: {harmless(line.problem)}"
    return f"| {line.name} | {line.window} | {line.papers} | {line.pages} | {line.new} | {line.until or 'never'} | {result} |"


def _candidate_row(candidate: Candidate) -> str:
    leaf = candidate.score.leaves[0].leaf if candidate.score.leaves else "none"
    title = harmless(candidate.title)
    again = f" ({harmless(candidate.again)})" if candidate.again else ""
    reasons = "; ".join(harmless(reason, 80) for reason in candidate.score.reasons[:3])
    link = f"[{candidate.arxiv}](https://arxiv.org/abs/{candidate.arxiv})"
    return f"| {link} | {title}{again} | {candidate.score.probability:.2f} | {leaf} | {reasons} |"


def _list(heading: str, items: list[str]) -> list[str]:
    if not items:
        return []
    more = [f"* and {len(items) - SHOWN} more"] if len(items) > SHOWN else []
    return ["", f"## {heading} ({len(items)})", "", *(f"* {item}" for item in items[:SHOWN]), *more]
