"""Checks of the Triton delta rule in Triton's interpreter; run as a script by test_delta_rule_triton.py.

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
from interpreter import run_checks

from latentcot.kernels import l2_norm
from latentcot.kernels.delta_rule import chunked, reference
from latentcot.kernels.delta_rule import triton as kernels
from latentcot.kernels.delta_rule.fused import gated_delta_net
from latentcot.kernels.launch import Launch, override

DTYPES = {"fp32": torch.float32, "fp16": torch.float16}
NAMES = ("q", "k", "v", "beta", "log_decay", "initial_state")


def relative_rms(actual, expected):
    actual, expected = actual.detach().double(), expected.detach().double()
    assert actual.shape == expected.shape, f"{tuple(actual.shape)} against {tuple(expected.shape)}"
    return float((actual - expected).norm() / expected.norm().clamp_min(1e-30))


def inputs(S, K, V, dtype, *, gate="token", B=1, H=1, m=1, N=None, state=True, seed=0):
    """Tensors of one call by name; gates, strengths and states are float32."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    def uniform(*shape):
        return torch.rand(*shape, generator=generator)

    shape = {"none": None, "token": (B, S, H * m), "channel": (B, S, H * m, K)}[gate]
    return {
        "q": normal(B, S, H, K).to(dtype),
        "k": l2_norm(normal(B, S, H, K)).to(dtype),
        "v": normal(B, S, H * m, V).to(dtype),
        "beta": uniform(B, S, H * m),
        "log_decay": None if shape is None else -uniform(*shape),
        "initial_state": normal(B if N is None else N, H * m, K, V) if state else None,
    }


def chunks_of(chunk, keys_chunk=None, block=16):
    """Launch shapes small enough for a few tokens to be several chunks."""
    states, keys = Launch(chunk, block, 4, 1), Launch(keys_chunk or chunk, block, 4, 1)
    vector = dict.fromkeys(("delta_channel_forward", "delta_channel_reverse"), states)
    vector |= dict.fromkeys(("delta_channel_left", "delta_channel_right"), keys)
    return override(delta_forward=states, delta_reverse=states, delta_left=keys, delta_right=keys, **vector)


def by_kernel(q, k, v, beta, log_decay, initial_state, cu_seqlens=None):
    return kernels.delta_rule(q, k, v, beta, log_decay, q.shape[-1] ** -0.5, initial_state, cu_seqlens)


def by_definition(q, k, v, beta, log_decay, initial_state):
    k, v, beta = k.unsqueeze(2), v.unsqueeze(2), beta.unsqueeze(2)
    return reference.delta_rule(q, k, v, beta, log_decay, q.shape[-1] ** -0.5, initial_state)


def run(function, data, do, dstate, **options):
    """Outputs, last state and the gradients of a random projection of both, by name."""
    leaves = {n: t.clone().requires_grad_() for n, t in data.items() if t is not None}
    o, state = function(**{n: leaves.get(n) for n in NAMES}, **options)
    loss = (o * do.to(o)).sum() + (state * dstate.to(state)).sum()
    grads = torch.autograd.grad(loss, list(leaves.values()))
    return {"o": o, "state": state, **{f"d_{n}": g for n, g in zip(leaves, grads, strict=True)}}


def wide(data):
    return {n: None if t is None else t.double() for n, t in data.items()}


def upstream(data, N=None, seed=1):
    generator = torch.Generator().manual_seed(seed)
    B, _, Hv, V = data["v"].shape
    do = torch.randn(data["v"].shape, generator=generator).to(data["v"].dtype)
    return do, torch.randn(B if N is None else N, Hv, data["k"].shape[-1], V, generator=generator)


def errors(data, chunk, keys_chunk=None, block=16):
    do, dstate = upstream(data)
    expected = run(by_definition, wide(data), do, dstate)
    with chunks_of(chunk, keys_chunk, block):
        actual = run(by_kernel, data, do, dstate)
    for name, tensor in actual.items():
        dtype = torch.float32 if name == "state" else data[name[2:] if name != "o" else "v"].dtype
        assert tensor.dtype == dtype, f"{name} has dtype {tensor.dtype}, expected {dtype}"
    return {name: relative_rms(actual[name], expected[name]) for name in expected}


def compare(S, chunk, keys_chunk, dtype, options):
    K, V = options.pop("K", 16), options.pop("V", 16)
    block = options.pop("block", 16)
    return errors(inputs(S, K, V, DTYPES[dtype], **options), chunk, keys_chunk, block)


def packed(dtype, gate="token"):
    """Four sequences in one row against the loop over them."""
    cuts = [0, 1, 17, 22, 61]
    data = inputs(61, 16, 24, DTYPES[dtype], N=4, H=1, m=2, gate=gate)
    do, dstate = upstream(data, N=4)

    def loop(initial_state, **tokens):
        parts = [
            by_definition(
                **{n: None if t is None else t[:, a:b] for n, t in tokens.items()},
                initial_state=initial_state[n : n + 1],
            )
            for n, (a, b) in enumerate(pairwise(cuts))
        ]
        return torch.cat([p[0] for p in parts], 1), torch.cat([p[1] for p in parts], 0)

    expected = run(loop, wide(data), do, dstate)
    with chunks_of(16):
        actual = run(by_kernel, data, do, dstate, cu_seqlens=torch.tensor(cuts))
    return {name: relative_rms(actual[name], expected[name]) for name in expected}


def gates(kind, gate="token"):
    """No decay written as zeros, full resets between mild gates, and -inf."""
    data = inputs(40, 16, 16, torch.float32, gate=gate)
    if kind == "zero":
        data["log_decay"].zero_()
    elif kind == "resets":
        data["log_decay"][:, ::5], data["log_decay"][:, 1::5] = -30.0, 0.0
    elif kind == "large":  # running sums of a thousand: their differences must not lose digits
        data["log_decay"][:, 3::16] = -1000.0
    elif kind == "infinite":
        data["log_decay"][:, 7] = data["log_decay"][:, 16] = float("-inf")
    return errors(data, 16)


def forgotten(rate, gate="token"):
    """exp(rate) at every token: nothing survives one, and the gates' gradient is as small as what survives."""
    data = inputs(40, 16, 16, torch.float32, gate=gate, state=False)
    data["log_decay"].fill_(rate)
    return errors(data, 16)


def no_decay_at_all(value, gate="token"):
    """A log-decay above zero, or NaN, at token 20 of the second row: whether rows are finite, up to it and from it."""
    data = inputs(40, 16, 16, torch.float32, B=2, gate=gate)
    data["log_decay"][1, 20] = value
    with chunks_of(16):
        o, state = by_kernel(**data)
    parts = o[0], o[1, :16], o[1, 20:], state[0], state[1]
    return [float(t.isfinite().double().mean()) for t in parts]


def strengths(kind, dtype, gate="none"):
    """Beta of zero; tiny beta."""
    data = inputs(70, 16, 16, DTYPES[dtype], gate=gate)
    if kind == "zero":
        data["beta"].zero_()
    elif kind == "tiny":
        data["beta"] *= 1e-3
    return errors(data, 64, 32)


def repeated(dtype, gate="none", beta=1.99):
    """Worst errors on one key repeated: of the kernels, and of the chunk form in float32 by forward substitution."""
    data = inputs(70, 16, 16, DTYPES[dtype], gate=gate)
    data["k"][:] = data["k"][:, :1]
    data["beta"].fill_(beta)
    if data["log_decay"] is not None:  # without forgetting, or the repetition would not matter
        data["log_decay"] *= 1e-4

    def substitution(initial_state, **tokens):
        return chunked.delta_rule(**tokens, scale=0.25, initial_state=initial_state, chunk_size=64)

    single = {n: None if t is None else t.float() for n, t in data.items()}
    do, dstate = upstream(data)
    expected, by_substitution = (
        run(f, d, do, dstate) for f, d in ((by_definition, wide(data)), (substitution, single))
    )
    found = errors(data, 64, 32)
    return [max(found.values()), max(relative_rms(by_substitution[name], expected[name]) for name in expected)]


def split(gate="token"):
    """Segments of 1, 7, 20 and 12 tokens with the state carried over against the single pass."""
    data = inputs(40, 16, 16, torch.float32, gate=gate)
    do, dstate = upstream(data)

    def segments(initial_state, **tokens):
        outputs = []
        for a, b in pairwise([0, 1, 8, 28, 40]):
            part = {n: None if t is None else t[:, a:b] for n, t in tokens.items()}
            o, initial_state = by_kernel(**part, initial_state=initial_state)
            outputs.append(o)
        return torch.cat(outputs, 1), initial_state

    with chunks_of(16):
        expected, actual = run(by_kernel, data, do, dstate), run(segments, data, do, dstate)
    return {name: relative_rms(actual[name], expected[name]) for name in expected}


def strided(gate="token"):
    """Slices of wider buffers, head-major storage, an expanded upstream gradient."""
    data = inputs(21, 16, 16, torch.float32, B=2, H=2, gate=gate)
    expected = run(by_definition, wide(data), torch.ones(()), torch.zeros(()))
    buffer = torch.randn(2, 21, 2, 48)
    buffer[..., 16:32] = data["q"]
    leaves = {
        "q": buffer.requires_grad_(),
        "k": data["k"].transpose(1, 2).contiguous().transpose(1, 2).requires_grad_(),
        "v": data["v"].transpose(0, 1).contiguous().transpose(0, 1).requires_grad_(),
        "beta": data["beta"].mT.contiguous().mT.requires_grad_(),
        "log_decay": data["log_decay"].transpose(1, 2).contiguous().transpose(1, 2).requires_grad_(),
    }
    with chunks_of(16):
        o, _ = by_kernel(**{**leaves, "q": leaves["q"][..., 16:32]}, initial_state=data["initial_state"])
        o.sum().backward()
    found = {n: t.grad for n, t in leaves.items()}
    found["q"] = found["q"][..., 16:32]
    return {f"d_{n}": relative_rms(found[n], expected[f"d_{n}"]) for n in found} | {"o": relative_rms(o, expected["o"])}


def poisoned(gate):
    """torch.empty returns NaN everywhere: every element of every output must have been written."""
    empty, empty_like = torch.empty, torch.empty_like

    def poison(t):
        return t.fill_(float("nan")) if t.dtype.is_floating_point else t

    torch.empty = lambda *a, **k: poison(empty(*a, **k))
    torch.empty_like = lambda *a, **k: poison(empty_like(*a, **k))
    try:
        data = inputs(37, 24, 20, torch.float32, B=2, H=1, m=2, gate=gate)
        with chunks_of(32, 16):
            found = run(by_kernel, data, *upstream(data))
    finally:
        torch.empty, torch.empty_like = empty, empty_like
    return {name: int(t.isnan().sum()) for name, t in found.items()}


def without_gradients(gate="token"):
    """The forward that keeps nothing for a backward gives the same numbers."""
    data = inputs(40, 16, 16, torch.float32, gate=gate)
    with chunks_of(16):
        o, state = by_kernel(**{n: t.requires_grad_() for n, t in data.items()})
        with torch.no_grad():
            o_plain, state_plain = by_kernel(**data)
    return [torch.equal(o, o_plain), torch.equal(state, state_plain), o_plain.requires_grad]


def some_gradients():
    """Gradients of a subset, of the output alone and of the state alone, are those of the whole."""
    data = inputs(20, 16, 16, torch.float32, B=2)
    do, dstate = upstream(data)
    with chunks_of(16):
        for t in data.values():
            t.requires_grad_()
        o, state = by_kernel(**data)
        by_output = torch.autograd.grad(o, list(data.values()), do, retain_graph=True)
        by_state = torch.autograd.grad(state, list(data.values()), dstate, retain_graph=True, allow_unused=True)
        both = torch.autograd.grad([o, state], list(data.values()), [do, dstate])
        data["q"].requires_grad_(False)
        o, _ = by_kernel(**data)
        (d_beta,) = torch.autograd.grad(o, [data["beta"]], do)
    sums = {n: a + b for n, a, b in zip(data, by_output, by_state, strict=True)}
    found = {f"d_{n}": relative_rms(sums[n], t) for n, t in zip(data, both, strict=True)}
    return found | {"d_beta_alone": relative_rms(d_beta, by_output[3])}


def mixed_dtypes():
    """q, k in 16 bits, v in 32: computed in 32; strengths and gates in any dtype; every gradient in its input's."""
    data = inputs(20, 16, 16, torch.float32)
    for name, dtype in (("q", torch.float16), ("k", torch.bfloat16), ("beta", torch.bfloat16)):
        data[name] = data[name].to(dtype)
    data["log_decay"] = data["log_decay"].half()
    return errors(data, 16)


def beyond_32_bits(stride, S):
    """Keys that lie ``stride`` elements a token apart (a sparse file): the last one begins beyond element 2^31."""
    data = inputs(S, 16, 16, torch.float16)
    with tempfile.TemporaryDirectory() as folder, chunks_of(16), torch.no_grad():
        path = Path(folder) / "sparse"
        elements = (S - 1) * stride + 16
        with path.open("wb") as file:
            file.truncate(2 * elements)
        storage = torch.UntypedStorage.from_file(str(path), shared=True, nbytes=2 * elements)
        far = torch.empty(0, dtype=torch.float16).set_(storage, 0, (1, S, 1, 16), (elements, stride, 16, 1))
        far.copy_(data["k"])
        near = by_kernel(**data)
        o, state = by_kernel(**{**data, "k": far})
    return [torch.equal(o, near[0]), torch.equal(state, near[1])]


def compiled(gate="token"):
    """One graph, forward and backward, with the same numbers as without the compiler."""
    data = inputs(20, 16, 16, torch.float32, gate=gate)
    do, dstate = upstream(data)
    with chunks_of(16):
        expected = run(by_kernel, data, do, dstate)
        actual = run(torch.compile(by_kernel, fullgraph=True, backend="aot_eager"), data, do, dstate)
    return {name: bool(torch.equal(actual[name], expected[name])) for name in expected}


def registered():
    """What torch.library checks of an operator: schema, autograd registration, fake tensors, symbolic shapes."""
    data = inputs(20, 16, 16, torch.float32, m=2)
    arguments = (*(data[n].requires_grad_() for n in NAMES[:5]), 0.25, data["initial_state"].requires_grad_(), None)
    with chunks_of(16):
        found = torch.library.opcheck(torch.ops.latentcot.delta_rule_forward.default, (*arguments, True))
        kept = torch.ops.latentcot.delta_rule_forward(*arguments, True)
        state = torch.randn_like(kept[1])
        gradient = (torch.randn_like(kept[0]), state, *arguments, *(t.detach() for t in kept[2:]))
        gradient = tuple(t.detach() if isinstance(t, torch.Tensor) else t for t in gradient)
        found_backward = torch.library.opcheck(
            torch.ops.latentcot.delta_rule_backward.default,
            gradient,
            test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"),
        )
    return {**found, **{f"backward_{n}": r for n, r in found_backward.items()}}


def second_derivative():
    """First derivatives only: asking for more raises instead of answering zero."""
    data = inputs(5, 16, 16, torch.float32)
    with chunks_of(16):
        o, _ = by_kernel(**{n: t.requires_grad_() for n, t in data.items()})
        (d_q,) = torch.autograd.grad(o.sum(), [data["q"]], create_graph=True)
    try:
        torch.autograd.grad(d_q.sum(), [data["k"]])
    except RuntimeError as error:
        return str(error)
    return "no error"


# Gated DeltaNet from its projections: norms and gates inside the kernels


def raw_inputs(S, K, V, dtype, *, m=1, B=1, N=None, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    H = 2
    return {
        "q": (2 * normal(B, S, H, K)).to(dtype),
        "k": normal(B, S, H, K).to(dtype),
        "v": normal(B, S, H * m, V).to(dtype),
        "a": normal(B, S, H * m),
        "b": normal(B, S, H * m),
        "A_log": normal(H * m),
        "dt_bias": normal(H * m),
        "initial_state": normal(B if N is None else N, H * m, K, V),
    }


def run_fused(data, do, dstate, function=gated_delta_net, **options):
    leaves = {n: t.clone().requires_grad_() for n, t in data.items()}
    o, state = function(**leaves, output_state=True, **options)
    loss = (o * do.to(o)).sum() + (state * dstate.to(state)).sum()
    grads = torch.autograd.grad(loss, list(leaves.values()))
    return {"o": o, "state": state, **{f"d_{n}": g for n, g in zip(leaves, grads, strict=True)}}


def fused_errors(data, chunk, keys_chunk=None, N=None, **options):
    do, dstate = upstream(data, N)
    expected = run_fused(wide(data), do, dstate, backend="reference", **options)
    with chunks_of(chunk, keys_chunk):
        actual = run_fused(data, do, dstate, backend="triton", **options)
    assert all(actual[f"d_{n}"].dtype == t.dtype for n, t in data.items())
    found = {name: relative_rms(actual[name], expected[name]) for name in expected}
    # sums over tokens of terms of both signs: relative to what is summed
    for name, term in (("d_dt_bias", expected["d_a"]), ("d_A_log", expected["d_a"] * _softplus_over_sigmoid(data))):
        found[name] = float((actual[name].double() - expected[name]).norm() / term.abs().sum((0, 1)).norm())
    return found


def _softplus_over_sigmoid(data):
    x = (data["a"] + data["dt_bias"]).double()
    return torch.nn.functional.softplus(x) / x.sigmoid()


def fused(S, chunk, keys_chunk, dtype, shape, options):
    return fused_errors(raw_inputs(S, 24, 20, DTYPES[dtype], **shape), chunk, keys_chunk, **options)


def fused_packed(dtype):
    options = {"cu_seqlens": torch.tensor([0, 1, 17, 22, 61]), "allow_neg_eigval": True}
    return fused_errors(raw_inputs(61, 16, 16, DTYPES[dtype], m=2, N=4), 32, 16, N=4, **options)


def fused_lengths(dtype):
    """Rows of q and k that are zero (padding), long or short."""
    data = raw_inputs(40, 16, 16, DTYPES[dtype])
    for name in ("q", "k"):
        data[name][:, ::3] *= 30
        data[name][:, 1::3] *= 1 / 30
        data[name][:, 5] = 0
    return fused_errors(data, 16)


def fused_poisoned():
    empty = torch.empty

    def poisoned_empty(*a, **k):
        t = empty(*a, **k)
        return t.fill_(float("nan")) if t.dtype.is_floating_point else t

    torch.empty = poisoned_empty
    try:
        data = raw_inputs(37, 24, 20, torch.float32, m=2, N=2)
        with chunks_of(32, 16):
            found = run_fused(data, *upstream(data, 2), backend="triton", cu_seqlens=torch.tensor([0, 30, 37]))
    finally:
        torch.empty = empty
    return {name: int(t.isnan().sum()) for name, t in found.items()}


def fused_compiled():
    data = raw_inputs(20, 16, 16, torch.float32)
    do, dstate = upstream(data)
    with chunks_of(16):
        expected = run_fused(data, do, dstate, backend="triton")
        function = torch.compile(gated_delta_net, fullgraph=True, backend="aot_eager")
        actual = run_fused(data, do, dstate, function, backend="triton")
    return {name: bool(torch.equal(actual[name], expected[name])) for name in expected}


def fused_registered():
    data = raw_inputs(20, 16, 16, torch.float32, m=2)
    leaves = [t.requires_grad_() for t in data.values()]
    arguments = (*leaves[:7], 0.25, 2.0, leaves[7], None)
    with chunks_of(16):
        found = torch.library.opcheck(torch.ops.latentcot.gated_delta_net_forward.default, (*arguments, True))
        kept = torch.ops.latentcot.gated_delta_net_forward(*arguments, True)
        o, last, *saved, q_unit, k_unit, norms = kept
        upstream_of_both = (torch.randn_like(o), torch.randn_like(last))
        gradient = (*upstream_of_both, q_unit, k_unit, *arguments[2:], *saved, norms, o)
        gradient = tuple(t.detach() if isinstance(t, torch.Tensor) else t for t in gradient)
        found_backward = torch.library.opcheck(
            torch.ops.latentcot.gated_delta_net_backward.default,
            gradient,
            test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"),
        )
    return {**found, **{f"backward_{n}": r for n, r in found_backward.items()}}


FUSED = {
    "S5": (5, 16, 16, {}, {}),
    "S39": (39, 16, 16, {"m": 2}, {"allow_neg_eigval": True}),
    "S71": (71, 32, 16, {"B": 2}, {"scale": 1.0}),
    "S135": (135, 64, 32, {"m": 3}, {"allow_neg_eigval": True}),
    "S300": (300, 64, 64, {}, {}),
}
COMPARISONS = {
    "S1": (1, 16, 16, {}),
    "S5": (5, 16, 16, {"gate": "none", "V": 24}),
    "S15": (15, 16, 16, {"K": 24, "m": 2}),
    "S16": (16, 16, 16, {"gate": "none", "state": False}),
    "S17": (17, 16, 16, {"B": 2, "H": 2}),
    "S39": (39, 16, 16, {"K": 24, "V": 24, "H": 2, "m": 2}),
    "S39-C32": (39, 32, 16, {"K": 24, "V": 40, "state": False}),
    "S71-C32": (71, 32, 32, {"gate": "none", "K": 40, "m": 3}),
    "S135-C64": (135, 64, 32, {"K": 24, "V": 24}),
    "S135-C64-block": (135, 64, 64, {"K": 24, "V": 24, "m": 2, "block": 32}),
    "S600-windows": (600, 64, 64, {"B": 2}),
    "S600-mixed-windows": (600, 32, 16, {}),
    "S1-channel": (1, 16, 16, {"gate": "channel"}),
    "S17-channel": (17, 16, 16, {"gate": "channel", "B": 2, "K": 24, "V": 40, "state": False}),
    "S39-channel": (39, 16, 16, {"gate": "channel", "K": 24, "V": 24, "H": 2, "m": 2}),
    "S70-channel-C32": (70, 32, 32, {"gate": "channel", "K": 40, "V": 20, "block": 32}),
    "S300-channel-windows": (300, 32, 32, {"gate": "channel"}),
}
CHECKS = {
    **{f"compare-{dtype}-{name}": (compare, (*c[:3], dtype, dict(c[3]))) for dtype in DTYPES for name, c in COMPARISONS.items()},
    "packed-fp32": (packed, ("fp32",)),
    "packed-fp16": (packed, ("fp16",)),
    "packed-fp32-channel": (packed, ("fp32", "channel")),
    **{f"gates-{kind}-{g}": (gates, (kind, g)) for g in ("token", "channel") for kind in ("zero", "resets", "large", "infinite")},
    **{f"forgotten-{rate}-{gate}": (forgotten, (-rate, gate)) for gate in ("token", "channel") for rate in (8, 30)},
    **{
        f"no_decay-{value}-{gate}": (no_decay_at_all, (float(value), gate))
        for gate in ("token", "channel")
        for value in ("0.1", "nan")
    },
    **{f"strengths-{dtype}-{kind}": (strengths, (kind, dtype)) for dtype in DTYPES for kind in ("zero", "tiny")},
    **{f"repeated-{dtype}-{gate}": (repeated, (dtype, gate)) for dtype in DTYPES for gate in ("none", "channel")},
    **{
        f"{name}-{gate}": (check, (gate,))
        for name, check in (("split", split), ("strided", strided), ("without_gradients", without_gradients))
        for gate in ("token", "channel")
    },
    **{f"poisoned-{gate}": (poisoned, (gate,)) for gate in ("none", "token", "channel")},
    "some_gradients": (some_gradients, ()),
    "mixed_dtypes": (mixed_dtypes, ()),
    "beyond_32_bits-chunks": (beyond_32_bits, (2**25 - 16, 66)),
    "beyond_32_bits-tokens": (beyond_32_bits, (2**30 + 16, 3)),
    "compiled-token": (compiled, ()),
    "compiled-channel": (compiled, ("channel",)),
    "registered": (registered, ()),
    "second_derivative": (second_derivative, ()),
    **{f"fused-{dtype}-{name}": (fused, (*c[:3], dtype, *c[3:])) for dtype in DTYPES for name, c in FUSED.items()},
    **{f"fused_packed-{dtype}": (fused_packed, (dtype,)) for dtype in DTYPES},
    **{f"fused_lengths-{dtype}": (fused_lengths, (dtype,)) for dtype in DTYPES},
    "fused_poisoned": (fused_poisoned, ()),
    "fused_compiled": (fused_compiled, ()),
    "fused_registered": (fused_registered, ()),
}  # fmt: skip

if __name__ == "__main__":
    torch.set_num_threads(1)
    run_checks(CHECKS)
