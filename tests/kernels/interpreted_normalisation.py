"""Checks of the Triton norms in Triton's interpreter; run as a script by test_normalisation.py.

Prints one JSON object: check name -> numbers, or the traceback of a check that raised. Names as arguments select checks.
"""

# A function that takes any tensors cannot be matched with its parameters by a type checker.
# pyright: reportArgumentType=false, reportCallIssue=false

import torch
from interpreter import run_checks

from latentcot.kernels import normalisation_triton
from latentcot.kernels.normalisation import gated_rms_norm, l2_norm

DTYPES = {"fp32": torch.float32, "fp16": torch.float16}


def relative_rms(actual, expected):
    actual, expected = actual.detach().double(), expected.detach().double()
    assert actual.shape == expected.shape, (actual.shape, expected.shape)
    return float((actual - expected).norm() / expected.norm().clamp_min(1e-30))


def draw(*shape, seed, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def evaluate(function, leaves, upstream):
    leaves = [None if t is None else t.clone().requires_grad_() for t in leaves]
    y = function(*leaves)
    return [y, *torch.autograd.grad(y, [t for t in leaves if t is not None], upstream.to(y.dtype))]


def by_formula(x, weight, gate, activation, mean):
    squares = x.square().mean(-1, keepdim=True) if mean else x.square().sum(-1, keepdim=True)
    y = x * (squares + 1e-6).rsqrt()
    y = y if weight is None else y * weight
    if gate is not None:
        y = y * torch.sigmoid(gate) * (gate if activation == "silu" else 1.0)
    return y


def compare(operator, shape, dtype, weighted=True, gated=True, activation="silu"):
    dtype, rms = DTYPES[dtype], operator == "rms"
    x, dy = draw(*shape, seed=0, dtype=dtype), draw(*shape, seed=1, dtype=dtype)
    weight = draw(shape[-1], seed=2, dtype=dtype) if rms and weighted else None
    gate = draw(*shape, seed=3, dtype=dtype) if rms and gated else None

    def kernel(x, weight, gate):
        if rms:
            return gated_rms_norm(x, weight, gate, activation=activation, backend="triton")
        return l2_norm(x, backend="triton")

    actual = evaluate(kernel, (x, weight, gate), dy)
    exact = [None if t is None else t.double() for t in (x, weight, gate)]
    expected = evaluate(lambda *tensors: by_formula(*tensors, activation, rms), exact, dy.double())
    assert actual[0].dtype == dtype
    names = ["y", "dx", *([] if weight is None else ["dweight"]), *([] if gate is None else ["dgate"])]
    return {name: relative_rms(a, e) for name, a, e in zip(names, actual, expected, strict=True)}


def several_tiles():
    """Fewer programs than tiles of rows: each sums the weight's gradient over several of them."""
    before, normalisation_triton.WEIGHT_PROGRAMS = normalisation_triton.WEIGHT_PROGRAMS, 2
    try:
        return compare("rms", (5, 131, 16), "fp32")
    finally:
        normalisation_triton.WEIGHT_PROGRAMS = before


def strided():
    """Heads as views of a wider buffer, the upstream gradient expanded."""
    wide, z = draw(2, 5, 100, seed=0), draw(2, 5, 3, 40, seed=1)
    weight = draw(20, seed=2)

    def loss(wide, z, norm, rms):
        heads = wide[..., 10:70].unflatten(-1, (3, 20))
        return norm(heads).sum() + rms(heads, weight.to(wide.dtype), z[..., 20:]).sum()

    leaves = [t.clone().requires_grad_() for t in (wide, z)]
    total = loss(
        *leaves, lambda x: l2_norm(x, backend="triton"), lambda x, w, g: gated_rms_norm(x, w, g, backend="triton")
    )
    actual = torch.autograd.grad(total, leaves)
    exact = [t.double().requires_grad_() for t in (wide, z)]
    expected = torch.autograd.grad(
        loss(
            *exact,
            lambda x: by_formula(x, None, None, None, False),
            lambda x, w, g: by_formula(x, w, g, "silu", True),
        ),
        exact,
    )
    return [relative_rms(a, e) for a, e in zip(actual, expected, strict=True)]


def zero_rows():
    """K-3: [[0, 0], [3, 4]] with an upstream gradient of ones."""
    k = torch.tensor([[0.0, 0.0], [3.0, 4.0]], requires_grad=True)
    y = l2_norm(k, backend="triton")
    (dk,) = torch.autograd.grad(y.sum(), k)
    x = torch.zeros(2, 4, requires_grad=True)
    z = gated_rms_norm(x, torch.ones(4), backend="triton")
    (dx,) = torch.autograd.grad(z.sum(), x)
    return {"y": y.tolist(), "dk": dk.tolist(), "z": z.tolist(), "dx": dx.tolist()}


def large_halves():
    x = (1e3 * draw(4, 7, seed=0)).half()  # squares overflow 16 bits
    return torch.equal(l2_norm(x, backend="triton"), l2_norm(x.float(), backend="triton").half())


def poisoned():
    empty = torch.empty

    def poison(*a, **k):
        return empty(*a, **k).fill_(float("nan"))

    torch.empty = poison
    try:
        x, weight, gate = draw(3, 5, 36, seed=0), draw(36, seed=1), draw(3, 5, 36, seed=2)
        found = evaluate(lambda x, w, g: gated_rms_norm(x, w, g, backend="triton"), (x, weight, gate), x)
        found += evaluate(lambda x: l2_norm(x, backend="triton"), (x,), x)
    finally:
        torch.empty = empty
    return [int(t.isnan().sum()) for t in found]


def registered():
    utilities = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_static")
    x, weight, gate = (draw(*shape, seed=1).requires_grad_() for shape in ((3, 8), (8,), (3, 8)))
    torch.library.opcheck(normalisation_triton.l2_forward, (x, 1e-6), test_utils=utilities)
    for arguments in ((x, weight, gate, 1e-6, "silu"), (x, None, None, 1e-6, "silu")):
        torch.library.opcheck(normalisation_triton.rms_forward, arguments, test_utils=utilities)

    def loss(x, weight, gate):
        return (gated_rms_norm(x, weight, gate, backend="triton") * l2_norm(x, backend="triton")).sum()

    leaves = (x, weight, gate)
    eager = torch.autograd.grad(loss(*leaves), leaves)
    graph = torch.compile(loss, fullgraph=True, backend="aot_eager")
    return all(map(torch.equal, eager, torch.autograd.grad(graph(*leaves), leaves)))


CHECKS = {
    **{
        f"{dtype}-{operator}-{'x'.join(map(str, shape))}": (compare, (operator, shape, dtype))
        for dtype in DTYPES
        for operator in ("l2", "rms")
        for shape in ((1, 16), (3, 5, 60), (2, 3, 2, 128), (2, 131))
    },
    "fp32-rms-wide": (compare, ("rms", (3, 2500), "fp32")),
    "fp32-rms-plain": (compare, ("rms", (3, 20), "fp32", False, False)),
    "fp32-rms-weight": (compare, ("rms", (3, 20), "fp32", True, False)),
    "fp32-rms-sigmoid": (compare, ("rms", (3, 20), "fp32", True, True, "sigmoid")),
    "fp32-rms-tiles": (several_tiles, ()),
    "strided": (strided, ()),
    "zero_rows": (zero_rows, ()),
    "large_halves": (large_halves, ()),
    "poisoned": (poisoned, ()),
    "registered": (registered, ()),
}

if __name__ == "__main__":
    run_checks(CHECKS)
