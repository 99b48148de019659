"""Task names, options, vocabularies."""

import subprocess
import sys

import pytest

from latentcot.reasoner import SPECIAL
from latentcot.tasks import TASKS, Vocabulary, make_task, task_names, task_type


def test_every_listed_task_is_made_under_its_name():
    expected = "addition chain copy countdown group mano mqar needle p_hop prosqa prosqa_balanced prosqa_paper sudoku"
    assert task_names() == tuple(expected.split())
    for name in task_names():
        assert make_task(name).name == name
    assert set(TASKS) == set(task_names())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: make_task("groups"),
            "name: unknown task 'groups'; did you mean 'group'.* "
            "valid: addition, chain, copy, countdown, group, mano, mqar, needle, p_hop, prosqa",
        ),
        (lambda: make_task("xyzzy"), "name: unknown task 'xyzzy'; valid: addition, chain, copy, countdown, group"),
        (
            lambda: make_task("group", max_dificulty=3),
            "config: unknown option of task 'group': 'max_dificulty'; did you mean",
        ),
        (lambda: make_task("chain", group="S3"), "valid: .*modulus, distractors, variables"),
        (lambda: task_type(""), "name: unknown task ''"),
    ],
    ids=["close name", "far name", "close option", "option of another task", "empty"],
)
def test_unknown_names_are_answered_with_the_valid_ones(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_importing_the_package_loads_no_torch():
    code = "import sys, latentcot.tasks as t; t.task_names(); sys.exit(int('torch' in sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_unknown_attribute():
    import latentcot.tasks

    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = latentcot.tasks.nothing  # pyright: ignore


def test_vocabulary_starts_with_the_specials():
    vocabulary = Vocabulary(["left", "right"])
    assert vocabulary.tokens[: SPECIAL.count] == SPECIAL.names
    assert vocabulary.encode("<bos> right left") == (SPECIAL.bos, SPECIAL.count + 1, SPECIAL.count)
    assert vocabulary.decode([SPECIAL.ans, SPECIAL.count]) == ("<ans>", "left")
    assert vocabulary.render([SPECIAL.bos, SPECIAL.count, SPECIAL.pad, SPECIAL.pad]) == "<bos> left"
    assert "left" in vocabulary
    assert "up" not in vocabulary
    assert len(vocabulary) == SPECIAL.count + 2


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda v: v.encode("lef"), "unknown symbol 'lef'; did you mean 'left'"),
        (lambda v: v.encode(["#"]), "unknown symbol '#'; known: <pad> <bos>"),
        (lambda v: v.decode([99]), "ids: 99 is outside the vocabulary of 13 tokens"),
        (lambda v: v.decode([-1]), "ids: -1 is outside the vocabulary"),
        (lambda v: Vocabulary(["a", "a"]), "symbols: .*'a'.* occur more than once"),
        (lambda v: Vocabulary(["<pad>"]), "symbols: .*'<pad>'.* occur more than once"),
        (lambda v: Vocabulary(["a b"]), "symbols: 'a b' is empty or contains white space"),
        (lambda v: Vocabulary([""]), "symbols: '' is empty or contains white space"),
    ],
    ids=["close", "far", "large id", "negative id", "repeated", "special", "space", "empty"],
)
def test_vocabulary_refuses(call, message):
    with pytest.raises(ValueError, match=message):
        call(Vocabulary(["left", "right"]))
