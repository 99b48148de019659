"""The public gated scan: checks, dispatch, packing."""

import torch
from torch import Tensor

from latentcot.kernels import checks
from latentcot.kernels.cpu_threads import missing_for_compiled
from latentcot.kernels.dispatch import Backend, choose_backend
from latentcot.kernels.gated_scan import chunked, reference
from latentcot.kernels.gated_scan.step import gated_scan_step
from latentcot.kernels.packing import Packing
from latentcot.kernels.visibility import Causal, Visibility, check_visibility

NAME = "gated_scan"


def gated_scan(
    x: Tensor,
    log_decay: Tensor,
    *,
    initial_state: Tensor | None = None,
    output_state: bool = False,
    cu_seqlens: Tensor | None = None,
    visibility: Visibility = Causal(),
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor | None]:
    r"""Linear recurrence per channel, the mixer of HGRN (arXiv:2311.04823): :math:`h_t = e^{g_t} \odot h_{t-1} + x_t`.

    Args:
        x: inputs ``[B,S,D]``.
        log_decay: g, ``[B,S,D]``, never above zero.
        initial_state: ``h_0``, ``[N,D]``; None is zero.
        output_state: return ``h_S`` too.
        cu_seqlens: ``[N+1]`` offsets of sequences packed into one row (B = 1).
        visibility: ``Causal()`` only.
        backend: ``"auto"``, ``"triton"``, ``"compiled"``, ``"chunked"`` or ``"reference"`` (see
            :func:`latentcot.kernels.explain_backend`).

    Returns:
        ``(o [B,S,D], state [N,D] or None)``: o has the dtype of x, the state is float32 (float64 for float64 inputs).

    Raises:
        ValueError, TypeError: shapes, dtypes, devices, offsets or a back end that do not fit, named with what was
        expected.
    """
    checks.check_tensors(NAME, x=x, log_decay=log_decay, initial_state=initial_state)
    checks.check_dims(NAME, "x", x, "[B,S,D]")
    B, S, D = x.shape
    checks.check_shape(NAME, "log_decay", log_decay, "[B,S,D]", (B, S, D))
    check_visibility(NAME, visibility, with_state=False)
    if not isinstance(visibility, Causal):
        raise ValueError(f"{NAME}: Bidirectional is not defined for this operator")
    N = checks.offset_count(NAME, cu_seqlens, B, S)
    if initial_state is not None:
        checks.check_shape(NAME, "initial_state", initial_state, "[N,D]", (N, D))
    dtype = checks.compute_dtype(x, log_decay)
    chosen = choose_backend(NAME, x.device, dtype, backend).chosen
    checks.check_decay(NAME, log_decay, in_kernel=chosen == "triton")

    if initial_state is not None:
        initial_state = initial_state.to(dtype)
    if x.numel() == 0:
        state = x.new_zeros(N, D, dtype=dtype) if initial_state is None else initial_state.clone()
        return x.clone(), state if output_state else None
    if chosen == "triton":
        from latentcot.kernels.gated_scan.registered import scan_forward

        o, state = scan_forward(x, log_decay, initial_state, cu_seqlens)
        return o, state if output_state else None

    packing = None if cu_seqlens is None else Packing(cu_seqlens.tolist(), x.device)
    wide, log_decay = x.to(dtype), log_decay.to(dtype)
    if packing is not None:
        wide, log_decay = packing.unpack(wide), packing.unpack(log_decay)
    if chosen == "reference":
        o, state = reference.gated_scan(wide, log_decay, initial_state)
    elif wide.shape[1] == 1 and not torch.is_grad_enabled():
        step, state = gated_scan_step(wide[:, 0], log_decay[:, 0], initial_state)
        o = step.unsqueeze(1)
    elif chosen == "compiled" and missing_for_compiled(wide, log_decay, initial_state) is None:
        from latentcot.kernels.cpu_gated_scan import gated_scan as run_compiled

        o, state = run_compiled(wide, log_decay, initial_state)
    else:
        o, state = chunked.gated_scan(wide, log_decay, initial_state)
    if packing is not None:
        o = packing.pack(o)
    # a copy: the last state must not keep all outputs alive, nor change when the caller changes o in place
    return o.to(x.dtype), state.clone() if output_state else None
