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
_VALUES = ("confidence", "entropy", "margin")
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
        shown = {"row": rows, "column": columns, "pred": best.indices, "best": best.values}
        if self.full:
            table = logp.topk(min(FULL_K, logp.shape[-1]), -1)
            shown |= {"topk_ids": table.indices, "topk_logp": table.values}
        p = logp.exp()
        shown["information"] = torch.linalg.vecdot(p, logp.clamp_(min=_NEVER))
        shown["second"] = p.scatter_(1, best.indices[:, None], 0.0).amax(-1)
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
        # behind the last step, so that each kind is brought over as one
        for name, values in (("tokens", [z]), ("masked", [self.maskable, self.real])):
            self.steps[name] = [*self.steps.get(name, []), *values]
        self._bring()
        masks, tokens = (torch.cat([part[name] for part in self.brought]) for name in ("masked", "tokens"))
        maskable, real, final = masks[-2].clone(), masks[-1].clone(), tokens[-1]
        found = self._tables(tokens[:-1].clone(), masks[:-2], maskable)
        steps, batch = len(self.seconds), len(final)
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
        found = {name: torch.stack(values) for name, values in self.steps.items()}
        if self.shown:
            shown = {name: torch.cat(values) for name, values in self.shown.items()}
            found["place"] = torch.stack([shown[name] for name in ("row", "column", "pred")]).to(torch.int32)
            top = shown["best"].exp()
            found["value"] = torch.stack([top, -shown["information"], top - shown["second"]]).to(torch.float16)
            if self.full:
                found["topk_ids"] = shown["topk_ids"].to(torch.int32)
                found["topk_logp"] = shown["topk_logp"].to(torch.float16)
        for name in {"tokens", "nfe"} & found.keys():
            found[name] = found[name].to(torch.int32)
        self.brought.append({name: value.cpu() for name, value in found.items()})
        self.steps, self.shown, self.held = {}, {}, 0

    def _tables(self, tokens: Tensor, left: Tensor, maskable: Tensor) -> dict[str, Tensor]:
        """What was recorded as fields of the trajectory, with the ``tokens`` and the masks ``left`` by every step, both
        ``[k, B, L]``."""
        steps, batch, length = shape = tokens.shape
        got = {
            "place": torch.zeros(3, 0, dtype=torch.int32),
            "value": torch.zeros(3, 0, dtype=torch.float16),
            "nfe": torch.zeros(0, batch, dtype=torch.int32),
        }
        parts = [part for part in self.brought if "place" in part]
        for name in parts[0].keys() - {"tokens", "masked"} if parts else ():
            got[name] = torch.cat([part[name] for part in parts], 1 if name in ("place", "value") else 0)
        row, column, best = got["place"]
        step = torch.arange(steps).repeat_interleave(torch.tensor(self.counts, dtype=torch.long))
        at = (step * batch + row) * length + column

        def table(values: Tensor, nothing: float) -> Tensor:
            empty = torch.full((steps * batch * length, *values.shape[1:]), nothing, dtype=values.dtype)
            return empty.index_copy_(0, at, values).view(*shape, *values.shape[1:])

        likeliest = table(best, -1)
        predicted = likeliest >= 0
        pred = torch.where(predicted, likeliest, tokens)
        earlier = left & ~predicted  # a position that no pass has predicted in a step is still predicted as it was
        for k in range(1, steps) if bool(earlier[1:].any()) else ():
            pred[k] = torch.where(earlier[k], pred[k - 1], pred[k])
        found = {name: table(values, torch.nan) for name, values in zip(_VALUES, got["value"], strict=True)}
        if "topk_ids" in got:
            found |= {"topk_ids": table(got["topk_ids"], -1), "topk_logp": table(got["topk_logp"], torch.nan)}
        before = torch.cat([maskable[None], left])[:-1] if steps else left
        number = torch.arange(steps)[:, None, None]
        reveals = torch.cat([torch.where(before & ~left, number, -1), torch.full((1, batch, length), -1)])
        return found | {
            "tokens": tokens,
            "pred": pred,
            "n_masked": left.sum(2).to(torch.int32),
            "nfe": got["nfe"],
            "revealed_at": reveals.amax(0).to(torch.int16),
            "n_flips": (~before & left).sum(0).to(torch.int16),
        }
