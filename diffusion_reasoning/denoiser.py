"""What the loss and the samplers ask of a network, and the hybrid backbone as one.

A denoiser is any callable ``(z [B, L] int64, attention_mask [B, L] bool) -> logits [B, L, V]``, position i's about token
i. It is given no time: all that matters about it is the mask pattern itself (arXiv:2409.02908). One that wants it sets
``time_conditioning = True`` and is called with ``sigma [B] = -log alpha(t)`` as third argument.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from latentcot.backbone import HybridForCausalLM
from latentcot.diffusion_reasoning.carry import Carry
from latentcot.kernels import Bidirectional

Denoiser = Callable[..., Tensor]


@dataclass(frozen=True)
class BackboneDenoiser:
    """A :class:`~latentcot.backbone.HybridForCausalLM` seen from both sides.

    Args:
        backbone: the network.
        shift: its head at position i speaks about token i + 1, as an autoregressive one does; logits are moved to the
            position they are about (:func:`shift_right`). Nowhere else is anything shifted.
        embed_time: module ``sigma [B] -> conditioning [B, W]`` of a backbone with modulation; ``None`` without.
        time_conditioning: False feeds ``embed_time`` with sigma = 0, whatever the time.
        carry: what a masked position takes from one pass to the next (:mod:`~latentcot.diffusion_reasoning.carry`).
    """

    backbone: HybridForCausalLM
    shift: bool = False
    embed_time: nn.Module | None = None
    time_conditioning: bool = False
    carry: Carry | None = None

    def hidden(
        self, z: Tensor, attention_mask: Tensor, sigma: Tensor | None = None, embeddings: Tensor | None = None
    ) -> Tensor:
        """After the final norm, shifted if need be, ``[B, L, D]``. ``embeddings``: instead of those of ``z``."""
        condition = None
        if self.embed_time is not None:
            if sigma is None or not self.time_conditioning:
                sigma = torch.zeros(z.shape[0], device=z.device)
            condition = self.embed_time(sigma)
        named: dict[str, Any] = {} if condition is None else {"condition": condition}
        if embeddings is None:
            hidden = self.backbone.model(z, attention_mask, visibility=Bidirectional(), **named)[0]
        else:
            hidden = self.backbone.model(
                None, attention_mask, inputs_embeds=embeddings, visibility=Bidirectional(), **named
            )[0]
        return shift_right(hidden, attention_mask) if self.shift else hidden

    def __call__(self, z: Tensor, attention_mask: Tensor, sigma: Tensor | None = None) -> Tensor:
        return self.backbone.lm_head(self.hidden(z, attention_mask, sigma))

    def at(
        self,
        z: Tensor,
        attention_mask: Tensor,
        positions: Tensor,
        sigma: Tensor | None = None,
        embeddings: Tensor | None = None,
    ) -> Tensor:
        """Logits ``[n, V]`` of the n chosen positions (``[B, L]`` bool) alone: the rest never meets the vocabulary."""
        return self.backbone.lm_head(self.hidden(z, attention_mask, sigma, embeddings)[positions])

    # -- carry from pass to pass -------------------------------------------------------------------------------------

    def carried(self, z: Tensor, hidden: Tensor, positions: Tensor, mask_id: int) -> Tensor:
        """Input vectors of the next pass ``[n, D]`` at the n chosen masked positions, from this pass's final hidden
        states ``[B, L, D]``."""
        if self.carry is None:
            raise ValueError("carry: this network carries nothing from one pass to the next")
        weight = self.backbone.get_input_embeddings().weight
        assert isinstance(weight, Tensor)
        table = weight * self.backbone.config.embedding_scale
        chosen = hidden[positions]
        with torch.no_grad():  # what is carried has a gradient through the mixture, not through the pass before
            logits = self.backbone.lm_head(chosen)
        logits = logits.masked_fill(torch.arange(logits.shape[-1], device=z.device) == mask_id, -torch.inf)
        return self.carry(table[mask_id], logits, chosen, table)

    def embed_with(self, z: Tensor, held: Tensor, memory: Tensor) -> Tensor:
        """Input embeddings ``[B, L, D]``: those of ``z``, and ``memory [n, D]`` at the n positions of ``held``."""
        embeddings = self.backbone.embed(z)
        return embeddings.index_put(held.nonzero(as_tuple=True), memory.to(embeddings.dtype))


def shift_right(hidden: Tensor, attention_mask: Tensor) -> Tensor:
    """``hidden [B, L, D]`` of the previous real token at each real position; the first real token keeps its own, which
    is a placeholder: that token must be given."""
    real = attention_mask.bool()
    column = torch.arange(hidden.shape[1], device=hidden.device).expand(real.shape)
    last = torch.where(real, column, -1).cummax(1).values
    before = torch.nn.functional.pad(last[:, :-1], (1, 0), value=-1)
    before = torch.where(before < 0, column, before)
    return hidden.take_along_dim(before[..., None], 1)


def as_denoiser(model: Any) -> Denoiser:
    """The model itself, or the backbone run bidirectionally, or what ``model.denoiser()`` gives."""
    if isinstance(model, HybridForCausalLM):
        return BackboneDenoiser(model)
    if isinstance(model, nn.Module) and hasattr(model, "denoiser"):
        return model.denoiser()  # type: ignore[operator]
    if not callable(model):
        raise TypeError(
            "model: expected a callable (z, attention_mask) -> logits, a HybridForCausalLM or a DiffusionLM, got "
            f"{type(model).__name__}"
        )
    return cast(Denoiser, model)
