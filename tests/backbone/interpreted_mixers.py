"""The ten checks of every mixer on the Triton back end, in Triton's interpreter; run as a script by test_mixers_triton.py.

Prints one JSON object: check name -> numbers, or the traceback of a check that raised. Names as arguments select checks.
Layers are those of conftest.py in float32, the yardstick is the recurrences of test_mixers.py in float64. (The tenth check, the
loader, runs no operator: test_checkpoint.py.)
"""

# Mixers are read by attributes that only some of them have.
# pyright: reportAttributeAccessIssue=false, reportOptionalSubscript=false, reportArgumentType=false
# pyright: reportOptionalMemberAccess=false, reportCallIssue=false, reportIndexIssue=false
# pyright: reportOptionalOperand=false, reportOperatorIssue=false

import copy
import itertools
import math
import sys
from pathlib import Path

import torch
from conftest import Layer, _make_layer
from test_mixer_sequences import in_segments
from test_mixers import oracle, relative, state_of, table

from latentcot.backbone import SequenceContext
from latentcot.backbone.mixers import DeltaNet, GatedDeltaNet, retnet
from latentcot.backbone.mixers.deltanet import DeltaNetOptions
from latentcot.backbone.mixers.gated_deltanet import GatedDeltaNetOptions
from latentcot.backbone.rotary import apply_rotary, rotary_table
from latentcot.kernels import convolution, normalisation
from latentcot.kernels.decay_attention import fused as decay_fused
from latentcot.kernels.decay_attention import op as decay
from latentcot.kernels.delta_rule import fused as delta_fused
from latentcot.kernels.delta_rule import op as delta
from latentcot.kernels.gated_scan import fused as scan_fused
from latentcot.kernels.gated_scan import op as scan

sys.path.append(str(Path(__file__).parents[1] / "kernels"))
from interpreter import run_checks  # pyright: ignore[reportMissingImports]

MIXERS = ("hgrn", "retnet", "gla", "hgrn2", "deltanet", "gated_deltanet")
chosen: list[str] = []  # the back ends that operators were given


def use_triton() -> None:
    """Where ``auto`` would choose, ask for Triton by name: it runs, or the call raises. fp64, the yardstick's, is left alone."""
    for module in (decay, decay_fused, delta, delta_fused, scan, scan_fused):
        original = module.choose_backend

        def choose(operator, device, dtype, backend, original=original):
            wanted = "triton" if backend == "auto" and dtype != torch.float64 else backend
            choice = original(operator, device, dtype, wanted)
            if dtype != torch.float64:
                chosen.append(choice.chosen)
            return choice

        module.choose_backend = choose
    convolve, norm = convolution.takes_triton, normalisation._takes_triton
    convolution.takes_triton = lambda name, device, dtype, W, backend: convolve(
        name, device, dtype, W, "triton" if backend == "auto" and dtype != torch.float64 else backend
    )
    normalisation._takes_triton = lambda name, x, dtype, backend: norm(
        name, x, dtype, "triton" if backend == "auto" and dtype != torch.float64 else backend
    )


def pair(name: str) -> tuple[Layer, Layer]:
    """A layer in fp32, and the same weights in fp64."""
    layer = _make_layer(name).to(torch.float32)
    return layer, Layer(copy.deepcopy(layer.mixer).double(), None if layer.bounds is None else layer.bounds.double())


def tokens(batch: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(batch, length, 24, generator=torch.Generator().manual_seed(seed))


def expected(exact: Layer, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Outputs and last states of every row by itself, ``[B, S, D]`` and ``[B, ...]``."""
    rows = [oracle(exact.mixer, row, exact.bound) for row in x]
    return torch.stack([o for o, _ in rows]), torch.stack([state for _, state in rows])


def gradients(loss: torch.Tensor, leaves: list[torch.Tensor]) -> list[torch.Tensor | None]:
    return list(torch.autograd.grad(loss, leaves, allow_unused=True))


def worst(found: list[torch.Tensor | None], right: list[torch.Tensor | None]) -> float:
    """Largest difference, relative to its tensor; to a hundredth of the largest tensor where norms leave almost nothing of it."""
    assert [t is None for t in found] == [t is None for t in right]
    pairs = [(a.detach().double(), b.double()) for a, b in zip(found, right, strict=True) if a is not None]
    least = 0.01 * max(b.norm() for _, b in pairs)
    return max(float((a - b).norm() / b.norm().clamp_min(least)) for a, b in pairs)


def recurrence(name: str, length: int) -> dict[str, float]:
    """1, 2, 3: outputs, last state, and gradients through both, of every parameter; widths are no powers of two."""
    layer, exact = pair(name)
    x = tokens(1, length).requires_grad_()
    y = x.detach().double().requires_grad_()
    (o, after), (wanted, last) = layer(x, keep_state=True), expected(exact, y)
    upstream = tokens(1, length, seed=1)
    loss = (o * upstream).sum() + state_of(after).square().sum()
    right = (wanted * upstream.double()).sum() + last.square().sum()
    got = gradients(loss, [x, *layer.mixer.parameters()])
    due = gradients(right, [y, *exact.mixer.parameters()])
    return {"o": relative(o, wanted), "state": relative(state_of(after), last), "gradients": worst(got, due)}


def segments(name: str) -> dict[str, float]:
    """3, 5: cut unevenly, the state carried over; gradients cross the borders."""
    layer, exact = pair(name)
    sizes = [1, 7, 20]
    x = tokens(2, sum(sizes)).requires_grad_()
    y = x.detach().double().requires_grad_()
    o, past = in_segments(layer, x, sizes)
    wanted, last = expected(exact, y)
    upstream = tokens(2, sum(sizes), seed=1)
    got = gradients((o * upstream)[:, 8:].sum(), [x])
    due = gradients((wanted * upstream.double())[:, 8:].sum(), [y])
    return {
        "o": relative(o, wanted),
        "state": relative(state_of(past.entries[0, 0]), last),
        "gradients": worst(got, due),
    }


def token_by_token(name: str) -> dict[str, float]:
    """5: without gradients, as in decoding."""
    layer, exact = pair(name)
    x = tokens(2, 5)
    with torch.no_grad():
        o, past = in_segments(layer, x, [3, 1, 1])
    wanted, last = expected(exact, x.double())
    return {"o": relative(o, wanted), "state": relative(state_of(past.entries[0, 0]), last)}


def packed(name: str) -> dict[str, float]:
    """4: packed sequences are the sequences alone; borders are tight to the bit."""
    layer, exact = pair(name)
    cuts = [0, 1, 8, 28]
    x, offsets, upstream = tokens(1, 28).requires_grad_(), torch.tensor(cuts), tokens(1, 28, seed=1)
    o, after = layer(x, cu_seqlens=offsets, keep_state=True)
    got = gradients((o * upstream).sum(), [x])[0]
    across = torch.autograd.grad(layer(x, cu_seqlens=offsets)[0][:, 8:].square().sum(), x)[0]
    changed = layer(torch.cat([tokens(1, 8, seed=7), x[:, 8:]], 1), cu_seqlens=offsets)[0]
    found = {"o": 0.0, "state": 0.0, "gradients": 0.0}
    for n, (a, b) in enumerate(itertools.pairwise(cuts)):
        alone = x[:, a:b].detach().double().requires_grad_()
        wanted, last = expected(exact, alone)
        due = gradients((wanted * upstream[:, a:b].double()).sum(), [alone])[0]
        found["o"] = max(found["o"], relative(o[:, a:b], wanted))
        found["state"] = max(found["state"], relative(state_of(after)[n : n + 1], last))
        found["gradients"] = max(found["gradients"], relative(got[:, a:b], due))
    leaked = across[:, :8].abs().max() + (changed[:, 8:] - o[:, 8:]).detach().abs().max()
    return found | {"leaked": float(leaked)}


def padded(name: str) -> dict[str, float]:
    """Padded rows are the rows alone, gradients included; padding gets none, to the bit."""
    layer, exact = pair(name)
    mask = torch.arange(12) >= 12 - torch.tensor([12, 5, 1])[:, None]
    x, upstream = tokens(3, 12), tokens(3, 12, seed=1)
    x = torch.where(mask[..., None], x, 1e3 * x).requires_grad_()
    o, after = layer(x, attention_mask=mask, keep_state=True)
    got = gradients((o * upstream)[mask].sum(), [x])[0]
    found = {"o": 0.0, "state": 0.0}
    due = torch.zeros_like(got, dtype=torch.float64)
    for row, kept in enumerate(mask):
        alone = x[row, kept].detach().double().requires_grad_()
        wanted, last = oracle(exact.mixer, alone, exact.bound)
        due[row, kept] = gradients((wanted * upstream[row, kept].double()).sum(), [alone])[0]
        found["o"] = max(found["o"], relative(o[row, kept], wanted))
        found["state"] = max(found["state"], relative(state_of(after)[row], last))
    return found | {"gradients": worst([got], [due]), "leaked": float(got[~mask].abs().max())}


def extreme(name: str) -> dict[str, float]:
    """6: gates wide open, shut, and both at once; outputs right, everything finite."""
    found = {"o": 0.0, "state": 0.0}
    for level in (-1e4, -480.0, 60.0, 1e4):
        layer, _ = pair(name)
        mixer, x = layer.mixer, tokens(1, 20).abs()
        if name == "gla":
            mixer.gk_proj[0].weight.data.zero_()
            mixer.gk_proj[1].bias.data.fill_(level)
            mixer.gk_proj[1].bias.data[::2] *= -1
        elif name == "gated_deltanet":
            mixer.dt_bias.data.fill_(level)
        else:
            mixer.f_proj.weight.data.fill_(level / 20)
            mixer.f_proj.weight.data[::2] *= -1
            mixer.layer_index = 0 if level in (-480.0, 60.0) else 2
        exact = Layer(copy.deepcopy(mixer).double(), None if layer.bounds is None else layer.bounds.double())
        x.requires_grad_()
        o, after = layer(x, keep_state=True)
        wanted, last = expected(exact, x.detach().double())
        everything = [o, *after.tensors.values()]
        everything += gradients(sum(t.square().sum() for t in everything), [x, *mixer.parameters()])
        assert all(t.isfinite().all() for t in everything if t is not None), level
        found["o"] = max(found["o"], relative(o, wanted))
        # everything may be forgotten: then there is nothing to be relative to
        found["state"] = max(found["state"], float((state_of(after) - last).norm() / last.norm().clamp_min(1.0)))
    return found


def open_retnet() -> dict[str, float]:
    """6: RetNet's gates are constants; with rates of zero it is linear attention, written out here."""
    layer, _ = pair("retnet")
    m, x = layer.mixer, tokens(1, 20)
    rates, retnet.log_rates = retnet.log_rates, lambda heads, device, dtype: torch.zeros(heads, dtype=dtype)
    try:
        o, _ = layer(x)
    finally:
        retnet.log_rates = rates
    turn = rotary_table(torch.arange(20)[None], m.K, 1e4, torch.float64)
    q, k, v = (p(x).double().unflatten(-1, (2, -1)) for p in (m.q_proj, m.k_proj, m.v_proj))
    q, k = apply_rotary(q, turn), apply_rotary(k, turn)
    wanted = torch.einsum("bthk,bshk,bshv,ts->bthv", q, k, v, torch.ones(20, 20).tril().double()) * m.K**-0.5
    gated = m.double().g_norm_swish_gate(wanted, m.g_proj(x.double()).unflatten(-1, (2, -1)))
    return {"o": relative(o, m.o_proj(gated.flatten(2)))}


def stores() -> dict[str, float]:
    """7: orthonormal keys are stored, retrieved and overwritten; beta = 0 writes nothing."""
    mixer, keys = table().float(), torch.eye(24)
    order = [0, 1, 2, 3, 1, 0, 3]
    o, after = mixer(keys[order][None], SequenceContext.build(1, 7, keep_state=True))
    image = torch.nn.functional.silu(mixer.v_proj.weight.T).double() * 24**-0.5
    retrieved = float((o[0] - image[order]).abs().max())
    mixer.v_proj.weight.data.neg_()
    changed, _ = mixer(keys[:2][None], SequenceContext.build(1, 2, keep_state=True), after)
    image = torch.nn.functional.silu(mixer.v_proj.weight.T).double() * 24**-0.5
    overwritten = float((changed[0] - image[:2]).abs().max())
    _, same = table(0.0).float()(keys[:5][None], SequenceContext.build(1, 5, keep_state=True), after)
    return {
        "retrieved": retrieved,
        "overwritten": overwritten,
        "untouched": float((same["matrix"] - after["matrix"]).abs().max()),
    }


def additive() -> dict[str, float]:
    """8: DeltaNet with orthonormal keys is additive attention of beta v."""
    mixer, x = table(0.3).float(), torch.eye(24)[None]
    o, after = mixer(x, SequenceContext.build(1, 24, keep_state=True))
    image = 0.3 * torch.nn.functional.silu(mixer.v_proj.weight.T)
    return {
        "o": float((o[0] - 24**-0.5 * image).abs().max()),
        "state": float((after["matrix"][0, 0] - image).abs().max()),
    }


def undecayed() -> dict[str, float]:
    """8: Gated DeltaNet with A_log = -inf is DeltaNet."""
    torch.manual_seed(0)
    plain = DeltaNet(24, DeltaNetOptions(num_heads=2, use_gate=True))
    gated = GatedDeltaNet(24, GatedDeltaNetOptions(num_heads=2, head_dim=12))
    gated.load_state_dict(plain.state_dict(), strict=False)
    gated.A_log.data.fill_(-math.inf)
    x, context = tokens(1, 20), SequenceContext.build(1, 20, keep_state=True)
    (o, after), (wanted, last) = gated(x, context), plain(x, context)
    return {"o": relative(o, wanted.double()), "state": relative(after["matrix"], last["matrix"].double())}


def unbounded() -> dict[str, float]:
    """8: HGRN2 without a bound is GLA's recurrence with k = sigma(-f)."""
    layer, _ = pair("hgrn2")
    m, x = layer.mixer, tokens(1, 20)
    m.layer_index = 0
    q, f, i = (p(x).unflatten(-1, (2, -1)) for p in (m.q_proj, m.f_proj, m.i_proj))
    silu, log_sigmoid = torch.nn.functional.silu, torch.nn.functional.logsigmoid
    o, _ = decay.decay_attention(silu(q), torch.sigmoid(-f), i, log_sigmoid(f))
    return {"o": relative(layer(x)[0], m.o_proj(m.g_norm(o.flatten(2))).double())}


def poisoned(name: str) -> dict[str, float]:
    """9: buffers that are asked for without contents hold NaN first; forward and backward are the same to the bit."""
    layer, _ = pair(name)
    results = []
    for poison in (False, True):
        x = tokens(1, 12).requires_grad_()
        torch.use_deterministic_algorithms(poison)
        try:
            assert not poison or torch.empty(3).isnan().all()
            o, after = layer(x, keep_state=True)
            results.append([o, *after.tensors.values(), *gradients(o.square().sum(), [x, *layer.mixer.parameters()])])
        finally:
            torch.use_deterministic_algorithms(False)
    same = all(a is b or torch.equal(a, b) for a, b in zip(*results, strict=True))
    return {"same": float(same)}


CHECKS = {
    **{f"recurrence-{name}-{length}": (recurrence, (name, length)) for name in MIXERS for length in (1, 3, 20)},
    "recurrence-gated_deltanet-grouped-negative-20": (recurrence, ("gated_deltanet-grouped-negative", 20)),
    **{f"segments-{name}": (segments, (name,)) for name in MIXERS},
    **{f"tokens-{name}": (token_by_token, (name,)) for name in MIXERS},
    **{f"packed-{name}": (packed, (name,)) for name in MIXERS},
    **{f"padded-{name}": (padded, (name,)) for name in MIXERS},
    **{f"extreme-{name}": (extreme, (name,)) for name in ("hgrn", "gla", "hgrn2", "gated_deltanet")},
    "extreme-retnet": (open_retnet, ()),
    "stores": (stores, ()),
    "additive": (additive, ()),
    "undecayed": (undecayed, ()),
    "unbounded": (unbounded, ()),
    **{f"poisoned-{name}": (poisoned, (name,)) for name in MIXERS},
}


def with_operators(check):
    """The check, with the back ends that its operators ran on."""

    def run(*arguments):
        chosen.clear()
        return check(*arguments) | {"operators": sorted(set(chosen))}

    return run


if __name__ == "__main__":
    use_triton()
    run_checks({name: (with_operators(check), arguments) for name, (check, arguments) in CHECKS.items()})
