"""The public delta rule: checks, dispatch, packing, reflections, grouped values, both directions, blocks."""

import torch
from torch import Tensor

from latentcot.kernels import checks
from latentcot.kernels.blocks import CausalOperator, Stream, block_streams
from latentcot.kernels.cpu_threads import missing_for_compiled, worth_compiling
from latentcot.kernels.delta_rule import chunked, reference
from latentcot.kernels.delta_rule.step import delta_rule_step
from latentcot.kernels.dispatch import Backend, choose_backend, full_precision
from latentcot.kernels.packing import Packing, split_directions, with_reversed
from latentcot.kernels.visibility import Bidirectional, BlockCausal, Causal, Visibility, check_visibility

NAME = "delta_rule"


def delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor | None = None,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_state: bool = False,
    cu_seqlens: Tensor | None = None,
    visibility: Visibility = Causal(),
    backend: Backend = "auto",
    direction_gate: Tensor | None = None,
    lengths: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    r"""Memory that erases what a key held before it writes.

    .. math::
        \bar S = \mathrm{diag}(e^{g_t}) S_{t-1}, \quad u_t = \beta_t (v_t - k_t \bar S), \quad
        S_t = \bar S + k_t^\top u_t, \quad o_t = s\, q_t S_t

    Serves DeltaNet (arXiv:2406.06484, no decay), Gated DeltaNet (arXiv:2412.06464, one decay per head and token), Kimi
    Delta Attention (arXiv:2510.26692, one per key channel) and several reflections a token (arXiv:2502.10297). Keys are
    expected to be unit vectors (:func:`latentcot.kernels.l2_norm`); with long keys the recurrence itself grows without
    bound.

    Args:
        q: ``[B,S,H,K]``.
        k: ``[B,S,H,K]``, or ``[B,S,R,H,K]`` for R reflections a token; v, beta then carry the axis R too.
        v: ``[B,S,H_v,V]`` with H_v a multiple of H: q/k head h serves value heads ``h*m … h*m + m-1``, m = H_v/H.
        beta: write strength ``[B,S,H_v]``, 0 … 1 (to 2 for negative eigenvalues).
        log_decay: g <= 0: None, ``[B,S,H_v]`` or ``[B,S,H_v,K]``; applied once a token, before its first reflection.
        scale: s; None is ``K ** -0.5``.
        initial_state: ``S_0``, ``[N,H_v,K,V]``; None is zero.
        output_state: return the last state too.
        cu_seqlens: ``[N+1]`` offsets of sequences packed into one row (B = 1).
        visibility: ``Causal()``; ``Bidirectional()``: (forward + backward)/2, backward being the operator on
            time-reversed inputs, gates included (reflections keep their order inside a token);
            ``Bidirectional(combine="gate")``: ``direction_gate * forward + (1 - direction_gate) * backward``;
            ``BlockCausal(length, ...)``: see there.
        backend: ``"auto"``, ``"triton"``, ``"compiled"``, ``"chunked"`` or ``"reference"`` (see
            :func:`latentcot.kernels.explain_backend`).
        direction_gate: ``[H_v]`` in [0, 1], with ``combine="gate"``, and instead of the average with
            ``BlockCausal(inside="bilinear")`` and ``BlockCausal(inside="decayed")``.
        lengths: ``[B]`` real tokens of right-padded rows, with ``BlockCausal`` (not together with ``cu_seqlens``): the
            softmax inside a block leaves padded keys out. Padded tokens must be neutral (see Returns).

    Returns:
        ``(o [B,S,H_v,V], state [N,H_v,K,V] or None)``: o has the dtype of v, the state is float32 (float64 for float64
        inputs). Inputs of 16 bits are summed in float32. A padded token with k = 0, beta = 0 and log_decay = 0
        changes nothing.

    Raises:
        ValueError, TypeError: shapes, dtypes, devices, offsets, a visibility or a back end that do not fit, named with
            what was expected; a state together with ``Bidirectional``.
    """
    checks.check_tensors(
        NAME, q=q, k=k, v=v, beta=beta, log_decay=log_decay, initial_state=initial_state, direction_gate=direction_gate
    )
    B, S, K, R, Hv, V = check_tokens(NAME, q, k, v, beta, log_decay)
    check_visibility(NAME, visibility, with_state=initial_state is not None or output_state)
    check_directions(NAME, visibility, direction_gate, Hv, R)
    dtype = checks.compute_dtype(q, k, v)
    chosen = choose_backend(NAME, q.device, dtype, backend).chosen
    if log_decay is not None:
        checks.check_decay(NAME, log_decay, in_kernel=chosen == "triton")
    N = checks.offset_count(NAME, cu_seqlens, B, S)
    if initial_state is not None:
        checks.check_shape(NAME, "initial_state", initial_state, "[N,H_v,K,V]", (N, Hv, K, V))
    checks.check_block_lengths(NAME, lengths, B, visibility, cu_seqlens)
    wide = dtype
    if chosen == "triton":
        checks.check_widths(NAME, K, V)
        dtype, wide = checks.kernel_dtype(q, k, v), torch.float32

    out_dtype = v.dtype
    q, k, v, beta = q.to(dtype), k.to(dtype), v.to(dtype), beta.to(wide)
    log_decay = None if log_decay is None else log_decay.to(wide)
    initial_state = None if initial_state is None else initial_state.to(wide)
    factor = K**-0.5 if scale is None else float(scale)
    if S == 0 or N == 0 or v.numel() == 0:
        state = q.new_zeros(N, Hv, K, V, dtype=wide) if initial_state is None else initial_state.clone()
        return q.new_zeros(B, S, Hv, V, dtype=out_dtype), state if output_state else None
    if chosen == "triton" and isinstance(visibility, Causal) and cu_seqlens is not None:  # stays packed
        cu_seqlens = cu_seqlens.to(device=q.device, dtype=torch.int64)
        with full_precision(q.device):
            o, state = _causal(q, k, v, beta, log_decay, factor, initial_state, output_state, chosen, R, cu_seqlens)
        return o.to(out_dtype), state
    packing = None if cu_seqlens is None else Packing(cu_seqlens.tolist(), q.device)
    if packing is not None:
        q, k, v, beta = packing.unpack(q), packing.unpack(k), packing.unpack(v), packing.unpack(beta)
        log_decay = None if log_decay is None else packing.unpack(log_decay)
    with full_precision(q.device):
        if isinstance(visibility, Bidirectional):
            q, k, v, beta = with_reversed(q), with_reversed(k), with_reversed(v), with_reversed(beta)
            log_decay = None if log_decay is None else with_reversed(log_decay)
            both, _ = _causal(q, k, v, beta, log_decay, factor, None, False, chosen, R)
            forward, backward = split_directions(both)
            if direction_gate is None:
                o = 0.5 * (forward + backward)
            else:
                o = torch.lerp(backward, forward, direction_gate.to(dtype).unsqueeze(-1))
            state = None
        elif isinstance(visibility, BlockCausal):
            o, _, state = block_streams(
                causal_operator(chosen),
                Stream(q, k, v, log_decay, beta),
                None,
                visibility,
                factor,
                initial_state=initial_state,
                output_state=output_state,
                lengths=lengths if packing is None else packing.lengths,
                direction_gate=direction_gate,
            )
        else:
            o, state = _causal(q, k, v, beta, log_decay, factor, initial_state, output_state, chosen, R)
    if packing is not None:
        o = packing.pack(o)
    return o.to(out_dtype), state


def check_tokens(
    name: str, q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_decay: Tensor | None
) -> tuple[int, int, int, int, int, int]:
    """(B, S, K, R, H_v, V); raises in the name of ``name`` when a shape does not fit.

    R is 0 when there is no axis for it.
    """
    checks.check_dims(name, "q", q, "[B,S,H,K]")
    B, S, H, K = q.shape
    if k.dim() == 5:
        R = k.shape[2]
        if R < 1:
            raise ValueError(f"{name}: k has shape {tuple(k.shape)}, expected [B,S,R,H,K] with R >= 1 reflections")
        middle, letters = (R,), "R,"
    elif k.dim() == 4:
        R, middle, letters = 0, (), ""
    else:
        raise ValueError(f"{name}: k has shape {tuple(k.shape)}, expected [B,S,H,K] or [B,S,R,H,K]")
    checks.check_shape(name, "k", k, f"[B,S,{letters}H,K]", (B, S, *middle, H, K))
    checks.check_dims(name, "v", v, f"[B,S,{letters}H_v,V]")
    Hv, V = v.shape[-2:]
    if Hv % H if H else Hv:
        raise ValueError(
            f"{name}: v has {Hv} heads and q, k have {H}; expected a multiple, each q/k head serving Hv/H of them"
        )
    checks.check_shape(name, "v", v, f"[B,S,{letters}H_v,V]", (B, S, *middle, Hv, V))
    checks.check_shape(name, "beta", beta, f"[B,S,{letters}H_v]", (B, S, *middle, Hv))
    if log_decay is not None and tuple(log_decay.shape) not in ((B, S, Hv), (B, S, Hv, K)):
        raise ValueError(
            f"{name}: log_decay has shape {tuple(log_decay.shape)}, expected None, [B,S,H_v] = {(B, S, Hv)} "
            f"or [B,S,H_v,K] = {(B, S, Hv, K)}"
        )
    return B, S, K, R, Hv, V


def check_directions(name: str, visibility: Visibility, direction_gate: Tensor | None, Hv: int, R: int) -> None:
    """Raise, in the name of ``name``, where ``visibility`` does not go with the direction gate or the reflections."""
    needed = isinstance(visibility, Bidirectional) and visibility.combine == "gate"
    taken = needed or (isinstance(visibility, BlockCausal) and visibility.inside in ("bilinear", "decayed"))
    if isinstance(visibility, Bidirectional) and visibility.gate != "own":
        raise ValueError(f"{name}: Bidirectional(gate='next') is not defined for the delta rule; use gate='own'")
    if isinstance(visibility, BlockCausal) and visibility.inside == "softmax" and R > 0:
        raise ValueError(
            f"{name}: inside='softmax' is not defined for several reflections a token (k has an axis R = {R}), because "
            f"a token then has several keys; use k [B,S,H,K] or another value of inside"
        )
    if needed and direction_gate is None:
        raise ValueError(f"{name}: Bidirectional(combine='gate') needs direction_gate of shape [H_v] = {(Hv,)}")
    if direction_gate is not None:
        if not taken:
            raise ValueError(
                f"{name}: direction_gate is used with Bidirectional(combine='gate') and with BlockCausal of "
                f"inside='bilinear' or 'decayed' only; got {visibility}"
            )
        checks.check_shape(name, "direction_gate", direction_gate, "[H_v]", (Hv,))


def causal_operator(chosen: str) -> CausalOperator:
    """The causal operator on the back end ``chosen``, as the block forms call it."""

    def run(x: Stream, scale: float, initial_state: Tensor | None, output_state: bool) -> tuple[Tensor, Tensor | None]:
        assert x.beta is not None
        R = x.k.shape[2] if x.k.dim() == 5 else 0
        return _causal(x.q, x.k, x.v, x.beta, x.log_decay, scale, initial_state, output_state, chosen, R)

    return run


def _causal(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor | None,
    scale: float,
    initial_state: Tensor | None,
    output_state: bool,
    chosen: str,
    R: int,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    S = q.shape[1]
    if chosen == "reference" or (S == 1 and not torch.is_grad_enabled()):
        if R == 0:
            k, v, beta = k.unsqueeze(2), v.unsqueeze(2), beta.unsqueeze(2)
        if chosen == "reference":
            o, state = reference.delta_rule(q, k, v, beta, log_decay, scale, initial_state)
        else:
            g = None if log_decay is None else log_decay[:, 0]
            o, state = delta_rule_step(q[:, 0], k[:, 0], v[:, 0], beta[:, 0], g, scale, initial_state)
            o = o.unsqueeze(1)
        return o, state if output_state else None
    if chosen == "triton":
        from latentcot.kernels.delta_rule import triton

        if R > 0:
            q, k, v, beta, log_decay = _one_reflection_a_token(q, k, v, beta, log_decay, R)
            cu_seqlens = None if cu_seqlens is None else cu_seqlens * R
        o, state = triton.delta_rule(q, k, v, beta, log_decay, scale, initial_state, cu_seqlens)
        return (o if R == 0 else o[:, R - 1 :: R]), state if output_state else None
    Hv = v.shape[-2]
    if Hv != q.shape[2]:
        q = q.repeat_interleave(Hv // q.shape[2], dim=2)
        k = k.repeat_interleave(Hv // k.shape[-2], dim=-2)
    if R > 0:
        q, k, v, beta, log_decay = _one_reflection_a_token(q, k, v, beta, log_decay, R)
    fits = chosen == "compiled" and worth_compiling(NAME, q.shape[1], log_decay)
    if fits and missing_for_compiled(q, k, v, beta, log_decay, initial_state) is None:
        from latentcot.kernels.cpu_delta_rule import delta_rule as run_compiled

        o, state = run_compiled(q, k, v, beta, log_decay, scale, initial_state, output_state=output_state)
    else:
        o, state = chunked.delta_rule(q, k, v, beta, log_decay, scale, initial_state, output_state=output_state)
    return (o if R == 0 else o[:, R - 1 :: R]), state if output_state else None


def _one_reflection_a_token(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_decay: Tensor | None, R: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """R reflections a token as R tokens: the decay goes to the first of them, the query to the last."""

    def placed(x: Tensor, r: int) -> Tensor:  # [B,S,...] -> [B,S*R,...] with zeros at the other reflections
        before, after = [torch.zeros_like(x)] * r, [torch.zeros_like(x)] * (R - 1 - r)
        return torch.stack([*before, x, *after], dim=2).flatten(1, 2)

    gates = None if log_decay is None else placed(log_decay, 0)
    return placed(q, R - 1), k.flatten(1, 2), v.flatten(1, 2), beta.flatten(1, 2), gates
