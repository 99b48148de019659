"""Checks of the one-token kernels in Triton's interpreter; run as a script by test_steps.py.

Prints one JSON object: check name -> numbers, or the traceback of a check that raised. Names as arguments select checks.
"""

# Operators are called with ** dictionaries of tensors, which a type checker cannot match with their parameters.
# pyright: reportArgumentType=false, reportCallIssue=false, reportOptionalMemberAccess=false

import torch
from interpreter import run_checks

from latentcot.kernels import l2_norm, step_triton
from latentcot.kernels.decay_attention import reference as decay_reference
from latentcot.kernels.delta_rule import reference as delta_reference

DTYPES = {"fp32": torch.float32, "fp16": torch.float16}


def relative_rms(actual, expected):
    actual, expected = actual.detach().double(), expected.detach().double()
    assert actual.shape == expected.shape, (actual.shape, expected.shape)
    return float((actual - expected).norm() / expected.norm().clamp_min(1e-30))


def normal(*shape, dtype, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def gates(kind, B, H, K, dtype):
    shape = {"none": None, "fixed": (H,), "head": (B, H), "channel": (B, H, K)}[kind]
    if shape is None:
        return None
    g = -normal(*shape, dtype=dtype, seed=9).abs()
    g.view(-1)[0] = float("-inf")  # a full reset somewhere
    return g


def wide(x):
    """x as a slice of a wider buffer: its heads are not adjacent."""
    return torch.cat([x, x + 1], -1)[..., : x.shape[-1]]


def decay(gate, K, V, dtype, with_state, in_place=False):
    B, H, dtype = 2, 3, DTYPES[dtype]
    q, k = (wide(normal(B, H, K, dtype=dtype, seed=s)) for s in (0, 1))
    v, g = normal(B, H, V, dtype=dtype, seed=2), gates(gate, B, H, K, dtype)
    state = normal(B, H, K, V, dtype=torch.float32, seed=3) if with_state else None
    exact = [None if t is None else t.double() for t in (q, k, v, g, state)]
    g64 = exact[3] if gate in ("none", "fixed") else exact[3].unsqueeze(1)
    expected = decay_reference.decay_attention(*(t.unsqueeze(1) for t in exact[:3]), g64, 0.3, exact[4])
    o, after = step_triton.decay_attention_step(q, k, v, g, 0.3, state, in_place=in_place)
    assert o.dtype == dtype
    assert (after is state) == in_place
    return {"o": relative_rms(o.unsqueeze(1), expected[0]), "state": relative_rms(after, expected[1])}


def delta(gate, K, V, R, dtype, with_state, in_place=False):
    B, H, Hv, dtype = 2, 2, 4, DTYPES[dtype]
    q = wide(normal(B, H, K, dtype=dtype, seed=0))
    k = l2_norm(normal(B, R, H, K, dtype=dtype, seed=1))
    v, beta = wide(normal(B, R, Hv, V, dtype=dtype, seed=2)), normal(B, R, Hv, dtype=dtype, seed=4).sigmoid()
    g = gates(gate, B, Hv, K, dtype)
    state = normal(B, Hv, K, V, dtype=torch.float32, seed=3) if with_state else None
    exact = [None if t is None else t.double() for t in (q, k, v, beta, g, state)]
    tokens = [None if t is None else t.unsqueeze(1) for t in exact[:5]]
    expected = delta_reference.delta_rule(*tokens, 0.3, exact[5])
    o, after = step_triton.delta_rule_step(q, k, v, beta, g, 0.3, state, in_place=in_place)
    assert o.dtype == dtype
    assert (after is state) == in_place
    return {"o": relative_rms(o.unsqueeze(1), expected[0]), "state": relative_rms(after, expected[1])}


def scan(dtype, with_state, in_place=False):
    x, g = normal(3, 600, dtype=DTYPES[dtype], seed=0), -normal(3, 600, dtype=DTYPES[dtype], seed=1).abs()
    state = normal(3, 600, dtype=torch.float32, seed=2) if with_state else None
    expected = x.double() if state is None else g.double().exp() * state.double() + x.double()
    o, after = step_triton.gated_scan_step(x, g, state, in_place=in_place)
    assert (after is state) == in_place
    return {"o": relative_rms(o, expected), "state": relative_rms(after, expected)}


def many_states():
    """Enough states for the wide tiles, and values that do not fill the last of them."""
    B, H, K, V = 32, 8, 4, 40
    q, k, v = (normal(B, H, n, dtype=torch.float32, seed=n) for n in (K, K, V))
    state = normal(B, H, K, V, dtype=torch.float32, seed=3)
    expected = decay_reference.decay_attention(*(t.double().unsqueeze(1) for t in (q, k, v)), None, 1.0, state.double())
    o, after = step_triton.decay_attention_step(q, k, v, None, 1.0, state)
    narrow, wide = step_triton.config(4, K, V)[0], step_triton.config(B * H, K, V)[0]
    return {
        "o": relative_rms(o.unsqueeze(1), expected[0]), "state": relative_rms(after, expected[1]),
        "blocks": [narrow, wide],
    }  # fmt: skip


def poisoned():
    """torch.empty returns NaN everywhere: every element of every output must have been written."""
    empty = torch.empty
    torch.empty = lambda *a, **k: empty(*a, **k).fill_(float("nan"))
    try:
        q, k, v = (normal(1, 2, n, dtype=torch.float32, seed=n) for n in (12, 12, 20))
        beta = torch.rand(1, 1, 2)
        outputs = [
            *step_triton.decay_attention_step(q, k, v, None, 1.0),
            *step_triton.delta_rule_step(q, k.unsqueeze(1), v.unsqueeze(1), beta, None, 1.0),
            *step_triton.gated_scan_step(q[0], q[0], None),
        ]
    finally:
        torch.empty = empty
    return [int(t.isnan().sum()) for t in outputs]


def refused():
    q = torch.randn(1, 1, 4)
    messages = []
    for state in (None, torch.zeros(1, 1, 4, 4, dtype=torch.float16), torch.zeros(1, 1, 4, 4).transpose(2, 3)):
        try:
            step_triton.decay_attention_step(q, q, q, None, 1.0, state, in_place=True)
        except ValueError as error:
            messages.append(str(error))
    return messages


def growth():
    """A positive log-decay gives NaN in its head and nowhere else."""
    q, state = torch.randn(1, 2, 4), torch.randn(1, 2, 4, 4)
    o, after = step_triton.decay_attention_step(q, q, q, torch.tensor([[-0.1, 0.1]]), 1.0, state)
    return [bool(t[0, head].isnan().all()) for t in (o, after) for head in (0, 1)]


def registered():
    utilities = ("test_schema", "test_autograd_registration", "test_faketensor")
    q, state, beta = torch.randn(1, 2, 4), torch.randn(1, 2, 4, 4), torch.rand(1, 1, 2)
    k = q.unsqueeze(1)
    library = torch.ops.latentcot
    for operator, arguments in (
        (library.decay_attention_step, (q, q, q, None, 1.0, None)),
        (library.decay_attention_step_in_place, (q, q, q, None, 1.0, state)),
        (library.delta_rule_step, (q, k, k, beta, None, 1.0, state)),
        (library.delta_rule_step_in_place, (q, k, k, beta, None, 1.0, state)),
        (library.gated_scan_step, (q[0], q[0], None)),
        (library.gated_scan_step_in_place, (q[0], q[0], torch.randn(2, 4))),
    ):
        torch.library.opcheck(operator.default, arguments, test_utils=utilities)

    def decode(q, state):
        return step_triton.decay_attention_step(q, q, q, None, 1.0, state, in_place=True)[0]

    graph = torch.compile(decode, fullgraph=True, backend="aot_eager")
    one, other = state.clone(), state.clone()
    return torch.equal(graph(q, one), decode(q, other)) and torch.equal(one, other)


CHECKS = {
    **{
        f"decay-{dtype}-{gate}-{K}x{V}-{'state' if state else 'zero'}": (decay, (gate, K, V, dtype, state))
        for dtype in DTYPES
        for gate, K, V, state in (
            ("none", 16, 16, True), ("fixed", 12, 20, True), ("head", 16, 24, True), ("channel", 12, 20, True),
            ("channel", 16, 16, False),
        )
    },
    "decay-fp32-in_place": (decay, ("channel", 12, 20, "fp32", True, True)),
    **{
        f"delta-{dtype}-{gate}-{K}x{V}-R{R}-{'state' if state else 'zero'}": (delta, (gate, K, V, R, dtype, state))
        for dtype in DTYPES
        for gate, K, V, R, state in (
            ("none", 16, 16, 1, True), ("head", 12, 20, 2, True), ("channel", 12, 20, 3, True),
            ("head", 16, 16, 1, False), ("channel", 12, 16, 2, False),
        )
    },
    "delta-fp32-in_place": (delta, ("head", 12, 20, 2, "fp32", True, True)),
    "scan-fp32-state": (scan, ("fp32", True)),
    "scan-fp16-zero": (scan, ("fp16", False)),
    "scan-fp16-in_place": (scan, ("fp16", True, True)),
    "many_states": (many_states, ()),
    "poisoned": (poisoned, ()),
    "refused": (refused, ()),
    "growth": (growth, ()),
    "registered": (registered, ()),
}  # fmt: skip

if __name__ == "__main__":
    run_checks(CHECKS)
