"""What the loss and the samplers ask of a network, and the hybrid backbone as one.

A denoiser is any callable ``(z [B, L] int64, attention_mask [B, L] bool) -> logits [B, L, V]``. It is given no time:
all that matters about it is the mask pattern itself (arXiv:2409.02908).
"""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from latentcot.backbone import HybridForCausalLM
from latentcot.kernels import Bidirectional

Denoiser = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class BackboneDenoiser:
    """A :class:`~latentcot.backbone.HybridForCausalLM` seen from both sides. Position i's logits are about token i: no
    shift."""

    backbone: HybridForCausalLM

    def hidden(self, z: Tensor, attention_mask: Tensor) -> Tensor:
        """After the final norm, ``[B, L, D]``."""
        return self.backbone.model(z, attention_mask, visibility=Bidirectional())[0]

    def __call__(self, z: Tensor, attention_mask: Tensor) -> Tensor:
        return self.backbone.lm_head(self.hidden(z, attention_mask))

    def at(self, z: Tensor, attention_mask: Tensor, positions: Tensor) -> Tensor:
        """Logits ``[n, V]`` of the n chosen positions (``[B, L]`` bool) alone: the rest never meets the vocabulary."""
        return self.backbone.lm_head(self.hidden(z, attention_mask)[positions])


def as_denoiser(model: Denoiser | HybridForCausalLM) -> Denoiser:
    """The model itself, or the backbone run bidirectionally."""
    if isinstance(model, HybridForCausalLM):
        return BackboneDenoiser(model)
    if not callable(model):
        raise TypeError(
            "model: expected a callable (z, attention_mask) -> logits or a HybridForCausalLM, got "
            f"{type(model).__name__}"
        )
    return model
