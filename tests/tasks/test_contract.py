"""What holds for every task: determinism, disjoint splits, oracle, scoring, limits, bad input."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from latentcot.reasoner import SPECIAL, TaskBatch
from latentcot.tasks import SPLITS, Task, TaskConfig, make_task

VARIANTS = {
    "addition": ("addition", {}),
    "addition-3-reverse-carries": (
        "addition",
        {"base": 3, "min_difficulty": 3, "max_difficulty": 9, "reverse": True, "carries": True},
    ),
    "group-S3": ("group", {}),
    "group-S3-filled": ("group", {"width": 7}),
    "group-S5-tag": ("group", {"group": "S5", "form": "tag", "max_difficulty": 12}),
    "group-A5": ("group", {"group": "A5"}),
    "group-Z60-generators": (
        "group",
        {"group": "Z60", "generators_only": True, "min_difficulty": 8, "max_difficulty": 20},
    ),
    "group-parity": ("group", {"group": "Z2", "min_difficulty": 10, "max_difficulty": 20}),
    "chain-23": ("chain", {}),
    "chain-7": ("chain", {"modulus": 7, "distractors": 0}),
    "copy": ("copy", {}),
    "copy-bits": ("copy", {"alphabet": 2, "min_difficulty": 4, "max_difficulty": 20}),
    "mano": ("mano", {}),
    "mano-division": ("mano", {"modulus": 12, "division": True, "max_difficulty": 6}),
    "p_hop": ("p_hop", {}),
    "prosqa": ("prosqa", {}),
    "prosqa_paper": ("prosqa_paper", {}),
    "prosqa_balanced": ("prosqa_balanced", {}),
}


@pytest.fixture(params=VARIANTS, scope="module")
def variant(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def task(variant) -> Task:
    name, options = VARIANTS[variant]
    return make_task(name, **options)


def flattened(batch: TaskBatch) -> list[torch.Tensor]:
    return [
        batch.prompts.ids,
        batch.prompts.mask,
        batch.steps,
        batch.step_mask,
        batch.answer_ids,
        batch.answer_mask,
        batch.difficulty,
        batch.index,
    ]


def test_batch_is_the_examples_one_by_one(task):
    numbers = [5, 0, 7, 2**40, 5, *range(20, 40)]
    for split in SPLITS:
        batch = task.batch(split, numbers)
        assert batch.index.tolist() == numbers
        examples = [task.example(split, i) for i in numbers]
        assert_rows_are(batch, examples)
    assert list(task.iterate("val", 20, 40)) == [task.example("val", i) for i in range(20, 40)]


def assert_rows_are(batch: TaskBatch, examples):
    assert len(batch) == len(examples)
    for row, example in enumerate(examples):
        prompt = batch.prompts.ids[row][batch.prompts.mask[row]]
        assert tuple(prompt.tolist()) == example.prompt_ids
        assert tuple(batch.answer_ids[row][batch.answer_mask[row]].tolist()) == example.answer_ids
        assert int(batch.n_steps[row]) == len(example.steps)
        for step, wanted in enumerate(example.steps):
            assert tuple(batch.steps[row, step][batch.step_mask[row, step]].tolist()) == wanted
        assert int(batch.difficulty[row]) == example.meta["difficulty"]
    for ids, mask in (
        (batch.prompts.ids, batch.prompts.mask),
        (batch.steps, batch.step_mask),
        (batch.answer_ids, batch.answer_mask),
    ):
        assert (ids[~mask] == SPECIAL.pad).all()
        assert (mask.long().diff(dim=-1) <= 0).all(), "padding must be on the right"


def test_pinned_difficulty_has_that_difficulty_and_is_the_same_in_wider_ranges(task):
    d = (task.config.min_difficulty + task.config.max_difficulty) // 2
    batch = task.difficulty_batch("test", d, range(20))
    assert (batch.difficulty == d).all()
    assert_rows_are(batch, [task.difficulty_example("test", d, i) for i in range(20)])
    narrow = type(task)(replace(task.config, min_difficulty=d, max_difficulty=d))
    shorter = "steps" if task.limits.steps else "answer_tokens"  # of a task without steps
    assert getattr(narrow.limits, shorter) < getattr(task.limits, shorter)
    for one, other in zip(flattened(batch), flattened(narrow.difficulty_batch("test", d, range(20))), strict=True):
        assert torch.equal(one, other)


def test_oracle_solves_everything(task):
    for example in task.iterate("train", 0, 1000):
        assert task.oracle(example) == example.answer_ids
        assert task.verify(example, task.oracle(example))


def test_splits_hold_different_objects(task):
    held = {}
    for split in SPLITS:
        examples = list(task.iterate(split, 0, 300))
        assert all(task.split_of(example) == split for example in examples)
        held[split] = {task.canonical(example) for example in examples}
    assert not held["train"] & held["test"]
    assert not held["train"] & held["val"]
    assert not held["val"] & held["test"]


def test_data_seed_changes_examples_and_splits(task):
    other = type(task)(replace(task.config, data_seed=1))
    examples = list(task.iterate("train", 0, 200))
    assert examples != list(other.iterate("train", 0, 200))
    moved = [other.split_of(example) for example in examples]
    assert 0 < sum(split != "train" for split in moved) < 100


def test_verify_accepts_answers_only(task):
    for example in task.iterate("val", 0, 20):
        answer = list(example.answer_ids)
        assert task.verify(example, answer)
        assert task.verify(example, torch.tensor([*answer, SPECIAL.pad, SPECIAL.pad]))
        assert task.verify(example, [*answer, SPECIAL.eos, answer[0]])
        assert not task.verify(example, [*answer, answer[0]])
        assert not task.verify(example, answer[:-1])
        assert not task.verify(example, [])
        assert not task.verify(example, [SPECIAL.mask, *answer[1:]])


def test_score_is_verify_row_by_row(task):
    batch = task.batch("val", range(60))
    examples = list(task.iterate("val", 0, 60))
    generator = np.random.default_rng(0)
    width = batch.answer_ids.shape[1]
    for columns in (width, width + 3, max(1, width - 1)):
        ids = torch.zeros(60, columns, dtype=torch.long)
        kept = min(columns, width)
        ids[:, :kept] = batch.answer_ids[:, :kept]
        for row in range(60):  # leave a third alone, damage a third, end a third early or late
            if row % 3 == 1:
                ids[row, generator.integers(columns)] = int(generator.integers(len(task.vocabulary)))
            elif row % 3 == 2 and columns > width:
                ids[row, int(batch.answer_mask[row].sum())] = SPECIAL.eos
                ids[row, -1] = SPECIAL.count
        expected = [task.verify(example, ids[row]) for row, example in enumerate(examples)]
        assert task.score(batch, ids).tolist() == expected
    assert task.score(batch, batch.answer_ids).all()


def random_sums(task: Task, digits: list[int], generator: torch.Generator) -> torch.Tensor:
    """Sums of two numbers with so many digits, each of the possible ones as often as any other."""
    base, rows = task.config.base, []  # pyright: ignore[reportAttributeAccessIssue]
    for d in digits:
        least, most = (2 * base ** (d - 1) if d > 1 else 0), 2 * (base**d - 1)
        value = least + int(torch.randint(most - least + 1, (1,), generator=generator))
        found = [SPECIAL.count + value // base**i % base for i in range(max(digits) + 1) if i == 0 or value >= base**i]
        found = found if task.config.reverse else found[::-1]  # pyright: ignore[reportAttributeAccessIssue]
        rows.append(found + [SPECIAL.pad] * (max(digits) + 1 - len(found)))
    return torch.tensor(rows)


def test_random_answers_are_right_by_chance(task):
    batch = task.batch("test", range(2000))
    generator = torch.Generator().manual_seed(0)
    if task.name.startswith("prosqa"):
        place = batch.prompts.mask.sum(1, keepdim=True) - 1 - torch.randint(0, 2, (2000, 1), generator=generator)
        guess = batch.prompts.ids.gather(1, place)
    elif task.name == "addition":
        guess = random_sums(task, batch.difficulty.tolist(), generator)
    else:
        sizes = {"chain": "modulus", "copy": "alphabet", "mano": "modulus", "p_hop": "alphabet"}
        answers = getattr(task.config, sizes[task.name]) if task.name in sizes else len(task.group)  # pyright: ignore
        guess = SPECIAL.count + torch.randint(0, answers, batch.answer_ids.shape, generator=generator)
        guess = guess.masked_fill(~batch.answer_mask, SPECIAL.pad)
    chance = task.chance(batch).mean().item()
    assert abs(task.score(batch, guess).double().mean().item() - chance) <= 4 * (chance / 2000) ** 0.5


def test_limits_hold_whatever_is_drawn(task):
    batch = task.batch("train", range(3000))
    limits = task.limits
    assert batch.prompts.limits == limits
    assert batch.prompts.ids.shape[1] <= limits.prompt_tokens
    assert batch.steps.shape[1] <= limits.steps
    assert batch.steps.shape[2] <= limits.step_tokens
    assert batch.answer_ids.shape[1] <= limits.answer_tokens
    assert limits.vocab_size == len(task.vocabulary)
    for tensor in (batch.prompts.ids, batch.answer_ids, *([batch.steps] if limits.steps else [])):
        assert int(tensor.max()) < limits.vocab_size
        assert int(tensor[tensor != SPECIAL.pad].min()) >= SPECIAL.bos
    assert (batch.prompts.ids[:, 0] == SPECIAL.bos).all()
    assert int(batch.difficulty.min()) >= task.config.min_difficulty
    assert int(batch.difficulty.max()) <= task.config.max_difficulty


def test_rendered_text_reads_back(task):
    example = task.example("train", 3)
    assert task.vocabulary.encode(task.vocabulary.render(example.prompt_ids)) == example.prompt_ids


def test_baselines_name_their_best(task):
    found = task.baselines("test", 300)
    assert {"chance", "majority", "heuristic"} <= found.keys()
    assert found[found.heuristic_name] == found["heuristic"] >= found["majority"]
    assert all(0 <= value <= 1 for value in found.values())


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda t: t.batch("dev", [0]), ValueError, "split: expected one of 'train', 'val', 'test', got 'dev'"),
        (lambda t: t.batch("train", []), ValueError, "indices: expected a non-empty list of integers"),
        (lambda t: t.batch("train", [0.5]), ValueError, "indices: expected a non-empty list of integers, got float64"),
        (lambda t: t.batch("train", [[1]]), ValueError, r"indices: .* of shape \(1, 1\)"),
        (lambda t: t.example("train", -1), ValueError, "indices: example numbers start at 0, got -1"),
        (lambda t: t.difficulty_batch("train", 99, [0]), ValueError, "difficulty: expected an integer between"),
        (lambda t: t.difficulty_batch("train", "3", [0]), TypeError, "difficulty: expected an integer, got '3'"),
        (lambda t: t.baselines("test", 0), ValueError, "n: expected at least 1 example, got 0"),
        (
            lambda t: t.score(t.batch("val", [0, 1]), torch.zeros(3, 1)),
            ValueError,
            r"ids: expected shape \[2, A\], got \[3, 1\]",
        ),
        (lambda t: type(t)(TaskConfig()), TypeError, "config: .* takes a .*Config, got TaskConfig"),
        (
            lambda t: replace(t.config, min_difficulty=9, max_difficulty=4),
            ValueError,
            "max_difficulty: expected an integer between 9",
        ),
        (lambda t: replace(t.config, data_seed=-1), ValueError, "data_seed: expected an integer between 0"),
        (lambda t: replace(t.config, min_difficulty=2.0), TypeError, "min_difficulty: expected an integer, got 2.0"),
    ],
    ids=[
        "unknown split",
        "no indices",
        "fractions",
        "nested",
        "negative",
        "difficulty out of range",
        "difficulty no number",
        "no examples",
        "wrong rows",
        "wrong config",
        "empty range",
        "negative seed",
        "float difficulty",
    ],
)
def test_bad_input_is_named(task, call, error, message):
    with pytest.raises(error, match=message):
        call(task)
