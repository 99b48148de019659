"""Ouro: the loop, its exits with and without a state, training in two stages, published names."""

import json

import pytest
import torch
from safetensors.torch import save_file

from latentcot.backbone import SequenceContext
from latentcot.backbone.checkpoint_config import CheckpointError
from latentcot.backbone.checkpoint_keys import CheckpointMismatchError
from latentcot.reasoner import SPECIAL, AnswerLimits, Reasoner, Sites
from latentcot.recurrent_depth.exit_law import entropy_loss, exit_law, gate_loss, quantile_step
from latentcot.recurrent_depth.ouro import Ouro
from latentcot.recurrent_depth.ouro_checkpoint import (
    OURO_1_4B,
    OURO_2_6B,
    empty_ouro,
    load_ouro,
    load_published,
    our_name,
    published_name,
    published_tensors,
)
from latentcot.sequences import constant, join, prompt, training_rows
from latentcot.training import TrainConfig, train
from latentcot.training.budget import FlopCounter

ATTENTION = ["attention"] * 2
HYBRID = ["gated_deltanet", "attention"]
SANDWICH = {"norm_placement": "sandwich_pre_residual", "num_hidden_layers": 2}
TINY = {
    **OURO_1_4B,
    "hidden_size": 16,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 30,
}
TINY |= {"intermediate_size": 24, "num_hidden_layers": 3}


@pytest.fixture
def make_ouro(make_backbone):
    def make(mixers=ATTENTION, gate_bias: float = -0.5, **settings) -> Ouro:
        model = Ouro(make_backbone(mixers=mixers, **SANDWICH), settings)
        with torch.no_grad():
            torch.manual_seed(3)
            model.gate.weight.normal_(0, 0.4)
            model.gate.bias.fill_(gate_bias)
        return model

    return make


def ids_and_mask() -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(11, 20, (5, 7), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[1, 5:], mask[2, :3], mask[3, 2:4] = False, False, False
    return ids, mask


# -- the loop ------------------------------------------------------------------------------------------------------------


def test_one_step_is_the_plain_decoder(make_ouro):
    model = make_ouro()
    ids, _ = ids_and_mask()
    expected = model.backbone(input_ids=ids).logits
    torch.testing.assert_close(model.logits(model.unroll(ids, 1)), expected, atol=1e-12, rtol=0)


def test_steps_by_hand(make_ouro):
    """The block and the loop written out, with the norm inside the loop and none behind it."""
    model = make_ouro()
    ids = ids_and_mask()[0][:1]
    m = model.backbone.model

    def rms(x, w):
        return x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * w

    def rotate(x):
        half = x.shape[-1] // 2
        angle = torch.arange(7.0, dtype=torch.float64)[:, None] * 10000.0 ** -(torch.arange(half) / half).double()
        a, b = x[..., :half], x[..., half:]
        return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1)

    x = m.embeddings.weight[ids[0]]
    for _ in range(3):
        for block in m.layers:
            n = rms(x, block.attn_norm.weight)
            heads = []
            for h in range(4):
                q, k, v = (
                    (n @ p.weight.T)[:, 8 * h : 8 * h + 8]
                    for p in (block.attn.q_proj, block.attn.k_proj, block.attn.v_proj)
                )
                score = rotate(q) @ rotate(k).T / 8**0.5
                score = score.masked_fill(torch.ones(7, 7).triu(1).bool(), -torch.inf)
                heads.append(score.softmax(-1) @ v)
            x = x + rms(torch.cat(heads, -1) @ block.attn.o_proj.weight.T, block.attn_norm_2.weight)
            n = rms(x, block.mlp_norm.weight)
            inner = torch.nn.functional.silu(n @ block.mlp.gate_proj.weight.T) * (n @ block.mlp.up_proj.weight.T)
            x = x + rms(inner @ block.mlp.down_proj.weight.T, block.mlp_norm_2.weight)
        x = rms(x, m.norm.weight)
    unrolled = model.unroll(ids, 3)
    torch.testing.assert_close(model.logits(unrolled)[0], x @ model.backbone.lm_head.weight.T, atol=1e-10, rtol=0)
    gate = (x @ model.gate.weight[0]) + model.gate.bias
    torch.testing.assert_close(unrolled.gate[2, 0], gate, atol=1e-10, rtol=0)


def test_mixture_is_the_mean_of_logits_under_the_law(make_ouro):
    model = make_ouro()
    ids, mask = ids_and_mask()
    out = model.unroll(ids, 4, attention_mask=mask)
    p = exit_law(out.gate).exp()
    mixed = sum(p[t][..., None] * model.backbone.lm_head(out.hidden[t]) for t in range(4))
    torch.testing.assert_close(model.logits(out, "mixture"), mixed, atol=1e-12, rtol=0)


# -- exits ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mixers", [ATTENTION, HYBRID], ids=["attention", "hybrid"])
@pytest.mark.parametrize("q", [0.0, 0.5, 0.7, 1.0])
def test_rows_that_leave_are_not_computed_and_equal_rows_alone(make_ouro, mixers, q):
    model = make_ouro(mixers)
    ids, mask = ids_and_mask()
    seen = []
    hook = model.backbone.model.layers[0].register_forward_hook(lambda _m, args, _o: seen.append(len(args[0])))
    batched = model.recur(ids, q, 6, attention_mask=mask)
    hook.remove()
    full = model.unroll(ids, 6, attention_mask=mask)
    last = mask.shape[1] - 1 - mask.flip(1).to(torch.uint8).argmax(1)
    expected = quantile_step(exit_law(full.gate[:, torch.arange(5), last]), q)
    assert batched.steps.tolist() == expected.tolist()
    if q == 0.5:
        assert len(set(batched.steps.tolist())) > 1  # else the test would show little
    assert seen == [int((expected >= t).sum()) for t in range(1, max(expected.tolist()) + 1)]
    assert batched.block_passes == sum(seen) == int(expected.sum())
    for b in range(5):
        real = mask[b]
        torch.testing.assert_close(
            batched.hidden[b][real], full.hidden[int(expected[b]) - 1][b][real], atol=1e-10, rtol=0
        )
        alone = model.recur(ids[b : b + 1], q, 6, attention_mask=mask[b : b + 1])
        assert int(alone.steps) == int(batched.steps[b])
        torch.testing.assert_close(alone.logits[0][real], batched.logits[b][real], atol=1e-10, rtol=0)


def test_full_depth_and_first_step(make_ouro):
    ids, mask = ids_and_mask()
    sure = make_ouro(gate_bias=60.0)
    assert sure.recur(ids, 1.0, 3, attention_mask=mask).steps.tolist() == [3] * 5
    assert sure.recur(ids, 0.99, 3, attention_mask=mask).steps.tolist() == [1] * 5
    never = make_ouro(gate_bias=-60.0)
    assert never.recur(ids, 0.01, 3, attention_mask=mask).steps.tolist() == [3] * 5
    assert never.recur(ids, 0.0, 3, attention_mask=mask).steps.tolist() == [1] * 5


# -- states ----------------------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("mixers", [ATTENTION, HYBRID], ids=["attention", "hybrid"])
def test_cached_steps_equal_the_whole_pass_in_single_precision(make_backbone, mixers):
    model = Ouro(make_backbone(mixers=mixers, initializer_range=0.02, **SANDWICH).float())
    ids, _ = ids_and_mask()
    whole = model.logits(model.unroll(ids, 4))
    states = model.unroll(ids[:, :3], 4, use_cache=True).states
    scale = float(whole.abs().max())
    for t in range(3, 7):
        assert states is not None
        hidden, states, _ = model.read_token(ids[:, t : t + 1], states, 1.0, 4)
        torch.testing.assert_close(model.backbone.lm_head(hidden) / scale, whole[:, t] / scale, atol=1e-5, rtol=0)


@pytest.mark.parametrize("mixers", [ATTENTION, HYBRID], ids=["attention", "hybrid"])
def test_cached_steps_equal_the_whole_pass(make_ouro, mixers):
    model = make_ouro(mixers)
    ids, mask = ids_and_mask()
    ids, mask = torch.cat([ids, ids[:, :3]], 1), torch.cat([mask, torch.ones(5, 3, dtype=torch.bool)], 1)
    whole = model.logits(model.unroll(ids, 3, attention_mask=mask))
    begun = model.unroll(ids[:, :7], 3, attention_mask=mask[:, :7], use_cache=True)
    states = begun.states
    middle = model.unroll(ids[:, 7:9], 3, states=states)
    torch.testing.assert_close(model.logits(middle), whole[:, 7:9], atol=1e-10, rtol=0)
    for q, least in ((0.0, 1), (1.0, 3)):
        assert model.read_token(ids[:, 7:8], states, q, 3)[2].tolist() == [least] * 5
    for t in (7, 8, 9):
        hidden, states, taken = model.read_token(ids[:, t : t + 1], states, 1.0, 3)
        torch.testing.assert_close(model.backbone.lm_head(hidden), whole[:, t], atol=1e-10, rtol=0)
        assert taken.tolist() == [3] * 5


def token_by_token(model: Ouro, ids, mask, q, gaps, steps=4):
    out = model.unroll(ids[:, :4], steps, attention_mask=mask[:, :4], use_cache=True)
    states, hidden, taken = out.states, [], []
    assert states is not None
    states = type(states)(states.steps, states.lengths, gaps)
    for t in range(4, ids.shape[1]):
        h, states, n = model.read_token(ids[:, t : t + 1], states, q, steps)
        hidden.append(h)
        taken.append(n)
    return torch.stack(hidden, 1), torch.stack(taken, 1)


@pytest.mark.parametrize(
    ("mixers", "gaps"), [(ATTENTION, "copy"), (ATTENTION, "hold"), (HYBRID, "hold"), (HYBRID, "copy")]
)
def test_tokens_of_different_depths_in_a_batch_equal_rows_alone(make_ouro, mixers, gaps):
    model = make_ouro(mixers)
    ids, mask = ids_and_mask()
    ids = torch.cat([ids, ids.flip(0)], 1)
    mask = torch.cat([mask, torch.ones_like(mask)], 1)
    mask[:, 4:] = True
    hidden, taken = token_by_token(model, ids, mask, 0.6, gaps)
    assert len(set(taken.flatten().tolist())) > 2
    assert int((taken.amax(1) > taken.amin(1)).sum()) >= 3
    for b in range(5):
        alone, depth = token_by_token(model, ids[b : b + 1], mask[b : b + 1], 0.6, gaps)
        assert depth[0].tolist() == taken[b].tolist()
        torch.testing.assert_close(alone[0], hidden[b], atol=1e-10, rtol=0)


@pytest.mark.parametrize("gaps", ["copy", "hold"])
def test_what_deeper_steps_hold_for_a_token_that_left(make_ouro, gaps):
    """Against attention over an explicit list of keys and values at each step."""
    model = make_ouro(steps=3)
    some = ids_and_mask()[0]
    ids = torch.cat([some[:1], some[4:]], 1)
    mask = torch.ones_like(ids, dtype=torch.bool)
    hidden, taken = token_by_token(model, ids, mask, 0.6, gaps, steps=3)
    assert len(set(taken[0].tolist())) > 1
    m = model.backbone.model
    stored = [[{"k": [], "v": [], "t": []} for _ in m.layers] for _ in range(3)]

    def rotate(x, t):  # [H, 8]
        angle = t * 10000.0 ** -(torch.arange(4).double() / 4)
        a, b = x[:, :4], x[:, 4:]
        return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1)

    def rms(x, w):
        return x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * w

    for t in range(ids.shape[1]):
        x = m.embeddings.weight[ids[0, t]]
        depth = 3 if t < 4 else int(taken[0, t - 4])
        for i in range(depth):
            for place, block in zip(stored[i], m.layers, strict=True):
                n = rms(x, block.attn_norm.weight)
                q, k, v = ((p.weight @ n).view(4, 8) for p in (block.attn.q_proj, block.attn.k_proj, block.attn.v_proj))
                place["k"].append(rotate(k, t))
                place["v"].append(v)
                keys, values = torch.stack(place["k"], 1), torch.stack(place["v"], 1)
                weight = ((keys @ rotate(q, t)[..., None])[..., 0] / 8**0.5).softmax(-1)
                mixed = (weight[..., None] * values).sum(1).flatten()
                x = x + rms(block.attn.o_proj.weight @ mixed, block.attn_norm_2.weight)
                x = x + rms(block.mlp(rms(x, block.mlp_norm.weight)), block.mlp_norm_2.weight)
            x = rms(x, m.norm.weight)
        if gaps == "copy":
            for i in range(depth, 3):
                for place, source in zip(stored[i], stored[depth - 1], strict=True):
                    place["k"].append(source["k"][-1])
                    place["v"].append(source["v"][-1])
        if t >= 4:
            torch.testing.assert_close(hidden[0, t - 4], x, atol=1e-9, rtol=0)


@pytest.mark.parametrize("sharing", ["last", "first", "mean"])
def test_shared_states(make_ouro, sharing):
    """One state after the prompt: a first token reads the chosen keys at every step; memory is that of one step."""
    model = make_ouro()
    ids = ids_and_mask()[0]
    own = model.unroll(ids, 3, use_cache=True).states
    assert own is not None
    shared = own.shared(sharing)
    assert shared.nbytes * 3 < own.nbytes + 200
    chosen = {"last": [2], "first": [0], "mean": [0, 1, 2]}[sharing]
    token = ids[:, :1]
    hidden, after, _ = model.read_token(token, shared, 1.0, 3)
    x, columns = model.backbone.embed(token), []
    for _ in range(3):
        state = model.backbone.new_state()
        state.valid, state.lengths = own.steps[0].valid, own.steps[0].lengths
        for block in range(2):
            entries = [own.steps[i].entries[block, i] for i in chosen]
            mean = {n: sum(e[n] for e in entries) / len(entries) for n in ("keys", "values")}
            state = state.with_entry((block, 0), type(entries[0])("attention", mean))
        context = SequenceContext.build(5, 1, state=state)
        x, new = model.backbone.run(x, context, state=state)
        x = model.backbone.model.norm(x)
        assert new is not None
        columns.append(new.entries[1, 0]["keys"][:, :, -1])
    torch.testing.assert_close(hidden, x[:, 0], atol=1e-10, rtol=0)
    kept = torch.stack([columns[i] for i in chosen]).mean(0)
    torch.testing.assert_close(after.steps[0].entries[1, 0]["keys"][:, :, -1], kept, atol=1e-10, rtol=0)
    answers = model.read_token(token, after, 0.6, 3)
    assert answers[1].steps[0].get_seq_length() == 9


def test_states_that_do_not_fit(make_ouro):
    model = make_ouro(steps=3)
    ids = ids_and_mask()[0]
    states = model.unroll(ids, 3, use_cache=True).states
    assert states is not None
    with pytest.raises(ValueError, match="made for 3 steps"):
        model.unroll(ids, 2, states=states)
    with pytest.raises(ValueError, match="made for 3 steps"):
        model.read_token(ids[:, :1], states, 1.0, 4)
    with pytest.raises(ValueError, match="they hold 5 rows, the input has 2"):
        model.unroll(ids[:2], 3, states=states)
    with pytest.raises(ValueError, match="shape"):
        model.read_token(ids[:, :2], states)
    with pytest.raises(ValueError, match="shared as 'last' already"):
        states.shared("last").shared("mean")
    with pytest.raises(ValueError, match="steps"):
        model.unroll(ids, 0)


# -- as a method -----------------------------------------------------------------------------------------------------------


def test_settings_are_checked(make_ouro, make_backbone):
    for settings, message in (
        ({"step": 2}, "did you mean 'steps'"),
        ({"steps": 0}, "steps"),
        ({"q": 1.5}, "q: 1.5"),
        ({"betas": []}, "betas"),
        ({"betas": [-0.1]}, "betas: -0.1"),
        ({"gate_share": 2}, "gate_share"),
        ({"steps": 1}, "stage two needs at least two steps"),
        ({"readout": "mixture", "q": 0.5}, "q: 0.5 given, but readout 'mixture'"),
        ({"readout": "mixture", "sharing": "last"}, "sharing is 'last'"),
    ):
        with pytest.raises(ValueError, match=message):
            make_ouro(**settings)
    with pytest.raises(ValueError, match="gaps: 'fill' given"):
        make_ouro(HYBRID, gaps="fill")
    Ouro(make_backbone(mixers=HYBRID, **SANDWICH))


def test_phases_and_both_losses(make_ouro, make_batch, make_step):
    model, batch = make_ouro(steps=3), make_batch(2)
    first, second, gate = model.phases()
    assert [p.share for p in (first, second, gate)] == pytest.approx([0.45, 0.45, 0.1])
    assert [first.knobs["beta"], second.knobs["beta"]] == [0.1, 0.05]
    row = training_rows(batch)
    out = model.unroll(row.ids, attention_mask=row.mask)
    places = (row.labels[:, 1:] != -100).nonzero().tolist()
    losses = torch.stack(
        [
            torch.stack([-model.backbone.lm_head(h[b, s]).log_softmax(-1)[row.labels[b, s + 1]] for b, s in places])
            for h in out.hidden
        ]
    )
    gates = torch.stack([out.gate[:, b, s] for b, s in places], 1)
    for phase, beta in ((first, 0.1), (second, 0.05)):
        found = model.loss(batch, make_step(phase))
        torch.testing.assert_close(found.loss, entropy_loss(losses, exit_law(gates), beta), atol=1e-12, rtol=0)
    found = model.loss(batch, make_step(gate))
    torch.testing.assert_close(found.loss, gate_loss(losses, gates), atol=1e-12, rtol=0)
    found.loss.backward()
    moved = {name for name, p in model.named_parameters() if p.grad is not None}
    assert moved == {"gate.weight", "gate.bias"}


def test_training_freezes_the_language_model_in_stage_two(make_ouro, make_batch):
    class Same:
        def stream(self, start, rank=0, world_size=1):
            while True:
                yield make_batch(2)

        def describe(self):
            return {"same": True}

    model = make_ouro(steps=2, gate_share=0.5, betas=[0.1])
    weights: list[dict[str, torch.Tensor]] = []

    def watch(step, total, loss, phase):
        weights.append({n: p.detach().clone() for n, p in model.named_parameters()})

    report = train(model, Same(), TrainConfig(steps=8, warmup_steps=0, learning_rate=1e-2, log_every=1), watch=watch)
    assert report.history[3]["last_step"] < report.history[0]["last_step"]
    moved = {n for n in weights[3] if not torch.equal(weights[3][n], weights[7][n])}
    assert moved == {"gate.weight", "gate.bias"}
    assert {n for n in weights[0] if not torch.equal(weights[0][n], weights[3][n])} > moved


@pytest.mark.parametrize("mixers", [ATTENTION, HYBRID], ids=["attention", "hybrid"])
@pytest.mark.parametrize(
    "knobs", [{}, {"q": 0.5}, {"readout": "mixture"}, {"sharing": "last"}, {"q": 0.5, "sharing": "mean"}]
)
def test_answers_do_not_depend_on_the_batch(make_ouro, make_batch, mixers, knobs):
    model, prompts = make_ouro(mixers), make_batch(2).prompts
    limits = AnswerLimits(knobs=knobs)
    whole = model.answer(prompts, limits)
    for b in range(3):
        alone = model.answer(prompts.rows(torch.tensor([b])), limits)
        n = int(whole.tokens_emitted[b])
        assert alone.info["text"][0, :n].tolist() == whole.info["text"][b, :n].tolist()
        assert float(alone.flops[0]) == pytest.approx(float(whole.flops[b]))
        assert int(alone.sequential_passes[0]) == int(whole.sequential_passes[b])


def test_answers_and_their_price(make_ouro, make_batch):
    model, prompts = make_ouro(steps=3), make_batch(2).prompts
    found = model.answer(prompts)
    start = join([prompt(prompts), constant(prompts.ids, SPECIAL.ans)])
    logits = model.logits(model.unroll(start.ids, 3, attention_mask=start.mask))
    last = start.mask.sum(1) - 1
    assert found.info["text"][:, 0].tolist() == logits[torch.arange(3), last].argmax(-1).tolist()
    assert found.sequential_passes.tolist() == (3 * found.tokens_emitted).tolist()
    one = FlopCounter(model.backbone)
    price = 3 * (one(start.mask.sum(1).double(), 0) + 2 * 32 * start.mask.sum(1)) + one.head
    more = (found.tokens_emitted > 1).double()
    price = price + more * (3 * (one(torch.ones(3).double(), last.double() + 1) + 2 * 32) + one.head)
    torch.testing.assert_close(found.flops, price)
    early = model.answer(prompts, AnswerLimits(knobs={"q": 0.0}))
    assert early.info["depth"].tolist() == [1.0, 1.0, 1.0]
    assert early.sequential_passes.tolist() == (3 + early.tokens_emitted).tolist()
    exact = model.answer(prompts, AnswerLimits(knobs={"q": 1 - 1e-12}))
    assert torch.equal(exact.info["text"], found.info["text"])
    assert model.answer(prompts, AnswerLimits(sequential_passes=3)).tokens_emitted.tolist() == [1, 1, 1]
    with pytest.raises(ValueError, match="one token takes up to 3"):
        model.answer(prompts, AnswerLimits(sequential_passes=2))
    with pytest.raises(ValueError, match="did you mean 'steps'"):
        model.answer(prompts, AnswerLimits(knobs={"step": 2}))


def test_trace_and_saving(make_ouro, make_batch, tmp_path):
    model, prompts = make_ouro(steps=3, q=0.7), make_batch().prompts
    trace = model.trace(prompts, Sites(blocks=(1,)))
    assert trace.hidden.shape == (3, 1, 3, 7, 32)
    start = join([prompt(prompts), constant(prompts.ids, SPECIAL.ans)])
    out = model.unroll(start.ids, 3, attention_mask=start.mask)
    normed = model.backbone.model.norm(trace.hidden[2, 0])
    torch.testing.assert_close(normed[start.mask], out.hidden[2][start.mask])
    model.float().save_pretrained(tmp_path)
    again = Reasoner.from_pretrained(tmp_path)
    assert isinstance(again, Ouro)
    assert again.settings == model.settings
    assert torch.equal(again.answer(prompts).info["text"], model.answer(prompts).info["text"])


# -- published names -------------------------------------------------------------------------------------------------------


def listed_names(layers: int) -> set[str]:
    names = {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}
    names |= {"model.early_exit_gate.weight", "model.early_exit_gate.bias"}
    for i in range(layers):
        names |= {f"model.layers.{i}.self_attn.{p}_proj.weight" for p in "qkvo"}
        names |= {f"model.layers.{i}.mlp.{p}_proj.weight" for p in ("gate", "up", "down")}
        norms = ("input_layernorm", "input_layernorm_2", "post_attention_layernorm", "post_attention_layernorm_2")
        names |= {f"model.layers.{i}.{n}.weight" for n in norms}
    return names


@pytest.mark.parametrize(("values", "layers"), [(OURO_1_4B, 24), (OURO_2_6B, 48)], ids=["1.4B", "2.6B"])
def test_full_size_has_the_published_names(values, layers):
    model = empty_ouro(values)
    tensors = published_tensors(model)
    assert set(tensors) == listed_names(layers)
    assert len(tensors) == 11 * layers + 5
    assert all(t.is_meta for t in tensors.values())
    assert tensors["model.layers.0.mlp.down_proj.weight"].shape == (2048, 5632)
    assert tensors["model.early_exit_gate.weight"].shape == (1, 2048)
    assert tensors["lm_head.weight"].shape == (49152, 2048)
    assert all(published_name(our_name(name)) == name for name in tensors)


def random_tensors() -> dict[str, torch.Tensor]:
    shapes = {n: (16, 24) if "down" in n else (24, 16) if ".mlp." in n else (16, 16) for n in listed_names(3)}
    shapes |= {n: (16,) for n in shapes if "norm" in n}
    shapes |= {"model.embed_tokens.weight": (30, 16), "lm_head.weight": (30, 16)}
    shapes |= {"model.early_exit_gate.weight": (1, 16), "model.early_exit_gate.bias": (1,)}
    generator = torch.Generator().manual_seed(0)
    return {n: torch.randn(shapes[n], generator=generator) for n in sorted(shapes)}


def test_tiny_random_state_loads_strictly(tmp_path):
    tensors = random_tensors()
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({**TINY, "model_type": "ouro", "hidden_act": "silu"}))
    model = load_ouro(tmp_path)
    assert (model.settings["steps"], model.settings["q"]) == (4, 1.0)
    back = published_tensors(model)
    assert set(back) == set(tensors)
    assert all(torch.equal(back[n], tensors[n]) for n in tensors)
    layer = model.backbone.model.layers[1]
    for ours, theirs in (
        ("attn_norm", "input_layernorm"),
        ("attn_norm_2", "input_layernorm_2"),
        ("mlp_norm", "post_attention_layernorm"),
        ("mlp_norm_2", "post_attention_layernorm_2"),
    ):
        assert torch.equal(getattr(layer, ours).weight, tensors[f"model.layers.1.{theirs}.weight"])
    ids = torch.randint(0, 30, (2, 5))
    assert torch.isfinite(model.logits(model.unroll(ids))).all()
    other = Ouro(model.backbone.__class__(model.backbone.config))
    load_published(other, tensors)
    torch.testing.assert_close(other.logits(other.unroll(ids)), model.logits(model.unroll(ids)))


def test_names_and_fields_that_do_not_fit(tmp_path):
    tensors = random_tensors()
    tensors["model.layers.0.extra"] = tensors.pop("model.norm.weight")
    tensors["lm_head.weight"] = tensors["lm_head.weight"][:20].clone()
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(TINY))
    with pytest.raises(CheckpointMismatchError) as caught:
        load_ouro(tmp_path)
    assert caught.value.missing == ["model.norm.weight"]
    assert caught.value.unexpected == ["model.layers.0.extra"]
    assert caught.value.shapes == {"lm_head.weight": ([20, 16], [30, 16])}
    for change, message in (
        ({"total_ut_step": 4}, "did you mean 'total_ut_steps'"),
        ({"head_dim": 4}, "head_dim = 4 given, expected 8"),
        ({"rope_scaling": {"type": "linear"}}, "rope_scaling"),
        ({"layer_types": ["sliding_attention"]}, "layer_types"),
    ):
        with pytest.raises(CheckpointError, match=message):
            empty_ouro({**TINY, **change})
    with pytest.raises(CheckpointError, match=r"\['rope_theta'\] are missing"):
        empty_ouro({k: v for k, v in TINY.items() if k != "rope_theta"})
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        load_ouro(tmp_path / "nowhere")
