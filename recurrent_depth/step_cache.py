r"""What a recurrence reads of tokens that were computed with another number of recurrences: :class:`StepCache`.

Core block j (of L) at recurrence i, both from 0, is layer step :math:`u = i L + j`. In token-by-token decoding every
(layer step, position) has its own keys and values. Where an earlier token took fewer recurrences, or memory is limited, the
entry that a query needs does not exist, and a rule says what is read instead. A linear mixer has one state for each layer
step; tokens that stopped early leave a gap in it, which a second rule fills.

The rule and every token's number of recurrences are part of the state, at place :data:`MARK`, and so of its file.
Sources: arXiv:2502.05171 and its released code (look-ups); the rules for linear mixers are this library's.
"""

import itertools
import json
from dataclasses import asdict, dataclass
from functools import lru_cache

import torch
from torch import Tensor

from latentcot.backbone import ModelState
from latentcot.backbone.state import LayerState, Place
from latentcot.recurrent_depth.settings import check_choice, check_count

KINDS = ("full", "latest", "available", "always_last", "skip", "random", "compress_s", "compress_r", "anchor")
COMPRESSED = ("compress_s", "compress_r", "anchor")
LINEAR = ("per_step", "last", "first")
GAPS = ("copy", "hold")
MARK: Place = (-2, 0)
"""Place of the rule and of the recurrences that each token took."""
SLOT_BLOCK = -1  # block number under which entries that several layer steps share are kept


@dataclass(frozen=True)
class StepCache:
    r"""Look-up rules. d: recurrences that the token behind an entry took.

    ============= ====================================================================== =====================================
    kind          read by attention at (block j, recurrence i)                           decoding = whole pass, at fixed r
    ============= ====================================================================== =====================================
    full          recurrence i; a missing entry raises                                   always
    latest        the deepest that is not deeper than i: min(i, d - 1)                   always
    available     i if it exists, else the nearest that does                             always
    always_last   the deepest, d - 1                                                     r = 1
    skip          i; tokens without it are not seen                                      always
    random        any recurrence below d, fixed by position, layer step and ``seed``     r = 1
    compress_s    slot u mod m, last writer                                              m ≥ r L
    compress_r    slot u div m, last writer                                              m = 1
    anchor        slot u in the first recurrence, then L + (u - L) mod m                 m ≥ (r - 1) L
    ============= ====================================================================== =====================================

    A token stores its recurrences from the first on, without holes, so that ``available`` reads what ``latest`` does. Slots
    are counted in layer steps: with 4 core blocks ``compress_s`` with m = 16 keeps 4 recurrences. Where m is no multiple of
    L, and with every ``compress_r`` of m > 1, blocks read keys of one another, as published. A slot that a token never wrote
    is not seen.

    ========= =================================================== ======================================
    linear    states of a linear block                            decoding = whole pass, at fixed r
    ========= =================================================== ======================================
    per_step  one for each recurrence                             always
    last      one, written by each token's last recurrence        r = 1
    first     one, written by each token's first recurrence       r = 1
    ========= =================================================== ======================================

    Args:
        kind, linear: see the tables. ``last`` and ``first`` keep 1/r of the memory.
        budget: m, for ``compress_s`` (default 16), ``compress_r`` and ``anchor``; ``None`` for the others.
        gaps: what a token that stopped early does to the deeper ``per_step`` states: ``copy`` = it writes what its last
            recurrence wrote (one more pass through the mixer for each gap), ``hold`` = nothing. ``None`` = ``hold`` with
            ``skip``, which is the same for attention, and ``copy`` otherwise. ``full`` allows no gaps.
        seed: of ``random``.

    Raises:
        ValueError: unknown words, a budget below 1, or one for a kind that has none.
    """

    kind: str = "full"
    budget: int | None = None
    linear: str = "per_step"
    gaps: str | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        check_choice("step_cache: kind", self.kind, KINDS)
        check_choice("step_cache: linear", self.linear, LINEAR)
        check_count("step_cache: seed", self.seed)
        if self.gaps is not None:
            check_choice("step_cache: gaps", self.gaps, GAPS)
        if self.budget is not None:
            check_count("step_cache: budget", self.budget, 1)
        if (self.budget is not None) and not self.compressed:
            raise ValueError(f"step_cache: budget = {self.budget} given, but kind {self.kind!r} has none")

    @property
    def compressed(self) -> bool:
        return self.kind in COMPRESSED

    @property
    def plain(self) -> bool:
        """Whether nothing but exact entries is ever read, so that every token needs the same r."""
        return self.kind == "full" and self.linear == "per_step"

    @property
    def slots(self) -> int:
        return 16 if self.budget is None else self.budget

    @property
    def fills(self) -> bool:
        """Whether gaps of linear states are written."""
        gaps = ("hold" if self.kind == "skip" else "copy") if self.gaps is None else self.gaps
        return gaps == "copy" and self.kind != "full" and self.linear == "per_step"

    @property
    def copies(self) -> bool:
        """Whether keys and values are laid into deeper recurrences when a token stops, so that reading is one look-up."""
        return self.kind in ("latest", "available")

    @property
    def hides(self) -> bool:
        """Whether attention may be kept from seeing some earlier tokens."""
        return self.kind == "skip" or self.compressed

    def exact(self, recurrences: int, core: int, linear: bool = False) -> bool:
        """Whether decoding token by token with ``recurrences`` for every token equals the whole pass; ``core``: blocks of
        the core; ``linear``: whether one of them is a linear mixer."""
        if recurrences == 1:
            return self.kind != "compress_r" or self.slots == 1 or core == 1
        attention = {
            "compress_s": self.slots >= recurrences * core,
            "compress_r": self.slots == 1,
            "anchor": self.slots >= (recurrences - 1) * core,
        }.get(self.kind, self.kind not in ("always_last", "random"))
        return attention and not (linear and self.linear != "per_step")

    def slot(self, step: int, core: int) -> int:
        """Where a compressed rule keeps layer step ``step``."""
        if self.kind == "compress_r":
            return step // self.slots
        if self.kind == "anchor":
            return step if step < core else core + (step - core) % self.slots
        return step % self.slots

    def source(self, recurrence: int, step: int, depth: Tensor, position: Tensor) -> Tensor:
        """Which recurrence is read of each earlier token, -1 = the token is not seen: ``[B, T]`` int64.

        Args:
            recurrence, step: i and u of the reader.
            depth: recurrences that each token took, ``[B, T]``; 0 on padding.
            position: its number in its row, ``[B, T]``.
        """
        if self.kind in ("latest", "available"):
            return (depth - 1).clamp(max=recurrence)
        if self.kind == "always_last":
            return depth - 1
        if self.kind == "random":
            # a hash, not a generator: a row's draw must not depend on its neighbours, on padding or on the cut into passes
            mixed = (position * 2654435761 + step * 40503 + self.seed * 69069 + 12345) % 2**32
            mixed = ((mixed ^ (mixed >> 15)) * 2246822519) % 2**32
            return ((mixed >> 8) % depth.clamp(min=1)).where(depth > 0, -1)
        return torch.where(depth > recurrence, recurrence, -1)


@lru_cache(maxsize=4096)
def first_writer(policy: StepCache, slot: int, core: int, writers: tuple[int, ...]) -> int:
    """The first layer step that writes ``slot``, its block among ``writers`` (numbers within the core)."""
    return next(u for u in itertools.count() if u % core in writers and policy.slot(u, core) == slot)


# -- the rule inside a state -------------------------------------------------------------------------------------------


def mark(state: ModelState, policy: StepCache, depth: Tensor) -> ModelState:
    """``state`` with the rule and the recurrences of each column ``[B, T]`` in it. They are laid out like keys, so that
    whatever a state does to its columns it does to them."""
    name = f"step_cache {json.dumps(asdict(policy), sort_keys=True)}"
    return state.with_entry(MARK, LayerState(name, {"keys": depth[:, None, :, None]}))


def policy_of(state: ModelState) -> StepCache | None:
    """The rule that a state was made by; ``None`` for a plain one."""
    if MARK not in state.entries:
        return None
    return StepCache(**json.loads(state.entries[MARK].mixer.removeprefix("step_cache ")))


def depth_of(state: ModelState, core_start: int) -> Tensor:
    """Recurrences that each column took, ``[B, T]``, 0 on padding."""
    assert state.valid is not None
    if MARK in state.entries:
        return state.entries[MARK]["keys"][:, 0, :, 0]
    return state.valid.long() * stored_recurrences(state, core_start)


def stored_recurrences(state: ModelState, core_start: int) -> int:
    """Recurrences for which a plain state has entries."""
    return 1 + max((i for block, i in state.entries if block == core_start), default=-1)
