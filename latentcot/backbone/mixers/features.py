"""Activations and norms of queries and keys that mixers take by name."""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

from latentcot.kernels import l2_norm


def elu_plus_one(x: Tensor) -> Tensor:
    """``elu(x) + 1``: above zero everywhere."""
    return F.elu(x) + 1


FEATURE_MAPS: dict[str, Callable[[Tensor], Tensor]] = {"silu": F.silu, "relu": F.relu, "elu": elu_plus_one}
"""What a name means; ``elu`` is elu(x) + 1 throughout."""

SUM_EPS = 1e-6


def sum_norm(x: Tensor) -> Tensor:
    r"""``x / (sum(x) + 1e-6)`` over the last axis, for x >= 0: a row of zeros stays zero and has a finite gradient."""
    return x / (x.sum(-1, keepdim=True) + SUM_EPS)


QK_NORMS: dict[str, Callable[[Tensor], Tensor]] = {"l2": l2_norm, "sum": sum_norm}
