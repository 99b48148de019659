r"""The law of exits that a halting gate makes, and the losses that train it: :func:`exit_law` and what is built on it.

A gate gives :math:`\lambda_t = \sigma(g_t)`, the chance to leave after step t when one has come so far (arXiv:2510.25741, 2107.05407):

.. math::
    S_t &= \prod_{j \le t} (1 - \lambda_j), \quad S_0 = 1 \\
    p(t) &= \lambda_t S_{t-1} \ (t < T), \qquad p(T) = S_{T-1}

The last step takes what is left, so p sums to 1 and :math:`\lambda_T` does not matter. Everything is computed from logits in log
space: long products neither vanish nor lose their gradient.

Shapes: T steps first, then anything (positions, rows); losses in nats, each of them the mean over what comes after T.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from latentcot.recurrent_depth.settings import check_choice

SHARPNESS = 50.0  # k of stage two
MARGIN = 0.005  # gamma of stage two, nats
PAIRINGS = ("after", "before")
TAILS = ("last", "renormalise")


def exit_law(gate: Tensor) -> Tensor:
    r"""Logarithm of p: ``gate [T, ...]`` (logits of :math:`\lambda_t`) to ``log p [T, ...]``, fp32 or better.

    Raises:
        ValueError: no step.
    """
    if gate.dim() < 1 or not len(gate):
        raise ValueError(f"gate: shape {list(gate.shape)} given, expected [T, ...] with at least one step")
    gate = gate.to(torch.promote_types(gate.dtype, torch.float32))
    stay = F.logsigmoid(-gate[:-1]).cumsum(0)
    reached = torch.cat([torch.zeros_like(gate[:1]), stay])
    leave = torch.cat([F.logsigmoid(gate[:-1]), torch.zeros_like(gate[:1])])
    return reached + leave


def expected_steps(log_p: Tensor) -> Tensor:
    """Mean number of steps under the law, ``[...]``."""
    steps = torch.arange(1, len(log_p) + 1, device=log_p.device, dtype=log_p.dtype)
    return torch.tensordot(steps, log_p.exp(), dims=1)


def quantile_step(log_p: Tensor, q: float) -> Tensor:
    """First step m with p(1) + ... + p(m) >= q, counted from 1, int64 ``[...]``; q = 1 is the last step, whatever the law."""
    check_quantile(q)
    last = len(log_p)
    if q == 1:
        return torch.full(log_p.shape[1:], last, device=log_p.device)
    reached = log_p.exp().cumsum(0)[:-1] >= q
    return last - reached.sum(0)


def check_quantile(q: float, argument: str = "q") -> float:
    """``q`` when it is a number within [0, 1]; ``ValueError`` otherwise."""
    if isinstance(q, bool) or not isinstance(q, int | float) or not 0 <= q <= 1:
        raise ValueError(f"{argument}: {q!r} given, expected a number within [0, 1]")
    return float(q)


def entropy(log_p: Tensor) -> Tensor:
    """Entropy of the law in nats, ``[...]``."""
    return -(log_p.exp() * log_p).sum(0)


def entropy_loss(losses: Tensor, log_p: Tensor, beta: float) -> Tensor:
    r"""Ouro's stage one: :math:`\sum_t p(t)\, CE^{(t)} - \beta H(p)`, averaged: ``losses [T, ...]``, ``log_p [T, ...]`` to a scalar.

    The evidence bound with a uniform prior over depths.
    """
    _check_pair(losses, log_p)
    return ((log_p.exp() * losses).sum(0) - beta * entropy(log_p)).mean()


def gate_loss(
    losses: Tensor, gate: Tensor, sharpness: float = SHARPNESS, margin: float = MARGIN, pairing: str = "after"
) -> Tensor:
    r"""Ouro's stage two, for the gate alone.

    .. math::
        I_t &= \max(0, CE^{(t-1)} - CE^{(t)}), \qquad w_t = \sigma(k (I_t - \gamma)) \\
        L &= \frac{1}{T} \sum_{t=2}^{T} BCE(1 - \lambda_t, w_t)

    w is the target "keep going". Losses are detached here: they teach, they are not taught.

    Args:
        losses: ``[T, ...]``, cross-entropy of each step in nats.
        gate: ``[T, ...]``, logits of :math:`\lambda`.
        sharpness: k.
        margin: :math:`\gamma`, nats.
        pairing: ``after``, as published: :math:`\lambda_t` learns from what step t has gained; :math:`\lambda_1` learns nothing, and
            :math:`\lambda_T`, which no exit reads, does. ``before``: :math:`\lambda_{t-1}`, the decision that buys step t, learns from
            it (not published).

    Raises:
        ValueError: shapes differ, fewer than two steps (nothing is gained in one), or an unknown pairing.
    """
    _check_pair(losses, gate)
    check_choice("pairing", pairing, PAIRINGS)
    if len(gate) < 2:
        raise ValueError("gate: one step given, expected at least two: the gate learns from what a further step gains")
    losses = losses.detach()
    gate = gate.to(torch.promote_types(gate.dtype, torch.float32))
    gained = (losses[:-1] - losses[1:]).clamp(min=0)
    target = torch.sigmoid(sharpness * (gained - margin)).to(gate.dtype)
    asked = gate[1:] if pairing == "after" else gate[:-1]
    each = F.binary_cross_entropy_with_logits(-asked, target, reduction="none")
    return each.sum(0).mean() / len(gate)


def geometric_law(steps: int, rate: float, tail: str = "last", like: Tensor | None = None) -> Tensor:
    r"""Logarithm of the geometric prior :math:`\lambda_p (1 - \lambda_p)^{t-1}` over T steps, ``[T]``.

    ``tail``: what becomes of the mass behind step T: ``last`` adds it to step T (the shape of :func:`exit_law` itself),
    ``renormalise`` spreads it over all steps.
    """
    check_choice("tail", tail, TAILS)
    if isinstance(rate, bool) or not isinstance(rate, int | float) or not 0 < rate < 1:
        raise ValueError(f"rate: {rate!r} given, expected a number within (0, 1)")
    dtype = torch.float32 if like is None else like.dtype
    device = None if like is None else like.device
    t = torch.arange(steps, dtype=dtype, device=device)
    law = math.log(rate) + t * math.log1p(-rate)
    if tail == "renormalise":
        return law.log_softmax(0)
    return torch.cat([law[:-1], t[-1:] * math.log1p(-rate)])


def ponder_loss(losses: Tensor, log_p: Tensor, beta: float, rate: float, tail: str = "last") -> Tensor:
    r"""PonderNet's loss :math:`\sum_t p(t)\, CE^{(t)} + \beta\, KL(p \,\Vert\, \mathrm{Geometric}(\lambda_p))`, averaged: a scalar."""
    _check_pair(losses, log_p)
    prior = geometric_law(len(log_p), rate, tail, log_p).view(-1, *[1] * (log_p.dim() - 1))
    p = log_p.exp()
    return ((p * losses).sum(0) + beta * (p * (log_p - prior)).sum(0)).mean()


def _check_pair(losses: Tensor, other: Tensor) -> None:
    if losses.shape != other.shape:
        raise ValueError(f"losses: shape {list(losses.shape)} given, expected that of the gate, {list(other.shape)}")
