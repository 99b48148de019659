"""What every layer needs to know about the tokens of one forward pass, worked out once: :class:`SequenceContext`.

Three ways to put sequences of different lengths into one call:

* padding: ``attention_mask [B, S]`` (True or 1 = real). Anywhere in the row: left, right or in between. Padded positions never
  change a state and never influence a real one.
* packing: ``B = 1`` and ``cu_seqlens`` (N + 1 offsets). State, convolution, positions and attention all restart at each offset.
* carrying: a :class:`~latentcot.backbone.state.ModelState` of the tokens before.

And one way to put two copies of every sequence into one call, which block diffusion trains on: ``streams=2``. Rows 0 … B - 1 are the
clean copies, rows B … 2B - 1 the noisy ones, at the same positions. Clean tokens see clean tokens of their own and earlier blocks;
noisy ones see the noisy tokens of their own block and the clean ones of earlier blocks.
"""

import itertools
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from latentcot.backbone.state import ModelState
from latentcot.kernels import Bidirectional, BlockCausal, Causal

Visibility = Causal | Bidirectional | BlockCausal


@dataclass(frozen=True)
class SequenceContext:
    """Made by :meth:`build`; frozen afterwards.

    Args:
        positions: rotary position of each token, ``[B, S]``: the number of real tokens before it in its sequence.
        mask: real tokens ``[B, S]``, or ``None`` when all are.
        past_valid: real tokens among the columns that came before, ``[B, T]``, or ``None``.
        cu_seqlens: offsets of packed sequences, ``[N + 1]``, or ``None``.
        visibility: who sees whom.
        keep_state: whether mixers return their state.
        index: number of real tokens before each one in this call, ``[B, S]``, by which blocks are counted; ``None`` = ``positions``.
        streams: 2 = clean and noisy copies, see above; every tensor here then has 2B rows.
        rho: share of what lies ahead that a token takes in under ``Bidirectional()``: 1 = all, 0 = none, as a causal model does (for
            turning one into the other step by step).
        ahead: pairs (query, key) that attention opens on top of the causal ones while rho < 1, ``[S, S]`` bool.
    """

    positions: Tensor
    mask: Tensor | None = None
    past_valid: Tensor | None = None
    cu_seqlens: Tensor | None = None
    visibility: Visibility = Causal()
    keep_state: bool = False
    index: Tensor | None = None
    streams: int = 1
    rho: float = 1.0
    ahead: Tensor | None = None
    tables: dict[Any, Any] = field(default_factory=dict, repr=False)

    @classmethod
    def build(
        cls,
        batch: int,
        length: int,
        device: torch.device | str = "cpu",
        *,
        attention_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        visibility: Visibility = Causal(),
        state: ModelState | None = None,
        keep_state: bool | None = None,
        streams: int = 1,
        rho: float = 1.0,
        ahead: Tensor | None = None,
    ) -> "SequenceContext":
        """Check the arguments against one another and work out positions.

        ``batch`` counts sequences: with ``streams=2`` the context is for ``2 · batch`` rows.

        ``attention_mask`` covers the new tokens ``[B, S]`` or, as transformers passes it, all tokens so far ``[B, T + S]``.
        ``keep_state`` defaults to whether a state was given.
        """
        past = 0 if state is None else state.get_seq_length()
        mask = _new_token_mask(attention_mask, batch, length, past)
        if state is not None and state.batch_size not in (None, batch):
            raise ValueError(f"state: it holds {state.batch_size} rows, the input has {batch}")
        if isinstance(visibility, Bidirectional) and state is not None:
            raise ValueError(f"state: states belong to the causal direction; visibility={visibility} can not carry one")
        _check_streams(streams, visibility, cu_seqlens, state, bool(keep_state))
        _check_rho(rho, ahead, visibility, length)
        if cu_seqlens is not None:
            _check_packing(cu_seqlens, batch, length, mask, state)
            mask = None
        device = torch.device(device)
        if cu_seqlens is not None:
            index = torch.arange(length, device=device)
            which = torch.bucketize(index, cu_seqlens.to(device)[1:], right=True)
            positions = (index - cu_seqlens.to(device)[which])[None]
        elif mask is not None:
            positions = (mask.long().cumsum(1) - 1).clamp(min=0)
        else:
            positions = torch.arange(length, device=device).expand(batch, length)
        index = positions
        if state is not None and state.lengths is not None:
            positions = positions + state.lengths.to(device)[:, None]
        if streams == 2:
            positions, index = positions.repeat(2, 1), index.repeat(2, 1)
            mask = None if mask is None else mask.repeat(2, 1)
        return cls(
            positions=positions,
            mask=mask,
            past_valid=None if state is None else state.valid,
            cu_seqlens=cu_seqlens,
            visibility=visibility,
            keep_state=(state is not None) if keep_state is None else keep_state,
            index=index,
            streams=streams,
            rho=rho,
            ahead=ahead,
        )

    @property
    def causal(self) -> bool:
        return isinstance(self.visibility, Causal)

    @property
    def partly_ahead(self) -> bool:
        """Whether a token takes in a part of what lies ahead only: ``Bidirectional()`` with rho < 1."""
        return self.rho < 1 and isinstance(self.visibility, Bidirectional)

    @cached_property
    def real_tokens(self) -> Tensor:
        """``[B, S]`` bool, also when there is no padding."""
        return torch.ones_like(self.positions, dtype=torch.bool) if self.mask is None else self.mask

    # -- for linear mixers: rows with their real tokens first ----------------------------------------------------------

    @cached_property
    def lengths(self) -> Tensor | None:
        """Real tokens of each row ``[B]``; ``None`` when nothing is padded."""
        return None if self.mask is None else self.mask.sum(1)

    @cached_property
    def _order(self) -> tuple[Tensor, Tensor] | None:
        """Index that brings each row's real tokens to its front, and its inverse; ``None`` when they are there already."""
        if self.mask is None or bool((self.mask[:, 1:] <= self.mask[:, :-1]).all()):
            return None
        order = torch.argsort((~self.mask).to(torch.uint8), dim=1, stable=True)
        return order, torch.argsort(order, dim=1)

    @cached_property
    def front(self) -> Tensor | None:
        """Real positions after :meth:`compact`, ``[B, S, 1]``; ``None`` when nothing is padded."""
        if self.lengths is None:
            return None
        return (torch.arange(self.positions.shape[1], device=self.lengths.device) < self.lengths[:, None])[..., None]

    def compact(self, hidden: Tensor) -> Tensor:
        """``[B, S, ...]`` with real tokens moved to the front of their row and padded ones set to zero."""
        if self.front is None:
            return hidden
        if self._order is not None:
            hidden = hidden.take_along_dim(self._order[0][..., None], dim=1)
        return hidden * self.front

    def expand(self, hidden: Tensor) -> Tensor:
        """Back to the caller's order."""
        return hidden if self._order is None else hidden.take_along_dim(self._order[1][..., None], dim=1)

    # -- for attention ---------------------------------------------------------------------------------------------------

    @cached_property
    def attention_mask(self) -> Tensor | None:
        """Which key each query sees: ``[B or 1, 1, S, T + S]`` bool, or ``None`` where plain causal or full attention does.

        A padded query sees itself alone, so that no softmax runs over nothing.
        """
        past = 0 if self.past_valid is None else self.past_valid.shape[1]
        batch, length = self.positions.shape
        device = self.positions.device
        one_block = isinstance(self.visibility, BlockCausal) and length <= self.visibility.length
        past_is_real = self.past_valid is None or ((length == 1 or one_block) and bool(self.past_valid.all()))
        full = isinstance(self.visibility, Bidirectional) and not self.partly_ahead
        plain = self.causal or one_block or full
        if plain and self.mask is None and self.cu_seqlens is None and past_is_real:
            return None
        seen = torch.ones(length, length, dtype=torch.bool, device=device)
        if self.causal or self.partly_ahead:
            seen = seen.tril()
        if self.partly_ahead and self.ahead is not None:
            seen = seen | self.ahead.to(device)
        seen = seen[None]
        if isinstance(self.visibility, BlockCausal):
            seen = self.block_of[:, None, :] <= self.block_of[:, :, None]
        if self.cu_seqlens is not None:
            index = torch.arange(length, device=device)
            which = torch.bucketize(index, self.cu_seqlens.to(device)[1:], right=True)
            seen = seen & (which[:, None] == which[None, :])
        if self.mask is not None:
            seen = seen & self.mask[:, None, :]
            seen = seen | (torch.eye(length, dtype=torch.bool, device=device) & ~self.mask[:, :, None])
        if past:
            assert self.past_valid is not None
            before = self.past_valid[:, None, :].expand(batch, length, past)
            if self.mask is not None:
                before = before & self.mask[:, :, None]
            seen = torch.cat([before, seen.expand(batch, length, length)], 2)
        return seen[:, None]

    @cached_property
    def block_of(self) -> Tensor:
        """Number of each token's block, counted in this call from the first real token of its sequence, ``[B, S]``."""
        if not isinstance(self.visibility, BlockCausal):
            raise ValueError(f"visibility: blocks belong to BlockCausal, got {self.visibility}")
        return (self.positions if self.index is None else self.index) // self.visibility.length

    @cached_property
    def stream_masks(self) -> tuple[Tensor, Tensor]:
        """With two streams: which clean keys a clean query sees ``[B or 1, 1, S, S]``, and which clean, then noisy keys a noisy query
        sees ``[B or 1, 1, S, 2S]`` (1: rows without padding are alike). A padded query sees itself alone."""
        blocks = self.block_of.chunk(2)[0]
        if self.mask is None:
            blocks = blocks[:1]
        queries, keys = blocks[:, :, None], blocks[:, None, :]
        earlier, same = keys < queries, keys == queries
        if self.mask is not None:
            real = self.mask.chunk(2)[0]
            itself = torch.eye(blocks.shape[1], dtype=torch.bool, device=blocks.device)
            pair = real[:, None, :] & real[:, :, None]
            earlier, same = earlier & pair, (same & pair) | (itself & ~real[:, :, None])
        return (earlier | same)[:, None], torch.cat([earlier, same], -1)[:, None]

    @property
    def plain_causal(self) -> bool:
        """True when ``attention_mask`` is None and queries must not see later keys."""
        return self.causal and self.positions.shape[1] > 1


def _new_token_mask(attention_mask: Tensor | None, batch: int, length: int, past: int) -> Tensor | None:
    if attention_mask is None:
        return None
    if (
        attention_mask.dim() != 2
        or attention_mask.shape[0] != batch
        or attention_mask.shape[1] not in (length, past + length)
    ):
        expected = f"[{batch}, {length}]" + (f" or [{batch}, {past + length}]" if past else "")
        raise ValueError(
            f"attention_mask: shape {list(attention_mask.shape)} given, expected {expected} (1 = real token, 0 = padding)"
        )
    mask = attention_mask[:, attention_mask.shape[1] - length :].bool()
    if attention_mask.device.type == "cpu" and not bool(((attention_mask == 0) | (attention_mask == 1)).all()):
        raise ValueError(
            "attention_mask: values other than 0 and 1 given, expected 1 = real token, 0 = padding (what is added to scores is no mask)"
        )
    return None if bool(mask.all()) else mask


def _check_streams(
    streams: int, visibility: Visibility, cu_seqlens: Tensor | None, state: ModelState | None, keep_state: bool
) -> None:
    if streams not in (1, 2):
        raise ValueError(f"streams: expected 1, or 2 for clean and noisy copies, got {streams!r}")
    if streams == 1:
        return
    if not isinstance(visibility, BlockCausal):
        raise ValueError(f"streams: two streams need visibility=BlockCausal(...), got {visibility}")
    for name, given in (("cu_seqlens", cu_seqlens is not None), ("state", state is not None or keep_state)):
        if given:
            raise ValueError(
                f"{name}: not together with two streams; they start from nothing, and sequences are passed as padded rows"
            )


def _check_rho(rho: float, ahead: Tensor | None, visibility: Visibility, length: int) -> None:
    if not 0.0 <= rho <= 1.0:
        raise ValueError(f"rho: expected a share within 0..1, got {rho}")
    if rho < 1 and isinstance(visibility, Causal):
        raise ValueError(f"rho: {rho} given, but visibility={visibility} takes in nothing from ahead")
    if ahead is not None and (ahead.shape != (length, length) or ahead.dtype != torch.bool):
        raise ValueError(
            f"ahead: shape {list(ahead.shape)} of {ahead.dtype} given, expected [{length}, {length}] of bool"
        )
    if 0 < rho < 1 and ahead is None and isinstance(visibility, Bidirectional):
        raise ValueError(
            f"ahead: rho = {rho} needs the pairs that attention opens, [{length}, {length}] bool, one draw for all layers"
        )


def _check_packing(cu_seqlens: Tensor, batch: int, length: int, mask: Tensor | None, state: ModelState | None) -> None:
    if batch != 1:
        raise ValueError(f"cu_seqlens: packed sequences need batch size 1, got {batch}")
    if state is not None:
        raise ValueError(
            "state: packing and a carried state can not be combined; pass the sequences as padded rows instead"
        )
    if mask is not None:
        raise ValueError("attention_mask: packed sequences have no padding; leave it out when cu_seqlens is given")
    ends = cu_seqlens.tolist() if cu_seqlens.dim() == 1 else []
    if len(ends) < 2 or ends[0] != 0 or ends[-1] != length or any(b <= a for a, b in itertools.pairwise(ends)):
        raise ValueError(f"cu_seqlens: offsets must rise from 0 to the length {length}, got {ends[:8]}")
