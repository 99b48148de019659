r"""Random directed acyclic graphs with two roots, grown node by node, many graphs at once.

The construction is the one of ProsQA (arXiv 2412.06769, appendix). Nodes 0 and 1 are the roots. A node's *label* says
from which roots it can be reached: 1 = root 0, 2 = root 1, 3 = both, 0 = neither. Each further node

1. draws its number of parents from a Poisson law,
2. with probability 0.35 takes them among the nodes with labels 0 and 1, with 0.35 among 0 and 2, and otherwise among
all, 3. draws them without replacement with weight :math:`1.5 \cdot \text{depth} + 1`, so that deep nodes are
favoured, and 4. gets the union of its parents' labels, and the depth of the deepest parent plus one.

Choices use integers only. Shapes: ``n`` graphs, ``N`` nodes; ``edges[b, u, v]`` is true where u points to v, which
implies u < v.
"""

from dataclasses import dataclass
from decimal import Decimal, localcontext

import numpy as np
from numpy.typing import NDArray

from latentcot.tasks.counter import Draws, Integers, Words, mix64, scale_words

Bools = NDArray[np.bool_]

FAR = 10_000  # distance of what can not be reached
_GOLDEN = 0x9E3779B97F4A7C15
_MOST_PARENTS = 12
_REFINEMENTS = 6


@dataclass(frozen=True)
class Graphs:
    """``edges [n, N, N]``, ``labels [n, N]`` and ``distance [n, 2, N]``, the shortest distance from each root or
    ``FAR``."""

    edges: Bools
    labels: Integers
    distance: Integers


def poisson_steps(mean: float) -> Words:
    """Cumulative probabilities 0, 1, ... of a Poisson law as 64-bit thresholds, computed in decimal arithmetic so
    that every machine gets the same ones. Counts above 12 are taken as 12."""
    with localcontext() as context:
        context.prec = 50
        rate = Decimal(str(mean))
        term = (-rate).exp()
        total, steps = Decimal(0), []
        for k in range(_MOST_PARENTS):
            total += term
            term = term * rate / (k + 1)
            steps.append(int(total * 2**64))
    return np.minimum(np.array(steps, dtype=object), 2**64 - 1).astype(np.uint64)


def grow(draws: Draws, nodes: int, mean_parents: float) -> Graphs:
    """Grow ``len(draws)`` graphs of ``nodes`` nodes each."""
    n = len(draws)
    parents = np.searchsorted(poisson_steps(mean_parents), draws.words(nodes), side="right")
    among = draws.integers(nodes, 20)  # below 7: labels 0 and 1; below 14: labels 0 and 2; else all
    seeds = draws.words(nodes)
    edges = np.zeros((n, nodes, nodes), dtype=bool)
    labels = np.zeros((n, nodes), dtype=np.int64)
    labels[:, 0], labels[:, 1] = 1, 2
    depth = np.zeros((n, nodes), dtype=np.int64)
    distance = np.full((n, 2, nodes), FAR)
    distance[:, 0, 0] = distance[:, 1, 1] = 0
    for v in range(2, nodes):
        excluded = np.where(among[:, v] < 7, 2, np.where(among[:, v] < 14, 1, 4))
        # Weights are doubled to be whole numbers. Labels 2 and 3 are out when 1 is wanted, and the reverse.
        weights = (3 * depth[:, :v] + 2) * ((labels[:, :v] & excluded[:, None]) == 0)
        rows = np.flatnonzero(parents[:, v] > 0)
        for slot in range(1, _MOST_PARENTS + 1):
            rows = rows[parents[rows, v] >= slot]
            upto = weights[rows].cumsum(axis=1)
            some = upto[:, -1] > 0
            rows, upto = rows[some], upto[some]
            if not len(rows):
                break
            # One SplitMix64 sequence a node, seeded by the counter: few nodes have many parents.
            word = mix64(seeds[rows, v] + np.uint64((slot * _GOLDEN) & 0xFFFFFFFFFFFFFFFF))
            chosen = (upto > scale_words(word, upto[:, -1])[:, None]).argmax(axis=1)
            edges[rows, chosen, v] = True
            weights[rows, chosen] = 0
            labels[rows, v] |= labels[rows, chosen]
            depth[rows, v] = np.maximum(depth[rows, v], depth[rows, chosen] + 1)
            distance[rows, :, v] = np.minimum(distance[rows, :, v], distance[rows, :, chosen] + 1)
    return Graphs(edges, labels, np.minimum(distance, FAR))


def drop_parentless(graphs: Graphs) -> Graphs:
    """Take away, once, all nodes but the roots that no edge leads to, with their edges.

    Their children may then be without parents and stay. Labels and distances speak of the roots alone and hold.
    """
    dropped = ~graphs.edges.any(axis=1) & (np.arange(graphs.edges.shape[1]) >= 2)
    return Graphs(graphs.edges & ~dropped[:, :, None], graphs.labels, graphs.distance)


def pick(candidates: Bools, words: Words) -> tuple[Integers, Bools]:
    """A uniformly random candidate of each row: ``candidates``, ``words [n, N]`` -> its number, and if there is one."""
    keys = np.where(candidates, words | np.uint64(1), np.uint64(0))
    return keys.argmax(axis=1), np.asarray(candidates.any(axis=1))


def refinement_digest(edges: Bools, roles: Integers) -> Words:
    """A hash of each graph that does not depend on the numbering of its nodes: ``edges [n, N, N]``, ``roles [n, N]``
    -> ``[n]``.

    Colour refinement (Weisfeiler and Leman): a node's colour starts as its role and is replaced, six times, by a hash
    of itself and of the multisets of its parents' and children's colours; the digest is a hash of the multiset of
    colours of all nodes that have an edge. Graphs that are equal up to renaming always agree. Different graphs may
    agree when refinement can not tell them apart, which puts them into the same split and does no other harm.
    """
    used = edges.any(axis=1) | edges.any(axis=2)
    forward = edges.astype(np.uint64)
    backward = np.ascontiguousarray(forward.transpose(0, 2, 1))
    colours = mix64(roles.astype(np.uint64) + np.uint64(1))
    for _ in range(_REFINEMENTS):
        above = (backward @ mix64(colours + np.uint64(0x1B873593))[:, :, None])[:, :, 0]
        below = (forward @ mix64(colours + np.uint64(0xCC9E2D51))[:, :, None])[:, :, 0]
        colours = mix64(mix64(colours) + mix64(above ^ np.uint64(0x85EBCA6B)) + mix64(below ^ np.uint64(0xC2B2AE35)))
    return np.where(used, mix64(colours), np.uint64(0)).sum(axis=1, dtype=np.uint64)
