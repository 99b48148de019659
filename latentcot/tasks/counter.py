r"""Counter-based random numbers, vectorised over rows, and the keyed hashes that place objects in splits.

The generator is Philox-4x32 with ten rounds (Salmon et al., SC 2011): a bijection of a 128-bit counter under a 64-bit
key, so that any draw of any example is computed from its coordinates alone. The counter's four words are

    (block, attempt, index low, index high)

and the key is a digest of everything else (task, configuration, split). No state travels between examples: workers,
resumed runs and other machines compute the same words. Only integer arithmetic is used for choices, so no rounding mode
or vector library can change one.

Shapes: ``n`` rows, ``c`` draws a row.
"""

import hashlib
import json
from typing import Any

import numpy as np
from numpy.typing import NDArray

Words = NDArray[np.uint64]
Integers = NDArray[np.int64]

_LOW = np.uint64(0xFFFFFFFF)
_HALF = np.uint64(32)
_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10
_LANE = 2**20  # blocks that one call may take; the block number has 32 bits, so there are 4096 lanes


def philox(counter: Words, key: tuple[int, int]) -> Words:
    """Philox-4x32-10 of ``counter [4, ...]`` (32-bit values) under ``key`` (two 32-bit values): ``[4, ...]`` 32-bit
    values."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        p0 = c0 * _MULTIPLIERS[0]
        p1 = c2 * _MULTIPLIERS[1]
        c0 = (p1 >> _HALF) ^ c1 ^ np.uint64(k0)
        c1 = p1 & _LOW
        c2 = (p0 >> _HALF) ^ c3 ^ np.uint64(k1)
        c3 = p0 & _LOW
        k0 = (k0 + _WEYL[0]) & 0xFFFFFFFF
        k1 = (k1 + _WEYL[1]) & 0xFFFFFFFF
    return np.stack((c0, c1, c2, c3))


def mix64(words: Words) -> Words:
    """The finaliser of SplitMix64 (Steele et al., OOPSLA 2014): a bijection of 64-bit words that scatters every input
    bit."""
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))


def digest64(*parts: Any) -> int:
    """64-bit BLAKE2b digest of JSON-serialisable parts; the same in every process and on every machine."""
    text = json.dumps(parts, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def scale_words(words: Words, bound: int | Integers) -> Integers:
    """Integers in ``[0, bound)`` from uniform 64-bit words: ``floor(word * bound / 2**64)``, exactly.

    No rejection is needed: the probability of a value is off by less than ``2**-64``, for bounds up to ``2**32 - 1``.
    """
    limit = np.asarray(bound, dtype=np.uint64)
    high, low = words >> _HALF, words & _LOW
    return ((high * limit + ((low * limit) >> _HALF)) >> _HALF).astype(np.int64)


def sequence_hash(key: int, symbols: Words, lengths: Integers) -> Words:
    """Keyed 64-bit hash of integer sequences: ``symbols [n, c]``, of which row b's first ``lengths[b]`` count ->
    ``[n]``.

    Each (position, symbol) pair is scattered by itself and the results are added, so that all rows and positions are
    computed at once; the length enters last.
    """
    width = symbols.shape[1]
    place = mix64(np.uint64(key) + np.arange(1, width + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15))
    scattered = mix64(mix64(symbols ^ place) + place)
    scattered = np.where(np.arange(width) < lengths[:, None], scattered, np.uint64(0))
    total = scattered.sum(axis=1, dtype=np.uint64)
    return mix64(mix64(total ^ np.uint64(key)) + lengths.astype(np.uint64))


class Draws:
    """The random numbers of ``n`` attempts: row b belongs to attempt ``attempt[b]`` of example ``index[b]``.

    Each call draws from a lane of its own, so that its words do not depend on how many another call took: a wider array
    begins with the narrower one. Nor does a row depend on which other rows are drawn with it.
    """

    def __init__(self, key: int, index: Integers, attempt: Integers):
        self._key = (key & 0xFFFFFFFF, key >> 32)
        number = index.astype(np.uint64)
        self._attempt = attempt.astype(np.uint64)
        self._index_low, self._index_high = number & _LOW, number >> _HALF
        self._lane = 0

    def __len__(self) -> int:
        return len(self._attempt)

    def words(self, count: int) -> Words:
        """Uniform 64-bit words ``[n, count]``."""
        blocks = (count + 1) // 2
        if blocks > _LANE:
            raise ValueError(f"count: expected at most {2 * _LANE} words a call, got {count}")
        counter = np.empty((4, len(self), blocks), dtype=np.uint64)
        counter[0] = self._lane * _LANE + np.arange(blocks, dtype=np.uint64)
        for word, column in enumerate((self._attempt, self._index_low, self._index_high), start=1):
            counter[word] = column[:, None]
        self._lane += 1
        r0, r1, r2, r3 = philox(counter, self._key)
        pairs = np.stack((r0 << _HALF | r1, r2 << _HALF | r3), axis=-1)
        return pairs.reshape(len(self), 2 * blocks)[:, :count]

    def integers(self, count: int, bound: int | Integers) -> Integers:
        """Uniform integers ``[n, count]`` below ``bound`` (a number, or an array that broadcasts to ``[n, count]``)."""
        return scale_words(self.words(count), bound)

    def permutation(self, size: int, lengths: Integers | None = None) -> Integers:
        """Uniform permutations ``[n, size]``. With ``lengths [n]``, row b's first ``lengths[b]`` entries permute
        ``0 .. lengths[b] - 1`` and the others stay in place."""
        words = self.words(size)
        if lengths is None:
            return np.argsort(words, axis=1, kind="stable")
        outside = np.arange(size) >= lengths[:, None]
        # One bit of each key is given up to sort everything outside after everything inside, in its old order.
        keys = np.where(outside, np.uint64(1) << np.uint64(63), words >> np.uint64(1))
        return np.argsort(keys, axis=1, kind="stable")
