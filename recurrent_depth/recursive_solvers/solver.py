r"""HRM and TRM: one segment of a small recursive solver (arXiv:2506.21734, arXiv:2510.04871).

.. math:: x = \sqrt{D}\, [\mathrm{puzzle}; E[\mathrm{grid}]] \qquad z \leftarrow f_z(z + y + x) \qquad y \leftarrow f_y(y + z)

f adds its inputs and runs its blocks :math:`u = n(x + \mathrm{mix}(x))`, :math:`n(u + \mathrm{MLP}(u))` (the backbone's, norm behind the
residual, no norm weight), every position seeing every other. The answer is a linear map of y; the two halt logits are one of y's
first position. Both states start as one fixed random vector each, the same at every position.

A segment takes states and returns states; :class:`~latentcot.recurrent_depth.recursive_solvers.DeepSupervision` strings segments
together. Shape letters: B rows, S cells, L = prefix + S positions, D width, V vocabulary.
"""

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from latentcot.backbone.block import Block, SwiGLU
from latentcot.backbone.context import SequenceContext
from latentcot.backbone.mixers import Mixer
from latentcot.backbone.mixers.attention import AttentionOptions, SoftmaxAttention
from latentcot.backbone.mixers.base import linear_flops
from latentcot.backbone.state import LayerState
from latentcot.kernels import Bidirectional
from latentcot.recurrent_depth.recursive_solvers.config import SolverConfig

States = tuple[Tensor, Tensor]
# Standard deviation of a unit normal that is cut at two deviations: dividing by it gives the spread that was asked for.
_CUT_SPREAD = 0.8796256610342398


@dataclass
class SegmentOutput:
    """``logits [B, S, V]``; ``halt [B]`` and ``proceed [B]`` (the continue logit; ``None`` where halting has no second one)."""

    logits: Tensor
    halt: Tensor
    proceed: Tensor | None = None


class PositionMLP(Mixer):
    """Mixes positions by a gated MLP along them, the same for every channel; padded and missing positions count as zero."""

    name = "position_mlp"

    def __init__(self, positions: int, inner: int):
        super().__init__()
        self.positions = positions
        self.mlp = SwiGLU(positions, inner)

    def forward(
        self, hidden: Tensor, context: SequenceContext, state: LayerState | None = None
    ) -> tuple[Tensor, LayerState | None]:
        length = hidden.shape[1]
        if context.mask is not None:
            hidden = hidden * context.mask[..., None]
        hidden = nn.functional.pad(hidden, (0, 0, 0, self.positions - length))
        return self.mlp(hidden.transpose(1, 2)).transpose(1, 2)[:, :length], None

    def flops(self, tokens: int, keys: float, directions: int = 1) -> float:
        return linear_flops(self.mlp, 1) * tokens / self.positions


class RecursiveSolver(nn.Module):
    """One segment: states in, states and answer out. Build it by ``RecursiveSolver(hrm(...))`` or ``RecursiveSolver(trm(...))``.

    Inputs are dicts: ``grid [B, S]`` ids, ``mask [B, S]`` bool (optional; padding may stand anywhere), ``puzzle [B]`` ids (with
    ``config.puzzles``).
    """

    initial_y: Tensor
    initial_z: Tensor

    def __init__(self, config: SolverConfig):
        super().__init__()
        self.config = config
        width = config.hidden_size
        self.embedding = nn.Embedding(config.vocab_size, width)
        self.puzzle_embedding = nn.Embedding(config.puzzles, config.prefix * width) if config.puzzles else None
        self.z_blocks = self._network()
        self.y_blocks = self._network() if config.networks == "two" else self.z_blocks
        self.head = nn.Linear(width, config.vocab_size, bias=False)
        self.halt_head = nn.Linear(width, 2)
        self.register_buffer("initial_y", torch.empty(width))
        self.register_buffer("initial_z", torch.empty(width))
        self.reset_parameters()

    def _network(self) -> nn.ModuleList:
        c, positions = self.config, self.config.prefix + self.config.length
        blocks = nn.ModuleList()
        for _ in range(c.layers):
            mixer: Mixer
            if c.mixing == "mlp":
                mixer = PositionMLP(positions, c.mlp_width(positions))
            else:
                mixer = SoftmaxAttention(c.hidden_size, AttentionOptions(c.num_heads, rope_theta=c.rope_theta))
            mlp = SwiGLU(c.hidden_size, c.mlp_width(c.hidden_size))
            blocks.append(Block(mixer, mlp, c.hidden_size, "post", c.norm_eps, norm_affine=False))
        return blocks

    def compile_blocks(self, **options: Any) -> None:
        """From now on every block runs through ``torch.compile`` (with its ``options``): the same answers up to rounding, after a minute
        of compiling. Names of weights stay."""
        for blocks in (self.z_blocks, self.y_blocks) if self.y_blocks is not self.z_blocks else (self.z_blocks,):
            for block in blocks:
                block.compile(**options)

    def reset_parameters(self) -> None:
        """Linear maps: normal of variance 1 / inputs, cut at two deviations; embeddings the same with 1 / D; puzzle embeddings 0;
        halt logits: weight 0, bias -5; initial states: unit normals, cut at two deviations."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                _cut_normal_(module.weight, module.in_features**-0.5)
        _cut_normal_(self.embedding.weight, self.config.hidden_size**-0.5)
        if self.puzzle_embedding is not None:
            nn.init.zeros_(self.puzzle_embedding.weight)
        nn.init.zeros_(self.halt_head.weight)
        nn.init.constant_(self.halt_head.bias, -5.0)
        _cut_normal_(self.initial_y, 1.0)
        _cut_normal_(self.initial_z, 1.0)

    # -- a segment -----------------------------------------------------------------------------------------------------

    def start(self, inputs: dict[str, Tensor]) -> States:
        """Fresh states ``(y, z)`` of rows like ``inputs``, ``[B, L, D]`` each."""
        batch, cells = inputs["grid"].shape
        shape = (batch, self.config.prefix + cells, self.config.hidden_size)
        return self.initial_y.expand(shape).clone(), self.initial_z.expand(shape).clone()

    def forward(self, states: States, inputs: dict[str, Tensor]) -> tuple[States, SegmentOutput]:
        """One segment. Gradient flows through the last updates alone (``config.gradient``), never into ``states``.

        Raises:
            ValueError: missing or misshaped inputs, grids longer than ``config.length``, states of another shape.
        """
        x, context = self.embed(inputs)
        y, z = states
        for name, state in (("y", y), ("z", z)):
            if state.shape != x.shape:
                raise ValueError(
                    f"states: {name} has shape {list(state.shape)}, expected [B, L, D] = {list(x.shape)}; states of "
                    "other rows can not be continued"
                )
        c = self.config
        for cycle in range(c.cycles):
            for update in range(c.latent_updates):
                with self._gradient(cycle, update):
                    z = _run(self.z_blocks, z + y + x, context)
            with self._gradient(cycle, c.latent_updates):
                y = _run(self.y_blocks, y + z, context)
        halt = self.halt_head(y[:, 0])
        proceed = halt[:, 1] if c.halting == "q_learning" else None
        return (y, z), SegmentOutput(self.head(y[:, c.prefix :]), halt[:, 0], proceed)

    def _gradient(self, cycle: int, update: int) -> Any:
        first = self.config.latent_updates - 1 if self.config.gradient == "last_updates" else 0
        kept = cycle == self.config.cycles - 1 and update >= first
        return nullcontext() if kept else torch.no_grad()

    def embed(self, inputs: dict[str, Tensor]) -> tuple[Tensor, SequenceContext]:
        """``x [B, L, D]``, prefix included, and the context (positions, padding) that all updates share."""
        c, (grid, mask, puzzle) = self.config, self._checked(inputs)
        x = self.embedding(grid)
        if c.prefix:
            front = x.new_zeros(len(x), c.prefix, c.hidden_size)
            if self.puzzle_embedding is not None:
                front = self.puzzle_embedding(puzzle).unflatten(1, (c.prefix, c.hidden_size))
            x = torch.cat((front, x), 1)
            if mask is not None:
                mask = torch.cat((mask.new_ones(len(mask), c.prefix), mask), 1)
        batch, positions = x.shape[:2]
        context = SequenceContext.build(
            batch, positions, x.device, attention_mask=mask, visibility=Bidirectional(), keep_state=False
        )
        return x * c.hidden_size**0.5, context

    def _checked(self, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor | None, Tensor | None]:
        if "grid" not in inputs:
            raise ValueError(f"inputs: 'grid' is missing, got {sorted(inputs)}")
        grid, mask, puzzle = inputs["grid"], inputs.get("mask"), inputs.get("puzzle")
        if grid.ndim != 2 or grid.shape[1] > self.config.length:
            raise ValueError(f"grid: expected shape [B, at most {self.config.length}], got {list(grid.shape)}")
        if mask is not None and mask.shape != grid.shape:
            raise ValueError(f"mask: expected shape {list(grid.shape)}, got {list(mask.shape)}")
        if (puzzle is None) != (self.puzzle_embedding is None) or (
            puzzle is not None and puzzle.shape != grid.shape[:1]
        ):
            given = "none" if puzzle is None else f"shape {list(puzzle.shape)}"
            expected = (
                f"ids of shape [{len(grid)}]" if self.puzzle_embedding is not None else "none (config.puzzles is 0)"
            )
            raise ValueError(f"puzzle: expected {expected}, got {given}")
        return grid, mask, puzzle

    # -- halting and cost ------------------------------------------------------------------------------------------------

    def halts(self, output: SegmentOutput) -> Tensor:
        """Does the solver call each row done? bool ``[B]``."""
        if self.config.halt_rule == "halt_above_zero":
            return output.halt > 0
        assert output.proceed is not None  # the configuration sees to it
        return output.halt > output.proceed

    def flops(self, cells: int) -> float:
        """Forward FLOPs of one segment of one row of ``cells`` cells."""
        c, tokens = self.config, self.config.prefix + cells
        blocks = sum(block.flops(tokens, float(tokens)) for block in self.z_blocks)  # type: ignore[operator]
        updates = c.cycles * (c.latent_updates + 1)
        return updates * blocks + linear_flops(self.head, cells) + linear_flops(self.halt_head, 1)


def _run(blocks: nn.ModuleList, hidden: Tensor, context: SequenceContext) -> Tensor:
    for block in blocks:
        hidden, _ = block(hidden, context)
    return hidden


def _cut_normal_(tensor: Tensor, std: float) -> None:
    wide = std / _CUT_SPREAD
    with torch.no_grad():
        nn.init.trunc_normal_(tensor, std=wide, a=-2 * wide, b=2 * wide)
