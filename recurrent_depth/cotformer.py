r"""``cotformer``: repeats of shared blocks as extra tokens of the sequence (arXiv:2310.10845).

At repeat i position t attends to the keys and values of *every repeat up to i at every position up to t*: the cache grows by one
entry a position and repeat, at the rotary position of the token. Blocks before and after the repeated ones are not shared.

.. math:: x \leftarrow n(f(x + (m - i + 1)\, d)), \qquad i = 1 \dots m

f the shared blocks, n a layer norm that closes each repeat, d a learned depth embedding, scaled by the repeats that remain (counted
with the one that begins; our reading). The **adaptive** variant has a linear router without bias before each further repeat,

.. math:: s = \sigma(w_i \cdot x), \qquad x \leftarrow (1 - s)\, x + s f(x) \text{ where chosen}

and who is not chosen stops for good. In training the top fraction of a row's tokens is chosen, with capacities drawn at random and
sorted, so that any budget works later. That choice looks at the future: reading and answering choose by a threshold on s (ours),
which is causal. The first repeat takes all.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from latentcot.backbone import HybridForCausalLM, ModelState
from latentcot.reasoner import LossOutput, StepContext, TaskBatch, register_method
from latentcot.recurrent_depth.ragged_state import next_positions, put_rows, token_context
from latentcot.recurrent_depth.reading import Reading, ReadingReasoner
from latentcot.recurrent_depth.routing import MaskedContext, check_routable, top_share
from latentcot.recurrent_depth.settings import check_count, check_keys, merge
from latentcot.recurrent_depth.state_files import StateParts, load_states, save_states
from latentcot.sequences import label_loss, training_rows
from latentcot.training.budget import FlopCounter

DEFAULTS: dict[str, Any] = {
    "prelude": 1,
    "coda": 1,
    "repeats": 3,
    "repeat_norm": True,
    "depth_embedding": True,
    "adaptive": False,
    "threshold": 0.5,
}


@dataclass(frozen=True)
class Interleaved:
    """Cache of the repeated blocks: ``keys``: their states, entries at ``(b, 0)``; of each column ``position`` and ``repeat``
    ``[B, T]`` (from 0); ``keys.valid`` says which columns are real."""

    keys: ModelState
    position: Tensor
    repeat: Tensor

    def select(self, rows: Tensor) -> "Interleaved":
        return Interleaved(self.keys.select(rows), self.position[rows], self.repeat[rows])

    def with_columns(self, keys: ModelState, position: Tensor, repeat: int) -> "Interleaved":
        number = torch.full_like(position, repeat)
        return Interleaved(keys, torch.cat([self.position, position], 1), torch.cat([self.repeat, number], 1))


@dataclass(frozen=True)
class CoTState:
    """``outer``: entries of the blocks that are not shared; ``inner``: the interleaved cache; ``lengths [B]``: real tokens so far."""

    outer: ModelState
    inner: Interleaved
    lengths: Tensor

    def select(self, rows: Tensor) -> "CoTState":
        return CoTState(self.outer.select(rows), self.inner.select(rows), self.lengths[rows])

    @property
    def nbytes(self) -> int:
        return self.outer.nbytes + self.inner.keys.nbytes

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write one safetensors file; it appears whole or not at all."""
        beside = {"position": self.inner.position, "repeat": self.inner.repeat, "lengths": self.lengths}
        save_states(path, "cotformer state", StateParts({"outer": self.outer, "inner": self.inner.keys}, beside, {}))

    @classmethod
    def load(
        cls, path: str | os.PathLike[str], fingerprint: str | None = None, device: torch.device | str = "cpu"
    ) -> "CoTState":
        """Read what :meth:`save` wrote, onto ``device``. ``ValueError`` when the file is damaged or holds something else,
        :class:`~latentcot.backbone.ForeignStateError` when ``fingerprint`` is given and the states belong to another model."""
        found = load_states(path, "cotformer state", fingerprint, device)
        try:
            inner = Interleaved(found.states["inner"], found.tensors["position"], found.tensors["repeat"])
            return cls(found.states["outer"], inner, found.tensors["lengths"])
        except KeyError as error:
            raise ValueError(f"path: {path} lacks {error} of its state") from error


@dataclass
class Repeated:
    """
    Args:
        hidden: after the last blocks, before the final norm, ``[B, S, D]``.
        selected: who took part in each repeat, ``[B, S]`` each.
        pairs: queries times keys of each repeat, ``[B]`` each.
        state: when kept.
    """

    hidden: Tensor
    selected: list[Tensor]
    pairs: list[Tensor]
    state: CoTState | None = None

    @property
    def depth(self) -> Tensor:
        """Repeats of each token, ``[B, S]``."""
        return torch.stack(self.selected).sum(0)


@register_method("cotformer")
class CoTFormer(ReadingReasoner):
    """CoTFormer over backbone blocks.

    Args:
        backbone: its first ``prelude`` and last ``coda`` blocks run once (any mixer); those between are repeated (attention alone:
            a recurrent state has no entries to attend to again).
        settings:

            * ``prelude``, ``coda``: 1 and 1 (the paper's better variant: 2 and 1). ``repeats``: m, 3.
            * ``repeat_norm``, ``depth_embedding``: whether there are n and d.
            * ``adaptive``: whether there are routers. ``threshold``: on s, 0.5.

    Raises:
        ValueError: unknown keys, values out of range, no repeated block, or a repeated block that is no attention or has a window.
    """

    def __init__(self, backbone: HybridForCausalLM, settings: Mapping[str, Any] | None = None):
        merged = merge("CoTFormer", DEFAULTS, settings)
        blocks, repeats = backbone.config.num_hidden_layers, check_count("repeats", merged["repeats"], 1)
        prelude, coda = check_count("prelude", merged["prelude"]), check_count("coda", merged["coda"])
        if prelude + coda >= blocks:
            raise ValueError(
                f"prelude + coda: {prelude} + {coda} given, but the backbone has {blocks} blocks: none is repeated"
            )
        for name in ("repeat_norm", "depth_embedding", "adaptive"):
            if not isinstance(merged[name], bool):
                raise ValueError(f"{name}: {merged[name]!r} given, expected True or False")
        _check_threshold("threshold", merged["threshold"])
        core = slice(prelude, blocks - coda)
        check_routable(backbone.config, core, True, "repeats attend to the entries of earlier ones")
        super().__init__(backbone, merged)
        self.prelude, self.core, self.coda = slice(0, prelude), core, slice(blocks - coda, blocks)
        self.repeats = repeats
        like, width = backbone.lm_head.weight, backbone.config.hidden_size
        where: dict[str, Any] = {"device": like.device, "dtype": like.dtype}
        self.norm = nn.LayerNorm(width, **where) if merged["repeat_norm"] else nn.Identity()
        self.depth = nn.Parameter(torch.zeros(width, **where)) if merged["depth_embedding"] else None
        self.router = nn.Linear(width, repeats - 1, bias=False, **where) if merged["adaptive"] and repeats > 1 else None
        if self.router is not None and not self.router.weight.is_meta:
            nn.init.normal_(self.router.weight, 0.0, backbone.config.initializer_range)

    # -- the pass ----------------------------------------------------------------------------------------------------

    def repeat(
        self,
        input_ids: Tensor,
        *,
        attention_mask: Tensor | None = None,
        capacities: Sequence[float] | None = None,
        threshold: float | None = None,
        state: CoTState | None = None,
        use_cache: bool = False,
    ) -> Repeated:
        """Read ``input_ids [B, S]``.

        Args:
            attention_mask: ``[B, S]``, 1 = real.
            capacities: adaptive: fraction of a row's tokens in each repeat after the first, not rising; chosen by top-k over the whole
                sequence. ``None``: by threshold.
            threshold: default that of the settings.
            state, use_cache: go on from a state, return one. Not with ``capacities``.

        Raises:
            ValueError: capacities without a router, of another number or out of order, or together with a state.
        """
        keep = use_cache or state is not None
        self._check_capacities(capacities, keep)
        limit: float = self.settings["threshold"] if threshold is None else threshold
        shape, device = input_ids.shape, input_ids.device
        hidden = self.backbone.embed(input_ids)
        positions = next_positions(attention_mask, shape, None if state is None else state.lengths, device)
        outer = None if not keep else self.backbone.new_state() if state is None else state.outer
        context = token_context(outer, hidden, attention_mask, positions)
        real = context.real_tokens
        hidden, outer = self.backbone.run(hidden, context, self.prelude, outer)
        none = positions[:, :0]
        inner = Interleaved(self.backbone.new_state(), none, none) if state is None else state.inner
        active, selected, pairs = real, [], []
        for i in range(self.repeats):
            share = None
            if i > 0 and self.router is not None:
                logit = hidden @ self.router.weight[i - 1]
                share = torch.sigmoid(logit)[..., None]
                if capacities is not None:
                    active = top_share(logit, active, real, capacities[i - 1])
                else:
                    active = active & (share[..., 0] > limit)
            selected.append(active)
            start = hidden if self.depth is None else hidden + (self.repeats - i) * self.depth
            found, inner, seen = self._run_core(start, active, positions, inner, i)
            pairs.append(seen)
            found = self.norm(found)
            new = found if share is None else (1 - share) * hidden + share * found
            hidden = torch.where(active[..., None], new, hidden)
        hidden, outer = self.backbone.run(hidden, context, self.coda, outer)
        new_state = None
        if outer is not None:
            lengths = real.sum(1) + (0 if state is None else state.lengths)
            new_state = CoTState(outer.advance(context), inner, lengths)
        return Repeated(hidden, selected, pairs, new_state)

    def _run_core(
        self, hidden: Tensor, active: Tensor, positions: Tensor, inner: Interleaved, repeat: int
    ) -> tuple[Tensor, Interleaved, Tensor]:
        """The shared blocks on active tokens: output ``[B, S, D]`` (anything where inactive), the longer cache, and queries times keys
        ``[B]``. One token a row: rows that are not active are not computed."""
        batch, length = active.shape
        if length == 1 and not inner.keys.is_fresh:
            rows = active[:, 0].nonzero()[:, 0]
            pairs, part, out = torch.zeros_like(positions[:, 0]), None, hidden
            if len(rows):
                chosen = inner if len(rows) == batch else inner.select(rows)
                ones = torch.ones_like(active[rows])
                context = _context(positions[rows], ones, chosen, repeat)
                found, part = self.backbone.run(hidden[rows], context, self.core, chosen.keys)
                out = hidden.index_copy(0, rows, found)
                assert context.seen is not None
                pairs[rows] = context.seen.sum((1, 2, 3))
            return out, inner.with_columns(put_rows(inner.keys, part, rows), positions, repeat), pairs
        width = max(1, int(active.sum(1).max()))
        order = torch.argsort((~active).to(torch.uint8), dim=1, stable=True)[:, :width]
        real, places = active.gather(1, order), positions.gather(1, order)
        context = _context(places, real, inner, repeat)
        found, keys = self.backbone.run(hidden.take_along_dim(order[..., None], 1), context, self.core, inner.keys)
        assert keys is not None
        assert context.seen is not None
        pairs = (context.seen & real[:, None, :, None]).sum((1, 2, 3))
        out = hidden.scatter(1, order[..., None].expand_as(found), found)
        return out, inner.with_columns(keys.advance(context), places, repeat), pairs

    def _check_capacities(self, capacities: Sequence[float] | None, keep: bool) -> None:
        if capacities is None:
            return
        if self.router is None:
            raise ValueError("capacities: given, but there is no router; use adaptive = True and at least two repeats")
        if keep:
            raise ValueError("capacities: top-k compares a token with later ones, so it has no state; use a threshold")
        falling = all(1 >= a >= b >= 0 for a, b in zip([1, *capacities], capacities, strict=False))
        if len(capacities) != self.repeats - 1 or not falling:
            raise ValueError(
                f"capacities: {list(capacities)} given, expected {self.repeats - 1} numbers within [0, 1] that do not rise"
            )

    # -- training ----------------------------------------------------------------------------------------------------

    def loss(self, batch: TaskBatch, ctx: StepContext, carry: object = None) -> LossOutput:
        """Next-token loss of the last repeat on answer and ``<eos>``; the adaptive variant draws sorted uniform capacities."""
        row = training_rows(batch)
        capacities = None
        if self.router is not None:
            drawn = torch.rand(self.repeats - 1, generator=ctx.generator, dtype=torch.float64)
            capacities = drawn.sort(descending=True).values.tolist()
        out = self.repeat(row.ids, attention_mask=row.mask, capacities=capacities)
        loss = label_loss(self.backbone.head(out.hidden), row.labels)
        parts = {"loss": float(loss.detach()), "mean_depth": float(out.depth[row.mask].double().mean())}
        tokens = row.mask.sum(1).double()
        return LossOutput(loss, parts, float(self.flops(out, tokens, 0, tokens).sum()))

    def flops(self, out: Repeated, new: Tensor, past: Tensor | int, head: Tensor | int) -> Tensor:
        """Forward FLOPs of a pass over ``new`` tokens after ``past`` ones, row by row, the head at ``head`` positions."""
        first, last = (FlopCounter(self.backbone, part) for part in (self.prelude, self.coda))
        core = FlopCounter(self.backbone, self.core)
        found = first(new, past) + last(new, past, head)
        for taken, pairs in zip(out.selected, out.pairs, strict=True):
            found = found + core.token * taken.sum(1).double() + core.pair * pairs.double()
        if self.router is not None:
            found = found + 2.0 * self.router.weight.numel() * new
        assert isinstance(found, Tensor)
        return found

    # -- answers -----------------------------------------------------------------------------------------------------

    def options(self, knobs: Mapping[str, Any]) -> float:
        check_keys("limits.knobs", knobs, ("threshold",))
        return _check_threshold("limits.knobs: threshold", knobs.get("threshold", self.settings["threshold"]))

    def most_passes(self, options: float) -> int:
        return self.repeats + 1

    def read(self, ids: Tensor, mask: Tensor | None, state: CoTState | None, options: float) -> Reading:
        """A pass by threshold. ``passes``: the deepest token's repeats, and one for the blocks around them."""
        out = self.repeat(ids, attention_mask=mask, threshold=options, state=state, use_cache=True)
        assert out.state is not None
        new = torch.ones_like(ids).sum(1) if mask is None else mask.sum(1)
        past: Tensor | int = 0 if state is None else state.lengths.double()
        flops = self.flops(out, new.double(), past, 1)
        logits = self.backbone.head(out.hidden[:, -1:])[:, 0]
        return Reading(logits, out.state, out.depth.amax(1) + 1, flops, out.depth[:, -1])


def _context(positions: Tensor, real: Tensor, inner: Interleaved, repeat: int) -> MaskedContext:
    """Who sees whom at this repeat: stored columns first, then the tokens themselves (their own key included)."""
    own = (positions[:, None, :] <= positions[:, :, None]) & real[:, None, :]
    # A column that only fills up sees itself, so that no softmax runs over nothing.
    own = own | torch.eye(positions.shape[1], dtype=torch.bool, device=positions.device)
    seen = own
    if inner.keys.valid is not None:
        stored = (inner.position[:, None, :] <= positions[:, :, None]) & (inner.keys.valid & (inner.repeat <= repeat))[
            :, None
        ]
        seen = torch.cat([stored, own], 2)
    return MaskedContext(positions=positions, mask=real, keep_state=True, seen=seen[:, None])


def _check_threshold(argument: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not value >= 0:
        raise ValueError(f"{argument}: {value!r} given, expected a number of at least 0")
    return float(value)
