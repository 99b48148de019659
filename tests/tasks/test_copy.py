"""Copying: the answer is the sequence, sequences are uniform, shortcuts."""

import numpy as np
import pytest

from latentcot.tasks import make_task
from latentcot.tasks.copying import CopyTask


def task(**options) -> CopyTask:
    made = make_task("copy", **options)
    assert isinstance(made, CopyTask)
    return made


@pytest.mark.parametrize("options", [{}, {"alphabet": 300, "min_difficulty": 5, "max_difficulty": 40}], ids=str)
def test_the_answer_is_the_sequence(options):
    made = task(**options)
    seen = set()
    for example in made.iterate("train", 0, 300):
        names = made.vocabulary.decode(example.prompt_ids)
        assert names[0] == "<bos>"
        assert len(names) == example.meta["difficulty"] + 1
        assert example.steps == ()
        assert made.vocabulary.decode(example.answer_ids) == names[1:]
        assert all(0 <= int(name[1:]) < made.config.alphabet for name in names[1:])
        seen.add(example.meta["difficulty"])
    assert min(seen) == made.config.min_difficulty
    assert max(seen) == made.config.max_difficulty


def test_symbols_are_uniform_in_every_place():
    symbols = task(min_difficulty=6, max_difficulty=6)._objects("train", np.arange(20_000), None)["symbol"]
    for place in range(6):
        counts = np.bincount(symbols[:, place], minlength=16)
        assert np.abs(counts - 20_000 / 16).max() < 5 * np.sqrt(20_000 / 16), place


def test_shortcuts_are_right_where_they_should_be():
    made = task(alphabet=2, min_difficulty=5, max_difficulty=6)
    batch = made.batch("train", range(300))
    right = {name: made.score(batch, ids).tolist() for name, ids in made.guesses(batch).items()}
    sequences = [example.prompt_ids[1:] for example in made.iterate("train", 0, 300)]
    assert right["backwards"] == [s == s[::-1] for s in sequences]
    for name in ("first", "last"):
        assert right[name] == [len(set(s)) == 1 for s in sequences]
    assert any(right["backwards"])
    assert not all(right["backwards"])


def test_every_symbol_counts():
    made = task(min_difficulty=3, max_difficulty=3)
    for example in made.iterate("val", 0, 20):
        for place in range(3):
            wrong = list(example.answer_ids)
            wrong[place] += 1 if wrong[place] + 1 < len(made.vocabulary) else -1
            assert not made.verify(example, wrong)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"alphabet": 1}, ValueError, "alphabet: expected an integer between 2"),
        ({"alphabet": True}, TypeError, "alphabet: expected an integer, got True"),
        ({"length": 9}, ValueError, "unknown option of task 'copy'"),
    ],
    ids=str,
)
def test_bad_options_are_named(options, error, message):
    with pytest.raises(error, match=message):
        task(**options)
