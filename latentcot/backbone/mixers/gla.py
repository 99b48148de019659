r"""Gated linear attention (GLA, arXiv:2312.06635): a matrix state that forgets channel by channel.

.. math:: S_t = \mathrm{diag}(\alpha_t) S_{t-1} + k_t^\top v_t, \qquad o_t = K^{-1/2} q_t S_t

with :math:`\log \alpha_t = \mathrm{logsigmoid}(W_2 W_1 x_t + b) / 16`. Output :math:`W_o [\mathrm{RMSNorm}(o_t) \odot
\mathrm{silu}(z_t)]`, the norm per head. Published defaults: H = 4, K = D/8, V = D/4, no short convolution, no activation on q, k, v.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from latentcot.backbone.context import SequenceContext
from latentcot.backbone.mixers.base import (
    SHUT,
    Mixer,
    check_choice,
    check_counts,
    check_divides,
    layer_state,
    linear_flops,
    repeat_heads,
    scaled_width,
    shut,
)
from latentcot.backbone.mixers.convolution import ShortConvolution, convolve_qkv
from latentcot.backbone.mixers.directions import run_decay
from latentcot.backbone.mixers.features import FEATURE_MAPS
from latentcot.backbone.norms import GatedRMSNorm, RMSNorm
from latentcot.backbone.state import LayerState

GATE_NORMALIZER = 16.0  # constants of the published format, not fields of its configuration
GATE_RANK = 16


@dataclass(frozen=True)
class GLAOptions:
    """
    Args:
        num_heads: query heads H; must divide ``expand_k · D`` and ``expand_v · D``.
        num_kv_heads: key, value and gate heads, each shared by H / ``num_kv_heads`` query heads; ``None`` = H.
        expand_k: total key width over D; 0.5.
        expand_v: total value width over D; 1.
        clamp_min: lower bound of the log-decay, or ``None``.
        feature_map: ``silu``, ``relu`` or ``elu`` (elu + 1) on q and k; ``None`` = none.
        use_output_gate: output gate silu(z).
        use_short_conv: short convolution with SiLU on q, k and v.
        conv_size: its window W.
    """

    num_heads: int = 4
    num_kv_heads: int | None = None
    expand_k: float = 0.5
    expand_v: float = 1.0
    clamp_min: float | None = None
    feature_map: str | None = None
    use_output_gate: bool = True
    use_short_conv: bool = False
    conv_size: int = 4

    def __post_init__(self) -> None:
        check_counts("gla", num_heads=self.num_heads, conv_size=self.conv_size)
        check_divides("num_kv_heads", self.num_heads, self.heads_of_keys, "gla")
        check_choice("gla", "feature_map", self.feature_map, (None, *FEATURE_MAPS))
        if self.clamp_min is not None and self.clamp_min > 0:
            raise ValueError(f"gla: clamp_min bounds a log-decay, so it must be <= 0, got {self.clamp_min}")

    @property
    def heads_of_keys(self) -> int:
        return self.num_heads if self.num_kv_heads is None else self.num_kv_heads


class GatedLinearAttention(Mixer):
    name = "gla"

    def __init__(self, hidden_size: int, options: GLAOptions, norm_eps: float = 1e-6):
        super().__init__()
        self.options = options
        self.heads, self.kv_heads = options.num_heads, options.heads_of_keys
        key_width = scaled_width("expand_k", hidden_size, options.expand_k, "gla")
        value_width = scaled_width("expand_v", hidden_size, options.expand_v, "gla")
        self.K = check_divides("num_heads", key_width, self.heads, "gla")
        self.V = check_divides("num_heads", value_width, self.heads, "gla")
        shared_keys, shared_values = self.kv_heads * self.K, self.kv_heads * self.V
        self.q_proj = nn.Linear(hidden_size, key_width, bias=False)
        self.k_proj = nn.Linear(hidden_size, shared_keys, bias=False)
        self.v_proj = nn.Linear(hidden_size, shared_values, bias=False)
        self.gk_proj = nn.Sequential(
            nn.Linear(hidden_size, GATE_RANK, bias=False), nn.Linear(GATE_RANK, shared_keys, bias=True)
        )
        if options.use_short_conv:
            self.q_conv1d = ShortConvolution(key_width, options.conv_size)
            self.k_conv1d = ShortConvolution(shared_keys, options.conv_size)
            self.v_conv1d = ShortConvolution(shared_values, options.conv_size)
        if options.use_output_gate:
            self.g_proj = nn.Linear(hidden_size, value_width, bias=False)
            self.g_norm_swish_gate = GatedRMSNorm(self.V, norm_eps)
        else:
            self.g_norm = RMSNorm(self.V, norm_eps)
        self.o_proj = nn.Linear(value_width, hidden_size, bias=False)

    @property
    def taps(self) -> list[ShortConvolution]:
        return [self.q_conv1d, self.k_conv1d, self.v_conv1d] if self.options.use_short_conv else []

    def forward(
        self, hidden: Tensor, context: SequenceContext, state: LayerState | None = None
    ) -> tuple[Tensor, LayerState | None]:
        x = context.compact(hidden)
        q, k, v, conv = self.q_proj(x), self.k_proj(x), self.v_proj(x), None
        if self.options.use_short_conv:
            q, k, v, conv = convolve_qkv((q, k, v), self.taps, context, state)
        if self.options.feature_map is not None:
            feature_map = FEATURE_MAPS[self.options.feature_map]
            q, k = feature_map(q), feature_map(k)
            if context.front is not None:
                k = k * context.front  # a feature map need not take zero to zero
        o, matrix = run_decay(
            q.unflatten(-1, (self.heads, self.K)),
            repeat_heads(k.unflatten(-1, (self.kv_heads, self.K)), self.heads),
            repeat_heads(v.unflatten(-1, (self.kv_heads, self.V)), self.heads),
            repeat_heads(self._log_decay(x, context), self.heads),
            context,
            state,
        )
        if self.options.use_output_gate:
            o = self.g_norm_swish_gate(o, self.g_proj(x).unflatten(-1, (self.heads, self.V)))
        else:
            o = self.g_norm(o)
        out = context.expand(self.o_proj(o.flatten(2)))
        return out, layer_state(self.name, matrix=matrix, conv=conv)

    def _log_decay(self, x: Tensor, context: SequenceContext) -> Tensor:
        """``[B, S, kv_heads, K]``, zero at padded positions (where k is zero already): they neither write nor forget."""
        logits = shut(self.gk_proj(x), context, SHUT)
        log_decay = F.logsigmoid(logits.to(torch.promote_types(x.dtype, torch.float32))) / GATE_NORMALIZER
        if self.options.clamp_min is not None:
            log_decay = log_decay.clamp(min=self.options.clamp_min)
        return log_decay.unflatten(-1, (self.kv_heads, self.K))

    def flops(self, tokens: int, keys: float, directions: int = 1) -> float:
        convolutions = sum(each.flops(tokens, directions) for each in self.taps)
        # write k^T v, decay, read q S: 6 K V a head and token in the recurrent form
        return linear_flops(self, tokens) + convolutions + 6.0 * directions * tokens * self.heads * self.K * self.V
