"""One :class:`~latentcot.diffusion_reasoning.trajectory.Trajectory` of a sequence that was filled block by block.

The loop inside a block records that block alone. Here the pieces are put behind each other, row by row: step k of a row is its k-th
denoising step, whatever its neighbours are at, so the record of a row is that of the row alone.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from latentcot.diffusion_reasoning.trajectory import Trajectory, thought

_SHOWN = ("confidence", "entropy", "margin", "topk_ids", "topk_logp")
_NOTHING = {"topk_ids": -1}  # elsewhere NaN


@dataclass(frozen=True)
class _Piece:
    """Rows ``[G]`` of a turn with the columns ``[G, b]`` of their block (-1 behind the end of a row), what was recorded there, the passes
    that the rows had made before, ``[G]``, and the seconds since the start."""

    rows: Tensor
    columns: Tensor
    found: Trajectory
    passes: Tensor
    began: float


class BlockRecorder:
    """Collects the trajectories of blocks.

    Args:
        z: ``[B, L]``, the sequences with the mask token where something is to be filled in.
        real, maskable: ``[B, L]``.
        mask_id: the mask token.
        layers: blocks of the network in one pass.
    """

    def __init__(self, z: Tensor, real: Tensor, maskable: Tensor, mask_id: int, layers: int):
        self.z, self.real, self.maskable = (t.to("cpu", copy=True) for t in (z, real, maskable))
        self.mask_id, self.layers = mask_id, layers
        self.pieces: list[_Piece] = []

    def add(self, rows: Tensor, columns: Tensor, found: Trajectory, passes: Tensor, began: float) -> None:
        """What :func:`~latentcot.diffusion_reasoning.fill_block` recorded of one block of each of these rows."""
        self.pieces.append(_Piece(rows.cpu(), columns.cpu(), found, passes.cpu(), began))

    def finish(self, final: Tensor, nfe: Tensor) -> Trajectory:
        """``final [B, L]``: the sequences as they are returned, ``nfe [B]`` all passes of their rows."""
        batch, length = self.z.shape
        final, nfe = final.to("cpu", torch.int32), nfe.to("cpu", torch.int32)
        steps = [_steps_of(piece.found) for piece in self.pieces]
        taken = torch.zeros(batch, dtype=torch.long)
        for piece, count in zip(self.pieces, steps, strict=True):
            taken[piece.rows] += count
        most = int(taken.max()) if batch else 0
        held = self.z.to(torch.int32)
        tokens, pred = (torch.empty(most, batch, length, dtype=torch.int32) for _ in range(2))
        shown = self._empty(most)
        n_masked, passes = (torch.zeros(most, batch, dtype=torch.int32) for _ in range(2))
        seconds = torch.zeros(most, dtype=torch.float64)
        revealed_at = torch.full((batch, length), -1, dtype=torch.int16)
        n_flips = torch.zeros(batch, length, dtype=torch.int16)
        left = self.maskable.sum(1).to(torch.int32)
        done = torch.zeros(batch, dtype=torch.long)
        for piece, count in zip(self.pieces, steps, strict=True):
            g, c = (piece.columns >= 0).nonzero(as_tuple=True)
            at = piece.rows[g], piece.columns[g, c]
            reveals = piece.found.revealed_at[g, c].long()
            revealed_at[at] = torch.where(reveals < 0, -1, reveals + done[at[0]]).to(torch.int16)
            n_flips[at] = piece.found.n_flips[g, c]
            in_block = piece.found.maskable.sum(1).to(torch.int32)
            for k in range(int(count.max())):
                busy = k < count
                step, rows = (done[piece.rows] + k)[busy], piece.rows[busy]
                now = busy[g]  # of each place of the block, whether its row made this step
                place = at[0][now], at[1][now]
                held[place] = piece.found.tokens[k, g, c][now]
                guess = held[rows]
                tokens[step, rows] = guess
                pred[step, rows] = guess
                where = (done[place[0]] + k, *place)
                pred[where] = piece.found.pred[k, g, c][now]
                for name, values in shown.items():
                    values[where] = getattr(piece.found, name)[k, g, c][now]
                n_masked[step, rows] = left[rows] - in_block[busy] + piece.found.n_masked[k, busy]
                passes[step, rows] = (piece.passes[busy] + piece.found.nfe[k, busy]).to(torch.int32)
                ends = torch.full_like(step, 0, dtype=torch.float64) + piece.began + float(piece.found.seconds[k])
                seconds.scatter_reduce_(0, step, ends, "amax")
            left[piece.rows] -= in_block
            done[piece.rows] += count
        for row in range(batch):  # a row that has come to its end stays as it is
            tokens[max(0, int(taken[row]) - 1) :, row] = final[row]
            pred[int(taken[row]) :, row] = final[row]
            passes[max(0, int(taken[row]) - 1) :, row] = nfe[row]
        agrees = ((thought(tokens, pred, self.mask_id) == final) | ~self.maskable).all(2)
        early = torch.where(agrees, torch.arange(most)[:, None], most).amin(0) if most else torch.zeros(batch)
        return Trajectory(
            tokens=tokens,
            pred=pred,
            **shown,
            revealed_at=revealed_at,
            n_flips=n_flips,
            correct_early=early.to(torch.int32),
            n_masked=n_masked,
            nfe=passes,
            flops=torch.full((batch,), torch.nan, dtype=torch.float64),
            seconds=seconds,
            maskable=self.maskable,
            real=self.real,
            mask_id=self.mask_id,
            layers=self.layers,
        )

    def _empty(self, steps: int) -> dict[str, Tensor]:
        """Tables of what the network thought, filled with what stands where it was not asked."""
        shape, tables = (steps, *self.z.shape), {}
        for name in _SHOWN:
            like = getattr(self.pieces[0].found, name) if self.pieces else None
            if like is not None:
                tables[name] = torch.full((*shape, *like.shape[3:]), _NOTHING.get(name, torch.nan), dtype=like.dtype)
            elif not name.startswith("topk"):
                tables[name] = torch.full(shape, torch.nan, dtype=torch.float16)
        return tables


def _steps_of(found: Trajectory) -> Tensor:
    """How many of the recorded steps each row made, ``[G]``: up to the last in which it had a pass or changed."""
    if not found.n_steps:
        return torch.zeros(len(found.maskable), dtype=torch.long)
    passed = found.nfe.diff(dim=0, prepend=torch.zeros_like(found.nfe[:1])) > 0
    changed = torch.zeros_like(passed)
    changed[1:] = (found.tokens[1:] != found.tokens[:-1]).any(2)
    number = torch.arange(1, found.n_steps + 1)[:, None]
    return torch.where(passed | changed, number, 0).amax(0)
