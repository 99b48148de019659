"""Markdown extension: what stands between ``<!--raw-->`` and ``<!--/raw-->`` goes onto the page as it is.

Both marks stand alone on their lines. The generated paper pages are HTML already; without the marks every one of them
is read by two HTML parsers only to come out unchanged, which takes four times as long as all the rest of Markdown. A
Markdown program that does not know the marks sees two comments, and makes the same page.
"""

import re
from typing import Any

from markdown import Markdown
from markdown.extensions import Extension
from markdown.preprocessors import Preprocessor

_MARKED = re.compile(r"^<!--raw-->\n(.*?)\n<!--/raw-->$", re.DOTALL | re.MULTILINE)
# Behind the pass that tidies white space and takes its own control characters out (30), ahead of all that read HTML or
# fences (25 and below).
_PRIORITY = 29


class _Stash(Preprocessor):
    md: Markdown

    def run(self, lines: list[str]) -> list[str]:
        text = _MARKED.sub(lambda match: f"\n{self.md.htmlStash.store(match[1])}\n", "\n".join(lines))
        return text.split("\n")


class RawExtension(Extension):
    """Puts marked HTML aside; Markdown's own last pass puts it back."""

    def extendMarkdown(self, md: Markdown) -> None:
        md.preprocessors.register(_Stash(md), "latentcot-raw", _PRIORITY)


def makeExtension(**options: Any) -> RawExtension:
    return RawExtension(**options)
