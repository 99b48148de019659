r"""From an autoregressive hybrid to block diffusion: begin with blocks of one token, then let them grow.

Of the forms inside a block only ``"decayed"`` is the causal layer at b = 1: its forward scan starts from the carried state and applies a
token's own gate and write. With logits shifted, blocks of one token and rho = 0 the block-diffusion model *is* the autoregressive one,
before any step of training. Every longer b is a block-diffusion model too, so blocks grow 1, 2, 4, ... up to the wanted length, and the
delta rule's backward direction comes in while they are of the second length.
"""

from dataclasses import dataclass
from typing import Literal

from transformers import PreTrainedModel

from latentcot.backbone import HybridForCausalLM
from latentcot.diffusion_reasoning.block_diffusion.model import BlockDiffusionModel
from latentcot.diffusion_reasoning.convert import prepare_mask_token


@dataclass(frozen=True)
class BlockGrowth:
    """Block length and rho by optimiser step.

    Args:
        block_length: the last one; the stages are 1, 2, 4, ... and this.
        steps_per_stage: optimiser steps at each length but the last, which stays.
    """

    block_length: int
    steps_per_stage: int

    def __post_init__(self) -> None:
        for name in ("block_length", "steps_per_stage"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}: expected a positive integer, got {value!r}")

    @property
    def lengths(self) -> tuple[int, ...]:
        """1, 2, 4, ..., ``block_length``."""
        powers = [2**k for k in range(self.block_length.bit_length()) if 2**k < self.block_length]
        return (*powers, self.block_length)

    def length(self, step: int) -> int:
        """b in ``step`` (from 0)."""
        return self.lengths[min(max(step, 0) // self.steps_per_stage, len(self.lengths) - 1)]

    def rho(self, step: int) -> float:
        """0 during the first stage, up to 1 during the second, then 1; 0 throughout if there is one stage."""
        if len(self.lengths) == 1:
            return 0.0
        return min(1.0, max(0, step + 1 - self.steps_per_stage) / self.steps_per_stage)

    def apply(self, model: BlockDiffusionModel, step: int) -> None:
        """Give the model the length and rho of a step."""
        model.block_length, model.rho = self.length(step), self.rho(step)


def ar_to_block_diffusion(
    model: PreTrainedModel, mask_token: Literal["append"] | int = "append"
) -> BlockDiffusionModel:
    """An autoregressive hybrid as a block-diffusion model of blocks of one token that computes the same; in place.

    Args:
        model: a :class:`~latentcot.backbone.HybridForCausalLM` (any mixers).
        mask_token: as for :func:`~latentcot.diffusion_reasoning.convert.ar_to_diffusion`.

    Let it grow with :class:`BlockGrowth`.

    Raises:
        TypeError: another model: only the backbone has block forms.
        ValueError: as :func:`~latentcot.diffusion_reasoning.convert.ar_to_diffusion`.
    """
    if not isinstance(model, HybridForCausalLM):
        raise TypeError(
            f"model: expected a HybridForCausalLM, whose layers have block forms, got {type(model).__name__}"
        )
    mask_id = prepare_mask_token(model, mask_token)
    return BlockDiffusionModel(model, 1, mask_id, inside="decayed", shift=True, rho=0.0)
