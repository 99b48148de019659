r"""ProsQA in symbols: which of two nodes can be reached from a root (arXiv 2412.06769; in symbols: 2505.12514).

A graph is grown as :mod:`latentcot.tasks.dag` says. Both options are leaves; the target can be reached from the asked
root only, the distractor from the other root only. The difficulty d is the length of the shortest path to the target.

========================  =============================================================================================
``prosqa``                29 nodes grown; nodes that no edge leads to are dropped once, roots aside; a coin chooses the
                          asked root, the target is the farthest leaf that it alone reaches, and the distractor is any
                          leaf that the other root alone reaches
``prosqa_paper``          the published pseudo-code read literally: 23 nodes grown, none dropped; options as above
``prosqa_balanced``       grown as ``prosqa``; a leaf of each root alone, both equally far from their root (the largest
                          distance for which there are such leaves), and a coin decides which root is asked: swapping
                          target and distractor gives an example of the same probability, so nothing but the way from
                          the asked root tells them apart
========================  =============================================================================================

The released data always ask for the farthest leaf, and so do the first two: "the option deeper in the graph" scores
well above chance there. Read their results beside the ``heuristic`` baseline, or use the balanced twin.

Layout::

    prompt   <bos> a b ; c d ; ... ? root A B      one "parent child ;" an edge; order of edges and of A, B at random
    steps    v1 | v2 | ... | target                nodes of one shortest path after the root: one token an edge, d steps
    answer   target

Node names are a random subset of twice as many names as nodes are grown. Two prompts are the same problem when graph,
asked root and pair of options agree up to renaming.
"""

from collections import Counter, deque
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from latentcot.reasoner import SPECIAL, TaskBatch, TaskLimits
from latentcot.tasks.base import Example, Latents, Rows, Split, Task, TaskConfig, check_integer, left_align
from latentcot.tasks.counter import Draws, Integers, Words
from latentcot.tasks.dag import Graphs, drop_parentless, grow, pick, refinement_digest
from latentcot.tasks.vocabulary import Vocabulary

Edge = tuple[int, int]

_ROOT_ROLE, _OPTION_ROLE = 1, 2


@dataclass(frozen=True, kw_only=True)
class ProsQAConfig(TaskConfig):
    """Options of :class:`ProsQATask`; the difficulty is the length of the path asked for.

    Args:
        nodes: nodes grown, roots included; 8 to 64. There are twice as many names, and graphs with more than twice as
        many
            edges are drawn again.
        mean_parents: mean of the Poisson law of the number of parents.
    """

    min_difficulty: int = 3
    max_difficulty: int = 6
    nodes: int = 29
    mean_parents: float = 1.5

    def __post_init__(self) -> None:
        super().__post_init__()
        check_integer("nodes", self.nodes, 8, 64)
        check_integer("max_difficulty", self.max_difficulty, self.min_difficulty, self.nodes - 2)
        if isinstance(self.mean_parents, bool) or not isinstance(self.mean_parents, int | float):
            raise TypeError(f"mean_parents: expected a number, got {self.mean_parents!r}")
        if not 0.1 <= self.mean_parents <= 4:
            raise ValueError(f"mean_parents: expected a number from 0.1 to 4, got {self.mean_parents!r}")


@dataclass(frozen=True, kw_only=True)
class ProsQAPaperConfig(ProsQAConfig):
    """:class:`ProsQAConfig` with the 23 nodes of the published construction."""

    nodes: int = 23


@dataclass(frozen=True, kw_only=True)
class ProsQABalancedConfig(ProsQAConfig):
    """:class:`ProsQAConfig` for matched options: two equally long ways of 6 edges are too rare to be drawn."""

    max_difficulty: int = 5


class ProsQATask(Task):
    """Symbolic ProsQA; see the module for the rules and the layout."""

    name = "prosqa"
    config_type = ProsQAConfig
    config: ProsQAConfig
    draws_per_attempt: ClassVar[int] = 64  # a graph has a path length of its own; long ones are rare
    draws_together: ClassVar[int] = 3
    drops_parentless: ClassVar[bool] = True

    @property
    def domain(self) -> str:
        return "prosqa"

    def _make_vocabulary(self) -> Vocabulary:
        self._end, self._ask = SPECIAL.count + 2 * self.config.nodes, SPECIAL.count + 2 * self.config.nodes + 1
        return Vocabulary((*map(str, range(2 * self.config.nodes)), ";", "?"))

    def _make_limits(self) -> TaskLimits:
        return TaskLimits(
            vocab_size=len(self.vocabulary),
            prompt_tokens=1 + 3 * self._most_edges + 4,
            steps=self.config.max_difficulty,
            step_tokens=1,
            answer_tokens=1,
        )

    @property
    def _most_edges(self) -> int:
        return 2 * self.config.nodes

    def _question(
        self, graphs: Graphs, leaves: np.ndarray, draws: Draws, lowest: int, highest: int
    ) -> tuple[Integers, Integers, Integers, np.ndarray]:
        """(asked root 0 or 1, target, distractor, whether there is such a question), each ``[n]``.

        ``leaves [n, 2, N]``: leaves that root 0 alone, and root 1 alone, reaches.
        """
        n, _, nodes = leaves.shape
        rows = np.arange(n)
        asked = draws.integers(1, 2)[:, 0]
        distance = np.where(leaves[rows, asked], graphs.distance[rows, asked], -1)
        farthest = distance.max(axis=1)
        target, _ = pick(distance == farthest[:, None], draws.words(nodes))
        distractor, other = pick(leaves[rows, 1 - asked], draws.words(nodes))
        return asked, target, distractor, other & (farthest >= lowest) & (farthest <= highest)

    def _draw(self, draws: Draws, lowest: int, highest: int) -> Latents:
        n, nodes = len(draws), self.config.nodes
        rows = np.arange(n)
        graphs = grow(draws, nodes, self.config.mean_parents)
        if self.drops_parentless:
            graphs = drop_parentless(graphs)
        leaf = ~graphs.edges.any(axis=2)
        leaves = np.stack([leaf & (graphs.labels == label) for label in (1, 2)], axis=1)
        leaves[:, :, :2] = False  # a root that leads nowhere is no option
        asked, target, distractor, valid = self._question(graphs, leaves, draws, lowest, highest)
        valid &= graphs.edges.sum(axis=(1, 2)) <= self._most_edges

        length = graphs.distance[rows, asked, target]
        path = np.full((n, self.config.max_difficulty), -1)
        place, here = np.where(valid, length, 0), target
        ties = draws.words(nodes)
        while (place > 0).any():
            active = np.flatnonzero(place > 0)
            path[active, place[active] - 1] = here[active]
            nearer = graphs.distance[active, asked[active]] == (place[active] - 1)[:, None]
            before, _ = pick(graphs.edges[active, :, here[active]] & nearer, ties[active])
            here = here.copy()
            here[active] = before
            place[active] -= 1
        return {
            "difficulty": length,
            "valid": valid,
            "edges": graphs.edges,
            "asked": asked,
            "target": target,
            "distractor": distractor,
            "path": path,
            "shuffle": draws.words(self._most_edges),
            "names": draws.permutation(2 * nodes)[:, :nodes],
            "target_first": draws.integers(1, 2)[:, 0],
        }

    def _canonical_words(self, latents: Latents) -> tuple[Words, Integers]:
        edges = latents["edges"]
        rows = np.arange(len(edges))
        roles = np.zeros(edges.shape[:2], dtype=np.int64)
        roles[rows, latents["asked"]] = _ROOT_ROLE
        roles[rows, latents["target"]] = roles[rows, latents["distractor"]] = _OPTION_ROLE
        return _canonical(edges, roles)

    def _write(self, latents: Latents) -> Rows:
        edges, names = latents["edges"], SPECIAL.count + latents["names"]
        n = len(edges)
        rows = np.arange(n)
        # Edges of all graphs in row order, each at its number within its graph, then shuffled.
        graph, parent, child = np.nonzero(edges)
        count = np.bincount(graph, minlength=n)
        number = np.arange(len(graph)) - np.repeat(np.cumsum(count) - count, count)
        triples = np.full((n, self._most_edges, 3), -1)
        triples[graph, number] = np.stack(
            (names[graph, parent], names[graph, child], np.full(len(graph), self._end)), 1
        )
        order = np.argsort(latents["shuffle"], axis=1, kind="stable")
        triples = np.take_along_axis(triples, order[:, :, None], axis=1)

        target, distractor = names[rows, latents["target"]], names[rows, latents["distractor"]]
        first = latents["target_first"].astype(bool)
        question = np.stack(
            (
                np.full(n, self._ask),
                names[rows, latents["asked"]],
                np.where(first, target, distractor),
                np.where(first, distractor, target),
            ),
            axis=1,
        )
        prompt = np.concatenate((np.full((n, 1), SPECIAL.bos), triples.reshape(n, -1), question), axis=1)
        path = latents["path"]
        steps = np.where(path >= 0, np.take_along_axis(names, np.maximum(path, 0), axis=1), -1)
        return Rows(prompt=left_align(prompt), steps=steps[:, :, None], answer=target[:, None])

    # -- reading prompts ---------------------------------------------------------------------------------------

    def read_prompt(self, prompt_ids: tuple[int, ...] | list[int]) -> tuple[list[Edge], int, Edge]:
        """(edges, asked root, options) of a prompt, as token ids."""
        *triples, question, root, first, second = prompt_ids[1:]
        if question != self._ask or len(triples) % 3 or any(t != self._end for t in triples[2::3]):
            raise ValueError(f"prompt_ids: not a prompt of {self.name}: {self.vocabulary.render(prompt_ids)[:80]!r}")
        return list(zip(triples[::3], triples[1::3], strict=True)), root, (first, second)

    def oracle(self, example: Example) -> tuple[int, ...]:
        """The option that breadth-first search from the asked root meets."""
        edges, root, options = self.read_prompt(example.prompt_ids)
        distances = distances_from(edges, root)
        return tuple(option for option in options if option in distances)

    def canonical(self, example: Example) -> tuple[int, ...]:
        """(refinement digest, nodes, edges) of graph, asked root and options."""
        edges, root, options = self.read_prompt(example.prompt_ids)
        place = {node: i for i, node in enumerate(sorted({node for edge in edges for node in edge}))}
        matrix = np.zeros((1, len(place), len(place)), dtype=bool)
        for parent, child in edges:
            matrix[0, place[parent], place[child]] = True
        roles = np.zeros((1, len(place)), dtype=np.int64)
        roles[0, place[root]] = _ROOT_ROLE
        roles[0, [place[option] for option in options]] = _OPTION_ROLE
        words, _ = _canonical(matrix, roles)
        return tuple(words[0].tolist())

    # -- baselines ---------------------------------------------------------------------------------------------

    def chance(self, batch: TaskBatch) -> Tensor:
        return torch.full((len(batch),), 0.5, dtype=torch.float64)

    def majority(self, seen: TaskBatch, batch: TaskBatch) -> Tensor:
        """The option at the place where the right one stands more often in ``seen``."""
        right_first = (self._options(seen)[:, :1] == seen.answer_ids[:, :1]).double().mean() >= 0.5
        return self._options(batch)[:, :1] if right_first else self._options(batch)[:, 1:]

    def _options(self, batch: TaskBatch) -> Tensor:
        length = batch.prompts.mask.sum(1, keepdim=True)
        return batch.prompts.ids.gather(1, torch.cat((length - 2, length - 1), dim=1))

    def guesses(self, batch: TaskBatch) -> dict[str, Tensor]:
        """Options chosen without looking at the asked root: the one at greater depth (longest way from any source),
        farther from its nearest source, with more ancestors, with more parents; and the first one listed. Ties: the
        first."""
        columns: dict[str, list[int]] = {name: [] for name in ("deeper", "farther", "more_ancestors", "more_parents")}
        for ids, mask in zip(batch.prompts.ids.tolist(), batch.prompts.mask.tolist(), strict=True):
            edges, _, options = self.read_prompt(ids[: sum(mask)])
            for name, scores in option_scores(edges, options).items():
                columns[name].append(options[0] if scores[0] >= scores[1] else options[1])
        first = {"first_option": self._options(batch)[:, :1]}
        return first | {name: torch.tensor(column)[:, None] for name, column in columns.items()}


class ProsQAPaperTask(ProsQATask):
    """The published construction read literally: 23 nodes are grown and none is dropped."""

    name = "prosqa_paper"
    config_type = ProsQAPaperConfig
    drops_parentless = False


class ProsQABalancedTask(ProsQATask):
    """Target and distractor matched in distance, out-degree and place; see the module."""

    name = "prosqa_balanced"
    config_type = ProsQABalancedConfig

    def _question(
        self, graphs: Graphs, leaves: np.ndarray, draws: Draws, lowest: int, highest: int
    ) -> tuple[Integers, Integers, Integers, np.ndarray]:
        nodes = leaves.shape[2]
        levels = np.arange(lowest, highest + 1)
        # at[b, r, l, v]: v is a leaf of root r alone at distance levels[l] from it
        at = leaves[:, :, None, :] & (graphs.distance[:, :, None, :] == levels[:, None])
        both = at.any(axis=3).all(axis=1)
        level = np.where(both, levels, -1).max(axis=1)
        here = leaves & (graphs.distance == level[:, None, None])
        pair = [pick(here[:, root], draws.words(nodes))[0] for root in (0, 1)]
        asked = draws.integers(1, 2)[:, 0]
        target, distractor = np.where(asked == 0, pair[0], pair[1]), np.where(asked == 0, pair[1], pair[0])
        return asked, target, distractor, level > 0


def _canonical(edges: np.ndarray, roles: Integers) -> tuple[Words, Integers]:
    used = edges.any(axis=1) | edges.any(axis=2)
    parts = (refinement_digest(edges, roles), used.sum(axis=1), edges.sum(axis=(1, 2)))
    words = np.stack([np.asarray(part).astype(np.uint64) for part in parts], axis=1)
    return words, np.full(len(edges), 3)


def distances_from(edges: list[Edge], root: int) -> dict[int, int]:
    """Breadth-first distances of everything that can be reached from ``root``."""
    children: dict[int, list[int]] = {}
    for parent, child in edges:
        children.setdefault(parent, []).append(child)
    distances, queue = {root: 0}, deque([root])
    while queue:
        node = queue.popleft()
        for child in children.get(node, ()):
            if child not in distances:
                distances[child] = distances[node] + 1
                queue.append(child)
    return distances


def option_scores(edges: list[Edge], options: tuple[int, int]) -> dict[str, tuple[int, int]]:
    """What the shortcuts of :meth:`ProsQATask.guesses` compare, for both options."""
    parents: dict[int, list[int]] = {}
    for parent, child in edges:
        parents.setdefault(child, []).append(parent)
    depth: dict[int, int] = {}

    def deepest(node: int) -> int:
        if node not in depth:
            depth[node] = 1 + max((deepest(p) for p in parents[node]), default=-1) if node in parents else 0
        return depth[node]

    backwards = [(child, parent) for parent, child in edges]
    reach = [distances_from(backwards, option) for option in options]
    near = [min(d for node, d in distances.items() if node not in parents) for distances in reach]
    return {
        "deeper": (deepest(options[0]), deepest(options[1])),
        "farther": (near[0], near[1]),
        "more_ancestors": (len(reach[0]), len(reach[1])),
        "more_parents": (len(parents[options[0]]), len(parents[options[1]])),
    }


def statistics(task: ProsQATask, split: Split = "train", n: int = 1000) -> dict[str, object]:
    """Figures of ``n`` examples, for comparison with the released data: means and standard deviations of nodes and
    edges, and distributions of path length, sources, in-degree, and shortest paths an item."""
    nodes, edge_counts, shortest, target_distance, other_distance = [], [], [], [], []
    lengths, sources, in_degrees = Counter[int](), Counter[int](), Counter[int]()
    for example in task.iterate(split, 0, n):
        edges, root, options = task.read_prompt(example.prompt_ids)
        named = {node for edge in edges for node in edge}
        degrees = Counter(child for _, child in edges)
        nodes.append(len(named))
        edge_counts.append(len(edges))
        sources[sum(degrees[node] == 0 for node in named)] += 1
        in_degrees.update(degrees[node] for node in named)
        lengths[len(example.steps)] += 1
        distances = distances_from(edges, root)
        ways = {root: 1}
        for node in sorted(distances, key=lambda v: distances[v]):
            for parent, child in edges:
                if parent == node and distances[child] == distances[node] + 1:
                    ways[child] = ways.get(child, 0) + ways[node]
        (target,) = example.answer_ids
        shortest.append(ways[target])
        target_distance.append(distances[target])
        (distractor,) = set(options) - {target}
        backwards = distances_from([(child, parent) for parent, child in edges], distractor)
        other_distance.append(min(d for node, d in backwards.items() if degrees[node] == 0))

    def share(counter: Counter[int]) -> dict[int, float]:
        return {key: counter[key] / counter.total() for key in sorted(counter)}

    return {
        "nodes": (float(np.mean(nodes)), float(np.std(nodes))),
        "edges": (float(np.mean(edge_counts)), float(np.std(edge_counts))),
        "path_length": share(lengths),
        "mean_path_length": float(np.mean(target_distance)),
        "distractor_to_nearest_source": float(np.mean(other_distance)),
        "shortest_paths": float(np.mean(shortest)),
        "sources": share(sources),
        "in_degree": share(in_degrees),
    }
