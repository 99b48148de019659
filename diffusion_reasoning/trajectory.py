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
_MOST_HELD = 2**28  # bytes of steps that wait on the device
_NEVER = -1000.0  # a log-probability whose probability is 0, in place of minus infinity, which times 0 is no number


@dataclass(frozen=True)
class Trajectory:
    """One entry a denoising step k, row and position; all tensors on the CPU.

    ``tokens [k, B, L]`` int32: the canvas after the step; ``pred [k, B, L]`` int32: the likeliest token at positions
    that the step predicted, revealed or not (elsewhere what is there); ``confidence``, ``entropy`` (nats) and
    ``margin`` ``[k, B, L]`` fp16 of that prediction, NaN where there was none (margin: likeliest minus second;
    of equally likely ones the lowest id is the likeliest, while ``topk_ids`` lists them in no particular order);
    ``revealed_at [B, L]`` int16: step of the last reveal, -1 for given positions; ``n_flips [B, L]`` int16: how often a
    revealed token went back to the mask; ``correct_early [B]`` int32: first step after which every maskable position
    holds its final token or, while masked, is predicted so; ``n_masked``, ``nfe [k, B]``: masks left and
    passes so far; ``flops [B]``: of all passes (NaN where the network can not be counted); ``layers``: blocks of one
    pass (0 where unknown); ``seconds [k]`` since the start, as
    the host came by (nothing is waited for: a GPU may still be at the step's work); ``maskable``, ``real [B, L]``; ``mask_id``; with
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
    """Collects a :class:`Trajectory` while a sampler runs. ``model``: its FLOPs are counted when it is a backbone.

    While the sampler runs, everything stays on its device and nothing is waited for; :meth:`finish` brings it over, or a
    step that finds more than 256 MiB of it there.
    """

    def __init__(self, real: Tensor, maskable: Tensor, mask_id: int, full: bool, model: Any = None):
        self.real, self.maskable, self.mask_id, self.full = real, maskable, mask_id, full
        self.started = time.perf_counter()
        self.seconds: list[float] = []
        self.counts: list[int] = []  # positions that each step predicted
        self.steps: dict[str, list[Tensor]] = {}  # one entry a step, [B, ...]
        self.shown: dict[str, list[Tensor]] = {}  # one entry a step, [n, ...] with the positions that it predicted
        self.brought: list[dict[str, Tensor]] = []
        self.held = 0  # bytes on the device
        self.backbone = getattr(model, "backbone", None)
        if not isinstance(self.backbone, HybridForCausalLM):
            self.backbone = None

    def record(self, rows: Tensor, columns: Tensor, logits: Tensor, z: Tensor, masked: Tensor, nfe: Tensor) -> None:
        """After a step that predicted n positions (``rows``, ``columns [n]``) with ``logits [n, V]``, which may be written
        into; the whole batch holds ``z``, ``masked [B, L]``, after ``nfe [B]`` passes. All but the logits are kept as they
        are and must not be written into any more."""
        # few passes over the [n, V] table: it is as large as what the sampler itself reads
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        logits[:, self.mask_id] = -torch.inf
        logp = logits.log_softmax(-1)
        best = logp.max(-1)
        shown = {"row": rows, "column": columns, "pred": best.indices}
        if self.full:
            table = logp.topk(min(FULL_K, logp.shape[-1]), -1)
            shown |= {"topk_ids": table.indices, "topk_logp": table.values}
        at = best.indices[:, None]
        second = logp.scatter_(1, at, -torch.inf).amax(-1)
        logp.scatter_(1, at, best.values[:, None])
        entropy = -torch.linalg.vecdot(logp.exp(), logp.clamp_(min=_NEVER))
        shown["values"] = torch.stack([best.values, second, entropy], 1)
        self.counts.append(len(rows))
        for kept, values in ((self.shown, shown), (self.steps, {"tokens": z, "masked": masked, "nfe": nfe})):
            for name, value in values.items():
                kept.setdefault(name, []).append(value)
                self.held += value.numel() * value.element_size()
        self.seconds.append(time.perf_counter() - self.started)
        if self.held > _MOST_HELD:
            self._bring()

    def finish(self, z: Tensor) -> Trajectory:
        """``z [B, L]``: the canvas as it was returned (the end of a text may have been filled up after the last step)."""
        self._bring()
        final = z.to("cpu", torch.int32, copy=True)
        real, maskable = self.real.to("cpu", copy=True), self.maskable.to("cpu", copy=True)
        found = self._tables(maskable)
        steps, (batch, _) = len(self.seconds), maskable.shape
        if steps:
            found["tokens"][-1] = final
        standing = thought(found["tokens"], found["pred"], self.mask_id)
        agrees = ((standing == final) | ~maskable).all(2)
        early = torch.where(agrees, torch.arange(steps)[:, None], steps).amin(0) if steps else torch.zeros(batch)
        flops, layers = torch.full((batch,), torch.nan, dtype=torch.float64), 0
        if self.backbone is not None:
            layers = len(self.backbone.model.layers)
            lengths = real.sum(1).double()
            a_pass = FlopCounter(self.backbone, directions=2)(lengths, head=lengths)
            flops = a_pass * (found["nfe"][-1] if steps else 0)
        return Trajectory(
            **found,
            correct_early=early.to(torch.int32),
            flops=torch.as_tensor(flops),
            seconds=torch.tensor(self.seconds, dtype=torch.float64),
            maskable=maskable,
            real=real,
            mask_id=self.mask_id,
            layers=layers,
        )

    def _bring(self) -> None:
        """Put what is on the device together there, and bring each kind over as one."""
        if not self.steps:
            return
        found = {name: torch.stack(values) for name, values in self.steps.items()}
        found |= {name: torch.cat(values) for name, values in self.shown.items()}
        kinds = {"tokens": torch.int32, "nfe": torch.int32, "pred": torch.int32, "topk_ids": torch.int32,
                 "topk_logp": torch.float16}  # fmt: skip
        best, second, entropy = found.pop("values").unbind(1)
        top = best.exp()
        found["values"] = torch.stack([top, entropy, top - second.exp()]).to(torch.float16)
        self.brought.append({name: value.to("cpu", kinds.get(name, value.dtype)) for name, value in found.items()})
        self.steps, self.shown, self.held = {}, {}, 0

    def _tables(self, maskable: Tensor) -> dict[str, Tensor]:
        """What was recorded as fields of the trajectory, from the steps one after the other."""
        shape, steps = maskable.shape, len(self.seconds)
        if not steps:  # nothing was masked anywhere
            nothing, none = torch.zeros(0, *shape), torch.zeros(0, shape[0], dtype=torch.int32)
            found = {name: nothing.half() for name in ("confidence", "entropy", "margin")}
            found |= {name: nothing.to(torch.int32) for name in ("tokens", "pred")}
            left, got = nothing.bool(), {"nfe": none}
        else:
            got = {
                name: torch.cat([part[name] for part in self.brought], 1 if name == "values" else 0)
                for name in self.brought[0]
            }
            left, tokens = got["masked"], got["tokens"]
            step = torch.arange(steps).repeat_interleave(torch.tensor(self.counts))
            place = step, got["row"], got["column"]
            pred = tokens.clone()
            for k, part in enumerate(zip(*(got[n].split(self.counts) for n in ("row", "column", "pred")), strict=True)):
                if k:  # a position that no pass has predicted in this step is still predicted as it was
                    pred[k] = torch.where(left[k], pred[k - 1], tokens[k])
                pred[k, part[0], part[1]] = part[2]
            found = {"tokens": tokens, "pred": pred}
            empty = torch.full((steps, *shape), torch.nan, dtype=torch.float16)
            for name, value in zip(("confidence", "entropy", "margin"), got["values"], strict=True):
                found[name] = empty.index_put(place, value)
            for name, value in (("topk_ids", -1), ("topk_logp", torch.nan)) if self.full else ():
                table = torch.full((steps, *shape, got[name].shape[1]), value, dtype=got[name].dtype)
                found[name] = table.index_put_(place, got[name])
        before = torch.cat([maskable[None], left])[:-1] if steps else left
        reveals = torch.where(before & ~left, torch.arange(steps)[:, None, None], -1)
        return found | {
            "n_masked": left.sum(2).to(torch.int32),
            "nfe": got["nfe"],
            "revealed_at": torch.cat([torch.full((1, *shape), -1), reveals]).amax(0).to(torch.int16),
            "n_flips": (~before & left).sum(0).to(torch.int16),
        }
