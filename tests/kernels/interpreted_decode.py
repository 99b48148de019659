"""Checks of the decode kernels in Triton's interpreter; run as a script by test_decode.py.

Prints one JSON object: check name -> numbers, or the traceback of a check that raised. Names as arguments select checks.
"""

# Options go through dictionaries of mixed types, which a type checker cannot match with parameters.
# pyright: reportArgumentType=false

import torch
import torch.nn.functional as F
from interpreter import run_checks

from latentcot.kernels.delta_rule import reference
from latentcot.kernels.delta_rule.triton_decode import Columns, gated_delta_decode, swiglu
from latentcot.kernels.delta_rule.triton_matvec import config, matvec, serves
from latentcot.kernels.delta_rule.triton_store import rotate_and_store

DTYPES = {"fp32": torch.float32, "fp16": torch.float16}


def relative_rms(actual, expected):
    actual, expected = actual.detach().double(), expected.detach().double()
    assert actual.shape == expected.shape, (actual.shape, expected.shape)
    return float((actual - expected).norm() / expected.norm().clamp_min(1e-30))


def decode(H, Hv, K, V, W, dtype, steps=6, B=2, largest=1.0, poison=False):
    """Several tokens of rows at different positions, against convolution, norms, gates and recurrence written out in fp64."""
    dtype, generator = DTYPES[dtype], torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator).to(dtype)

    D, gap = 2 * H * K + Hv * V, 3
    columns = Columns(q=0, k=H * K, v=2 * H * K, a=D + gap, b=D + gap + Hv)
    rows = normal(steps, B, D + gap + 2 * Hv)
    taps, A_log, dt_bias = normal(W, D), normal(Hv).float(), normal(Hv).float()
    past, state = normal(B, W - 1, D), normal(B, Hv, K, V).float()
    position = torch.tensor([5, 2][:B])
    ring = torch.full((B, W, D), float("nan"), dtype=dtype)
    for b in range(B):
        for i in range(1, W):
            ring[b, (int(position[b]) - i) % W] = past[b, W - 1 - i]
    if poison:
        empty = torch.empty
        torch.empty = lambda *a, **k: empty(*a, **k).fill_(float("nan"))
    exact, inputs = state.double(), past.double()
    worst = {"o": 0.0, "state": 0.0, "ring": 0.0}
    for x in rows:
        o = gated_delta_decode(
            x, columns, ring, taps, A_log, dt_bias, state, position, heads=H, scale=0.3, largest=largest
        )
        assert o.dtype == dtype
        inputs = torch.cat([inputs, x[:, None, :D].double()], 1)
        y = F.silu((inputs[:, -W:] * taps.double().flip(0)).sum(1))
        q, k = (y[:, i * H * K : (i + 1) * H * K].view(B, H, K) for i in (0, 1))
        q, k = (z * (z.square().sum(-1, keepdim=True) + 1e-6).rsqrt() for z in (q, k))
        v = y[:, 2 * H * K :].view(B, Hv, V)
        a, b = (x[:, at : at + Hv].double() for at in (columns.a, columns.b))
        g = -A_log.double().exp() * F.softplus(a + dt_bias.double())
        token = (q[:, None], k[:, None, None], v[:, None, None], largest * b.sigmoid()[:, None, None], g[:, None])
        expected, exact = reference.delta_rule(*token, 0.3, exact)
        position += 1
        worst["o"] = max(worst["o"], relative_rms(o, expected[:, 0]))
        worst["state"] = max(worst["state"], relative_rms(state, exact))
    for b in range(B):
        for i in range(1, W + 1):
            difference = ring[b, (int(position[b]) - i) % W].double() - inputs[b, -i]
            worst["ring"] = max(worst["ring"], float(difference.abs().max()))
    return worst


def gate(width, dtype):
    x = torch.randn(3, 2 * width + 5, generator=torch.Generator().manual_seed(1)).to(DTYPES[dtype])[:, : 2 * width]
    exact = x.double()
    return {"y": relative_rms(swiglu(x), F.silu(exact[:, :width]) * exact[:, width:])}


def product(before, B, N, D, dtype, head=None, extras=True):
    """One product with everything around it, tensors in the middle of wider buffers, against fp64."""
    dtype, generator = DTYPES[dtype], torch.Generator().manual_seed(2)

    def normal(*shape):
        return torch.randn(*shape, generator=generator).to(dtype)

    x = normal(B, (2 if before == "swiglu" else 1) * D + 3)[:, 3:]
    weight, gate, residual = normal(N, D), normal(B, D + 5)[:, :D], normal(B, N + 1)[:, 1:]
    norm = normal(D if head is None else head)
    extra = {"residual": residual} if extras else {}
    if before in ("rms", "heads") and extras:
        extra["norm"] = norm
    if before == "heads" and extras:
        extra["gate"] = gate
    empty = torch.empty
    torch.empty = lambda *a, **k: empty(*a, **k).fill_(float("nan"))
    try:
        y = matvec(x, weight, before=before, head=head, eps=1e-3, **extra)
    finally:
        torch.empty = empty
    assert y.dtype == dtype
    exact = x.double()
    if before in ("rms", "heads"):
        parts = exact.unflatten(1, (-1, head or D))
        parts = parts * (parts.square().mean(-1, keepdim=True) + 1e-3).rsqrt()
        exact = (parts * (norm.double() if extras else 1.0)).flatten(1)
    if before == "heads" and extras:
        exact = exact * F.silu(gate.double())
    if before == "swiglu":
        exact = F.silu(exact[:, :D]) * exact[:, D:]
    expected = exact @ weight.double().t()
    return {"y": relative_rms(y, expected + residual.double() if extras else expected)}


def products_refused():
    x, weight, messages = torch.zeros(2, 8), torch.zeros(6, 8), []
    for arguments, options in (
        ((x, weight), {"before": "layer"}), ((x, weight), {"before": "heads"}), ((x, weight), {"head": 4}),
        ((x, weight), {"before": "heads", "head": 3}), ((torch.zeros(5, 8), weight), {}), ((x[:, :4], weight), {}),
        ((x, torch.zeros(8, 6).t()), {}), ((x, weight), {"before": "rms", "norm": torch.zeros(6)}),
        ((x, weight), {"residual": torch.zeros(2, 8)}), ((torch.zeros(8, 2).t(), weight), {}),
    ):  # fmt: skip
        try:
            matvec(*arguments, **options)
        except ValueError as error:
            messages.append(str(error))
    return messages


def store(heads, G, K, layout, dtype):
    """Queries turned, keys turned and stored, values stored, nothing else touched."""
    from latentcot.backbone.rotary import apply_rotary, rotary_table

    B, T, dtype, generator = 3, 7, DTYPES[dtype], torch.Generator().manual_seed(4)
    projected = torch.randn(B, (heads + 2 * G) * K + 5, generator=generator).to(dtype)
    keys, values = torch.full((2, B, T, G, K), 9.0, dtype=dtype)
    position = torch.tensor([0, 6, 3])
    tables = None if layout is None else rotary_table(torch.arange(T)[:, None], K, 100.0, torch.float32)
    q = rotate_and_store(
        projected, keys, values, position, heads=heads, angles=tables, interleaved=layout == "interleaved"
    )
    rows = projected.double()[:, : (heads + 2 * G) * K].view(B, 1, heads + 2 * G, K)
    turned = rows
    if layout is not None:
        turned = apply_rotary(rows, rotary_table(position[:, None], K, 100.0, torch.float64), layout)
    b, untouched = torch.arange(B), torch.ones(B, T, dtype=torch.bool)
    untouched[b, position] = False
    assert bool((keys[untouched] == 9).all())
    assert bool((values[untouched] == 9).all())
    return {
        "q": relative_rms(q, turned[:, 0, :heads]),
        "k": relative_rms(keys[b, position], turned[:, 0, heads : heads + G]),
        "v": relative_rms(values[b, position], rows[:, 0, heads + G :]),
    }


def stores_refused():
    good = {
        "projected": torch.zeros(1, 16), "keys": torch.zeros(1, 3, 1, 4), "values": torch.zeros(1, 3, 1, 4),
        "position": torch.zeros(1, dtype=torch.long), "angles": (torch.zeros(3, 2), torch.zeros(3, 2)),
    }  # fmt: skip
    messages = []
    for change in (
        {"values": torch.zeros(1, 2, 1, 4)}, {"projected": torch.zeros(1, 15)}, {"projected": torch.zeros(1, 16).half()},
        {"angles": (torch.zeros(2, 2), torch.zeros(3, 2))}, {"angles": (torch.zeros(3, 2).double(),) * 2},
    ):  # fmt: skip
        try:
            rotate_and_store(**{**good, **change}, heads=2)
        except ValueError as error:
            messages.append(str(error))
    return messages


def engine(stack):
    """A whole engine whose blocks run in Triton, against the model's own forward; [largest difference, paths]."""
    from latentcot.backbone import HybridConfig, HybridForCausalLM, engine_steps
    from latentcot.backbone.engine import DecodeEngine

    engine_steps.serves_triton = lambda *_: True
    torch.manual_seed(0)
    model = HybridForCausalLM(
        HybridConfig(
            vocab_size=13, hidden_size=16, intermediate_size=24, initializer_range=0.3, attention={"num_heads": 2}, **stack
        )
    ).eval()  # fmt: skip
    for name, parameter in model.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    exact = HybridForCausalLM(model.config).double().eval()
    exact.load_state_dict({name: tensor.double() for name, tensor in model.state_dict().items()})
    worst = 0.0
    for batch in (2, 5):  # five rows: products by PyTorch, tokens by the kernel
        decoder = DecodeEngine(model, batch, 32)
        ids = torch.randint(0, 13, (batch, 5), generator=torch.Generator().manual_seed(1))
        line = torch.cat([ids, decoder.prefill(ids)[:, None]], 1)
        for _ in range(3):
            line = torch.cat([line, decoder.step()[:, None]], 1)
            worst = max(worst, relative_rms(decoder.logits, exact(line[:, :-1]).logits[:, -1]))
    return {"logits": worst, "paths": decoder.explain()}


def refused():
    columns, messages = Columns(0, 4, 8, 12, 13), []
    good = {
        "projected": torch.zeros(1, 14), "ring": torch.zeros(1, 4, 12), "taps": torch.zeros(4, 12),
        "state": torch.zeros(1, 1, 4, 4), "position": torch.zeros(1, dtype=torch.long),
    }  # fmt: skip
    for change in (
        {"state": torch.zeros(1, 1, 4, 4).transpose(2, 3)}, {"state": torch.zeros(1, 1, 4, 4).double()},
        {"ring": torch.zeros(1, 3, 12)}, {"taps": torch.zeros(12, 4).t()}, {"projected": torch.zeros(2, 14)},
        {"position": torch.zeros(2, dtype=torch.long)},
    ):  # fmt: skip
        x = {**good, **change}
        try:
            gated_delta_decode(
                x["projected"], columns, x["ring"], x["taps"], torch.zeros(1), torch.zeros(1), x["state"],
                x["position"], heads=1, scale=1.0,
            )  # fmt: skip
        except ValueError as error:
            messages.append(str(error))
    try:
        swiglu(torch.zeros(2, 5))
    except ValueError as error:
        messages.append(str(error))
    return messages


CHECKS = {
    **{
        f"decode-{dtype}-{name}": (decode, (*sizes, dtype))
        for dtype in DTYPES
        for name, sizes in {
            "square": (2, 2, 16, 16, 4), "odd": (1, 2, 12, 20, 4), "grouped": (2, 6, 8, 12, 3), "no_window": (1, 1, 4, 4, 1),
        }.items()
    },
    "decode-fp32-doubled": (decode, (1, 2, 12, 20, 4, "fp32", 4, 2, 2.0)),
    "decode-fp32-poisoned": (decode, (1, 2, 12, 20, 4, "fp32", 2, 1, 1.0, True)),
    **{
        f"product-{dtype}-{name}": (product, (*sizes[:4], dtype, *sizes[4:]))
        for dtype in DTYPES
        for name, sizes in {
            "none": ("none", 1, 13, 24), "rms": ("rms", 3, 40, 48), "heads": ("heads", 2, 21, 48, 16),
            "one_head": ("heads", 1, 9, 16, 16), "swiglu": ("swiglu", 4, 17, 40), "rms-bare": ("rms", 2, 9, 32, None, False),
            "heads-bare": ("heads", 2, 9, 32, 8, False), "swiglu-bare": ("swiglu", 1, 9, 32, None, False),
            "large": ("rms", 1, 700, 1024),
        }.items()
    },
    "product-limits": (lambda: [serves(4, 8192), serves(5, 8), serves(1, 8193), serves(1, 24, 12), *config(1024, 2816)], ()),
    "products_refused": (products_refused, ()),
    **{
        f"store-{dtype}-{name}": (store, (*sizes, dtype))
        for dtype in DTYPES
        for name, sizes in {
            "half": (4, 2, 12, "half"), "interleaved": (2, 2, 8, "interleaved"), "none": (3, 1, 5, None),
        }.items()
    },
    "stores_refused": (stores_refused, ()),
    "engine-pre": (
        engine,
        ({"num_hidden_layers": 1, "mixer": "gated_deltanet", "gated_deltanet": {"num_heads": 2, "head_dim": 8}},),
    ),
    "engine-hybrid": (
        engine,
        ({
            "num_hidden_layers": 2, "mixer": "gated_deltanet", "period": 2, "norm_placement": "sandwich_pre_residual",
            "gated_deltanet": {"num_heads": 1, "num_v_heads": 2, "head_dim": 6, "use_gate": False},
        },),
    ),
    "engine-post": (
        engine,
        ({
            "num_hidden_layers": 1, "mixer": "gated_deltanet", "norm_placement": "post", "norm_affine": False,
            "gated_deltanet": {"num_heads": 2, "head_dim": 8, "expand_v": 2, "allow_neg_eigval": True},
        },),
    ),
    "swiglu-fp32": (gate, (700, "fp32")),
    "swiglu-fp16": (gate, (24, "fp16")),
    "refused": (refused, ()),
}  # fmt: skip

if __name__ == "__main__":
    run_checks(CHECKS)
