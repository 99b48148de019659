"""HGRN2's mixer from its projections: activations, gates and decay attention in one operator."""

import torch
import torch.nn.functional as F
from torch import Tensor

from latentcot.kernels import checks
from latentcot.kernels.decay_attention.op import decay_attention
from latentcot.kernels.dispatch import Backend, choose_backend, full_precision

NAME = "hgrn2_attention"


def hgrn2_attention(
    q: Tensor,
    f: Tensor,
    i: Tensor,
    lower_bound: Tensor | None = None,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_state: bool = False,
    cu_seqlens: Tensor | None = None,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor | None]:
    r"""The mixer of HGRN2 (arXiv:2404.07904) from its projections, with :math:`\sigma` the logistic function.

    .. math::
        \alpha_t = \ell + (1 - \ell)\,\sigma(f_t), \quad
        S_t = \mathrm{diag}(\alpha_t) S_{t-1} + (1 - \alpha_t)^\top i_t, \quad o_t = s\,\mathrm{silu}(q_t) S_t

    On the Triton back end activations, keys and gates are made inside the kernels, forward and backward; the others
    compose them with :func:`latentcot.kernels.decay_attention`. :math:`1 - \alpha` is formed as
    :math:`(1 - \ell)\,\sigma(-f)`, which keeps its digits where :math:`\alpha` is close to 1.

    Args:
        q: ``[B,S,H,K]``, before its SiLU.
        f: forget projection ``[B,S,H,K]``, before the logistic function.
        i: values ``[B,S,H,V]``.
        lower_bound: :math:`\ell`, ``[H,K]`` in [0, 1); None is zero (the first layer).
        scale: s; None is ``K ** -0.5``.
        initial_state: ``S_0``, ``[N,H,K,V]``; None is zero.
        output_state: return the last state too.
        cu_seqlens: ``[N+1]`` offsets of sequences packed into one row (B = 1).
        backend: as for :func:`latentcot.kernels.decay_attention`.

    Returns:
        ``(o [B,S,H,V], state [N,H,K,V] or None)``: o has the dtype of i, the state is float32 (float64 for float64
        inputs).

    Raises:
        ValueError, TypeError: shapes, dtypes, devices, offsets or a back end that do not fit, named with what was
            expected.
    """
    checks.check_tensors(NAME, q=q, f=f, i=i, lower_bound=lower_bound, initial_state=initial_state)
    checks.check_dims(NAME, "q", q, "[B,S,H,K]")
    B, S, H, K = q.shape
    checks.check_shape(NAME, "f", f, "[B,S,H,K]", (B, S, H, K))
    checks.check_dims(NAME, "i", i, "[B,S,H,V]")
    V = i.shape[-1]
    checks.check_shape(NAME, "i", i, "[B,S,H,V]", (B, S, H, V))
    if lower_bound is not None:
        checks.check_shape(NAME, "lower_bound", lower_bound, "[H,K]", (H, K))
    dtype = checks.compute_dtype(q, f, i)
    chosen = choose_backend("decay_attention", q.device, dtype, backend).chosen
    if chosen != "triton" or i.numel() == 0 or S == 1:
        queries, keys, log_decay = _activated(q.to(dtype), f.to(dtype), lower_bound)
        o, state = decay_attention(
            queries, keys, i.to(dtype), log_decay, scale=scale, initial_state=initial_state, output_state=output_state,
            cu_seqlens=cu_seqlens, backend=chosen,
        )  # fmt: skip
        return o.to(i.dtype), state

    from latentcot.kernels.decay_attention import triton

    checks.check_widths(NAME, K, V)
    N = checks.offset_count(NAME, cu_seqlens, B, S)
    if initial_state is not None:
        checks.check_shape(NAME, "initial_state", initial_state, "[N,H,K,V]", (N, H, K, V))
        initial_state = initial_state.float()
    narrow = checks.kernel_dtype(q, f, i)
    bound = torch.zeros(H, K, dtype=torch.float32, device=q.device) if lower_bound is None else lower_bound.float()
    offsets = None if cu_seqlens is None else cu_seqlens.to(device=q.device, dtype=torch.int64)
    with full_precision(q.device):
        o, state = triton.decay_attention(
            q.to(narrow), f.to(narrow), i.to(narrow), None, K**-0.5 if scale is None else float(scale), initial_state,
            offsets, bound=bound.contiguous(),
        )  # fmt: skip
    return o.to(i.dtype), state if output_state else None


def _activated(q: Tensor, f: Tensor, lower_bound: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """(silu(q), 1 - alpha, log alpha)."""
    keys, log_decay = torch.sigmoid(-f), F.logsigmoid(f)
    if lower_bound is not None:
        bound = lower_bound.to(f.dtype)
        keys = (1 - bound) * keys
        bounded = torch.log1p(-keys)
        # where the bound is zero alpha = sigmoid(f), whose logarithm logsigmoid keeps exact for very negative f; there
        # d log(alpha) / d bound = e^{-f}
        at_zero = log_decay + bound * torch.exp(-f.detach()).clamp_max(1e30)
        log_decay = torch.where(bound > 0, bounded, at_zero)
    return F.silu(q), keys, log_decay
