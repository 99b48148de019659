"""Block diffusion on stacks: both streams in one pass against block by block, states, padding, shift, bad input."""

# Options go through dictionaries of mixed types, and weights of modules are tensors: a type checker can not know either.
# pyright: reportCallIssue=false, reportArgumentType=false, reportIndexIssue=false, reportOptionalMemberAccess=false

import pytest
import torch
from torch import Tensor

from latentcot.backbone import ForeignStateError, HybridConfig, HybridForCausalLM, SequenceContext
from latentcot.diffusion_reasoning import DiffusionConfig, DiffusionLM, NoiseSchedule, diffusion_loss
from latentcot.diffusion_reasoning.block_diffusion import BlockDiffusionModel, two_stream_mask
from latentcot.diffusion_reasoning.block_diffusion import model as block_model
from latentcot.kernels import Bidirectional, BlockCausal

MASK, VOCAB, L = 6, 19, 11
OPTIONS = {
    "attention": {"num_heads": 2},
    "hgrn": {"use_short_conv": True},
    "retnet": {"num_heads": 2},
    "gla": {"num_heads": 2},
    "hgrn2": {"num_heads": 2, "expand_ratio": 6},
    "deltanet": {"num_heads": 2},
    "gated_deltanet": {"num_heads": 2, "head_dim": 8},
}
PURE = {name: [name, name] for name in OPTIONS}
HYBRID = {f"{name}-attention": [name, "attention", name] for name in OPTIONS if name != "attention"}
WITHOUT_CONV = {"deltanet": {"use_short_conv": False}, "gated_deltanet": {"use_short_conv": False}}
WITH_CONV = {name: {"use_short_conv": True} for name in ("gla", "hgrn2")}


def make(mixers, block_length=4, dtype=torch.float64, changes=None, **settings) -> BlockDiffusionModel:
    torch.manual_seed(0)
    options = {name: {**OPTIONS[name], **(changes or {}).get(name, {})} for name in set(mixers)}
    config = HybridConfig(
        vocab_size=VOCAB,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=len(mixers),
        mixers=list(mixers),
        initializer_range=0.3,
        convolution_init="uniform",
        **options,  # type: ignore[arg-type]
    )
    if "hgrn" in mixers:
        settings["inside"] = "decayed"
    return BlockDiffusionModel(HybridForCausalLM(config).to(dtype).eval(), block_length, MASK, **settings)


def tokens(rows=2, length=L, seed=0) -> tuple[Tensor, Tensor]:
    """Noisy and clean ids."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(7, VOCAB, (rows, length), generator=generator)
    return x.masked_fill(torch.rand(rows, length, generator=generator) < 0.6, MASK), x


def snapshot(state) -> list[Tensor]:
    held = [t.clone() for entry in state.memory.entries.values() for t in entry.tensors.values()]
    return held + [t.clone() for t in (state.last, state.memory.lengths, state.memory.valid) if t is not None]


def block_by_block(model, z: Tensor, x: Tensor, mask: Tensor | None = None) -> Tensor:
    """Logits of every noisy position by two denoising passes a block from the carried state, then its commit."""
    state, found = model.init_state(len(x)), []
    for a in range(0, x.shape[1], model.block_length):
        piece = slice(a, a + model.block_length)
        real = None if mask is None else mask[:, piece]
        before = snapshot(state)
        first, again = (model.denoise(z[:, piece], state, real) for _ in range(2))
        assert torch.equal(first, again)
        assert all(torch.equal(b, t) for b, t in zip(before, snapshot(state), strict=True))
        found.append(again)
        state = model.commit(x[:, piece], state, real)
    return torch.cat(found, 1)


def assert_same(model, z: Tensor, x: Tensor):
    """Logits to 1e-12 and the gradients of all parameters to 1e-10, relative to the largest."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    upstream = torch.randn(*x.shape, VOCAB, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    both = []
    for logits in (model.forward_two_stream(z, x), block_by_block(model, z, x)):
        both.append((logits.detach(), torch.autograd.grad((logits * upstream).sum(), parameters, allow_unused=True)))
    (logits, gradients), (expected, wanted) = both
    assert (logits - expected).abs().max() <= 1e-12 * max(1.0, float(expected.abs().max()))
    largest = max(float(w.abs().max()) for w in wanted if w is not None)
    for g, w in zip(gradients, wanted, strict=True):
        if g is None or w is None:
            assert g is None or not g.any()
            assert w is None or not w.any()
        else:
            assert (g - w).abs().max() <= 1e-10 * max(1.0, largest)


# -- the equality that defines correctness -----------------------------------------------------------------------------


@pytest.mark.parametrize("stack", PURE | HYBRID)
def test_one_pass_of_two_streams_is_inference_block_by_block(stack):
    """Pure and hybrid stacks, blocks of 4 over 11 tokens."""
    assert_same(make((PURE | HYBRID)[stack]), *tokens())


@pytest.mark.parametrize("changes", [WITHOUT_CONV, WITH_CONV], ids=["conv off", "conv on"])
@pytest.mark.parametrize("inside", ["softmax", "bilinear", "decayed", "additive"])
def test_whatever_the_form_inside_a_block_with_and_without_convolutions(inside, changes):
    for name in changes:
        assert_same(make([name, "attention", name], changes=changes, inside=inside), *tokens())


@pytest.mark.parametrize("block_length", [1, 5, L + 5])
def test_whatever_the_length_of_the_blocks(block_length):
    for shift in (False, True):
        assert_same(make(["gated_deltanet", "attention"], block_length, shift=shift), *tokens())


def test_the_order_free_write_and_grouped_windowed_attention():
    changes = {"attention": {"num_kv_heads": 1, "window_size": 3}}
    assert_same(make(["deltanet", "attention"], changes=changes, write="order_free"), *tokens())


def test_within_fp32_and_bf16():
    """2e-5 in fp32 and a relative RMS of 2e-2 in bf16, against fp64."""
    z, x = tokens()
    for stack in (["gla", "gla"], ["gated_deltanet", "attention", "gated_deltanet"]):
        exact = make(stack).forward_two_stream(z, x).detach()
        for dtype, bound in ((torch.float32, 2e-5), (torch.bfloat16, 2e-2)):
            model = make(stack, dtype=dtype)
            with torch.no_grad():
                pair = model.forward_two_stream(z, x), block_by_block(model, z, x)
            if dtype == torch.bfloat16:
                difference = pair[0].double() - pair[1].double()
                assert difference.square().mean().sqrt() <= bound * exact.square().mean().sqrt()
            else:
                for logits in pair:
                    assert (logits.double() - exact).abs().max() <= bound * max(1.0, float(exact.abs().max()))


# -- who sees whom -----------------------------------------------------------------------------------------------------


def test_the_mask_of_two_streams_is_the_table():
    """For all b that divide L <= 16, entry by entry, and the masks of attention layers are its parts."""
    for length in range(1, 17):
        for b in (b for b in range(1, length + 1) if length % b == 0):
            mask = two_stream_mask(length, b)
            for q in range(2 * length):
                for k in range(2 * length):
                    of_q, of_k = (q % length) // b, (k % length) // b
                    if q < length:
                        expected = of_q == of_k if k < length else of_k < of_q
                    else:
                        expected = k >= length and of_k <= of_q
                    assert bool(mask[q, k]) == expected
            context = SequenceContext.build(1, length, visibility=BlockCausal(b), streams=2)
            clean, noisy = context.stream_masks
            assert torch.equal(clean[0, 0], mask[length:, length:])
            assert torch.equal(noisy[0, 0], torch.cat([mask[:length, length:], mask[:length, :length]], 1))


@pytest.mark.parametrize("stack", [["gla", "gla"], ["gated_deltanet", "attention"], ["attention", "attention"]])
def test_what_a_noisy_position_depends_on(stack):
    """A clean token reaches later blocks only, a noisy one its own block only."""
    model, (z, x) = make(stack), tokens(1)
    before = model.forward_two_stream(z, x)[0]
    other = torch.where(x[:, 5] == 8, 9, 8)
    for name, moved in (("clean", (z, x.clone())), ("noisy", (z.clone(), x))):
        (moved[1] if name == "clean" else moved[0])[:, 5] = other
        changed = (model.forward_two_stream(*moved)[0] - before).abs().amax(-1) > 1e-9
        expected = torch.arange(L) >= 8 if name == "clean" else (torch.arange(L) >= 4) & (torch.arange(L) < 8)
        assert torch.equal(changed, expected)


def test_a_noisy_loss_reaches_clean_tokens_of_earlier_blocks():
    """By finite differences through the states, the convolution and the keys."""
    model, (z, x) = make(["gated_deltanet", "attention"]), tokens(1)
    weight = model.backbone.model.embeddings.weight
    z[:, :] = MASK
    target = int(x[0, 2])
    x[0, 3:] = torch.where(x[0, 3:] == target, target - 1 if target > 7 else target + 1, x[0, 3:])

    def loss() -> Tensor:
        return model.forward_two_stream(z, x)[0, 9].square().sum()

    gradient = torch.autograd.grad(loss(), weight)[0][target]
    direction = torch.randn(16, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    slopes = []
    for sign in (1, -1):
        with torch.no_grad():
            weight[target] += sign * 1e-6 * direction
            slopes.append(loss())
            weight[target] -= sign * 1e-6 * direction
    assert gradient.abs().max() > 1e-6
    torch.testing.assert_close((slopes[0] - slopes[1]) / 2e-6, gradient @ direction, rtol=1e-5, atol=1e-8)


def test_one_block_is_masked_diffusion_over_the_whole_sequence():
    """b = L on attention: the noisy stream alone, seen from both sides."""
    model, (z, x) = make(["attention", "attention"], L), tokens()
    expected = model.backbone(z, visibility=Bidirectional()).logits
    torch.testing.assert_close(model.forward_two_stream(z, x), expected, rtol=0, atol=1e-12)


def test_a_shifted_next_token_loss_on_the_clean_stream_would_leak():
    """The clean half sees its whole block: position i knows token i + 1 unless b = 1."""
    z, x = tokens(1)
    moved = x.clone()
    moved[:, 6] = torch.where(x[:, 6] == 8, 9, 8)
    for b, leaks in ((1, False), (4, True)):
        model = make(["gla", "attention"], b, inside="decayed")
        change = (model.two_stream_hidden(z, x)[1] - model.two_stream_hidden(z, moved)[1])[0, 5].abs().max()
        assert bool(change > 1e-9) == leaks


# -- carried states ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stack", ["attention", "hgrn", "retnet", "gla", "hgrn2-attention", "gated_deltanet-attention"])
def test_a_prompt_may_be_cut_at_any_border_of_blocks(stack):
    """Logits in fp32 to 1e-5, whole or in pieces."""
    model = make((PURE | HYBRID)[stack], dtype=torch.float32, shift=True)
    z, x = tokens(2, 12)
    with torch.no_grad():
        start = model.init_state(2)
        expected = model.denoise(z[:, :4], model.commit(x, start))
        for cut in (4, 8):
            state = model.commit(x[:, cut:], model.commit(x[:, :cut], start))
            torch.testing.assert_close(model.denoise(z[:, :4], state), expected, rtol=0, atol=1e-5)


def test_long_prompts_are_read_in_pieces(monkeypatch):
    model, (z, x) = make(["gla", "attention"], 3, shift=True), tokens(2, 14)
    mask = torch.arange(14) >= torch.tensor([0, 5])[:, None]
    whole = model.commit(x, model.init_state(2), mask)
    monkeypatch.setattr(block_model, "PREFILL_TOKENS", 7)
    pieces = model.commit(x, model.init_state(2), mask)
    assert pieces.lengths.tolist() == [14, 9]
    torch.testing.assert_close(model.denoise(z[:, :3], pieces), model.denoise(z[:, :3], whole), rtol=0, atol=1e-11)


@pytest.mark.parametrize("stack", ["attention", "gated_deltanet-attention", "hgrn"])
def test_rows_of_any_length_are_the_rows_alone(stack):
    """Two-stream pass, prompts and blocks with padding: no row knows its neighbours."""
    model = make((PURE | HYBRID)[stack], shift=True)
    z, x = tokens(3)
    lengths = torch.tensor([L, 6, 1])
    left = torch.arange(L) >= L - lengths[:, None]
    together = model.forward_two_stream(z, x, attention_mask=left)
    state = model.commit(x, model.init_state(3), left)
    block, real = z[:, :4], torch.arange(4) < torch.tensor([4, 2, 3])[:, None]
    denoised = model.denoise(block, state, real)
    for row, kept in enumerate(left):
        alone = x[row : row + 1, kept]
        expected = model.forward_two_stream(z[row : row + 1, kept], alone)[0]
        torch.testing.assert_close(together[row, kept], expected, rtol=0, atol=1e-11)
        own = model.commit(alone, model.init_state(1))
        right = model.denoise(block[row : row + 1, real[row]], own)[0]
        torch.testing.assert_close(denoised[row, real[row]], right, rtol=0, atol=1e-11)
        picked = model.denoise(block[row : row + 1], state.select(torch.tensor([row])), real[row : row + 1])[0]
        torch.testing.assert_close(picked[real[row]], right, rtol=0, atol=1e-11)


def test_a_row_of_padding_is_left_as_it_is():
    model, (_, x) = make(["gated_deltanet", "attention"], shift=True), tokens(2, 4)
    state = model.commit(x, model.init_state(2))
    mask = torch.tensor([[True] * 4, [False] * 4])
    after = model.commit(x, state, mask)
    for place, entry in state.memory.entries.items():
        for name, tensor in entry.tensors.items():
            if name not in ("keys", "values"):
                assert torch.equal(after.memory.entries[place][name][1], tensor[1])
    assert after.lengths.tolist() == [8, 4]
    assert after.last is not None
    assert state.last is not None
    assert torch.equal(after.last[1], state.last[1])
    nothing = model.commit(x, state, torch.zeros(2, 4, dtype=torch.bool))
    assert nothing is state


def test_the_state_of_a_pure_linear_stack_does_not_grow():
    model, (_, x) = make(["gated_deltanet", "gated_deltanet"]), tokens(1, 64)
    state = model.commit(x[:, :4], model.init_state(1))
    assert model.commit(x[:, 4:], state).nbytes == state.nbytes


# -- from an autoregressive model --------------------------------------------------------------------------------------


@pytest.mark.parametrize("mixer", OPTIONS)
def test_blocks_of_one_token_with_shift_are_the_autoregressive_model(mixer):
    """inside="decayed", rho = 0: logits and NELBO are those of the causal backbone, before any step of training."""
    model = make([mixer, "attention"], 1, inside="decayed", shift=True, rho=0.0)
    _, x = tokens()
    z = x.masked_fill(torch.arange(L) > 0, MASK)
    expected = model.backbone(x).logits[:, :-1]
    torch.testing.assert_close(model.forward_two_stream(z, x)[:, 1:], expected, rtol=0, atol=1e-11)
    torch.testing.assert_close(block_by_block(model, z, x)[:, 1:], expected, rtol=0, atol=1e-11)


def test_a_diffusion_lm_with_modulation_runs_in_blocks():
    """A small BD3-LM: layer norms, modulation by sigma = 0; its own block length, mask and network."""
    torch.manual_seed(0)
    config = DiffusionConfig(
        vocab_size=VOCAB, hidden_size=16, num_hidden_layers=2, mixer="attention", attention={"num_heads": 2},
        intermediate_size=24, norm="layer", mlp="gelu", modulation=8, block_length=3, mask_token_id=MASK,
        initializer_range=0.3,
    )  # fmt: skip
    lm = DiffusionLM(config).double().eval()
    for parameter in lm.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    model = BlockDiffusionModel.from_diffusion_lm(lm)
    assert (model.block_length, model.mask_id, model.form.inside) == (3, MASK, "softmax")
    assert_same(model, *tokens())
    z, x = tokens()
    whole = BlockDiffusionModel.from_diffusion_lm(lm, L).forward_two_stream(z, x)
    expected = lm(z).logits
    torch.testing.assert_close(whole, expected, rtol=0, atol=1e-11)
    with pytest.raises(ValueError, match="saved as the DiffusionLM"):
        model.save_pretrained("nowhere")
    config.block_length = None
    with pytest.raises(ValueError, match="configuration has none"):
        BlockDiffusionModel.from_diffusion_lm(lm)


# -- files and bad input -----------------------------------------------------------------------------------------------


def test_saved_and_loaded_it_is_the_same(tmp_path):
    model = make(["gla", "attention"], 3, dtype=torch.float32, inside="bilinear", shift=True, state_from="noisy_last")
    model.save_pretrained(tmp_path)
    again = BlockDiffusionModel.from_pretrained(tmp_path)
    z, x = tokens()
    assert torch.equal(model.forward_two_stream(z, x), again.forward_two_stream(z, x))
    assert (again.form, again.shift, again.state_from, again.exact) == (model.form, True, "noisy_last", False)
    with pytest.raises(ValueError, match=r"there is no block_diffusion\.json"):
        BlockDiffusionModel.from_pretrained(tmp_path / "elsewhere")


def test_bad_models_are_named():
    backbone = make(["gla"]).backbone
    for settings, message in (
        ({"block_length": 0}, "length is 0"),
        ({"mask_id": VOCAB}, "mask_id: expected a token id within 0..18"),
        ({"mask_id": 2}, "also eos_token_id"),
        ({"inside": "dense"}, "inside is 'dense'"),
        ({"inside": "decayed", "write": "order_free"}, "is not defined"),
        ({"state_from": "noise"}, "state_from: 'noise'"),
        ({"rho": 2.0}, r"rho: expected a share within 0\.\.1"),
        ({"embed_time": torch.nn.Identity()}, "modulation = None"),
    ):
        with pytest.raises(ValueError, match=message):
            BlockDiffusionModel(backbone, **{"block_length": 4, "mask_id": MASK, **settings})
    with pytest.raises(ValueError, match="hgrn layers have no queries and keys"):
        BlockDiffusionModel(make(["hgrn"]).backbone, 4, MASK)


def test_a_state_of_another_batch_dtype_model_or_form_is_refused():
    model, (z, x) = make(["gla", "attention"]), tokens()
    state = model.commit(x[:, :4], model.init_state(2))
    with pytest.raises(ValueError, match="holds 2 rows, the tokens have 1"):
        model.denoise(z[:1, :4], state)
    with pytest.raises(ValueError, match=r"made in torch\.float64, but the model is in torch\.float32"):
        make(["gla", "attention"], dtype=torch.float32).denoise(z[:, :4], state)
    with pytest.raises(ForeignStateError, match="another model"):
        make(["gla", "gla"]).denoise(z[:, :4], state)
    with pytest.raises(ForeignStateError, match="form softmax/recurrent/4, expected bilinear/recurrent/4"):
        make(["gla", "attention"], inside="bilinear").commit(x[:, :4], state)
    with pytest.raises(ValueError, match="5 tokens given, but a block has 4"):
        model.denoise(z[:, :5], state)
    with pytest.raises(ValueError, match=r"expected that of the tokens, \[2, 4\]"):
        model.denoise(z[:, :4], state, torch.ones(2, 3, dtype=torch.bool))
    with pytest.raises(TypeError, match="a BlockState"):
        model.denoise(z[:, :4], state.memory)
    with pytest.raises(ValueError, match="at least one sequence"):
        model.init_state(0)
    with pytest.raises(ValueError, match="expected one shape"):
        model.forward_two_stream(z, x[:, :3])
    with pytest.raises(ValueError, match="positive integer"):
        two_stream_mask(4, 0)


def test_the_whole_canvas_loss_still_takes_the_backbone():
    """A block model's backbone is an ordinary one: the loss over the whole canvas runs on it."""
    backbone, (_, x) = make(["gla"]).backbone, tokens()
    out = diffusion_loss(
        backbone, x, schedule=NoiseSchedule(), mask_id=MASK, generator=torch.Generator().manual_seed(0)
    )
    assert bool(out.loss.isfinite())
