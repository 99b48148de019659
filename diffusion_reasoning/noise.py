r"""Random numbers by address: uniform draws that depend on (row seed, pass, stream, position, token) and on nothing
else.

A generator that is read in order gives a row other numbers as soon as a neighbour joins or leaves the batch. Here every
number is a hash of where it is used (the finaliser of SplitMix64), so a row samples the same alone and in any batch, on
any device, whatever its padding; and all of them come out of a few vectorised integer operations.
"""

import torch
from torch import Tensor

STREAMS = {"token": 0, "reveal": 1, "order": 2, "remask": 3, "clock": 2**40, "selection": 2**40 + 1}
"""Four to a pass, and two that came later behind all of them, so that older draws are as they were."""


_CACHED = 2**16  # numbers


def _signed(value: int) -> int:
    return value - 2**64 if value >= 2**63 else value


_GOLDEN = _signed(0x9E3779B97F4A7C15)
_FIRST, _SECOND = _signed(0xBF58476D1CE4E5B9), _signed(0x94D049BB133111EB)


def _shift(x: Tensor, bits: int) -> Tensor:
    """Logical right shift of int64 (torch's is arithmetic)."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def mix(x: Tensor) -> Tensor:
    """A bijection of 64-bit integers in which every input bit moves every output bit; wraps around on overflow."""
    x = (x ^ _shift(x, 30)) * _FIRST
    x = (x ^ _shift(x, 27)) * _SECOND
    return x ^ _shift(x, 31)


def _mix_into(x: Tensor) -> Tensor:
    """:func:`mix` written over ``x``: a table of numbers for a whole vocabulary is large, and each further one of that
    size costs memory and, on a CPU, most of the time."""
    spare = torch.empty_like(x)
    for bits, factor in ((30, _FIRST), (27, _SECOND), (31, None)):
        torch.bitwise_right_shift(x, bits, out=spare)
        x.bitwise_xor_(spare.bitwise_and_((1 << (64 - bits)) - 1))
        if factor is not None:
            x.mul_(factor)
    return x


def _uniform(bits: Tensor) -> Tensor:
    """52 bits to fp64 strictly inside (0, 1), written over them: both logarithms of a Gumbel draw stay finite."""
    # k, the upper 52 bits, as the mantissa of 1 + k 2^-52; less 1 - 2^-53 it is (k + 0.5) 2^-52 without rounding
    mantissa = bits.bitwise_right_shift_(12).bitwise_and_((1 << 52) - 1).bitwise_or_(0x3FF << 52)
    return mantissa.view(torch.float64).sub_(1 - 2.0**-53)


class Noise:
    """Draws for rows with seeds ``[B]`` (int64)."""

    def __init__(self, seeds: Tensor):
        self.seeds = seeds

    def _keys(self, rows: Tensor, step: int, stream: str) -> Tensor:
        address = _signed(_GOLDEN * (1 + 4 * step + STREAMS[stream]) % 2**64)
        return mix(self.seeds[rows] + address)

    def positions(self, rows: Tensor, step: int, stream: str, positions: Tensor) -> Tensor:
        """One number for each position: ``rows [R]``, ``positions [R, L]`` to ``[R, L]``."""
        return _uniform(_mix_into(self._keys(rows, step, stream)[:, None] + (positions + 1) * _GOLDEN))

    def tokens(self, rows: Tensor, step: int, stream: str, positions: Tensor, vocab_size: int) -> Tensor:
        """One number for each token of the vocabulary at n places: ``rows [n]``, ``positions [n]`` to ``[n, V]``."""
        keys = mix(self._keys(rows, step, stream) + (positions + 1) * _GOLDEN)
        token = torch.arange(1, vocab_size + 1, device=keys.device) * _GOLDEN
        bits = torch.empty(len(keys), vocab_size, dtype=torch.int64, device=keys.device)
        # on a CPU as many rows at a time as its caches hold; a GPU is better off with few launches
        some = max(1, _CACHED // vocab_size if keys.device.type == "cpu" else len(keys))
        for part, key in zip(bits.split(some), keys[:, None].split(some), strict=True):
            _uniform(_mix_into(torch.add(key, token, out=part)))
        return bits.view(torch.float64)


def seeds_from_tokens(ids: Tensor, mask: Tensor, seed: int) -> Tensor:
    """A seed for each row from its real tokens and ``seed``, ``[B]``: the same prompt samples the same in every
    batch."""
    position = mask.long().cumsum(1)
    hashed = mix(mix(ids + _GOLDEN) + position * _GOLDEN) * mask
    return mix(hashed.sum(1) + mix(torch.full_like(ids[:, 0], seed)))
