"""Checks of the Triton short convolution in Triton's interpreter; run as a script by test_short_convolution_triton.py.

Prints one JSON object: check name -> numbers, or the traceback of a check that raised. Names as arguments select checks.
The yardstick is the PyTorch path in float64, which test_short_convolution.py holds against a loop over tokens and taps.
"""

# Operators are called with ** dictionaries of tensors, which a type checker cannot match with their parameters.
# pyright: reportArgumentType=false, reportCallIssue=false
# pyright: reportOptionalMemberAccess=false, reportOptionalSubscript=false

import torch
from interpreter import run_checks

from latentcot.kernels import Bidirectional, Causal, short_convolution
from latentcot.kernels.convolution import short_convolution_qkv
from latentcot.kernels.launch import Launch, override

DTYPES = {"fp32": torch.float32, "fp16": torch.float16}
SHORT = Launch(chunk=4, block=32, warps=1, stages=2)  # pieces of four tokens: pieces have neighbours


def relative_rms(actual, expected):
    actual, expected = actual.detach().double(), expected.detach().double()
    assert actual.shape == expected.shape, (actual.shape, expected.shape)
    return float((actual - expected).norm() / expected.norm().clamp_min(1e-30))


def draw(*shape, seed, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def evaluate(function, leaves, upstream):
    leaves = [None if t is None else t.clone().requires_grad_() for t in leaves]
    outputs = [o for o in function(*leaves) if o is not None]
    used = [t for t in leaves if t is not None]
    gradients = torch.autograd.grad(outputs, used, [u.to(o.dtype) for u, o in zip(upstream, outputs, strict=False)])
    return [*outputs, *gradients]


def compare(S, D, W, dtype, both=False, silu=True, with_state=True, cuts=None, lengths=None, short=False):
    dtype, N = DTYPES[dtype], 2 if cuts is None else len(cuts) - 1
    B = 2 if cuts is None else 1
    with_state = with_state and not both
    x, weight = draw(B, S, D, seed=0, dtype=dtype), draw(D, W, seed=1, dtype=dtype)
    state = draw(N, D, W - 1, seed=2) if with_state else None
    dy, d_last = draw(B, S, D, seed=3, dtype=dtype), draw(N, D, W - 1, seed=4)
    options = {
        "activation": "silu" if silu else None, "output_state": not both,
        "visibility": Bidirectional() if both else Causal(), "cu_seqlens": None if cuts is None else torch.tensor(cuts),
        "lengths": None if lengths is None else torch.tensor(lengths),
    }  # fmt: skip
    if lengths is not None:
        for b, length in enumerate(lengths):  # whatever stands in the padding
            x[b, length:] = float("nan")
            dy[b, length:] = float("nan")

    def run(backend):
        return lambda x, weight, state: short_convolution(x, weight, initial_state=state, backend=backend, **options)

    with override(short_convolution_forward=SHORT, short_convolution_backward=SHORT) if short else override():
        actual = evaluate(run("triton"), (x, weight, state), (dy, d_last))
    dy = dy.nan_to_num(0.0)  # a zero gradient: the PyTorch path multiplies where it should mask
    exact = [None if t is None else t.double() for t in (x.nan_to_num(0.0), weight, state)]
    expected = evaluate(run("reference"), exact, (dy, d_last))
    names = ["y", *([] if both else ["state"]), "dx", "dweight", *(["dstate"] if with_state else [])]
    return {name: relative_rms(a, e) for name, a, e in zip(names, actual, expected, strict=True)}


def three(dtype, both=False, packed=False):
    """q, k, v as views of one wide buffer, of three widths, against one convolution of all of it."""
    dtype, widths, W = DTYPES[dtype], (20, 36, 12), 4
    B, S, N = (1, 9, 2) if packed else (2, 9, 2)
    wide = draw(B, S, 80, seed=0, dtype=dtype)
    weight, state = draw(68, W, seed=1, dtype=dtype), None if both else draw(N, 68, W - 1, seed=2)
    dy, d_last = draw(B, S, 68, seed=3, dtype=dtype), draw(N, 68, W - 1, seed=4)
    options = {
        "output_state": not both, "visibility": Bidirectional() if both else Causal(),
        "cu_seqlens": torch.tensor([0, 2, 9]) if packed else None,
    }  # fmt: skip

    def separate(wide, weight, state):
        parts = wide[..., 5:73].split(widths, -1)
        q, k, v, last = short_convolution_qkv(
            *parts, *weight.split(widths), initial_state=state, backend="triton", **options
        )
        assert all(t.is_contiguous() for t in (q, k, v))
        return torch.cat([q, k, v], -1), last

    def joint(wide, weight, state):
        return short_convolution(wide[..., 5:73], weight, initial_state=state, backend="reference", **options)

    actual = evaluate(separate, (wide, weight, state), (dy, d_last))
    exact = [None if t is None else t.double() for t in (wide, weight, state)]
    expected = evaluate(joint, exact, (dy, d_last))
    names = ["y", *([] if both else ["state"]), "dx", "dweight", *([] if both else ["dstate"])]
    return {name: relative_rms(a, e) for name, a, e in zip(names, actual, expected, strict=True)}


def chunks_shorter_than_the_window():
    """A row in chunks of one, two and three tokens, states carried on, against the row at once."""
    x, weight = draw(2, 9, 20, seed=0), draw(20, 5, seed=1)
    whole, last = short_convolution(x, weight, output_state=True, backend="triton")
    parts, state = [], None
    for chunk in x.split([1, 2, 1, 3, 2], dim=1):
        y, state = short_convolution(chunk, weight, initial_state=state, output_state=True, backend="triton")
        parts.append(y)
    return [float((torch.cat(parts, 1) - whole).abs().max()), torch.equal(state, last)]


def poisoned():
    """torch.empty returns NaN everywhere: every element of every output must have been written."""
    empty = torch.empty

    def poison(*a, **k):
        t = empty(*a, **k)
        return t.fill_(float("nan")) if t.dtype.is_floating_point else t

    x, weight, state = draw(2, 11, 131, seed=0), draw(131, 4, seed=1), draw(2, 131, 3, seed=2)
    counts = []
    torch.empty = poison
    try:
        for options in ({"lengths": torch.tensor([0, 7])}, {"cu_seqlens": torch.tensor([0, 1, 11])}):
            rows = x[:1] if "cu_seqlens" in options else x

            def run(x, weight, state, options=options):
                return short_convolution(x, weight, initial_state=state, output_state=True, backend="triton", **options)

            with override(short_convolution_forward=SHORT, short_convolution_backward=SHORT):
                found = evaluate(run, (rows, weight, state), (torch.ones_like(rows), torch.ones_like(state)))
            counts += [int(t.isnan().sum()) for t in found]
    finally:
        torch.empty = empty
    return counts


def registered():
    from latentcot.kernels import convolution_registered as operators

    utilities = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_static")
    x, weight = draw(1, 6, 8, seed=0).requires_grad_(), draw(8, 3, seed=1).requires_grad_()
    cuts = torch.tensor([0, 2, 6])
    for options in ((None, None, None, True, True, False), (draw(2, 8, 2, seed=2), cuts, None, False, False, True)):
        torch.library.opcheck(operators.one_forward, (x, weight, *options), test_utils=utilities)
    parts = [t.detach().requires_grad_() for t in x.split([2, 4, 2], -1)]
    torch.library.opcheck(
        operators.qkv_forward, (*parts, weight, None, None, None, True, False, True), test_utils=utilities
    )

    def loss(x, weight):
        y, state = short_convolution(x, weight, output_state=True, backend="triton")
        return y.square().sum() + state.sum()

    eager = torch.autograd.grad(loss(x, weight), (x, weight))
    graph = torch.compile(loss, fullgraph=True, backend="aot_eager")
    return all(map(torch.equal, eager, torch.autograd.grad(graph(x, weight), (x, weight))))


def refused():
    messages = []
    x = torch.randn(1, 3, 4)
    for weight, dtype, backend in (
        (torch.randn(4, 9), torch.float32, "triton"), (torch.randn(4, 4), torch.float64, "triton"),
        (torch.randn(4, 4), torch.float32, "fast"),
    ):  # fmt: skip
        try:
            short_convolution(x.to(dtype), weight.to(dtype), backend=backend)
        except ValueError as error:
            messages.append(str(error))
    return messages


CHECKS = {
    **{
        f"{dtype}-S{S}-D{D}-W{W}-{'both' if both else 'causal'}-{'silu' if silu else 'linear'}": (
            compare, (S, D, W, dtype, both, silu)
        )
        for dtype in DTYPES
        for S, D, W, both, silu in (
            (1, 16, 4, False, True), (2, 20, 4, False, True), (9, 131, 4, False, False), (37, 20, 3, False, True),
            (9, 20, 8, False, True), (9, 20, 2, True, True), (3, 20, 4, True, False), (37, 20, 4, True, True),
        )
    },
    "fp32-pieces-causal": (compare, (11, 20, 4, "fp32", False, True, True, None, None, True)),
    "fp32-pieces-both": (compare, (11, 20, 4, "fp32", True, True, False, None, None, True)),
    "fp32-no_state": (compare, (7, 20, 4, "fp32", False, True, False)),
    **{
        f"{dtype}-{way}-{kind}": (compare, (11, 20, 4, dtype, way == "both", True, True, cuts, lengths, True))
        for dtype in DTYPES
        for way in ("causal", "both")
        for kind, cuts, lengths in (("packed", [0, 1, 3, 11], None), ("padded", None, [2, 9]), ("empty", None, [0, 11]))
    },
    "fp32-qkv-causal": (three, ("fp32",)),
    "fp16-qkv-causal": (three, ("fp16",)),
    "fp32-qkv-both": (three, ("fp32", True)),
    "fp32-qkv-packed": (three, ("fp32", False, True)),
    "chunks": (chunks_shorter_than_the_window, ()),
    "poisoned": (poisoned, ()),
    "registered": (registered, ()),
    "refused": (refused, ()),
}  # fmt: skip

if __name__ == "__main__":
    run_checks(CHECKS)
