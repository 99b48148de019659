"""Mixture-of-Recursions: who is chosen, what the chosen see, both caches, both routings."""

from typing import Any

import pytest
import torch

from latentcot.backbone import SequenceContext
from latentcot.reasoner import AnswerLimits, Phase, Reasoner
from latentcot.recurrent_depth.mixture_of_recursions import MixtureOfRecursions
from latentcot.recurrent_depth.routing import balance_loss, selection_loss, top_share, z_loss
from latentcot.sequences import label_loss, training_rows

ATTENTION = ["attention"] * 4
HYBRID = ["gated_deltanet", "gated_deltanet", "attention", "gated_deltanet"]


@pytest.fixture
def make_mor(make_backbone):
    def make(mixers=ATTENTION, **settings) -> MixtureOfRecursions:
        model = MixtureOfRecursions(make_backbone(mixers=mixers), settings)
        with torch.no_grad():
            torch.manual_seed(6)
            model.router.weight.normal_(0, 1.0)
        return model

    return make


def rows() -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(11, 20, (4, 9), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[1, 6:], mask[2, :3], mask[3, 3:5] = False, False, False
    return ids, mask


def by_hand(model: MixtureOfRecursions, ids, selected: list[list[int]]):
    """One row without padding: every block written as attention of chosen queries over chosen keys."""
    settings = model.settings
    layers: Any = model.backbone.model.layers
    x = model.backbone.embed(ids[None])
    n = ids.shape[0]
    whole = SequenceContext.build(1, n)
    x, _ = model.backbone.run(x, whole, model.prelude)
    logits = [x @ w for w in model.router.weight]
    x = x[0]
    first: dict[int, Any] = {}

    def rotate(v, t):  # [H, 8]
        angle = t * 10000.0 ** -(torch.arange(4).double() / 4)
        a, b = v[:, :4], v[:, 4:]
        return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1)

    for t, chosen in enumerate(selected):
        h = {i: x[i] for i in chosen}
        for number in range(model.core.start, model.core.stop):
            block = layers[number]
            normed = {i: block.attn_norm(h[i]) for i in chosen}
            keys = {i: rotate((block.attn.k_proj(normed[i])).view(4, 8), i) for i in chosen}
            values = {i: block.attn.v_proj(normed[i]).view(4, 8) for i in chosen}
            if settings["cache"] == "shared":
                if t == 0:
                    first[number] = keys, values
                keys, values = first[number]
            new = {}
            for i in chosen:
                q = rotate(block.attn.q_proj(normed[i]).view(4, 8), i)
                seen = [j for j in sorted(keys) if j <= i]
                weight = (torch.stack([(q * keys[j]).sum(-1) for j in seen]) / 8**0.5).softmax(0)
                mixed = torch.stack([w[:, None] * values[j] for w, j in zip(weight, seen, strict=True)]).sum(0)
                y = h[i] + block.attn.o_proj(mixed.flatten())
                new[i] = y + block.mlp(block.mlp_norm(y))
            h = new
        out = x.clone()
        for i in chosen:
            if settings["routing"] == "expert":
                out[i] = x[i] + 0.1 * torch.sigmoid(x[i] @ model.router.weight[t]) * h[i]
            else:
                p = torch.stack([v[0, i] for v in logits]).softmax(0)
                deepest = t == int(p.argmax())
                out[i] = x[i] + p[t] * h[i] if deepest else h[i]
        x = out
    return model.backbone.run(x[None], whole, model.coda)[0][0]


@pytest.mark.parametrize("cache", ["recursion", "shared"])
@pytest.mark.parametrize(("routing", "top_k"), [("expert", True), ("expert", False), ("token", False)])
def test_pass_by_hand(make_mor, routing, cache, top_k):
    model = make_mor(routing=routing, cache=cache)
    ids, mask = rows()
    out = model.route(ids, attention_mask=mask, top_k=top_k)
    assert len(set(out.depth[mask].tolist())) == 3
    for b in range(4):
        real = mask[b].nonzero()[:, 0].tolist()
        chosen = [[real.index(i) for i in real if bool(s[b, i])] for s in out.selected]
        expected = by_hand(model, ids[b][mask[b]], chosen)
        torch.testing.assert_close(out.hidden[b][mask[b]], expected, atol=1e-9, rtol=0)
        for t, s in enumerate(out.selected):
            keys = [[j for j in (chosen[0] if cache == "shared" else chosen[t]) if j <= i] for i in chosen[t]]
            assert int(out.pairs[t][b]) == sum(map(len, keys))
            assert not bool(s[b][~mask[b]].any())


def test_selected_sets_are_nested_and_have_their_size(make_mor):
    model = make_mor(recursions=3)
    ids, mask = rows()
    out = model.route(ids, attention_mask=mask, top_k=True)
    for t in range(3):
        expected = [-(-int(n) * (3 - t) // 3) for n in mask.sum(1)]
        assert out.selected[t].sum(1).tolist() == expected
        if t:
            assert bool((out.selected[t] <= out.selected[t - 1]).all())
    threshold = model.route(ids, attention_mask=mask)
    assert all(bool((b <= a).all()) for a, b in zip(threshold.selected, threshold.selected[1:], strict=False))


def test_top_share():
    logits = torch.tensor([[0.1, 3.0, 2.0, -1.0, 5.0]])
    active = torch.tensor([[True, True, True, True, False]])
    real = torch.ones_like(active)
    assert top_share(logits, active, real, 2 / 5).tolist() == [[False, True, True, False, False]]
    assert top_share(logits, active, real, 1.0).tolist() == active.tolist()


@pytest.mark.parametrize("cache", ["recursion", "shared"])
@pytest.mark.parametrize("routing", ["expert", "token"])
def test_threshold_is_causal_and_top_k_is_not(make_mor, routing, cache):
    model = make_mor(routing=routing, cache=cache)
    ids, _ = rows()
    differs = False
    for new in range(11, 20):
        other = ids.clone()
        other[:, -1] = new
        a, b = model.route(ids), model.route(other)
        torch.testing.assert_close(a.hidden[:, :-1], b.hidden[:, :-1], atol=1e-12, rtol=0)
        assert torch.equal(a.depth[:, :-1], b.depth[:, :-1])
        if routing == "expert":
            a, b = model.route(ids, top_k=True), model.route(other, top_k=True)
            differs |= not torch.equal(a.depth[:, :-1], b.depth[:, :-1])
    assert differs == (routing == "expert")


@pytest.mark.parametrize(("mixers", "cache"), [(ATTENTION, "recursion"), (ATTENTION, "shared"), (HYBRID, "recursion")])
@pytest.mark.parametrize("routing", ["expert", "token"])
def test_cached_reading_equals_the_whole_pass(make_mor, mixers, routing, cache):
    model = make_mor(mixers, routing=routing, cache=cache)
    ids, mask = rows()
    ids, mask = torch.cat([ids, ids.flip(1)], 1), torch.cat([mask, torch.ones_like(mask)], 1)
    whole = model.route(ids, attention_mask=mask)
    begun = model.route(ids[:, :9], attention_mask=mask[:, :9], use_cache=True)
    torch.testing.assert_close(begun.hidden[mask[:, :9]], whole.hidden[:, :9][mask[:, :9]], atol=1e-9, rtol=0)
    middle = model.route(ids[:, 9:12], state=begun.state)
    torch.testing.assert_close(middle.hidden, whole.hidden[:, 9:12], atol=1e-9, rtol=0)
    state, depths = middle.state, set()
    for t in range(12, 18):
        found = model.route(ids[:, t : t + 1], state=state)
        state = found.state
        torch.testing.assert_close(found.hidden[:, 0], whole.hidden[:, t], atol=1e-9, rtol=0)
        assert found.depth[:, 0].tolist() == whole.depth[:, t].tolist()
        depths |= set(found.depth[:, 0].tolist())
    assert len(depths) > 1
    assert state is not None
    assert len(state.steps) == (1 if cache == "shared" else 3)
    with pytest.raises(ValueError, match="it compares a token with later ones"):
        model.route(ids, top_k=True, use_cache=True)


def test_tokens_that_are_not_chosen_are_not_computed(make_mor):
    model = make_mor()
    ids, mask = rows()
    out = model.route(ids, attention_mask=mask, use_cache=True)
    seen: list[int] = []
    model.backbone.model.layers[1].register_forward_hook(lambda _m, args, _o: seen.append(args[0].shape[0]))
    found = model.route(ids[:, :1], state=out.state)
    counts = [int(s.sum()) for s in found.selected]
    assert counts[-1] < counts[0]
    assert seen == [n for n in counts if n]


def test_losses(make_mor, make_batch, make_step):
    batch = make_batch(2)
    row = training_rows(batch)
    model = make_mor(auxiliary=0.5)
    out = model.route(row.ids, attention_mask=row.mask, top_k=True)
    extra: Any = sum(
        torch.nn.functional.binary_cross_entropy(
            torch.sigmoid(out.router[t][out.selected[t - 1]]), out.selected[t][out.selected[t - 1]].double()
        )
        for t in (1, 2)
    )
    found = model.loss(batch, make_step(Phase("train")))
    expected = label_loss(model.backbone.head(out.hidden), row.labels) + 0.5 * extra
    torch.testing.assert_close(found.loss, expected, atol=1e-10, rtol=0)
    found.loss.backward()
    assert model.router.weight.grad is not None
    assert all(bool((g != 0).any()) for g in model.router.weight.grad)

    model = make_mor(routing="token")
    out = model.route(row.ids, attention_mask=row.mask)
    p, depth = out.router[0].softmax(-1)[row.mask], (out.depth - 1)[row.mask]
    share = torch.stack([3 * (depth == i).double().mean() for i in range(3)])
    extra = 0.1 * (p.mean(0) * share).sum() + 1e-5 * out.router[0][row.mask].exp().sum(-1).log().square().mean()
    found = model.loss(batch, make_step(Phase("train")))
    expected = label_loss(model.backbone.head(out.hidden), row.labels) + extra
    torch.testing.assert_close(found.loss, expected, atol=1e-8, rtol=0)
    found.loss.backward()
    assert model.router.weight.grad is not None
    assert bool((model.router.weight.grad != 0).any())


def test_balance_by_bias_raises_the_depths_that_are_short(make_mor, make_batch, make_step):
    model = make_mor(routing="token", balance="bias", bias_step=0.5)
    batch = make_batch(2)
    row = training_rows(batch)
    before = torch.bincount((model.route(row.ids, attention_mask=row.mask).depth - 1)[row.mask], minlength=3)
    model.eval()
    model.loss(batch, make_step(Phase("train")))
    assert model.load_bias.tolist() == [0, 0, 0]
    model.train()
    model.loss(batch, make_step(Phase("train")))
    mean = before.double().mean()
    assert model.load_bias.tolist() == [0.5 * float((mean - n).sign()) for n in before]
    for _ in range(20):
        model.loss(batch, make_step(Phase("train")))
    after = torch.bincount((model.route(row.ids, attention_mask=row.mask).depth - 1)[row.mask], minlength=3)
    assert int(after.max() - after.min()) < int(before.max() - before.min())


def test_pieces_of_the_losses():
    uniform = torch.full((6, 3), 1 / 3)
    assert float(balance_loss(uniform, torch.tensor([0, 1, 2, 0, 1, 2]))) == pytest.approx(1.0)
    assert float(balance_loss(torch.eye(3)[[0, 0]], torch.tensor([0, 0]))) == pytest.approx(3.0)
    assert float(z_loss(torch.zeros(2, 4))) == pytest.approx(float(torch.tensor(4.0).log()) ** 2)
    logits, chosen = torch.tensor([[2.0, -1.0, 9.0]]), torch.tensor([[True, False, False]])
    among = torch.tensor([[True, True, False]])
    expected = (torch.sigmoid(torch.tensor(-2.0)).neg().log1p() + torch.sigmoid(torch.tensor(-1.0)).neg().log1p()) / -2
    assert float(selection_loss(logits, chosen, among)) == pytest.approx(float(expected))


@pytest.mark.parametrize("settings", [{}, {"routing": "token"}, {"cache": "shared"}])
def test_answers_do_not_depend_on_the_batch_and_save(make_mor, make_batch, tmp_path, settings):
    model, prompts = make_mor(**settings), make_batch(2).prompts
    whole = model.answer(prompts)
    for b in range(3):
        alone = model.answer(prompts.rows(torch.tensor([b])))
        n = int(whole.tokens_emitted[b])
        assert alone.info["text"][0, :n].tolist() == whole.info["text"][b, :n].tolist()
        assert float(alone.flops[0]) == pytest.approx(float(whole.flops[b]))
        assert int(alone.sequential_passes[0]) == int(whole.sequential_passes[b])
    if settings.get("routing") != "token":
        shallow = model.answer(prompts, AnswerLimits(knobs={"threshold": 1.0}))
        assert shallow.sequential_passes.tolist() == (2 * shallow.tokens_emitted).tolist()
    model.float().save_pretrained(tmp_path)
    again = Reasoner.from_pretrained(tmp_path)
    assert torch.equal(again.answer(prompts).info["text"], model.answer(prompts).info["text"])


def test_settings_are_checked(make_mor, make_backbone):
    for settings, message in (
        ({"recursion": 2}, "did you mean 'recursions'"),
        ({"recursions": 0}, "recursions"),
        ({"prelude": 2, "coda": 2}, "none is shared"),
        ({"routing": "experts"}, "did you mean 'expert'"),
        ({"alpha": -1}, "alpha: -1"),
    ):
        with pytest.raises(ValueError, match=message):
            make_mor(**settings)
    with pytest.raises(
        ValueError, match="'shared' reads keys and values, but the routed blocks mix with 'gated_deltanet'"
    ):
        make_mor(HYBRID, cache="shared")
    with pytest.raises(ValueError, match="window_size = 4"):
        MixtureOfRecursions(make_backbone(mixers=ATTENTION, attention={"num_heads": 4, "window_size": 4}))


def test_the_balancing_bias_keeps_moving_in_a_model_of_16_bits(make_mor):
    model = make_mor(routing="token", balance="bias", bias_step=0.001).to(torch.bfloat16)
    for _ in range(800):
        model.move_bias(torch.zeros(9, dtype=torch.long))
    assert model.load_bias.tolist() == pytest.approx([-0.8, 0.8, 0.8], abs=1e-4)
    assert (model.route(torch.randint(7, 12, (1, 4))).depth - 1 > 0).all()
