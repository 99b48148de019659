r"""What happened in every denoising step: the log of a sampler as latent depth.

Denoising steps refine all positions together, so the depth of a sample is layers × passes, chosen at inference. A
:class:`Trajectory` keeps for each step k what the network thought of each masked position, and when each token was
revealed, changed its mind or was settled. Pictures: :mod:`~latentcot.diffusion_reasoning.trajectory_plots`.
"""

import json
import os
import time
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from latentcot.backbone import HybridForCausalLM
from latentcot.training.budget import FlopCounter

FULL_K = 5
_NEVER = -1000.0  # a log-probability whose probability is 0, in place of minus infinity, which times 0 is no number


@dataclass(frozen=True)
class Trajectory:
    """One entry a denoising step k, row and position; all tensors on the CPU.

    ``tokens [k, B, L]`` int32: the canvas after the step; ``pred [k, B, L]`` int32: the likeliest token at positions
    that the step predicted, revealed or not (elsewhere what is there); ``confidence``, ``entropy`` (nats) and
    ``margin`` ``[k, B, L]`` fp16 of that prediction, NaN where there was none (margin: likeliest minus second);
    ``revealed_at [B, L]`` int16: step of the last reveal, -1 for given positions; ``n_flips [B, L]`` int16: how often a
    revealed token went back to the mask; ``correct_early [B]`` int32: first step after which every maskable position
    holds its final token or, while masked, is predicted so; ``n_masked``, ``nfe [k, B]``: masks left and
    passes so far; ``flops [B]``: of all passes (NaN where the network can not be counted); ``layers``: blocks of one
    pass (0 where unknown); ``seconds [k]`` since the start; ``maskable``, ``real [B, L]``; ``mask_id``; with
    ``record="full"`` ``topk_ids`` int32 and ``topk_logp`` fp16 ``[k, B, L, K]``.
    """

    tokens: Tensor
    pred: Tensor
    confidence: Tensor
    entropy: Tensor
    margin: Tensor
    revealed_at: Tensor
    n_flips: Tensor
    correct_early: Tensor
    n_masked: Tensor
    nfe: Tensor
    flops: Tensor
    seconds: Tensor
    maskable: Tensor
    real: Tensor
    mask_id: int
    layers: int = 0
    topk_ids: Tensor | None = None
    topk_logp: Tensor | None = None

    @property
    def n_steps(self) -> int:
        return self.tokens.shape[0]

    @property
    def final(self) -> Tensor:
        """The canvas at the end, ``[B, L]`` int32."""
        return self.tokens[-1]

    @property
    def depth(self) -> Tensor:
        """Blocks executed one after the other, ``[B]``: layers × passes, the unit of depth recurrence too."""
        return self.layers * self.nfe[-1] if self.n_steps else torch.zeros(self.maskable.shape[0], dtype=torch.int32)

    def settled(self) -> Tensor:
        """Share of maskable positions where the final token stands, or is predicted while the mask stands, ``[k, B]``: is
        the answer decided before it is revealed? 1 in the last step; NaN for rows without a maskable position."""
        same = (thought(self.tokens, self.pred, self.mask_id) == self.final) & self.maskable
        return same.sum(2) / self.maskable.sum(1)

    def kendall_tau(self) -> Tensor:
        r"""Agreement of the order of reveal with left to right, ``[B]`` in -1..1 (:math:`\tau_a`: pairs revealed in the
        same step count as 0); NaN for rows with fewer than two maskable positions."""
        rows = []
        for at, maskable in zip(self.revealed_at, self.maskable, strict=True):
            step = at[maskable].long()
            n = len(step)
            if n < 2:
                rows.append(float("nan"))
                continue
            sign = torch.sign(step[None, :] - step[:, None]).triu(1)
            rows.append(float(sign.sum()) / (n * (n - 1) / 2))
        return torch.tensor(rows)

    def save_npz(self, path: str | os.PathLike[str]) -> None:
        """Write every field to one ``.npz``; :meth:`load_npz` gives it back bit for bit."""
        path = Path(path)
        arrays = {
            f.name: getattr(self, f.name).numpy() for f in fields(self) if isinstance(getattr(self, f.name), Tensor)
        }
        plain = json.dumps({"mask_id": self.mask_id, "layers": self.layers})
        partial = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            with open(partial, "wb") as file:
                np.savez_compressed(file, plain=np.frombuffer(plain.encode(), dtype=np.uint8), **arrays)
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)

    @classmethod
    def load_npz(cls, path: str | os.PathLike[str]) -> "Trajectory":
        """What :meth:`save_npz` wrote. ``ValueError`` when it is something else; nothing is unpickled."""
        try:
            with np.load(path, allow_pickle=False) as stored:
                plain = json.loads(bytes(stored["plain"]).decode())
                tensors = {name: torch.from_numpy(stored[name]) for name in stored.files if name != "plain"}
            return cls(**tensors, **plain)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"path: {path} holds no trajectory ({error})") from error


def thought(tokens: Tensor, pred: Tensor, mask_id: int) -> Tensor:
    """What stands at each position, or what the network would write where the mask stands."""
    return torch.where(tokens == mask_id, pred, tokens)


class Recorder:
    """Collects a :class:`Trajectory` while a sampler runs. ``model``: its FLOPs are counted when it is a backbone."""

    def __init__(self, real: Tensor, maskable: Tensor, mask_id: int, full: bool, model: Any = None):
        self.real, self.maskable = real.to("cpu", copy=True), maskable.to("cpu", copy=True)
        self.mask_id, self.full = mask_id, full
        self.started = time.perf_counter()
        self.steps: dict[str, list[Tensor]] = {}
        self.seconds: list[float] = []
        self.masked_before = self.maskable.clone()
        self.revealed_at = torch.full(self.maskable.shape, -1, dtype=torch.int16)
        self.n_flips = torch.zeros(self.maskable.shape, dtype=torch.int16)
        self.last_pred: Tensor | None = None
        self.backbone = getattr(model, "backbone", None)
        if not isinstance(self.backbone, HybridForCausalLM):
            self.backbone = None

    def record(
        self, rows: Tensor, logits: Tensor, seen: Tensor, held: Tensor, z: Tensor, masked: Tensor, nfe: Tensor
    ) -> None:
        """After a step: ``rows [R]`` with ``logits [R, L, V]``, predicted at ``seen [R, L]``; the whole batch holds
        ``z``, ``masked [B, L]``, after ``nfe [B]`` passes."""
        number = len(self.seconds)
        r, column = seen.nonzero(as_tuple=True)
        # few passes over the [n, V] table: it is as large as what the sampler itself reads
        chosen = logits[r, column].to(torch.promote_types(logits.dtype, torch.float32))
        chosen[:, self.mask_id] = -torch.inf
        logp = chosen.log_softmax(-1)
        best = logp.topk(min(FULL_K if self.full else 2, logp.shape[-1]), -1)
        at = (rows[r].cpu(), column.cpu())
        nothing = torch.full(z.shape, torch.nan, dtype=torch.float16)
        entropy = -torch.linalg.vecdot(logp.exp(), logp.clamp_(min=_NEVER))
        top = best.values.exp()
        margin = top[:, 0] - (top[:, 1] if top.shape[1] > 1 else 0.0)
        tokens, left = z.to("cpu", torch.int32), masked.to("cpu", copy=True)  # the loop goes on writing into both
        # a position that no pass has predicted in this step is still predicted as it was
        pred = tokens.clone() if self.last_pred is None else torch.where(left, self.last_pred, tokens)
        pred = pred.index_put(at, best.indices[:, 0].to("cpu", torch.int32))
        self.last_pred = pred
        self._add("tokens", tokens)
        self._add("pred", pred)
        for name, value in (("confidence", top[:, 0]), ("entropy", entropy), ("margin", margin)):
            self._add(name, nothing.index_put(at, value.to("cpu", torch.float16)))
        self._add("n_masked", left.sum(1).to(torch.int32))
        self._add("nfe", nfe.to("cpu", torch.int32))
        if self.full:
            shape = (*z.shape, best.indices.shape[1])
            ids = torch.full(shape, -1, dtype=torch.int32)
            logps = torch.full(shape, torch.nan, dtype=torch.float16)
            self._add("topk_ids", ids.index_put(at, best.indices.to("cpu", torch.int32)))
            self._add("topk_logp", logps.index_put(at, best.values.to("cpu", torch.float16)))
        new = self.masked_before & ~left
        self.revealed_at[new] = number
        self.n_flips += (~self.masked_before & left).to(torch.int16)
        self.masked_before = left
        self.seconds.append(time.perf_counter() - self.started)

    def finish(self, z: Tensor) -> Trajectory:
        """``z [B, L]``: the canvas as it was returned (the end of a text may have been filled up after the last step)."""
        batch, length = self.maskable.shape
        final = z.to("cpu", torch.int32)
        if not self.seconds:  # nothing was masked anywhere
            empty = torch.zeros(0, batch, length)
            for name, kind in (("tokens", torch.int32), ("pred", torch.int32), ("confidence", torch.float16),
                               ("entropy", torch.float16), ("margin", torch.float16)):  # fmt: skip
                self.steps[name] = [empty.to(kind)]
            for name in ("n_masked", "nfe"):
                self.steps[name] = [torch.zeros(0, batch, dtype=torch.int32)]
            stacked = {name: values[0] for name, values in self.steps.items()}
        else:
            self.steps["tokens"][-1] = final
            stacked = {name: torch.stack(values) for name, values in self.steps.items()}
        standing = thought(stacked["tokens"], stacked["pred"], self.mask_id)
        agrees = ((standing == final) | ~self.maskable).all(2)
        count = torch.arange(len(self.seconds))[:, None]
        early = torch.where(agrees, count, len(self.seconds)).amin(0) if len(self.seconds) else torch.zeros(batch)
        flops, layers = torch.full((batch,), torch.nan, dtype=torch.float64), 0
        if self.backbone is not None:
            layers = len(self.backbone.model.layers)
            lengths = self.real.sum(1).double()
            a_pass = FlopCounter(self.backbone, directions=2)(lengths, head=lengths)
            flops = a_pass * (stacked["nfe"][-1] if len(self.seconds) else 0)
        return Trajectory(
            **stacked,
            revealed_at=self.revealed_at,
            n_flips=self.n_flips,
            correct_early=early.to(torch.int32),
            flops=torch.as_tensor(flops),
            seconds=torch.tensor(self.seconds, dtype=torch.float64),
            maskable=self.maskable,
            real=self.real,
            mask_id=self.mask_id,
            layers=layers,
        )

    def _add(self, name: str, value: Tensor) -> None:
        self.steps.setdefault(name, []).append(value)
