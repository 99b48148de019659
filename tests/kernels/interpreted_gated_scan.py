"""Checks of the Triton gated scan in Triton's interpreter; run as a script by test_gated_scan_triton.py.

The interpreter is chosen by an environment variable that must be set before Triton is imported and must not reach the
other tests, hence a process of its own. Prints one JSON object: check name -> numbers, or the traceback of a check that
raised. Names as arguments select checks.
"""

# Operators are called with ** dictionaries of tensors, which a type checker cannot match with their parameters.
# pyright: reportArgumentType=false, reportCallIssue=false
# pyright: reportOptionalMemberAccess=false, reportOptionalSubscript=false

import json
import sys
import tempfile
import traceback
from itertools import pairwise
from pathlib import Path

import torch
import triton
import triton.language as tl

from latentcot.kernels import explain_backend, gated_scan
from latentcot.kernels.gated_scan import reference
from latentcot.kernels.gated_scan import triton as kernel_module

DTYPES = {"fp32": torch.float32, "fp16": torch.float16}


def relative_rms(actual, expected):
    actual, expected = actual.detach().double(), expected.detach().double()
    return float((actual - expected).norm() / expected.norm().clamp_min(1e-30))


def inputs(S, D, N, dtype, B=None, seed=0):
    generator = torch.Generator().manual_seed(seed)
    B = N if B is None else B
    x = torch.randn(B, S, D, generator=generator).to(dtype)
    g = -torch.rand(B, S, D, generator=generator).to(dtype)
    h0 = torch.randn(N, D, generator=generator)
    do, dstate = torch.randn(B, S, D, generator=generator).to(dtype), torch.randn(N, D, generator=generator)
    return x, g, h0, do, dstate


def run(function, x, g, h0, do, dstate, with_state):
    leaves = [t.clone().requires_grad_() for t in ((x, g, h0) if with_state else (x, g))]
    o, state = function(*leaves)
    grads = torch.autograd.grad([o, state], leaves, [do.to(o.dtype), dstate.to(state.dtype)])
    return dict(zip(["o", "state", "dx", "dg", "dh0"], [o, state, *grads], strict=False))


def by_kernel(x, g, h0=None, cu_seqlens=None):
    return gated_scan(x, g, initial_state=h0, output_state=True, cu_seqlens=cu_seqlens, backend="triton")


def compare(S, D, dtype, with_state):
    data = inputs(S, D, 2, DTYPES[dtype])
    actual = run(by_kernel, *data, with_state)
    expected = run(lambda x, g, h0=None: reference.gated_scan(x, g, h0), *(t.double() for t in data), with_state)
    return {name: relative_rms(actual[name], expected[name]) for name in expected}


def packed(dtype):
    """Three sequences in one row against the loop over them."""
    cuts = [0, 1, 6, 14]
    x, g, h0, do, dstate = inputs(14, 20, 3, DTYPES[dtype], B=1)
    cu = torch.tensor(cuts)
    actual = run(lambda x, g, h0: by_kernel(x, g, h0, cu), x, g, h0, do, dstate, True)

    def loop(x, g, h0):
        parts = [reference.gated_scan(x[:, a:b], g[:, a:b], h0[n : n + 1]) for n, (a, b) in enumerate(pairwise(cuts))]
        return torch.cat([p[0] for p in parts], 1), torch.cat([p[1] for p in parts], 0)

    expected = run(loop, *(t.double() for t in (x, g, h0, do, dstate)), True)
    return {name: relative_rms(actual[name], expected[name]) for name in expected}


def strided():
    """Slices of wider buffers, time-major storage, an expanded upstream gradient: strides are not those of a fresh
    tensor.
    """
    x, g, h0, _, _ = inputs(9, 20, 2, torch.float32)
    wide = torch.randn(2, 9, 60)
    wide[..., 20:40] = x
    g_view = g.transpose(0, 1).contiguous().transpose(0, 1)
    leaf, gate = wide.clone().requires_grad_(), g_view.clone().requires_grad_()
    o, _ = by_kernel(leaf[..., 20:40], gate, h0)
    o.sum().backward()
    x64, g64 = x.double().requires_grad_(), g.double().requires_grad_()
    reference.gated_scan(x64, g64, h0.double())[0].sum().backward()
    return {"dx": relative_rms(leaf.grad[..., 20:40], x64.grad), "dg": relative_rms(gate.grad, g64.grad)}


def poisoned():
    """torch.empty returns NaN everywhere: every element of every output must have been written."""
    empty, empty_like = torch.empty, torch.empty_like

    def poison(t):
        return t.fill_(float("nan")) if t.dtype.is_floating_point else t

    torch.empty = lambda *a, **k: poison(empty(*a, **k))
    torch.empty_like = lambda *a, **k: poison(empty_like(*a, **k))
    try:
        found = run(
            by_kernel, *inputs(5, 131, 2, torch.float32), True
        )  # 131: one full block of channels and a ragged one
    finally:
        torch.empty, torch.empty_like = empty, empty_like
    return {name: int(t.isnan().sum()) for name, t in found.items()}


def extreme():
    """Full resets (g = -30, -1e4) and alpha exactly 1, against the reference."""
    x, g, h0, do, dstate = inputs(12, 20, 2, torch.float32)
    g[:, ::3], g[:, 1::3] = 0.0, -30.0
    g[:, 5] = -1e4
    actual = run(by_kernel, x, g, h0, do, dstate, True)
    expected = run(lambda x, g, h0: reference.gated_scan(x, g, h0), *(t.double() for t in (x, g, h0, do, dstate)), True)
    return {name: relative_rms(actual[name], expected[name]) for name in expected}


@triton.jit
def _offsets(out, rows, strides, count: tl.constexpr):
    i = tl.arange(0, count)
    tl.store(out + i, kernel_module.row_offset(tl.load(rows + i), tl.load(strides + i)))


def row_offsets():
    """The kernels' own offset function on 32-bit rows and strides around 2^31."""
    rows = torch.tensor([349_525, 349_526, 1_048_575, 1_048_576], dtype=torch.int32)  # the last rows of the four shapes
    strides = torch.tensor([6144, 6144, 2048, 2048], dtype=torch.int32)
    out = torch.zeros(4, dtype=torch.int64)
    _offsets[(1,)](out, rows, strides, count=4)
    return out.tolist()


def beyond_32_bits():
    """Three rows that lie 2^30 + 1 elements apart (a sparse file): the last one begins beyond 2^31 - 1."""
    stride, S, D = 2**30 + 1, 3, 16
    x, g, h0, _, _ = inputs(S, D, 1, torch.float16)
    with tempfile.TemporaryDirectory() as folder:
        size = 2 * (2 * stride + D)
        path = Path(folder) / "sparse"
        with path.open("wb") as file:
            file.truncate(size)
        storage = torch.UntypedStorage.from_file(str(path), shared=True, nbytes=size)
        far = torch.empty(0, dtype=torch.float16).set_(storage, 0, (1, S, D), (2 * stride + D, stride, 1))
        far.copy_(x)
        o, state = by_kernel(far, g, h0)
        near = by_kernel(x, g, h0)
        return [torch.equal(o, near[0]), torch.equal(state, near[1])]


def explained():
    by_name = explain_backend("gated_scan", device="cpu", dtype=torch.float32, backend="triton").chosen
    automatic = explain_backend("gated_scan", device="cpu", dtype=torch.float32).chosen
    return [by_name, automatic]


CHECKS = {
    **{
        f"compare-{dtype}-S{S}-D{D}-{'state' if state else 'zero'}": (compare, (S, D, dtype, state))
        for dtype in DTYPES
        for S, D, state in ((1, 16, True), (7, 60, False), (7, 131, True), (33, 16, True))
    },
    "packed-fp32": (packed, ("fp32",)),
    "packed-fp16": (packed, ("fp16",)),
    "strided": (strided, ()),
    "poisoned": (poisoned, ()),
    "extreme": (extreme, ()),
    "row_offsets": (row_offsets, ()),
    "beyond_32_bits": (beyond_32_bits, ()),
    "explained": (explained, ()),
}

if __name__ == "__main__":
    results = {}
    for name in sys.argv[1:] or CHECKS:
        check, arguments = CHECKS[name]
        try:
            results[name] = check(*arguments)
        except Exception:
            results[name] = traceback.format_exc()
    print(json.dumps(results))
