"""Checks of the Triton decay attention in Triton's interpreter; run as a script by test_decay_attention_triton.py.

The interpreter is chosen by an environment variable that must be set before Triton is imported and must not reach the
other tests, hence a process of its own. Prints one JSON object: check name -> numbers, or the traceback of a check that
raised. Names as arguments select checks.
"""

# Operators are called with ** dictionaries of tensors, which a type checker cannot match with their parameters.
# pyright: reportArgumentType=false, reportCallIssue=false
# pyright: reportOptionalMemberAccess=false, reportOptionalSubscript=false

import warnings
from itertools import pairwise

import torch
from interpreter import run_checks

from latentcot.kernels import Bidirectional, BlockCausal, Causal, hgrn2_attention
from latentcot.kernels import decay_attention as public
from latentcot.kernels.decay_attention import reference
from latentcot.kernels.decay_attention import triton as kernels
from latentcot.kernels.launch import Launch, override
from latentcot.kernels.visibility import INSIDES

DTYPES = {"fp32": torch.float32, "fp16": torch.float16}
GATES = ("none", "head", "token", "channel")
NAMES = ("q", "k", "v", "log_decay", "initial_state")


def relative_rms(actual, expected):
    actual, expected = actual.detach().double(), expected.detach().double()
    assert actual.shape == expected.shape, f"{tuple(actual.shape)} against {tuple(expected.shape)}"
    return float((actual - expected).norm() / expected.norm().clamp_min(1e-30))


def inputs(gate, S, K, V, dtype="fp32", *, strength=1.0, B=2, H=2, N=None, state=True, seed=0):
    """Tensors of one call by name; gates and states are float32."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    shape = {"none": None, "head": (H,), "token": (B, S, H), "channel": (B, S, H, K)}[gate]
    return {
        "q": normal(B, S, H, K).to(DTYPES[dtype]),
        "k": normal(B, S, H, K).to(DTYPES[dtype]),
        "v": normal(B, S, H, V).to(DTYPES[dtype]),
        "log_decay": None if shape is None else -strength * torch.rand(*shape, generator=generator),
        "initial_state": normal(B if N is None else N, H, K, V) if state else None,
    }


def small_chunks():
    """Launch shapes small enough for a few tokens to be several chunks."""
    names = ("decay_forward", "decay_overlap", "decay_pairs", "decay_values", "decay_gradients")
    return override(**dict.fromkeys(names, Launch(16, 16, 4, 1)))


def by_kernel(q, k, v, log_decay, initial_state, cu_seqlens=None, reverse=False):
    return kernels.decay_attention(q, k, v, log_decay, q.shape[-1] ** -0.5, initial_state, cu_seqlens, reverse=reverse)


def by_definition(q, k, v, log_decay, initial_state):
    return reference.decay_attention(q, k, v, log_decay, q.shape[-1] ** -0.5, initial_state)


def from_right(q, k, v, log_decay, initial_state):
    """The definition on flipped tokens. The weight of token j for reader i < j holds the gates of i+1 … j."""
    if log_decay is not None:
        log_decay = log_decay.expand(q.shape[:3]) if log_decay.dim() == 1 else log_decay
        log_decay = torch.cat([torch.zeros_like(log_decay[:, :1]), log_decay[:, 1:].flip(1)], 1)
    o, state = by_definition(q.flip(1), k.flip(1), v.flip(1), log_decay, initial_state)
    return o.flip(1), state


def upstream(data, N=None, seed=1):
    generator = torch.Generator().manual_seed(seed)
    B, _, H, V = data["v"].shape
    do = torch.randn(data["v"].shape, generator=generator).to(data["v"].dtype)
    return do, torch.randn(B if N is None else N, H, data["k"].shape[-1], V, generator=generator)


def run(function, data, do, dstate, **options):
    """Outputs, last state and the gradients of a random projection of both, by name; ``dstate`` None: of o alone."""
    leaves = {n: t.clone().requires_grad_() for n, t in data.items() if t is not None}
    o, state = function(**{n: leaves.get(n) for n in data}, **options)
    loss = (o * do.to(o)).sum()
    if dstate is not None:
        loss = loss + (state * dstate.to(state)).sum()
    grads = torch.autograd.grad(loss, list(leaves.values()))
    found = {"o": o, **{f"d_{n}": g for n, g in zip(leaves, grads, strict=True)}}
    return found if state is None else {"state": state, **found}


def wide(data):
    return {n: None if t is None else t.double() for n, t in data.items()}


def check_dtypes(actual, data):
    for name, tensor in actual.items():
        dtype = torch.float32 if name == "state" else data[name[2:] if name != "o" else "v"].dtype
        assert tensor.dtype == dtype, f"{name} has dtype {tensor.dtype}, expected {dtype}"


def compared(data, definition=by_definition, N=None, state=True, **options):
    do, dstate = upstream(data, N)
    dstate = dstate if state else None
    expected = run(definition, wide(data), do, dstate)
    with small_chunks():
        actual = run(by_kernel, data, do, dstate, **options)
    check_dtypes(actual, data)
    return actual, expected


def errors(data, definition=by_definition, **options):
    actual, expected = compared(data, definition, **options)
    return {name: relative_rms(actual[name], expected[name]) for name in expected}


def compare(gate, S, K, V, dtype, options):
    return errors(inputs(gate, S, K, V, dtype, **options))


def reverse(gate, dtype, state=False):
    """Right to left, with a state that enters at the right end or without."""
    data = inputs(gate, 37, 24, 20, dtype, state=state)
    found = errors(data, from_right, state=False, reverse=True)
    found.pop("state")  # nothing reads the state at the left end
    return found


CUTS = [0, 1, 6, 41]


def loop(initial_state, log_decay, **tokens):
    """The sequences of a packed row one after the other."""
    parts = []
    for n, (a, b) in enumerate(pairwise(CUTS)):
        gate = log_decay if log_decay is None or log_decay.dim() == 1 else log_decay[:, a:b]
        part = {name: t[:, a:b] for name, t in tokens.items()}
        parts.append(by_definition(**part, log_decay=gate, initial_state=initial_state[n : n + 1]))
    return torch.cat([o for o, _ in parts], 1), torch.cat([state for _, state in parts])


def packed(gate, dtype):
    return errors(inputs(gate, 41, 16, 16, dtype, B=1, N=3), loop, N=3, cu_seqlens=torch.tensor(CUTS))


def strong(gate, dtype):
    """Gates down to -60. Where one constant forgets everything at every token, its gradient (1e-13 and below) is the
    difference of sums that are not small: its error is measured against these, sum |q . dq|.
    """
    data = inputs(gate, 37, 24, 20, dtype, strength=60.0)
    actual, expected = compared(data)
    found = {name: relative_rms(actual[name], expected[name]) for name in expected}
    if gate == "head":
        summed = (data["q"].double() * expected["d_q"]).sum(-1).abs().sum((0, 1))
        found["d_log_decay"] = float((actual["d_log_decay"].double() - expected["d_log_decay"]).norm() / summed.norm())
    return found


def infinite(gate):
    """A full reset: a gate of -inf forgets what came before, without a NaN anywhere, in the gradients neither."""
    data = inputs(gate, 37, 24, 20)
    data["log_decay"][:, 7] = data["log_decay"][:, 16] = float("-inf")
    return errors(data)


def growth(gate):
    """A gate above zero at token 20 of the second row: the share of finite results before, from there on, beside."""
    data = inputs(gate, 37, 24, 20)
    data["log_decay"][1, 20] = 0.1
    with small_chunks():
        o, state = by_kernel(**data)
    parts = o[0], o[1, :16], o[1, 20:], state[0], state[1]
    return [float(t.isfinite().double().mean()) for t in parts]


VISIBILITIES = {
    "causal": Causal(),
    "own": Bidirectional(),
    "next": Bidirectional(gate="next"),
    **{f"block-{inside}": BlockCausal(4, inside=inside) for inside in INSIDES},
}


def operator(gate, visibility):
    """The public operator, rows of a batch and packed, against its own reference back end."""
    chosen = VISIBILITIES[visibility]
    with_state = not isinstance(chosen, Bidirectional)
    found = {}
    for cuts in (None, torch.tensor([0, 5, 6, 19])):
        data = inputs(
            gate, 19, 16, 16, H=1, B=2 if cuts is None else 1, N=None if cuts is None else 3, state=with_state
        )
        do, dstate = upstream(data, None if cuts is None else 3)
        dstate = dstate if with_state else None
        options = {"visibility": chosen, "cu_seqlens": cuts, "output_state": with_state}
        expected = run(public, wide(data), do, dstate, backend="reference", **options)
        with small_chunks():
            actual = run(public, data, do, dstate, backend="triton", **options)
        check_dtypes(actual, data)
        found |= {f"{n}{'' if cuts is None else ' packed'}": relative_rms(actual[n], expected[n]) for n in expected}
    return found


def poisoned(gate, reverse=False):
    """torch.empty returns NaN everywhere: every element of every output must have been written."""
    empty, empty_like = torch.empty, torch.empty_like

    def poison(t):
        return t.fill_(float("nan")) if t.dtype.is_floating_point else t

    torch.empty = lambda *a, **k: poison(empty(*a, **k))
    torch.empty_like = lambda *a, **k: poison(empty_like(*a, **k))
    try:
        data = inputs(gate, 37, 24, 20)
        with small_chunks():
            if reverse and gate == "channel":
                data = {**data, "initial_state": None}
            found = run(by_kernel, data, *upstream(data), reverse=reverse)
    finally:
        torch.empty, torch.empty_like = empty, empty_like
    return {name: int(t.isnan().sum()) for name, t in found.items()}


def strided(gate):
    """q inside a wider buffer, k head-major, v and the gates token-major, an expanded upstream gradient."""
    data = inputs(gate, 21, 16, 16)
    expected = run(by_definition, wide(data), torch.ones(()), torch.zeros(()))
    buffer = torch.randn(2, 21, 2, 48)
    buffer[..., 16:32] = data["q"]
    leaves = {
        "q": buffer.requires_grad_(),
        "k": data["k"].transpose(1, 2).contiguous().transpose(1, 2).requires_grad_(),
        "v": data["v"].transpose(0, 1).contiguous().transpose(0, 1).requires_grad_(),
        "log_decay": data["log_decay"].transpose(1, 2).contiguous().transpose(1, 2).requires_grad_(),
    }
    with small_chunks():
        o, _ = by_kernel(**{**leaves, "q": leaves["q"][..., 16:32]}, initial_state=data["initial_state"])
        o.sum().backward()
    found = {n: t.grad for n, t in leaves.items()}
    found["q"] = found["q"][..., 16:32]
    return {f"d_{n}": relative_rms(found[n], expected[f"d_{n}"]) for n in found} | {"o": relative_rms(o, expected["o"])}


def some_gradients(gate):
    """Gradients of the output alone and of the state alone add up to those of both."""
    data = {n: t.requires_grad_() for n, t in inputs(gate, 20, 16, 16).items() if t is not None}
    leaves = list(data.values())
    do, dstate = upstream(data)
    with small_chunks():
        o, state = by_kernel(**{n: data.get(n) for n in NAMES})
        by_output = torch.autograd.grad(o, leaves, do, retain_graph=True)
        by_state = torch.autograd.grad(state, leaves, dstate, retain_graph=True)
        both = torch.autograd.grad([o, state], leaves, [do, dstate])
    return {f"d_{n}": relative_rms(a + b, t) for n, a, b, t in zip(data, by_output, by_state, both, strict=True)}


def repeated_runs(gate):
    """Two runs give the same bits, and without gradients the forward gives them too.

    A constant per head that needs a gradient is spread over its tokens, so its plain forward is compared with that.
    """
    data = inputs(gate, 37, 24, 20)
    with small_chunks():
        first, second = (run(by_kernel, data, *upstream(data)) for _ in range(2))
        if gate == "head":
            data["log_decay"] = data["log_decay"].expand(data["q"].shape[:3])
        with torch.no_grad():
            o, state = by_kernel(**data)
    same = {name: bool(torch.equal(first[name], second[name])) for name in first}
    return same | {"plain": bool(torch.equal(o, first["o"]) and torch.equal(state, first["state"]))}


def compiled(gate):
    """One graph, forward and backward, with the same numbers as without the compiler."""
    data = inputs(gate, 20, 16, 16)
    do, dstate = upstream(data)
    with small_chunks():
        expected = run(by_kernel, data, do, dstate)
        actual = run(torch.compile(by_kernel, fullgraph=True, backend="aot_eager"), data, do, dstate)
    return {name: bool(torch.equal(actual[name], expected[name])) for name in expected}


def opchecked(tensors, scale, reverse):
    """What torch.library checks of an operator: schema, autograd registration, fake tensors, symbolic shapes."""
    arguments = (*(t if t is None else t.requires_grad_() for t in tensors), None, scale, reverse)
    operators = torch.ops.latentcot
    with small_chunks():
        found = torch.library.opcheck(operators.decay_attention_forward.default, arguments)
        o, last, *kept = operators.decay_attention_forward(*arguments)
        gradient = (torch.randn_like(o), torch.randn_like(last), *arguments[:-2], last, *kept, *arguments[-2:])
        gradient = tuple(t.detach() if isinstance(t, torch.Tensor) else t for t in gradient)
        found_backward = torch.library.opcheck(
            operators.decay_attention_backward.default,
            gradient,
            test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"),
        )
    return {**found, **{f"backward_{n}": r for n, r in found_backward.items()}}


def registered(gate):
    """``[B,S,H]`` from left to right, ``[B,S,H,K]`` from right to left: each has passes that the other lacks."""
    q, k, v, log_decay, state = inputs(gate, 20, 16, 16, B=1, H=1).values()
    return opchecked((q, k, v, log_decay, None, state), 0.25, gate == "channel")


def registered_bound():
    data = raw_inputs(20, 0.3, K=16, V=16, B=1)
    return opchecked((data["q"], data["f"], data["i"], None, data["lower_bound"], data["initial_state"]), 0.25, False)


def second_derivative():
    """First derivatives only: asking for more raises instead of answering zero."""
    data = {n: t.requires_grad_() for n, t in inputs("token", 5, 16, 16).items()}
    with small_chunks():
        o, _ = by_kernel(**data)
    try:
        torch.autograd.grad(o.sum(), [data["q"]], create_graph=True)
    except RuntimeError as error:
        return str(error)
    return "no error"


def too_wide():
    """Messages of the public operators for widths that the kernels do not take."""
    messages = []
    for K, V in ((257, 16), (16, 513)):
        q, v = torch.randn(1, 3, 1, K), torch.randn(1, 3, 1, V)
        for call in (
            lambda q, v: public(q, q, v, backend="triton"),
            lambda q, v: hgrn2_attention(q, q, v, backend="triton"),
        ):
            try:
                call(q, v)
                messages.append("no error")
            except ValueError as error:
                messages.append(str(error))
    return messages


# HGRN2 from its projections: activations and gates inside the kernels


def raw_inputs(S, bound, dtype="fp32", *, spread=1.0, K=24, V=20, B=2, N=None, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    return {
        "q": normal(B, S, 2, K).to(DTYPES[dtype]),
        "f": (spread * normal(B, S, 2, K)).to(DTYPES[dtype]),
        "i": normal(B, S, 2, V).to(DTYPES[dtype]),
        "lower_bound": None if bound is None else torch.full((2, K), bound),
        "initial_state": normal(B if N is None else N, 2, K, V),
    }


def fused(S, bound, dtype, options, cuts=None):
    N = None if cuts is None else len(cuts) - 1
    data = raw_inputs(S, bound, dtype, N=N, **options)
    do, dstate = upstream({"v": data["i"], "k": data["q"]}, N)
    calls = {"cu_seqlens": None if cuts is None else torch.tensor(cuts), "output_state": True}
    expected = run(hgrn2_attention, wide(data), do, dstate, backend="reference", **calls)
    with small_chunks():
        actual = run(hgrn2_attention, data, do, dstate, backend="triton", **calls)
    check_dtypes({n: t for n, t in actual.items() if n != "o"}, data)
    assert actual["o"].dtype == data["i"].dtype
    return {name: relative_rms(actual[name], expected[name]) for name in expected}


def fused_poisoned():
    empty, empty_like = torch.empty, torch.empty_like

    def poison(t):
        return t.fill_(float("nan")) if t.dtype.is_floating_point else t

    torch.empty = lambda *a, **k: poison(empty(*a, **k))
    torch.empty_like = lambda *a, **k: poison(empty_like(*a, **k))
    try:
        data = raw_inputs(37, 0.3)
        gradients = upstream({"v": data["i"], "k": data["q"]})
        with small_chunks():
            found = run(hgrn2_attention, data, *gradients, backend="triton", output_state=True)
    finally:
        torch.empty, torch.empty_like = empty, empty_like
    return {name: int(t.isnan().sum()) for name, t in found.items()}


def fused_compiled():
    data = raw_inputs(20, 0.3)
    gradients = upstream({"v": data["i"], "k": data["q"]})
    options = {"backend": "triton", "output_state": True}
    with small_chunks():
        expected = run(hgrn2_attention, data, *gradients, **options)
        actual = run(torch.compile(hgrn2_attention, fullgraph=True, backend="aot_eager"), data, *gradients, **options)
    return {name: bool(torch.equal(actual[name], expected[name])) for name in expected}


FUSED = {
    "S1": (1, 0.3, {}),
    "S37": (37, 0.3, {}),
    "S37-unbounded": (37, None, {}),
    "S37-unbounded-wide": (37, None, {"spread": 4.0}),
    "S37-zero": (37, 0.0, {}),
    "S20-high": (20, 0.9, {"spread": 8.0}),
    "S140-windows": (140, 0.3, {"K": 16, "V": 16, "B": 1}),
}
COMPARISONS = {
    "S1": (1, 24, 20, {}),
    "S5": (5, 24, 20, {"state": False}),
    "S16": (16, 16, 16, {"state": False}),
    "S37": (37, 24, 20, {}),
    "S300-windows": (300, 16, 16, {"B": 1, "H": 1, "state": False}),
}
COMPILED = ("token", "channel")
CHECKS = {
    **{
        f"compare-{dtype}-{gate}-{name}": (compare, (gate, *c[:3], dtype, c[3]))
        for dtype in DTYPES for gate in GATES for name, c in COMPARISONS.items()
    },
    **{f"reverse-{dtype}-{gate}": (reverse, (gate, dtype)) for dtype in DTYPES for gate in GATES},
    **{f"reverse_state-{gate}": (reverse, (gate, "fp32", True)) for gate in GATES},
    **{f"packed-{dtype}-{gate}": (packed, (gate, dtype)) for dtype in DTYPES for gate in GATES},
    **{f"strong-{dtype}-{gate}": (strong, (gate, dtype)) for dtype in DTYPES for gate in GATES[1:]},
    **{f"{f.__name__}-{gate}": (f, (gate,)) for f in (infinite, growth, strided) for gate in ("token", "channel")},
    **{f"operator-{gate}-{name}": (operator, (gate, name)) for gate in GATES for name in VISIBILITIES},
    **{f"{f.__name__}-{gate}": (f, (gate,)) for f in (poisoned, some_gradients, repeated_runs) for gate in GATES},
    **{f"poisoned_reverse-{gate}": (poisoned, (gate, True)) for gate in ("token", "channel")},
    **{f"{f.__name__}-{gate}": (f, (gate,)) for f in (compiled, registered) for gate in COMPILED},
    "registered-bound": (registered_bound, ()),
    "second_derivative": (second_derivative, ()),
    "too_wide": (too_wide, ()),
    **{f"fused-{dtype}-{name}": (fused, (*c[:2], dtype, c[2])) for dtype in DTYPES for name, c in FUSED.items()},
    **{f"fused_packed-{dtype}": (fused, (41, 0.3, dtype, {"B": 1}, CUTS)) for dtype in DTYPES},
    "fused_poisoned": (fused_poisoned, ()),
    "fused_compiled": (fused_compiled, ()),
}  # fmt: skip

if __name__ == "__main__":
    torch.set_num_threads(1)
    # NumPy reports overflow in lanes that a kernel computes and then does not select
    warnings.filterwarnings("ignore", category=RuntimeWarning, module="triton")
    run_checks(CHECKS)
