"""Training of block diffusion in linear time: a clean stream that writes the states and a noisy one that reads them."""

from typing import Literal

import torch
from torch import Tensor

from latentcot.kernels import checks
from latentcot.kernels.blocks import Stream, block_streams, each, token_gates
from latentcot.kernels.decay_attention import op as decay_attention
from latentcot.kernels.delta_rule import op as delta_rule
from latentcot.kernels.dispatch import Backend, choose_backend, full_precision
from latentcot.kernels.packing import Packing
from latentcot.kernels.visibility import BlockCausal

NAME = "block_two_stream"


def block_two_stream(
    clean: Stream,
    noisy: Stream,
    length: int,
    inside: Literal["softmax", "bilinear", "decayed", "additive"] = "softmax",
    initial_state: Tensor | None = None,
    output_state: bool = False,
    *,
    write: Literal["recurrent", "order_free"] = "recurrent",
    scale: float | None = None,
    cu_seqlens: Tensor | None = None,
    backend: Backend = "auto",
    direction_gate: Tensor | None = None,
    lengths: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    r"""The clean and the noisy copy of a sequence in one pass, as block diffusion trains (arXiv:2503.09573).

    With S_c the state that the clean blocks before block c have left,

    .. math::
        o^{clean}_i = s\, q^{clean}_i S_c + \mathrm{inside}_c(clean)_i, \quad
        o^{noisy}_i = s\, q^{noisy}_i S_c + \mathrm{inside}_c(noisy)_i, \quad
        S_{c+1} = \mathrm{write}(S_c; clean \text{ tokens of block } c)

    where the forms of ``inside`` and ``write`` are those of :class:`latentcot.kernels.BlockCausal`, whose call on the
    clean stream gives the same clean outputs. In the forms that scan from S_c (``"decayed"``, ``"additive"``) a noisy
    block is scanned from the clean S_c by its own k, v, g, beta. Noisy tokens write nothing, so the pass equals
    inference block by block: a call on a noisy block with ``initial_state`` S_c, any number of times, then one on the
    clean block with ``output_state``. Gradients of noisy outputs reach the clean tokens of earlier blocks through S_c.

    No state per block is held (the order-free write of the delta rule excepted): past reads of both streams are
    queries of the one causal call that makes the states, 2 or 3 tokens for each token of the sequence.

    Args:
        clean, noisy: streams of one shape. Decay attention, or the delta rule if ``clean.beta`` is given: shapes as in
            :func:`latentcot.kernels.decay_attention` and :func:`latentcot.kernels.delta_rule`. With
            ``inside="softmax"`` the g and beta of ``noisy`` are not used and may be None.
        length: tokens a block; the last may be shorter.
        inside, write: see :class:`latentcot.kernels.BlockCausal`.
        initial_state: S_0, ``[N,H_v,K,V]``; None is zero.
        output_state: return the state after the last clean block too.
        scale: s; None is ``K ** -0.5``. The softmax inside a block always takes ``K ** -0.5``.
        cu_seqlens: ``[N+1]`` offsets of sequences packed into one row (B = 1), the same for both streams.
        backend: ``"auto"``, ``"triton"``, ``"compiled"``, ``"chunked"`` or ``"reference"`` (see
            :func:`latentcot.kernels.explain_backend`).
        direction_gate: ``[H_v]`` in [0, 1], delta rule with ``inside="bilinear"`` or ``"decayed"``: the weight of the
            forward direction in both streams; None is the average.
        lengths: ``[B]`` real tokens of right-padded rows, the same for both streams (not together with ``cu_seqlens``):
            the softmax inside a block leaves padded keys out. Padded tokens must be neutral: k, beta and g zero.

    Returns:
        ``(o_clean [B,S,H_v,V], o_noisy [B,S,H_v,V], state [N,H_v,K,V] or None)``: outputs have the dtype of their v,
        the state is float32 (float64 for float64 inputs).

    Raises:
        ValueError, TypeError: shapes, dtypes, devices, offsets, a block form or a back end that do not fit, named with
            what was expected.
    """
    visibility = BlockCausal(length, inside, write)
    for label, stream in (("clean", clean), ("noisy", noisy)):
        if not isinstance(stream, Stream):
            raise TypeError(
                f"{NAME}: {label} is a {type(stream).__name__}, expected a Stream(q, k, v, log_decay, beta)"
            )
        for name in ("q", "k", "v"):
            if getattr(stream, name) is None:
                raise TypeError(f"{NAME}: {label}.{name} is None, expected a torch.Tensor")
    tensors = {f"{label}.{n}": t for label, x in (("clean", clean), ("noisy", noisy)) for n, t in x._asdict().items()}
    checks.check_tensors(NAME, **tensors, initial_state=initial_state, direction_gate=direction_gate)
    family = "decay_attention" if clean.beta is None else "delta_rule"
    noisy = _checked_noisy(clean, noisy, inside)
    B, S, K, Hv, V = _check_streams(clean, noisy, visibility, direction_gate)
    offsets = None if cu_seqlens is None else checks.check_offsets(NAME, cu_seqlens, B, S)
    N = B if offsets is None else len(offsets) - 1
    if initial_state is not None:
        checks.check_shape(NAME, "initial_state", initial_state, "[N,H_v,K,V]", (N, Hv, K, V))
    checks.check_block_lengths(NAME, lengths, B, visibility, cu_seqlens)
    dtype = checks.compute_dtype(*clean[:3], *noisy[:3])
    chosen = choose_backend(family, clean.q.device, dtype, backend).chosen
    for label, x in (("clean", clean), ("noisy", noisy)):
        if x.log_decay is not None:
            checks.check_decay(f"{NAME}: {label}", x.log_decay, in_kernel=chosen == "triton")
    wide = dtype
    if chosen == "triton":
        checks.check_widths(NAME, K, V)
        dtype, wide = checks.kernel_dtype(*clean[:3], *noisy[:3]), torch.float32

    dtypes = clean.v.dtype, noisy.v.dtype
    initial_state = None if initial_state is None else initial_state.to(wide)
    if S == 0 or N == 0:
        state = clean.q.new_zeros(N, Hv, K, V, dtype=wide) if initial_state is None else initial_state.clone()
        empty = [clean.q.new_zeros(B, S, Hv, V, dtype=d) for d in dtypes]
        return empty[0], empty[1], state if output_state else None
    packing = None if offsets is None else Packing(offsets, clean.q.device)
    clean, noisy = _prepared(clean, dtype, wide, packing), _prepared(noisy, dtype, wide, packing)
    with full_precision(clean.q.device):
        o_clean, o_noisy, state = block_streams(
            (decay_attention if family == "decay_attention" else delta_rule).causal_operator(chosen),
            clean,
            noisy,
            visibility,
            K**-0.5 if scale is None else float(scale),
            initial_state=initial_state,
            output_state=output_state,
            lengths=lengths if packing is None else packing.lengths,
            direction_gate=direction_gate,
        )
    assert o_noisy is not None
    if packing is not None:
        o_clean, o_noisy = packing.pack(o_clean), packing.pack(o_noisy)
    return o_clean.to(dtypes[0]), o_noisy.to(dtypes[1]), state


def _checked_noisy(clean: Stream, noisy: Stream, inside: str) -> Stream:
    """The noisy stream with what ``inside`` uses of it; raises unless it fits the clean one."""
    if clean.beta is None and noisy.beta is not None:
        raise ValueError(f"{NAME}: noisy.beta is given but clean.beta is not; the delta rule needs it in both streams")
    if inside == "softmax":  # g and beta of noisy tokens have no part in it: those of the clean stream stand in
        noisy = noisy._replace(log_decay=None, beta=clean.beta)
    elif clean.beta is not None and noisy.beta is None:
        raise ValueError(
            f"{NAME}: clean.beta is given but noisy.beta is not; the delta rule needs it in both streams with "
            f"inside={inside!r}"
        )
    for name in ("q", "k", "v"):
        given, expected = getattr(noisy, name), getattr(clean, name)
        checks.check_shape(NAME, f"noisy.{name}", given, f"the shape of clean.{name}", expected.shape)
    return noisy


def _check_streams(
    clean: Stream, noisy: Stream, visibility: BlockCausal, direction_gate: Tensor | None
) -> tuple[int, int, int, int, int]:
    """(B, S, K, H_v, V); raises when a shape of either stream does not fit its operator."""
    for label, x in (("clean", clean), ("noisy", noisy)):
        name = f"{NAME}: {label}"
        if x.beta is None:
            decay_attention.check_tokens(name, x.q, x.k, x.v, x.log_decay)
        else:
            delta_rule.check_tokens(name, x.q, x.k, x.v, x.beta, x.log_decay)
    B, S, _, K = clean.q.shape
    Hv, V = clean.v.shape[-2:]
    if clean.beta is not None:
        R = clean.k.shape[2] if clean.k.dim() == 5 else 0
        delta_rule.check_directions(NAME, visibility, direction_gate, Hv, R)
    elif direction_gate is not None:
        raise ValueError(
            f"{NAME}: direction_gate is for the delta rule; decay attention sums both directions and counts the "
            f"diagonal once"
        )
    return B, S, K, Hv, V


def _prepared(x: Stream, dtype: torch.dtype, wide: torch.dtype, packing: Packing | None) -> Stream:
    """In the dtypes of the computation (gates and beta in ``wide``), and sequence by sequence if the rows were packed."""
    x = Stream(
        x.q.to(dtype),
        x.k.to(dtype),
        x.v.to(dtype),
        None if x.log_decay is None else x.log_decay.to(wide),
        None if x.beta is None else x.beta.to(wide),
    )
    if packing is None:
        return x
    return each(x._replace(log_decay=token_gates(x)), packing.unpack)  # a padded token has no gate
