"""The one interface of every mixer."""

from torch import Tensor, nn

from latentcot.backbone.context import SequenceContext
from latentcot.backbone.state import LayerState


class Mixer(nn.Module):
    """Mixes tokens. Built as ``Mixer(hidden_size, options, norm_eps)``; sub-classes set ``name``."""

    name: str = ""

    def forward(
        self, hidden: Tensor, context: SequenceContext, state: LayerState | None = None
    ) -> tuple[Tensor, LayerState | None]:
        """``hidden [B, S, D]`` to the same shape. The new state is returned when ``context.keep_state``, else ``None``."""
        raise NotImplementedError(f"{type(self).__name__} defines no forward")

    def init_weights(self, std: float) -> None:
        """Initialise parameters that are neither linear, embedding nor norm weights (those the model fills itself)."""

    def flops(self, tokens: int, keys: float, directions: int = 1) -> float:
        """Forward FLOPs (2 a multiply-add) of ``tokens`` new tokens: for attention each sees ``keys`` keys on average, a linear
        mixer runs once a direction. Counted in the recurrent form, so that no chunk length enters."""
        raise NotImplementedError(f"{type(self).__name__} counts no FLOPs")


def linear_flops(module: nn.Module, tokens: int) -> float:
    """2 · weights · tokens over the ``nn.Linear`` layers of a module."""
    return sum(2.0 * m.weight.numel() * tokens for m in module.modules() if isinstance(m, nn.Linear))


def check_divides(what: str, whole: int, parts: int, owner: str) -> int:
    """``whole // parts``, or a ``ValueError`` that names both."""
    if parts <= 0 or whole % parts:
        raise ValueError(f"{owner}: {what} = {parts} must divide {whole}")
    return whole // parts
