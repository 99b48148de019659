r"""HGRN2 (arXiv:2404.07904): HGRN's gate on a matrix state; what a channel forgets is what its key writes.

.. math::
    \alpha_t = \ell + (1 - \ell)\,\sigma(f_t), \quad S_t = \mathrm{diag}(\alpha_t) S_{t-1} + (1 - \alpha_t)^\top i_t, \quad
    o_t = K^{-1/2}\, \mathrm{silu}(q_t) S_t, \quad y_t = W_o\, \mathrm{RMSNorm}(o_t)

The norm runs over all heads together and there is no output gate. The bound :math:`\ell` is HGRN's, see
:mod:`latentcot.backbone.mixers.bounds`. Published defaults: K = V = 128, H = D/128, no short convolution.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from latentcot.backbone.context import SequenceContext
from latentcot.backbone.mixers.base import (
    SHUT,
    Mixer,
    check_counts,
    check_divides,
    layer_state,
    linear_flops,
    shut,
)
from latentcot.backbone.mixers.bounds import bounded_gate
from latentcot.backbone.mixers.convolution import ShortConvolution, convolve_all
from latentcot.backbone.mixers.directions import run_decay
from latentcot.backbone.norms import RMSNorm
from latentcot.backbone.state import LayerState
from latentcot.kernels import hgrn2_attention


@dataclass(frozen=True)
class HGRN2Options:
    """
    Args:
        num_heads: H; ``None`` = D / ``expand_ratio``. Must divide D: V = D / H.
        expand_ratio: key width K of a head; ``None`` = D / ``num_heads``.
        use_short_conv: short convolution, without an activation, on q, f and i; off in the study.
        conv_size: its window W.
        use_lower_bound: bound the forget gates by layer; ``False`` lets every layer forget at once.
    """

    num_heads: int | None = None
    expand_ratio: int | None = 128
    use_short_conv: bool = False
    conv_size: int = 4
    use_lower_bound: bool = True

    def __post_init__(self) -> None:
        if self.num_heads is None and self.expand_ratio is None:
            raise ValueError("hgrn2: num_heads and expand_ratio are both None, expected at least one of them")
        check_counts("hgrn2", num_heads=self.num_heads, expand_ratio=self.expand_ratio, conv_size=self.conv_size)


class HGRN2(Mixer):
    name = "hgrn2"

    def __init__(self, hidden_size: int, options: HGRN2Options, norm_eps: float = 1e-6):
        super().__init__()
        self.options = options
        if options.num_heads is not None:
            self.heads = options.num_heads
        else:
            assert options.expand_ratio is not None  # the options refuse both to be None
            self.heads = check_divides("expand_ratio", hidden_size, options.expand_ratio, "hgrn2")
        self.V = check_divides("num_heads", hidden_size, self.heads, "hgrn2")
        self.K = options.expand_ratio or self.V
        key_width = self.heads * self.K
        self.bound_width = key_width if options.use_lower_bound else 0
        self.q_proj = nn.Linear(hidden_size, key_width, bias=False)
        self.f_proj = nn.Linear(hidden_size, key_width, bias=False)
        self.i_proj = nn.Linear(hidden_size, hidden_size, bias=False)
        if options.use_short_conv:
            self.q_conv1d = ShortConvolution(key_width, options.conv_size)
            self.f_conv1d = ShortConvolution(key_width, options.conv_size)
            self.i_conv1d = ShortConvolution(hidden_size, options.conv_size)
        self.g_norm = RMSNorm(hidden_size, norm_eps)
        self.o_proj = nn.Linear(hidden_size, hidden_size, bias=False)

    @property
    def taps(self) -> list[ShortConvolution]:
        return [self.q_conv1d, self.f_conv1d, self.i_conv1d] if self.options.use_short_conv else []

    def forward(
        self, hidden: Tensor, context: SequenceContext, state: LayerState | None = None
    ) -> tuple[Tensor, LayerState | None]:
        x = context.compact(hidden)
        q, f, i, conv = self.q_proj(x), self.f_proj(x), self.i_proj(x), None
        if self.options.use_short_conv:
            (q, f, i), conv = convolve_all((q, f, i), self.taps, context, state)
        bound = self.lower_bound(context)
        bound = None if bound is None else bound.unflatten(-1, (self.heads, self.K))
        q = q.unflatten(-1, (self.heads, self.K))
        f = shut(f, context, SHUT).unflatten(-1, (self.heads, self.K))
        i = i.unflatten(-1, (self.heads, self.V))
        if context.causal:
            o, matrix = hgrn2_attention(
                q,
                f,
                i,
                bound,
                initial_state=None if state is None else state["matrix"],
                output_state=context.keep_state,
                cu_seqlens=context.cu_seqlens,
            )
        else:
            precise = torch.promote_types(f.dtype, torch.float32)
            k, log_decay = bounded_gate(f.to(precise), bound)
            o, matrix = run_decay(F.silu(q.to(precise)), k, i.to(precise), log_decay, context, state)
            o = o.to(i.dtype)
        out = context.expand(self.o_proj(self.g_norm(o.flatten(2))))
        return out, layer_state(self.name, matrix=matrix, conv=conv)

    def flops(self, tokens: int, keys: float, directions: int = 1) -> float:
        convolutions = sum(each.flops(tokens, directions) for each in self.taps)
        # write k^T v, decay, read q S: 6 K V a head and token in the recurrent form
        return linear_flops(self, tokens) + convolutions + 6.0 * directions * tokens * self.heads * self.K * self.V
