r"""Causal (or full) softmax attention with rotary positions.

:math:`o_i = \sum_j \mathrm{softmax}_j(q_i \cdot k_j / \sqrt{K})\, v_j`; q and k are rotated before the softmax and keys before they
are stored. Heads of width K = D / H; ``num_kv_heads`` < ``num_heads`` shares keys and values (GQA). With a window w token i sees the w
last tokens of its sequence, itself included (both ways: those less than w away).
Source of the layer in hybrid stacks: arXiv:2507.06457.
"""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from latentcot.backbone.context import SequenceContext
from latentcot.backbone.mixers.base import (
    Mixer,
    check_choice,
    check_counts,
    check_divides,
    check_even,
    check_positive,
    linear_flops,
    rotated,
)
from latentcot.backbone.mixers.stream_attention import attend_in_streams
from latentcot.backbone.rotary import RotaryLayout
from latentcot.backbone.state import LayerState
from latentcot.kernels import BlockCausal


@dataclass(frozen=True)
class AttentionOptions:
    """
    Args:
        num_heads: query heads; must divide the model width.
        num_kv_heads: key and value heads; ``None`` = ``num_heads``.
        rope_theta: base of the rotary angles; ``None`` = no positions at all.
        rotary_layout: ``half`` or ``interleaved``.
        bias: ``none``, ``qk`` (Huginn: after the projection, before rotary) or ``qkv``.
        window_size: sliding window w in real tokens; ``None`` = all. It bounds what is seen, not what is kept: the state holds every key.
    """

    num_heads: int = 16
    num_kv_heads: int | None = None
    rope_theta: float | None = 10000.0
    rotary_layout: RotaryLayout = "half"
    bias: Literal["none", "qk", "qkv"] = "none"
    window_size: int | None = None

    def __post_init__(self) -> None:
        check_counts("attention", num_heads=self.num_heads, window_size=self.window_size)
        check_positive("attention", rope_theta=self.rope_theta)
        check_divides("num_kv_heads", self.num_heads, self.heads_of_keys, "attention")
        check_choice("attention", "bias", self.bias, ("none", "qk", "qkv"))
        check_choice("attention", "rotary_layout", self.rotary_layout, ("half", "interleaved"))

    @property
    def heads_of_keys(self) -> int:
        return self.num_heads if self.num_kv_heads is None else self.num_kv_heads


class AttendedState(LayerState):
    """Keys and values that stay with their holder: attention hands it the new ones and asks for the result, instead of copying old and
    new ones together for every token."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None) -> Tensor:
        """Result ``[B, H, 1, K]`` of one query a row, ``q [B, H, 1, K]``, over the stored columns and the new one; ``k, v [B, G, 1, K]``.
        ``seen [B, 1, 1, T + 1]`` bool, ``None`` = all."""
        raise NotImplementedError(f"{type(self).__name__} defines no attend")


class SoftmaxAttention(Mixer):
    name = "attention"

    def __init__(self, hidden_size: int, options: AttentionOptions, norm_eps: float = 1e-6):
        super().__init__()
        self.options = options
        self.heads = options.num_heads
        self.kv_heads = options.heads_of_keys
        self.head_width = check_divides("num_heads", hidden_size, options.num_heads, "attention")
        if options.rope_theta is not None:
            check_even(f"{hidden_size} / {self.heads}", self.head_width, "attention")
        kv_width = self.kv_heads * self.head_width
        qk_bias, v_bias = options.bias in ("qk", "qkv"), options.bias == "qkv"
        self.q_proj = nn.Linear(hidden_size, hidden_size, bias=qk_bias)
        self.k_proj = nn.Linear(hidden_size, kv_width, bias=qk_bias)
        self.v_proj = nn.Linear(hidden_size, kv_width, bias=v_bias)
        self.o_proj = nn.Linear(hidden_size, hidden_size, bias=False)

    def forward(
        self, hidden: Tensor, context: SequenceContext, state: LayerState | None = None
    ) -> tuple[Tensor, LayerState | None]:
        q = self.q_proj(hidden).unflatten(-1, (self.heads, self.head_width))
        k = self.k_proj(hidden).unflatten(-1, (self.kv_heads, self.head_width))
        v = self.v_proj(hidden).unflatten(-1, (self.kv_heads, self.head_width))
        if self.options.rope_theta is not None:
            q, k = rotated(q, k, context, self.options.rope_theta, self.options.rotary_layout)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))  # [B, H, S, K]
        if context.streams == 2:
            o = attend_in_streams(q, k, v, context, self.options.window_size)
            return self.o_proj(o.transpose(1, 2).flatten(2)), None
        window = self.options.window_size
        seen = context.attention_mask if window is None else windowed_mask(context, window)
        if isinstance(state, AttendedState):
            return self.o_proj(state.attend(q, k, v, seen).transpose(1, 2).flatten(2)), state
        if state is not None and not context.keep_state and _reads_in_place(q, context):
            o = beside_the_past(q, k, v, state["keys"], state["values"], seen)
            return self.o_proj(o.transpose(1, 2).flatten(2)), None
        if state is not None:
            k = torch.cat([state["keys"], k], 2)
            v = torch.cat([state["values"], v], 2)
        new_state = LayerState(self.name, {"keys": k, "values": v}) if context.keep_state else None
        o = F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=seen,
            is_causal=seen is None and context.plain_causal,
            enable_gqa=self.kv_heads != self.heads,
        )
        return self.o_proj(o.transpose(1, 2).flatten(2)), new_state

    def flops(self, tokens: int, keys: float, directions: int = 1) -> float:
        return linear_flops(self, tokens) + 4.0 * tokens * keys * self.heads * self.head_width


def _reads_in_place(q: Tensor, context: SequenceContext) -> bool:
    """Blocks that are looked at again and again copy no past; 16-bit scores would be rounded, so those take the fused kernel."""
    return isinstance(context.visibility, BlockCausal) and q.dtype in (torch.float32, torch.float64)


def beside_the_past(
    q: Tensor, k: Tensor, v: Tensor, past_k: Tensor, past_v: Tensor, seen: Tensor | None = None
) -> Tensor:
    """Softmax attention over stored and new keys, without joining the two: ``q [B, H, S, K]``, ``k, v [B, G, S, K]``, the past
    ``[B, G, T, K]``, ``seen [B or 1, 1, S, T + S]`` bool. One softmax: both parts are scaled by the same maximum and sum."""
    groups, length, T = k.shape[1], q.shape[2], past_k.shape[2]
    q = q.unflatten(1, (groups, -1)).flatten(2, 3) * q.shape[-1] ** -0.5  # [B, G, m * S, K]
    old, new = q @ past_k.mT, q @ k.mT
    if seen is not None:
        seen = seen.repeat(1, 1, q.shape[2] // length, 1)
        old, new = old.masked_fill(~seen[..., :T], -torch.inf), new.masked_fill(~seen[..., T:], -torch.inf)
    top = torch.maximum(old.amax(-1, keepdim=True), new.amax(-1, keepdim=True)).detach()
    old, new = (old - top).exp(), (new - top).exp()
    o = (old @ past_v + new @ v) / (old.sum(-1, keepdim=True) + new.sum(-1, keepdim=True))
    return o.unflatten(2, (-1, length)).flatten(1, 2)


def windowed_mask(context: SequenceContext, window: int) -> Tensor:
    """``context.attention_mask`` without pairs that lie ``window`` or more real tokens apart: ``[B, 1, S, T + S]`` bool."""
    key = ("window", window)
    if key not in context.tables:
        positions = context.positions
        if context.past_valid is not None:
            before = context.past_valid.long().cumsum(1) - 1
            positions = torch.cat([before.expand(positions.shape[0], -1), positions], 1)
        distance = context.positions[:, :, None] - positions[:, None, :]
        near = (distance < window) & (distance > (-1 if context.causal else -window))
        seen = context.attention_mask
        context.tables[key] = near[:, None] if seen is None else near[:, None] & seen
    return context.tables[key]
