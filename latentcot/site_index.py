"""MkDocs plugin: what is the same for many pages is done once, and pages are lighter while they are indexed.

The search plugin of the theme reads every page with an HTML parser and asks for every tag whether it stands inside one
that is left out. Most tags say nothing to it: the colours of source code, and whole sections that are marked to be left
out. The plugin takes them away before the page is read and puts the page back afterwards; the index stays the same,
letter by letter. Tabs and navigation are drawn once for all pages of a folder that have no place in them, which the
pages of papers have not.
"""

import re
from collections.abc import Callable
from typing import Any

from mkdocs.plugins import BasePlugin, CombinedEvent, event_priority

_LEFT_OUT = re.compile(r"<section\b[^>]*\sdata-search-exclude\b[^>]*>.*?</section>", re.DOTALL)
_CODE = re.compile(r"<pre\b.*?</pre>", re.DOTALL)
_COLOUR = re.compile(r"</?(?:span|a)\b[^>]*>")


def for_the_index(content: str) -> str:
    """``content`` without sections that the index leaves out and without spans and anchors inside ``<pre>``."""
    return _CODE.sub(lambda match: _COLOUR.sub("", match[0]), _LEFT_OUT.sub("", content))


class LightPages(BasePlugin):
    """Swaps the content of a page around the search plugin, whose priority is 0, and keeps drawn navigation."""

    def __init__(self) -> None:
        self._content: str | None = None
        self._placed: set[str] = set()
        self._drawn: dict[tuple[Any, ...], str] = {}

    def on_nav(self, nav: Any, *, config: Any, files: Any) -> None:
        self._placed = {page.file.src_uri for page in nav.pages}

    def on_env(self, env: Any, *, config: Any, files: Any) -> None:
        env.globals["drawn_once"] = self.drawn_once

    def drawn_once(self, part: str, page: Any, base: str, caller: Callable[[], str]) -> str:
        """What ``caller`` draws for ``part`` of ``page``; the same text again where nothing in it can be different.

        ``base`` is the way from the page to the site's first page, so links are the same for equal ``base``.
        """
        if page is None or page.file.src_uri in self._placed or any(item.children for item in page.toc):
            return caller()
        key = (part, base, tuple(page.meta.get("hide", ())), len(page.toc.items))
        if key not in self._drawn:
            self._drawn[key] = caller()
        return self._drawn[key]

    @event_priority(100)
    def _before(self, context: Any, *, page: Any, config: Any, nav: Any) -> None:
        self._content, page.content = page.content, for_the_index(page.content)

    @event_priority(-100)
    def _after(self, context: Any, *, page: Any, config: Any, nav: Any) -> None:
        page.content, self._content = self._content, None

    on_page_context = CombinedEvent(_before, _after)
