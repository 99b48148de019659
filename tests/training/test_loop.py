"""The training loop: exact resume, phases, what it counts, and what it refuses."""

from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from latentcot.backbone import HybridConfig, HybridForCausalLM
from latentcot.baselines import ChainOfThought, Direct
from latentcot.reasoner import LossOutput, Phase, Reasoner, StepContext, TaskBatch
from latentcot.tasks import make_task
from latentcot.training import FlopCounter, TrainConfig, count_parameters, phase_borders, progress_bar, rate, train

TASK = make_task("group", group="S3", min_difficulty=2, max_difficulty=4)


class Data:
    def __init__(self, fail_at: int | None = None):
        self.fail_at = fail_at

    def stream(self, start: int, rank: int = 0, world_size: int = 1) -> Iterator[TaskBatch]:
        number = start
        while True:
            if number == self.fail_at:
                raise KeyboardInterrupt
            yield TASK.batch("train", range(number * 8, number * 8 + 8))
            number += 1

    def describe(self) -> dict[str, str]:
        return {"task": repr(TASK)}


def make(kind: type[Reasoner] = Direct, **settings) -> Reasoner:
    torch.manual_seed(0)
    config = HybridConfig(
        vocab_size=TASK.limits.vocab_size,
        hidden_size=16,
        num_hidden_layers=2,
        period=2,
        attention={"num_heads": 2},
        gated_deltanet={"num_heads": 1, "head_dim": 8},
        intermediate_size=16,
    )
    return kind(HybridForCausalLM(config), settings)


CONFIG = TrainConfig(steps=12, warmup_steps=3, checkpoint_every=5, log_every=4)


def weights(reasoner: Reasoner) -> dict[str, torch.Tensor]:
    return {k: v.clone() for k, v in reasoner.state_dict().items()}


class Staged(Direct):
    """Three phases that use every switch of a phase."""

    method = "staged"

    def phases(self):
        return (
            Phase("all", 1.0),
            Phase("head", 1.0, trainable=("backbone.lm_head",), reset_optimizer=True),
            Phase("averaged", 1.0, ema=0.5),
        )


@pytest.mark.parametrize("kind", [Direct, ChainOfThought, Staged])
@pytest.mark.parametrize("killed_at", [4, 5, 9, 11])
def test_a_killed_run_resumes_to_the_same_bits(tmp_path, kind, killed_at):
    whole = make(kind)
    first = train(whole, Data(), CONFIG, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        train(make(kind), Data(fail_at=killed_at), CONFIG, tmp_path / "cut")
    resumed = make(kind)
    second = train(resumed, Data(), CONFIG, tmp_path / "cut")
    for name, value in weights(whole).items():
        assert torch.equal(value, resumed.state_dict()[name]), name
    assert (first.steps, first.examples, first.flops) == (second.steps, second.examples, second.flops)
    assert first.history == second.history


def test_the_seed_decides_everything():
    runs = []
    for seed in (0, 0, 1):
        model = make()
        train(model, Data(), replace(CONFIG, seed=seed))
        runs.append(weights(model))
    assert all(torch.equal(v, runs[1][k]) for k, v in runs[0].items())


def test_trainable_prefixes_freeze_the_rest():
    class HeadOnly(Direct):
        def phases(self):
            return (Phase("head", trainable=("backbone.lm_head",)),)

    model = make(HeadOnly)
    before = weights(model)
    train(model, Data(), CONFIG)
    changed = {k for k, v in weights(model).items() if not torch.equal(v, before[k])}
    assert changed == {"backbone.lm_head.weight"}
    assert all(p.requires_grad for p in model.parameters())


def test_a_phase_can_forget_the_moments_of_the_one_before(tmp_path):
    from safetensors import safe_open

    def steps_counted(reset: bool) -> set[float]:
        class Halves(Direct):
            def phases(self):
                return (Phase("a"), Phase("b", reset_optimizer=reset))

        train(make(Halves), Data(), CONFIG, tmp_path / str(reset))
        with safe_open(tmp_path / str(reset) / "checkpoint.safetensors", framework="pt") as file:
            return {float(file.get_tensor(k)) for k in file.keys() if k.endswith(".step")}  # noqa: SIM118 (no mapping)

    assert steps_counted(reset=True) == {6.0}
    assert steps_counted(reset=False) == {12.0}


def test_the_bar_shows_steps_rate_time_and_loss():
    import io

    from rich.console import Console

    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=120, color_system=None)
    with progress_bar("direct", console) as watch:
        train(make(), Data(), CONFIG, watch=watch)
    last = [line for line in out.getvalue().splitlines() if "direct" in line][-1]
    for part in ("direct", "12/12", "it/s", "0:00:00", "train, loss "):
        assert part in last, last


def test_a_carry_is_not_lost_in_silence(tmp_path):
    class Carrying(Direct):
        def loss(self, batch, ctx, carry=None):
            output = super().loss(batch, ctx)
            output.carry = 1
            return output

    train(make(Carrying), Data(), CONFIG)
    with pytest.raises(ValueError, match="checkpoints hold no carry"):
        train(make(Carrying), Data(), CONFIG, tmp_path)
    assert not list(tmp_path.iterdir())


def test_the_loss_falls():
    model = make()
    report = train(model, Data(), replace(CONFIG, steps=60, log_every=10))
    assert report.history[-1]["loss"] < report.history[0]["loss"]


def test_a_checkpoint_of_another_run_or_a_damaged_one_is_refused(tmp_path):
    train(make(), Data(), CONFIG, tmp_path)
    with pytest.raises(ValueError, match="another configuration"):
        train(make(), Data(), replace(CONFIG, learning_rate=1e-3), tmp_path)
    path = tmp_path / "checkpoint.safetensors"
    path.write_bytes(path.read_bytes()[:-50])
    model = make()
    before = weights(model)
    with pytest.raises(ValueError, match="damaged"):
        train(model, Data(), CONFIG, tmp_path)
    assert all(torch.equal(v, before[k]) for k, v in weights(model).items())


def test_a_loss_that_is_not_finite_stops_the_run():
    class Broken(Direct):
        def loss(self, batch, ctx, carry=None):
            output = super().loss(batch, ctx)
            return LossOutput(output.loss * (float("nan") if ctx.step == 3 else 1.0))

    with pytest.raises(FloatingPointError, match="step 3"):
        train(make(Broken), Data(), CONFIG)


class Exploding(Direct):
    """A finite loss whose gradient at steps 3 and 4 is not: the root's derivative at zero."""

    method = "exploding"

    def loss(self, batch, ctx, carry=None):
        output = super().loss(batch, ctx)
        if ctx.step in (3, 4):
            return replace(output, loss=output.loss + (0 * output.loss).sqrt())
        return output


@pytest.mark.parametrize("grad_clip", [1.0, None])
def test_gradients_that_are_not_finite_stop_the_run_with_the_weights_of_the_step_before(grad_clip):
    config, model, seen = replace(CONFIG, grad_clip=grad_clip), make(Exploding), []
    with pytest.raises(FloatingPointError, match=r"gradients .* step 3 .* skip_nonfinite"):
        train(model, Data(), config, watch=lambda *_: seen.append(weights(model)))
    assert len(seen) == 3
    assert all(torch.equal(tensor, seen[-1][name]) for name, tensor in weights(model).items())


@pytest.mark.parametrize("grad_clip", [1.0, None])
def test_skipped_steps_move_nothing_and_are_counted_over_a_resume(tmp_path, grad_clip):
    config, model, seen = replace(CONFIG, grad_clip=grad_clip, checkpoint_every=4), make(Exploding), []
    report = train(model, Data(), config, watch=lambda *_: seen.append(weights(model)), skip_nonfinite=True)
    assert report.skipped == 2
    moved = [not torch.equal(a["backbone.lm_head.weight"], b["backbone.lm_head.weight"]) for a, b in pairwise(seen)]
    assert moved == [True, True, False, False] + [True] * 7
    assert all(tensor.isfinite().all() for tensor in weights(model).values())
    with pytest.raises(KeyboardInterrupt):  # killed between the two
        train(make(Exploding), Data(fail_at=4), config, tmp_path, skip_nonfinite=True)
    with pytest.raises(ValueError, match="another configuration"):
        train(make(Exploding), Data(), config, tmp_path)
    resumed = make(Exploding)
    assert train(resumed, Data(), config, tmp_path, skip_nonfinite=True).skipped == 2
    assert all(torch.equal(tensor, weights(model)[name]) for name, tensor in weights(resumed).items())


def test_borders_follow_the_shares():
    phases = [Phase("a", 1), Phase("b", 2), Phase("c", 1)]
    assert phase_borders(phases, 100) == [0, 25, 75]
    with pytest.raises(ValueError, match="at least one"):
        phase_borders([], 10)
    with pytest.raises(ValueError, match="shares"):
        phase_borders([Phase("a", 0)], 10)


def test_a_run_is_adamw_with_the_configured_values():
    """Clipping, then AdamW (decay times the rate, on matrices alone), written out in fp64."""
    config = TrainConfig(
        steps=4, warmup_steps=1, learning_rate=0.01, weight_decay=0.3, betas=(0.7, 0.8), eps=1e-3, grad_clip=0.5
    )
    model, other = make().double(), make().double()
    train(model, Data(), config)
    parameters = [p for p in other.parameters() if p.requires_grad]
    first, second = ([torch.zeros_like(p) for p in parameters] for _ in range(2))
    stream, clipped = Data().stream(0), 0
    for step in range(4):
        context = StepContext(step, 4, other.phases()[0], torch.Generator().manual_seed(step))
        loss = other.loss(next(stream), context).loss
        gradients = torch.autograd.grad(loss, parameters, materialize_grads=True)
        norm = torch.stack([g.square().sum() for g in gradients]).sum().sqrt()
        clipped += bool(norm > 0.5)
        for p, g, m, v in zip(parameters, gradients, first, second, strict=True):
            g = g * min(1.0, 0.5 / (float(norm) + 1e-6))
            m.mul_(0.7).add_(0.3 * g)
            v.mul_(0.8).add_(0.2 * g * g)
            lr = 0.01 * rate(step, config)
            moved = m / (1 - 0.7 ** (step + 1)) / ((v / (1 - 0.8 ** (step + 1))).sqrt() + 1e-3)
            p.data.copy_(p * (1 - lr * 0.3 * (p.dim() >= 2)) - lr * moved)
    assert clipped > 0
    for name, tensor in weights(other).items():
        torch.testing.assert_close(model.state_dict()[name], tensor, rtol=0, atol=1e-10, msg=name)


def test_the_learning_rate_warms_up_and_falls_to_its_share():
    config = TrainConfig(steps=100, warmup_steps=10, final_rate=0.1)
    rates = [rate(s, config) for s in range(100)]
    assert rates[:11] == sorted(rates[:11])
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert max(rates) == rates[10] == 1.0
    assert abs(rates[-1] - 0.1) < 1e-3


def test_two_precisions_in_one_process():
    for precision in ("no", "bf16", "no"):
        train(make(), Data(), replace(CONFIG, steps=2, mixed_precision=precision))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 0}, "steps"),
        ({"steps": 2.5}, "steps"),
        ({"steps": True}, "steps"),
        ({"log_every": 0}, "log_every"),
        ({"warmup_steps": -1}, "warmup_steps"),
        ({"checkpoint_every": -3}, "checkpoint_every"),
        ({"weight_decay": -1.0}, "weight_decay"),
        ({"final_rate": 5}, "final_rate"),
        ({"learning_rate": "a"}, "learning_rate"),
        ({"learning_rate": 0.0}, "learning_rate"),
        ({"grad_clip": 0.0}, "grad_clip"),
        ({"mixed_precision": "fp16"}, "bf16"),
    ],
)
def test_bad_training_values_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        replace(CONFIG, **change)


def test_parameters_count_tied_tensors_once():
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 50,
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "gated_deltanet": {"num_heads": 1, "head_dim": 8},
    }
    loose, tied = (HybridForCausalLM(HybridConfig(**sizes, tie_word_embeddings=tie)) for tie in (False, True))
    assert count_parameters(loose) - count_parameters(tied) == 50 * 16


@pytest.mark.parametrize("stack", [{"mixer": "attention"}, {"mixer": "gla"}, {"mixer": "gated_deltanet", "period": 2}])
def test_flops_agree_with_a_count_of_the_matrix_products_that_do_not_depend_on_the_chunk(stack):
    """torch's counter sees what ran. The projections, MLP and head must be there to the last product; the rest is counted in the
    recurrent form and is compared with its formula."""
    from torch.utils.flop_counter import FlopCounterMode

    options = {
        "attention": {"num_heads": 2},
        "gla": {"num_heads": 2},
        "gated_deltanet": {"num_heads": 2, "head_dim": 8},
    }
    model = HybridForCausalLM(HybridConfig(vocab_size=31, hidden_size=32, num_hidden_layers=2, **options, **stack))
    ids = torch.zeros(1, 7, dtype=torch.long)
    linear = sum(2 * 7 * m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Linear))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(ids)
    layers = {f"HybridForCausalLM.{name}" for name, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    counted = sum(sum(ops.values()) for module, ops in counter.get_flop_counts().items() if module in layers)
    assert counted == linear
    mixing = 0.0
    for name in model.config.mixers:
        mixing += {
            "attention": 4 * 7 * 4 * 32,
            "gla": 6 * 7 * 2 * 8 * 16,
            "gated_deltanet": 8 * 7 * 2 * 8 * 8 + 2 * 7 * 48 * 4,
        }[name]
    assert model.flops(7) == pytest.approx(linear + mixing)
    assert FlopCounter(model)(7, head=7) == pytest.approx(model.flops(7))


def test_flops_of_a_pass_that_sees_both_ways_count_the_centred_convolution():
    config = HybridConfig(
        vocab_size=20, hidden_size=32, num_hidden_layers=1, gated_deltanet={"num_heads": 2, "head_dim": 16}
    )
    model = HybridForCausalLM(config)
    more = model.flops(1, 0.0, directions=2) - model.flops(1, 0.0)
    state = 8 * 2 * 16 * 16  # a second recurrence
    assert more == state + 2 * 3 * 32 * (4 - 1)  # and the taps of the other side: W - 1 for each channel of q, k and v


def test_flops_of_a_row_do_not_depend_on_how_it_is_cut():
    model = HybridForCausalLM(
        HybridConfig(
            vocab_size=31,
            hidden_size=32,
            num_hidden_layers=2,
            period=2,
            attention={"num_heads": 2},
            gated_deltanet={"num_heads": 2, "head_dim": 8},
        )
    )
    count = FlopCounter(model)
    assert count(5) + count(4, past=5) == pytest.approx(count(9))
