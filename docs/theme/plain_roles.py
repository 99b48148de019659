"""Griffe extension: show ``:meth:`Reasoner.loss``` in a docstring as ``Reasoner.loss``.

The docstrings use a few Sphinx roles, which Markdown would print as they stand.
"""

import re
from typing import Any

from griffe import Extension, Object

_ROLE = re.compile(r":(?:py:)?(?:class|meth|func|attr|mod|data|exc|obj|ref):`~?([^`<>]+)`")


class PlainRoles(Extension):
    """Rewrites the docstring of every object that griffe loads."""

    def on_object(self, *, obj: Object, **kwargs: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = _ROLE.sub(r"`\1`", obj.docstring.value)
