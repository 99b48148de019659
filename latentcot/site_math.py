r"""Markdown extension: ``$...$`` and ``$$...$$`` become MathML when the site is built.

Browsers draw MathML themselves, so a page needs no script and no font from elsewhere. ``pymdownx.arithmatex`` finds the
formulas and keeps Markdown away from them; this extension turns what it leaves, ``\(...\)`` and ``\[...\]``, into
MathML. A formula that can not be converted stays on the page as its TeX source.
"""

import re
from html import escape, unescape
from typing import Any

from latex2mathml.converter import convert
from markdown import Markdown
from markdown.extensions import Extension
from markdown.postprocessors import Postprocessor

_FOUND = re.compile(
    r'<(?P<tag>span|div) class="arithmatex">\s*(?:\\\((?P<inline>.*?)\\\)|\\\[(?P<block>.*?)\\\])\s*</(?P=tag)>',
    re.DOTALL,
)
_BARE_AMPERSAND = re.compile(r"&(?!#?\w+;)")


class _ToMathML(Postprocessor):
    def run(self, text: str) -> str:
        return _FOUND.sub(_replace, text)


def _replace(match: re.Match[str]) -> str:
    block = match["block"] is not None
    tex = unescape(match["block"] if block else match["inline"]).strip()
    try:
        formula = _BARE_AMPERSAND.sub("&amp;", convert(tex, display="block" if block else "inline"))
    except Exception:  # the converter raises errors of many kinds for TeX that it does not know
        formula = f"<code>{escape(tex)}</code>"
    return f'<{match["tag"]} class="lc-math">{formula}</{match["tag"]}>'


class MathExtension(Extension):
    """Registers the conversion behind the pass that puts raw HTML back."""

    def extendMarkdown(self, md: Markdown) -> None:
        md.postprocessors.register(_ToMathML(md), "latentcot-math", 1)


def makeExtension(**options: Any) -> MathExtension:
    return MathExtension(**options)
