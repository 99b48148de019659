r"""DeltaNet (arXiv:2406.06484): erase what the key held, then write the new value; nothing else is forgotten.

.. math:: u_t = \beta_t (v_t - k_t S_{t-1}), \qquad S_t = S_{t-1} + k_t^\top u_t, \qquad o_t = K^{-1/2} q_t S_t

with :math:`\beta_t = \sigma(W_b x_t)`. q, k, v pass a short causal convolution with SiLU; q and k are L2-normalised per head. Output
:math:`W_o\, \mathrm{RMSNorm}(o_t)`, the norm per head, without a gate. Published recipes: K = V = 128, H = D/128.

Seen bidirectionally it does what Gated DeltaNet does: a centred convolution, and both directions averaged or mixed by ``combine``.
"""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization

from latentcot.backbone.context import SequenceContext
from latentcot.backbone.mixers.base import (
    SHUT,
    Mixer,
    check_choice,
    check_counts,
    check_divides,
    direction_start,
    layer_state,
    linear_flops,
    scaled_width,
    shut,
)
from latentcot.backbone.mixers.convolution import Initialization, ShortConvolution, convolve_qkv
from latentcot.backbone.mixers.directions import run_delta
from latentcot.backbone.mixers.features import FEATURE_MAPS, QK_NORMS
from latentcot.backbone.norms import GatedRMSNorm, RMSNorm
from latentcot.backbone.state import LayerState

HEAD_WIDTH = 128  # of the published recipes


@dataclass(frozen=True)
class DeltaNetOptions:
    """
    Args:
        num_heads: H; ``None`` = D / 128. Must divide ``expand_k · D`` and ``expand_v · D``.
        expand_k: total key width over D; 1.
        expand_v: total value width over D; 1.
        use_beta: learned write strength; ``False`` writes with beta = 1.
        use_gate: output gate silu(z).
        use_output_norm: RMS norm of each head's output.
        qk_activation: of q and k: ``silu``, ``relu``, ``elu`` (elu + 1) or ``identity``; v has SiLU whatever it is.
        qk_norm: ``l2``, or ``sum`` (each row of q and k sums to one; needs ``relu`` or ``elu``, which keep it above zero).
        use_short_conv: short convolution on q, k and v; ``False`` leaves their activations alone.
        conv_size: its window W.
        allow_neg_eigval: beta in (0, 2) instead of (0, 1), so that a step can reflect the state.
        combine: how the two directions join when run bidirectionally, see ``GatedDeltaNetOptions``.
    """

    num_heads: int | None = None
    expand_k: float = 1.0
    expand_v: float = 1.0
    use_beta: bool = True
    use_gate: bool = False
    use_output_norm: bool = True
    qk_activation: Literal["silu", "relu", "elu", "identity"] = "silu"
    qk_norm: Literal["l2", "sum"] = "l2"
    use_short_conv: bool = True
    conv_size: int = 4
    allow_neg_eigval: bool = False
    combine: Literal["average", "gate"] = "average"

    def __post_init__(self) -> None:
        check_counts("deltanet", num_heads=self.num_heads, conv_size=self.conv_size)
        check_choice("deltanet", "qk_activation", self.qk_activation, (*FEATURE_MAPS, "identity"))
        check_choice("deltanet", "qk_norm", self.qk_norm, tuple(QK_NORMS))
        check_choice("deltanet", "combine", self.combine, ("average", "gate"))
        if self.qk_norm == "sum" and self.qk_activation not in ("relu", "elu"):
            raise ValueError(
                f"deltanet: qk_norm = 'sum' divides by a sum that qk_activation = {self.qk_activation!r} lets pass through zero; "
                f"expected 'relu' or 'elu' with it"
            )


class DeltaNet(Mixer):
    name = "deltanet"

    def __init__(self, hidden_size: int, options: DeltaNetOptions, norm_eps: float = 1e-6):
        super().__init__()
        self.options = options
        if options.num_heads is None:
            self.heads = check_divides("head width (num_heads = None)", hidden_size, HEAD_WIDTH, "deltanet")
        else:
            self.heads = options.num_heads
        key_width = scaled_width("expand_k", hidden_size, options.expand_k, "deltanet")
        value_width = scaled_width("expand_v", hidden_size, options.expand_v, "deltanet")
        self.K = check_divides("num_heads", key_width, self.heads, "deltanet")
        self.V = check_divides("num_heads", value_width, self.heads, "deltanet")
        self.q_proj = nn.Linear(hidden_size, key_width, bias=False)
        self.k_proj = nn.Linear(hidden_size, key_width, bias=False)
        self.v_proj = nn.Linear(hidden_size, value_width, bias=False)
        if options.use_beta:
            self.b_proj = nn.Linear(hidden_size, self.heads, bias=False)
        if options.use_short_conv:
            self.q_conv1d = ShortConvolution(key_width, options.conv_size)
            self.k_conv1d = ShortConvolution(key_width, options.conv_size)
            self.v_conv1d = ShortConvolution(value_width, options.conv_size)
        if options.use_gate:
            self.g_proj = nn.Linear(hidden_size, value_width, bias=False)
        if options.use_output_norm:
            self.o_norm = GatedRMSNorm(self.V, norm_eps) if options.use_gate else RMSNorm(self.V, norm_eps)
        if options.combine == "gate":
            self.direction = nn.Parameter(torch.zeros(self.heads))
        self.o_proj = nn.Linear(value_width, hidden_size, bias=False)

    @property
    def taps(self) -> list[ShortConvolution]:
        return [self.q_conv1d, self.k_conv1d, self.v_conv1d] if self.options.use_short_conv else []

    def init_weights(self, std: float, convolution: Initialization = "normal") -> None:
        super().init_weights(std, convolution)
        if self.options.combine == "gate":
            initialization.copy_(self.direction, direction_start(self.heads))

    def forward(
        self, hidden: Tensor, context: SequenceContext, state: LayerState | None = None
    ) -> tuple[Tensor, LayerState | None]:
        x = context.compact(hidden)
        q, k, v, conv = self._activated(x, context, state)
        normalise = QK_NORMS[self.options.qk_norm]
        o, matrix = run_delta(
            normalise(q.unflatten(-1, (self.heads, self.K))),
            normalise(k.unflatten(-1, (self.heads, self.K))),
            v.unflatten(-1, (self.heads, self.V)),
            self._beta(x, context),
            None,
            context,
            state,
            self.direction if self.options.combine == "gate" else None,
        )
        out = context.expand(self.o_proj(self._gated(o, x).flatten(2)))
        return out, layer_state(self.name, matrix=matrix, conv=conv)

    def _activated(
        self, x: Tensor, context: SequenceContext, state: LayerState | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """q, k and v behind convolution and activation, and the convolution's new state."""
        q, k, v, conv = self.q_proj(x), self.k_proj(x), self.v_proj(x), None
        name = self.options.qk_activation
        if self.options.use_short_conv:
            q, k, v, conv = convolve_qkv((q, k, v), self.taps, context, state, "silu" if name == "silu" else None)
            if name == "silu":  # all three have it already
                return q, k, v, conv
        if name != "identity":
            q, k = FEATURE_MAPS[name](q), FEATURE_MAPS[name](k)
        return q, k, F.silu(v), conv

    def _beta(self, x: Tensor, context: SequenceContext) -> Tensor:
        """Write strengths ``[B, S, H]``, zero at padded positions (their key may be anything behind an activation)."""
        precise = torch.promote_types(x.dtype, torch.float32)
        largest = 2.0 if self.options.allow_neg_eigval else 1.0
        if self.options.use_beta:
            beta = shut(self.b_proj(x), context, -SHUT).to(precise).sigmoid()
            return beta if largest == 1.0 else largest * beta
        beta = x.new_full((*x.shape[:2], self.heads), largest, dtype=precise)
        return beta if context.front is None else beta * context.front

    def _gated(self, o: Tensor, x: Tensor) -> Tensor:
        """``o [B, S, H, V]`` through norm and gate, as far as there are any."""
        if not self.options.use_gate:
            return self.o_norm(o) if self.options.use_output_norm else o
        z = self.g_proj(x).unflatten(-1, (self.heads, self.V))
        return self.o_norm(o, z) if self.options.use_output_norm else o * F.silu(z)

    def flops(self, tokens: int, keys: float, directions: int = 1) -> float:
        convolutions = sum(each.flops(tokens, directions) for each in self.taps)
        # k S, k^T u, q S: 6 K V a head and token in the recurrent form
        return linear_flops(self, tokens) + convolutions + 6.0 * directions * tokens * self.heads * self.K * self.V
