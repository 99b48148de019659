"""Griffe extension: the Sphinx markup of docstrings as Markdown.

=========================================== ===========================
in a docstring                              on the page
=========================================== ===========================
a role, such as ``:meth:`Reasoner.loss```   its text as code
``:math:`` and ``.. math::``                formulas
``.. code-block:: python``                  a fenced block
a table between rows of ``===``             a table
=========================================== ===========================

Markdown would print all of them as they stand.
"""

import re
from itertools import pairwise, takewhile
from textwrap import dedent
from typing import Any

from griffe import Extension, Object

_ROLE = re.compile(r":(?:py:)?(?:class|meth|func|attr|mod|data|exc|obj|ref):`~?([^`<>]+)`")
_MATH = re.compile(r":math:`([^`]+)`")
_DIRECTIVE = re.compile(r"( *)\.\. (math|code-block)::(?: +(.*))?$")
_BAR = r" \vert "
_BORDER = re.compile(r" *=+(?: +=+)+ *$")


class PlainRoles(Extension):
    """Rewrites the docstring of every object that griffe loads."""

    def on_object(self, *, obj: Object, **kwargs: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = as_markdown(obj.docstring.value)


def as_markdown(text: str) -> str:
    """A docstring without Sphinx markup."""
    lines = text.split("\n")
    done: list[str] = []
    while lines:
        if found := _DIRECTIVE.match(lines[0]):
            indent, kind, rest = found[1], found[2], found[3] or ""
            inside = list(takewhile(re.compile(rf"\s*$|{indent} ").match, lines[1:]))
            lines = lines[1 + len(inside) :]
            body = dedent("\n".join(inside)).strip("\n")
            new = _formula(f"{rest}\n{body}") if kind == "math" else [f"```{rest}", *body.split("\n"), "```"]
            done += ["", *(indent + line for line in new), ""]
        elif _BORDER.match(lines[0]) and sum(map(bool, map(_BORDER.match, lines))) >= 3:
            table, lines = _table(lines)
            done += ["", *table, ""]
        else:
            line = _MATH.sub(lambda m: f"${m[1].strip()}$", lines.pop(0))
            done.append(_ROLE.sub(r"`\1`", line))
    return "\n".join(done)


def _formula(tex: str) -> list[str]:
    tex = " ".join(tex.split())
    return ["$$", rf"\begin{{aligned}} {tex} \end{{aligned}}" if r"\\" in tex else tex, "$$"]


def _table(lines: list[str]) -> tuple[list[str], list[str]]:
    """The table that ``lines`` begin with, and the lines behind it. A row without a first cell continues the one above."""
    borders = [i for i, line in enumerate(lines) if _BORDER.match(line)][:3]
    indent = " " * (len(lines[0]) - len(lines[0].lstrip()))
    columns = [found.start() for found in re.finditer("=+", lines[0])]
    rows: list[list[str]] = []
    for line in (*lines[1 : borders[1]], *lines[borders[1] + 1 : borders[2]]):
        cells = [line[a:b].strip() for a, b in pairwise([*columns, None])]
        if cells[0] or not rows:
            rows.append(cells)
        else:
            rows[-1] = [f"{above} {below}".strip() for above, below in zip(rows[-1], cells, strict=True)]
    rows.insert(1, ["---"] * len(columns))
    return [f"{indent}| {' | '.join(map(_cell, row))} |" for row in rows], lines[borders[2] + 1 :]


def _cell(text: str) -> str:
    """Bars would end the cell; in a formula a backslash in front would make them double."""
    parts = _MATH.split(text)  # every other one is a formula
    parts[::2] = [_ROLE.sub(r"`\1`", part).replace("|", r"\|") for part in parts[::2]]
    parts[1::2] = [f"${part.strip().replace('|', _BAR)}$" for part in parts[1::2]]
    return "".join(parts)
