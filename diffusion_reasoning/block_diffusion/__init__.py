"""Block diffusion: masked diffusion inside a block, autoregression from block to block, on any stack of the backbone.

Letters as in the package above; b block length, n_b blocks of a sequence, S_c the state before block c.
"""

from latentcot.diffusion_reasoning.block_diffusion.masks import two_stream_mask
from latentcot.diffusion_reasoning.block_diffusion.model import BlockDiffusionModel, BlockState
from latentcot.diffusion_reasoning.block_diffusion.objective import (
    BlockDiffusionLoss,
    block_diffusion_loss,
    block_levels,
    corrupt_blocks,
    least_variance_interval,
)
from latentcot.diffusion_reasoning.block_diffusion.reasoner import BlockDiffusion
from latentcot.diffusion_reasoning.block_diffusion.sampler import block_generate

__all__ = [
    "BlockDiffusion",
    "BlockDiffusionLoss",
    "BlockDiffusionModel",
    "BlockState",
    "block_diffusion_loss",
    "block_generate",
    "block_levels",
    "corrupt_blocks",
    "least_variance_interval",
    "two_stream_mask",
]
