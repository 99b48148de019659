"""Gradient checkpointing of one recurrence: the same loss and gradients, and less kept for the backward pass."""

from typing import Any

import pytest
import torch

from latentcot.recurrent_depth import DepthRecurrence, ExitRule, GradientWindow, Ouro
from latentcot.recurrent_depth.loop import DepthLoop
from latentcot.recurrent_depth.ponder_net import PonderNet

HYBRID = {"mixers": ["attention", "hgrn", "gated_deltanet", "attention"]}
SANDWICH = {"norm_placement": "sandwich_pre_residual", **HYBRID}


def kept_bytes(model, run) -> tuple[float, int]:
    """Loss, with gradients left in ``model``, and the bytes that forward kept for backward, parameters not counted."""
    parameters = {p.data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor):
        if tensor.data_ptr() not in parameters:
            kept[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
        return tensor

    model.zero_grad()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        loss = run()
    loss.backward()
    return float(loss.detach()), sum(kept.values())


def compare(plain, checked, run) -> tuple[int, int]:
    checked.load_state_dict(plain.state_dict())
    loss, much = kept_bytes(plain, lambda: run(plain))
    again, little = kept_bytes(checked, lambda: run(checked))
    assert again == pytest.approx(loss, abs=1e-12)
    for (name, p), q in zip(plain.named_parameters(), checked.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None), name
        if p.grad is not None:
            torch.testing.assert_close(q.grad, p.grad, atol=1e-12, rtol=1e-9, msg=name)
    return much, little


@pytest.mark.parametrize("mixers", [{}, HYBRID], ids=["default", "hgrn"])
@pytest.mark.parametrize("rule", [ExitRule(), ExitRule("latent_difference", 0.3, min_steps=3)], ids=["fixed", "exits"])
def test_a_loop_has_the_same_gradients(make_backbone, mixers, rule):
    ids = torch.randint(11, 20, (3, 12), generator=torch.Generator().manual_seed(2))
    start = torch.randn(3, 12, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    mask = torch.ones(3, 12, dtype=torch.bool)
    mask[1, :4] = False

    def run(model: DepthLoop) -> torch.Tensor:
        window = GradientWindow(5) if not rule.active else GradientWindow()
        out = model.recur(ids, 8, initial_state=start, attention_mask=mask, window=window, exit_rule=rule)
        return out.logits[mask].square().mean()

    plain = DepthLoop(make_backbone(initializer_range=0.05, **mixers)).double()
    checked = DepthLoop(make_backbone(initializer_range=0.05, **mixers), {"gradient_checkpointing": True}).double()
    much, little = compare(plain, checked, run)
    assert little < much / 2


@pytest.mark.parametrize("kind", [Ouro, PonderNet])
def test_a_looped_stack_has_the_same_gradients(make_backbone, make_batch, make_step, kind):
    batch = make_batch(2)

    def run(model: Any) -> torch.Tensor:
        return model.loss(batch, make_step(model.phases()[0])).loss

    settings = {"steps": 5}
    plain = kind(make_backbone(**SANDWICH), settings)
    checked = kind(make_backbone(**SANDWICH), {**settings, "gradient_checkpointing": True}).double()
    much, little = compare(plain.double(), checked, run)
    assert little < much / 2


def test_training_and_answering_do_not_notice(make_backbone, make_batch, make_step):
    batch = make_batch(2)
    settings = {"sampler": {"mean": 4}, "exit_rule": "kl", "step_cache": "latest"}
    plain = DepthRecurrence(make_backbone(), settings).double()
    checked = DepthRecurrence(make_backbone(), {**settings, "gradient_checkpointing": True}).double()
    checked.load_state_dict(plain.state_dict())
    a, b = (m.loss(batch, make_step(m.phases()[0])).loss for m in (plain, checked))
    torch.testing.assert_close(a, b)
    assert torch.equal(plain.answer(batch.prompts).ids, checked.answer(batch.prompts).ids)
    with pytest.raises(ValueError, match="gradient_checkpointing: 1 given"):
        DepthRecurrence(make_backbone(), {"gradient_checkpointing": 1})
