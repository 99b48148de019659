r"""Lower bounds of the forget gates of HGRN and HGRN2, and the gate that respects them.

One matrix :math:`\Lambda` of L rows serves a whole model. With :math:`P = \mathrm{softmax}(\Lambda)` over layers, layer
:math:`\ell` may not forget faster than :math:`\ell_\ell = \sum_{m \le \ell} P_m - P_0`: nothing is asked of the first layer, and later
ones remember longer. Rows of layers that a hybrid made attention count in the softmax too and are otherwise unused.
Sources: arXiv:2311.04823 (HGRN), arXiv:2404.07904 (HGRN2), arXiv:2507.06457 (in hybrid stacks).
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from latentcot.backbone.mixers.base import Mixer


def bounds_parameter(mixers: Sequence[Mixer]) -> nn.Parameter | None:
    r""":math:`\Lambda` ``[L, width]`` of zeros for the mixers of a stack, in order; each is told its ``layer_index``.

    ``None`` when no mixer has a bound. Raises ``ValueError`` when they ask for different widths, which one matrix can not have.
    """
    for index, mixer in enumerate(mixers):
        mixer.layer_index = index
    widths = {mixer.bound_width: mixer.name for mixer in mixers if mixer.bound_width}
    if len(widths) > 1:
        asked = ", ".join(f"{name}: {width}" for width, name in widths.items())
        raise ValueError(
            f"lower_bounds: one matrix serves a whole model, but its mixers ask for different widths ({asked}); make expand_ratio "
            f"and num_heads agree, or set use_lower_bound=False"
        )
    return nn.Parameter(torch.zeros(len(mixers), *widths)) if widths else None


def stacked_bounds(weights: Tensor) -> Tensor:
    r"""Bounds of all layers ``[L, width]`` in [0, 1] from :math:`\Lambda` ``[L, width]``, at least fp32; row 0 is zero.

    :math:`P_0` is left out of the sum instead of being subtracted from it, which would cancel.
    """
    shares = weights.to(torch.promote_types(weights.dtype, torch.float32)).softmax(0)
    return F.pad(shares[1:].cumsum(0), (0, 0, 1, 0)).clamp(max=1)  # a rounded sum may pass 1: alpha would grow


def bounded_gate(f: Tensor, bound: Tensor | None) -> tuple[Tensor, Tensor]:
    r"""``(1 - alpha, log alpha)`` of :math:`\alpha = \ell + (1 - \ell)\,\sigma(f)`, each without cancellation.

    f ``[..., width]``, bound ``[width]`` or ``None`` for zero; both results have the dtype of f. Where f is large, 1 - alpha is exactly
    zero and log alpha too.
    """
    if bound is None:
        return torch.sigmoid(-f), F.logsigmoid(f)
    bound = bound.to(f.dtype)
    away = (1 - bound) * torch.sigmoid(-f)
    # a bound of zero has log alpha = logsigmoid(f): log1p(-1) and its gradient must not arise there
    return away, torch.where(bound > 0, torch.log1p(-away.masked_fill(bound == 0, 0.0)), F.logsigmoid(f))
