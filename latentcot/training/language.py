r"""Next-token training of a backbone by the one training loop: dense labels, rows or packed documents, any number of processes.

:class:`LanguageModel` is the thinnest method there is: mean cross-entropy of a label at every position that has one,

.. math:: \frac{1}{|P|} \sum_{p \in P} -\log \mathrm{softmax}(W h_p)_{y_p}, \qquad P = \{p : y_p \ne -100\} \text{ over all processes},

so that a run on several processes has the gradients of one process with the same global batch, however unevenly labels fall.

Shapes: ``B`` rows, ``S`` tokens. Labels belong to their own position: the caller has shifted them.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from latentcot.backbone.loss import IGNORED, summed_cross_entropy
from latentcot.reasoner import LossOutput, Reasoner, StepContext
from latentcot.training.budget import FlopCounter


@dataclass(frozen=True)
class TokenBatch:
    """``ids [B, S]`` and ``labels [B, S]``, -100 where nothing is scored. ``resets`` (bool ``[B, S]``, True at the first token of a
    document): state, convolution, positions and attention restart there; ``None`` = rows are one sequence each."""

    ids: Tensor
    labels: Tensor
    resets: Tensor | None = None

    def __len__(self) -> int:
        return self.ids.shape[0]

    def to(self, device: torch.device | str) -> "TokenBatch":
        return replace(
            self,
            ids=self.ids.to(device),
            labels=self.labels.to(device),
            resets=None if self.resets is None else self.resets.to(device),
        )

    def rows(self, index: slice) -> "TokenBatch":
        """Some of the rows."""
        resets = None if self.resets is None else self.resets[index]
        return TokenBatch(self.ids[index], self.labels[index], resets)

    def share(self, rank: int, world_size: int) -> "TokenBatch":
        """The rows of one process of ``world_size``; ``ValueError`` when they can not be dealt out evenly."""
        if len(self) % world_size:
            raise ValueError(f"batch_size: {len(self)} rows can not be dealt out evenly to {world_size} processes")
        size = len(self) // world_size
        return self.rows(slice(rank * size, (rank + 1) * size))


class TokenSource(Protocol):
    """Training data of :class:`LanguageModel`: global batch number n depends on n alone."""

    def stream(self, start: int, rank: int = 0, world_size: int = 1) -> Iterator[TokenBatch]: ...

    def describe(self) -> dict[str, Any]: ...


class LanguageModel(Reasoner):
    """Next-token prediction; see the module. Save the backbone itself (``save_pretrained`` of :class:`HybridForCausalLM`)."""

    method = "language_model"

    def hidden_and_labels(self, batch: TokenBatch) -> tuple[Tensor, Tensor]:
        """Final hidden states ``[P, D]`` and labels ``[P]`` of the scored positions; no other position meets the head."""
        ids, labels = batch.ids, batch.labels
        if batch.resets is None:
            hidden, _ = self.backbone.model(ids)
        else:
            hidden, _ = self.backbone.model(ids.reshape(1, -1), cu_seqlens=offsets(batch.resets))
            labels = labels.reshape(1, -1)
        scored = labels != IGNORED
        return hidden[scored], labels[scored]

    def loss(self, batch: TokenBatch, ctx: StepContext, carry: object = None) -> LossOutput:  # pyright: ignore[reportIncompatibleMethodOverride]
        hidden, labels = self.hidden_and_labels(batch)
        total = summed_cross_entropy(hidden, labels, self.backbone.lm_head, self.backbone.config.loss_chunk)
        count = torch.tensor(float(labels.numel()), device=total.device)
        if ctx.world_size > 1:
            dist.all_reduce(count)
            count = count / ctx.world_size  # gradients are averaged over processes afterwards
        if float(count) == 0:
            raise ValueError(f"labels: step {ctx.step} has no position to score")
        flops = float(FlopCounter(self.backbone)(batch.ids.shape[1])) * len(batch)
        flops += FlopCounter(self.backbone).head * labels.numel()
        return LossOutput(total / count, flops=flops)


def offsets(resets: Tensor) -> Tensor:
    """``cu_seqlens`` of rows laid end to end: every row begins a sequence, and so does every reset."""
    starts = resets.clone()
    starts[:, 0] = True
    places = starts.reshape(-1).nonzero()[:, 0]
    return torch.cat([places, places.new_tensor([resets.numel()])]).to(torch.int32)


@torch.no_grad()
def scores(model: LanguageModel, batch: TokenBatch) -> tuple[float, int, int]:
    """``(sum of nats, labels predicted by the largest logit, labels)`` of one batch, for validation."""
    hidden, labels = model.hidden_and_labels(batch)
    logits = model.backbone.lm_head(hidden)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    total = F.cross_entropy(logits, labels, reduction="sum")
    return float(total.double()), int((logits.argmax(-1) == labels).sum()), labels.numel()
