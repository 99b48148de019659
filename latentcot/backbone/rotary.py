r"""Rotary position embedding in its two layouts.

Pair j of position t is rotated by :math:`t \cdot base^{-2j/d}`. ``half`` pairs channel j with j + d/2 (Llama, the hybrid study),
``interleaved`` pairs 2j with 2j + 1 (Huginn). Angles are computed in fp32 (fp64 for fp64 inputs).
"""

from typing import Literal

import torch
from torch import Tensor

RotaryLayout = Literal["half", "interleaved"]


def rotary_table(positions: Tensor, width: int, base: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosine and sine ``[B, S, 1, width/2]`` for ``positions [B, S]``, at least fp32."""
    precise = torch.float64 if dtype == torch.float64 else torch.float32
    exponent = torch.arange(0, width, 2, device=positions.device, dtype=precise) / width
    angle = positions.to(precise)[..., None, None] * base**-exponent
    return angle.cos(), angle.sin()


def apply_rotary(x: Tensor, table: tuple[Tensor, Tensor], layout: RotaryLayout = "half") -> Tensor:
    """Rotate ``x [B, S, H, width]``; the result has the dtype of x."""
    cos, sin = table
    if layout == "half":
        first, second = x.to(cos.dtype).chunk(2, -1)
        turned = torch.cat([first * cos - second * sin, second * cos + first * sin], -1)
    else:
        first, second = x.to(cos.dtype).unflatten(-1, (-1, 2)).unbind(-1)
        turned = torch.stack([first * cos - second * sin, second * cos + first * sin], -1).flatten(-2)
    return turned.to(x.dtype)
