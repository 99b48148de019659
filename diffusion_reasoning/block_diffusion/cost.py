r"""What a denoising pass of one block costs, counted: the part of the past, the part of the block, the rest.

For b tokens behind T, FLOPs being 2 a multiply-add, H heads of keys K and values V wide:

============ ================================ ================================================
term         attention                        linear, ``inside="softmax"``
============ ================================ ================================================
past read    2·b·T·H·(K + V)                  2·b·H·K·V, whatever T is
in block     2·b²·H·(K + V)                   the same
past, bytes  keys and values of T tokens      the matrix and the inputs of the convolution, fp32
commit       nothing beyond the pass          4 (delta rule: 6) · b·H·K·V for the writes
projections  and MLP: the same kind of work in both
============ ================================ ================================================

Diffusion multiplies the past read by the number of passes: with k passes a block, attention reads its cache k/b times a token, an
autoregressive model once. The weights are read k + 1 times for b tokens, so tokens a second at one row are gained where k + 1 < b.
"""

from dataclasses import dataclass, fields

import torch

from latentcot.backbone import HybridConfig
from latentcot.backbone.mixers import Mixer, find_mixer, make_options
from latentcot.backbone.mixers.attention import SoftmaxAttention
from latentcot.backbone.mixers.base import linear_flops
from latentcot.backbone.presets import layer_bytes


@dataclass(frozen=True)
class BlockCost:
    """FLOPs of one pass over one block of one sequence, and bytes of what it reads of the past."""

    past_read: float
    in_block: float
    projections: float
    commit: float
    past_bytes: int

    @property
    def denoise(self) -> float:
        """FLOPs of a denoising pass."""
        return self.past_read + self.in_block + self.projections

    def __add__(self, other: "BlockCost") -> "BlockCost":
        return BlockCost(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))


def layer_costs(
    config: HybridConfig, block_length: int, context: int, dtype: torch.dtype = torch.bfloat16
) -> list[BlockCost]:
    """One :class:`BlockCost` a layer, its MLP included; ``context`` = tokens committed before.

    Raises:
        ValueError: a block without a token, a negative context; hgrn layers, whose form inside a block is another.
    """
    if block_length < 1 or context < 0:
        raise ValueError(
            f"block_length, context: {block_length} and {context} given, expected at least one token and none before it"
        )
    b, costs = block_length, []
    mlp = 2.0 * b * 3 * config.hidden_size * config.intermediate_size
    for name, held in zip(config.mixers, layer_bytes(config, dtype), strict=True):
        if name == "hgrn":
            raise ValueError("config: hgrn has no softmax inside a block; its scans cost 10 FLOPs a channel and token")
        mixer = _on_meta(config, name)
        projections = linear_flops(mixer, b) + sum(t.flops(b) for t in mixer.taps) + mlp
        past_bytes = held.at(context) if context else 0
        if isinstance(mixer, SoftmaxAttention):
            per_pair = 4.0 * mixer.heads * mixer.head_width
            costs.append(BlockCost(b * context * per_pair, b * b * per_pair, projections, 0.0, past_bytes))
            continue
        sizes = vars(mixer)
        heads, K, V = sizes.get("v_heads", sizes["heads"]), sizes["K"], sizes["V"]
        writes = 6.0 if name in ("deltanet", "gated_deltanet") else 4.0
        costs.append(
            BlockCost(
                2.0 * b * heads * K * V if context else 0.0,
                2.0 * b * b * heads * (K + V),
                projections,
                writes * b * heads * K * V,
                past_bytes,
            )
        )
    return costs


def block_cost(config: HybridConfig, block_length: int, context: int, dtype: torch.dtype = torch.bfloat16) -> BlockCost:
    """The sum over all layers; head and embedding are left out."""
    costs = layer_costs(config, block_length, context, dtype)
    total = costs[0]
    for cost in costs[1:]:
        total = total + cost
    return total


def _on_meta(config: HybridConfig, name: str) -> Mixer:
    with torch.device("meta"):
        return find_mixer(name)[0](config.hidden_size, make_options(name, getattr(config, name)), config.norm_eps)  # type: ignore[call-arg]
