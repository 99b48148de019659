"""Does a method use its latents? Replace them and see: :class:`SlotAblation`.

Latents are computed as usual, then replaced, and the answer is read off the replaced ones. A method whose accuracy does
not drop has not used them.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from latentcot.recurrent_depth.settings import check_choice

KINDS = ("zeros", "noise", "mean", "pause", "shuffle")


@dataclass(frozen=True)
class SlotAblation:
    """What stands in the slots instead.

    ======== ===============================================================================
    kind     replacement
    ======== ===============================================================================
    zeros    0
    noise    normal noise with the root mean square of the latent it replaces
    mean     the mean of that slot over the batch
    pause    the embedding of ``<pause>``
    shuffle  the latents of the next row of the batch (the first row's for the last)
    ======== ===============================================================================
    """

    kind: str

    def __post_init__(self) -> None:
        check_choice("ablation: kind", self.kind, KINDS)

    def apply(self, latents: Tensor, pause: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """``latents [B, n, D]`` to what replaces them; ``pause [D]``: the embedding of ``<pause>``.

        Raises:
            ValueError: ``mean`` or ``shuffle`` of a single row, which would leave it as it is.
        """
        if self.kind in ("mean", "shuffle") and len(latents) < 2:
            raise ValueError(f"ablation: {self.kind!r} needs at least two rows in the batch, got {len(latents)}")
        if self.kind == "zeros":
            return torch.zeros_like(latents)
        if self.kind == "pause":
            return pause.to(latents).expand_as(latents)
        if self.kind == "mean":
            return latents.mean(0, keepdim=True).expand_as(latents)
        if self.kind == "shuffle":
            return latents.roll(-1, 0)
        device = latents.device if generator is None else generator.device
        noise = torch.empty(latents.shape, dtype=torch.float32, device=device).normal_(generator=generator)
        return noise.to(latents) * latents.square().mean(-1, keepdim=True).sqrt()
