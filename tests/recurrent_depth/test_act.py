"""ACT and PonderNet over backbone blocks, against their definitions."""

import math

import pytest
import torch

from latentcot.backbone import SequenceContext
from latentcot.reasoner import AnswerLimits, Phase, Reasoner
from latentcot.recurrent_depth.act import UniversalTransformer, act_weights, coordinates
from latentcot.recurrent_depth.exit_law import exit_law, geometric_law
from latentcot.recurrent_depth.ponder_net import PonderNet
from latentcot.sequences import label_loss, training_rows


@pytest.fixture
def make_ut(make_backbone):
    def make(mixers=("attention", "attention"), **settings) -> UniversalTransformer:
        # Post-norm, as in the paper, and embeddings that the coordinates do not drown.
        values = {"norm_placement": "post", "initializer_range": 0.1, "embedding_scale": 20.0}
        backbone = make_backbone(mixers=list(mixers), num_hidden_layers=2, **values)
        model = UniversalTransformer(backbone, settings)
        with torch.no_grad():
            torch.manual_seed(4)
            model.halt.weight.normal_(0, 0.3)
            first = model.recur(*rows()[:1], 1).hidden  # chances about one half, so that positions differ in depth
            model.halt.bias.copy_(-model.halt(first).mean() - 0.3)
        return model

    return make


def rows() -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(11, 20, (4, 6), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[1, 4:], mask[2, :3] = False, False
    return ids, mask


def halt_by_hand(chances: list[float], epsilon: float = 0.01) -> tuple[list[float], int, float]:
    spent, weights = 0.0, [0.0] * len(chances)
    for t, chance in enumerate(chances):
        if spent + chance >= 1 - epsilon or t + 1 == len(chances):
            weights[t] = 1 - spent
            return weights, t + 1, 1 - spent
        weights[t] = chance
        spent += chance
    raise AssertionError


def test_weights_steps_and_remainder():
    chance = torch.rand(6, 200, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) ** 2
    weights, steps, remainder = act_weights(chance)
    assert len(set(steps.tolist())) > 4
    torch.testing.assert_close(weights.sum(0), torch.ones(200, dtype=torch.float64), atol=1e-12, rtol=0)
    for i in range(200):
        by_hand = halt_by_hand(chance[:, i].tolist())
        assert weights[:, i].tolist() == pytest.approx(by_hand[0], abs=1e-12)
        assert (int(steps[i]), float(remainder[i])) == (by_hand[1], pytest.approx(by_hand[2], abs=1e-12))


def test_cost_has_the_gradient_of_the_remainder_alone():
    chance = torch.tensor([[0.3], [0.4], [0.6], [0.9]], dtype=torch.float64, requires_grad=True)
    _, steps, remainder = act_weights(chance)
    assert not steps.requires_grad
    (gradient,) = torch.autograd.grad((steps + remainder).sum(), chance)
    assert gradient[:, 0].tolist() == [-1.0, -1.0, 0.0, 0.0]  # N = 3: R = 1 - h_1 - h_2


def test_coordinates():
    found = coordinates(torch.arange(5)[None], 3, 6, torch.float64)
    for i in range(5):
        for j in range(3):
            rate = 10000 ** (-2 * j / 6)
            assert float(found[0, i, 2 * j]) == pytest.approx(math.sin(i * rate) + math.sin(3 * rate))
            assert float(found[0, i, 2 * j + 1]) == pytest.approx(math.cos(i * rate) + math.cos(3 * rate))


@pytest.mark.parametrize("kind", ["both", "step", "none"])
@pytest.mark.parametrize(
    "mixers", [("attention", "attention"), ("gated_deltanet", "attention")], ids=["attention", "hybrid"]
)
def test_loop_is_the_definition(make_ut, mixers, kind):
    """Row by row and position by position, nothing taken out."""
    model = make_ut(mixers, coordinates=kind)
    ids, mask = rows()
    found = model.recur(ids, attention_mask=mask)
    assert len(set(found.steps[mask].tolist())) > 2
    passes = 0
    for b in range(4):
        real = ids[b][mask[b]][None]
        x, states, chances = model.backbone.embed(real), [], []
        n = real.shape[1]
        spent, running = torch.zeros(n, dtype=torch.float64), torch.ones(n, dtype=torch.bool)
        for t in range(1, 7):
            extra = torch.zeros(n, 32, dtype=torch.float64)
            for i in range(n):
                for j in range(16):
                    rate = 10000 ** (-2 * j / 32)
                    if kind == "both":
                        extra[i, 2 * j] += math.sin(i * rate)
                        extra[i, 2 * j + 1] += math.cos(i * rate)
                    if kind != "none":
                        extra[i, 2 * j] += math.sin(t * rate)
                        extra[i, 2 * j + 1] += math.cos(t * rate)
            hidden, _ = model.backbone.run(x + extra, SequenceContext.build(1, n))
            x = torch.where(running[:, None], hidden[0], x[0])[None]
            states.append(x[0])
            chances.append(torch.sigmoid(model.halt(x[0])[:, 0]))
            passes += bool(running.any())
            spent = spent + torch.where(running, chances[-1], 0)
            running = running & (spent < 0.99)
        weights, steps, remainder = act_weights(torch.stack(chances))
        out = (weights[..., None] * torch.stack(states)).sum(0)
        torch.testing.assert_close(found.hidden[b][mask[b]], out, atol=1e-10, rtol=0)
        assert found.steps[b][mask[b]].tolist() == steps.tolist()
        torch.testing.assert_close(found.remainder[b][mask[b]], remainder, atol=1e-12, rtol=0)
    assert found.block_passes == passes


@pytest.mark.parametrize(
    "mixers", [("attention", "attention"), ("gated_deltanet", "attention")], ids=["attention", "hybrid"]
)
def test_cached_reading_equals_the_whole_pass(make_ut, mixers):
    model = make_ut(mixers)
    ids, mask = rows()
    ids, mask = torch.cat([ids, ids[:, :2]], 1), torch.cat([mask, torch.ones(4, 2, dtype=torch.bool)], 1)
    whole = model.recur(ids, attention_mask=mask)
    state = model.recur(ids[:, :6], attention_mask=mask[:, :6], use_cache=True).state
    for t in (6, 7):
        found = model.recur(ids[:, t : t + 1], state=state)
        state = found.state
        torch.testing.assert_close(found.hidden[:, 0], whole.hidden[:, t], atol=1e-10, rtol=0)
        assert found.steps[:, 0].tolist() == whole.steps[:, t].tolist()
    with pytest.raises(ValueError, match="made with 6 steps, so it can not be continued with 2"):
        model.recur(ids[:, :1], 2, state=state)


def test_loss_adds_the_cost(make_ut, make_batch, make_step):
    model, batch = make_ut(cost=0.5), make_batch(2)
    row = training_rows(batch)
    out = model.recur(row.ids, attention_mask=row.mask)
    cost = sum((out.steps[b, s] + out.remainder[b, s]).item() for b, s in row.mask.nonzero().tolist()) / int(
        row.mask.sum()
    )
    found = model.loss(batch, make_step(Phase("train")))
    expected = label_loss(model.backbone.head(out.hidden), row.labels).item() + 0.5 * cost
    assert found.loss.item() == pytest.approx(expected, abs=1e-10)
    found.loss.backward()
    assert model.halt.weight.grad is not None
    assert bool((model.halt.weight.grad != 0).any())


def test_answers_do_not_depend_on_the_batch_and_save(make_ut, make_batch, tmp_path):
    model, prompts = make_ut(), make_batch(2).prompts
    whole = model.answer(prompts)
    assert whole.sequential_passes.tolist() == (6 * whole.tokens_emitted).tolist()
    for b in range(3):
        alone = model.answer(prompts.rows(torch.tensor([b])))
        n = int(whole.tokens_emitted[b])
        assert alone.info["text"][0, :n].tolist() == whole.info["text"][b, :n].tolist()
        assert float(alone.flops[0]) == pytest.approx(float(whole.flops[b]))
    assert model.answer(prompts, AnswerLimits(knobs={"steps": 1})).info["depth"].tolist() == [1.0] * 3
    model.float().save_pretrained(tmp_path)
    assert torch.equal(
        Reasoner.from_pretrained(tmp_path).answer(prompts).info["text"], model.answer(prompts).info["text"]
    )


def test_settings_are_checked(make_ut, make_backbone):
    for settings, message in (
        ({"step": 2}, "did you mean 'steps'"),
        ({"steps": 0}, "steps"),
        ({"epsilon": 1.0}, "epsilon: 1.0"),
        ({"coordinates": "bot"}, "did you mean 'both'"),
    ):
        with pytest.raises(ValueError, match=message):
            make_ut(**settings)
    for settings, message in (({"rate": 0.0}, "rate"), ({"tail": "lost"}, "tail"), ({"beta": -1}, "beta")):
        with pytest.raises(ValueError, match=message):
            PonderNet(make_backbone(), settings)


def test_ponder_net_is_pulled_to_its_prior(make_backbone, make_batch, make_step):
    model, batch = PonderNet(make_backbone(), {"steps": 3}), make_batch(2)
    row = training_rows(batch)
    out = model.unroll(row.ids, attention_mask=row.mask)
    prior = geometric_law(3, 0.4).exp().double()
    total, places = 0.0, (row.labels[:, 1:] != -100).nonzero().tolist()
    for b, s in places:
        p = exit_law(out.gate[:, b, s]).exp()
        for t in range(3):
            log_q = model.backbone.lm_head(out.hidden[t][b, s]).log_softmax(-1)
            total += float((p[t] * (-log_q[row.labels[b, s + 1]] + 0.2 * (p[t] / prior[t]).log())).detach())
    found = model.loss(batch, make_step(Phase("train")))
    assert found.loss.item() == pytest.approx(total / len(places), abs=1e-6)
    optimizer = torch.optim.Adam(model.gate.parameters(), lr=0.15)
    strong = PonderNet(model.backbone, {"steps": 3, "beta": 100.0})
    strong.gate = model.gate
    for _ in range(50):
        optimizer.zero_grad()
        strong.loss(batch, make_step(Phase("train"))).loss.backward()
        optimizer.step()
    p = exit_law(strong.unroll(row.ids, attention_mask=row.mask).gate).exp()
    scored = torch.stack([p[:, b, s] for b, s in places], 1)
    torch.testing.assert_close(scored.mean(1), prior, atol=0.03, rtol=0)
