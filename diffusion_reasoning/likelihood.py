r"""How likely a masked-diffusion model finds an answer: lower bounds of its log-probability, in nats.

.. math:: \log p(x) \ge -\mathbb{E}_t \sum_i \mathbb{1}[z_i = m]\, w(t)\, CE_i
          = \mathbb{E}_\sigma \sum_k \log p(x_{\sigma(k)} \mid x_{\sigma(<k)})

with :math:`\sigma` a uniform permutation. Three forms have the same expectation:

=============== ================================================================= ====================================
form            one draw                                                          spread
=============== ================================================================= ====================================
``orders``      a random order, one token revealed after the other                A passes
``subsets``     l uniform in 1 ... A, l random positions masked, weight A/l        low; :func:`loglikelihood_bound`
``time``        t uniform, each position masked with probability t, weight 1/t    high
=============== ================================================================= ====================================

:func:`exact_bound` enumerates any of them for short answers. The mean cross-entropy at each l is the model's any-order
learning curve.
"""

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from latentcot.diffusion_reasoning.corruption import check_logits, check_mask_id, precise, without_mask_token
from latentcot.diffusion_reasoning.denoiser import BackboneDenoiser, as_denoiser

Method = Literal["stratified", "iid", "time", "llada"]
Form = Literal["orders", "subsets", "time"]
_METHODS, _FORMS = ("stratified", "iid", "time", "llada"), ("orders", "subsets", "time")


@dataclass(frozen=True)
class Bound:
    """``mean``: the estimate in nats, a lower bound of log p in expectation; ``stderr``: of the mean, over draws or,
    where draws are not independent, over groups of them (NaN for a single one, 0 where one draw is exact); ``by_length``
    ``{l: (mean cross-entropy of a masked token in nats, draws)}`` with l tokens masked; ``n_samples``: draws taken;
    ``n_tokens``: answer length; ``is_likelihood``: False for a guided score."""

    mean: float
    stderr: float
    by_length: dict[int, tuple[float, int]]
    n_samples: int
    n_tokens: int
    is_likelihood: bool = True

    @property
    def per_token(self) -> float:
        """Nats a token."""
        return self.mean / self.n_tokens

    @property
    def bits_per_token(self) -> float:
        """Cost in bits a token, ``-mean / (A log 2)``: an upper bound."""
        return -self.per_token / math.log(2)

    @property
    def perplexity(self) -> float:
        """``exp(-mean / A)``, an upper bound."""
        return math.exp(-self.per_token)


@torch.no_grad()
def loglikelihood_bound(
    model: Any,
    prompt: Tensor,
    answer: Tensor,
    *,
    mask_id: int,
    n_samples: int = 128,
    batch_size: int = 16,
    method: Method = "stratified",
    generator: torch.Generator | None = None,
    forbid_mask_token: bool = True,
    time_eps: float = 1e-3,
) -> Bound:
    """Monte-Carlo bound of ``log p(answer | prompt)``.

    Args:
        model: callable ``(z, attention_mask) -> logits``, a hybrid backbone or a ``DiffusionLM``.
        prompt: ``[P]`` int64, given; may be empty and may hold the mask token.
        answer: ``[A]`` int64, at least one token.
        n_samples: draws; rounded up to a multiple of ``batch_size``, see ``Bound.n_samples``.
        batch_size: rows of one network pass.
        method: how the number l of masked tokens is drawn. ``stratified``: over each batch l runs evenly through 1 ... A
            from a random start; ``llada``: the same with the released estimator's rounding (arXiv:2502.09992); ``iid``:
            each on its own; ``time``: each position with probability t, weight 1/t (for comparison).
        generator: of all draws.
        time_eps: smallest t of ``time``; with it the estimate is that of the clipped integral.

    Raises:
        ValueError: an empty answer, the mask token in it, wrong shapes or numbers.
        FloatingPointError: a cross-entropy that is not finite, naming the position.
    """
    return _estimate(
        _CrossEntropy(model, prompt, answer, mask_id, forbid_mask_token),
        n_samples,
        batch_size,
        method,
        generator,
        time_eps,
        True,
    )


@torch.no_grad()
def guided_score(
    model: Any,
    prompt: Tensor,
    answer: Tensor,
    *,
    mask_id: int,
    guidance: float,
    n_samples: int = 128,
    batch_size: int = 16,
    method: Method = "llada",
    generator: torch.Generator | None = None,
    forbid_mask_token: bool = True,
) -> Bound:
    """As :func:`loglikelihood_bound` with guided logits ``u + (w + 1)(c - u)``, u with the prompt masked: no likelihood,
    but a score that ranks answers (arXiv:2502.09992). ``is_likelihood`` is False."""
    if not 0.0 < guidance < math.inf:
        raise ValueError(f"guidance: expected a finite number above zero, got {guidance}; 0 is loglikelihood_bound")
    entropy = _CrossEntropy(model, prompt, answer, mask_id, forbid_mask_token, guidance)
    return _estimate(entropy, n_samples, batch_size, method, generator, 1e-3, False)


@torch.no_grad()
def exact_bound(
    model: Any,
    prompt: Tensor,
    answer: Tensor,
    *,
    mask_id: int,
    form: Form = "subsets",
    forbid_mask_token: bool = True,
    longest: int = 10,
) -> float:
    """The bound by enumeration of all 2^A - 1 mask patterns, in nats: the reference of every estimate.

    Args:
        form: ``orders``: the mean over all permutations (by dynamic programming over the patterns); ``subsets``: over l and the subsets of
            size l; ``time``: the integral over t in closed form, ``Beta(l, A - l + 1)``.
        longest: longest answer accepted; the cost doubles with each token.

    Raises:
        ValueError: an answer that is empty or too long, an unknown form.
    """
    if form not in _FORMS:
        raise ValueError(f"form: {form!r} given, expected one of {', '.join(map(repr, _FORMS))}")
    entropy = _CrossEntropy(model, prompt, answer, mask_id, forbid_mask_token)
    n = entropy.n
    if n > longest:
        raise ValueError(f"answer: {n} tokens need {2**n - 1} mask patterns; longest = {longest}")
    patterns = torch.tensor([[bool(code >> i & 1) for i in range(n)] for code in range(1, 2**n)])
    table = torch.cat([entropy(rows) for rows in patterns.split(256)])  # [2^n - 1, n], code - 1 first
    if form == "orders":  # expected cost of revealing what is masked, one random position after the other
        cost = [0.0] * 2**n
        for code in range(1, 2**n):
            masked = [i for i in range(n) if code >> i & 1]
            cost[code] = sum(float(table[code - 1, i]) + cost[code ^ (1 << i)] for i in masked) / len(masked)
        return -cost[-1]
    sizes, sums = patterns.sum(1), table.sum(1)
    total = 0.0
    for size in range(1, n + 1):
        of_size = float(sums[sizes == size].sum())
        if form == "subsets":
            total += of_size / (size * math.comb(n, size))
        else:  # integral of t^(l-1) (1-t)^(A-l)
            total += of_size * math.exp(math.lgamma(size) + math.lgamma(n - size + 1) - math.lgamma(n + 1))
    return -total


@torch.no_grad()
def order_logprob(
    model: Any, prompt: Tensor, answer: Tensor, order: list[int], *, mask_id: int, forbid_mask_token: bool = True
) -> float:
    """Log-probability in nats of revealing the answer in one ``order`` (position of its first, second, ... token), A
    passes in one batch."""
    entropy = _CrossEntropy(model, prompt, answer, mask_id, forbid_mask_token)
    if sorted(order) != list(range(entropy.n)):
        raise ValueError(f"order: {order} given, expected a permutation of 0..{entropy.n - 1}")
    masked = torch.ones(entropy.n, entropy.n, dtype=torch.bool)
    for k, position in enumerate(order[:-1]):
        masked[k + 1 :, position] = False
    return -float(entropy(masked)[torch.arange(entropy.n), order].sum())


class _CrossEntropy:
    """``masked [M, A]`` bool to the cross-entropy of each masked answer token, ``[M, A]`` fp64, 0 elsewhere."""

    def __init__(
        self, model: Any, prompt: Tensor, answer: Tensor, mask_id: int, forbid: bool, guidance: float | None = None
    ):
        for name, ids in (("prompt", prompt), ("answer", answer)):
            if ids.dim() != 1 or ids.dtype != torch.int64:
                raise ValueError(f"{name}: shape {list(ids.shape)} of {ids.dtype} given, expected [n] of int64")
        if not answer.numel():
            raise ValueError("answer: it is empty, and a bound over nothing says nothing")
        check_mask_id(mask_id)
        if bool((answer == mask_id).any()):
            raise ValueError(
                f"answer: token {int((answer == mask_id).nonzero()[0])} is the mask token {mask_id}; its probability is 0"
            )
        self.denoise = as_denoiser(model)
        self.row, self.given = torch.cat([prompt, answer]), len(prompt)
        self.n, self.mask_id, self.forbid, self.guidance = len(answer), mask_id, forbid, guidance

    def __call__(self, masked: Tensor) -> Tensor:
        masked = masked.to(self.row.device)
        count = masked.shape[0]
        where = F.pad(masked, (self.given, 0))
        z = self.row.expand(count, -1).masked_fill(where, self.mask_id)
        if self.guidance is None:
            logits = precise(self._logits(z, where))
        else:
            bare = z.clone()
            bare[:, : self.given] = self.mask_id
            c, u = (precise(part) for part in self._logits(torch.cat([z, bare]), where.repeat(2, 1)).chunk(2))
            logits = torch.where(c == -torch.inf, c, u + (self.guidance + 1) * (c - u))
        if self.forbid:
            logits = without_mask_token(logits, self.mask_id)
        target = self.row.expand(count, -1)[where]
        entropy = F.cross_entropy(logits.double(), target, reduction="none")
        if not bool(entropy.isfinite().all()):
            at = where.nonzero()[int((~entropy.isfinite()).nonzero()[0])]
            raise FloatingPointError(
                f"cross-entropy is not finite at answer position {int(at[1]) - self.given} (token {int(self.row[at[1]])})"
            )
        return torch.zeros(masked.shape, dtype=torch.float64, device=z.device).masked_scatter(masked, entropy)

    def _logits(self, z: Tensor, where: Tensor) -> Tensor:
        real = torch.ones_like(where)
        sigma = None
        if getattr(self.denoise, "time_conditioning", False):
            share = where.sum(1).double() / self.n
            sigma = -(1 - share).clamp(min=1e-3).log()
        if isinstance(self.denoise, BackboneDenoiser):
            return self.denoise.at(z, real, where, sigma)
        logits = self.denoise(z, real) if sigma is None else self.denoise(z, real, sigma)
        check_logits(logits, z, self.mask_id)
        return logits[where]


def _estimate(
    entropy: _CrossEntropy,
    n_samples: int,
    batch_size: int,
    method: Method,
    generator: torch.Generator | None,
    time_eps: float,
    is_likelihood: bool,
) -> Bound:
    if method not in _METHODS:
        raise ValueError(f"method: {method!r} given, expected one of {', '.join(map(repr, _METHODS))}")
    if n_samples < 1 or batch_size < 1:
        raise ValueError(f"n_samples, batch_size: at least 1 each, got {n_samples} and {batch_size}")
    n, rounds = entropy.n, -(-n_samples // batch_size)
    draws, groups = [], []
    sums, counts = torch.zeros(n + 1, dtype=torch.float64), torch.zeros(n + 1, dtype=torch.int64)
    for _ in range(rounds):
        masked, weight = _patterns(n, batch_size, method, generator, time_eps)
        cost = entropy(masked).cpu()
        masked = masked.cpu()
        value = -(weight.cpu() * cost.sum(1))
        draws.append(value)
        groups.append(value.mean())
        size = masked.sum(1)
        hit = size > 0
        sums.index_add_(0, size[hit], cost.sum(1)[hit] / size[hit])
        counts.index_add_(0, size[hit], torch.ones_like(size[hit]))
    every = torch.cat(draws)
    # within a stratified batch the draws hang together: their spread is that of batches
    independent = torch.stack(groups) if method in ("stratified", "llada") else every
    stderr = float("nan") if len(independent) < 2 else float(independent.std()) / math.sqrt(len(independent))
    if n == 1 and method != "time":
        stderr = 0.0
    by_length = {
        size: (float(sums[size] / counts[size]), int(counts[size])) for size in range(1, n + 1) if counts[size]
    }
    return Bound(float(every.mean()), stderr, by_length, len(every), n, is_likelihood)


def _patterns(
    n: int, count: int, method: Method, generator: torch.Generator | None, time_eps: float
) -> tuple[Tensor, Tensor]:
    """``(masked [count, n], weight [count])`` of one batch of draws."""
    device = torch.device("cpu") if generator is None else generator.device

    def uniform(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator, dtype=torch.float64, device=device)

    if method == "time":
        t = time_eps + (1 - time_eps) * uniform(count)
        return uniform(count, n) < t[:, None], 1 / t
    match method:
        case "iid":
            size = torch.randint(1, n + 1, (count,), generator=generator, device=device)
        case "llada":
            first = torch.randint(1, n + 1, (), generator=generator, device=device)
            # fp32 and half-to-even, as released: a tie can fall the other way in fp64
            steps = torch.linspace(float(first), float(first) + (count - 1) * (n / count), steps=count)
            size = ((steps.round().long() - 1) % n + 1).to(device)
        case _:  # a random start in 0 ... n and even steps: each l is equally likely for every draw
            offset = n * uniform(1)
            size = ((offset + torch.arange(count, device=device) * (n / count)) % n).floor().long().clamp(max=n - 1) + 1
    order = uniform(count, n).argsort(1).argsort(1)
    return order < size[:, None], n / size


def best_of(bounds: list[Bound]) -> int:
    """Index of the best bound per token: how candidate lengths are compared."""
    if not bounds:
        raise ValueError("bounds: none given")
    return max(range(len(bounds)), key=lambda i: bounds[i].per_token)
