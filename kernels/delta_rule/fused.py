"""Gated DeltaNet's mixer from its projections: norms, gates and the delta rule in one operator."""

import torch
import torch.nn.functional as F
from torch import Tensor

from latentcot.kernels import checks
from latentcot.kernels.delta_rule.op import check_tokens, delta_rule
from latentcot.kernels.dispatch import Backend, choose_backend, full_precision
from latentcot.kernels.normalisation import l2_norm

NAME = "gated_delta_net"


def gated_delta_net(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    A_log: Tensor,
    dt_bias: Tensor,
    *,
    scale: float | None = None,
    allow_neg_eigval: bool = False,
    initial_state: Tensor | None = None,
    output_state: bool = False,
    cu_seqlens: Tensor | None = None,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor | None]:
    r"""The recurrence of Gated DeltaNet (arXiv:2412.06464) on what its projections and convolutions give.

    .. math::
        \hat q = \frac{q}{\sqrt{\sum q^2 + 10^{-6}}}, \quad \hat k = \frac{k}{\sqrt{\sum k^2 + 10^{-6}}}, \quad
        \beta = \sigma(b), \quad g = -e^{A_{\log}}\, \mathrm{softplus}(a + dt), \\
        o = \mathrm{delta\_rule}(\hat q, \hat k, v, \beta, g)

    On the Triton back end gates are part of the kernels, forward and backward, and so is the norms' backward; the
    others compose :func:`latentcot.kernels.l2_norm` and :func:`latentcot.kernels.delta_rule`.

    Args:
        q: ``[B,S,H,K]``, before its norm.
        k: ``[B,S,H,K]``, before its norm.
        v: ``[B,S,H_v,V]`` with H_v a multiple of H: q/k head h serves value heads ``h*m … h*m + m-1``, m = H_v/H.
        a: input of the decay ``[B,S,H_v]``.
        b: input of the write strength ``[B,S,H_v]``.
        A_log: logarithm of the rate ``[H_v]``.
        dt_bias: ``[H_v]``, added to a.
        scale: s of the delta rule; None is ``K ** -0.5``.
        allow_neg_eigval: double beta, so that it reaches 2 and a token can turn a component of the state around.
        initial_state: ``S_0``, ``[N,H_v,K,V]``; None is zero.
        output_state: return the last state too.
        cu_seqlens: ``[N+1]`` offsets of sequences packed into one row (B = 1).
        backend: as for :func:`latentcot.kernels.delta_rule`.

    Returns:
        ``(o [B,S,H_v,V], state [N,H_v,K,V] or None)``: o has the dtype of v, the state is float32 (float64 for float64
        inputs).

    Raises:
        ValueError, TypeError: shapes, dtypes, devices, offsets or a back end that do not fit, named with what was
        expected.
    """
    checks.check_tensors(NAME, q=q, k=k, v=v, a=a, b=b, A_log=A_log, dt_bias=dt_bias, initial_state=initial_state)
    checks.check_dims(NAME, "k", k, "[B,S,H,K]")
    B, S, K, _, Hv, V = check_tokens(NAME, q, k, v, b, None)
    checks.check_shape(NAME, "a", a, "[B,S,H_v]", (B, S, Hv))
    checks.check_shape(NAME, "A_log", A_log, "[H_v]", (Hv,))
    checks.check_shape(NAME, "dt_bias", dt_bias, "[H_v]", (Hv,))
    wide = checks.compute_dtype(q, k, v)
    chosen = choose_backend("delta_rule", q.device, wide, backend).chosen
    largest = 2.0 if allow_neg_eigval else 1.0
    factor = K**-0.5 if scale is None else float(scale)
    one_token = S == 1 and not torch.is_grad_enabled()  # has a way of its own
    if chosen != "triton" or v.numel() == 0 or one_token:
        with full_precision(q.device):
            beta = largest * b.to(wide).sigmoid()
            log_decay = -A_log.to(wide).exp() * F.softplus(a.to(wide) + dt_bias.to(wide))
        return delta_rule(
            l2_norm(q), l2_norm(k), v, beta, log_decay, scale=factor, initial_state=initial_state,
            output_state=output_state, cu_seqlens=cu_seqlens, backend=chosen,
        )  # fmt: skip

    checks.check_widths(NAME, K, V)
    N = checks.offset_count(NAME, cu_seqlens, B, S)
    if initial_state is not None:
        checks.check_shape(NAME, "initial_state", initial_state, "[N,H_v,K,V]", (N, Hv, K, V))
        initial_state = initial_state.float()
    if cu_seqlens is not None:
        cu_seqlens = cu_seqlens.to(device=q.device, dtype=torch.int64)
    from latentcot.kernels.delta_rule import triton_fused

    dtype = checks.kernel_dtype(q, k, v)
    with full_precision(q.device):
        o, state = triton_fused.gated_delta_net(
            q.to(dtype), k.to(dtype), v.to(dtype), a, b, A_log, dt_bias, factor, largest,
            initial_state, cu_seqlens,
        )  # fmt: skip
    return o.to(v.dtype), state if output_state else None
