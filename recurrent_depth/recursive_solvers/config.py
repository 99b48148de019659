r"""What a recursive solver is made of, and the published combinations.

HRM (arXiv:2506.21734) and TRM (arXiv:2510.04871) are one scheme with different entries. x the embedded grid, y the state that the
answer is read from, z the other one; ``cycles`` T, ``latent_updates`` n::

    repeat T:   repeat n:  z <- f_z(z + y + x)
                           y <- f_y(y + z)

============== ========================= =========================== ===================================================
field          HRM                       TRM                         notes
============== ========================= =========================== ===================================================
networks       two, of 4 layers          one, of 2 layers            TRM uses f for both roles
T, n           2, 2                      3, 6 (mazes, ARC: 3, 4)     ``H_cycles`` and ``L_cycles`` of the released configurations
gradient       last_updates              last_cycle                  the last z and the last y update, or one whole cycle
halting        q_learning                exact                       halt and continue with a bootstrapped target, or halt alone
halt_rule      halt_above_continue       halt_above_zero
mixing         attention                 mlp (9x9 Sudoku), attention  the MLP mixes positions and needs a fixed length
prefix         1                         16                          positions in front that hold the puzzle's own embedding
============== ========================= =========================== ===================================================

The (n, T) of TRM's own table of results count one level differently from the released configuration; the fields here are the
configuration's. In HRM y is called z_H and z is called z_L.
"""

from dataclasses import dataclass
from typing import Any, Literal

from latentcot.recurrent_depth.settings import check_choice, check_count


@dataclass(frozen=True)
class SolverConfig:
    """
    Args:
        vocab_size: ids of inputs and targets; id 0 is padding.
        length: the most cells of a grid.
        hidden_size, num_heads, layers: of each network.
        expansion: the MLPs' width is ``expansion * 2/3`` of their input's, rounded up to a multiple of ``multiple_of``.
        networks, cycles, latent_updates, gradient, halting, mixing: see the module.
        halt_rule: when a row is done: ``halt_above_continue`` compares the two logits, ``halt_above_zero`` looks at the first.
        puzzles: rows of the puzzle embedding (one a puzzle of ARC; Sudoku and mazes need none, and their prefix is zero); learned
            by sign descent, see :class:`~latentcot.recurrent_depth.recursive_solvers.SignDescent`.
        prefix: positions in front of the grid for that embedding; the halt logits are read from the first position of all.
        norm_eps, rope_theta: constants of the blocks (norm behind the residual, without weight; half-split rotary).

    Raises:
        ValueError: sizes that are no positive integers, unknown names (close ones are named), a prefix of 0 with puzzles.
    """

    vocab_size: int
    length: int
    hidden_size: int = 512
    num_heads: int = 8
    layers: int = 2
    expansion: float = 4.0
    multiple_of: int = 256
    networks: Literal["one", "two"] = "one"
    cycles: int = 3
    latent_updates: int = 6
    gradient: Literal["last_cycle", "last_updates"] = "last_cycle"
    halting: Literal["exact", "q_learning"] = "exact"
    halt_rule: Literal["halt_above_zero", "halt_above_continue"] = "halt_above_zero"
    mixing: Literal["attention", "mlp"] = "attention"
    puzzles: int = 0
    prefix: int = 16
    norm_eps: float = 1e-5
    rope_theta: float = 10000.0

    def __post_init__(self) -> None:
        check_count("vocab_size", self.vocab_size, 2)
        for name in ("length", "hidden_size", "num_heads", "layers", "multiple_of", "cycles", "latent_updates"):
            check_count(name, getattr(self, name), 1)
        for name in ("puzzles", "prefix"):
            check_count(name, getattr(self, name))
        check_choice("networks", self.networks, ("one", "two"))
        check_choice("gradient", self.gradient, ("last_cycle", "last_updates"))
        check_choice("halting", self.halting, ("exact", "q_learning"))
        check_choice("halt_rule", self.halt_rule, ("halt_above_zero", "halt_above_continue"))
        check_choice("mixing", self.mixing, ("attention", "mlp"))
        if self.halt_rule == "halt_above_continue" and self.halting == "exact":
            raise ValueError(
                "halt_rule: 'halt_above_continue' needs a continue logit that learns, so halting 'q_learning'"
            )
        if self.puzzles and not self.prefix:
            raise ValueError(f"prefix: {self.puzzles} puzzles need at least one position in front of the grid, got 0")
        if self.hidden_size % self.num_heads:
            raise ValueError(f"num_heads: {self.num_heads} does not divide hidden_size {self.hidden_size}")

    def mlp_width(self, width: int) -> int:
        """Inner width of a gated MLP on ``width`` channels."""
        return -(-round(self.expansion * width * 2 / 3) // self.multiple_of) * self.multiple_of


def hrm(vocab_size: int, length: int, **changes: Any) -> SolverConfig:
    """HRM's configuration (27,275,266 parameters at a vocabulary of 11 without puzzles); ``changes`` replace fields."""
    published = {
        "layers": 4,
        "networks": "two",
        "cycles": 2,
        "latent_updates": 2,
        "gradient": "last_updates",
        "halting": "q_learning",
        "halt_rule": "halt_above_continue",
        "prefix": 1,
    }
    return SolverConfig(vocab_size, length, **{**published, **changes})


def trm(vocab_size: int, length: int, **changes: Any) -> SolverConfig:
    """TRM's configuration with attention; ``mixing="mlp"`` is that of 9x9 Sudoku. ``changes`` replace fields."""
    return SolverConfig(vocab_size, length, **changes)
