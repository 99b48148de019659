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
from latentcot.backbone.mixers.base import Mixer, check_divides, linear_flops
from latentcot.backbone.norms import GatedRMSNorm
from latentcot.backbone.state import LayerState
from latentcot.kernels import decay_attention

GATE_NORMALIZER = 16.0  # constants of the published format, not fields of its configuration
GATE_RANK = 16


@dataclass(frozen=True)
class GLAOptions:
    """
    Args:
        num_heads: H; must divide ``expand_k · D`` and ``expand_v · D``.
        expand_k: total key width over D; 0.5.
        expand_v: total value width over D; 1.
        clamp_min: lower bound of the log-decay, or ``None``.
    """

    num_heads: int = 4
    expand_k: float = 0.5
    expand_v: float = 1.0
    clamp_min: float | None = None

    def __post_init__(self) -> None:
        if self.clamp_min is not None and self.clamp_min > 0:
            raise ValueError(f"gla: clamp_min bounds a log-decay, so it must be <= 0, got {self.clamp_min}")


class GatedLinearAttention(Mixer):
    name = "gla"

    def __init__(self, hidden_size: int, options: GLAOptions, norm_eps: float = 1e-6):
        super().__init__()
        self.options = options
        key_width, value_width = int(hidden_size * options.expand_k), int(hidden_size * options.expand_v)
        self.heads = options.num_heads
        self.K = check_divides("num_heads", key_width, self.heads, "gla")
        self.V = check_divides("num_heads", value_width, self.heads, "gla")
        self.q_proj = nn.Linear(hidden_size, key_width, bias=False)
        self.k_proj = nn.Linear(hidden_size, key_width, bias=False)
        self.v_proj = nn.Linear(hidden_size, value_width, bias=False)
        self.g_proj = nn.Linear(hidden_size, value_width, bias=False)
        self.gk_proj = nn.Sequential(
            nn.Linear(hidden_size, GATE_RANK, bias=False), nn.Linear(GATE_RANK, key_width, bias=True)
        )
        self.g_norm_swish_gate = GatedRMSNorm(self.V, norm_eps)
        self.o_proj = nn.Linear(value_width, hidden_size, bias=False)

    def forward(
        self, hidden: Tensor, context: SequenceContext, state: LayerState | None = None
    ) -> tuple[Tensor, LayerState | None]:
        x = context.compact(hidden)
        q = self.q_proj(x).unflatten(-1, (self.heads, self.K))
        k = self.k_proj(x).unflatten(-1, (self.heads, self.K))
        v = self.v_proj(x).unflatten(-1, (self.heads, self.V))
        precise = torch.promote_types(x.dtype, torch.float32)
        log_decay = F.logsigmoid(self.gk_proj(x).to(precise)) / GATE_NORMALIZER
        if self.options.clamp_min is not None:
            log_decay = log_decay.clamp(min=self.options.clamp_min)
        if context.front is not None:
            log_decay = log_decay * context.front  # a padded token neither writes (k = 0: x is zero there) nor forgets
        log_decay = log_decay.unflatten(-1, (self.heads, self.K))
        o, matrix = decay_attention(
            q,
            k,
            v,
            log_decay,
            initial_state=None if state is None else state["matrix"],
            output_state=context.keep_state,
            cu_seqlens=context.cu_seqlens,
            visibility=context.visibility,
        )
        o = self.g_norm_swish_gate(o, self.g_proj(x).unflatten(-1, (self.heads, self.V)))
        out = context.expand(self.o_proj(o.flatten(2)))
        return out, None if matrix is None else LayerState(self.name, {"matrix": matrix})

    def flops(self, tokens: int, keys: float, directions: int = 1) -> float:
        # write k^T v, decay, read q S: 6 K V a head and token in the recurrent form
        return linear_flops(self, tokens) + 6.0 * directions * tokens * self.heads * self.K * self.V
