r"""Policy gradient for diffusion reasoning: diffu-GRPO (d1, arXiv:2504.12216) with any estimator of log-probabilities.

.. math::
    r_i = e^{\log \pi_\theta(o_i) - \log \pi_{old}(o_i)}, \quad
    L = -\frac{1}{|valid|} \sum_{i\ valid} \Big[\min(r_i A,\ \mathrm{clip}(r_i, 1 \pm \epsilon) A) - \beta\, KL_i\Big], \quad
    KL_i = e^{\delta_i} - \delta_i - 1, \quad \delta_i = \log \pi_{ref}(o_i) - \log \pi_\theta(o_i)

A is the reward minus the mean of its group (the completions of one prompt), not divided by a deviation. Valid are completion tokens up to
and including the first end of text, and the mean runs over those of the whole batch. One batch of completions serves several inner
updates, each with masks of a seed of its own, which theta, old and reference share.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from latentcot.diffusion_reasoning.block_diffusion.model import BlockDiffusionModel
from latentcot.diffusion_reasoning.block_diffusion.sampler import block_generate
from latentcot.diffusion_reasoning.generation_config import DiffusionGenerationConfig
from latentcot.diffusion_reasoning.noise import mix
from latentcot.diffusion_reasoning.policy_estimators import LogprobEstimator, PathProbability, Rollout, find_estimator
from latentcot.diffusion_reasoning.quota import Bernoulli
from latentcot.diffusion_reasoning.samplers import diffusion_generate

Reward = Callable[[Rollout], Tensor]
"""A rollout's rewards ``[N]``: read ``sequences`` where ``valid``."""


@dataclass(frozen=True)
class PolicyBatch:
    """Completions with what stays fixed over the inner updates: ``advantages [N]``; ``seeds``: one an update; ``old`` and ``reference``:
    log-probabilities ``[N, L]`` for each seed (``reference`` is ``None`` without a KL term)."""

    rollout: Rollout
    advantages: Tensor
    seeds: tuple[int, ...]
    old: tuple[Tensor, ...]
    reference: tuple[Tensor, ...] | None


@dataclass(frozen=True)
class PolicyLoss:
    """``loss``: scalar to differentiate; detached: ``ratio [N, L]`` (1 outside the valid tokens), ``kl``: mean over valid tokens,
    ``clipped``: share of valid tokens whose gradient the clipping stopped."""

    loss: Tensor
    ratio: Tensor
    kl: Tensor
    clipped: Tensor


class DiffuGRPO:
    """
    Args:
        model: any denoiser module, backbone, converted model or :class:`BlockDiffusionModel`.
        sampler: of the completions; its ``max_new_tokens`` is their length.
        ref: reference policy; ``None`` = a frozen copy of the model as it is now. Not used with ``beta=0``.
        estimator: ``one_step``, ``elbo``, ``coupled``, ``path``, or a value of
            :mod:`~latentcot.diffusion_reasoning.policy_estimators`.
        group: completions a prompt.
        clip: epsilon.
        beta: of the KL term.
        inner_updates: optimiser steps on one batch of completions. The published script takes 12; its authors advise 2 to 4 without
            low-rank adapters, where training collapsed.
        ratio: ``token``, as published, or ``sequence``: one ratio a completion, the exponential of the mean difference over its valid
            tokens (with the ``elbo`` estimator: a ratio of ELBOs).
        max_grad_norm: of every update.
        sync_every: iterations after which the reference becomes the model; ``None`` = never. 64 in the published script.
        seed: of completions and masks.

    Raises:
        ValueError: values out of range, named.
    """

    def __init__(
        self,
        model: nn.Module,
        sampler: DiffusionGenerationConfig,
        ref: nn.Module | None = None,
        *,
        estimator: str | LogprobEstimator = "one_step",
        group: int = 6,
        clip: float = 0.5,
        beta: float = 0.04,
        inner_updates: int = 4,
        ratio: Literal["token", "sequence"] = "token",
        max_grad_norm: float = 0.2,
        sync_every: int | None = 64,
        seed: int = 0,
    ):
        for name, value, low in (
            ("group", group, 2),
            ("inner_updates", inner_updates, 1),
            ("sync_every", sync_every, 1),
        ):
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < low):
                raise ValueError(f"{name}: expected an integer >= {low}, got {value!r}")
        for name, number in (("clip", clip), ("max_grad_norm", max_grad_norm)):
            if not 0.0 < number < float("inf"):
                raise ValueError(f"{name}: expected a finite number above 0, got {number}")
        if not 0.0 <= beta < float("inf"):
            raise ValueError(f"beta: expected a finite number >= 0, got {beta}")
        if ratio not in ("token", "sequence"):
            raise ValueError(f"ratio: {ratio!r} given, expected 'token' or 'sequence'")
        if sampler.max_new_tokens < 1:
            raise ValueError(
                f"sampler: max_new_tokens = {sampler.max_new_tokens} given, expected the length of a completion"
            )
        self.estimator = find_estimator(estimator)
        if isinstance(self.estimator, PathProbability):
            if sampler.make_remask() is not None or sampler.make_quota().repredicts:
                raise ValueError("sampler: a path has no probability of its own where tokens go back to the mask")
            if sampler.temperature != self.estimator.temperature:
                raise ValueError(
                    f"estimator: it scores at temperature {self.estimator.temperature}, but the sampler draws at {sampler.temperature}"
                )
            _check_plain_draws(sampler)
        self.model, self.sampler = model, sampler
        self.group, self.clip, self.beta, self.inner_updates = group, clip, beta, inner_updates
        self.ratio, self.max_grad_norm, self.sync_every, self.seed = ratio, max_grad_norm, sync_every, seed
        self.iteration = 0
        self.ref: nn.Module | None = None
        if beta > 0:
            self.ref = copy.deepcopy(model) if ref is None else ref
            self.ref.requires_grad_(False).eval()

    # -- one iteration, in its parts ---------------------------------------------------------------------------------

    @torch.no_grad()
    def rollout(
        self, prompts: Tensor, n: int | None = None, attention_mask: Tensor | None = None, record: bool | None = None
    ) -> Rollout:
        """``n`` completions of every prompt (default ``group``), rows of one prompt side by side.

        Args:
            prompts: ``[B, P]``.
            attention_mask: ``[B, P]``, True = real.
            record: keep the path; default: whether the estimator needs it.
        """
        n = self.group if n is None else n
        if n < 1:
            raise ValueError(f"n: expected at least one completion a prompt, got {n}")
        record = isinstance(self.estimator, PathProbability) if record is None else record
        ids = prompts.repeat_interleave(n, 0)
        real = (
            torch.ones_like(ids, dtype=torch.bool)
            if attention_mask is None
            else attention_mask.bool().repeat_interleave(n, 0)
        )
        row = torch.arange(len(ids), device=ids.device)
        seeds = mix(row + mix(torch.full_like(row, self._seed(0))))
        path: list[tuple[Tensor, Tensor]] = []

        def remember(_: int, rows: Tensor, z: Tensor) -> None:
            path.append((rows.clone(), z.clone()))

        training = self.model.training
        self.model.eval()
        try:
            if isinstance(self.model, BlockDiffusionModel):
                if record:
                    raise ValueError("record: a block model keeps no path over a whole canvas; take another estimator")
                out = block_generate(self.model, ids, self.sampler, real, row_seeds=seeds)
            else:
                out = diffusion_generate(
                    self.model, ids, self.sampler, real, row_seeds=seeds, hook=remember if record else None
                )
        finally:
            self.model.train(training)
        new = out.sequences.shape[1] - ids.shape[1]
        completion = torch.arange(out.sequences.shape[1], device=ids.device).expand_as(out.sequences) >= ids.shape[1]
        real = torch.cat([real, real.new_ones(len(ids), new)], 1)
        ended = (out.sequences == self.sampler.eos_id) & completion
        valid = completion & (ended.long().cumsum(1) - ended.long() == 0)
        return Rollout(out.sequences, completion, real, valid, row // n, row, tuple(path) if record else None)

    def advantages(self, rewards: Tensor, prompt_of: Tensor) -> Tensor:
        """Reward minus the mean of its group, ``[N]``."""
        if rewards.shape != prompt_of.shape or not rewards.is_floating_point():
            raise ValueError(
                f"rewards: shape {list(rewards.shape)} of {rewards.dtype} given, expected {list(prompt_of.shape)} of a floating type"
            )
        if not bool(rewards.isfinite().all()):
            raise ValueError(f"rewards: row {int((~rewards.isfinite()).nonzero()[0])} is not finite")
        groups = int(prompt_of.max()) + 1
        total = rewards.new_zeros(groups).index_add(0, prompt_of, rewards)
        count = rewards.new_zeros(groups).index_add(0, prompt_of, torch.ones_like(rewards))
        return rewards - (total / count)[prompt_of]

    def logprobs(self, model: nn.Module, rollout: Rollout, seed: int) -> Tensor:
        """Estimates ``[N, L]`` under ``model`` with the masks of ``seed``."""
        return self.estimator(model, rollout, self.sampler.mask_id, seed)

    @torch.no_grad()
    def prepare(self, rollout: Rollout, rewards: Tensor) -> PolicyBatch:
        """Advantages, and what the old policy (the model as it is) and the reference say under every update's masks."""
        seeds = tuple(self._seed(1 + u) for u in range(self.inner_updates))
        old = tuple(self.logprobs(self.model, rollout, s) for s in seeds)
        reference = None if self.ref is None else tuple(self.logprobs(self.ref, rollout, s) for s in seeds)
        return PolicyBatch(rollout, self.advantages(rewards, rollout.prompt_of), seeds, old, reference)

    def loss(self, batch: PolicyBatch, update: int) -> PolicyLoss:
        """The objective of one inner update (from 0)."""
        if not 0 <= update < len(batch.seeds):
            raise ValueError(f"update: {update} given, expected one of the {len(batch.seeds)} inner updates")
        rollout = batch.rollout
        valid, count = rollout.valid, rollout.valid.sum()
        current = self.logprobs(self.model, rollout, batch.seeds[update])
        difference = (current - batch.old[update]).masked_fill(~valid, 0.0)
        if self.ratio == "sequence":
            mean = difference.sum(1, keepdim=True) / valid.sum(1, keepdim=True).clamp(min=1)
            difference = mean.expand_as(difference).masked_fill(~valid, 0.0)
        ratio, A = difference.exp(), batch.advantages.to(current.dtype)[:, None]
        plain, bounded = ratio * A, ratio.clamp(1 - self.clip, 1 + self.clip) * A
        objective = torch.minimum(plain, bounded)
        kl = torch.zeros_like(current)
        if batch.reference is not None:
            delta = (batch.reference[update] - current).masked_fill(~valid, 0.0)
            kl = torch.expm1(delta) - delta
        loss = -((objective - self.beta * kl) * valid).sum() / count
        stopped = ((bounded < plain) & valid).sum() / count
        return PolicyLoss(loss, ratio.detach(), ((kl * valid).sum() / count).detach(), stopped)

    def update(self, optimizer: torch.optim.Optimizer, batch: PolicyBatch) -> list[PolicyLoss]:
        """All inner updates on one batch."""
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        results = []
        for u in range(len(batch.seeds)):
            out = self.loss(batch, u)
            if not bool(out.loss.isfinite()):
                raise FloatingPointError(f"loss: {float(out.loss)} in inner update {u} of iteration {self.iteration}")
            optimizer.zero_grad(set_to_none=True)
            out.loss.backward()
            nn.utils.clip_grad_norm_(parameters, self.max_grad_norm)
            optimizer.step()
            results.append(out)
        return results

    def iterate(
        self, optimizer: torch.optim.Optimizer, prompts: Tensor, reward: Reward, attention_mask: Tensor | None = None
    ) -> dict[str, Any]:
        """One iteration: completions, rewards, inner updates. Returns what to log: mean reward, KL, clipped share, mean length."""
        rollout = self.rollout(prompts, attention_mask=attention_mask)
        rewards = reward(rollout)
        results = self.update(optimizer, self.prepare(rollout, rewards))
        self.iteration += 1
        if self.ref is not None and self.sync_every is not None and self.iteration % self.sync_every == 0:
            self.sync_reference()
        return {
            "iteration": self.iteration,
            "reward": float(rewards.mean()),
            "loss": _mean([r.loss for r in results]),
            "kl": _mean([r.kl for r in results]),
            "clipped": _mean([r.clipped for r in results]),
            "tokens": float(rollout.valid.sum(1).double().mean()),
        }

    @torch.no_grad()
    def sync_reference(self) -> None:
        """The reference becomes the model as it is."""
        if self.ref is None:
            raise ValueError("ref: there is no reference with beta = 0")
        self.ref.load_state_dict(self.model.state_dict())

    # -- files -------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """What a run needs to go on besides model and optimiser: its iteration (which all seeds follow from) and the reference."""
        return {"iteration": self.iteration, "ref": None if self.ref is None else self.ref.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if (state["ref"] is None) != (self.ref is None):
            raise ValueError("ref: the saved run and this one do not agree about having a reference (beta)")
        self.iteration = state["iteration"]
        if self.ref is not None:
            self.ref.load_state_dict(state["ref"])

    def _seed(self, stream: int) -> int:
        """Seeds of an iteration: 0 = completions, 1 + u = masks of inner update u."""
        address = torch.tensor([self.seed, self.iteration, stream])
        return int(mix(address[0] + mix(address[1] + mix(address[2]))))


def _check_plain_draws(sampler: DiffusionGenerationConfig) -> None:
    """``ValueError`` where a token is not a plain draw of the network's tempered distribution: what it was drawn from is not scored."""
    quota = sampler.make_quota()
    changed = {
        "top_p": sampler.top_p not in (None, 1.0),
        "top_k": sampler.top_k is not None,
        "guidance": sampler.guidance > 0,
        "carry": sampler.carry != "none",
        "logits_eos_inf": sampler.logits_eos_inf,
        "max_nfe": sampler.max_nfe is not None,  # its last pass takes the likeliest tokens
        "quota": isinstance(quota, Bernoulli) and quota.last == "argmax",  # so does its end
    }
    if names := [name for name, on in changed.items() if on]:
        given = ", ".join(f"{name} = {getattr(sampler, name)!r}" for name in names)
        raise ValueError(
            f"sampler: {given} given, but a path is scored by the network's own distribution, which its tokens must be drawn from; take "
            f"another estimator"
        )


def _mean(values: Sequence[Tensor]) -> float:
    return float(torch.stack([v.detach().double() for v in values]).mean())
