r"""Which layer gets which mixer.

A stack is a list of mixer names, one a layer. Four ways to say it (each makes the same list, which is what a configuration stores):

============================ =============================================== ==========================================
given                        layer i (from 0) is full attention              meaning
============================ =============================================== ==========================================
``period = r``               if and only if :math:`(i + 1) \bmod r = 0`       the study's "r:1": one layer in every r
``linear_per_full = r``      if and only if :math:`(i + 1) \bmod (r + 1) = 0` the literal "r:1": r linear layers, then one
``attention_layers = [...]`` if and only if i is listed (any order)          what released configurations list
``mixers = "a*3,b"``         as written                                      any mixture, repeated over the depth
============================ =============================================== ==========================================

The two readings of a ratio differ: of 24 layers ``period=3`` makes 8 full, ``linear_per_full=3`` makes 6. Only the first divides 24
evenly for all of 24:1, 12:1, 6:1 and 3:1, and it is how the released hybrids of arXiv:2507.06457 are reported to be built; the
exact layers of a released model stand in its own configuration.
"""

import re
from collections.abc import Collection, Sequence
from itertools import groupby

from latentcot.backbone.mixers import find_mixer

FULL = "attention"


class PatternError(ValueError):
    """A layer pattern that contradicts itself, another pattern, or the number of layers."""


def expand_pattern(
    layers: int,
    mixer: str,
    period: int | None = None,
    linear_per_full: int | None = None,
    attention_layers: Sequence[int] | None = None,
    mixers: str | Sequence[str] | None = None,
) -> list[str]:
    """Mixer name of every layer.

    Args:
        layers: how many.
        mixer: of the layers that are not full attention.
        period, linear_per_full, attention_layers: at most one of them; see the table above.
        mixers: a pattern such as ``"gated_deltanet*3,attention"`` or one name a layer. Beside one of the three others it must say the
            same (a saved configuration holds both).

    Raises:
        PatternError: two patterns at once, a pattern that leaves no layer full attention though it asks for some, layers outside the
            stack or listed twice, a pattern longer than the stack.
        ValueError: an unknown mixer (close names are suggested).
    """
    find_mixer(mixer)
    written = None if mixers is None else _written(mixers, layers)
    given = {
        name: value
        for name, value in (
            ("period", period),
            ("linear_per_full", linear_per_full),
            ("attention_layers", attention_layers),
        )
        if value is not None
    }
    if len(given) > 1:
        raise PatternError(f"layer pattern: give one of period, linear_per_full, attention_layers; got {given}")
    if written is not None and not given:
        return written
    if period is not None:
        full = _every("period", period, period, layers, smallest=1)
    elif linear_per_full is not None:
        full = _every("linear_per_full", linear_per_full, linear_per_full + 1, layers, smallest=0)
    else:
        full = _listed([] if attention_layers is None else attention_layers, layers)
    expanded = [FULL if i in full else mixer for i in range(layers)]
    if written is not None and written != expanded:
        raise PatternError(
            f"mixers: {describe_pattern(written)!r} contradicts {given}, which means {describe_pattern(expanded)!r}"
        )
    return expanded


def parse_pattern(pattern: str, layers: int) -> list[str]:
    """``"gated_deltanet*3,attention"`` repeated to ``layers`` names; the last repetition may be cut short.

    A part is ``name`` or ``name*count``; spaces do not matter. Raises ``PatternError`` when a part can not be read or the pattern is
    longer than the stack (a mixer that it names might never come), ``ValueError`` for an unknown mixer.
    """
    names: list[str] = []
    for part in pattern.split(","):
        match = re.fullmatch(r"\s*(\w+)\s*(?:\*\s*(\d+)\s*)?", part)
        count = int(match[2] or 1) if match else 0
        if match is None or count < 1:
            raise PatternError(
                f"mixers: can not read {part!r} in {pattern!r}; expected names or name*count with a count of at least 1, "
                "separated by commas, such as 'gated_deltanet*3,attention'"
            )
        find_mixer(match[1])
        if len(names) + count > layers:
            raise PatternError(f"mixers: {pattern!r} is longer than the {layers} layers it is for")
        names += [match[1]] * count
    return (names * (layers // len(names) + 1))[:layers]


def describe_pattern(mixers: Sequence[str]) -> str:
    """The pattern with the shortest period that means ``mixers``: ``describe_pattern(["gla", "attention"] * 4)`` is
    ``"gla,attention"``. ``parse_pattern`` of it gives the list back."""
    length = len(mixers)
    unit = next((n for n in range(1, length + 1) if all(mixers[i] == mixers[i % n] for i in range(length))), 0)
    runs = ((name, len(list(run))) for name, run in groupby(mixers[:unit]))
    return ",".join(name if count == 1 else f"{name}*{count}" for name, count in runs)


def _written(mixers: str | Sequence[str], layers: int) -> list[str]:
    if isinstance(mixers, str):
        return parse_pattern(mixers, layers)
    if not isinstance(mixers, Collection):
        raise PatternError(f"mixers: a pattern or a list of names is needed, got {mixers!r}")
    for name in mixers:
        find_mixer(name)
    if len(mixers) != layers:
        raise PatternError(
            f"mixers: {len(mixers)} names given for num_hidden_layers = {layers}; "
            f"a pattern to repeat is written as one string, {describe_pattern(mixers)!r}"
        )
    return list(mixers)


def _every(name: str, value: int, every: int, layers: int, smallest: int) -> set[int]:
    if not _is_index(value) or not smallest <= value <= layers - 1 + smallest:
        raise PatternError(
            f"layer pattern: {name} = {value!r} makes no layer of {layers} full attention; "
            f"expected an integer within {smallest}..{layers - 1 + smallest}"
        )
    return {i for i in range(layers) if (i + 1) % every == 0}


def _listed(attention_layers: Sequence[int], layers: int) -> set[int]:
    if not isinstance(attention_layers, Collection):
        raise PatternError(f"attention_layers: a list of integers is needed, got {attention_layers!r}")
    if wrong := [i for i in attention_layers if not _is_index(i)]:
        raise PatternError(f"attention_layers: integers are needed, got {wrong}")
    if outside := sorted(i for i in attention_layers if not 0 <= i < layers):
        raise PatternError(f"attention_layers: {outside} lie outside 0..{layers - 1}")
    if twice := sorted({i for i in attention_layers if list(attention_layers).count(i) > 1}):
        raise PatternError(f"attention_layers: {twice} are listed more than once")
    return set(attention_layers)


def _is_index(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
