"""What a method costs: parameters and FLOPs.

FLOPs are counted by formula (2 a multiply-add; matrix products, convolution and the recurrent form of linear mixers; norms and
element-wise work left out), so that the figure does not depend on a back end or a chunk length. A training step counts three
forwards: one forward and a backward of twice its cost.
"""

from torch import Tensor, nn

from latentcot.backbone import HybridForCausalLM

TRAINING_FACTOR = 3.0


def count_parameters(module: nn.Module, trainable_only: bool = False) -> int:
    """Distinct parameters; tied ones count once."""
    return sum(p.numel() for p in module.parameters() if p.requires_grad or not trainable_only)


class FlopCounter:
    """Forward FLOPs of row after row in closed form.

    A pass of n new tokens after t old ones costs ``token · n + pair · (n t + n (n + 1) / 2)`` causally and
    ``token · n + pair · n (t + n)`` bidirectionally, plus ``head`` for each position whose logits are taken.

    Args:
        model: the backbone with its head.
        blocks: which blocks run.
        directions: 2 for a bidirectional pass.
    """

    def __init__(self, model: HybridForCausalLM, blocks: slice = slice(None), directions: int = 1):
        self.directions = directions
        self.token = model.flops(1, 0.0, blocks, 0, directions)
        self.pair = model.flops(1, 1.0, blocks, 0, directions) - self.token
        self.head = model.flops(1, 0.0, slice(0, 0), 1)

    def __call__(self, new: Tensor | int, past: Tensor | int = 0, head: Tensor | int = 0) -> Tensor | float:
        """``new`` tokens after ``past`` ones, ``head`` positions through the head: numbers, or one a row ``[B]``."""
        pairs = new * (past + (new + 1) / 2) if self.directions == 1 else new * (past + new)
        return self.token * new + self.pair * pairs + self.head * head
