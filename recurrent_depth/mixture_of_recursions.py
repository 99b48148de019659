r"""``mixture_of_recursions``: shared blocks, and a router that says how often each token passes through them (arXiv:2507.10524).

First and last blocks are not shared (the pattern called *middle-cycle*); with ``prelude`` and ``coda`` 0 it is *cycle*. With N
recursions and f the shared blocks:

* **expert choice**: each recursion picks tokens among those of the one before,

  .. math:: g_t = \alpha\, \sigma(\theta_t^\top H_t), \qquad H_t \leftarrow H_t + g_t f(H_t) \text{ where selected}

  In training the top :math:`(N - t + 1)/N` of a row's tokens, which looks at the future; an auxiliary loss makes
  :math:`\sigma > 1/2` agree with it, and that threshold, which is causal, is what reads and answers. The first recursion takes all.
* **token choice**: a softmax router at the input gives each token its depth once, by arg max; a loss, or a bias that is moved
  instead of one, balances the depths. Before its last recursion a token's state is f(H), at the last H + g f(H), g the
  probability of its depth. (How the weight enters was not verified in the paper.)

Caches: *recursion* keeps a token's keys only at the depths it reached; *shared* reads those of the first recursion at every depth.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from latentcot.backbone import HybridForCausalLM, ModelState
from latentcot.reasoner import LossOutput, StepContext, TaskBatch, register_method
from latentcot.recurrent_depth.ragged_state import next_positions, token_context
from latentcot.recurrent_depth.reading import Reading, ReadingReasoner
from latentcot.recurrent_depth.routing import (
    balance_loss,
    check_routable,
    run_on_shared_keys,
    run_selected,
    selection_loss,
    top_share,
    z_loss,
)
from latentcot.recurrent_depth.settings import check_choice, check_count, check_keys, merge
from latentcot.recurrent_depth.state_files import StateParts, load_states, save_states
from latentcot.sequences import label_loss, training_rows
from latentcot.training.budget import FlopCounter

ROUTINGS = ("expert", "token")
CACHES = ("recursion", "shared")
BALANCES = ("loss", "bias")
DEFAULTS: dict[str, Any] = {
    "prelude": 1,
    "coda": 1,
    "recursions": 3,
    "routing": "expert",
    "cache": "recursion",
    "alpha": 0.1,
    "auxiliary": 0.001,
    "threshold": 0.5,
    "balance": "loss",
    "balance_weight": 0.1,
    "bias_step": 0.001,
    "z_loss": None,
}


@dataclass(frozen=True)
class RoutedState:
    """``outer``: entries of the blocks that are not shared; ``steps``: one state a recursion (one in all where the cache is shared);
    ``lengths [B]``: real tokens so far."""

    outer: ModelState
    steps: tuple[ModelState, ...]
    lengths: Tensor

    def select(self, rows: Tensor) -> "RoutedState":
        return RoutedState(self.outer.select(rows), tuple(s.select(rows) for s in self.steps), self.lengths[rows])

    @property
    def nbytes(self) -> int:
        return self.outer.nbytes + sum(s.nbytes for s in self.steps)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write one safetensors file; it appears whole or not at all."""
        states = {"outer": self.outer, **{f"step {i}": state for i, state in enumerate(self.steps)}}
        save_states(path, "routed state", StateParts(states, {"lengths": self.lengths}, {}))

    @classmethod
    def load(
        cls, path: str | os.PathLike[str], fingerprint: str | None = None, device: torch.device | str = "cpu"
    ) -> "RoutedState":
        """Read what :meth:`save` wrote, onto ``device``. ``ValueError`` when the file is damaged or holds something else,
        :class:`~latentcot.backbone.ForeignStateError` when ``fingerprint`` is given and the states belong to another model."""
        found = load_states(path, "routed state", fingerprint, device)
        try:
            steps = tuple(found.states[f"step {i}"] for i in range(len(found.states) - 1))
            return cls(found.states["outer"], steps, found.tensors["lengths"])
        except KeyError as error:
            raise ValueError(f"path: {path} lacks {error} of its routed state") from error


@dataclass
class Routed:
    """
    Args:
        hidden: after the last blocks, before the final norm, ``[B, S, D]``.
        selected: who took part in each recursion, ``[B, S]`` each.
        pairs: queries times keys of each recursion, ``[B]`` each.
        router: logits ``[B, S]`` of each recursion (expert choice), or a single ``[B, S, N]``.
        state: when kept.
    """

    hidden: Tensor
    selected: list[Tensor]
    pairs: list[Tensor]
    router: list[Tensor]
    state: RoutedState | None = None

    @property
    def depth(self) -> Tensor:
        """Recursions of each token, ``[B, S]``."""
        return torch.stack(self.selected).sum(0)


@register_method("mixture_of_recursions")
class MixtureOfRecursions(ReadingReasoner):
    """Mixture-of-Recursions over backbone blocks.

    Args:
        backbone: its first ``prelude`` and last ``coda`` blocks run once, those between are shared.
        settings:

            * ``prelude``, ``coda``: 1 and 1. ``recursions``: N, 3.
            * ``routing``: ``expert`` or ``token``. ``cache``: ``recursion`` or ``shared`` (attention alone).
            * ``alpha``: of expert choice, 0.1; ``auxiliary``: weight of its loss, 0.001; ``threshold``: 0.5.
            * ``balance``: of token choice: ``loss`` (``balance_weight`` 0.1) or ``bias``, moved by ``bias_step`` 0.001 a training step
              towards equal loads, without a loss.
            * ``z_loss``: weight; ``None`` = 1e-5 for token choice, 0 for expert choice.

    Raises:
        ValueError: unknown keys, values out of range, no shared block, a sliding window in a shared block, or a shared cache with
            linear mixers.
    """

    load_bias: Tensor

    def __init__(self, backbone: HybridForCausalLM, settings: Mapping[str, Any] | None = None):
        merged = merge("MixtureOfRecursions", DEFAULTS, settings)
        blocks, n = backbone.config.num_hidden_layers, check_count("recursions", merged["recursions"], 1)
        prelude, coda = check_count("prelude", merged["prelude"]), check_count("coda", merged["coda"])
        if prelude + coda >= blocks:
            raise ValueError(
                f"prelude + coda: {prelude} + {coda} given, but the backbone has {blocks} blocks: none is shared"
            )
        check_choice("routing", merged["routing"], ROUTINGS)
        check_choice("cache", merged["cache"], CACHES)
        check_choice("balance", merged["balance"], BALANCES)
        for name in ("alpha", "auxiliary", "threshold", "balance_weight", "bias_step", "z_loss"):
            value = merged[name]
            if name == "z_loss" and value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < float("inf"):
                raise ValueError(f"{name}: {value!r} given, expected a number of at least 0")
        core = slice(prelude, blocks - coda)
        shared = merged["cache"] == "shared"
        check_routable(backbone.config, core, shared, "cache: 'shared' reads keys and values")
        super().__init__(backbone, merged)
        self.prelude, self.core, self.coda = slice(0, prelude), core, slice(blocks - coda, blocks)
        self.recursions = n
        like = backbone.lm_head.weight
        self.router = nn.Linear(backbone.config.hidden_size, n, bias=False, device=like.device, dtype=like.dtype)
        if not self.router.weight.is_meta:
            nn.init.normal_(self.router.weight, 0.0, backbone.config.initializer_range)
        # in fp32 or better: in 16 bits a thousandth more is lost from one half on
        precise = torch.promote_types(self.router.weight.dtype, torch.float32)
        self.register_buffer("load_bias", self.router.weight.detach().new_zeros(n, dtype=precise))

    # -- the pass ----------------------------------------------------------------------------------------------------

    def route(
        self,
        input_ids: Tensor,
        *,
        attention_mask: Tensor | None = None,
        top_k: bool = False,
        threshold: float | None = None,
        state: RoutedState | None = None,
        use_cache: bool = False,
    ) -> Routed:
        """Read ``input_ids [B, S]``.

        Args:
            attention_mask: ``[B, S]``, 1 = real.
            top_k: expert choice by top-k, for training; by threshold otherwise.
            threshold: default that of the settings.
            state, use_cache: go on from a state, return one. Not with ``top_k``, which needs the whole sequence.

        Raises:
            ValueError: a state with ``top_k``, or of another number of recursions.
        """
        keep = use_cache or state is not None
        held = 1 if self.settings["cache"] == "shared" else self.recursions
        if state is not None and len(state.steps) != held:
            raise ValueError(f"state: it holds {len(state.steps)} recursions, expected {held}")
        if keep and top_k:
            raise ValueError(
                "top_k: it compares a token with later ones, so it has no state; leave out state and use_cache"
            )
        limit: float = self.settings["threshold"] if threshold is None else threshold
        shape, device = input_ids.shape, input_ids.device
        hidden = self.backbone.embed(input_ids)
        positions = next_positions(attention_mask, shape, None if state is None else state.lengths, device)
        outer = None if not keep else self.backbone.new_state() if state is None else state.outer
        context = token_context(outer, hidden, attention_mask, positions)
        real = context.real_tokens
        hidden, outer = self.backbone.run(hidden, context, self.prelude, outer)
        shared, kept = self.settings["cache"] == "shared", []
        expert = self.settings["routing"] == "expert"
        logits = [] if expert else [self.router(hidden)]
        depth, chance = self._depths(logits[0]) if not expert else (None, None)
        active, selected, pairs = real, [], []
        for t in range(self.recursions):
            if expert:
                logits.append(hidden @ self.router.weight[t])
                if t > 0 and top_k:
                    active = top_share(logits[t], active, real, (self.recursions - t) / self.recursions)
                elif t > 0:
                    active = active & (torch.sigmoid(logits[t]) > limit)
            else:
                assert depth is not None
                active = real & (depth >= t)
            selected.append(active)
            before = None
            if shared and t > 0:  # one read over all that the first recursion holds
                pairs.append(((positions + 1) * active).sum(1))
                found = run_on_shared_keys(self.backbone, hidden, active, positions, self.core, kept[0])
            else:
                if keep or shared:
                    before = self.backbone.new_state() if state is None else state.steps[t]
                old = 0 if before is None or before.lengths is None else before.lengths
                n = active.sum(1)
                pairs.append(n * old + n * (n + 1) // 2)
                if shared:  # every column stays in its place, so that later reads can find it
                    around = token_context(before, hidden, attention_mask, positions)
                    found, before = self.backbone.run(hidden, around, self.core, before)
                    found = found * real[..., None]
                    kept.append(before.advance(around))  # type: ignore[union-attr]
                else:
                    found, before = run_selected(self.backbone, hidden, active, positions, self.core, before, keep)
                    if before is not None:
                        kept.append(before)
            if expert:
                weight = self.settings["alpha"] * torch.sigmoid(logits[t])[..., None]
                hidden = hidden + weight * found  # zeros where not selected
            else:
                assert depth is not None
                assert chance is not None
                new = torch.where((depth == t)[..., None], hidden + chance[..., None] * found, found)
                hidden = torch.where(active[..., None], new, hidden)
        hidden, outer = self.backbone.run(hidden, context, self.coda, outer)
        new_state = None
        if outer is not None:
            lengths = real.sum(1) + (0 if state is None else state.lengths)
            new_state = RoutedState(outer.advance(context), tuple(kept), lengths)
        return Routed(hidden, selected, pairs, logits, new_state)

    def _depths(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Token choice: depth from 0 and its probability, ``[B, S]`` both. A balancing bias chooses, but does not weigh."""
        p = logits.softmax(-1)
        depth = (logits + self.load_bias).argmax(-1) if self.settings["balance"] == "bias" else p.argmax(-1)
        return depth, p.gather(-1, depth[..., None])[..., 0]

    # -- training ----------------------------------------------------------------------------------------------------

    def loss(self, batch: TaskBatch, ctx: StepContext, carry: object = None) -> LossOutput:
        """Next-token loss on answer and ``<eos>`` plus the router's losses. ``parts``: both, and the mean depth of real tokens."""
        row = training_rows(batch)
        s = self.settings
        out = self.route(row.ids, attention_mask=row.mask, top_k=s["routing"] == "expert")
        task = label_loss(self.backbone.head(out.hidden), row.labels)
        extra = task.new_zeros(())
        if s["routing"] == "expert":
            for t in range(1, self.recursions):
                extra = extra + s["auxiliary"] * selection_loss(out.router[t], out.selected[t], out.selected[t - 1])
                extra = extra + (s["z_loss"] or 0.0) * out.router[t][out.selected[t - 1]].square().mean()
        else:
            logits = out.router[0][row.mask]
            depth = (out.depth - 1)[row.mask]
            if s["balance"] == "loss":
                extra = extra + s["balance_weight"] * balance_loss(logits.softmax(-1), depth)
            elif self.training:
                self.move_bias(depth)
            extra = extra + (1e-5 if s["z_loss"] is None else s["z_loss"]) * z_loss(logits)
        parts = {
            "loss": float(task.detach()),
            "router": float(extra.detach()),
            "mean_depth": float(out.depth[row.mask].double().mean()),
        }
        tokens = row.mask.sum(1).double()
        flops = self.flops(out, tokens, 0, tokens)
        return LossOutput(task + extra, parts, float(flops.sum()))

    @torch.no_grad()
    def move_bias(self, depth: Tensor) -> None:
        """One step of balancing without a loss: depths with fewer tokens than their share (``depth [P]``, from 0) are raised."""
        load = torch.bincount(depth, minlength=self.recursions).double()
        # a cast of the model has cast the bias too
        precise = self.load_bias.to(torch.promote_types(self.load_bias.dtype, torch.float32))
        self.load_bias = precise + self.settings["bias_step"] * (load.mean() - load).sign().to(precise)

    def flops(self, out: Routed, new: Tensor, past: Tensor | int, head: Tensor | int) -> Tensor:
        """Forward FLOPs of a pass over ``new`` tokens after ``past`` ones, row by row, the head at ``head`` positions."""
        first, last = (FlopCounter(self.backbone, part) for part in (self.prelude, self.coda))
        core, width = FlopCounter(self.backbone, self.core), self.backbone.config.hidden_size
        found = first(new, past) + last(new, past, head)
        for taken, pairs in zip(out.selected, out.pairs, strict=True):
            found = found + core.token * taken.sum(1).double() + core.pair * pairs.double()
        found = found + 2.0 * width * self.recursions * new
        assert isinstance(found, Tensor)
        return found

    # -- answers -----------------------------------------------------------------------------------------------------

    def options(self, knobs: Mapping[str, Any]) -> float:
        check_keys("limits.knobs", knobs, ("threshold",))
        value = knobs.get("threshold", self.settings["threshold"])
        if isinstance(value, bool) or not isinstance(value, int | float) or not value >= 0:
            raise ValueError(f"limits.knobs: threshold: {value!r} given, expected a number of at least 0")
        return float(value)

    def most_passes(self, options: float) -> int:
        return self.recursions + 1

    def read(self, ids: Tensor, mask: Tensor | None, state: RoutedState | None, options: float) -> Reading:
        """A pass by threshold. ``passes``: the deepest token's recursions, and one for the blocks around them."""
        out = self.route(ids, attention_mask=mask, threshold=options, state=state, use_cache=True)
        assert out.state is not None
        new = torch.ones_like(ids).sum(1) if mask is None else mask.sum(1)
        past: Tensor | int = 0 if state is None else state.lengths.double()
        flops = self.flops(out, new.double(), past, 1)
        logits = self.backbone.head(out.hidden[:, -1:])[:, 0]
        return Reading(logits, out.state, out.depth.amax(1) + 1, flops, out.depth[:, -1])
