"""Symbolic ProsQA: reachability, shortest paths, sizes, shortcuts and the split's canonical form."""

import itertools

import numpy as np
import pytest
import torch

from latentcot.reasoner import SPECIAL
from latentcot.tasks import Example, make_task
from latentcot.tasks.counter import Draws
from latentcot.tasks.dag import FAR, grow, pick, poisson_steps, refinement_digest
from latentcot.tasks.prosqa import ProsQATask, distances_from, statistics

NAMES = ("prosqa", "prosqa_paper", "prosqa_balanced")


def make(name: str, **options) -> ProsQATask:
    task = make_task(name, **options)
    assert isinstance(task, ProsQATask)
    return task


@pytest.mark.parametrize("name", NAMES)
def test_only_the_target_can_be_reached_and_steps_are_a_shortest_path(name):
    task = make(name)
    for example in task.iterate("train", 0, 300):
        edges, root, options = task.read_prompt(example.prompt_ids)
        assert len(set(edges)) == len(edges)
        distances = distances_from(edges, root)
        (target,) = example.answer_ids
        (distractor,) = set(options) - {target}
        assert distractor not in distances
        assert distances[target] == len(example.steps) == example.meta["difficulty"]
        path = [root, *(step for (step,) in example.steps)]
        assert path[-1] == target
        assert all(edge in edges for edge in itertools.pairwise(path))
        assert not [edge for edge in edges if edge[0] in options], "options are leaves"


@pytest.mark.parametrize("name", NAMES)
def test_each_option_belongs_to_one_root_alone(name):
    task = make(name)
    objects = task._objects("train", np.arange(200), None)
    for row in range(200):
        edges = list(zip(*(axis.tolist() for axis in np.nonzero(objects["edges"][row])), strict=True))
        asked = int(objects["asked"][row])
        reached, other = distances_from(edges, asked), distances_from(edges, 1 - asked)
        target, distractor = int(objects["target"][row]), int(objects["distractor"][row])
        assert target in reached
        assert target not in other
        assert distractor in other
        assert distractor not in reached
        if name == "prosqa_balanced":
            assert reached[target] == other[distractor]
        else:
            leaves = {v for v in reached if not any(u == v for u, _ in edges)} - other.keys() - {asked}
            assert reached[target] == max(reached[leaf] for leaf in leaves)


def test_growth_labels_and_distances_are_those_of_the_edges():
    graphs = grow(Draws(3, np.arange(50), np.zeros(50, dtype=np.int64)), 20, 1.5)
    for edges, labels, distance in zip(graphs.edges, graphs.labels, graphs.distance, strict=True):
        pairs = list(zip(*(axis.tolist() for axis in np.nonzero(edges)), strict=True))
        assert all(parent < child for parent, child in pairs)
        assert not edges[:, :2].any()
        from_roots = [distances_from(pairs, root) for root in (0, 1)]
        for node in range(20):
            assert labels[node] == (node in from_roots[0]) + 2 * (node in from_roots[1])
            assert distance[:, node].tolist() == [reached.get(node, FAR) for reached in from_roots]


def test_number_of_parents_follows_the_poisson_law():
    graphs = grow(Draws(4, np.arange(3000), np.zeros(3000, dtype=np.int64)), 30, 1.5)
    # Late nodes have enough candidates for any number of parents.
    counts = np.bincount(graphs.edges[:, :, 20:].sum(axis=1).ravel(), minlength=8) / 30000
    law = [np.exp(-1.5) * 1.5**k / np.prod(np.arange(1, k + 1)) for k in range(6)]
    assert np.abs(counts[:6] - law).max() < 0.01
    steps = poisson_steps(1.5).astype(np.float64) / 2**64
    assert np.allclose(steps[:6], np.cumsum(law), rtol=0, atol=1e-12)


def test_pick_is_uniform_among_candidates():
    candidates = np.tile(np.array([False, True, False, True, True]), (9000, 1))
    words = Draws(5, np.arange(9000), np.zeros(9000, dtype=np.int64)).words(5)
    chosen, found = pick(candidates, words)
    assert found.all()
    assert (np.abs(np.bincount(chosen, minlength=5) - [0, 3000, 0, 3000, 3000]) < 250).all()
    assert not pick(np.zeros((1, 3), dtype=bool), words[:1, :3])[1].any()


def test_prosqa_has_the_stated_sizes():
    found = statistics(make("prosqa"), "train", 3000)
    nodes, edges, lengths, sources = found["nodes"], found["edges"], found["path_length"], found["sources"]
    assert isinstance(nodes, tuple)
    assert isinstance(edges, tuple)
    assert isinstance(lengths, dict)
    assert isinstance(sources, dict)
    # Stated for the repaired growth: 23.2 +- 2.1 nodes, 34.3 edges, lengths 3 to 6: 48, 36, 14, 3 %.
    assert abs(nodes[0] - 23.2) < 0.5
    assert abs(nodes[1] - 2.1) < 0.3
    assert abs(edges[0] - 34.3) < 0.5
    for length, share in {3: 0.48, 4: 0.36, 5: 0.14, 6: 0.03}.items():
        assert abs(lengths[length] - share) < 0.045
    # Measured on the released items: 2 sources in 58, 3 in 32, 4 in 8.5 %.
    for count, share in {2: 0.58, 3: 0.32, 4: 0.085}.items():
        assert abs(sources[count] - share) < 0.07


def test_prosqa_paper_has_fewer_edges_and_more_sources():
    found = statistics(make("prosqa_paper"), "train", 1500)
    edges, sources = found["edges"], found["sources"]
    assert isinstance(edges, tuple)
    assert isinstance(sources, dict)
    assert abs(edges[0] - 30) < 0.5
    assert sum(count * share for count, share in sources.items()) > 3.5


def test_place_of_the_right_option_is_balanced():
    for name in NAMES:
        task = make(name)
        batch = task.batch("train", range(4000))
        first = task.score(batch, task.guesses(batch)["first_option"]).double().mean().item()
        assert abs(first - 0.5) < 0.02


def test_shortcuts_work_on_prosqa_and_not_on_its_balanced_twin():
    deep = make("prosqa").baselines("test", 1000)
    assert deep["heuristic"] > 0.65  # why the twin exists
    balanced = make("prosqa_balanced").baselines("val", 1000)
    shortcuts = {name: value for name, value in balanced.items() if name != "chance"}
    assert max(shortcuts.values()) < 0.55
    assert min(shortcuts.values()) > 0.45


def renamed(task: ProsQATask, example: Example, seed: int) -> Example:
    """The same problem with other names, another order of edges and of options."""
    generator = np.random.default_rng(seed)
    edges, root, options = task.read_prompt(example.prompt_ids)
    end, ask = task.vocabulary.encode("; ?")
    names = SPECIAL.count + generator.permutation(2 * task.config.nodes)

    def new(node: int) -> int:
        return int(names[node - SPECIAL.count])

    triples = [t for e in generator.permutation(len(edges)) for t in (new(edges[e][0]), new(edges[e][1]), end)]
    question = (ask, new(root), new(options[1]), new(options[0]))
    return Example((SPECIAL.bos, *triples, *question), (), tuple(map(new, example.answer_ids)))


@pytest.mark.parametrize("name", NAMES)
def test_renamed_problems_are_the_same_object(name):
    task = make(name)
    for seed, example in enumerate(task.iterate("test", 0, 100)):
        other = renamed(task, example, seed)
        assert other.prompt_ids != example.prompt_ids
        assert task.canonical(other) == task.canonical(example)
        assert task.split_of(other) == "test"
        assert task.oracle(other) == other.answer_ids


def test_different_problems_are_different_objects():
    task = make("prosqa")
    examples = list(task.iterate("train", 0, 1000))
    assert len({task.canonical(example) for example in examples}) == 1000
    example = examples[0]
    without_an_edge = Example((SPECIAL.bos, *example.prompt_ids[4:]), (), example.answer_ids)
    assert task.canonical(without_an_edge) != task.canonical(example)


def test_refinement_tells_direction_and_roles():
    path = np.zeros((3, 3, 3), dtype=bool)
    path[:, 0, 1] = path[:, 1, 2] = True
    roles = np.array([[1, 0, 2], [2, 0, 1], [1, 2, 0]])
    assert len(set(refinement_digest(path, roles).tolist())) == 3


def test_pinned_path_lengths():
    task = make("prosqa")
    for d in (3, 6):
        batch = task.difficulty_batch("val", d, range(16))
        assert (batch.n_steps == d).all()


def test_small_and_large_graphs():
    for nodes in (12, 40):
        task = make("prosqa", nodes=nodes, min_difficulty=2, max_difficulty=4)
        batch = task.batch("train", range(64))
        assert torch.equal(task.score(batch, batch.answer_ids), torch.ones(64, dtype=torch.bool))
        assert batch.prompts.ids.shape[1] <= task.limits.prompt_tokens == 1 + 6 * nodes + 4


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"nodes": 4}, ValueError, "nodes: expected an integer between 8 and 64, got 4"),
        ({"nodes": 10, "max_difficulty": 9}, ValueError, "max_difficulty: expected an integer between 3 and 8, got 9"),
        ({"mean_parents": 0}, ValueError, "mean_parents: expected a number from 0.1 to 4, got 0"),
        ({"mean_parents": "many"}, TypeError, "mean_parents: expected a number, got 'many'"),
    ],
    ids=["few nodes", "long path", "no parents", "text"],
)
def test_bad_options_are_named(options, error, message):
    with pytest.raises(error, match=message):
        make_task("prosqa", **options)


def test_a_damaged_prompt_is_refused():
    task = make("prosqa")
    with pytest.raises(ValueError, match="prompt_ids: not a prompt of prosqa"):
        task.read_prompt((SPECIAL.bos, 11, 12, 13, 14, 15, 16, 17))
