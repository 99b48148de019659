r"""Wavefront generation: later positions are opened before earlier ones have settled (arXiv:2502.05171 and its released code).

Every outer step runs a few recurrences on all open positions at once, reads a provisional token off each, and opens a new position behind
the last. From left to right, positions whose state has stopped changing are frozen: their keys, values and next token stay. Where
sequential decoding waits for r recurrences a token, here a token may come with every outer step.

The cache is the ring of :class:`~latentcot.recurrent_depth.StepCache` ``compress_s`` that holds ``inner`` recurrences, so that open
positions of different ages read the same slots. With ``inner`` = r a position is frozen by the step that opens it, and the tokens
are those of sequential decoding: from the same initial states with ``noise_mixing`` 1, with a warm start with 0. With fewer inner
recurrences they agree where states reach their limit before they are frozen.

The source gives names and values of the two mixing numbers; how they enter is read here as follows.

* ``embedding_average`` :math:`\eta`: :math:`e \leftarrow (1 - \eta)\, e + \eta\, e_{\text{step before}}` of a position that was open
  before, so that a revised token moves its input in steps;
* ``noise_mixing`` :math:`\beta`: a new position starts from :math:`\beta\, s_0 + (1 - \beta)\, s`, with :math:`s_0` its own draw and s the
  state of the position before it.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from latentcot.backbone import ModelState, SequenceContext
from latentcot.recurrent_depth.columns import closed, grows_in_place, opened
from latentcot.recurrent_depth.exit_rule import NO_EXIT, THRESHOLDS
from latentcot.recurrent_depth.huginn_speculative import cut_columns
from latentcot.recurrent_depth.loop import DepthLoop
from latentcot.recurrent_depth.monitors import relative_residual
from latentcot.recurrent_depth.settings import check_count
from latentcot.recurrent_depth.step_cache import StepCache
from latentcot.recurrent_depth.step_pass import run_pass


@dataclass(frozen=True)
class Wavefront:
    """
    Args:
        inner: recurrences of every open position in an outer step.
        headway: positions opened by a step; those behind the first begin with the same provisional token.
        most_open: positions open at a time.
        threshold: a position is frozen when the last recurrence changed its state by less than this share.
        embedding_average, noise_mixing: see this file's beginning.

    Raises:
        ValueError: counts below 1, a negative threshold, a share outside [0, 1].
    """

    inner: int = 4
    headway: int = 1
    most_open: int = 128
    threshold: float = THRESHOLDS["latent_difference"]
    embedding_average: float = 0.1
    noise_mixing: float = 0.5

    def __post_init__(self) -> None:
        for name in ("inner", "headway", "most_open"):
            check_count(f"wavefront: {name}", getattr(self, name), 1)
        if not self.threshold >= 0:
            raise ValueError(f"wavefront: threshold = {self.threshold!r} given, expected a number of at least 0")
        for name in ("embedding_average", "noise_mixing"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"wavefront: {name} = {getattr(self, name)!r} given, expected a number within [0, 1]")


@dataclass(frozen=True)
class WavefrontOutput:
    """
    Args:
        ids: new tokens ``[1, n]``; the end token is the last one if it came.
        recurrences: that the position behind each took until it was frozen, ``[1, n]``.
        steps: outer steps; ``sequential_passes``: steps times (inner + 1), prelude and coda together being one.
        computed: recurrences of single positions in all of them; ``widest``: most positions open at once.
    """

    ids: Tensor
    recurrences: Tensor
    steps: int
    sequential_passes: int
    computed: int
    widest: int


@dataclass
class _Step:
    """What an outer step found for the open positions: ``logits [m, Vocab]``, the rest ``[1, m, D]``, and the state behind all."""

    logits: Tensor
    final: Tensor
    change: Tensor
    embedded: Tensor
    state: ModelState


@torch.no_grad()
def wavefront_generate(
    loop: DepthLoop,
    input_ids: Tensor,
    max_new_tokens: int = 128,
    wavefront: Wavefront | None = None,
    *,
    recurrences: int | None = None,
    eos_token_id: int | None = None,
    generator: torch.Generator | None = None,
) -> WavefrontOutput:
    """Greedy tokens by wavefront.

    Args:
        input_ids: one prompt ``[1, S]``. All but its last token are read at ``recurrences`` first.
        wavefront: the published values by default.
        recurrences: r, after which a position is frozen in any case; default that of the settings. At least ``inner``.
        eos_token_id: ends the answer.
        generator: of the initial states, one for each position; the global generator by default.

    Raises:
        ValueError: several prompts, numbers out of range, more inner recurrences than r, or a core that attends in a window.
    """
    w = Wavefront() if wavefront is None else wavefront
    r = check_count("recurrences", loop.default_recurrences if recurrences is None else recurrences, 1)
    check_count("max_new_tokens", max_new_tokens, 1)
    if w.inner > r:
        raise ValueError(f"wavefront: inner = {w.inner} given, but a position is frozen after {r} recurrences")
    if input_ids.dim() != 2 or input_ids.shape[0] != 1 or not input_ids.shape[1]:
        raise ValueError(f"input_ids: shape {list(input_ids.shape)} given, expected one prompt, [1, S]")
    front = _Front(loop, w, input_ids, max_new_tokens, r, generator)
    ids: list[int] = []
    taken: list[int] = []
    while len(ids) < max_new_tokens and (not ids or ids[-1] != eos_token_id):
        tokens, counts = front.step()
        if eos_token_id in tokens:
            tokens = tokens[: tokens.index(eos_token_id) + 1]
        ids, taken = ids + tokens, taken + counts[: len(tokens)]
    passes = front.steps * (w.inner + 1)
    device = input_ids.device
    return WavefrontOutput(
        torch.tensor([ids], device=device),
        torch.tensor([taken], device=device),
        front.steps,
        passes,
        front.computed,
        front.widest,
    )


class _Front:
    """The open positions: their inputs, states and ages, and the state of everything frozen before them."""

    def __init__(
        self, loop: DepthLoop, w: Wavefront, input_ids: Tensor, new: int, r: int, generator: torch.Generator | None
    ):
        self.loop, self.w, self.r, self.device = loop, w, r, input_ids.device
        core = loop.core.stop - loop.core.start
        # Linear mixers have no ring. One state of the last recurrence fits positions of all ages; at full depth each recurrence keeps
        # its own.
        self.policy = StepCache("compress_s", w.inner * core, linear="per_step" if w.inner == r else "last")
        self.crops = all(name == "attention" for name in loop.backbone.config.mixers)
        self.outside = [*range(loop.prelude.stop), *range(loop.coda.start, loop.backbone.config.num_hidden_layers)]
        prompt = input_ids.shape[1]
        self.last = prompt - 1 + new  # positions that there may be
        weight = loop.backbone.get_input_embeddings().weight
        assert isinstance(weight, Tensor)
        self.noise = None
        if loop.initial.random:
            self.noise = loop.initial.draw(weight.new_empty(self.last, weight.shape[1]), generator)
        self.state = loop.backbone.new_state()
        self.steps = self.computed = self.widest = 0
        if prompt > 1:
            ids = input_ids[:, :-1]
            start = None if self.noise is None else self.noise[None, : prompt - 1]
            read = loop.recur(ids, r, initial_state=start, use_cache=True, logits_to_keep=1, step_cache=self.policy)
            assert read.state is not None
            self.state = read.state
        else:
            loop.check_policy(self.policy)
        self.frozen = prompt - 1
        self.inputs = input_ids[0, -1:].tolist()
        self.ages = [0]
        self.s = self._begin(self.frozen, self.inputs, None)
        self.before: Tensor | None = None

    def _begin(self, position: int, inputs: list[int], previous: Tensor | None) -> Tensor:
        """Initial states ``[1, n, D]`` of positions from ``position`` on; ``previous [1, 1, D]``: state of the one before."""
        if self.noise is not None:
            start = self.noise[None, position : position + len(inputs)]
        else:
            start = self.loop.initial.draw(self.loop.embed(torch.tensor([inputs], device=self.device)))
        beta = self.w.noise_mixing
        return start if previous is None else beta * start + (1 - beta) * previous

    def step(self) -> tuple[list[int], list[int]]:
        """One outer step: the tokens that became final, and the recurrences of the positions behind them."""
        found = self._run(self.inputs, self.s, self.before)
        self.steps += 1
        self.computed += self.w.inner * len(self.inputs)
        self.widest = max(self.widest, len(self.inputs))
        self.ages = [age + self.w.inner for age in self.ages]
        tokens = found.logits.argmax(-1).tolist()
        settled = (found.change < self.w.threshold).tolist()
        count = 0
        while count < len(tokens) and (settled[count] or self.ages[count] >= self.r):
            count += 1
        if count:
            self._freeze(found, count)
        given, ages = tokens[:count], self.ages[:count]
        # what stays open reads the tokens as they are now; the first of them is final already
        following = [given[-1] if count else self.inputs[0], *tokens[count:-1]] if count < len(tokens) else []
        self.frozen, self.ages = self.frozen + count, self.ages[count:]
        self.inputs, self.s = following, found.final[:, count:]
        self.before = found.embedded[:, count:] if following else None
        begin = self.frozen + len(self.inputs)
        fresh = min(self.w.headway, self.w.most_open - len(self.inputs), self.last - begin)
        if fresh > 0:
            new = [tokens[-1]] * fresh
            self.s = torch.cat([self.s, self._begin(begin, new, found.final[:, -1:])], 1)
            self.inputs, self.ages = self.inputs + new, self.ages + [0] * fresh
        return given, ages

    def _freeze(self, found: _Step, count: int) -> None:
        open_still = len(self.inputs) - count
        if not open_still or self.crops:
            self.state = cut_columns(found.state, open_still)
            return
        # The state of a linear mixer can not be cut. What stands before it depends on nothing behind: the same step once more.
        before = None if self.before is None else self.before[:, :count]
        self.state = self._run(self.inputs[:count], self.s[:, :count], before).state
        self.computed += self.w.inner * count

    def _run(self, inputs: list[int], s: Tensor, before: Tensor | None) -> _Step:
        loop, state = self.loop, self.state
        ids = torch.tensor([inputs], device=self.device)
        context = SequenceContext.build(1, len(inputs), self.device, state=state, keep_state=True)
        if grows_in_place(state, len(inputs)):
            state = opened(state, self.outside)
        embedded, state = loop.backbone.run(loop.embed(ids), context, loop.prelude, state)
        if before is not None:
            old = before.shape[1]
            blend = torch.lerp(embedded[:, :old], before[:, :old], self.w.embedding_average)
            embedded = torch.cat([blend, embedded[:, old:]], 1)
        assert state is not None
        found = run_pass(loop, self.policy, NO_EXIT, s, embedded, context, state, self.w.inner)
        hidden, state = loop.finish(found.final, context, found.state)
        assert state is not None
        logits = loop.backbone.head(hidden)[0]
        change = relative_residual(found.previous, found.final)[0]
        return _Step(logits, found.final, change, embedded, closed(state).advance(context))
