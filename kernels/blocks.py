r"""Block-causal forms, composed of the causal operator: whatever back end runs that one runs these, gradients included.

Write S_c for the state before block c of L tokens and s for the scale. Three moves are enough:

* **Reads between blocks** (:func:`_walk`). A token with k = 0, v = 0, beta = 0, g = 0 changes no state, so its query
  reads the state where it stands. L such tokens in front of a block's own tokens read S_c, L behind them read S_{c+1}.
* **Folding** (:func:`_fold`). Blocks become rows of the batch; the operator then sees one block at a time, forwards or
  with time reversed, from a zero state. A last block that is shorter is filled with tokens that change nothing.
* **Past queries** (:func:`_past_queries`). The operator is linear in the state it starts from, so what tokens of a
  *second* stream would read of S_c through their own gates and erasures is s q' S_c for some query q': the gates'
  product for decay attention, the operator applied to the identity for the delta rule. No state per block is ever held.

Only two things here are not the causal operator: the softmax inside a block, and the order-free write of the delta rule
(:func:`_order_free`), which solves one small system per block and then walks from block to block.

Sources: arXiv:2501.16085 (softmax inside, linear state across blocks); arXiv:2503.09573 (which tokens of two streams
see each other). The order-free write is the ridge solution of a block, see :class:`latentcot.kernels.BlockCausal`.
"""

from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from latentcot.kernels.checks import compute_dtype
from latentcot.kernels.packing import split_directions, with_reversed
from latentcot.kernels.visibility import BlockCausal


class Stream(NamedTuple):
    """The tokens of one call: arguments of ``decay_attention``, or of ``delta_rule`` if beta is given, same shapes.

    q ``[B,S,H,K]``, k ``[B,S,H,K]`` or ``[B,S,R,H,K]``, v, log_decay and beta as the operator takes them.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    log_decay: Tensor | None = None
    beta: Tensor | None = None


class CausalOperator(Protocol):
    """A causal operator on some back end: (stream, scale, initial state, whether to return the last) -> (o, state)."""

    def __call__(
        self, stream: Stream, scale: float, initial_state: Tensor | None, output_state: bool, /
    ) -> tuple[Tensor, Tensor | None]: ...


def block_streams(
    run: CausalOperator,
    clean: Stream,
    noisy: Stream | None,
    visibility: BlockCausal,
    scale: float,
    *,
    initial_state: Tensor | None = None,
    output_state: bool = False,
    lengths: Tensor | None = None,
    direction_gate: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The clean stream under ``visibility`` and, if given, a second stream that reads its states and writes none.

    Block c of ``noisy`` gives what a block-causal call on that block alone gives when it starts from S_c, the state
    that the clean blocks before c have left.

    Args:
        run: the causal operator.
        clean, noisy: checked tokens in the dtype of the computation, S >= 1.
        lengths: real tokens of each right-padded row, ``[B]``; None: all S. Padded tokens must be neutral.
        direction_gate: ``[H_v]``, weight of the forward direction (delta rule, ``"bilinear"`` and ``"decayed"``).

    Returns:
        (o of clean ``[B,S,H_v,V]``, o of noisy or None, state after the last block or None).
    """
    B, S = clean.q.shape[:2]
    L = min(visibility.length, S)
    n = -(-S // L)
    inside, write = visibility.inside, visibility.write
    padded = _pad(clean, n * L)
    blocks = _fold(padded, L)
    others = None if noisy is None else _fold(_pad(noisy, n * L), L)
    mask = None if inside != "softmax" else _key_mask(clean, n, L, lengths)

    before, after = [], []  # reads of S_c and of S_{c+1}
    if inside in ("softmax", "bilinear"):
        before.append(padded.q)
    elif inside == "additive":
        after.append(padded.q)
    if others is not None:
        q = others.q if inside in ("softmax", "bilinear") else _past_queries(run, others, inside, write)
        before.append(q.reshape(B, n * L, *q.shape[2:]))
    if n == 1 and others is None and not after and before and not output_state:
        reads, state = [_read(padded.q, padded.v, initial_state, scale)], None  # one block that writes nothing
    elif before or after:
        reads, state = _walk(run, padded, before, after, L, write, scale, initial_state, output_state)
    else:  # "decayed", one stream: the causal operator itself, which needs no padding
        o, state = run(clean, scale, initial_state, output_state)
        reads = [_pad_time(o, n * L)]
    reads = [o.reshape(B * n, L, *o.shape[2:]) for o in reads]  # in the order before, own tokens, after

    def restored(o: Tensor) -> Tensor:
        return o.reshape(B, n * L, *o.shape[2:])[:, :S]

    # the clean stream reads S_c ("softmax", "bilinear"), S_{c+1} ("additive") or as the causal operator does ("decayed")
    past = reads[0] if inside in ("softmax", "bilinear") else reads[-1]
    if inside == "decayed":
        backward, _ = run(each(blocks, lambda x: x.flip(1)), scale, None, False)
        o_clean = _mixed(past, backward.flip(1), blocks, scale, direction_gate)
    elif inside == "additive":
        o_clean = past
    else:
        o_clean = _beside_the_past(run, blocks, inside, write, past, mask, scale, direction_gate)
    if others is None:
        return restored(o_clean), None, state
    past = reads[len(before) - 1]
    o_noisy = _beside_the_past(run, others, inside, write, past, mask, scale, direction_gate)
    return restored(o_clean), restored(o_noisy), state


def _read(q: Tensor, v: Tensor, state: Tensor | None, scale: float) -> Tensor:
    """``s q S``: ``q [B,L,H,K]``, ``S [B,H_v,K,V]`` -> ``[B,L,H_v,V]``; zero without a state."""
    if state is None:
        return torch.zeros_like(v)
    q = _per_value_head(q, state.shape[1]).to(state.dtype)
    return torch.matmul(scale * q.transpose(1, 2), state).transpose(1, 2)


def _beside_the_past(
    run: CausalOperator,
    blocks: Stream,
    inside: str,
    write: str,
    past: Tensor,
    mask: Tensor | None,
    scale: float,
    direction_gate: Tensor | None,
) -> Tensor:
    """``past``, the read of S_c, joined with what the tokens of a block give each other: ``[B*n,L,H_v,V]``."""
    if inside == "softmax":
        return past + _softmax(blocks, mask)
    if inside == "additive":
        (o,), _ = _walk(run, blocks, [], [blocks.q], blocks.q.shape[1], write, scale, None, False)
        return past + o
    both, _ = run(each(blocks, with_reversed), scale, None, False)
    forward, backward = split_directions(both)
    if inside == "decayed":  # here the past belongs to the forward direction
        return _mixed(past + forward, backward, blocks, scale, direction_gate)
    return past + _mixed(forward, backward, blocks, scale, direction_gate)


def _mixed(forward: Tensor, backward: Tensor, blocks: Stream, scale: float, direction_gate: Tensor | None) -> Tensor:
    """Two directions as one output: the sum with the diagonal counted once, or for the delta rule a weighted mean."""
    if blocks.beta is None:
        return forward + backward - (blocks.q * blocks.k).sum(-1, keepdim=True) * (scale * blocks.v)
    if direction_gate is None:
        return 0.5 * (forward + backward)
    return torch.lerp(backward, forward, direction_gate.to(forward.dtype).unsqueeze(-1))


def _softmax(blocks: Stream, mask: Tensor | None) -> Tensor:
    """Softmax attention of a block's tokens to each other, scale K^(-1/2); q/k head h serves value heads h*m … .

    Plain products: the weights of L tokens per token are as small as the states, and can be differentiated twice. In 16 bits on a GPU the
    fused kernel, which keeps no weights and no 32-bit copies for the backward pass, and is differentiated once.
    """
    if _takes_fused(blocks):
        q, k, v = (x.transpose(1, 2) for x in (blocks.q, blocks.k, blocks.v))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)
    dtype = compute_dtype(blocks.q, blocks.k, blocks.v)
    q, k, v = blocks.q.to(dtype), blocks.k.to(dtype), blocks.v.to(dtype)
    H, K = q.shape[2:]
    scores = torch.matmul(q.transpose(1, 2) * K**-0.5, k.permute(0, 2, 3, 1))  # [M,H,L,L]
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    grouped = v.unflatten(2, (H, -1)).flatten(3).transpose(1, 2)  # [M,H,L,m*V]
    return torch.matmul(scores.softmax(-1), grouped).transpose(1, 2).reshape(v.shape)


def _takes_fused(blocks: Stream) -> bool:
    q, v = blocks.q, blocks.v
    return (
        q.is_cuda
        and q.dtype in (torch.float16, torch.bfloat16)
        and q.dtype == blocks.k.dtype == v.dtype
        and q.shape == blocks.k.shape == v.shape
        and q.shape[-1] % 8 == 0
        and q.shape[-1] <= 128
        and q.shape[0] < 2**16  # blocks: the kernel's grid
    )


def _key_mask(stream: Stream, n: int, L: int, lengths: Tensor | None) -> Tensor | None:
    """``[B*n,1,1,L]``, False at padded keys; a block without a real token keeps all, so that it gives no 0/0."""
    B, S = stream.q.shape[:2]
    if lengths is None:
        if n * L == S:
            return None
        lengths = torch.full((B,), S, device=stream.q.device)
    real = torch.arange(n * L, device=stream.q.device) < lengths.unsqueeze(1)
    real = real.reshape(B * n, 1, 1, L)
    return real | ~real.any(-1, keepdim=True)


def _past_queries(run: CausalOperator, blocks: Stream, inside: str, write: str) -> Tensor:
    """q' with ``s q' S_c`` = what the tokens of a block read of S_c through their own gates and erasures.

    Token i decays and erases S_c with the tokens 0 … i of its block (``"decayed"``) or with all of them
    (``"additive"``). blocks ``[M,L,...]`` -> ``[M,L,H_v,K]``.
    """
    q = blocks.q
    M, L, _, K = q.shape
    if blocks.beta is None:
        gates = token_gates(blocks)
        if gates is None:
            return q
        decay = (gates.cumsum(1) if inside == "decayed" else gates.sum(1, keepdim=True)).exp()  # sums of one sign
        return q * (decay if decay.dim() == 4 else decay.unsqueeze(-1))
    # the operator maps the state linearly: without values, from the identity, its output is the query that it applies
    v = blocks.v
    Hv = v.shape[-2]
    identity = torch.eye(K, dtype=compute_dtype(q), device=q.device).expand(M, Hv, K, K)
    probe = blocks._replace(v=v.new_zeros(*v.shape[:-1], K))
    if inside == "decayed":
        return run(probe, 1.0, identity, False)[0]
    (past,), _ = _walk(run, probe, [], [q], L, write, 1.0, identity, False)
    return past


def _walk(
    run: CausalOperator,
    stream: Stream,
    before: list[Tensor],
    after: list[Tensor],
    L: int,
    write: str,
    scale: float,
    initial_state: Tensor | None,
    output_state: bool,
) -> tuple[list[Tensor], Tensor | None]:
    """Write block after block; queries ``before`` read the state in front of their block, ``after`` the one behind it.

    stream ``[B,n*L,...]``, every query ``[B,n*L,H,K]`` (or H_v heads). Returns the outputs in the order before, own
    tokens, after (each ``[B,n*L,H_v,V]``; own tokens only if there is no read ``after`` and the write is recurrent),
    and the last state.
    """
    if write == "order_free":
        if stream.beta is not None:
            return _order_free(stream, before, after, L, scale, initial_state, output_state)
        stream = _gates_first(stream, L)
    heads = max(x.shape[2] for x in (*before, *after))
    if heads != stream.q.shape[2]:  # past queries of grouped heads: one for each value head
        stream = stream._replace(q=_per_value_head(stream.q, heads), k=_per_value_head(stream.k, heads))
        before = [_per_value_head(x, heads) for x in before]
        after = [_per_value_head(x, heads) for x in after]
    own = not after
    parts = len(before) + 1 + len(after)

    def laid_out(*xs: Tensor) -> Tensor:  # xs: one for each part, [B,n*L,...] -> [B,n*parts*L,...]
        return torch.cat([x.unflatten(1, (-1, L)) for x in xs], dim=2).flatten(1, 2)

    def written(x: Tensor) -> Tensor:  # nothing at the places of the reads
        nothing = torch.zeros_like(x)
        return laid_out(*[nothing] * len(before), x, *[nothing] * len(after))

    q = laid_out(*before, stream.q if own else torch.zeros_like(stream.q), *after)
    gates = token_gates(stream)
    tokens = Stream(
        q=q,
        k=written(stream.k),
        v=written(stream.v),
        log_decay=None if gates is None else written(gates),
        beta=None if stream.beta is None else written(stream.beta),
    )
    o, state = run(tokens, scale, initial_state, output_state)
    outputs = [x.flatten(1, 2) for x in o.unflatten(1, (-1, parts * L)).split(L, dim=2)]
    if not own:
        del outputs[len(before)]
    return outputs, state


def _order_free(
    stream: Stream,
    before: list[Tensor],
    after: list[Tensor],
    L: int,
    scale: float,
    initial_state: Tensor | None,
    output_state: bool,
) -> tuple[list[Tensor], Tensor | None]:
    r""":func:`_walk` for the delta rule's order-free write, by whichever system is smaller.

    With K the keys of a block (all reflections are rows), b the diagonal of its betas, :math:`\bar S = \Gamma S_c`:

    .. math::
        S_{c+1} = \bar S + K^\top (I + b K K^\top)^{-1} b (V - K \bar S)
                = (I + K^\top b K)^{-1} (\bar S + K^\top b V)

    The first by LU, since its symmetric form needs :math:`\sqrt b`, whose derivative at beta = 0 is infinite; the
    second by Cholesky. All systems are solved at once; the loop over blocks is one or two products.
    """
    assert stream.beta is not None
    B, T, _, K = stream.q.shape
    Hv, V = stream.v.shape[-2:]
    n = T // L

    def rows(x: Tensor) -> Tensor:  # [B,T,(R,)H_v,X] -> [B,H_v,n,L*R,X]
        x = x.reshape(B, n, -1, *x.shape[-2:])
        return x.permute(0, 3, 1, 2, 4)

    k, v = rows(_per_value_head(stream.k, Hv)), rows(stream.v)
    b = rows(stream.beta.unsqueeze(-1))
    gates = stream.log_decay
    decay = None
    if gates is not None:
        total = gates.unflatten(1, (n, L)).sum(2).exp()  # [B,n,H_v] or [B,n,H_v,K]
        decay = (total if total.dim() == 4 else total.unsqueeze(-1)).transpose(1, 2).unsqueeze(-1)  # [B,H_v,n,1 or K,1]
    bk, bv = b * k, b * v
    state = v.new_zeros(B, Hv, K, V) if initial_state is None else initial_state
    states = [state]
    narrow = k.shape[-2] < K
    if narrow:
        eye = torch.eye(k.shape[-2], dtype=k.dtype, device=k.device)
        target, erased = torch.linalg.solve(eye + bk @ k.mT, torch.cat([bv, bk], dim=-1)).split([V, K], dim=-1)
    else:
        eye = torch.eye(K, dtype=k.dtype, device=k.device)
        right = torch.cat([k.mT @ bv, eye.expand(B, Hv, n, K, K)], dim=-1)
        target, kept = torch.cholesky_solve(right, torch.linalg.cholesky(eye + k.mT @ bk)).split([V, K], dim=-1)
        erased = kept
    for c in range(n):
        if decay is not None:
            state = decay[:, :, c] * state
        if narrow:
            state = state + k[:, :, c].mT @ (target[:, :, c] - erased[:, :, c] @ state)
        else:
            state = target[:, :, c] + erased[:, :, c] @ state
        states.append(state)

    def read(q: Tensor, seen: list[Tensor]) -> Tensor:
        o = scale * (rows(_per_value_head(q, Hv)) @ torch.stack(seen, dim=2))  # [B,H_v,n,L,V]
        return o.permute(0, 2, 3, 1, 4).reshape(B, T, Hv, V)

    outputs = [read(q, states[:-1]) for q in before] + [read(q, states[1:]) for q in after]
    return outputs, state if output_state else None


def _gates_first(stream: Stream, L: int) -> Stream:
    """The sum of a block's gates on its first token, none on the others: S_{c+1} = exp(sum) S_c + K^T V."""
    gates = token_gates(stream)
    if gates is None:
        return stream
    total = gates.unflatten(1, (-1, L)).sum(2, keepdim=True)
    rest = total.new_zeros(*total.shape[:2], L - 1, *total.shape[3:])
    return stream._replace(log_decay=torch.cat([total, rest], dim=2).flatten(1, 2))


def token_gates(stream: Stream) -> Tensor | None:
    """log_decay with a time axis: ``[H] -> [B,S,H]``."""
    gates = stream.log_decay
    return gates.expand(*stream.q.shape[:3]) if gates is not None and gates.dim() == 1 else gates


def _per_value_head(x: Tensor, heads: int) -> Tensor:
    """``[...,H,K] -> [...,heads,K]``, each head repeated for the value heads that it serves."""
    return x if x.shape[-2] == heads else x.repeat_interleave(heads // x.shape[-2], dim=-2)


def each(stream: Stream, change: Callable[[Tensor], Tensor]) -> Stream:
    """``change`` applied to every tensor that has a time axis."""
    gates = stream.log_decay
    return Stream(
        q=change(stream.q),
        k=change(stream.k),
        v=change(stream.v),
        log_decay=gates if gates is None or gates.dim() == 1 else change(gates),
        beta=None if stream.beta is None else change(stream.beta),
    )


def _pad_time(x: Tensor, T: int) -> Tensor:
    return x if x.shape[1] == T else F.pad(x, (0, 0) * (x.dim() - 2) + (0, T - x.shape[1]))


def _pad(stream: Stream, T: int) -> Stream:
    """Neutral tokens behind the sequence, up to T."""
    if stream.q.shape[1] == T:
        return stream
    stream = stream._replace(log_decay=token_gates(stream))  # a padded token has no gate
    return each(stream, lambda x: _pad_time(x, T))


def _fold(stream: Stream, L: int) -> Stream:
    """``[B,n*L,...] -> [B*n,L,...]``."""
    return each(stream, lambda x: x.reshape(-1, L, *x.shape[2:]))
