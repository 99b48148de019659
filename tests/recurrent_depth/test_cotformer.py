"""CoTFormer: what a repeat sees, its cache, the adaptive variant."""

from typing import Any

import pytest
import torch

from latentcot.backbone import SequenceContext
from latentcot.reasoner import AnswerLimits, Phase, Reasoner
from latentcot.recurrent_depth.cotformer import CoTFormer
from latentcot.sequences import label_loss, training_rows

ATTENTION = ["attention"] * 4
OUTER_LINEAR = ["gated_deltanet", "attention", "attention", "gated_deltanet"]


@pytest.fixture
def make_cot(make_backbone):
    def make(mixers=ATTENTION, **settings) -> CoTFormer:
        model = CoTFormer(make_backbone(mixers=mixers), settings)
        with torch.no_grad():
            torch.manual_seed(6)
            if model.depth is not None:
                model.depth.normal_(0, 0.3)
            if model.router is not None:
                model.router.weight.normal_(0, 1.0)
        return model

    return make


def rows() -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(11, 20, (4, 8), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[1, 5:], mask[2, :3], mask[3, 3:5] = False, False, False
    return ids, mask


def by_hand(model: CoTFormer, ids: torch.Tensor, selected: list[list[int]]) -> torch.Tensor:
    """One row without padding, keys and values in lists that are searched by position and repeat."""
    layers: Any = model.backbone.model.layers
    whole = SequenceContext.build(1, len(ids))
    x = model.backbone.run(model.backbone.embed(ids[None]), whole, model.prelude)[0][0]
    lists: dict[int, list[Any]] = {n: [] for n in range(model.core.start, model.core.stop)}

    def rotate(v, t):  # [H, 8]
        angle = t * 10000.0 ** -(torch.arange(4).double() / 4)
        a, b = v[:, :4], v[:, 4:]
        return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1)

    m = len(selected)
    for i, chosen in enumerate(selected):
        h = {t: x[t] + (0 if model.depth is None else (m - i) * model.depth) for t in chosen}
        for number, stored in lists.items():
            block = layers[number]
            normed = {t: block.attn_norm(h[t]) for t in chosen}
            for t in chosen:
                key = rotate(block.attn.k_proj(normed[t]).view(4, 8), t)
                stored.append((t, key, block.attn.v_proj(normed[t]).view(4, 8)))
            for t in chosen:
                q = rotate(block.attn.q_proj(normed[t]).view(4, 8), t)
                seen = [(k, v) for place, k, v in stored if place <= t]
                weight = (torch.stack([(q * k).sum(-1) for k, _ in seen]) / 8**0.5).softmax(0)
                mixed = torch.stack([w[:, None] * v for w, (_, v) in zip(weight, seen, strict=True)]).sum(0)
                y = h[t] + block.attn.o_proj(mixed.flatten())
                h[t] = y + block.mlp(block.mlp_norm(y))
        out = x.clone()
        for t in chosen:
            new = h[t]
            if not isinstance(model.norm, torch.nn.Identity):
                new = (new - new.mean()) / (new.var(correction=0) + 1e-5).sqrt()
            s = 1.0 if model.router is None or i == 0 else torch.sigmoid(model.router.weight[i - 1] @ x[t])
            out[t] = (1 - s) * x[t] + s * new
        x = out
    return model.backbone.run(x[None], whole, model.coda)[0][0]


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize(
    ("adaptive", "capacities"),
    [(False, None), (True, None), (True, [0.7, 0.4])],
    ids=["all", "threshold", "capacities"],
)
def test_pass_by_hand(make_cot, norm, adaptive, capacities):
    model = make_cot(adaptive=adaptive, repeat_norm=norm)
    ids, mask = rows()
    out = model.repeat(ids, attention_mask=mask, capacities=capacities)
    assert len(set(out.depth[mask].tolist())) == (3 if adaptive else 1)
    for b in range(4):
        real = mask[b].nonzero()[:, 0].tolist()
        chosen = [[real.index(t) for t in real if bool(s[b, t])] for s in out.selected]
        expected = by_hand(model, ids[b][mask[b]], chosen)
        torch.testing.assert_close(out.hidden[b][mask[b]], expected, atol=1e-9, rtol=0)
        for i, pairs in enumerate(out.pairs):
            keys = [t for step in chosen[: i + 1] for t in step]
            assert int(pairs[b]) == sum(k <= t for t in chosen[i] for k in keys)
    if capacities:
        for share, s in zip([1, *capacities], out.selected, strict=True):
            assert s.sum(1).tolist() == [-int(-int(n) * share // 1) for n in mask.sum(1)]


def test_one_repeat_without_extras_is_the_plain_decoder(make_cot):
    model = make_cot(repeats=1, repeat_norm=False, depth_embedding=False)
    ids, mask = rows()
    expected = model.backbone(input_ids=ids, attention_mask=mask).logits
    found = model.backbone.head(model.repeat(ids, attention_mask=mask).hidden)
    torch.testing.assert_close(found[mask], expected[mask], atol=1e-10, rtol=0)


@pytest.mark.parametrize("mixers", [ATTENTION, OUTER_LINEAR], ids=["attention", "linear outside"])
@pytest.mark.parametrize("adaptive", [False, True])
def test_cached_reading_equals_the_whole_pass(make_cot, mixers, adaptive):
    model = make_cot(mixers, adaptive=adaptive)
    ids, mask = rows()
    ids, mask = torch.cat([ids, ids.flip(1)], 1), torch.cat([mask, torch.ones_like(mask)], 1)
    whole = model.repeat(ids, attention_mask=mask)
    begun = model.repeat(ids[:, :8], attention_mask=mask[:, :8], use_cache=True)
    middle = model.repeat(ids[:, 8:11], state=begun.state)
    torch.testing.assert_close(middle.hidden, whole.hidden[:, 8:11], atol=1e-9, rtol=0)
    state, depths = middle.state, set()
    for t in range(11, 16):
        found = model.repeat(ids[:, t : t + 1], state=state)
        state = found.state
        torch.testing.assert_close(found.hidden[:, 0], whole.hidden[:, t], atol=1e-9, rtol=0)
        assert found.depth[:, 0].tolist() == whole.depth[:, t].tolist()
        depths |= set(found.depth[:, 0].tolist())
    assert (len(depths) > 1) == adaptive
    assert state is not None
    valid = state.inner.keys.valid
    assert valid is not None
    # One entry a token and repeat, no more.
    assert valid.sum(1).tolist() == [int(whole.depth[b][mask[b]].sum()) for b in range(4)]


def test_threshold_is_causal_and_capacities_are_not(make_cot):
    model = make_cot(adaptive=True)
    ids, _ = rows()
    differs = False
    for new in range(11, 20):
        other = ids.clone()
        other[:, -1] = new
        torch.testing.assert_close(model.repeat(ids).hidden[:, :-1], model.repeat(other).hidden[:, :-1])
        a, b = (model.repeat(x, capacities=[0.5, 0.3]) for x in (ids, other))
        differs |= not torch.equal(a.depth[:, :-1], b.depth[:, :-1])
    assert differs


@pytest.mark.parametrize("adaptive", [False, True])
def test_loss_reaches_every_parameter_of_its_own(make_cot, make_batch, make_step, adaptive):
    model, batch = make_cot(adaptive=adaptive), make_batch(2)
    found = model.loss(batch, make_step(Phase("train")))
    found.loss.backward()
    row = training_rows(batch)
    capacities = None
    if adaptive:
        drawn = torch.rand(2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        capacities = sorted(drawn.tolist(), reverse=True)
        assert model.router is not None
        assert bool((model.router.weight.grad != 0).any(1).all())  # type: ignore[union-attr]
    out = model.repeat(row.ids, attention_mask=row.mask, capacities=capacities)
    torch.testing.assert_close(found.loss, label_loss(model.backbone.head(out.hidden), row.labels))
    assert model.depth is not None
    assert model.depth.grad is not None
    assert bool((model.depth.grad != 0).all())


@pytest.mark.parametrize("adaptive", [False, True])
def test_answers_do_not_depend_on_the_batch_and_save(make_cot, make_batch, tmp_path, adaptive):
    model, prompts = make_cot(adaptive=adaptive), make_batch(2).prompts
    whole = model.answer(prompts)
    for b in range(3):
        alone = model.answer(prompts.rows(torch.tensor([b])))
        n = int(whole.tokens_emitted[b])
        assert alone.info["text"][0, :n].tolist() == whole.info["text"][b, :n].tolist()
        assert float(alone.flops[0]) == pytest.approx(float(whole.flops[b]))
        assert int(alone.sequential_passes[0]) == int(whole.sequential_passes[b])
    if adaptive:
        shallow = model.answer(prompts, AnswerLimits(knobs={"threshold": 1.0}))
        assert shallow.sequential_passes.tolist() == (2 * shallow.tokens_emitted).tolist()
    else:
        assert whole.sequential_passes.tolist() == (4 * whole.tokens_emitted).tolist()
    model.float().save_pretrained(tmp_path)
    again = Reasoner.from_pretrained(tmp_path)
    assert torch.equal(again.answer(prompts).info["text"], model.answer(prompts).info["text"])


def test_settings_are_checked(make_cot):
    for settings, message in (
        ({"repeat": 2}, "did you mean 'repeats'"),
        ({"repeats": 0}, "repeats"),
        ({"prelude": 3}, "none is repeated"),
        ({"adaptive": 1}, "adaptive: 1"),
        ({"threshold": -1}, "threshold: -1"),
    ):
        with pytest.raises(ValueError, match=message):
            make_cot(**settings)
    with pytest.raises(ValueError, match="mix with 'gated_deltanet'"):
        make_cot(["attention", "gated_deltanet", "attention", "attention"])
    ids, _ = rows()
    with pytest.raises(ValueError, match="there is no router"):
        make_cot().repeat(ids, capacities=[0.5, 0.5])
    for capacities in ([0.5], [0.3, 0.5], [1.2, 0.5]):
        with pytest.raises(ValueError, match="do not rise"):
            make_cot(adaptive=True).repeat(ids, capacities=capacities)
    with pytest.raises(ValueError, match="use a threshold"):
        make_cot(adaptive=True).repeat(ids, capacities=[0.5, 0.3], use_cache=True)
