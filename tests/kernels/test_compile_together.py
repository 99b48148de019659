"""Kernels are compiled side by side once, and launched as ever afterwards."""

import pytest
import torch

pytest.importorskip("triton", reason="the launches of kernels need Triton")

from latentcot.kernels.compile_together import Entry, compile_together, signature

CARD = torch.device("cuda")  # only its type is looked at


class Kernel:
    def __init__(self):
        self.launched, self.warmed = [], []

    def __getitem__(self, grid):
        return lambda *arguments, **options: self.launched.append((grid, arguments, options))

    def warmup(self, *arguments, grid, **options):
        self.warmed.append((grid, arguments, options))


def test_a_launch_compiles_while_kernels_are_collected_and_runs_otherwise():
    kernel = Kernel()
    entry = Entry(kernel)
    entry[(3,)](1, 2, num_warps=4)
    assert kernel.launched == [((3,), (1, 2), {"num_warps": 4})]
    assert kernel.warmed == []
    compile_together(object(), CARD, lambda: entry[(5,)](7, num_warps=8))
    assert kernel.warmed == [((5,), (7,), {"num_warps": 8})]
    assert len(kernel.launched) == 1
    entry[(3,)](1)
    assert len(kernel.launched) == 2


def test_once_a_key_and_never_on_a_cpu():
    kernel = Kernel()
    entry = Entry(kernel)
    key = object()
    for _ in range(3):
        compile_together(key, CARD, lambda: entry[(1,)]())
    compile_together(object(), torch.device("cpu"), lambda: entry[(2,)]())
    assert [grid for grid, *_ in kernel.warmed] == [(1,)]


def test_an_error_while_collecting_is_raised_and_ends_the_collection():
    kernel = Kernel()
    entry = Entry(kernel)

    def broken():
        raise ValueError("no such chunk")

    with pytest.raises(ValueError, match="no such chunk"):
        compile_together(object(), CARD, broken)
    entry[(1,)]()
    assert len(kernel.launched) == 1


def test_keys_tell_widths_dtypes_and_absent_inputs_apart():
    x = torch.zeros(2, 8, 4, 16)
    different = {
        signature(x, None, True), signature(x, x, True), signature(x.half(), None, True), signature(x, None, False),
        signature(x[..., :8], None, True),
    }  # fmt: skip
    assert len(different) == 5
    assert signature(x, 1.0) == signature(torch.zeros(4, 32, 4, 16), 2.0)
