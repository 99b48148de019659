r"""How sure the network is about a proposed token: the order in which positions are revealed.

============== =========================================================== ==========================
name           confidence of the proposed token y                          source
============== =========================================================== ==========================
prob           softmax(logits)[y], untempered and without noise            LLaDA (arXiv:2502.09992)
prob_tempered  probability of y after temperature, top-k and top-p         Dream (arXiv:2508.15487)
margin         best minus second best of the filtered distribution         Dream
neg_entropy    sum of p log(p + 1e-10) of the filtered distribution        Dream
random         U(0, 1)                                                     LLaDA
left_to_right  minus the position                                          for checks against AR decoding
============== =========================================================== ==========================

A confidence is any callable from a :class:`Proposal` to ``[n]``. Equal confidences are resolved by lower position.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, Never, overload

import torch
from torch import Tensor


class _WhenRead:
    """A field that holds a tensor, or a function that is called for it when it is first read."""

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    @overload
    def __get__(self, instance: None, owner: type) -> Never: ...
    @overload
    def __get__(self, instance: object, owner: type) -> Tensor: ...
    def __get__(self, instance: object | None, owner: type) -> Tensor:
        if instance is None:
            raise AttributeError(self.name)  # tells dataclass that the field has no default
        value = instance.__dict__[self.name]
        if not isinstance(value, Tensor):
            value = instance.__dict__[self.name] = value()
        return value

    def __set__(self, instance: object, value: Tensor | Callable[[], Tensor]) -> None:
        instance.__dict__[self.name] = value


@dataclass(frozen=True)
class Proposal:
    """Proposals at n candidate positions.

    ``logits [n, V]`` fp64, constraints applied, untempered; ``filtered [n, V]``: after temperature, top-k and top-p;
    ``tokens [n]`` the proposed ones; ``positions [n]``: number of real tokens before each; ``uniform [n]``: a fresh
    U(0, 1) number for each. The last two may be given as functions, which are called when they are first read.
    """

    logits: Tensor
    filtered: Tensor
    tokens: Tensor
    positions: _WhenRead = _WhenRead()
    uniform: _WhenRead = _WhenRead()

    @cached_property
    def filtered_probs(self) -> Tensor:
        return self.filtered.softmax(-1)

    def of_token(self, probs: Tensor) -> Tensor:
        return probs.gather(-1, self.tokens[:, None])[:, 0]


Confidence = Callable[[Proposal], Tensor]


def prob(proposal: Proposal) -> Tensor:
    return proposal.of_token(proposal.logits.softmax(-1))


def prob_tempered(proposal: Proposal) -> Tensor:
    return proposal.of_token(proposal.filtered_probs)


def margin(proposal: Proposal) -> Tensor:
    best = proposal.filtered_probs.topk(2, -1).values
    return best[:, 0] - best[:, 1]


def neg_entropy(proposal: Proposal) -> Tensor:
    p = proposal.filtered_probs
    return (p * (p + 1e-10).log()).sum(-1)


def random(proposal: Proposal) -> Tensor:
    return proposal.uniform


def left_to_right(proposal: Proposal) -> Tensor:
    return -proposal.positions.double()


CONFIDENCES: dict[str, Confidence] = {
    f.__name__: f for f in (prob, prob_tempered, margin, neg_entropy, random, left_to_right)
}
BUILT_IN = tuple(CONFIDENCES.values())
"""Those of this package, without what :func:`register_order` adds."""


def register_order(name: str, confidence: Confidence, on_unit_scale: bool = False) -> None:
    """Give a confidence of your own a name for ``DiffusionGenerationConfig(order=name)``. ``on_unit_scale``: its values
    lie within 0..1, so that thresholds fit it. ``ValueError`` when the name is taken."""
    if name in CONFIDENCES:
        raise ValueError(f"name: there is a confidence {name!r} already")
    CONFIDENCES[name] = confidence
    if on_unit_scale:
        ON_UNIT_SCALE.add(name)


ON_UNIT_SCALE = {"prob", "prob_tempered", "margin", "random"}
"""Confidences within 0..1, which a threshold can be held against."""


def find_confidence(order: str | Confidence) -> Confidence:
    """By name, or a callable as it is. Raises ``ValueError`` for an unknown name."""
    if callable(order):
        return order
    if order not in CONFIDENCES:
        raise ValueError(f"order: unknown confidence {order!r}; valid: {', '.join(CONFIDENCES)}, or a callable")
    return CONFIDENCES[order]


TopPRule = Literal["keep_crossing", "drop_crossing"]


def filter_logits(logits: Tensor, top_k: int | None, top_p: float | None, rule: TopPRule = "keep_crossing") -> Tensor:
    """``logits [n, V]`` with everything outside the top k, then outside the nucleus, at minus infinity.

    ``keep_crossing``: the nucleus is the smallest set of likeliest tokens whose mass exceeds ``top_p``, the token that
    crosses it included (Dream). ``drop_crossing``: tokens whose running mass is at most ``top_p`` (MDLM's family). The
    likeliest token always stays.
    """
    if top_k is not None and top_k < logits.shape[-1]:
        logits = logits.masked_fill(~_best(logits, top_k), -torch.inf)
    if top_p is not None and top_p < 1.0:
        ordered, order = logits.softmax(-1).sort(dim=-1, descending=True, stable=True)
        mass = ordered.cumsum(-1)
        if rule == "keep_crossing":
            mass.sub_(ordered)
        dropped = (mass <= top_p).logical_not_()
        dropped[..., 0] = False
        logits = logits.masked_fill(torch.empty_like(dropped).scatter_(-1, order, dropped), -torch.inf)
    return logits


def _best(logits: Tensor, k: int) -> Tensor:
    return torch.zeros_like(logits, dtype=torch.bool).scatter(-1, logits.topk(k, -1).indices, True)
