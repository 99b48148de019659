r"""Group word problems: multiply a sequence of group elements (arXiv 2404.08819, 2411.12537).

The product is read from left to right: :math:`p_i = g_1 g_2 \cdots g_i`. For permutations the left factor acts first,

.. math:: (g h)(x) = h(g(x)),

so in S3, written by images of 1, 2, 3, ``213 132 = 312`` and ``132 213 = 231``. In :math:`Z_m` the product is
addition modulo m. Answering needs a state that follows every element; S5 and A5 are not solvable, so no
constant-depth shortcut is known.

Layout (d = k elements)::

    prompt   <bos> g_1 ... g_k                  and <sep>s up to ``width`` places, where one is set
    steps    p_2 | p_3 | ... | p_k              one token each; none when k = 1
    answer   p_k                                form "final"
             p_1 p_2 ... p_k                    form "tag"

Input and output symbols are the same: one token an element.
"""

import itertools
import re
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from latentcot.reasoner import SPECIAL, TaskBatch, TaskLimits
from latentcot.tasks.base import Example, Latents, Rows, Task, TaskConfig, check_integer
from latentcot.tasks.counter import Draws, Integers, Words
from latentcot.tasks.vocabulary import Vocabulary

_LARGEST_CYCLE = 1024


@dataclass(frozen=True)
class Group:
    """A finite group: ``names`` of its elements, ``table[a, b]`` = number of the product ab (left factor first), and
    ``generators``, the elements drawn by ``generators_only``."""

    name: str
    names: tuple[str, ...]
    table: Integers
    generators: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.names)


def compose(g: tuple[int, ...], h: tuple[int, ...]) -> tuple[int, ...]:
    """Product of two permutations in one-line notation, the left one acting first: ``x -> h[g[x]]``."""
    return tuple(h[image] for image in g)


def is_even(g: tuple[int, ...]) -> bool:
    """Does the permutation have an even number of inversions?"""
    return sum(a > b for a, b in itertools.combinations(g, 2)) % 2 == 0


def make_group(name: str) -> Group:
    """``"S3" "S4" "S5"`` (symmetric), ``"A4" "A5"`` (alternating) or ``"Z<m>"`` (cyclic, 2 <= m <= 1024; ``"Z2"`` is
    parity).

    Generators are all transpositions for S_n, all 3-cycles for A_n, and ``+1, -1`` for Z_m. Raises ``ValueError``
    otherwise.
    """
    if match := re.fullmatch(r"Z([1-9]\d*)", str(name)):
        m = int(match[1])
        if not 2 <= m <= _LARGEST_CYCLE:
            raise ValueError(f"group: Z<m> takes m from 2 to {_LARGEST_CYCLE}, got {name!r}")
        numbers = np.arange(m)
        table = (numbers[:, None] + numbers) % m
        return Group(name, tuple(map(str, range(m))), table, tuple(sorted({1, m - 1})))
    if name not in ("S3", "S4", "S5", "A4", "A5"):
        raise ValueError(f"group: expected 'S3', 'S4', 'S5', 'A4', 'A5' or 'Z<m>' such as 'Z2' or 'Z60', got {name!r}")
    degree = int(name[1])
    elements = [g for g in itertools.permutations(range(degree)) if name[0] == "S" or is_even(g)]
    number = {g: i for i, g in enumerate(elements)}
    table = np.array([[number[compose(g, h)] for h in elements] for g in elements])
    moved = 2 if name[0] == "S" else 3
    generators = tuple(number[g] for g in elements if sum(x != image for x, image in enumerate(g)) == moved)
    return Group(name, tuple("".join(str(x + 1) for x in g) for g in elements), table, generators)


@dataclass(frozen=True, kw_only=True)
class GroupConfig(TaskConfig):
    """Options of :class:`GroupTask`; the difficulty is the number of elements.

    Args:
        group: see :func:`make_group`.
        form: ``"final"`` asks for the whole product, ``"tag"`` for the running product at every position.
        generators_only: draw generators instead of all elements.
        width: places of a prompt: shorter sequences are filled with ``<sep>`` behind their elements, longer ones stay as they
            are. With it, element i and running product i stand equally far apart whatever the length, which is far easier to
            learn; 0 = no filling.
    """

    group: str = "S3"
    form: Literal["final", "tag"] = "final"
    min_difficulty: int = 2
    max_difficulty: int = 9
    generators_only: bool = False
    width: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.form not in ("final", "tag"):
            raise ValueError(f"form: expected 'final' or 'tag', got {self.form!r}")
        if not isinstance(self.generators_only, bool):
            raise TypeError(f"generators_only: expected True or False, got {self.generators_only!r}")
        if self.generators_only and len(make_group(self.group).generators) < 2:
            raise ValueError(f"generators_only: {self.group} has one generator, so all sequences would be the same")
        make_group(self.group)
        check_integer("width", self.width, 0, 4096)


class GroupTask(Task):
    """Word problems of one finite group; see the module for the layout."""

    name = "group"
    config_type = GroupConfig
    layout_options = ("width",)
    config: GroupConfig

    @property
    def domain(self) -> str:
        return f"group/{self.config.group}"

    def _make_vocabulary(self) -> Vocabulary:
        self.group = make_group(self.config.group)
        drawn = self.group.generators if self.config.generators_only else range(len(self.group))
        self._drawn = np.array(drawn, dtype=np.int64)
        return Vocabulary(self.group.names)

    def _make_limits(self) -> TaskLimits:
        longest = self.config.max_difficulty
        return TaskLimits(
            vocab_size=len(self.vocabulary),
            prompt_tokens=1 + max(longest, self.config.width),
            steps=longest - 1,
            step_tokens=1,
            answer_tokens=1 if self.config.form == "final" else longest,
        )

    def _draw(self, draws: Draws, lowest: int, highest: int) -> Latents:
        length = lowest + draws.integers(1, highest - lowest + 1)[:, 0]
        picked = draws.integers(self.config.max_difficulty, len(self._drawn))
        return {"difficulty": length, "elements": self._drawn[picked]}

    def _canonical_words(self, latents: Latents) -> tuple[Words, Integers]:
        return latents["elements"].astype(np.uint64), latents["difficulty"]

    def _write(self, latents: Latents) -> Rows:
        elements, length = latents["elements"], latents["difficulty"]
        n, longest = elements.shape
        products = np.empty_like(elements)
        products[:, 0] = elements[:, 0]
        for i in range(1, longest):
            products[:, i] = self.group.table[products[:, i - 1], elements[:, i]]
        absent = np.arange(longest) >= length[:, None]
        symbols = np.where(absent, -1, elements + SPECIAL.count)
        labels = np.where(absent, -1, products + SPECIAL.count)
        final = labels[np.arange(n), length - 1][:, None]
        places = np.full((n, 1 + max(longest, self.config.width)), -1)
        places[:, 0] = SPECIAL.bos
        places[:, 1 : 1 + longest] = symbols
        filled = places[:, 1 : 1 + self.config.width]
        filled[filled < 0] = SPECIAL.sep
        return Rows(
            prompt=places,
            steps=labels[:, 1:, None],
            answer=final if self.config.form == "final" else labels,
        )

    def _elements(self, example: Example) -> list[str]:
        return list(self.vocabulary.decode(t for t in example.prompt_ids if t >= SPECIAL.count))

    def oracle(self, example: Example) -> tuple[int, ...]:
        """Follow each point through the permutations (or add the numbers), from the symbols' names and no table."""
        names = self._elements(example)
        prefixes = range(1, len(names) + 1) if self.config.form == "tag" else (len(names),)
        return self.vocabulary.encode(self._product_by_name(names[:k]) for k in prefixes)

    def _product_by_name(self, names: list[str]) -> str:
        if self.config.group.startswith("Z"):
            return str(sum(map(int, names)) % len(self.group))
        images = []
        for point in range(1, len(names[0]) + 1):
            for name in names:
                point = int(name[point - 1])
            images.append(str(point))
        return "".join(images)

    def canonical(self, example: Example) -> tuple[int, ...]:
        """The sequence of element numbers."""
        return tuple(token - SPECIAL.count for token in example.prompt_ids if token >= SPECIAL.count)

    def chance(self, batch: TaskBatch) -> Tensor:
        return torch.full((len(batch),), 1.0 / len(self.group), dtype=torch.float64) ** batch.answer_mask.sum(1)

    def guesses(self, batch: TaskBatch) -> dict[str, Tensor]:
        """``last_element`` as if it were the product, and ``last_two``, the product of the last two elements alone."""
        ids = batch.prompts.ids[:, 1:]
        mask = ids >= SPECIAL.count
        elements = (ids - SPECIAL.count).clamp(min=0)
        table = torch.from_numpy(self.group.table)
        last_two = elements.clone()
        last_two[:, 1:] = table[elements[:, :-1], elements[:, 1:]]
        out = {}
        for name, labels in (("last_element", elements), ("last_two", last_two)):
            labels = labels + SPECIAL.count
            if self.config.form == "final":
                out[name] = labels.gather(1, mask.sum(1, keepdim=True) - 1)
            else:
                out[name] = labels.masked_fill(~mask, SPECIAL.pad)
        return out
