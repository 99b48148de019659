r"""Forward process and parameterisation of masked diffusion.

Each maskable token is replaced by the mask token m independently with probability :math:`1 - \alpha(t)` and stays
masked. What the network predicts is made a distribution by SUBS (arXiv:2406.07524): zero probability on m, and tokens
that are there already are carried over.

One boolean tensor ``maskable`` says which positions take part. It decides what is noised and what is predicted, never
``z == m``: a prompt may hold the mask token and must not be filled in.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from latentcot.diffusion_reasoning.schedule import NoiseSchedule


@dataclass(frozen=True)
class Corruption:
    """``z [B, L]`` noisy tokens; ``masked [B, L]`` which were replaced; ``p [B]`` probability of being replaced."""

    z: Tensor
    masked: Tensor
    p: Tensor


def corrupt(
    x0: Tensor,
    t: Tensor,
    schedule: NoiseSchedule,
    mask_id: int,
    maskable: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Corruption:
    """Mask each maskable token with probability ``1 - alpha(t)``.

    Args:
        x0: clean tokens ``[B, L]``.
        t: one time a row ``[B]``.
        maskable: ``[B, L]`` bool; ``None`` = everything.

    Raises:
        ValueError: shapes that do not fit, or the mask token at a maskable position of ``x0``.
    """
    maskable = check_maskable(x0, maskable)
    if t.shape != x0.shape[:1]:
        raise ValueError(f"t: shape {list(t.shape)} given, expected one time a row, [{x0.shape[0]}]")
    if bool(((x0 == mask_id) & maskable).any()):
        row, position = ((x0 == mask_id) & maskable).nonzero()[0].tolist()
        raise ValueError(
            f"x0: row {row} holds the mask token {mask_id} at maskable position {position}; "
            "clean text must not contain it there"
        )
    p = 1 - schedule.alpha(t.to(x0.device))
    device = x0.device if generator is None else generator.device
    u = torch.rand(x0.shape, generator=generator, device=device).to(x0.device)
    masked = (u < p[:, None]) & maskable
    return Corruption(x0.masked_fill(masked, mask_id), masked, p)


def subs_logprobs(
    logits: Tensor, z: Tensor, mask_id: int, forbid_mask_token: bool = True, maskable: Tensor | None = None
) -> Tensor:
    """Log-probabilities ``[B, L, V]`` of the clean tokens given ``z``, in fp32 or better.

    At masked positions the log-softmax of the logits with the mask token at minus infinity; elsewhere one-hot in
    ``z``, so that no gradient reaches the logits there.

    Args:
        logits: ``[B, L, V]``.
        forbid_mask_token: ``False`` leaves the mask token's logit as it is (LLaDA and Dream rely on the model never
            predicting it).
        maskable: ``[B, L]``; a position that holds the mask token but is not maskable is given, and carried over.
    """
    check_logits(logits, z, mask_id)
    predicted = (z == mask_id) if maskable is None else (z == mask_id) & check_maskable(z, maskable)
    logprobs = torch.log_softmax(
        without_mask_token(precise(logits), mask_id) if forbid_mask_token else precise(logits), -1
    )
    token = torch.arange(logits.shape[-1], device=logits.device)
    carried = torch.where(token == z[..., None], 0.0, -torch.inf).to(logprobs.dtype)
    return torch.where(predicted[..., None], logprobs, carried)


def precise(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def without_mask_token(logits: Tensor, mask_id: int) -> Tensor:
    """``logits [..., V]`` with minus infinity at the mask token."""
    return logits.masked_fill(torch.arange(logits.shape[-1], device=logits.device) == mask_id, -torch.inf)


def check_mask_id(mask_id: int, vocab_size: int | None = None, **special: int | None) -> None:
    """Raise ``ValueError`` unless ``mask_id`` lies in the vocabulary and differs from the special ids given by name."""
    if (
        isinstance(mask_id, bool)
        or not isinstance(mask_id, int)
        or mask_id < 0
        or (vocab_size is not None and mask_id >= vocab_size)
    ):
        within = "a token id >= 0" if vocab_size is None else f"a token id within 0..{vocab_size - 1}"
        raise ValueError(f"mask_id: expected {within}, got {mask_id!r}")
    for name, value in special.items():
        if value == mask_id:
            raise ValueError(f"mask_id: {mask_id} is also {name}; the mask token must be a token of its own")


def check_maskable(x: Tensor, maskable: Tensor | None) -> Tensor:
    """``maskable`` as ``[B, L]`` bool, all True when it is ``None``."""
    if x.dim() != 2 or x.dtype != torch.int64:
        raise ValueError(f"tokens: shape {list(x.shape)} of {x.dtype} given, expected [B, L] of int64")
    if maskable is None:
        return torch.ones_like(x, dtype=torch.bool)
    if maskable.shape != x.shape or maskable.dtype != torch.bool:
        raise ValueError(
            f"maskable: shape {list(maskable.shape)} of {maskable.dtype} given, expected {list(x.shape)} of bool"
        )
    return maskable


def check_logits(logits: Tensor, z: Tensor, mask_id: int) -> None:
    if logits.dim() != 3 or logits.shape[:2] != z.shape:
        raise ValueError(f"logits: shape {list(logits.shape)} given, expected [{z.shape[0]}, {z.shape[1]}, V]")
    check_mask_id(mask_id, logits.shape[-1])
