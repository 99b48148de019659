"""HGRN's scan from its two projections: gates, input and recurrence in one operator."""

import torch
import torch.nn.functional as F
from torch import Tensor

from latentcot.kernels import checks
from latentcot.kernels.dispatch import Backend, choose_backend
from latentcot.kernels.gated_scan.op import gated_scan

NAME = "hgrn_scan"


def hgrn_scan(
    i: Tensor,
    f: Tensor,
    lower_bound: Tensor | None = None,
    *,
    initial_state: Tensor | None = None,
    output_state: bool = False,
    cu_seqlens: Tensor | None = None,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor | None]:
    r"""The mixer of HGRN (arXiv:2311.04823) from its projections, with :math:`\sigma` the logistic function.

    .. math::
        \alpha_t = \ell + (1 - \ell)\,\sigma(f_t), \quad
        h_t = \alpha_t \odot h_{t-1} + (1 - \alpha_t) \odot \mathrm{silu}(i_t), \quad o_t = h_t

    On the Triton back end nothing between the projections and h is written to memory, neither forward nor backward; the
    others compose the gates and :func:`latentcot.kernels.gated_scan`. :math:`1 - \alpha` is formed as
    :math:`(1 - \ell)\,\sigma(-f)`, which keeps its digits where :math:`\alpha` is close to 1.

    Args:
        i: input projection ``[B,S,D]``.
        f: forget projection ``[B,S,D]``, before the logistic function.
        lower_bound: :math:`\ell`, ``[D]`` in [0, 1); None is zero (the first layer).
        initial_state: ``h_0``, ``[N,D]``; None is zero.
        output_state: return ``h_S`` too.
        cu_seqlens: ``[N+1]`` offsets of sequences packed into one row (B = 1).
        backend: as for :func:`latentcot.kernels.gated_scan`.

    Returns:
        ``(o [B,S,D], state [N,D] or None)``: o has the dtype of i, the state is float32 (float64 for float64 inputs).

    Raises:
        ValueError, TypeError: shapes, dtypes, devices, offsets or a back end that do not fit, named with what was
        expected.
    """
    checks.check_tensors(NAME, i=i, f=f, lower_bound=lower_bound, initial_state=initial_state)
    checks.check_dims(NAME, "i", i, "[B,S,D]")
    B, S, D = i.shape
    checks.check_shape(NAME, "f", f, "[B,S,D]", (B, S, D))
    if lower_bound is not None:
        checks.check_shape(NAME, "lower_bound", lower_bound, "[D]", (D,))
    dtype = checks.compute_dtype(i, f, lower_bound)
    chosen = choose_backend("gated_scan", i.device, dtype, backend).chosen
    if chosen != "triton" or i.numel() == 0:
        x, log_decay = _gates(i.to(dtype), f.to(dtype), None if lower_bound is None else lower_bound.to(dtype))
        o, state = gated_scan(
            x, log_decay, initial_state=initial_state, output_state=output_state, cu_seqlens=cu_seqlens,
            backend=chosen,
        )  # fmt: skip
        return o.to(i.dtype), state

    N = checks.offset_count(NAME, cu_seqlens, B, S)
    if initial_state is not None:
        checks.check_shape(NAME, "initial_state", initial_state, "[N,D]", (N, D))
        initial_state = initial_state.float()
    from latentcot.kernels.gated_scan.registered import hgrn_forward

    o, state = hgrn_forward(i, f, lower_bound, initial_state, cu_seqlens)
    return o, state if output_state else None


def _gates(i: Tensor, f: Tensor, lower_bound: Tensor | None) -> tuple[Tensor, Tensor]:
    """``((1 - alpha) silu(i), log alpha)``, each digit of both kept where alpha is close to 1 and where it is close to 0.

    The bound may be zero in places: its logarithm is never formed, and its gradient is right there too.
    """
    opening = torch.sigmoid(-f)
    if lower_bound is None:
        return F.silu(i) * opening, F.logsigmoid(f)
    room = 1 - lower_bound
    opening = room * opening
    alpha = lower_bound + room * torch.sigmoid(f)
    near_one = opening < 0.5
    # the branch not taken is fed a harmless number: its gradient would be a NaN that `where` multiplies by zero
    from_opening = torch.log1p(-opening.masked_fill(~near_one, 0.25))
    from_alpha = torch.log(alpha.clamp_min(torch.finfo(alpha.dtype).tiny).masked_fill(near_one, 1.0))
    return F.silu(i) * opening, torch.where(near_one, from_opening, from_alpha)
