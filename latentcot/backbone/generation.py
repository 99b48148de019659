r"""What every decoding loop shares: reading a prompt in segments, and choosing the next token.

transformers' ``model.generate`` decodes with a :class:`~latentcot.backbone.state.ModelState` as its cache; the loops of this library
(:mod:`~latentcot.backbone.engine`, :mod:`~latentcot.backbone.batching`, :mod:`~latentcot.backbone.speculative`) start from
:func:`prefill` and choose by :class:`Sampling`.

A token is drawn with Gumbel noise: :math:`\arg\max_v (\ell_v / \tau + g_v)`, :math:`g_v = -\log e_v`, :math:`e_v \sim
\mathrm{Exp}(1)`, has the distribution :math:`\mathrm{softmax}(\ell / \tau)`. It needs no sum over the vocabulary and no wait for the
device, so it can be captured in a CUDA graph.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from latentcot.backbone.model import HybridForCausalLM
from latentcot.backbone.state import ModelState


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    Args:
        temperature: 0 is greedy, the token of the highest logit; otherwise logits are divided by it.
        top_k: draw among the so many most likely tokens; ``None`` = all.
        top_p: draw among the fewest tokens that together have at least this probability (at the temperature, after ``top_k``).

    Raises:
        ValueError: a temperature below 0, ``top_k`` below 1, ``top_p`` outside (0, 1].
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature: expected 0 (greedy) or above, got {self.temperature}")
        if self.top_k is not None and (not isinstance(self.top_k, int) or self.top_k < 1):
            raise ValueError(f"top_k: expected an integer of at least 1, got {self.top_k!r}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p: expected within (0, 1], got {self.top_p}")

    @property
    def greedy(self) -> bool:
        return self.temperature == 0

    def scores(self, logits: Tensor) -> Tensor:
        """Logits at the temperature, at least fp32, minus infinity where a token may not be drawn: ``[..., Vocab]``.

        Their softmax is the distribution that :meth:`choose` draws from. A greedy setting has none: ``ValueError``.
        """
        if self.greedy:
            raise ValueError("temperature: 0 chooses one token and draws from no distribution")
        scores = logits.to(torch.promote_types(logits.dtype, torch.float32)) / self.temperature
        if self.top_k is not None and self.top_k < scores.shape[-1]:
            least = scores.topk(self.top_k, -1).values[..., -1:]
            scores = scores.masked_fill(scores < least, float("-inf"))
        if self.top_p < 1:
            ordered, index = scores.sort(-1, descending=True)
            chance = ordered.softmax(-1)
            # a token stays while those before it have not reached top_p: the first one always does
            ordered = ordered.masked_fill(chance.cumsum(-1) - chance >= self.top_p, float("-inf"))
            scores = torch.empty_like(scores).scatter_(-1, index, ordered)
        return scores

    def choose(self, logits: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Token ids ``[...]`` from logits ``[..., Vocab]``."""
        if self.greedy:
            return logits.argmax(-1)
        scores = self.scores(logits)
        return (scores - torch.empty_like(scores).exponential_(generator=generator).log()).argmax(-1)


GREEDY = Sampling()


def left_padded(input_ids: Tensor, attention_mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """The same prompts with their padding moved to the left, so that the last column is real in every row.

    Args:
        input_ids: ``[B, S]``.
        attention_mask: ``[B, S]``, 1 = real, anywhere in the row; ``None`` = all are.

    Returns:
        ids ``[B, S]`` and the mask ``[B, S]`` bool, ``None`` when nothing is padded.

    Raises:
        ValueError: other shapes, and a row without any real token.
    """
    if input_ids.dim() != 2 or 0 in input_ids.shape:
        raise ValueError(f"input_ids: shape {list(input_ids.shape)} given, expected [B, S] with at least one token")
    if attention_mask is None:
        return input_ids, None
    if attention_mask.shape != input_ids.shape:
        raise ValueError(f"attention_mask: shape {list(attention_mask.shape)} given, expected {list(input_ids.shape)}")
    mask = attention_mask.bool()
    if not bool(mask.any(1).all()):
        rows = (~mask.any(1)).nonzero()[:, 0].tolist()
        raise ValueError(f"attention_mask: row(s) {rows[:8]} have no real token, so there is nothing to go on from")
    if bool(mask.all()):
        return input_ids, None
    order = torch.argsort(mask.to(torch.uint8), dim=1, stable=True)
    return input_ids.gather(1, order), mask.gather(1, order)


@torch.no_grad()
def prefill(
    model: HybridForCausalLM,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    chunk: int | None = None,
    state: ModelState | None = None,
) -> tuple[Tensor, ModelState]:
    """Read prompts, ``chunk`` tokens at a time (``None`` = all at once).

    Args:
        input_ids, attention_mask: see :func:`left_padded`.
        chunk: bounds the memory of activations; results do not depend on it, up to rounding.
        state: what came before; ``None`` = nothing.

    Returns:
        the logits behind the last token of every row, ``[B, Vocab]``, and the state.
    """
    if chunk is not None and (not isinstance(chunk, int) or chunk < 1):
        raise ValueError(f"prefill_chunk: expected an integer of at least 1 token, got {chunk!r}")
    ids, mask = left_padded(input_ids, attention_mask)
    state, logits = model.new_state() if state is None else state, None
    for begin in range(0, ids.shape[1], chunk or ids.shape[1]):
        part = slice(begin, begin + (chunk or ids.shape[1]))
        output = model(
            ids[:, part], attention_mask=None if mask is None else mask[:, part], state=state, logits_to_keep=1
        )
        logits, state = output.logits[:, -1], output.state
    assert logits is not None
    assert state is not None
    return logits, state
