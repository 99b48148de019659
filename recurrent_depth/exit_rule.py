r"""When a row has thought enough: :class:`ExitRule`.

A criterion compares recurrence i with the one before; where it falls below the threshold the row stops. Criteria and
thresholds: arXiv:2502.05171 and its released code. The divergence runs from the previous distribution to the current
one, :math:`KL(p_{i-1} \,\Vert\, p_i)`.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from latentcot.recurrent_depth.monitors import relative_residual
from latentcot.recurrent_depth.settings import check_choice, check_count

THRESHOLDS: dict[str, float] = {
    "none": 0.0,
    "latent_difference": 0.03,
    "cosine": 1e-3,
    "kl": 5e-4,
    "min_p_kl": 1e-5,
    "entropy": 1e-3,
    "argmax": 5,
}
"""Kind -> default threshold (for ``kl`` that of the paper; the released code has 1e-3)."""

DECODED = ("kl", "min_p_kl", "entropy", "argmax")
POSITIONS = ("last", "mean", "max")
ENTROPY_AT_START = 100.0
MIN_P = 0.1


@dataclass(frozen=True)
class ExitRule:
    r"""A criterion and when it may stop a row.

    ================== ======================================================= ================= ===========
    kind               value after recurrence i                                start             threshold
    ================== ======================================================= ================= ===========
    latent_difference  :math:`\lVert s_i - s_{i-1}\rVert / \lVert s_i\rVert`   s_0               0.03
    cosine             :math:`1 - \cos(s_i, s_{i-1})`                          s_0               1e-3
    kl                 :math:`KL(p_{i-1} \Vert p_i)`                           uniform           5e-4
    min_p_kl           kl; entries below 0.1 max set to 1/Vocab, renormalised  uniform           1e-5
    entropy            :math:`\lvert H_i - H_{i-1} \rvert` in nats             100               1e-3
    argmax             checks in a row with the same likeliest token           0                 5 (at least)
    none               never stops                                             –                 –
    ================== ======================================================= ================= ===========

    p is what coda and head make of the state; each check of such a rule costs one pass through them. With
    ``check_every`` > 1 a decoded rule compares with the previous *check*, a latent one always with the previous
    recurrence.

    Args:
        kind: see the table.
        threshold: a row stops when its value is smaller (``argmax``: when the count is reached); ``None`` = the
            table's.
        min_steps: fewest recurrences of a row; a row stops at the first check that comes at or after them.
        check_every: the criterion is looked at after every so many recurrences.
        positions: whose value is the row's: ``last`` = its last real position (the one that an answer is read from),
            ``mean`` or ``max`` over its real positions.

    Raises:
        ValueError: unknown kind, NaN or negative threshold, counts below 1.
    """

    kind: str = "none"
    threshold: float | None = None
    min_steps: int = 1
    check_every: int = 1
    positions: str = "last"

    def __post_init__(self) -> None:
        check_choice("exit_rule: kind", self.kind, THRESHOLDS)
        check_choice("exit_rule: positions", self.positions, POSITIONS)
        check_count("exit_rule: min_steps", self.min_steps, 1)
        check_count("exit_rule: check_every", self.check_every, 1)
        if self.kind == "argmax" and self.threshold is not None:
            check_count("exit_rule: threshold of 'argmax'", self.threshold, 1)
        if self.threshold is not None and not self.threshold >= 0:
            raise ValueError(f"exit_rule: threshold = {self.threshold!r} given, expected a number of at least 0")

    @property
    def active(self) -> bool:
        return self.kind != "none"

    @property
    def decoded(self) -> bool:
        """Whether a check needs logits."""
        return self.kind in DECODED

    @property
    def limit(self) -> float:
        return THRESHOLDS[self.kind] if self.threshold is None else self.threshold

    def due(self, step: int) -> bool:
        """Whether the criterion is looked at after recurrence ``step`` (counted from 1)."""
        return self.active and step % self.check_every == 0

    def checks(self, steps: Tensor | int) -> Tensor | int:
        """How many checks ``steps`` recurrences took."""
        return steps // self.check_every if self.active else steps * 0

    def view(self, tensor: Tensor, mask: Tensor) -> Tensor:
        """The positions of ``tensor [B, S, ...]`` that the rule reads: ``[B, 1, ...]`` for ``last``, else all."""
        if self.positions != "last" or mask.shape[1] == 1:
            return tensor
        length = mask.shape[1]
        last = length - 1 - mask.flip(1).to(torch.uint8).argmax(1)
        return tensor[torch.arange(len(tensor), device=tensor.device), last][:, None]

    @torch.no_grad()
    def measure(
        self, previous: Tensor, state: Tensor, logits: Tensor | None, memory: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """The criterion at every position that :meth:`view` shows.

        Args:
            previous, state: :math:`s_{i-1}, s_i\\ [B, m, D]`.
            logits: ``[B, m, Vocab]``, for decoded rules.
            memory: what the last check of this rule returned, batch first; ``None`` at the first.

        Returns:
            value ``[B, m]`` and the memory for the next check.
        """
        if self.kind == "latent_difference":
            return relative_residual(previous, state), None
        if self.kind == "cosine":
            return 1 - F.cosine_similarity(state, previous, dim=-1), None
        if not self.decoded:
            raise ValueError("exit_rule: kind 'none' measures nothing")
        if logits is None:
            raise ValueError(f"logits: None given, but kind {self.kind!r} compares decoded distributions")
        if self.kind == "argmax":
            token = logits.argmax(-1)
            if memory is None:
                count = torch.ones_like(token)
            else:
                count = torch.where(token == memory[..., 0], memory[..., 1] + 1, 1)
            return -count.to(state.dtype), torch.stack([token, count], -1)
        log_p = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
        if self.kind == "entropy":
            entropy = -(log_p.exp() * log_p).sum(-1)
            return (entropy - (ENTROPY_AT_START if memory is None else memory)).abs(), entropy
        if self.kind == "min_p_kl":
            log_p = _flatten_tail(log_p)
        before = torch.full_like(log_p, -math.log(log_p.shape[-1])) if memory is None else memory
        return (before.exp() * (before - log_p)).sum(-1), log_p

    def settled(self, value: Tensor, mask: Tensor) -> Tensor:
        """Rows that may stop, ``[B]`` bool: ``value [B, m]``, ``mask [B, S]`` real positions."""
        if self.positions == "last":
            row = value[:, 0]
        elif self.positions == "max":
            row = value.masked_fill(~mask, -math.inf).amax(1)
        else:
            row = (value * mask).sum(1) / mask.sum(1)
        return row <= -self.limit if self.kind == "argmax" else row < self.limit


def _flatten_tail(log_p: Tensor) -> Tensor:
    """Entries below 0.1 of the largest replaced by 1/Vocab, then renormalised."""
    p = log_p.exp()
    p = torch.where(p < MIN_P * p.amax(-1, keepdim=True), 1 / p.shape[-1], p)
    return (p / p.sum(-1, keepdim=True)).log()


NO_EXIT = ExitRule()
