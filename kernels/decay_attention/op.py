"""The public decay attention: checks, dispatch, packing, both directions, blocks."""

import torch
from torch import Tensor

from latentcot.kernels import checks
from latentcot.kernels.blocks import CausalOperator, Stream, block_streams
from latentcot.kernels.cpu_threads import missing_for_compiled, worth_compiling
from latentcot.kernels.decay_attention import chunked, reference
from latentcot.kernels.decay_attention.step import decay_attention_step
from latentcot.kernels.dispatch import Backend, choose_backend, full_precision
from latentcot.kernels.packing import Packing, shifted_gate, split_directions, with_reversed
from latentcot.kernels.visibility import Bidirectional, BlockCausal, Causal, Visibility, check_visibility

NAME = "decay_attention"


def decay_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None = None,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_state: bool = False,
    cu_seqlens: Tensor | None = None,
    visibility: Visibility = Causal(),
    backend: Backend = "auto",
    lengths: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    r"""Linear attention whose memory fades: :math:`S_t = \mathrm{diag}(e^{g_t}) S_{t-1} + k_t^\top v_t`,
    :math:`o_t = s\, q_t S_t`.

    Serves linear attention (no decay), RetNet (arXiv:2307.08621, one constant per head), simple gates (one per head and
    token), GLA (arXiv:2312.06635) and HGRN2 (arXiv:2404.07904) (one per key channel).

    Args:
        q, k: ``[B,S,H,K]``. v: ``[B,S,H,V]``.
        log_decay: g <= 0: None, ``[H]``, ``[B,S,H]`` or ``[B,S,H,K]``.
        scale: s; None is ``K ** -0.5``.
        initial_state: ``S_0``, ``[N,H,K,V]``; None is zero.
        output_state: return the last state too.
        cu_seqlens: ``[N+1]`` offsets of sequences packed into one row (B = 1).
        visibility: ``Causal()``; ``Bidirectional()``: this operator forward and on time-reversed inputs, gates
            included, the diagonal counted once; ``Bidirectional(gate="next")``: weights ``exp(-|G_i - G_j|)``, the same
            in both directions; ``BlockCausal(length, ...)``: see there.
        backend: ``"auto"``, ``"triton"``, ``"compiled"``, ``"chunked"`` or ``"reference"`` (see
            :func:`latentcot.kernels.explain_backend`).
        lengths: ``[B]`` real tokens of right-padded rows, with ``BlockCausal`` (not together with ``cu_seqlens``): the
            softmax inside a block leaves padded keys out. Padded tokens must be neutral (see Returns).

    Returns:
        ``(o [B,S,H,V], state [N,H,K,V] or None)``: o has the dtype of v, the state is float32 (float64 for float64
        inputs). Inputs of 16 bits are summed in float32. A padded token with k = 0 and log_decay = 0 changes nothing.

    Raises:
        ValueError, TypeError: shapes, dtypes, devices, offsets, a visibility or a back end that do not fit, named with
            what was expected; a state together with ``Bidirectional``.
    """
    checks.check_tensors(NAME, q=q, k=k, v=v, log_decay=log_decay, initial_state=initial_state)
    B, S, H, K, V = check_tokens(NAME, q, k, v, log_decay)
    check_visibility(NAME, visibility, with_state=initial_state is not None or output_state)
    if isinstance(visibility, Bidirectional) and visibility.combine is not None:
        raise ValueError(
            f"{NAME}: combine={visibility.combine!r} is for the delta rule; the directions of this operator are "
            f"always summed with the diagonal counted once (combine=None)"
        )
    dtype = checks.compute_dtype(q, k, v)
    chosen = choose_backend(NAME, q.device, dtype, backend).chosen
    if log_decay is not None:
        checks.check_decay(NAME, log_decay, in_kernel=chosen == "triton")
    N = checks.offset_count(NAME, cu_seqlens, B, S)
    if initial_state is not None:
        checks.check_shape(NAME, "initial_state", initial_state, "[N,H,K,V]", (N, H, K, V))
    checks.check_block_lengths(NAME, lengths, B, visibility, cu_seqlens)
    wide = dtype
    if chosen == "triton":
        checks.check_widths(NAME, K, V)
        dtype, wide = checks.kernel_dtype(q, k, v), torch.float32

    out_dtype = v.dtype
    q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    log_decay = None if log_decay is None else log_decay.to(wide)
    initial_state = None if initial_state is None else initial_state.to(wide)
    factor = K**-0.5 if scale is None else float(scale)
    if S == 0 or N == 0 or v.numel() == 0:
        state = q.new_zeros(N, H, K, V, dtype=wide) if initial_state is None else initial_state.clone()
        return v.to(out_dtype, copy=True), state if output_state else None
    with full_precision(q.device):
        if chosen == "triton" and not isinstance(visibility, BlockCausal):
            o, state = _in_kernels(q, k, v, log_decay, factor, initial_state, output_state, cu_seqlens, visibility)
            return o.to(out_dtype), state
        packing = None if cu_seqlens is None else Packing(cu_seqlens.tolist(), q.device)
        if packing is not None:
            q, k, v = packing.unpack(q), packing.unpack(k), packing.unpack(v)
            if log_decay is not None and log_decay.dim() > 1:
                log_decay = packing.unpack(log_decay)
            elif log_decay is not None:  # a padded token has no gate
                real = packing.unpack(log_decay.new_ones(1, S))
                log_decay = real.unsqueeze(-1) * log_decay
        if isinstance(visibility, Bidirectional):
            o, state = _both_directions(q, k, v, log_decay, factor, visibility, chosen), None
        elif isinstance(visibility, BlockCausal):
            o, _, state = block_streams(
                causal_operator(chosen),
                Stream(q, k, v, log_decay),
                None,
                visibility,
                factor,
                initial_state=initial_state,
                output_state=output_state,
                lengths=lengths if packing is None else packing.lengths,
            )
        else:
            o, state = _causal(q, k, v, log_decay, factor, initial_state, output_state, chosen)
    if packing is not None:
        o = packing.pack(o)
    return o.to(out_dtype), state


def check_tokens(
    name: str, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None
) -> tuple[int, int, int, int, int]:
    """(B, S, H, K, V); raises in the name of ``name`` when a shape does not fit."""
    checks.check_dims(name, "q", q, "[B,S,H,K]")
    B, S, H, K = q.shape
    checks.check_shape(name, "k", k, "[B,S,H,K]", (B, S, H, K))
    checks.check_dims(name, "v", v, "[B,S,H,V]")
    V = v.shape[-1]
    checks.check_shape(name, "v", v, "[B,S,H,V]", (B, S, H, V))
    if log_decay is not None and tuple(log_decay.shape) not in ((H,), (B, S, H), (B, S, H, K)):
        raise ValueError(
            f"{name}: log_decay has shape {tuple(log_decay.shape)}, expected None, [H] = {(H,)}, "
            f"[B,S,H] = {(B, S, H)} or [B,S,H,K] = {(B, S, H, K)}"
        )
    return B, S, H, K, V


def causal_operator(chosen: str) -> CausalOperator:
    """The causal operator on the back end ``chosen``, as the block forms call it."""

    def run(x: Stream, scale: float, initial_state: Tensor | None, output_state: bool) -> tuple[Tensor, Tensor | None]:
        return _causal(x.q, x.k, x.v, x.log_decay, scale, initial_state, output_state, chosen)

    return run


def _causal(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    scale: float,
    initial_state: Tensor | None,
    output_state: bool,
    chosen: str,
) -> tuple[Tensor, Tensor | None]:
    if chosen == "reference":
        o, state = reference.decay_attention(q, k, v, log_decay, scale, initial_state)
        return o, state if output_state else None
    if q.shape[1] == 1 and not torch.is_grad_enabled():
        g = log_decay if log_decay is None or log_decay.dim() == 1 else log_decay[:, 0]
        o, state = decay_attention_step(q[:, 0], k[:, 0], v[:, 0], g, scale, initial_state)
        return o.unsqueeze(1), state if output_state else None
    if chosen == "triton":
        from latentcot.kernels.decay_attention import triton

        o, state = triton.decay_attention(q, k, v, log_decay, scale, initial_state)
        return o, state if output_state else None
    fits = chosen == "compiled" and worth_compiling(NAME, q.shape[1], log_decay)
    if fits and missing_for_compiled(q, k, v, log_decay, initial_state) is None:
        from latentcot.kernels.cpu_decay_attention import decay_attention as run_compiled

        o, state = run_compiled(q, k, v, log_decay, scale, initial_state, output_state=output_state)
    else:
        o, state = chunked.decay_attention(q, k, v, log_decay, scale, initial_state, output_state=output_state)
    return o, state if output_state else None


def _in_kernels(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    scale: float,
    initial_state: Tensor | None,
    output_state: bool,
    cu_seqlens: Tensor | None,
    visibility: Visibility,
) -> tuple[Tensor, Tensor | None]:
    """Causal or bidirectional in Triton: packed rows stay packed, and the backward direction is read right to left."""
    from latentcot.kernels.decay_attention import triton

    cu_seqlens = None if cu_seqlens is None else cu_seqlens.to(device=q.device, dtype=torch.int64)
    if isinstance(visibility, Causal):
        if q.shape[1] == 1 and not torch.is_grad_enabled():
            return _causal(q, k, v, log_decay, scale, initial_state, output_state, "triton")
        o, state = triton.decay_attention(q, k, v, log_decay, scale, initial_state, cu_seqlens)
        return o, state if output_state else None
    forward, _ = triton.decay_attention(q, k, v, log_decay, scale, None, cu_seqlens)
    backwards = log_decay
    if (
        log_decay is not None
        and log_decay.dim() > 1
        and isinstance(visibility, Bidirectional)
        and visibility.gate == "own"
    ):
        # right to left the kernels count the gates behind the reader up to the token read: move each gate one on
        backwards = torch.cat([torch.zeros_like(log_decay[:, :1]), log_decay[:, :-1]], 1)
    backward, _ = triton.decay_attention(q, k, v, backwards, scale, None, cu_seqlens, reverse=True)
    wide = torch.float32
    diagonal = (q.to(wide) * k.to(wide)).sum(-1, keepdim=True) * (scale * v.to(wide))
    return (forward.to(wide) + backward.to(wide) - diagonal).to(v.dtype), None


def _both_directions(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    scale: float,
    visibility: Bidirectional,
    chosen: str,
) -> Tensor:
    """Forward + backward − diagonal; both directions run as one batch."""
    if log_decay is not None and log_decay.dim() > 1:
        backwards = shifted_gate(log_decay) if visibility.gate == "next" else log_decay
        log_decay = torch.cat([log_decay, backwards.flip(1)])
    both, _ = _causal(with_reversed(q), with_reversed(k), with_reversed(v), log_decay, scale, None, False, chosen)
    forward, backward = split_directions(both)
    diagonal = (q * k).sum(-1, keepdim=True) * (scale * v)
    return forward + backward - diagonal
