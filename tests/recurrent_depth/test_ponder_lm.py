"""PonderLM: its passes by hand, cached decoding, price."""

import pytest
import torch

from latentcot.reasoner import AnswerLimits, Phase, Reasoner
from latentcot.recurrent_depth.ponder_lm import PonderLM
from latentcot.sequences import label_loss, training_rows
from latentcot.training.budget import FlopCounter


@pytest.fixture
def make_ponder(make_backbone):
    def make(scale: float = 1.0, **settings) -> PonderLM:
        return PonderLM(make_backbone(embedding_scale=scale), settings)

    return make


def rows() -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(11, 20, (3, 6), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[1, 4:], mask[2, :3] = False, False
    return ids, mask


@pytest.mark.parametrize(("top", "renormalise"), [(100, False), (None, True), (3, False), (3, True)])
def test_passes_by_hand(make_ponder, top, renormalise):
    model = make_ponder(scale=2.0, ponder=2, top=top, renormalise=renormalise)
    ids, mask = rows()
    table = model.backbone.get_input_embeddings().weight
    start = inputs = 2.0 * table[ids]
    thoughts = torch.zeros_like(start)
    for _ in range(2):
        p = model.backbone(inputs_embeds=inputs, attention_mask=mask).logits.softmax(-1)
        if top == 3:
            floor = p.sort(-1, descending=True).values[..., 2:3]
            p = torch.where(p >= floor, p, 0)
            p = p / p.sum(-1, keepdim=True) if renormalise else p
        thoughts = thoughts + 2.0 * (p @ table)
        inputs = start + thoughts
    expected = model.backbone(inputs_embeds=inputs, attention_mask=mask).logits
    found = model.backbone.head(model.ponder(ids, attention_mask=mask).hidden)
    torch.testing.assert_close(found[mask], expected[mask], atol=1e-10, rtol=0)


def test_nothing_to_ponder_is_the_plain_model(make_ponder):
    model = make_ponder(ponder=0)
    ids, mask = rows()
    expected = model.backbone(input_ids=ids, attention_mask=mask).logits
    torch.testing.assert_close(model.backbone.head(model.ponder(ids, attention_mask=mask).hidden), expected)


def test_cached_reading_equals_the_whole_pass(make_ponder):
    model = make_ponder(top=4)
    ids, mask = rows()
    ids, mask = torch.cat([ids, ids[:, :2]], 1), torch.cat([mask, torch.ones(3, 2, dtype=torch.bool)], 1)
    whole = model.ponder(ids, attention_mask=mask).hidden
    state = model.ponder(ids[:, :6], attention_mask=mask[:, :6], use_cache=True).state
    for t in (6, 7):
        found = model.ponder(ids[:, t : t + 1], state=state)
        state = found.state
        torch.testing.assert_close(found.hidden[:, 0], whole[:, t], atol=1e-10, rtol=0)
    with pytest.raises(ValueError, match="made with ponder = 3, so it can not be continued with 1"):
        model.ponder(ids[:, :1], 1, state=state)


def test_future_tokens_do_not_reach_the_past(make_ponder):
    model = make_ponder()
    ids, _ = rows()
    other = ids.clone()
    other[:, 4] = 11 + (other[:, 4] - 10) % 9
    first, second = model.ponder(ids).hidden, model.ponder(other).hidden
    torch.testing.assert_close(first[:, :4], second[:, :4], atol=1e-12, rtol=0)
    assert not torch.allclose(first[:, 4:], second[:, 4:])


def test_loss_and_gradient_through_every_pass(make_ponder, make_batch, make_step):
    model, batch = make_ponder(ponder=2), make_batch(2)
    row = training_rows(batch)
    out = model.ponder(row.ids, attention_mask=row.mask)
    gradients = torch.autograd.grad(
        label_loss(model.backbone.head(out.hidden), row.labels), out.inputs, retain_graph=True
    )
    assert all(bool((g != 0).any()) for g in gradients)
    found = model.loss(batch, make_step(Phase("train")))
    torch.testing.assert_close(found.loss, label_loss(model.backbone.head(out.hidden), row.labels))
    tokens = row.mask.sum(1).double()
    one = FlopCounter(model.backbone)
    expected = 3 * one(tokens, 0, tokens) + 2 * 2 * 20 * 32 * tokens  # the mixture takes all 20 tokens
    assert found.flops == pytest.approx(float(expected.sum()))


def test_answers_do_not_depend_on_the_batch_and_save(make_ponder, make_batch, tmp_path):
    model, prompts = make_ponder(), make_batch(2).prompts
    whole = model.answer(prompts)
    assert whole.sequential_passes.tolist() == (4 * whole.tokens_emitted).tolist()
    for b in range(3):
        alone = model.answer(prompts.rows(torch.tensor([b])))
        n = int(whole.tokens_emitted[b])
        assert alone.info["text"][0, :n].tolist() == whole.info["text"][b, :n].tolist()
        assert float(alone.flops[0]) == pytest.approx(float(whole.flops[b]))
    plain = model.answer(prompts, AnswerLimits(knobs={"ponder": 0}))
    assert plain.sequential_passes.tolist() == plain.tokens_emitted.tolist()
    model.float().save_pretrained(tmp_path)
    assert torch.equal(
        Reasoner.from_pretrained(tmp_path).answer(prompts).info["text"], model.answer(prompts).info["text"]
    )


def test_settings_are_checked(make_ponder):
    for settings, message in (
        ({"pondr": 2}, "did you mean 'ponder'"),
        ({"ponder": -1}, "ponder"),
        ({"top": 0}, "top"),
        ({"renormalise": 1}, "renormalise"),
    ):
        with pytest.raises(ValueError, match=message):
            make_ponder(**settings)
