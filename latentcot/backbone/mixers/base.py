"""The one interface of every mixer, and the few lines that several mixers share."""

import torch
from torch import Tensor, nn

from latentcot.backbone.context import SequenceContext
from latentcot.backbone.mixers.convolution import Initialization, ShortConvolution
from latentcot.backbone.rotary import RotaryLayout, apply_rotary, rotary_table
from latentcot.backbone.state import LayerState

SHUT = 1e4
"""Logit of a gate that is fully open or shut: its logistic function is exactly 1 (0 for the negative one) and has a gradient of exactly
zero in every dtype, float16 included. Padded positions get it: they forget nothing and write nothing, inside fused kernels too."""

DIRECTION_START = 1.5  # logistic 0.82

LOWER_BOUNDS = "lower_bounds"
"""Name under which the model lays the bounds of its forget gates, ``[L, width]``, into the tables of a context."""


class Mixer(nn.Module):
    """Mixes tokens. Built as ``Mixer(hidden_size, options, norm_eps)``; sub-classes set ``name``.

    What a mixer shares with the others of its stack comes from the model: it sets ``layer_index`` once, and holds one matrix of lower
    bounds ``[L, bound_width]`` if a mixer asks for them by a ``bound_width`` above zero.
    """

    name: str = ""
    layer_index: int = 0
    bound_width: int = 0

    def forward(
        self, hidden: Tensor, context: SequenceContext, state: LayerState | None = None
    ) -> tuple[Tensor, LayerState | None]:
        """``hidden [B, S, D]`` to the same shape. The new state is returned when ``context.keep_state``, else ``None``."""
        raise NotImplementedError(f"{type(self).__name__} defines no forward")

    def init_weights(self, std: float, convolution: Initialization = "normal") -> None:
        """Initialise parameters that are neither linear, embedding nor norm weights (those the model fills itself)."""
        for each in self.taps:
            each.init_weights(std, convolution)

    @property
    def taps(self) -> list[ShortConvolution]:
        """Its short convolutions, if it has any, in the order in which their states lie side by side."""
        return []

    def flops(self, tokens: int, keys: float, directions: int = 1) -> float:
        """Forward FLOPs (2 a multiply-add) of ``tokens`` new tokens: for attention each sees ``keys`` keys on average, a linear
        mixer runs once a direction. Counted in the recurrent form, so that no chunk length enters."""
        raise NotImplementedError(f"{type(self).__name__} counts no FLOPs")

    def lower_bound(self, context: SequenceContext) -> Tensor | None:
        """This layer's bound of the forget gate ``[bound_width]``, or ``None`` for zero: the first layer, or none asked for.

        Raises:
            ValueError: in a later layer, when the context did not come through the model's ``run``.
        """
        if self.bound_width == 0 or self.layer_index == 0:
            return None
        if LOWER_BOUNDS not in context.tables:
            raise ValueError(
                f"{self.name}: layer {self.layer_index} has a lower bound that its model computes; run it through "
                f"HybridModel.run, or lay stacked_bounds(...) into context.tables[{LOWER_BOUNDS!r}]"
            )
        return context.tables[LOWER_BOUNDS][self.layer_index]


def layer_state(name: str, **tensors: Tensor | None) -> LayerState | None:
    """State of the tensors that are there; ``None`` when none is (the context keeps no state)."""
    kept = {key: tensor for key, tensor in tensors.items() if tensor is not None}
    return LayerState(name, kept) if kept else None


def linear_flops(module: nn.Module, tokens: int) -> float:
    """2 · weights · tokens over the ``nn.Linear`` layers of a module."""
    return sum(2.0 * m.weight.numel() * tokens for m in module.modules() if isinstance(m, nn.Linear))


def shut(logits: Tensor, context: SequenceContext, value: float) -> Tensor:
    """``logits [B, S, ...]`` (compacted) with ``value`` at padded positions."""
    if context.front is None:
        return logits
    return logits.masked_fill(~context.front.unflatten(-1, (1,) * (logits.dim() - 2)), value)


def rotated(
    q: Tensor,
    k: Tensor,
    context: SequenceContext,
    base: float,
    layout: RotaryLayout = "half",
    compacted: bool = False,
) -> tuple[Tensor, Tensor]:
    """q and k ``[B, S, heads, width]`` at the rotary positions of a context, whose tables every layer shares.

    ``compacted``: their tokens are in the order of ``context.compact``, not in the caller's.
    """
    compacted = compacted and context.front is not None
    key = ("rotary", q.shape[-1], base, q.dtype == torch.float64, compacted)
    if key not in context.tables:
        positions = context.compact(context.positions[..., None])[..., 0] if compacted else context.positions
        context.tables[key] = rotary_table(positions, q.shape[-1], base, q.dtype)
    return apply_rotary(q, context.tables[key], layout), apply_rotary(k, context.tables[key], layout)


def direction_start(heads: int) -> Tensor:
    """Logits of a gate between two directions ``[heads]``: every other head faces backwards, each sees mostly one direction."""
    facing = torch.arange(heads) % 2 == 0
    return torch.where(facing, DIRECTION_START, -DIRECTION_START)


def repeat_heads(x: Tensor, heads: int) -> Tensor:
    """``[B, S, G, width]`` to ``[B, S, heads, width]``: each of the G shared heads serves the next heads / G ones."""
    return x if x.shape[2] == heads else x.repeat_interleave(heads // x.shape[2], dim=2)


# -- checks of options -------------------------------------------------------------------------------------------------


def check_divides(what: str, whole: int, parts: int, owner: str) -> int:
    """``whole // parts``, or a ``ValueError`` that names both."""
    if not (is_count(whole) and is_count(parts)) or whole % parts:
        raise ValueError(f"{owner}: {what} = {parts} must divide {whole}")
    return whole // parts


def check_positive(owner: str, **values: float | None) -> None:
    """``ValueError`` for what is no number above zero; ``None`` passes."""
    for what, value in values.items():
        if value is not None and not is_positive(value):
            raise ValueError(f"{owner}: {what} = {value!r} given, expected a number above zero")


def check_counts(owner: str, **values: int | None) -> None:
    """``ValueError`` for what is no integer above zero (2.0 is none: it comes from a file written by hand); ``None`` passes."""
    for what, value in values.items():
        if value is not None and not is_count(value):
            raise ValueError(f"{owner}: {what} = {value!r} given, expected an integer above zero")


def is_positive(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value > 0


def is_count(value: object) -> bool:
    return isinstance(value, int) and is_positive(value)


def check_choice(owner: str, what: str, value: str | None, choices: tuple[str | None, ...]) -> None:
    """``ValueError`` for a word that is none of ``choices``."""
    if value not in choices:
        raise ValueError(f"{owner}: {what} = {value!r} given, expected one of {', '.join(map(repr, choices))}")


def check_even(what: str, width: int, owner: str) -> None:
    """``ValueError`` where rotary positions meet an odd width: they turn channels in pairs."""
    if width % 2:
        raise ValueError(f"{owner}: rotary positions need an even head width, got {width} ({what})")


def scaled_width(what: str, width: int, ratio: float, owner: str) -> int:
    """``width · ratio`` where that is a whole number above zero; else a ``ValueError`` (rounding would change a published size)."""
    scaled = width * ratio if is_positive(ratio) else 0
    if scaled < 1 or abs(scaled - round(scaled)) > 1e-6:
        raise ValueError(
            f"{owner}: {what} = {ratio} makes {scaled:g} channels of {width}, expected a whole number above zero"
        )
    return round(scaled)
