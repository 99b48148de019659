r"""Signs of a loop that is going wrong, as functions of its states.

Two published failures show here first (arXiv:2502.05171): all positions of a sequence fall into the same state
(:func:`token_correlation` goes to 1), and the loop learns to ignore its state (the loss does not depend on r).
"""

import torch
from torch import Tensor


def token_correlation(state: Tensor, mask: Tensor | None = None) -> Tensor:
    r"""Mean cosine between different positions of a row, ``[B]``.

    Args:
        state: ``[B, S, D]``.
        mask: real positions ``[B, S]``; all when ``None``. Rows with fewer than two have no pairs: NaN.
    """
    mask = _mask(state, mask)
    unit = torch.nn.functional.normalize(state, dim=-1) * mask[..., None]
    n = mask.sum(1).to(state.dtype)
    # The sum over all pairs is the squared length of the sum of unit vectors; the diagonal leaves again.
    together = unit.sum(1).square().sum(-1) - unit.square().sum((1, 2))
    return together / (n * (n - 1))


def relative_residual(previous: Tensor, state: Tensor) -> Tensor:
    r""":math:`\lVert s_i - s_{i-1} \rVert / \lVert s_i \rVert` over the last axis: ``[B, S, D]`` twice to ``[B, S]``.
    Where the state is exactly 0 the quotient is taken over the smallest positive number instead."""
    if previous.shape != state.shape:
        raise ValueError(f"previous: shape {list(previous.shape)} given, expected that of state, {list(state.shape)}")
    tiny = torch.finfo(state.dtype).tiny
    length = torch.linalg.vector_norm  # Tensor.norm takes twice as long for the few rows of a decoding step
    return length(state - previous, dim=-1) / length(state, dim=-1).clamp(min=tiny)


def state_rms(state: Tensor, mask: Tensor | None = None) -> Tensor:
    """Root mean square over positions and channels, ``[B]``."""
    mask = _mask(state, mask)
    squares = (state.square().mean(-1) * mask).sum(1)
    return (squares / mask.sum(1).clamp(min=1)).sqrt()


COLLAPSED = 0.99  # token correlation of a final state that says nothing about its position
SAME_LOSS = 0.01  # relative gain of r recurrences over one that counts as none


def diagnose(correlation: float, loss_at_one: float | None = None, loss: float | None = None) -> list[str]:
    """The published failures that these numbers show, in words; an empty list when they show none.

    Args:
        correlation: mean :func:`token_correlation` of s_r; from 0.99 on the states have collapsed.
        loss_at_one, loss: with one recurrence and with the usual number; where the second is not at least 1 % smaller, the
            loop does not use its state. Untrained models are like that too.

    The two borders are this library's; the source shows the failures without giving numbers.
    """
    found = []
    if correlation >= COLLAPSED:
        found.append(
            f"all positions of a sequence are in nearly the same state (token correlation {correlation:.3f}); embedding "
            "scale, a concatenating adapter and norms with weights prevented that in the source"
        )
    if loss_at_one is not None and loss is not None and loss > (1 - SAME_LOSS) * loss_at_one:
        found.append(
            f"more recurrences do not help (loss {loss_at_one:.4f} with one, {loss:.4f} with more): the loop does not use its "
            "state so far; norms behind the residual (sandwich_post_residual) prevented that in the source"
        )
    return found


def _mask(state: Tensor, mask: Tensor | None) -> Tensor:
    if mask is None:
        return torch.ones(state.shape[:2], dtype=torch.bool, device=state.device)
    if mask.shape != state.shape[:2]:
        raise ValueError(f"mask: shape {list(mask.shape)} given, expected {list(state.shape[:2])}")
    return mask.bool()
