r"""Fast decoding: :class:`DecodeEngine` holds the state of a fixed batch in place and replays one CUDA graph a token.

::

    engine = DecodeEngine(model, batch=4, max_length=4096)
    first = engine.prefill(input_ids, attention_mask)   # [4, S], padding anywhere; the first token of each row, [4]
    ids = engine.generate(256)                          # [4, 256], the first included; as model.generate(do_sample=False)

``model.generate`` runs every layer's Python for every token and makes new states; what a token costs then is the host's time. Here
buffers have fixed addresses, positions are counted on the device and nothing is read back, so a whole token, the choice of the next
one included, is captured once and replayed. On a CPU, and with ``cuda_graph=False``, the same code runs without a graph.

Attention looks at a window of its buffers that grows by powers of two, one graph a window: a token costs what the context so far
costs, not what ``max_length`` would.

The engine copies projections when it is made (joined, so that fewer products run): train or change the model, and make a new one.
"""

from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from latentcot.backbone.engine_steps import AttentionStep, BlockStep, Clock, project_in
from latentcot.backbone.generation import GREEDY, Sampling, prefill
from latentcot.backbone.mixers.base import LOWER_BOUNDS
from latentcot.backbone.mixers.bounds import stacked_bounds
from latentcot.backbone.model import HybridForCausalLM
from latentcot.backbone.norms import RMSNorm
from latentcot.backbone.state import ForeignStateError, ModelState

FIRST_WINDOW = 256  # columns of attention's first window
CHECK_EVERY = 32  # tokens between looks at whether every row has ended, each of which waits for the device


class DecodeEngine:
    """Decodes ``batch`` rows at once, each at a position of its own.

    Args:
        model: in the dtype and on the device to decode with.
        batch: rows B.
        max_length: tokens a row may hold, prompt included. Bounds attention's buffers; a stack without attention has no limit.
        cuda_graph: capture a token in CUDA graphs (only on a CUDA device; elsewhere there are none).
        sampling: how tokens are chosen; greedy unless given.
        seed: of the draws; ``None`` = a fresh one.

    Raises:
        TypeError, ValueError: not a hybrid model, sizes below 1.
    """

    @torch.no_grad()
    def __init__(
        self,
        model: HybridForCausalLM,
        batch: int,
        max_length: int,
        *,
        cuda_graph: bool = True,
        sampling: Sampling = GREEDY,
        seed: int | None = None,
    ):
        if not isinstance(model, HybridForCausalLM):
            raise TypeError(f"model: a HybridForCausalLM is needed, got {type(model).__name__}")
        for name, value in (("batch", batch), ("max_length", max_length)):
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}: expected a positive integer, got {value!r}")
        for name, only in (("norm", "rms"), ("modulation", None), ("head_bias", False)):
            if getattr(model.config, name) != only:
                raise ValueError(
                    f"model: the engine knows {name} = {only!r} alone, got {getattr(model.config, name)!r}"
                )
        self.model, self.batch, self.max_length, self.sampling = model, batch, max_length, sampling
        weight = self._head = cast(Tensor, model.lm_head.weight)
        self.device = weight.device
        bounds = getattr(model.model, LOWER_BOUNDS, None)
        tables = {} if bounds is None else {LOWER_BOUNDS: stacked_bounds(bounds)}
        width = model.config.hidden_size
        self.clock = Clock(batch, _aligned(max_length), width, weight.dtype, self.device, tables)
        self.blocks = [BlockStep(block, self.clock) for block in model.model.layers]  # type: ignore[arg-type]
        self.limited = any(isinstance(block.mixer, AttentionStep) for block in self.blocks)
        self.windows = _windows(self.clock.max_length) if self.limited else [self.clock.max_length]
        self.generator = torch.Generator(self.device)
        if seed is None:
            self.generator.seed()
        else:
            self.generator.manual_seed(seed)
        self.token = torch.zeros(batch, dtype=torch.long, device=self.device)  # what the next pass reads
        self.running = torch.zeros(batch, dtype=torch.long, device=self.device)  # 1: the row's position moves on
        self.logits: Tensor | None = None
        self._held = [0] * batch  # tokens in each row, as the host knows them
        self._active = [False] * batch
        self._first = False  # whether `token` was chosen by prefill and is still to come out of generate
        self._graphs: dict[int, tuple[torch.cuda.CUDAGraph, Tensor]] = {}
        if cuda_graph and self.device.type == "cuda":
            self._capture()

    # -- prompts and states -------------------------------------------------------------------------------------------

    def prefill(self, input_ids: Tensor, attention_mask: Tensor | None = None, chunk: int | None = None) -> Tensor:
        """Read a prompt a row, from nothing, ``chunk`` tokens at a time; returns the first token of each row, ``[B]``.

        ``logits [B, Vocab]`` are then those behind the prompts; they are overwritten by the next step.

        Args:
            input_ids: ``[B, S]`` with the engine's batch.
            attention_mask: ``[B, S]``, 1 = real, padding anywhere.
        """
        if input_ids.dim() != 2 or input_ids.shape[0] != self.batch:
            raise ValueError(
                f"input_ids: shape {list(input_ids.shape)} given, expected [{self.batch}, S] (the engine's batch)"
            )
        longest = input_ids.shape[1] if attention_mask is None else int(attention_mask.bool().sum(1).max())
        self._check_length(longest)
        logits, state = prefill(self.model, input_ids, attention_mask, chunk)
        return self.load(state, logits)

    @torch.no_grad()
    def load(self, state: ModelState, logits: Tensor, rows: Sequence[int] | None = None) -> Tensor:
        """Put a state, and the logits behind it, into ``rows`` (default: all, in order); these rows run from now on.

        The first token of each, ``[b]``, is chosen from ``logits [b, Vocab]`` and returned; the next :meth:`step` reads it. Other rows
        stay as they are.

        Raises:
            ForeignStateError: a state of another model. ValueError: a batch that does not fit, a fresh state, too many tokens.
        """
        if state.fingerprint != self.model.config.fingerprint:
            raise ForeignStateError(
                f"state: it was made by another model (fingerprint {state.fingerprint}, expected "
                f"{self.model.config.fingerprint})"
            )
        rows = list(range(self.batch)) if rows is None else list(rows)
        if len(set(rows)) != len(rows) or any(not 0 <= row < self.batch for row in rows):
            raise ValueError(f"rows: {rows} given, expected distinct rows within 0..{self.batch - 1}")
        if state.lengths is None or state.valid is None:
            raise ValueError("state: it is fresh, so there is no token to go on from")
        if state.batch_size != len(rows) or logits.shape != (len(rows), self.model.config.vocab_size):
            raise ValueError(
                f"state, logits: {state.batch_size} rows and shape {list(logits.shape)} given, expected {len(rows)} rows and "
                f"[{len(rows)}, {self.model.config.vocab_size}]"
            )
        lengths = state.lengths.tolist()
        self._check_length(max(lengths))
        entries = [state.read((number, 0)) for number in range(len(self.blocks))]  # raises before anything is written
        order = torch.argsort((~state.valid).to(torch.uint8), dim=1, stable=True)[:, : max(lengths)]
        index = torch.tensor(rows, device=self.device)
        for block, entry in zip(self.blocks, entries, strict=True):
            assert entry is not None
            block.mixer.write(index, entry, state.lengths, order)
        self.clock.position[index] = state.lengths
        first = self.sampling.choose(logits, self.generator)
        self.token[index] = first
        self.running[index] = 1
        for row, length in zip(rows, lengths, strict=True):
            self._held[row], self._active[row] = length, True
        self.logits, self._first = logits, len(rows) == self.batch
        return first

    @torch.no_grad()
    def state(self) -> ModelState:
        """What all rows hold, as a :class:`ModelState` of their own (copies); rows that do not run are as before their first token.

        A token handed out last is not read into it yet.
        """
        lengths, longest = self.clock.position.clone(), max(self._held)
        entries = {(i, 0): block.mixer.read(lengths, longest) for i, block in enumerate(self.blocks)}
        valid = torch.arange(longest, device=self.device) < lengths[:, None]
        state = ModelState(self.model.config.fingerprint, entries, lengths, valid)
        return state.reset([row for row, active in enumerate(self._active) if not active])

    def stop(self, rows: Sequence[int]) -> None:
        """These rows no longer move on: what they compute from now on is of no meaning, until :meth:`load` gives them a state.

        Raises ``ValueError`` for a row that is not there; none is stopped then.
        """
        if outside := [row for row in rows if not 0 <= row < self.batch]:
            raise ValueError(f"rows: {outside} given, expected rows within 0..{self.batch - 1}")
        for row in rows:
            self._active[row], self._held[row] = False, 0
        index = torch.tensor(list(rows), dtype=torch.long, device=self.device)
        self.running[index] = 0
        self.clock.position[index] = 0  # a finished row's past no longer widens the window

    @torch.no_grad()
    def reset(self) -> None:
        """As new: nothing read, no row running."""
        for block in self.blocks:
            block.mixer.reset()
        self.token.zero_()
        self.stop(range(self.batch))
        self._first = False

    # -- tokens ---------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self) -> Tensor:
        """Read the last token of every row and choose the next, ``[B]``. The tensor is overwritten by the next step: copy what you
        keep. ``logits [B, Vocab]`` are what it was chosen from.

        Raises:
            ValueError: nothing was read yet, or a row is full.
        """
        if not any(self._active):
            raise ValueError("engine: no row has a prompt; call prefill or load first")
        longest = max(self._held) + 1
        self._check_length(longest)
        window = next(w for w in self.windows if w >= longest or not self.limited)
        if window in self._graphs:
            graph, self.logits = self._graphs[window]
            graph.replay()
        else:
            self._forward(window)
        self._first = False
        self._held = [held + active for held, active in zip(self._held, self._active, strict=True)]
        return self.token

    def generate(self, count: int, eos_token_id: int | None = None, pad_token_id: int = 0) -> Tensor:
        """The next ``count`` tokens of every row, ``[B, count]``; behind :meth:`prefill` the first is the one that it chose.

        With ``eos_token_id`` a row is padded behind its end, and the result ends where the last row did.
        """
        if not isinstance(count, int) or count < 0:
            raise ValueError(f"count: expected an integer of at least 0, got {count!r}")
        self._check_length(max(self._held) + count - self._first)
        ids = torch.empty(self.batch, count, dtype=torch.long, device=self.device)
        done = count
        for i in range(count):
            ids[:, i] = self.token if self._first else self.step()
            self._first = False  # handed out: it comes once, however few tokens a call asks for
            if (
                eos_token_id is not None
                and (i + 1) % CHECK_EVERY == 0
                and bool((ids[:, : i + 1] == eos_token_id).any(1).all())
            ):
                done = i + 1
                break
        ids = ids[:, :done]
        if eos_token_id is None:
            return ids
        ended = (ids == eos_token_id).cumsum(1)
        behind = (ended - (ids == eos_token_id).long()) > 0
        kept = int((~behind).any(0).sum())
        return ids.masked_fill(behind, pad_token_id)[:, :kept]

    @property
    def nbytes(self) -> int:
        """Bytes of all state buffers."""
        return sum(b.numel() * b.element_size() for block in self.blocks for b in block.mixer.buffers.values())

    def explain(self) -> list[str]:
        """How each block's mixer is computed, one line a block."""
        return [f"{i}: {block.mixer.mixer.name}: {block.mixer.how}" for i, block in enumerate(self.blocks)]

    # -- one token ------------------------------------------------------------------------------------------------------

    def _forward(self, window: int) -> None:
        model, scale = self.model, self.model.config.embedding_scale
        self.clock.begin(window)
        hidden = F.embedding(self.token, model.model.embeddings.weight)  # type: ignore[arg-type]
        if scale != 1.0:
            hidden = hidden * scale
        for block in self.blocks:
            hidden = block(hidden)
        self.logits = project_in(hidden, self._head, None, cast(RMSNorm, model.model.norm), self.clock)
        self.token.copy_(self.sampling.choose(self.logits, self.generator))
        self.clock.position.add_(self.running)

    def _capture(self) -> None:
        """One graph a window. Every kernel runs once beforehand: compiling and loading can not be captured."""
        stream = torch.cuda.Stream(self.device)
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            for window in self.windows:
                self._forward(window)
        torch.cuda.current_stream(self.device).wait_stream(stream)
        torch.cuda.synchronize(self.device)
        pool = torch.cuda.graph_pool_handle()
        for window in self.windows:
            graph = torch.cuda.CUDAGraph()
            if not self.sampling.greedy:
                graph.register_generator_state(self.generator)
            with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
                self._forward(window)
            assert self.logits is not None
            self._graphs[window] = (graph, self.logits)
        self.reset()

    def _check_length(self, tokens: int) -> None:
        if self.limited and tokens > self.max_length:
            raise ValueError(
                f"max_length: a row would hold {tokens} tokens, but the engine was made for {self.max_length}; make a longer one"
            )


def _aligned(length: int) -> int:
    return -(-length // 16) * 16  # masks of softmax attention are read 16 bytes at a time


def _windows(length: int) -> list[int]:
    """Powers of two from :data:`FIRST_WINDOW`, and ``length`` itself."""
    sizes, size = [], FIRST_WINDOW
    while size < length:
        sizes.append(size)
        size *= 2
    return [*sizes, length]
