"""Every mixer in blocks: both streams in one pass against denoising and committing block by block with a carried state."""

# pyright: reportOptionalSubscript=false, reportOptionalMemberAccess=false, reportArgumentType=false, reportCallIssue=false

import itertools

import pytest
import torch
from torch import Tensor

from latentcot.backbone import ModelState, SequenceContext
from latentcot.kernels import Bidirectional, BlockCausal, Causal

S = 7
INSIDES = ("softmax", "bilinear", "decayed", "additive")


def forms(layer) -> list[str]:
    """What a mixer defines: HGRN has no queries and keys, attention has one form whatever the others do."""
    return {"hgrn": ["decayed"], "attention": ["softmax"]}.get(layer.mixer.name, list(INSIDES))


def two_streams(layer, clean: Tensor, noisy: Tensor, visibility: BlockCausal, **options) -> tuple[Tensor, Tensor]:
    context = layer.context(clean, visibility=visibility, streams=2, **options)
    o, after = layer.mixer(torch.cat([clean, noisy]), context)
    assert after is None
    return tuple(o.chunk(2))


def block_by_block(layer, clean: Tensor, noisy: Tensor, visibility: BlockCausal, mask: Tensor | None = None):
    """Each block is denoised twice from one state, then its clean tokens are committed; rows padded on the right."""
    state, outputs = None, ([], [])
    past = ModelState("blocks")
    for a in range(0, clean.shape[1], visibility.length):
        b = min(a + visibility.length, clean.shape[1])
        options = {"visibility": visibility, "attention_mask": None if mask is None else mask[:, a:b]}
        before = None if state is None else {n: t.clone() for n, t in state.tensors.items()}
        first, none = layer.mixer(noisy[:, a:b], layer.context(noisy[:, a:b], past, keep_state=False, **options), state)
        again, _ = layer.mixer(noisy[:, a:b], layer.context(noisy[:, a:b], past, keep_state=False, **options), state)
        assert none is None
        assert torch.equal(first, again)
        if before is not None:
            assert all(torch.equal(t, state[n]) for n, t in before.items())
        context = layer.context(clean[:, a:b], past, keep_state=True, **options)
        o, state = layer.mixer(clean[:, a:b], context, state)
        past = past.advance(context)
        outputs[0].append(o)
        outputs[1].append(again)
    return tuple(torch.cat(o, 1) for o in outputs)


def assert_equal_with_gradients(layer, function, reference, x: Tensor, noisy: Tensor, kept: Tensor | None = None):
    """Outputs to 1e-12 and all gradients to 1e-10, both relative to the largest element."""
    leaves = [x.requires_grad_(), noisy.requires_grad_(), *layer.mixer.parameters()]
    upstream = torch.randn(2, *x.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    if kept is not None:
        upstream = upstream * kept[..., None]
    results = []
    for run in (function, reference):
        outputs = run()
        loss = sum((o * u).sum() for o, u in zip(outputs, upstream, strict=True))
        results.append((outputs, torch.autograd.grad(loss, leaves, allow_unused=True)))
    (outputs, gradients), (expected, wanted) = results
    for o, e in zip(outputs, expected, strict=True):
        keep = slice(None) if kept is None else kept
        assert (o[keep] - e[keep]).abs().max() <= 1e-12 * max(1.0, float(e[keep].detach().abs().max()))
    for g, w in zip(gradients, wanted, strict=True):
        if g is None or w is None:
            assert all(t is None or not t.any() for t in (g, w))
            continue
        assert (g - w).abs().max() <= 1e-10 * max(1.0, float(w.abs().max()))


@pytest.mark.parametrize("length", [1, 3, S + 3])
def test_two_streams_are_inference_block_by_block(layer, tokens, length):
    """7 tokens: blocks of 3 leave a short one, blocks of 10 hold all; one token a block is the causal case."""
    for inside in forms(layer) if length == 3 else forms(layer)[:3:2]:
        visibility = BlockCausal(length, inside)
        clean, noisy = tokens(1, S), tokens(1, S, seed=7)
        assert_equal_with_gradients(
            layer,
            lambda: two_streams(layer, clean, noisy, visibility),  # noqa: B023
            lambda: block_by_block(layer, clean, noisy, visibility),  # noqa: B023
            clean,
            noisy,
        )


def test_padded_rows_of_two_streams_are_the_rows_alone(layer, tokens):
    """Rows of 7, 5 and 1 tokens, padded on the left: outputs, gradients, nothing from padding."""
    lengths = torch.tensor([S, 5, 1])[:, None]
    for inside in forms(layer):
        visibility = BlockCausal(3, inside)
        for mask in [torch.arange(S) >= S - lengths]:
            clean, noisy = (
                torch.where(mask[..., None], t, 1e3 * t).requires_grad_() for t in (tokens(3, S), tokens(3, S, seed=7))
            )
            outputs = two_streams(layer, clean, noisy, visibility, attention_mask=mask)
            got = torch.autograd.grad(sum((o * o)[mask].sum() for o in outputs), (clean, noisy))
            assert all((g[~mask] == 0).all() for g in got)
            for row, kept in enumerate(mask):
                alone = [t[row : row + 1, kept].detach().requires_grad_() for t in (clean, noisy)]
                expected = two_streams(layer, *alone, visibility)
                for o, e in zip(outputs, expected, strict=True):
                    torch.testing.assert_close(o[row, kept], e[0], rtol=0, atol=1e-11)
                right = torch.autograd.grad(sum((e * e).sum() for e in expected), alone)
                for g, r in zip(got, right, strict=True):
                    torch.testing.assert_close(g[row, kept], r[0], rtol=1e-9, atol=1e-10)


def test_rows_of_unequal_lengths_carry_their_own_states(layer, tokens):
    """Right-padded rows block by block, one of them out of tokens early, against both streams at once."""
    mask = torch.arange(S) < torch.tensor([S, 5, 2])[:, None]
    for inside in forms(layer):
        visibility = BlockCausal(3, inside)
        clean, noisy = tokens(3, S), tokens(3, S, seed=7)
        assert_equal_with_gradients(
            layer,
            lambda: two_streams(layer, clean, noisy, visibility, attention_mask=mask),  # noqa: B023
            lambda: block_by_block(layer, clean, noisy, visibility, mask),  # noqa: B023
            clean,
            noisy,
            mask,
        )


@pytest.mark.parametrize("cut", [3])
def test_blocks_read_together_are_blocks_read_one_by_one(layer, tokens, cut):
    """A prompt of several blocks in one call leaves what the calls leave, and any border between blocks may be a cut."""
    x = tokens(2, S)
    for inside in forms(layer):
        visibility = BlockCausal(3, inside)
        whole, after = layer(x, visibility=visibility, keep_state=True)
        context = layer.context(x[:, :cut], visibility=visibility, keep_state=True)
        first, state = layer.mixer(x[:, :cut], context)
        past = ModelState("blocks").advance(context)
        second, last = layer.mixer(x[:, cut:], layer.context(x[:, cut:], past, visibility=visibility), state)
        torch.testing.assert_close(torch.cat([first, second], 1), whole, rtol=0, atol=1e-11)
        for name, tensor in after.tensors.items():
            torch.testing.assert_close(last[name], tensor, rtol=0, atol=1e-11)


def test_packed_blocks_are_the_sequences_alone(layer, tokens):
    if layer.mixer.name == "hgrn":
        with pytest.raises(ValueError, match="packed blocks"):
            layer(tokens(1, 9), cu_seqlens=torch.tensor([0, 9]), visibility=BlockCausal(3, "decayed"))
        return
    cuts, x = [0, 5, 6, S], tokens(1, S)
    for inside in forms(layer):
        o, _ = layer(x, cu_seqlens=torch.tensor(cuts), visibility=BlockCausal(3, inside))
        for a, b in itertools.pairwise(cuts):
            expected, _ = layer(x[:, a:b], visibility=BlockCausal(3, inside))
            torch.testing.assert_close(o[:, a:b], expected, rtol=0, atol=1e-11)


def test_blocks_of_one_token_are_the_causal_layer(layer, tokens):
    """inside="decayed" applies a token's own gate and write: with rho = 0 also for the delta rule's two directions."""
    x = tokens(2, S)
    expected, after = layer(x, visibility=Causal(), keep_state=True)
    o, last = layer(x, visibility=BlockCausal(1, "decayed"), rho=0.0, keep_state=True)
    torch.testing.assert_close(o, expected, rtol=0, atol=1e-11)
    for name, tensor in after.tensors.items():
        torch.testing.assert_close(last[name], tensor, rtol=0, atol=1e-11)


def test_rho_leads_from_the_causal_layer_to_the_bidirectional_one(layer, tokens):
    if layer.mixer.name == "hgrn":
        return  # refuses the bidirectional form
    x, both = tokens(2, S), {"visibility": Bidirectional()}
    causal, full = layer(x)[0], layer(x, **both)[0]
    none, some, all_ = torch.zeros(S, S, dtype=torch.bool), torch.rand(S, S) < 0.5, torch.ones(S, S, dtype=torch.bool)
    torch.testing.assert_close(layer(x, rho=0.0, **both)[0], causal, rtol=0, atol=1e-12)
    torch.testing.assert_close(layer(x, rho=1.0, **both)[0], full, rtol=0, atol=0)
    between = layer(x, rho=0.5, ahead=some, **both)[0]
    assert (between - causal).abs().max() > 1e-4
    assert (between - full).abs().max() > 1e-4
    near = layer(x, rho=1 - 1e-9, ahead=all_, **both)[0]
    torch.testing.assert_close(near, full, rtol=0, atol=1e-6)
    near = layer(x, rho=1e-9, ahead=none, **both)[0]
    torch.testing.assert_close(near, causal, rtol=0, atol=1e-6)


def test_what_does_not_go_together_is_refused(layer, tokens):
    x, block = tokens(2, 6), BlockCausal(3)
    build = SequenceContext.build
    with pytest.raises(ValueError, match="two streams need visibility=BlockCausal"):
        build(2, 6, streams=2)
    with pytest.raises(ValueError, match="expected 1, or 2"):
        build(2, 6, streams=3, visibility=block)
    with pytest.raises(ValueError, match="cu_seqlens: not together with two streams"):
        build(1, 6, streams=2, visibility=block, cu_seqlens=torch.tensor([0, 6]))
    with pytest.raises(ValueError, match="state: not together with two streams"):
        build(2, 6, streams=2, visibility=block, keep_state=True)
    with pytest.raises(ValueError, match=r"within 0\.\.1"):
        build(2, 6, rho=1.5, visibility=Bidirectional())
    with pytest.raises(ValueError, match="nothing from ahead"):
        build(2, 6, rho=0.5)
    with pytest.raises(ValueError, match=r"ahead: rho = 0.5 needs the pairs"):
        build(2, 6, rho=0.5, visibility=Bidirectional())
    with pytest.raises(ValueError, match=r"ahead: shape \[5, 5\]"):
        build(2, 6, rho=0.5, visibility=Bidirectional(), ahead=torch.ones(5, 5, dtype=torch.bool))
    with pytest.raises(ValueError, match="blocks belong to BlockCausal"):
        _ = build(2, 6).block_of
    if layer.mixer.name == "hgrn":
        with pytest.raises(ValueError, match="without queries and keys"):
            layer(x, visibility=block)


def test_reversing_the_input_reverses_the_output_of_the_bidirectional_layer(layer, tokens):
    """Both directions share their weights. Rotary positions tell left from right, and so does a gate between the directions."""
    name = layer.mixer.name
    if name in ("attention", "retnet", "hgrn") or getattr(layer.mixer.options, "combine", "average") == "gate":
        return
    x, both = tokens(2, S), {"visibility": Bidirectional()}
    torch.testing.assert_close(layer(x.flip(1), **both)[0].flip(1), layer(x, **both)[0], rtol=0, atol=1e-11)
