r"""A pretrained decoder made recurrent: :func:`retrofit`.

Its blocks are cut into prelude, core and coda, the blocks between prelude and core are dropped, and an adapter joins state and
input. Blocks, norms, rotary layout, grouped heads, embedding scale and head stay its own. Training goes on from there, with a mean
number of recurrences that rises from 1 (arXiv:2511.07384; optimiser of the source: Muon at 1e-3 for matrices, Adam at 5e-5 for the
rest, 50 000 steps).
"""

import copy
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from latentcot.backbone import HybridConfig, HybridForCausalLM
from latentcot.recurrent_depth.depth_recurrence import DepthRecurrence
from latentcot.recurrent_depth.settings import check_count


@dataclass(frozen=True)
class Cut:
    """Which blocks of a decoder go where, each a range of whole numbers, in order and apart from one another."""

    prelude: tuple[int, ...]
    core: tuple[int, ...]
    coda: tuple[int, ...]

    def __post_init__(self) -> None:
        for name in ("prelude", "core", "coda"):
            for number in getattr(self, name):
                check_count(f"cut: {name}", number)
        order = self.blocks
        if not self.core or any(b <= a for a, b in itertools.pairwise(order)):
            raise ValueError(
                f"cut: blocks {list(order)} given, expected a core, and numbers that rise from part to part"
            )

    @property
    def blocks(self) -> tuple[int, ...]:
        return (*self.prelude, *self.core, *self.coda)

    @classmethod
    def of_sizes(cls, blocks: int, prelude: int, core: int, coda: int) -> "Cut":
        """The first blocks, the last ones, and before these the core: what is dropped lies right behind the prelude.
        22 blocks as (4, 8, 4) give 0–3, 10–17, 18–21, the published cut of TinyLlama-1.1B; the 16 blocks of
        Llama-3.2-1B and OLMo-2-1B are cut as (4, 6, 4) there, of which only the sizes are published."""
        if prelude + core + coda > blocks:
            raise ValueError(f"cut: {prelude} + {core} + {coda} given, but the model has {blocks} blocks")
        middle = blocks - coda - core
        return cls(tuple(range(prelude)), tuple(range(middle, middle + core)), tuple(range(middle + core, blocks)))


def retrofit(
    model: HybridForCausalLM,
    cut: Cut | Sequence[int],
    mean_recurrences: int = 32,
    settings: Mapping[str, Any] | None = None,
) -> DepthRecurrence:
    """A new recurrent model from the blocks of ``model``, which stays as it is.

    Args:
        model: the pretrained decoder.
        cut: a :class:`Cut`, or sizes (prelude, core, coda) for :meth:`Cut.of_sizes`.
        mean_recurrences: the mean that the curriculum rises to, linearly over the first 75 % of training.
        settings: of :class:`~latentcot.recurrent_depth.DepthRecurrence`, before those above.

    Raises:
        ValueError: a cut that does not fit, or mixers whose gates have lower bounds that depend on all blocks.
    """
    config = model.config
    if not isinstance(cut, Cut):
        if len(sizes := tuple(cut)) != 3:
            raise ValueError(f"cut: {list(sizes)} given, expected the sizes of prelude, core and coda")
        cut = Cut.of_sizes(config.num_hidden_layers, *sizes)
    if cut.blocks[-1] >= config.num_hidden_layers:
        raise ValueError(f"cut: block {cut.blocks[-1]} given, but the model has {config.num_hidden_layers} blocks")
    if model.model.lower_bounds is not None:
        raise ValueError(
            "model: its gates have lower bounds that are summed over all blocks; a cut would change what blocks compute"
        )
    values = config.to_dict()
    values |= {"num_hidden_layers": len(cut.blocks), "mixers": [config.mixers[b] for b in cut.blocks]}
    values |= {"period": None, "linear_per_full": None, "attention_layers": None}
    small = HybridForCausalLM(HybridConfig.from_dict(values)).to(dtype=model.dtype, device=model.device)
    with torch.no_grad():
        number = {old: new for new, old in enumerate(cut.blocks)}
        tensors = {}
        for name, tensor in model.state_dict().items():
            head, _, rest = name.removeprefix("model.layers.").partition(".")
            if not name.startswith("model.layers."):
                tensors[name] = tensor
            elif int(head) in number:
                tensors[f"model.layers.{number[int(head)]}.{rest}"] = tensor
        small.load_state_dict(tensors)
    parts = {"prelude": len(cut.prelude), "core": len(cut.core), "coda": len(cut.coda)}
    sampler = {"mean": mean_recurrences, "ramp": "linear", "ramp_share": 0.75}
    made = DepthRecurrence(small, {"sampler": sampler, **copy.deepcopy(dict(settings or {})), **parts})
    return made.to(dtype=model.dtype, device=model.device)
