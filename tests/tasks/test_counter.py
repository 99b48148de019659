"""The counter-based generator and the keyed hashes."""

import itertools

import numpy as np
import pytest

from latentcot.tasks.counter import Draws, digest64, mix64, philox, scale_words, sequence_hash


def rows(count: int, key: int = 99) -> Draws:
    return Draws(key, np.arange(count), np.zeros(count, dtype=np.int64))


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
    ids=["zeros", "ones", "pi"],
)
def test_philox_gives_the_published_vectors(counter, key, expected):
    assert tuple(philox(np.array(counter, dtype=np.uint64), key).tolist()) == expected


def test_splitmix_finaliser_gives_its_known_sequence():
    # The first outputs of SplitMix64 seeded with 0.
    seeds = np.array([1, 2, 3], dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    assert mix64(seeds).tolist() == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]


@pytest.mark.parametrize("bound", [1, 2, 3, 7, 1000, 2**31 + 1, 2**32 - 1])
def test_scaling_is_exact(bound):
    edges = np.array([0, 1, 2**32 - 1, 2**32, 2**63, 2**64 - 1], dtype=np.uint64)
    words = np.concatenate((edges, rows(50).words(20).ravel()))
    assert scale_words(words, bound).tolist() == [int(w) * bound >> 64 for w in words.tolist()]


def test_a_row_does_not_depend_on_the_others():
    def both(draws: Draws):
        return draws.words(5), draws.permutation(6)

    words, permutations = both(Draws(7, np.array([3, 2**40, 5]), np.array([0, 1, 2])))
    alone, permutation = both(Draws(7, np.array([2**40]), np.array([1])))
    assert words[1].tolist() == alone[0].tolist()
    assert permutations[1].tolist() == permutation[0].tolist()


def test_a_wider_draw_begins_with_the_narrower_and_leaves_the_next_alone():
    narrow, wide = rows(3), rows(3)
    assert narrow.words(3).tolist() == wide.words(8)[:, :3].tolist()
    assert narrow.words(2).tolist() == wide.words(2).tolist()
    with pytest.raises(ValueError, match="count: expected at most 2097152 words a call"):
        rows(1).words(2**21 + 1)


def test_coordinates_give_different_words():
    index, attempt = np.array([0, 1, 2**32, 0]), np.array([0, 0, 0, 1])
    words = np.concatenate((Draws(1, index, attempt).words(4), Draws(2, index, attempt).words(4)))
    assert len(np.unique(words)) == words.size


@pytest.mark.parametrize("bound", [2, 6, 23])
def test_integers_are_uniform(bound):
    values = rows(2000).integers(40, bound)
    counts = np.bincount(values.ravel(), minlength=bound)
    expected = values.size / bound
    chi_square = ((counts - expected) ** 2 / expected).sum()
    assert abs(chi_square - (bound - 1)) < 5 * np.sqrt(2 * (bound - 1))
    # Neighbouring draws of a row are independent, too.
    pairs = np.bincount((values[:, :-1] * bound + values[:, 1:])[:, ::2].ravel(), minlength=bound**2)
    expected = pairs.sum() / bound**2
    chi_square = ((pairs - expected) ** 2 / expected).sum()
    assert abs(chi_square - (bound**2 - 1)) < 5 * np.sqrt(2 * (bound**2 - 1))


def test_permutations_are_uniform():
    found = rows(12000).permutation(3)
    counts = [int((found == p).all(1).sum()) for p in itertools.permutations(range(3))]
    assert sum(counts) == 12000
    assert max(abs(c - 2000) for c in counts) < 5 * np.sqrt(2000)


def test_permutations_leave_what_is_outside_in_place():
    lengths = np.array([0, 1, 3, 5])
    for row, length in zip(rows(4).permutation(5, lengths).tolist(), lengths.tolist(), strict=True):
        assert sorted(row[:length]) == list(range(length))
        assert row[length:] == list(range(length, 5))


def test_sequence_hash_sees_order_length_and_key_but_no_padding():
    def hashed(symbols, length, key=5):
        return int(sequence_hash(key, np.array([symbols], dtype=np.uint64), np.array([length]))[0])

    assert hashed([1, 2, 0], 2) == hashed([1, 2, 9], 2) == hashed([1, 2], 2)
    different = {hashed([1, 2], 2), hashed([2, 1], 2), hashed([1, 2, 0], 3), hashed([1], 1), hashed([1, 2], 2, key=6)}
    assert len(different) == 5


def test_digest_does_not_depend_on_the_order_of_keys():
    assert digest64("task", {"b": 1, "a": [2, None]}) == digest64("task", {"a": [2, None], "b": 1})
    assert digest64("task", {"a": 1}) != digest64("task", {"a": 2})
