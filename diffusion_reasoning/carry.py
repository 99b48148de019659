r"""What a masked position takes from one denoising pass to the next.

Plain masked diffusion keeps token ids alone between passes: a masked position enters every pass as the same vector
:math:`e_m`, and everything the network found out there is thrown away. A carry makes the input of the next pass

============== =============================================================================== ======================
name           input at a masked position                                                      parameters
============== =============================================================================== ======================
``none``       :math:`e_m`                                                                     –
``soft_topk``  :math:`(1-\lambda) e_m + \lambda \sum_{v \in top\,k} \pi_v E_v`                 3 scalars
``soft_full``  the same with the whole softmax, at temperature :math:`\theta`                  4 scalars
``self_cond``  :math:`e_m + W\,\mathrm{norm}(E^\top \mathrm{softmax}(\ell))`                   :math:`D^2`, W = 0 at first
``hidden``     :math:`e_m + W\,\mathrm{norm}(h)`, h the last hidden state                      :math:`D^2`, W = 0 at first
============== =============================================================================== ======================

with :math:`\lambda = s\,\sigma(a(-H - c))`, H the entropy of the prediction in nats over the whole vocabulary
(soft-masked diffusion, arXiv:2510.17206). Revealed positions get the embedding of their token, and a position that was
sent back to the mask gets :math:`e_m` until it has been through a pass again.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from latentcot.backbone.norms import RMSNorm

CARRIES = ("none", "soft_topk", "soft_full", "self_cond", "hidden")
_FLOOR = 1e-6


def _inverse_softplus(value: float) -> Tensor:
    return torch.tensor(value).expm1().log()


class Carry(nn.Module):
    """Base of every carry: ``forward(mask_embedding [D], logits [n, V], hidden [n, D], table [V, D]) -> [n, D]``.

    ``logits`` have the mask token at minus infinity; ``table`` holds the embeddings as they enter the network.
    """

    name = ""

    def forward(self, mask_embedding: Tensor, logits: Tensor, hidden: Tensor, table: Tensor) -> Tensor:
        raise NotImplementedError(f"{type(self).__name__} defines no forward")

    def init_weights(self) -> None:
        """(Re-)start the parameters where the table above says."""
        raise NotImplementedError(f"{type(self).__name__} defines no init_weights")


class SoftMask(Carry):
    r"""Soft masks. :math:`s = \sigma(raw)` starts just above 0, :math:`c = -\mathrm{softplus}` at -0.75 and stays
    negative, :math:`a = \mathrm{softplus}` at 10/1.5 and stays positive.

    Args:
        k: how many tokens are mixed; ``None`` = all, with a learned temperature that starts at 1.
        start: s at the beginning. Exactly 0 would give a and c no gradient; 1e-6 is the floor of the released code.
    """

    def __init__(self, k: int | None = 3, start: float = _FLOOR):
        super().__init__()
        if k is not None and k < 1:
            raise ValueError(f"k: expected at least one token, or None for all, got {k}")
        if not 0.0 < start < 1.0:
            raise ValueError(f"start: expected a share within (0, 1), got {start}")
        self.k, self.start = k, start
        self.name = "soft_full" if k is None else "soft_topk"
        self.scale, self.centre, self.slope = (nn.Parameter(torch.zeros(())) for _ in range(3))
        if k is None:
            self.log_temperature = nn.Parameter(torch.zeros(()))
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        self.scale.copy_(torch.logit(torch.tensor(self.start, dtype=torch.float64)))
        self.centre.copy_(_inverse_softplus(0.75))
        self.slope.copy_(_inverse_softplus(10 / 1.5))
        if self.k is None:
            self.log_temperature.zero_()

    def share(self, logits: Tensor) -> Tensor:
        r""":math:`\lambda`, ``[n]``: near s where the prediction is certain, falling with its entropy."""
        logprobs = logits.log_softmax(-1)
        finite = logprobs > -torch.inf  # replaced before the product: its gradient at minus infinity is no number
        logprobs = torch.where(finite, logprobs, 0.0)
        entropy = -(logprobs.exp() * logprobs).sum(-1)
        return self.scale.sigmoid() * torch.sigmoid(F.softplus(self.slope) * (F.softplus(self.centre) - entropy))

    def forward(self, mask_embedding: Tensor, logits: Tensor, hidden: Tensor, table: Tensor) -> Tensor:
        precise = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if self.k is None:
            finite = precise > -torch.inf
            tempered = torch.where(finite, precise, 0.0) / self.log_temperature.exp()
            mixed = tempered.masked_fill(~finite, -torch.inf).softmax(-1).to(table.dtype) @ table
        else:
            best = precise.topk(min(self.k, precise.shape[-1]), -1)
            mixed = (best.values.softmax(-1)[..., None].to(table.dtype) * table[best.indices]).sum(-2)
        share = self.share(precise)[:, None].to(table.dtype)
        return (1 - share) * mask_embedding + share * mixed


class Projected(Carry):
    """``self_cond`` (of the expected embedding) and ``hidden`` (of the last hidden state). W starts at zero, so that the
    network is the plain one at first."""

    def __init__(self, width: int, name: str, norm_eps: float = 1e-6):
        super().__init__()
        if name not in ("self_cond", "hidden"):
            raise ValueError(f"name: {name!r} given, expected 'self_cond' or 'hidden'")
        self.name = name
        self.norm = RMSNorm(width, norm_eps, affine=False)
        self.projection = nn.Linear(width, width, bias=False)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        self.projection.weight.zero_()

    def forward(self, mask_embedding: Tensor, logits: Tensor, hidden: Tensor, table: Tensor) -> Tensor:
        if self.name == "self_cond":
            precise = logits.to(torch.promote_types(logits.dtype, torch.float32))
            hidden = precise.softmax(-1).to(table.dtype) @ table
        return mask_embedding + self.projection(self.norm(hidden))


def make_carry(name: str, width: int) -> Carry | None:
    """A carry by name, ``None`` for ``none``.

    Raises:
        ValueError: unknown name, or ``state``, which belongs to block diffusion.
    """
    if name == "state":
        raise ValueError("carry: 'state' carries mixer states from pass to pass; only block models have it")
    if name not in CARRIES:
        raise ValueError(f"carry: unknown carry {name!r}; valid: {', '.join(CARRIES)}")
    if name in ("soft_topk", "soft_full"):
        return SoftMask(3 if name == "soft_topk" else None)
    return None if name == "none" else Projected(width, name)
