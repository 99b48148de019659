"""Every mixer on sequences that are padded, packed, cut and carried on, and what its state weighs."""

# pyright: reportOptionalSubscript=false, reportOptionalMemberAccess=false, reportArgumentType=false

import itertools
import math

import pytest
import torch
from torch import Tensor

from latentcot.backbone import HybridConfig, HybridForCausalLM, ModelState, SequenceContext
from latentcot.backbone.mixers import MIXERS, find_mixer, make_options
from latentcot.backbone.norms import RMSNorm
from latentcot.kernels import Bidirectional

OPTIONS = {
    "attention": {"num_heads": 4},
    "hgrn": {},
    "retnet": {"num_heads": 2},
    "gla": {"num_heads": 2},
    "hgrn2": {"num_heads": 2, "expand_ratio": 12},
    "deltanet": {"num_heads": 2},
    "gated_deltanet": {"num_heads": 2, "head_dim": 12},
}
LINEAR = [name for name in MIXERS if name != "attention"]


def make_model(mixers: list[str], dtype: torch.dtype = torch.float64, **changes) -> HybridForCausalLM:
    torch.manual_seed(0)
    values = {"vocab_size": 23, "hidden_size": 24, "intermediate_size": 32, "initializer_range": 0.2, **OPTIONS}
    config = HybridConfig(**{**values, "num_hidden_layers": len(mixers), "mixers": mixers, **changes})
    return HybridForCausalLM(config).to(dtype).eval()


def masks(side: str) -> Tensor:
    """Three rows of 21, 9 and 1 real tokens among 21."""
    lengths = torch.tensor([21, 9, 1])[:, None]
    if side == "left":
        return torch.arange(21) >= 21 - lengths
    if side == "right":
        return torch.arange(21) < lengths
    return torch.stack([torch.randperm(21, generator=torch.Generator().manual_seed(int(n))) < n for n in lengths])


# -- padding -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["left", "right", "holes"])
def test_padded_rows_are_the_rows_alone(layer, tokens, backend, side):
    """Outputs, states and gradients; what stands at padded positions does not matter and gets no gradient."""
    mask, x = masks(side), tokens(3, 21)
    x = torch.where(mask[..., None], x, 1e3 * x).requires_grad_()
    o, after = layer(x, attention_mask=mask, keep_state=True)
    upstream = tokens(3, 21, seed=9)
    got = torch.autograd.grad((o * upstream)[mask].sum(), x)[0]
    assert (got[~mask] == 0).all()
    for row, kept in enumerate(mask):
        alone = x[row : row + 1, kept].detach().requires_grad_()
        expected, last = layer(alone, keep_state=True)
        torch.testing.assert_close(o[row, kept], expected[0], rtol=0, atol=1e-10)
        right = torch.autograd.grad((expected[0] * upstream[row, kept]).sum(), alone)[0][0]
        torch.testing.assert_close(got[row, kept], right, rtol=1e-9, atol=1e-10)
        if layer.mixer.name != "attention":  # its state has a column for every position and a mask beside it
            for name, tensor in last.tensors.items():
                torch.testing.assert_close(after[name][row], tensor[0], rtol=0, atol=1e-10)


@pytest.mark.parametrize("side", ["left", "holes"])
def test_padded_rows_are_the_rows_alone_when_seen_from_both_sides(layer, tokens, side):
    if layer.mixer.name == "hgrn":
        return  # one direction only; refused in test_mixers.py
    mask, x = masks(side), tokens(3, 21)
    o, _ = layer(x, attention_mask=mask, visibility=Bidirectional())
    for row, kept in enumerate(mask):
        expected, _ = layer(x[row : row + 1, kept], visibility=Bidirectional())
        torch.testing.assert_close(o[row, kept], expected[0], rtol=0, atol=1e-10)


@pytest.mark.parametrize("mixer", LINEAR)
def test_padding_gives_no_gradient_and_no_nan_through_24_layers(mixer):
    model = make_model([mixer] * 24, torch.float32)
    mask = masks("left")
    embedded = torch.randn(3, 21, 24, generator=torch.Generator().manual_seed(2))
    embedded = embedded.masked_fill(~mask[..., None], 0.0).requires_grad_()
    logits = model(inputs_embeds=embedded, attention_mask=mask).logits
    logits[mask].square().mean().backward()
    assert (embedded.grad[~mask] == 0).all()
    assert embedded.grad[mask].abs().max() > 0
    # the embedding is not part of this pass; everything else is
    assert all(p.grad.isfinite().all() for n, p in model.named_parameters() if n != "model.embeddings.weight")


# -- packing -----------------------------------------------------------------------------------------------------------


def test_packed_sequences_are_the_sequences_alone(layer, tokens, backend):
    """Outputs, states of linear mixers and gradients; the border is tight to the bit in both directions."""
    cuts = [0, 1, 8, 9, 41]
    offsets, x = torch.tensor(cuts), tokens(1, 41).requires_grad_()
    linear = layer.mixer.name != "attention"
    o, after = layer(x, cu_seqlens=offsets, keep_state=linear)
    upstream = tokens(1, 41, seed=5)
    got = torch.autograd.grad((o * upstream).sum(), x, retain_graph=True)[0]
    for n, (a, b) in enumerate(itertools.pairwise(cuts)):
        alone = x[:, a:b].detach().requires_grad_()
        expected, last = layer(alone, keep_state=linear)
        torch.testing.assert_close(o[:, a:b], expected, rtol=0, atol=1e-10)
        right = torch.autograd.grad((expected * upstream[:, a:b]).sum(), alone)[0]
        torch.testing.assert_close(got[:, a:b], right, rtol=1e-9, atol=1e-10)
        if linear:
            for name, tensor in last.tensors.items():
                torch.testing.assert_close(after[name][n], tensor[0], rtol=0, atol=1e-10)
    across = torch.autograd.grad(o[:, 9:].square().sum(), x)[0]
    assert (across[:, :9] == 0).all()
    changed = torch.cat([tokens(1, 9, seed=7), x[:, 9:]], 1)
    assert torch.equal(layer(changed, cu_seqlens=offsets)[0][:, 9:], o[:, 9:])


@pytest.mark.parametrize("mixer", MIXERS)
def test_packing_and_cutting_hold_for_models_with_attention_between(mixer):
    """S-1 and S-2 of the reported faults: several tokens onto a filled state, and borders that every part of a layer keeps."""
    model = make_model([mixer, "attention", mixer])
    ids = torch.randint(0, 23, (1, 12), generator=torch.Generator().manual_seed(3))
    whole = model(ids).logits
    for cuts in ((5, 4, 1, 1, 1), (1,) * 12, (2, 10)):
        state, start, pieces = None, 0, []
        for count in cuts:
            output = model(ids[:, start : start + count], state=state, use_cache=True)
            pieces.append(output.logits)
            state, start = output.state, start + count
        torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=0, atol=1e-10)
    offsets = torch.tensor([0, 5, 12])
    packed = model(ids, cu_seqlens=offsets).logits
    torch.testing.assert_close(packed[:, 5:], model(ids[:, 5:]).logits, rtol=0, atol=1e-10)
    changed = torch.cat([(ids[:, :5] + 1) % 23, ids[:, 5:]], 1)
    assert torch.equal(model(changed, cu_seqlens=offsets).logits[:, 5:], packed[:, 5:])


# -- segments and states -----------------------------------------------------------------------------------------------


def in_segments(layer, x: Tensor, sizes: list[int]) -> tuple[Tensor, ModelState]:
    """Segment by segment with the state carried, positions included."""
    past, pieces, start = ModelState("test"), [], 0
    for size in sizes:
        piece = x[:, start : start + size]
        context = layer.context(piece, past, keep_state=True)
        o, after = layer.mixer(piece, context, None if past.is_fresh else past.read((0, 0)))
        past, start = past.with_entry((0, 0), after).advance(context), start + size
        pieces.append(o)
    return torch.cat(pieces, 1), past


@pytest.mark.parametrize("sizes", [[1, 7, 64, 100], [100, 1, 1, 1, 69], [3] * 4], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_segments_are_the_whole(layer, tokens, backend, sizes, dtype):
    layer, x = layer.to(dtype), tokens(2, sum(sizes)).to(dtype)
    whole, last = layer(x, keep_state=True)
    o, past = in_segments(layer, x, sizes)
    limit = 1e-11 if dtype == torch.float64 else 1e-5
    assert (o - whole).norm() < limit * whole.norm()
    for name, tensor in last.tensors.items():
        assert (past.entries[0, 0][name] - tensor).norm() <= limit * tensor.norm()


def test_token_by_token_without_gradients_is_the_whole(layer, tokens):
    """The way of decoding: one-token steps have operators of their own."""
    x = tokens(2, 12)
    whole, _ = layer(x)
    with torch.no_grad():
        o, _ = in_segments(layer, x, [1] * 12)
    torch.testing.assert_close(o, whole, rtol=0, atol=1e-11)


def test_gradients_cross_the_border_of_a_segment(layer, tokens):
    x = tokens(1, 20).requires_grad_()
    upstream = tokens(1, 20, seed=4)
    whole = torch.autograd.grad((layer(x)[0] * upstream)[:, 12:].sum(), x)[0]
    cut = torch.autograd.grad((in_segments(layer, x, [2, 10, 8])[0] * upstream)[:, 12:].sum(), x)[0]
    torch.testing.assert_close(cut, whole, rtol=1e-10, atol=1e-12)
    assert whole[:, :12].abs().max() > 0


def test_states_are_fp32_in_16_bits_and_do_not_grow(layer, tokens):
    layer = layer.to(torch.bfloat16)
    (_, short), (_, long) = (layer(tokens(2, n).bfloat16(), keep_state=True) for n in (5, 50))
    if layer.mixer.name == "attention":
        assert short["keys"].dtype == torch.bfloat16
        return
    assert all(tensor.dtype == torch.float32 for tensor in long.tensors.values())
    assert short.nbytes == long.nbytes


@pytest.mark.parametrize("autocast", [False, True], ids=["weights", "autocast"])
def test_16_bits_round_and_nothing_more(layer, tokens, autocast):
    """Weights and activations in bf16, or fp32 weights under autocast: within a few roundings of fp64, padding included."""
    mask, x = masks("left"), tokens(3, 21)
    expected, _ = layer(x, attention_mask=mask)
    layer = layer.to(torch.float32 if autocast else torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = x.to(torch.float32 if autocast else torch.bfloat16).requires_grad_()
        o, _ = layer(y, attention_mask=mask, keep_state=True)
    assert o.dtype == torch.bfloat16
    assert (o[mask].double() - expected[mask]).norm() < 0.02 * expected[mask].norm()
    o[mask].float().square().sum().backward()
    assert y.grad.isfinite().all()
    assert (y.grad[~mask] == 0).all()


SIZES = {  # MiB a layer at the 340M and 1.3B sizes, and numbers of the convolutions over D
    "hgrn": (4 / 1024, 8 / 1024, 0),
    "gla": (0.5, 2.0, 0),
    "hgrn2": (0.5, 1.0, 0),
    "deltanet": (0.5, 1.0, 9),
    "gated_deltanet": (1.0, 2.0, 9),
    "retnet": (1.0, 4.0, 0),
}


@pytest.mark.parametrize("mixer", SIZES)
@pytest.mark.parametrize("size", [1024, 2048])
def test_states_weigh_what_the_study_says(mixer, size):
    *mebibytes, convolutions = SIZES[mixer]
    values = {"num_heads": size // 256} if mixer == "gated_deltanet" else {}
    with torch.device("meta"):
        layer = find_mixer(mixer)[0](size, make_options(mixer, values))  # type: ignore[call-arg]
    layer = layer.to_empty(device="cpu")
    for parameter in layer.parameters():
        parameter.data.zero_()
    with torch.no_grad():
        _, state = layer(torch.zeros(1, 1, size), SequenceContext.build(1, 1, keep_state=True))
    memory = state.tensors.get("matrix", state.tensors.get("vector"))
    assert memory.nbytes == mebibytes[size == 2048] * 2**20
    assert state.nbytes - memory.nbytes == 4 * convolutions * size


# -- what mixers share with their model ----------------------------------------------------------------------------------


@pytest.mark.parametrize("mixer", ["hgrn", "hgrn2"])
def test_a_model_holds_one_matrix_of_bounds_and_saves_it(tmp_path, mixer):
    model = make_model([mixer, "attention", mixer, mixer], torch.float32)
    bounds = dict(model.named_parameters())["model.lower_bounds"]
    assert bounds.shape == (4, 24)  # a row for the attention layer too
    assert (bounds == 0).all()
    ids = torch.randint(0, 23, (2, 9), generator=torch.Generator().manual_seed(3))
    before = model(ids).logits
    bounds.data.normal_(generator=torch.Generator().manual_seed(1))
    after = model(ids).logits
    assert (before - after).abs().max() > 1e-3
    model.save_pretrained(tmp_path)
    loaded = HybridForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(loaded(ids).logits, after)
    after.square().sum().backward()
    assert bounds.grad is not None
    assert (bounds.grad.abs().sum(1) > 0).all()  # every row is in the softmax
    assert "model.lower_bounds" not in make_model(["gla", "attention"]).state_dict()


def test_a_stack_without_bounds_has_none_and_widths_must_agree():
    assert make_model(["hgrn"], hgrn={"use_lower_bound": False}).model.lower_bounds is None
    with pytest.raises(ValueError, match=r"different widths \(hgrn: 24, hgrn2: 48\)"):
        make_model(["hgrn", "hgrn2"], hgrn2={"num_heads": 2, "expand_ratio": 24})


def test_a_bounded_layer_outside_its_model_says_what_it_misses(make_layer, tokens):
    layer, x = make_layer("hgrn"), tokens(1, 4)
    with pytest.raises(ValueError, match=r"layer 2 has a lower bound"):
        layer.mixer(x, SequenceContext.build(1, 4))


def test_one_context_serves_several_backward_passes():
    model = make_model(["hgrn", "hgrn"])
    hidden = torch.randn(1, 6, 24, dtype=torch.float64)
    context = SequenceContext.build(1, 6)
    gradients = []
    for _ in range(2):
        model.zero_grad()
        model.run(hidden, context)[0].square().sum().backward()
        gradients.append(model.model.lower_bounds.grad.clone())
    assert torch.equal(*gradients)
    with torch.no_grad():
        model.run(hidden, context)
    assert model.run(hidden, context)[0].requires_grad


@pytest.mark.parametrize("mixer", ["deltanet", "gated_deltanet", "gla", "hgrn", "hgrn2"])
@pytest.mark.parametrize("how", ["normal", "uniform"])
def test_a_model_draws_the_taps_of_its_convolutions_and_loading_keeps_them(tmp_path, mixer, how):
    options = {mixer: {**OPTIONS[mixer], "use_short_conv": True, "conv_size": 3}}
    model = make_model([mixer] * 2, torch.float32, convolution_init=how, **options)
    taps = {name: p for name, p in model.named_parameters() if "conv1d" in name}
    assert len(taps) == 2 * (2 if mixer == "hgrn" else 3)
    for weight in taps.values():
        if how == "uniform":
            assert 0.4 < weight.abs().max() <= 1 / math.sqrt(3)
            assert weight.std() > 0.25
        else:
            assert 0.15 < weight.std() < 0.25  # the deviation of the linear layers, 0.2
            assert weight.mean().abs() < 0.1
    model.save_pretrained(tmp_path)
    loaded = HybridForCausalLM.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(loaded[name], weight) for name, weight in model.state_dict().items())


def test_a_model_draws_its_weights_as_published():
    """Linear and embedding weights N(0, 0.02^2), biases 0, norms 1; A ~ U(0, 16), softplus(dt_bias) log-uniform in 0.001 ... 0.1."""
    options = {"gated_deltanet": {"num_heads": 64, "head_dim": 1}, "initializer_range": 0.02}
    model = make_model(["gated_deltanet", "gla", "attention"] * 2, torch.float32, vocab_size=500, **options)
    for name, weight in model.named_parameters():
        if "norm" in name:
            assert (weight == 1).all(), name
        elif name.endswith("bias") and "dt_bias" not in name:
            assert (weight == 0).all(), name
        elif weight.dim() == 2:
            assert weight.std().item() == pytest.approx(0.02, rel=5 / math.sqrt(2 * weight.numel())), name
            assert abs(weight.mean().item()) < 5 * 0.02 / math.sqrt(weight.numel()), name
    A = torch.cat([p for n, p in model.named_parameters() if n.endswith("A_log")]).exp()
    assert 0 < A.min() < 2
    assert 14 < A.max() <= 16
    assert A.mean().item() == pytest.approx(8, abs=5 * 16 / math.sqrt(12 * len(A)))
    dt = torch.nn.functional.softplus(torch.cat([p for n, p in model.named_parameters() if n.endswith("dt_bias")]))
    assert 0.00099 < dt.min() < 0.002
    assert 0.05 < dt.max() < 0.1001
    assert dt.log().mean().item() == pytest.approx(math.log(0.01), abs=5 * math.log(100) / math.sqrt(12 * len(dt)))


@pytest.mark.parametrize("mixer", MIXERS)
def test_every_norm_has_the_epsilon_of_its_model(mixer):
    gates = {"deltanet": {"num_heads": 2, "use_gate": True}} if mixer == "deltanet" else {}
    norms = {n: m for n, m in make_model([mixer], norm_eps=0.125, **gates).named_modules() if isinstance(m, RMSNorm)}
    assert len(norms) == (3 if mixer == "attention" else 4)
    assert {norm.eps for norm in norms.values()} == {0.125}
