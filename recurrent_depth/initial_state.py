r"""Where a depth loop starts: :class:`InitialState`.

Huginn (arXiv:2502.05171) draws :math:`s_0` afresh for every pass and position, so that the core learns a map whose
result does not depend on where it started. The draw is that of its embedding table, variance :math:`2/(5D)`, times the
embedding scale :math:`\sqrt D`: a truncated normal of nominal variance 2/5, whatever the width.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from latentcot.recurrent_depth.settings import check_choice

KINDS = ("like_init", "zeros", "unit_normal", "embedding", "scaled")
CLIP = 3.0  # standard deviations at which like_init is cut


@dataclass(frozen=True)
class InitialState:
    r"""How :math:`s_0\ [B, S, D]` is made.

    ============= ===================================================================
    kind          s_0
    ============= ===================================================================
    like_init     normal of standard deviation sqrt(``variance``), cut at ±3 of them
    zeros         0
    unit_normal   normal of variance 1
    embedding     the injected input e itself (the prelude's output)
    scaled        normal of variance ``variance``, not cut
    ============= ===================================================================

    Args:
        kind: see the table.
        variance: nominal variance of ``like_init`` (before the cut; about 0.97 of it is left) and of ``scaled``; 2/5.

    Raises:
        ValueError: unknown kind, or a variance that is not positive.

    Source: arXiv:2502.05171, and its released code for the other kinds.
    """

    kind: str = "like_init"
    variance: float = 0.4

    def __post_init__(self) -> None:
        check_choice("initial_state: kind", self.kind, KINDS)
        if not (self.variance > 0 and math.isfinite(self.variance)):
            raise ValueError(f"initial_state: variance = {self.variance!r} given, expected a positive number")

    @property
    def random(self) -> bool:
        return self.kind in ("like_init", "unit_normal", "scaled")

    def draw(self, like: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """A state of the shape, dtype and device of ``like`` (for ``embedding``: ``like`` itself).

        Random kinds are drawn in fp32 on the generator's device, so that fp32 and fp64 models start alike.
        """
        if self.kind == "embedding":
            return like
        if self.kind == "zeros":
            return torch.zeros_like(like)
        device = like.device if generator is None else generator.device
        state = torch.empty(like.shape, dtype=torch.float32, device=device)
        std = 1.0 if self.kind == "unit_normal" else math.sqrt(self.variance)
        if self.kind == "like_init":
            nn.init.trunc_normal_(state, 0.0, std, -CLIP * std, CLIP * std, generator=generator)
        else:
            state.normal_(0.0, std, generator=generator)
        return state.to(like)
