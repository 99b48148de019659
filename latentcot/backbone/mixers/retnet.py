r"""Retention (RetNet, arXiv:2307.08621): a matrix state that forgets at one fixed rate a head.

.. math:: S_t = \gamma_h S_{t-1} + k_t^\top v_t, \qquad o_t = K^{-1/2} q_t S_t, \qquad \gamma_h = 1 - 2^{-5-h}

q and k carry rotary positions. Output :math:`W_o [\mathrm{RMSNorm}(o_t) \odot \mathrm{silu}(z_t)]`, the norm per head. A head remembers
about :math:`1/(1-\gamma_h) = 32, 64, 128, \ldots` tokens: eight heads reach 4096, four no further than 256.
Published defaults: H = 8, K = D/H, V = 2D/H, no short convolution, no feature map; the rates are constants, not learned.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from latentcot.backbone.context import SequenceContext
from latentcot.backbone.mixers.base import (
    Mixer,
    check_choice,
    check_counts,
    check_divides,
    check_even,
    check_positive,
    layer_state,
    linear_flops,
    repeat_heads,
    rotated,
    scaled_width,
)
from latentcot.backbone.mixers.directions import run_decay
from latentcot.backbone.mixers.features import FEATURE_MAPS
from latentcot.backbone.norms import GatedRMSNorm, RMSNorm
from latentcot.backbone.state import LayerState
from latentcot.kernels import BlockCausal


@dataclass(frozen=True)
class RetNetOptions:
    """
    Args:
        num_heads: query heads H; must divide ``expand_k · D`` and ``expand_v · D``.
        num_kv_heads: key and value heads, each shared by H / ``num_kv_heads`` query heads; ``None`` = H.
        expand_k: total key width over D; 1.
        expand_v: total value width over D; 2.
        feature_map: ``silu``, ``relu`` or ``elu`` (elu + 1) on q and k before the rotation; ``None`` = none.
        use_output_gate: output gate silu(z).
        rope_theta: base of the rotary angles.
    """

    num_heads: int = 8
    num_kv_heads: int | None = None
    expand_k: float = 1.0
    expand_v: float = 2.0
    feature_map: str | None = None
    use_output_gate: bool = True
    rope_theta: float = 10000.0

    def __post_init__(self) -> None:
        check_counts("retnet", num_heads=self.num_heads)
        check_positive("retnet", rope_theta=self.rope_theta)
        check_divides("num_kv_heads", self.num_heads, self.heads_of_keys, "retnet")
        check_choice("retnet", "feature_map", self.feature_map, (None, *FEATURE_MAPS))

    @property
    def heads_of_keys(self) -> int:
        return self.num_heads if self.num_kv_heads is None else self.num_kv_heads


def log_rates(heads: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    r""":math:`\log \gamma_h` ``[heads]``, h from 0."""
    return torch.log1p(-torch.exp2(-5.0 - torch.arange(heads, device=device, dtype=dtype)))


class RetNet(Mixer):
    name = "retnet"

    def __init__(self, hidden_size: int, options: RetNetOptions, norm_eps: float = 1e-6):
        super().__init__()
        self.options = options
        self.heads, self.kv_heads = options.num_heads, options.heads_of_keys
        key_width = scaled_width("expand_k", hidden_size, options.expand_k, "retnet")
        value_width = scaled_width("expand_v", hidden_size, options.expand_v, "retnet")
        self.K = check_divides("num_heads", key_width, self.heads, "retnet")
        self.V = check_divides("num_heads", value_width, self.heads, "retnet")
        check_even(f"{key_width} / {self.heads}", self.K, "retnet")
        self.q_proj = nn.Linear(hidden_size, key_width, bias=False)
        self.k_proj = nn.Linear(hidden_size, self.kv_heads * self.K, bias=False)
        self.v_proj = nn.Linear(hidden_size, self.kv_heads * self.V, bias=False)
        if options.use_output_gate:
            self.g_proj = nn.Linear(hidden_size, value_width, bias=False)
            self.g_norm_swish_gate = GatedRMSNorm(self.V, norm_eps)
        else:
            self.g_norm = RMSNorm(self.V, norm_eps)
        self.o_proj = nn.Linear(value_width, hidden_size, bias=False)

    def forward(
        self, hidden: Tensor, context: SequenceContext, state: LayerState | None = None
    ) -> tuple[Tensor, LayerState | None]:
        x = context.compact(hidden)
        q = self.q_proj(x).unflatten(-1, (self.heads, self.K))
        k = self.k_proj(x).unflatten(-1, (self.kv_heads, self.K))
        v = self.v_proj(x).unflatten(-1, (self.kv_heads, self.V))
        if self.options.feature_map is not None:
            feature_map = FEATURE_MAPS[self.options.feature_map]
            q, k = feature_map(q), feature_map(k)
            if context.front is not None:
                k = k * context.front[..., None]  # a feature map need not take zero to zero
        q, k = rotated(q, k, context, self.options.rope_theta, compacted=True)
        o, matrix = run_decay(
            q, repeat_heads(k, self.heads), repeat_heads(v, self.heads), self._log_decay(x, context), context, state
        )
        if self.options.use_output_gate:
            o = self.g_norm_swish_gate(o, self.g_proj(x).unflatten(-1, (self.heads, self.V)))
        else:
            o = self.g_norm(o)
        out = context.expand(self.o_proj(o.flatten(2)))
        return out, layer_state(self.name, matrix=matrix)

    def _log_decay(self, x: Tensor, context: SequenceContext) -> Tensor:
        """``[H]``, or ``[B, S, H]`` where a padded end of a row must not fade a state that is kept or read behind its block.

        Not a buffer: casting the model to 16 bits would round it, and with it every power of it.
        """
        precise = torch.promote_types(x.dtype, torch.float32)
        key = ("retnet", self.heads, precise)
        if key not in context.tables:
            rates = log_rates(self.heads, x.device, precise)
            if context.front is not None and (context.keep_state or isinstance(context.visibility, BlockCausal)):
                rates = rates * context.front
            context.tables[key] = rates
        return context.tables[key]

    def flops(self, tokens: int, keys: float, directions: int = 1) -> float:
        # write k^T v, decay, read q S: 6 K V a head and token in the recurrent form
        return linear_flops(self, tokens) + 6.0 * directions * tokens * self.heads * self.K * self.V
