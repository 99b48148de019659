r"""The two optimisers of the published recipes that PyTorch lacks."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor


class ArctangentAdam(torch.optim.Optimizer):
    r"""Adam with an arctangent in place of the quotient and its epsilon, and decoupled weight decay.

    .. math:: \theta \leftarrow (1 - \eta\lambda)\,\theta - \eta\, \mathrm{atan2}(\hat m, \sqrt{\hat v})

    Equal to Adam without epsilon to first order for small steps, bounded by :math:`\eta\pi/2`, and unchanged when all gradients are
    multiplied by a constant.

    Args:
        params: as for every optimiser.
        lr, betas, weight_decay: 1e-4, (0.9, 0.95), 0.1 in HRM (decay 1.0 for Sudoku).
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.95),
        weight_decay: float = 0.1,
    ):
        for name, value in (("lr", lr), ("weight_decay", weight_decay)):
            if value < 0:
                raise ValueError(f"{name}: {value!r} given, expected a number of at least 0")
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"betas: {betas!r} given, expected two numbers in [0, 1)")
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            slow, fast = group["betas"]
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state.update(step=0, mean=torch.zeros_like(parameter), square=torch.zeros_like(parameter))
                state["step"] += 1
                mean: Tensor = state["mean"].lerp_(parameter.grad, 1 - slow)
                square: Tensor = state["square"].mul_(fast).addcmul_(parameter.grad, parameter.grad, value=1 - fast)
                upper = mean / (1 - slow ** state["step"])
                lower = (square / (1 - fast ** state["step"])).sqrt_()
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.sub_(torch.atan2(upper, lower), alpha=group["lr"])
        return loss


class SignDescent(torch.optim.Optimizer):
    r"""Sign descent on the rows of an embedding that took part: :math:`\theta_i \leftarrow (1 - \eta\lambda)\,\theta_i - \eta\,
    \mathrm{sign}(g_i)` for rows with a gradient, the others stay (puzzle embeddings of HRM and TRM).

    Args:
        params: embeddings ``[rows, width]``.
        lr: step of every entry.
        weight_decay: decoupled.
    """

    def __init__(self, params: Iterable[Any], lr: float = 1e-2, weight_decay: float = 0.1):
        for name, value in (("lr", lr), ("weight_decay", weight_decay)):
            if value < 0:
                raise ValueError(f"{name}: {value!r} given, expected a number of at least 0")
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                seen = (parameter.grad != 0).any(1, keepdim=True)
                moved = parameter * (1 - group["lr"] * group["weight_decay"]) - group["lr"] * parameter.grad.sign()
                parameter.copy_(torch.where(seen, moved, parameter))
        return loss
