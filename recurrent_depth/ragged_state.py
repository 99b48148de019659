"""Token states of a loop whose rows stop at different depths: :class:`LoopStates`.

Each step of the loop has a :class:`~latentcot.backbone.ModelState` of its own, so a token may be real at one depth and absent at
another. A row that left after step m has computed nothing for the steps behind it; what those hold for its token says ``gaps``:

* ``copy``: what step m wrote. Attention has its keys and values; a linear mixer reads once more what it read at step m, from its
  state at the deeper step, which costs one pass through the mixer for each gap;
* ``hold``: nothing. Attention does not see the token there, a linear mixer's state stays as it was.

Where all steps share one state there are no gaps: it holds what each row's last step wrote.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from latentcot.backbone import HybridConfig, ModelState, SequenceContext
from latentcot.backbone.state import LayerState
from latentcot.recurrent_depth.settings import check_choice
from latentcot.recurrent_depth.state_files import StateParts, load_states, save_states

GAPS = ("copy", "hold")
SHARING = ("own", "last", "first", "mean")


@dataclass(frozen=True)
class LoopStates:
    """``steps``: one state for each step, or a single one that all share; ``lengths [B]``: real tokens so far, at any depth (the
    rotary position of the next one); ``gaps`` and ``sharing``: how it is written and read."""

    steps: tuple[ModelState, ...]
    lengths: Tensor
    gaps: str = "copy"
    sharing: str = "own"

    def select(self, rows: Tensor) -> "LoopStates":
        """The given rows (indices or a bool mask), in the given order."""
        return replace(self, steps=tuple(s.select(rows) for s in self.steps), lengths=self.lengths[rows])

    def at(self, step: int) -> ModelState:
        return self.steps[0] if self.sharing != "own" else self.steps[step]

    @property
    def batch_size(self) -> int:
        return len(self.lengths)

    @property
    def nbytes(self) -> int:
        return sum(s.nbytes for s in self.steps)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write one safetensors file; it appears whole or not at all."""
        states = {f"step {i}": state for i, state in enumerate(self.steps)}
        options = {"gaps": self.gaps, "sharing": self.sharing}
        save_states(path, "loop states", StateParts(states, {"lengths": self.lengths}, options))

    @classmethod
    def load(
        cls, path: str | os.PathLike[str], fingerprint: str | None = None, device: torch.device | str = "cpu"
    ) -> "LoopStates":
        """Read what :meth:`save` wrote, onto ``device``. ``ValueError`` when the file is damaged or holds something else,
        :class:`~latentcot.backbone.ForeignStateError` when ``fingerprint`` is given and the states belong to another model."""
        found = load_states(path, "loop states", fingerprint, device)
        try:
            steps = tuple(found.states[f"step {i}"] for i in range(len(found.states)))
            return cls(steps, found.tensors["lengths"], found.options["gaps"], found.options["sharing"])
        except KeyError as error:
            raise ValueError(f"path: {path} lacks {error} of its loop states") from error

    def shared(self, sharing: str) -> "LoopStates":
        """One state in place of one a step: that of the ``last`` or ``first`` step, or their ``mean``."""
        check_choice("sharing", sharing, SHARING)
        if sharing == self.sharing:
            return self
        if self.sharing != "own":
            raise ValueError(f"sharing: {sharing!r} given, but the state is shared as {self.sharing!r} already")
        if sharing == "mean":
            return replace(self, steps=(mean_state(self.steps),), sharing=sharing)
        return replace(self, steps=(at_step(self.steps[-1 if sharing == "last" else 0], 0),), sharing=sharing)


def resolve_gaps(gaps: str | None, config: HybridConfig) -> str:
    """``gaps`` as given; ``None``: ``copy`` where every mixer is attention, else ``hold``, which costs nothing.

    Raises:
        ValueError: an unknown word.
    """
    if gaps is None:
        return "copy" if all(name == "attention" for name in config.mixers) else "hold"
    check_choice("gaps", gaps, GAPS)
    return gaps


def token_context(state: ModelState | None, like: Tensor, mask: Tensor | None, positions: Tensor) -> SequenceContext:
    """Context of tokens ``like [B, S, ...]`` after ``state``, at rotary ``positions [B, S]``: where tokens may be absent, counting
    the state's own would place later ones too early."""
    context = SequenceContext.build(
        like.shape[0], like.shape[1], like.device, attention_mask=mask, state=state, keep_state=state is not None
    )
    return replace(context, positions=positions)


def next_positions(mask: Tensor | None, shape: Sequence[int], lengths: Tensor | None, device: torch.device) -> Tensor:
    """Rotary position of each of the new tokens ``[B, S]``: real tokens before it."""
    if mask is None:
        within = torch.arange(shape[1], device=device).expand(shape[0], shape[1])
    else:
        within = (mask.long().cumsum(1) - 1).clamp(min=0)
    return within if lengths is None else within + lengths[:, None]


def at_step(state: ModelState, step: int) -> ModelState:
    """The same entries at places ``(block, step)``."""
    return replace(state, entries={(block, step): entry for (block, _), entry in state.entries.items()})


def mean_state(states: Sequence[ModelState]) -> ModelState:
    """Mean of every tensor over states that saw the same tokens, at places ``(block, 0)``."""
    moved = [at_step(s, 0) for s in states]
    entries = {
        place: LayerState(
            entry.mixer,
            {
                name: torch.stack([m.entries[place][name] for m in moved]).mean(0).to(t)
                for name, t in entry.tensors.items()
            },
        )
        for place, entry in moved[0].entries.items()
    }
    return replace(moved[0], entries=entries)


def put_rows(full: ModelState, part: ModelState | None, rows: Tensor, donor: ModelState | None = None) -> ModelState:
    """``full`` after one more token of ``rows``, computed apart.

    Args:
        full: before the token, all B rows; not fresh.
        part: after it, of ``rows`` alone and in their order; ``None`` when nobody computed this step.
        rows: indices ``[n]``.
        donor: another step's state after the token: rows that are not among ``rows`` get its last keys and values, or its linear
            state (``copy``). ``None``: they have no token here (``hold``).
    """
    assert full.valid is not None
    assert full.lengths is not None
    given = {} if donor is None else {block: entry for (block, _), entry in donor.entries.items()}
    entries = {}
    for place, before in full.entries.items():
        tensors = {}
        for name, old in before.tensors.items():
            listed = name in ("keys", "values")
            if listed:
                column = old.new_zeros(*old.shape[:2], 1, old.shape[3])
                base = column if donor is None else given[place[0]][name][..., -1:, :].clone()
            else:
                base = (old if donor is None else given[place[0]][name]).clone()
            if part is not None:
                new = part.entries[place][name]
                base[rows] = new[..., -1:, :] if listed else new
            tensors[name] = torch.cat([old, base], 2) if listed else base
        entries[place] = LayerState(before.mixer, tensors)
    seen = torch.full_like(full.valid[:, :1], donor is not None)
    seen[rows] = True
    return ModelState(full.fingerprint, entries, full.lengths + seen[:, 0], torch.cat([full.valid, seen], 1))
