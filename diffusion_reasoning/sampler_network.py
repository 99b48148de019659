"""What the sampling loop calls in every pass: a whole network with guidance, carry and time, or any logits function."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from latentcot.diffusion_reasoning.corruption import check_logits
from latentcot.diffusion_reasoning.denoiser import BackboneDenoiser, as_denoiser
from latentcot.diffusion_reasoning.generation_config import DiffusionGenerationConfig

LogitsFn = Callable[[Tensor, int, Tensor], Tensor]
"""``(z [R, b], pass index, rows [R]) -> logits [R, b, V]``; ``rows`` are the numbers of the R rows in the batch."""


@dataclass(frozen=True)
class Request:
    """One pass over R rows: its ``number``; ``rows [R]``; a copy of what they hold, ``z [R, L]``; which of it is ``real``,
    ``masked`` and ``maskable``, ``[R, L]``; ``sigma [R]``, the noise at their times, or ``None``."""

    number: int
    rows: Tensor
    z: Tensor
    real: Tensor
    masked: Tensor
    maskable: Tensor
    sigma: Tensor | None


class SamplerNetwork(Protocol):
    """``cost``: network passes of one call; ``reads_time``: whether sigma is wanted."""

    cost: int
    reads_time: bool

    def __call__(self, request: Request) -> Tensor: ...


class WholeNetwork:
    """A denoiser over the canvas.

    Guidance: ``u + (w + 1)(c - u)`` with u the logits after every given token was replaced by the mask
    (arXiv:2502.09992), both in one batch. Carry: input vectors are kept from pass to pass for rows ``[B, L, D]``.

    Raises:
        ValueError: a carry that the network was not built with.
    """

    def __init__(self, model: Any, config: DiffusionGenerationConfig, batch: int):
        self.denoise = as_denoiser(model)
        self.config, self.batch = config, batch
        self.cost = 2 if config.guidance > 0 else 1
        self.reads_time = bool(getattr(self.denoise, "time_conditioning", False))
        self.memory: Tensor | None = None
        self.held: Tensor | None = None
        if config.carry != "none":
            own = getattr(getattr(self.denoise, "carry", None), "name", "none")
            if own != config.carry:
                raise ValueError(f"carry: {config.carry!r} asked for, but the network was built with {own!r}")

    def __call__(self, request: Request) -> Tensor:
        if self.config.carry != "none":
            return self._with_carry(request)
        z, sigma = request.z, request.sigma
        real = request.real.clone()  # a network of the caller's may write into it
        if self.cost == 2:
            bare = z.masked_fill(real & ~request.maskable, self.config.mask_id)
            z, real = torch.cat([z, bare]), torch.cat([real, real])
            sigma = None if sigma is None else torch.cat([sigma, sigma])
        logits = self.denoise(z, real) if sigma is None else self.denoise(z, real, sigma)
        check_logits(logits, z, self.config.mask_id)
        if self.cost == 1:
            return logits
        given, bare_logits = logits.chunk(2)
        guided = bare_logits + (self.config.guidance + 1) * (given - bare_logits)
        return torch.where(given == -torch.inf, given, guided)  # of two -inf the difference is no number

    def _with_carry(self, request: Request) -> Tensor:
        denoise, rows = self.denoise, request.rows
        assert isinstance(denoise, BackboneDenoiser)
        embeddings = None
        if self.memory is not None:
            assert self.held is not None
            held = self.held[rows] & request.masked
            embeddings = denoise.embed_with(request.z, held, self.memory[rows][held])
        hidden = denoise.hidden(request.z, request.real, request.sigma, embeddings)
        logits = denoise.backbone.lm_head(hidden)
        if self.memory is None:
            self.memory = hidden.new_zeros(self.batch, *hidden.shape[1:])
            self.held = torch.zeros(self.batch, hidden.shape[1], dtype=torch.bool, device=hidden.device)
        assert self.held is not None
        carried = denoise.carried(request.z, hidden, request.masked, self.config.mask_id)
        self.memory[rows] = hidden.new_zeros(hidden.shape).index_put(
            request.masked.nonzero(as_tuple=True), carried.to(hidden.dtype)
        )
        self.held[rows] = request.masked
        return logits


class BlockNetwork:
    """Any logits function over one block: what block diffusion calls with the state of the clean past in hand."""

    cost = 1
    reads_time = False

    def __init__(self, logits_fn: LogitsFn):
        if not callable(logits_fn):
            raise TypeError(f"logits_fn: expected a callable (z, pass, rows) -> logits, got {type(logits_fn).__name__}")
        self.logits_fn = logits_fn

    def __call__(self, request: Request) -> Tensor:
        return self.logits_fn(request.z, request.number, request.rows)
