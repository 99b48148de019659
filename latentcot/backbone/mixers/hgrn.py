r"""HGRN (arXiv:2311.04823): one gated number a channel, whose forgetting is bounded from below layer by layer.

.. math::
    \alpha_t = \ell + (1 - \ell)\,\sigma(f_t), \quad h_t = \alpha_t \odot h_{t-1} + (1 - \alpha_t) \odot \mathrm{silu}(i_t), \quad
    y_t = W_o [\mathrm{RMSNorm}(h_t) \odot \mathrm{silu}(z_t)]

i, f and z are projections of x without bias; the norm runs over the full width. The bound :math:`\ell` of each layer comes from one
matrix of the model, see :mod:`latentcot.backbone.mixers.bounds`. State: one fp32 number a channel.
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
    check_positive,
    layer_state,
    linear_flops,
    scaled_width,
    shut,
)
from latentcot.backbone.mixers.bounds import bounded_gate
from latentcot.backbone.mixers.convolution import ShortConvolution, convolve_all
from latentcot.backbone.mixers.directions import scan_blocks
from latentcot.backbone.norms import GatedRMSNorm
from latentcot.backbone.state import LayerState
from latentcot.kernels import Bidirectional, BlockCausal, hgrn_scan


@dataclass(frozen=True)
class HGRNOptions:
    """
    Args:
        expand_ratio: width of the state over D; 1.
        use_short_conv: short convolution, without an activation, on i and f; off in the study.
        conv_size: its window W.
        use_lower_bound: bound the forget gates by layer; ``False`` lets every layer forget at once.
        elementwise_affine: the output norm has a weight.
    """

    expand_ratio: float = 1
    use_short_conv: bool = False
    conv_size: int = 4
    use_lower_bound: bool = True
    elementwise_affine: bool = True

    def __post_init__(self) -> None:
        check_positive("hgrn", expand_ratio=self.expand_ratio)
        check_counts("hgrn", conv_size=self.conv_size)


class HGRN(Mixer):
    name = "hgrn"

    def __init__(self, hidden_size: int, options: HGRNOptions, norm_eps: float = 1e-6):
        super().__init__()
        self.options = options
        self.width = scaled_width("expand_ratio", hidden_size, options.expand_ratio, "hgrn")
        self.bound_width = self.width if options.use_lower_bound else 0
        self.i_proj = nn.Linear(hidden_size, self.width, bias=False)
        self.f_proj = nn.Linear(hidden_size, self.width, bias=False)
        self.g_proj = nn.Linear(hidden_size, self.width, bias=False)
        if options.use_short_conv:
            self.i_conv1d = ShortConvolution(self.width, options.conv_size)
            self.f_conv1d = ShortConvolution(self.width, options.conv_size)
        self.g_norm = GatedRMSNorm(self.width, norm_eps, options.elementwise_affine)
        self.o_proj = nn.Linear(self.width, hidden_size, bias=False)

    @property
    def taps(self) -> list[ShortConvolution]:
        return [self.i_conv1d, self.f_conv1d] if self.options.use_short_conv else []

    def forward(
        self, hidden: Tensor, context: SequenceContext, state: LayerState | None = None
    ) -> tuple[Tensor, LayerState | None]:
        """See :meth:`Mixer.forward`. Raises ``ValueError`` if tokens are to see the whole sequence: the scan has one direction."""
        if isinstance(context.visibility, Bidirectional):
            raise ValueError(
                f"hgrn: visibility={context.visibility} is not defined for it, expected Causal(); mixers with a matrix state "
                f"(gla, hgrn2, retnet, deltanet, gated_deltanet) and attention see both ways"
            )
        x = context.compact(hidden)
        i, f, conv = self.i_proj(x), self.f_proj(x), None
        if self.options.use_short_conv:
            (i, f), conv = convolve_all((i, f), self.taps, context, state)
        f = shut(f, context, SHUT)
        if isinstance(context.visibility, BlockCausal):
            precise = torch.promote_types(f.dtype, torch.float32)
            opening, log_decay = bounded_gate(f.to(precise), self.lower_bound(context))
            h, vector = scan_blocks(F.silu(i.to(precise)) * opening, log_decay, context, state)
            h = h.to(i.dtype)
        else:
            h, vector = hgrn_scan(
                i,
                f,
                self.lower_bound(context),
                initial_state=None if state is None else state["vector"],
                output_state=context.keep_state,
                cu_seqlens=context.cu_seqlens,
            )
        out = context.expand(self.o_proj(self.g_norm(h, self.g_proj(x))))
        return out, layer_state(self.name, vector=vector, conv=conv)

    def flops(self, tokens: int, keys: float, directions: int = 1) -> float:
        convolutions = sum(each.flops(tokens) for each in self.taps)
        # forming the gate 2, the input 1, one multiply-add for the state: 5 a channel and token, as the study counts
        return linear_flops(self, tokens) + convolutions + 5.0 * tokens * self.width
