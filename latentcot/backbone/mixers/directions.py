r"""Linear mixers whose tokens see more than what came before: in both directions, in blocks, or as two streams of blocks.

The operators are those of :mod:`latentcot.kernels`; here a :class:`~latentcot.backbone.context.SequenceContext` says which of them runs.
With ``rho`` < 1 a token takes in a share of what lies ahead: :math:`o = \mathrm{Fwd} + \rho\,(\mathrm{Rev} - \mathrm{diag})` for decay
attention, and for the delta rule, whose directions are weighed by a gate :math:`w` (1/2 where there is none), the weight of the forward
direction becomes :math:`1 - \rho (1 - w)`. At rho = 0 both are the causal operator.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from latentcot.backbone.context import SequenceContext
from latentcot.backbone.state import LayerState
from latentcot.kernels import Bidirectional, BlockCausal, block_two_stream, decay_attention, delta_rule, gated_scan
from latentcot.kernels.blocks import Stream


def run_decay(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, context: SequenceContext, state: LayerState | None
) -> tuple[Tensor, Tensor | None]:
    """``(o [B, S, H, V], new state or None)`` of decay attention as the context sees it; shapes as in the operator.

    With ``BlockCausal`` rho has no part in it: blocks of one token are causal already, and grow from there.
    """
    if context.streams == 2:
        return _two_streams(Stream(q, k, v, log_decay), context, None), None
    visibility = context.visibility
    o, matrix = decay_attention(
        q,
        k,
        v,
        log_decay,
        initial_state=None if state is None else state["matrix"],
        output_state=context.keep_state,
        cu_seqlens=context.cu_seqlens,
        visibility=visibility,
        lengths=_block_lengths(context),
    )
    if context.partly_ahead:
        forward, _ = decay_attention(q, k, v, log_decay, cu_seqlens=context.cu_seqlens)
        o = torch.lerp(forward, o, context.rho)
    return o, matrix


def run_delta(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor | None,
    context: SequenceContext,
    state: LayerState | None,
    direction: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """The same for the delta rule; ``direction [H_v]``: logits of the gate between its directions, ``None`` = the average."""
    visibility = context.visibility
    gate = None
    if isinstance(visibility, Bidirectional) or (
        isinstance(visibility, BlockCausal) and visibility.inside in ("bilinear", "decayed")
    ):
        gate = _forward_weight(direction, context.rho, v)
    if context.streams == 2:
        return _two_streams(Stream(q, k, v, log_decay, beta), context, gate), None
    if isinstance(visibility, Bidirectional):
        visibility = Bidirectional(combine="average" if gate is None else "gate")
    return delta_rule(
        q,
        k,
        v,
        beta,
        log_decay,
        initial_state=None if state is None else state["matrix"],
        output_state=context.keep_state,
        cu_seqlens=context.cu_seqlens,
        visibility=visibility,
        direction_gate=gate,
        lengths=_block_lengths(context),
    )


def scan_blocks(
    x: Tensor, log_decay: Tensor, context: SequenceContext, state: LayerState | None
) -> tuple[Tensor, Tensor | None]:
    r"""HGRN's scan in blocks, ``inside="decayed"``: :math:`o = \mathrm{Fwd} + \mathrm{Rev} - x`, a channel at a time.

    Fwd is the causal scan :math:`h_t = e^{g_t} h_{t-1} + x_t`, which for a noisy block starts from the clean state in front of it; Rev
    is the same scan of the time-reversed block, from zero at the block's end. ``[B, S, D]`` (2B rows for two streams).

    Raises:
        ValueError: another form of ``inside``, which would need queries and keys; packed sequences.
    """
    visibility = context.visibility
    assert isinstance(visibility, BlockCausal)
    if visibility.inside != "decayed" or visibility.write != "recurrent":
        raise ValueError(
            f"hgrn: {visibility} is not defined for a mixer without queries and keys, expected "
            f"BlockCausal(length, inside='decayed')"
        )
    if context.cu_seqlens is not None:
        raise ValueError("cu_seqlens: hgrn scans no packed blocks; pass the sequences as padded rows")
    _, length, width = x.shape
    L = min(visibility.length, length)
    n = -(-length // L)

    def folded(t: Tensor) -> Tensor:
        return F.pad(t, (0, 0, 0, n * L - length)).reshape(-1, L, width)

    def unfolded(t: Tensor) -> Tensor:
        return t.reshape(-1, n * L, width)[:, :length]

    backward, _ = gated_scan(folded(x).flip(1), folded(log_decay).flip(1))
    ahead = unfolded(backward.flip(1)) - x
    initial = None if state is None else state["vector"]
    if context.streams == 1:
        forward, vector = gated_scan(x, log_decay, initial_state=initial, output_state=context.keep_state)
        return forward + ahead, vector
    clean, noisy = x.chunk(2)
    gates, noisy_gates = log_decay.chunk(2)
    forward, _ = gated_scan(clean, gates)
    before = torch.cat([torch.zeros_like(forward[:, :1]), forward[:, L - 1 :: L]], 1)[:, :n]
    inside, _ = gated_scan(folded(noisy), folded(noisy_gates), initial_state=before.reshape(-1, width))
    return torch.cat([forward, unfolded(inside)]) + ahead, None


def _two_streams(tokens: Stream, context: SequenceContext, gate: Tensor | None) -> Tensor:
    visibility = context.visibility
    assert isinstance(visibility, BlockCausal)
    halves = [
        (t, t) if t is None or t.dim() == 1 else t.chunk(2)  # a constant rate a head serves both
        for t in tokens
    ]
    clean, noisy = (Stream(*(half[n] for half in halves)) for n in range(2))  # type: ignore[arg-type]
    lengths = _block_lengths(context)
    o_clean, o_noisy, _ = block_two_stream(
        clean,
        noisy,
        visibility.length,
        visibility.inside,
        write=visibility.write,
        direction_gate=gate,
        lengths=None if lengths is None else lengths.chunk(2)[0],
    )
    return torch.cat([o_clean, o_noisy])


def _block_lengths(context: SequenceContext) -> Tensor | None:
    """Real tokens of each row where an operator asks for them: in blocks, whose softmax must see no padded key."""
    return context.lengths if isinstance(context.visibility, BlockCausal) else None


def _forward_weight(direction: Tensor | None, rho: float, like: Tensor) -> Tensor | None:
    """Weight of the forward direction ``[H_v]``; ``None`` = the plain average."""
    gate = None if direction is None else direction.sigmoid()
    if rho == 1:
        return gate
    heads = like.shape[-2]
    gate = like.new_full((heads,), 0.5, dtype=torch.promote_types(like.dtype, torch.float32)) if gate is None else gate
    return 1 - rho * (1 - gate)
