r"""Gated DeltaNet (arXiv:2412.06464): decay the state, erase what the key held, write the new value.

.. math::
    \bar S = \alpha_t S_{t-1}, \quad u_t = \beta_t (v_t - k_t \bar S), \quad S_t = \bar S + k_t^\top u_t, \quad o_t = K^{-1/2} q_t S_t

:math:`\log \alpha_t = -e^{A} \mathrm{softplus}(a_t + b)` a value head, :math:`\beta_t = \sigma(W_b x_t)` (times 2 with
``allow_neg_eigval``, which lets a step reflect the state and so track parity). q, k, v pass a short causal convolution with SiLU;
q and k are L2-normalised per head. Output :math:`W_o [\mathrm{RMSNorm}(o_t) \odot \mathrm{silu}(z_t)]`.

Seen bidirectionally, the convolution becomes one centred kernel with shared taps and the two directions' outputs are averaged or
mixed by a learned gate a head (``combine``).
"""

import math
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
    check_positive,
    direction_start,
    layer_state,
    linear_flops,
    scaled_width,
    shut,
)
from latentcot.backbone.mixers.convolution import Initialization, ShortConvolution, convolve_qkv
from latentcot.backbone.mixers.directions import run_delta
from latentcot.backbone.norms import GatedRMSNorm, RMSNorm
from latentcot.backbone.state import LayerState
from latentcot.kernels import gated_delta_net, l2_norm

DT_MIN, DT_MAX, DT_FLOOR = 0.001, 0.1, 1e-4


@dataclass(frozen=True)
class GatedDeltaNetOptions:
    """
    Args:
        num_heads: query and key heads H.
        head_dim: key width K of a head.
        expand_v: V = ``head_dim · expand_v``.
        num_v_heads: value heads (a multiple of H: several value heads share a key head); ``None`` = H.
        use_short_conv: short convolution on q, k and v; ``False`` leaves their SiLU alone.
        conv_size: window W of the short convolution.
        use_gate: output gate silu(z).
        allow_neg_eigval: beta in (0, 2) instead of (0, 1).
        combine: how the two directions join when run bidirectionally: ``average``, or ``gate``, a parameter a head. An average
            can not tell what stood before a token from what stood behind it (reversing the input reverses the output), so that only
            attention layers know; gates start with every other head facing backwards.
    """

    num_heads: int = 4
    head_dim: int = 256
    expand_v: float = 1.0
    num_v_heads: int | None = None
    use_short_conv: bool = True
    conv_size: int = 4
    use_gate: bool = True
    allow_neg_eigval: bool = False
    combine: Literal["average", "gate"] = "average"

    def __post_init__(self) -> None:
        check_divides("num_heads", self.num_v_heads or self.num_heads, self.num_heads, "gated_deltanet (num_v_heads)")
        check_counts("gated_deltanet", head_dim=self.head_dim, conv_size=self.conv_size)
        check_positive("gated_deltanet", expand_v=self.expand_v)
        check_choice("gated_deltanet", "combine", self.combine, ("average", "gate"))


class GatedDeltaNet(Mixer):
    name = "gated_deltanet"

    def __init__(self, hidden_size: int, options: GatedDeltaNetOptions, norm_eps: float = 1e-6):
        super().__init__()
        self.options = options
        self.heads, self.K = options.num_heads, options.head_dim
        self.v_heads = options.num_v_heads or options.num_heads
        self.V = scaled_width("expand_v", options.head_dim, options.expand_v, "gated_deltanet")
        key_width, value_width = self.heads * self.K, self.v_heads * self.V
        self.q_proj = nn.Linear(hidden_size, key_width, bias=False)
        self.k_proj = nn.Linear(hidden_size, key_width, bias=False)
        self.v_proj = nn.Linear(hidden_size, value_width, bias=False)
        self.a_proj = nn.Linear(hidden_size, self.v_heads, bias=False)
        self.b_proj = nn.Linear(hidden_size, self.v_heads, bias=False)
        if options.use_short_conv:
            self.q_conv1d = ShortConvolution(key_width, options.conv_size)
            self.k_conv1d = ShortConvolution(key_width, options.conv_size)
            self.v_conv1d = ShortConvolution(value_width, options.conv_size)
        self.A_log = nn.Parameter(torch.zeros(self.v_heads))
        self.dt_bias = nn.Parameter(torch.zeros(self.v_heads))
        if options.use_gate:
            self.g_proj = nn.Linear(hidden_size, value_width, bias=False)
            self.o_norm: RMSNorm = GatedRMSNorm(self.V, norm_eps)
        else:
            self.o_norm = RMSNorm(self.V, norm_eps)
        if options.combine == "gate":
            self.direction = nn.Parameter(torch.zeros(self.v_heads))
        self.o_proj = nn.Linear(value_width, hidden_size, bias=False)

    @property
    def taps(self) -> list[ShortConvolution]:
        return [self.q_conv1d, self.k_conv1d, self.v_conv1d] if self.options.use_short_conv else []

    def init_weights(self, std: float, convolution: Initialization = "normal") -> None:
        super().init_weights(std, convolution)
        # A ~ U(0, 16): the open end is kept off zero, whose logarithm does not exist
        initialization.copy_(self.A_log, torch.empty(self.v_heads).uniform_(1e-4, 16).log())
        dt = torch.empty(self.v_heads).uniform_(math.log(DT_MIN), math.log(DT_MAX)).exp().clamp(min=DT_FLOOR)
        initialization.copy_(self.dt_bias, dt + torch.log(-torch.expm1(-dt)))  # inverse of softplus
        if self.options.combine == "gate":
            initialization.copy_(self.direction, direction_start(self.v_heads))

    def forward(
        self, hidden: Tensor, context: SequenceContext, state: LayerState | None = None
    ) -> tuple[Tensor, LayerState | None]:
        x = context.compact(hidden)
        q, k, v, conv = self.q_proj(x), self.k_proj(x), self.v_proj(x), None
        if self.options.use_short_conv:
            q, k, v, conv = convolve_qkv((q, k, v), self.taps, context, state)
        else:
            q, k, v = F.silu(q), F.silu(k), F.silu(v)
        q = q.unflatten(-1, (self.heads, self.K))
        k = k.unflatten(-1, (self.heads, self.K))
        v = v.unflatten(-1, (self.v_heads, self.V))
        # at a padded position k is zero, so nothing is erased or written there; its decay must not act either
        a, b = shut(self.a_proj(x), context, -SHUT), self.b_proj(x)
        if not context.causal:
            o, matrix = self._more_than_the_past(q, k, v, a, b, context, state)
        else:
            o, matrix = gated_delta_net(
                q,
                k,
                v,
                a,
                b,
                self.A_log,
                self.dt_bias,
                allow_neg_eigval=self.options.allow_neg_eigval,
                initial_state=None if state is None else state["matrix"],
                output_state=context.keep_state,
                cu_seqlens=context.cu_seqlens,
            )
        if self.options.use_gate:
            o = self.o_norm(o, self.g_proj(x).unflatten(-1, (self.v_heads, self.V)))
        else:
            o = self.o_norm(o)
        out = context.expand(self.o_proj(o.flatten(2)))
        return out, layer_state(self.name, matrix=matrix, conv=conv)

    def _more_than_the_past(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        a: Tensor,
        b: Tensor,
        context: SequenceContext,
        state: LayerState | None,
    ) -> tuple[Tensor, Tensor | None]:
        precise = torch.promote_types(a.dtype, torch.float32)
        beta = b.to(precise).sigmoid()
        if self.options.allow_neg_eigval:
            beta = 2 * beta
        return run_delta(
            l2_norm(q),
            l2_norm(k),
            v,
            beta,
            -self.A_log.to(precise).exp() * F.softplus(a.to(precise) + self.dt_bias.to(precise)),
            context,
            state,
            self.direction if self.options.combine == "gate" else None,
        )

    def flops(self, tokens: int, keys: float, directions: int = 1) -> float:
        convolutions = sum(each.flops(tokens, directions) for each in self.taps)
        # decay, k S, k^T u, q S: 8 K V a head and token in the recurrent form
        return linear_flops(self, tokens) + convolutions + 8.0 * directions * tokens * self.v_heads * self.K * self.V
