r"""``universal_transformer``: one stack for every step, each position halting by itself (arXiv:1807.03819, ACT of arXiv:1603.08983).

.. math::
    x_t &= F(x_{t-1} + \text{coordinates}(i, t)) && \text{where position i still runs, else } x_{t-1} \\
    h_t &= \sigma(w \cdot x_t + b), \qquad N = \min\{n : \textstyle\sum_{t \le n} h_t \ge 1 - \epsilon\} \\
    R &= 1 - \textstyle\sum_{t < N} h_t, \qquad \text{out} = \textstyle\sum_{t<N} h_t x_t + R\, x_N

The cost N + R is added to the loss with weight :math:`\tau`; its gradient flows through R alone. Stopped positions are copied
forward and stay visible to the others. F is all blocks of the backbone. The weighted mean is a state that no step produced: unlike
exits that copy the last state, it can not be gone on from.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from latentcot.backbone import HybridForCausalLM, ModelState, SequenceContext
from latentcot.reasoner import LossOutput, StepContext, TaskBatch, register_method
from latentcot.recurrent_depth.reading import Reading, ReadingReasoner
from latentcot.recurrent_depth.settings import check_choice, check_count, check_keys, merge
from latentcot.sequences import label_loss, training_rows
from latentcot.training.budget import FlopCounter

DEFAULTS: dict[str, Any] = {"steps": 6, "epsilon": 0.01, "cost": 0.01, "coordinates": "both"}
COORDINATES = ("both", "step", "none")


@dataclass
class Halted:
    """``hidden [B, S, D]``: the weighted mean, before the final norm; ``steps [B, S]``: N; ``remainder [B, S]``: R;
    ``block_passes``: rows times steps computed; ``state`` when it was kept."""

    hidden: Tensor
    steps: Tensor
    remainder: Tensor
    block_passes: int
    state: ModelState | None = None


def act_weights(chance: Tensor, epsilon: float = 0.01) -> tuple[Tensor, Tensor, Tensor]:
    """What ACT makes of halting chances ``h [T, ...]``: weights ``[T, ...]`` that sum to 1, N (int64) and R ``[...]``.

    A position that has not halted by step T halts there.
    """
    if chance.dim() < 1 or not len(chance):
        raise ValueError(f"chance: shape {list(chance.shape)} given, expected [T, ...] with at least one step")
    spent = chance.cumsum(0)
    steps = (spent[:-1] < 1 - epsilon).sum(0) + 1
    number = torch.arange(1, len(chance) + 1, device=chance.device).view(-1, *[1] * (chance.dim() - 1))
    before = torch.where(number < steps, chance, 0)
    remainder = 1 - before.sum(0)
    return torch.where(number == steps, remainder, before), steps, remainder


def coordinates(positions: Tensor, step: int | None, width: int, dtype: torch.dtype) -> Tensor:
    r"""Sinusoids of position and step, added up: ``positions [B, S]`` (or ``[1, 1]`` zeros to leave them out) to ``[B, S, width]``.

    Channel 2j: :math:`\sin(i / 10000^{2j/D}) + \sin(t / 10000^{2j/D})`, channel 2j + 1 the cosines; ``step=None`` leaves t out.
    """
    rate = 10000.0 ** -(torch.arange(0, width, 2, device=positions.device, dtype=torch.float64) / width)
    angle = positions.double()[..., None] * rate
    pair = torch.stack([angle.sin(), angle.cos()], -1)
    if step is not None:
        pair = pair + torch.stack([(step * rate).sin(), (step * rate).cos()], -1)
    return pair.flatten(-2)[..., :width].to(dtype)


@register_method("universal_transformer")
class UniversalTransformer(ReadingReasoner):
    """A universal transformer over backbone blocks, of any mixer.

    Args:
        backbone: all of it is F.
        settings:

            * ``steps``: T, the most a position takes; 6 (not published).
            * ``epsilon``: 0.01; ``cost``: :math:`\\tau` = 0.01. Starting values; whether the paper has them was not verified.
            * ``coordinates``: sinusoids added before every step: ``both`` (position and step, as published), ``step``, or ``none``
              (rotary attention and linear mixers know positions by themselves).

    Raises:
        ValueError: unknown keys, values out of range.
    """

    def __init__(self, backbone: HybridForCausalLM, settings: Mapping[str, Any] | None = None):
        merged = merge("UniversalTransformer", DEFAULTS, settings)
        check_count("steps", merged["steps"], 1)
        check_choice("coordinates", merged["coordinates"], COORDINATES)
        for name, low, high in (("epsilon", 0.0, 1.0), ("cost", 0.0, float("inf"))):
            value = merged[name]
            if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value < high:
                raise ValueError(f"{name}: {value!r} given, expected a number within [{low}, {high})")
        super().__init__(backbone, merged)
        like = backbone.lm_head.weight
        self.halt = nn.Linear(backbone.config.hidden_size, 1, device=like.device, dtype=like.dtype)
        if not self.halt.weight.is_meta:
            nn.init.normal_(self.halt.weight, 0.0, backbone.config.initializer_range)
            nn.init.zeros_(self.halt.bias)

    def recur(
        self,
        input_ids: Tensor,
        steps: int | None = None,
        *,
        attention_mask: Tensor | None = None,
        state: ModelState | None = None,
        use_cache: bool = False,
    ) -> Halted:
        """Read ``input_ids [B, S]``.

        Without a state, a row leaves the computation once all its positions have stopped. With one, every step is computed: a later
        token may go deeper than all before it, and sees what they have there.

        Raises:
            ValueError: a state of another number of steps.
        """
        total = check_count("steps", self.settings["steps"] if steps is None else steps, 1)
        keep = use_cache or state is not None
        if state is not None and not state.is_fresh:
            stored = 1 + max((t for _, t in state.entries), default=-1)
            if stored != total:
                raise ValueError(f"state: made with {stored} steps, so it can not be continued with {total}")
        context = SequenceContext.build(
            len(input_ids),
            input_ids.shape[1],
            input_ids.device,
            attention_mask=attention_mask,
            state=state,
            keep_state=keep,
        )
        x = self.backbone.embed(input_ids)
        precise = torch.promote_types(x.dtype, torch.float32)
        out, spent = torch.zeros_like(x), torch.zeros_like(x[..., 0], dtype=precise)
        remainder, taken = spent, torch.zeros_like(spent, dtype=torch.int64)
        running, rows, computed = context.real_tokens, torch.arange(len(x), device=x.device), 0
        for t in range(1, total + 1):
            here = running[rows]
            kind = self.settings["coordinates"]
            start = x
            if kind != "none":
                places = context.positions if kind == "both" else torch.zeros_like(context.positions)
                added = coordinates(places, t, x.shape[-1], x.dtype)
                # Position zero has cosines too; without positions they leave again.
                start = x + (added if kind == "both" else added - coordinates(places, None, x.shape[-1], x.dtype))
            new, state = self.backbone.run(start, context, slice(None), state, t - 1 if keep else 0)
            computed += len(rows)
            x = torch.where(here[..., None], new, x)
            chance = torch.sigmoid(self.halt(x)[..., 0].to(precise))
            before = spent[rows]
            last = here & ((before + chance >= 1 - self.settings["epsilon"]) | (t == total))
            left = 1 - before
            weight = torch.where(last, left, chance) * here
            out = out.index_add(0, rows, weight[..., None].to(x.dtype) * x)
            remainder = remainder.index_add(0, rows, torch.where(last, left, 0))
            spent = spent.index_add(0, rows, torch.where(here & ~last, chance, 0))
            taken[rows] += here
            running = running.clone()
            running[rows] = here & ~last
            if keep:
                continue
            stay = running[rows].any(1)
            if not bool(stay.any()):
                break
            if not bool(stay.all()):
                x, rows = x[stay], rows[stay]
                context = SequenceContext.build(len(x), x.shape[1], x.device, attention_mask=context.real_tokens[stay])
        state = None if state is None else state.advance(context)
        return Halted(out, taken, remainder, computed, state)

    def loss(self, batch: TaskBatch, ctx: StepContext, carry: object = None) -> LossOutput:
        """Next-token loss on answer and ``<eos>`` plus the cost, the mean of N + R over real positions."""
        row = training_rows(batch)
        found = self.recur(row.ids, attention_mask=row.mask)
        task = label_loss(self.backbone.head(found.hidden), row.labels)
        ponder = (found.steps + found.remainder)[row.mask].mean()
        loss = task + self.settings["cost"] * ponder.to(task.dtype)
        parts = {"loss": float(task.detach()), "mean_steps": float(found.steps[row.mask].double().mean())}
        tokens = row.mask.sum(1).double()
        count = FlopCounter(self.backbone)
        deepest = found.steps.amax(1)
        flops = deepest * (count(tokens) + 2.0 * self.halt.weight.numel() * tokens) + count.head * tokens
        return LossOutput(loss, parts, float(flops.sum()))

    # -- answers -----------------------------------------------------------------------------------------------------

    def options(self, knobs: Mapping[str, Any]) -> int:
        check_keys("limits.knobs", knobs, ("steps",))
        return check_count("limits.knobs: steps", knobs.get("steps", self.settings["steps"]), 1)

    def most_passes(self, options: int) -> int:
        return options

    def read(self, ids: Tensor, mask: Tensor | None, state: ModelState | None, options: int) -> Reading:
        """Every step is computed (see :meth:`recur`); ``depth`` is where the last token stopped."""
        past = 0 if state is None or state.lengths is None else state.lengths.double()
        found = self.recur(ids, options, attention_mask=mask, state=state, use_cache=True)
        tokens = torch.ones_like(ids).sum(1).double() if mask is None else mask.sum(1).double()
        count = FlopCounter(self.backbone)
        flops = options * (count(tokens, past) + 2.0 * self.halt.weight.numel() * tokens) + count.head
        assert isinstance(flops, Tensor)
        assert found.state is not None
        passes = torch.full_like(ids[:, 0], options)
        return Reading(self.backbone.head(found.hidden[:, -1:])[:, 0], found.state, passes, flops, found.steps[:, -1])
