"""Checks of the Triton gated scan in Triton's interpreter; run as a script by test_gated_scan_triton.py.

The interpreter is chosen by an environment variable that must be set before Triton is imported and must not reach the
other tests, hence a process of its own. Prints one JSON object: check name -> numbers, or the traceback of a check that
raised. Names as arguments select checks.
"""

# Operators are called with ** dictionaries of tensors, which a type checker cannot match with their parameters.
# pyright: reportArgumentType=false, reportCallIssue=false
# pyright: reportOptionalMemberAccess=false, reportOptionalSubscript=false

import tempfile
from itertools import pairwise
from pathlib import Path

import torch
import triton
import triton.language as tl
from interpreter import run_checks

from latentcot.kernels import explain_backend, gated_scan
from latentcot.kernels.gated_scan import reference
from latentcot.kernels.gated_scan import triton as kernel_module
from latentcot.kernels.gated_scan.fused import hgrn_scan
from latentcot.kernels.launch import Launch, override

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


def short_tiles(warps=1):
    """Tiles of two tokens a warp, so that a few tokens are several tiles and enough of them to cut time into parts."""
    shape = Launch(chunk=2, block=32, warps=1, stages=2)
    return override(gated_scan_forward=shape._replace(chunk=2 * warps, warps=warps), gated_scan_backward=shape)


def in_parts(S, D, dtype, with_state):
    with short_tiles():
        parts = [
            kernel_module.config(f"gated_scan_{way}", 2 * S, 2, D, DTYPES[dtype], torch.device("cpu"))[1]
            for way in ("forward", "backward")
        ]
        return {**compare(S, D, dtype, with_state), "parts": min(parts)}


def packed_in_parts():
    with short_tiles(warps=2):
        return packed("fp32")


def hgrn_by_definition(i, f, bound, h0):
    """Step by step in float64, from the formula."""
    h, outputs = h0, []
    for t in range(i.shape[1]):
        alpha = bound + (1 - bound) * torch.sigmoid(f[:, t])
        h = alpha * h + torch.nn.functional.silu(i[:, t]) * (1 - bound) * torch.sigmoid(-f[:, t])
        outputs.append(h)
    return torch.stack(outputs, 1), h


def hgrn(S, D, dtype, bounded, in_parts=False, spread=1.0):
    i, f, h0, do, dstate = inputs(S, D, 2, DTYPES[dtype], seed=2)
    f = (spread * (8 * f + 4)).to(f.dtype)  # uniform in -4 … 4
    bound = torch.rand(D, generator=torch.Generator().manual_seed(3)) if bounded else torch.zeros(D)

    def results(function, *tensors):
        leaves = [t.clone().requires_grad_() for t in tensors]
        o, state = function(*leaves)
        used = leaves if bounded else [leaves[0], leaves[1], leaves[3]]
        gradients = torch.autograd.grad([o, state], used, [do.to(o.dtype), dstate.to(state.dtype)])
        names = ["di", "df", "dbound", "dh0"] if bounded else ["di", "df", "dh0"]
        return {"o": o, "state": state, **dict(zip(names, gradients, strict=True))}

    def by_kernel(i, f, bound, h0):
        return hgrn_scan(
            i, f, bound if bounded else None, initial_state=h0, output_state=True, backend="triton"
        )  # fmt: skip

    if in_parts:
        with short_tiles():
            actual = results(by_kernel, i, f, bound, h0)
    else:
        actual = results(by_kernel, i, f, bound, h0)
    expected = results(hgrn_by_definition, *(t.double() for t in (i, f, bound, h0)))
    return {name: relative_rms(actual[name], expected[name]) for name in expected}


def growth():
    """A positive log-decay behind the public checks: NaN in its channel from its token on, and nowhere else."""
    from latentcot.kernels.gated_scan.registered import scan_forward

    x, g, h0, _, _ = inputs(9, 20, 2, torch.float32)
    g[1, 4, 7] = 1e-3
    found = []
    for shapes in (override(), short_tiles(), short_tiles(warps=2)):
        with shapes:
            found.append(scan_forward(x, g, h0, None)[0].isnan())
    expected = torch.zeros(2, 9, 20, dtype=torch.bool)
    expected[1, 4:, 7] = True
    return [torch.equal(f, expected) for f in found]


def compiled():
    """torch.compile(fullgraph=True) gives what eager gives, forward and backward."""
    x, g, h0, _, _ = inputs(9, 20, 2, torch.float32)
    bound = torch.rand(20)

    def plain(x, g, h0, bound):
        o, state = gated_scan(x, g, initial_state=h0, output_state=True, backend="triton")
        return (o * bound).sum() + state.square().sum()

    def fused(x, g, h0, bound):
        o, state = hgrn_scan(x, g, bound, initial_state=h0, output_state=True, backend="triton")
        return o.sum() + state.square().sum()

    same = []
    for function in (plain, fused):
        leaves = [t.clone().requires_grad_() for t in (x, g, h0, bound)]
        eager = torch.autograd.grad(function(*leaves), leaves)
        graph = torch.compile(function, fullgraph=True, backend="aot_eager")
        same.append(all(map(torch.equal, eager, torch.autograd.grad(graph(*leaves), leaves))))
    return same


def registered():
    """torch.library's own checks: schema, fake results, autograd registration."""
    from latentcot.kernels.gated_scan.registered import hgrn_forward, scan_forward

    x, g, h0, _, _ = inputs(4, 16, 2, torch.float32)
    row = [t.flatten(0, 1).unsqueeze(0).requires_grad_() for t in (x, g)]
    utilities = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_static")
    torch.library.opcheck(scan_forward, (row[0], row[1], h0, torch.tensor([0, 3, 8])), test_utils=utilities)
    torch.library.opcheck(hgrn_forward, (row[0], row[1], None, None, None), test_utils=utilities)
    return True


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
    **{
        f"parts-{dtype}-S{S}-D{D}-{'state' if state else 'zero'}": (in_parts, (S, D, dtype, state))
        for dtype in DTYPES
        for S, D, state in ((16, 20, True), (33, 20, True), (27, 32, False))
    },
    **{
        f"hgrn-{dtype}-S{S}-D{D}-{'bound' if bounded else 'free'}{'-parts' if parts else ''}": (
            hgrn,
            (S, D, dtype, bounded, parts),
        )
        for dtype in DTYPES
        for S, D, bounded, parts in (
            (1, 16, True, False),
            (19, 60, True, False),
            (19, 20, False, True),
            (33, 20, True, True),
        )
    },
    "hgrn-saturated": (hgrn, (9, 20, "fp32", True, False, 40.0)),
    "packed-parts": (packed_in_parts, ()),
    "growth": (growth, ()),
    "compiled": (compiled, ()),
    "registered": (registered, ()),
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
    run_checks(CHECKS)
