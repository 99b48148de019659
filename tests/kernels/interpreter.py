"""Runs the checks of a script in Triton's interpreter: what the ``interpreted_*.py`` scripts share.

The interpreter replaces the functions of ``triton.language`` when a kernel is launched, and once more at every call of a function that
a kernel calls, which takes more than half of its time where kernels are made of small functions. Here that is done once a launch and
module. What is computed stays the same, bit for bit.
"""

import json
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

import triton.language as tl
from triton.runtime import interpreter

Checks = Mapping[str, tuple[Callable[..., Any], Sequence[Any]]]


@cache
def _language_modules(function: Any) -> frozenset[int]:
    return frozenset(id(value) for value in function.__globals__.values() if value is tl or value is tl.core)


def _replace_once_a_launch() -> None:
    replace, launch = interpreter._patch_lang, interpreter.GridExecutor.__call__
    replaced: set[int] = set()  # modules whose functions were replaced since the launch

    def replace_missing(function: Any) -> Any:
        modules = _language_modules(function)
        if modules <= replaced:
            return None  # asked for by a call inside a kernel, which ignores the answer; a launch finds the set empty
        replaced.update(modules)
        return replace(function)

    def launch_anew(self: Any, *arguments: Any, **options: Any) -> None:
        replaced.clear()
        launch(self, *arguments, **options)

    interpreter._patch_lang = replace_missing
    interpreter.GridExecutor.__call__ = launch_anew


def run_checks(checks: Checks) -> None:
    """Print one JSON object: name of a check -> what it returned, or the traceback when it raised. Names as arguments of the script
    select checks."""
    _replace_once_a_launch()
    results = {}
    for name in sys.argv[1:] or checks:
        check, arguments = checks[name]
        try:
            results[name] = check(*arguments)
        except Exception:
            results[name] = traceback.format_exc()
    print(json.dumps(results))
