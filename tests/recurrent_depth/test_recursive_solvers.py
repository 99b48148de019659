"""HRM, TRM and deep supervision: equations by an independent fp64 reference, gradients, carry, halting, variable length."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from latentcot.recurrent_depth.recursive_solvers import (
    IGNORED,
    ArctangentAdam,
    DeepSupervision,
    RecursiveSolver,
    SegmentOutput,
    SignDescent,
    SolverConfig,
    SolverTraining,
    SupervisionConfig,
    hrm,
    softmax_cross_entropy,
    stablemax_cross_entropy,
    stablemax_log_probs,
    train_solver,
    trm,
)

SMALL = {"hidden_size": 32, "num_heads": 4, "multiple_of": 16}
KINDS = {
    "hrm": hrm(6, 10, **SMALL, puzzles=3),
    "trm": trm(6, 10, **SMALL, prefix=2),
    "trm mlp": trm(6, 10, **SMALL, mixing="mlp", prefix=4, cycles=1, latent_updates=2),
    "no prefix": trm(6, 10, **SMALL, prefix=0, cycles=2, latent_updates=1),
}


def make(config: SolverConfig, seed: int = 0) -> RecursiveSolver:
    torch.manual_seed(seed)
    solver = RecursiveSolver(config).double()
    with torch.no_grad():  # halt logits and puzzle embeddings start at a constant, which would hide faults
        nn.init.normal_(solver.halt_head.weight)
        solver.halt_head.bias.zero_()
        if solver.puzzle_embedding is not None:
            nn.init.normal_(solver.puzzle_embedding.weight, std=0.1)
    return solver


def inputs_for(config: SolverConfig, rows: int = 5, cells: int = 10, seed: int = 1) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    found = {"grid": torch.randint(1, config.vocab_size, (rows, cells), generator=generator)}
    if config.puzzles:
        found["puzzle"] = torch.randint(config.puzzles, (rows,), generator=generator)
    return found


@pytest.fixture(params=KINDS)
def config(request) -> SolverConfig:
    return KINDS[request.param]


# -- an independent reference -------------------------------------------------------------------------------------------


def rms(x):
    return x / (x.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt()


def gated(x, weights, name):
    gate, up, down = (weights[f"{name}.{part}_proj.weight"] for part in ("gate", "up", "down"))
    pre = x @ gate.T
    return (pre * torch.sigmoid(pre) * (x @ up.T)) @ down.T


def attention(x, weights, name, heads):
    batch, length, width = x.shape
    d = width // heads
    q, k, v = (
        (x @ weights[f"{name}.{part}_proj.weight"].T).view(batch, length, heads, d).transpose(1, 2) for part in "qkv"
    )
    angle = torch.arange(length)[:, None] * 10000.0 ** (-2.0 * torch.arange(d // 2, dtype=torch.float64) / d)
    cos, sin = torch.cat([angle.cos()] * 2, -1), torch.cat([angle.sin()] * 2, -1)

    def turn(t):
        return t * cos + torch.cat((-t[..., d // 2 :], t[..., : d // 2]), -1) * sin

    scores = turn(q) @ turn(k).transpose(-1, -2) / math.sqrt(d)
    mixed = (scores.softmax(-1) @ v).transpose(1, 2).reshape(batch, length, width)
    return mixed @ weights[f"{name}.o_proj.weight"].T


def reference_segment(solver: RecursiveSolver, states, inputs):
    """y, z, logits and halt logits of one segment, from the state dict and the equations."""
    c, w = solver.config, dict(solver.state_dict())

    def network(name, x):
        for layer in range(c.layers):
            block = f"{name}.{layer}"
            if c.mixing == "mlp":
                mixed = gated(x.transpose(1, 2), w, f"{block}.attn.mlp").transpose(1, 2)
            else:
                mixed = attention(x, w, f"{block}.attn", c.num_heads)
            x = rms(x + mixed)
            x = rms(x + gated(x, w, f"{block}.mlp"))
        return x

    x = w["embedding.weight"][inputs["grid"]]
    front = torch.zeros(len(x), c.prefix, c.hidden_size, dtype=x.dtype)
    if c.puzzles:
        front = w["puzzle_embedding.weight"][inputs["puzzle"]].view(len(x), c.prefix, c.hidden_size)
    x = math.sqrt(c.hidden_size) * torch.cat((front, x), 1)
    y, z = states
    for _ in range(c.cycles):
        for _ in range(c.latent_updates):
            z = network("z_blocks", z + y + x)
        y = network("y_blocks", y + z)
    halt = y[:, 0] @ w["halt_head.weight"].T + w["halt_head.bias"]
    return y, z, y[:, c.prefix :] @ w["head.weight"].T, halt


def test_two_carried_segments_are_the_equations(config):
    solver, inputs = make(config), inputs_for(config)
    states = solver.start(inputs)
    expected = states
    for _ in range(2):
        states, output = solver(states, inputs)
        y, z, logits, halt = reference_segment(solver, expected, inputs)
        expected = (y, z)
        torch.testing.assert_close(states, expected, rtol=1e-9, atol=1e-10)
        torch.testing.assert_close(output.logits, logits, rtol=1e-9, atol=1e-10)
        torch.testing.assert_close(output.halt, halt[:, 0], rtol=1e-9, atol=1e-10)
        assert (output.proceed is None) == (config.halting == "exact")
        if output.proceed is not None:
            torch.testing.assert_close(output.proceed, halt[:, 1], rtol=1e-9, atol=1e-10)


def test_published_sizes():
    """27,275,266 parameters of HRM at a vocabulary of 11; about 5M (MLP) and 7M (attention) of TRM."""
    counts = {}
    with torch.device("meta"):
        for name, made in {
            "hrm": hrm(11, 81),
            "mlp": trm(11, 81, mixing="mlp"),
            "attention": trm(11, 81),
        }.items():
            counts[name] = sum(p.numel() for p in RecursiveSolver(made).parameters())
    assert counts["hrm"] == 27_275_266
    assert round(counts["mlp"] / 1e6) == 5
    assert round(counts["attention"] / 1e6) == 7
    assert hrm(11, 81).mlp_width(512) == 1536


def test_one_network_or_two():
    solver = make(KINDS["trm"])
    assert solver.y_blocks is solver.z_blocks
    solver = make(KINDS["hrm"])
    assert solver.y_blocks is not solver.z_blocks


def test_initialisation():
    torch.manual_seed(0)
    solver = RecursiveSolver(trm(200, 20, hidden_size=256, num_heads=4, puzzles=2))
    assert solver.embedding.weight.std().item() == pytest.approx(1 / 16, rel=0.02)
    down = solver.z_blocks[0].mlp.down_proj  # pyright: ignore
    assert down.weight.std().item() == pytest.approx(down.in_features**-0.5, rel=0.02)  # pyright: ignore
    assert down.weight.abs().max() <= 2.3 * down.in_features**-0.5  # pyright: ignore
    assert solver.initial_y.std().item() == pytest.approx(1.0, rel=0.15)
    assert not torch.equal(solver.initial_y, solver.initial_z)
    assert not solver.halt_head.weight.any()
    assert (solver.halt_head.bias == -5).all()
    assert solver.puzzle_embedding is not None
    assert not solver.puzzle_embedding.weight.any()
    names = {name for name, _ in solver.named_parameters()}
    assert not any("norm" in name or "initial" in name for name in names)


# -- gradients ----------------------------------------------------------------------------------------------------------


def gradients(solver: RecursiveSolver, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    solver.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in solver.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("kind", ["hrm", "trm"])
def test_gradient_is_that_of_the_last_updates(kind):
    """One-step gradient = autograd of the last two updates; TRM's = autograd of the last whole cycle."""
    config = KINDS[kind]
    solver, inputs = make(config), inputs_for(config)
    states = solver.start(inputs)
    _, output = solver(states, inputs)
    found = gradients(solver, output.logits.sin().sum() + output.halt.sum())

    with torch.no_grad():  # everything before the window, by hand
        x, context = solver.embed(inputs)
        y, z = states
        window = 1 if config.gradient == "last_updates" else config.latent_updates
        total = config.cycles * config.latent_updates
        for update in range(total - window):
            z = run(solver.z_blocks, z + y + x, context)
            if (update + 1) % config.latent_updates == 0:
                y = run(solver.y_blocks, y + z, context)
    x, context = solver.embed(inputs)
    for _ in range(window):
        z = run(solver.z_blocks, z + y + x, context)
    y = run(solver.y_blocks, y + z, context)
    logits, halt = solver.head(y[:, config.prefix :]), solver.halt_head(y[:, 0])
    expected = gradients(solver, logits.sin().sum() + halt[:, 0].sum())
    assert found.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-9, atol=1e-12)
    assert found["embedding.weight"].abs().sum() > 0


def run(blocks, hidden, context):
    for block in blocks:
        hidden, _ = block(hidden, context)
    return hidden


def test_one_step_and_full_cycle_gradients_differ():
    config = KINDS["trm"]
    both = []
    for gradient in ("last_cycle", "last_updates"):
        solver = make(replace(config, gradient=gradient))
        _, output = solver(solver.start(inputs_for(config)), inputs_for(config))
        both.append((output.logits.detach(), gradients(solver, output.logits.sin().sum())["embedding.weight"]))
    assert torch.equal(both[0][0], both[1][0])
    assert (both[0][1] - both[1][1]).abs().max() > 1e-6


def test_no_gradient_flows_into_the_carried_states():
    config = KINDS["trm"]
    solver, inputs = make(config), inputs_for(config)
    y, z = (s.requires_grad_() for s in solver.start(inputs))
    _, output = solver((y, z), inputs)
    output.logits.sum().backward()
    assert y.grad is None
    assert z.grad is None


# -- loss ---------------------------------------------------------------------------------------------------------------


def test_stablemax_sums_to_one_and_stays_finite():
    for scale in (1.0, 1e4):
        logits = torch.tensor([[1.0, -1.0, 0.0, 0.3]]).mul(scale).requires_grad_()
        log_probs = stablemax_log_probs(logits)
        assert log_probs.dtype == torch.float64
        assert log_probs.exp().sum().item() == pytest.approx(1.0, abs=1e-12)
        log_probs[0, 1].backward()
        assert torch.isfinite(log_probs).all()
        assert torch.isfinite(logits.grad).all()  # pyright: ignore
    values = stablemax_log_probs(torch.tensor([[2.0, -1.0, 0.0]])).exp()
    torch.testing.assert_close(values, torch.tensor([[3.0, 0.5, 1.0]], dtype=torch.float64) / 4.5)


def test_ignored_cells_cost_nothing():
    logits, targets = torch.randn(2, 3, 5), torch.tensor([[1, 2, IGNORED], [4, IGNORED, IGNORED]])
    for loss in (stablemax_cross_entropy, softmax_cross_entropy):
        found = loss(logits, targets)
        assert found.shape == (2, 3)
        assert (found[targets == IGNORED] == 0).all()
        assert (found[targets != IGNORED] > 0).all()
    expected = -stablemax_log_probs(logits)[0, 1, 2]
    assert stablemax_cross_entropy(logits, targets)[0, 1] == expected


class Counter(nn.Module):
    """Counts its segments; halts at the row's own number; answers right from the second segment on."""

    def __init__(self, two_logits: bool = False):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))
        self.two_logits = two_logits
        self.rows_seen: list[int] = []

    def start(self, inputs):
        return {"count": torch.zeros(len(inputs["at"]))}

    def forward(self, state, inputs):
        count = state["count"] + 1
        self.rows_seen.append(len(count))
        answer = (count >= 2).long()
        logits = F.one_hot(answer, 2)[:, None].float() * 8 * self.weight
        halt = count - inputs["at"] + 0.5
        return {"count": count * self.weight}, SegmentOutput(logits, halt, -0.3 * halt if self.two_logits else None)


def counting(at: list[int], two_logits: bool = False, **config) -> tuple[DeepSupervision, dict, torch.Tensor]:
    model = DeepSupervision(Counter(two_logits), SupervisionConfig(**{"explore": 0.0, "segments": 4, **config}))
    return model, {"at": torch.tensor(at, dtype=torch.float)}, torch.ones(len(at), 1, dtype=torch.long)


def test_rows_are_replaced_when_they_halt_and_their_state_starts_anew():
    model, inputs, targets = counting([1, 2, 3, 9])
    carry = model.begin(inputs, targets)
    segments, finished = [], []
    for step in range(6):
        fresh = {"at": inputs["at"] if step == 0 else torch.full((4,), 2.0)}
        result, carry = model(carry, fresh, targets)
        segments.append(carry.segments.tolist())
        finished.append(result.finished.tolist())
        assert carry.state["count"].tolist() == carry.segments.tolist()
        assert not carry.state["count"].requires_grad
    # the first row halts after 1 segment, then every 2; the last one never by itself: after 4
    assert segments == [[1, 1, 1, 1], [1, 2, 2, 2], [2, 1, 3, 3], [1, 2, 1, 4], [2, 1, 2, 1], [1, 2, 1, 2]]
    assert finished[0] == [True, False, False, False]
    assert finished[3] == [False, True, False, True]
    assert carry.inputs["at"].tolist() == [2.0] * 4


def test_exploration_delays_halting_by_a_drawn_minimum():
    for minimum in ("example", "segment"):
        model, inputs, targets = counting([1] * 4000, explore=0.5, minimum=minimum, segments=5)
        _, carry = model(model.begin(inputs, targets), inputs, targets, torch.Generator().manual_seed(0))
        assert (~carry.halted).float().mean().item() == pytest.approx(0.5, abs=0.03)
        least = carry.least[~carry.halted]
        assert sorted(set(least.tolist())) == [2, 3, 4, 5]
        assert (torch.bincount(least)[2:] / len(least) - 0.25).abs().max() < 0.05
    model, inputs, targets = counting([1] * 400, explore=1.0, segments=3)
    generator, carry = torch.Generator().manual_seed(0), model.begin(inputs, targets)
    for _ in range(3):
        _, carry = model(carry, inputs, targets, generator)
        assert torch.equal(carry.halted, carry.segments >= carry.least)


def test_loss_is_the_formula():
    model, inputs, targets = counting([1, 3], two_logits=True, segments=2, halt_weight=0.5)
    result, carry = model(model.begin(inputs, targets), inputs, targets)
    halt = torch.tensor([0.5, -1.5])
    answer = stablemax_cross_entropy(torch.tensor([[[8.0, 0.0]]]), targets[:1]).mean()
    right = torch.zeros(2)
    later = halt + 1
    best = torch.maximum(later, -0.3 * later).sigmoid()
    q_halt = F.binary_cross_entropy_with_logits(halt, right)
    q_continue = F.binary_cross_entropy_with_logits(-0.3 * halt, best)
    assert result.loss.item() == pytest.approx((answer + 0.5 * (q_halt + q_continue)).item(), rel=1e-6)
    # segment 2 of the second row is the last one: its target is the later halt logit alone, and its answer is right
    first_again = carry.halted.tolist()
    assert first_again == [True, False]
    result, _ = model(carry, inputs, targets)
    halt = torch.tensor([0.5, -0.5])
    later = halt + 1
    best = torch.stack((torch.maximum(later, -0.3 * later)[0], later[1])).sigmoid()
    logits = torch.tensor([[[8.0, 0.0]], [[0.0, 8.0]]])
    answer = stablemax_cross_entropy(logits, targets).mean()
    q_halt = F.binary_cross_entropy_with_logits(halt, torch.tensor([0.0, 1.0]))
    q_continue = F.binary_cross_entropy_with_logits(-0.3 * halt, best)
    assert result.loss.item() == pytest.approx((answer + 0.5 * (q_halt + q_continue)).item(), rel=1e-6)
    assert result.parts["exact"] == 0.5
    assert result.parts["finished"] == 2


def test_exact_halting_runs_no_second_forward():
    for two_logits, calls in ((False, 1), (True, 2)):
        model, inputs, targets = counting([3, 3], two_logits)
        model(model.begin(inputs, targets), inputs, targets)
        assert len(model.module.rows_seen) == calls  # pyright: ignore


# -- answering ----------------------------------------------------------------------------------------------------------


def test_halting_rows_leave_the_computation():
    model, inputs, _ = counting([1, 3, 2, 9])
    found = model.solve(inputs, segments=5, record=True)
    assert found.segments.tolist() == [1, 3, 2, 5]
    assert found.halted.tolist() == [True, True, True, False]
    assert model.module.rows_seen == [4, 3, 2, 1, 1]  # pyright: ignore
    assert found.answers[:, 0].tolist() == [0, 1, 1, 1]
    assert [h[:, 0].tolist() for h in found.history] == [[0, 0, 0, 0], [0, 1, 1, 1]] + [[0, 1, 1, 1]] * 3
    every = model.solve(inputs, halt=False)
    assert every.segments.tolist() == [4] * 4  # the training's number
    assert not every.halted.any()


def test_batched_halting_is_row_by_row(config):
    solver, inputs = make(config), inputs_for(config, rows=8)
    model = DeepSupervision(solver, SupervisionConfig(segments=6))
    # a threshold in the middle of what the rows say, so that they halt at different segments
    _, first = solver(solver.start(inputs), inputs)
    with torch.no_grad():
        solver.halt_head.bias[0] -= (first.halt if first.proceed is None else first.halt - first.proceed).median()
    together = model.solve(inputs)
    assert len(set(together.segments.tolist())) > 1
    for row in range(8):
        alone = model.solve({name: value[row : row + 1] for name, value in inputs.items()})
        assert torch.equal(alone.answers[0], together.answers[row])
        assert alone.segments[0] == together.segments[row]


def test_padding_changes_nothing(config):
    """Grids of several lengths in one batch: each row as it would be alone."""
    solver = make(config)
    lengths = [10, 4, 7]
    inputs = inputs_for(config, rows=3)
    inputs["mask"] = torch.arange(10) < torch.tensor(lengths)[:, None]
    inputs["grid"] = inputs["grid"].masked_fill(~inputs["mask"], 0)
    states, output = solver(solver.start(inputs), inputs)
    states, output = solver(states, inputs)
    for row, length in enumerate(lengths):
        alone = {
            k: v[row : row + 1, :length] if k == "grid" else v[row : row + 1] for k, v in inputs.items() if k != "mask"
        }
        inner, single = solver(solver.start(alone), alone)
        inner, single = solver(inner, alone)
        torch.testing.assert_close(output.logits[row, :length], single.logits[0], rtol=1e-9, atol=1e-10)
        torch.testing.assert_close(output.halt[row], single.halt[0], rtol=1e-9, atol=1e-10)


# -- training -----------------------------------------------------------------------------------------------------------


def test_arctangent_adam_is_its_formula_and_ignores_the_gradients_scale():
    moves = []
    for scale in (1.0, 1e-6):
        weight = nn.Parameter(torch.tensor([1.0, -2.0], dtype=torch.float64))
        optimiser = ArctangentAdam([weight], lr=0.1, betas=(0.9, 0.95), weight_decay=0.5)
        mean = square = torch.zeros(2, dtype=torch.float64)
        expected = weight.detach().clone()
        for step, gradient in enumerate((torch.tensor([1.0, -3.0]), torch.tensor([0.5, 2.0])), start=1):
            gradient = gradient.double() * scale
            weight.grad = gradient
            optimiser.step()
            mean, square = 0.9 * mean + 0.1 * gradient, 0.95 * square + 0.05 * gradient**2
            move = torch.atan2(mean / (1 - 0.9**step), (square / (1 - 0.95**step)).sqrt())
            expected = expected * (1 - 0.1 * 0.5) - 0.1 * move
            torch.testing.assert_close(weight.detach(), expected)
        moves.append(weight.detach().clone())
    torch.testing.assert_close(moves[0], moves[1])


def test_sign_descent_moves_rows_that_took_part():
    table = nn.Embedding(4, 3)
    before = table.weight.detach().clone()
    (table(torch.tensor([1, 3])) * torch.tensor([1.0, -2.0, 5.0])).sum().backward()
    SignDescent(table.parameters(), lr=0.1, weight_decay=0.5).step()
    moved = before[[1, 3]] * (1 - 0.1 * 0.5) - 0.1 * torch.tensor([1.0, -1.0, 1.0])
    torch.testing.assert_close(table.weight[[1, 3]].detach(), moved)
    assert torch.equal(table.weight[[0, 2]].detach(), before[[0, 2]])


@pytest.mark.parametrize("kind", ["hrm", "trm", "trm mlp"])
def test_training_learns_to_rename_cells(kind):
    torch.manual_seed(0)
    config = replace(KINDS[kind], layers=1)
    model = DeepSupervision(RecursiveSolver(config), SupervisionConfig(segments=2))

    def draw(step):
        inputs = inputs_for(config, rows=32, seed=step)
        return inputs, renamed(inputs)

    def renamed(inputs):
        return inputs["grid"] % 5 + 1

    training = SolverTraining(steps=75, learning_rate=1e-2, warmup_steps=5, average=0.8)
    result = train_solver(model, draw, training, log_every=30)
    assert result.steps == 75
    assert [row["step"] for row in result.history] == [30, 60, 75]
    assert result.history[-1]["answer"] < 0.5 * result.history[0]["answer"]
    inputs, targets = draw(10_000)
    found = result.model.solve(inputs)
    assert (found.answers == targets).float().mean() > 0.9
    assert result.model is not model  # the average answers
    if model.module.puzzle_embedding is not None:  # pyright: ignore
        assert model.module.puzzle_embedding.weight.any()  # pyright: ignore


def test_the_average_is_exponential():
    torch.manual_seed(0)
    config = KINDS["trm"]
    model = DeepSupervision(RecursiveSolver(config))
    seen = []

    def draw(step):
        seen.append(model.module.head.weight.detach().clone())  # pyright: ignore
        inputs = inputs_for(config, seed=step)
        return inputs, inputs["grid"]

    result = train_solver(model, draw, SolverTraining(steps=3, average=0.75, warmup_steps=0))
    weights = [*seen[1:], model.module.head.weight.detach()]  # pyright: ignore
    expected = weights[0]
    for weight in weights[1:]:
        expected = 0.75 * expected + 0.25 * weight
    torch.testing.assert_close(result.model.module.head.weight.detach(), expected)  # pyright: ignore
    last = train_solver(model, draw, SolverTraining(steps=1, average=None))
    assert last.model is model


def test_flops_count_every_update():
    one, more = (RecursiveSolver(trm(6, 10, **SMALL, cycles=c)).flops(10) for c in (1, 3))
    head = 2 * 10 * 32 * 6 + 2 * 32 * 2
    assert more - head == pytest.approx(3 * (one - head))


# -- bad input ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: trm(6, 10, cycles=0), ValueError, "cycles: 0 given, expected an integer of at least 1"),
        (lambda: trm(6, 10, mixing="mpl"), ValueError, "mixing: 'mpl' given, .* did you mean 'mlp'"),
        (lambda: trm(6, 10, halt_rule="halt_above_continue"), ValueError, "halt_rule: .* halting 'q_learning'"),
        (lambda: trm(6, 10, puzzles=2, prefix=0), ValueError, "prefix: 2 puzzles need at least one position"),
        (lambda: trm(6, 10, num_heads=7), ValueError, "num_heads: 7 does not divide hidden_size 512"),
        (lambda: SupervisionConfig(segments=0), ValueError, "segments: 0 given"),
        (lambda: SupervisionConfig(explore=2), ValueError, "explore: 2 given, expected a probability"),
        (lambda: SupervisionConfig(loss="softmx"), ValueError, "did you mean 'softmax'"),  # pyright: ignore
        (lambda: DeepSupervision(nn.Linear(2, 2)), TypeError, "module: Linear has no method 'start'"),
        (lambda: SolverTraining(steps=1, average=1.0), ValueError, "average: 1.0 given"),
        (lambda: ArctangentAdam([], betas=(0.9, 1.0)), ValueError, "betas"),
    ],
    ids=range(11),
)
def test_bad_values_are_named(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_bad_inputs_are_named():
    solver = make(KINDS["trm"])
    inputs = inputs_for(KINDS["trm"])
    states = solver.start(inputs)
    with pytest.raises(ValueError, match="inputs: 'grid' is missing"):
        solver(states, {})
    with pytest.raises(ValueError, match=r"grid: expected shape \[B, at most 10\], got \[5, 11\]"):
        solver(states, inputs_for(KINDS["trm"], cells=11))
    with pytest.raises(ValueError, match=r"mask: expected shape \[5, 10\]"):
        solver(states, {**inputs, "mask": torch.ones(5, 9, dtype=torch.bool)})
    with pytest.raises(ValueError, match="puzzle: expected none"):
        solver(states, {**inputs, "puzzle": torch.zeros(5, dtype=torch.long)})
    with pytest.raises(ValueError, match=r"states: y has shape \[5, 12, 32\], expected \[B, L, D\] = \[4, 12, 32\]"):
        solver(states, {"grid": inputs["grid"][:4]})
    with pytest.raises(ValueError, match=r"puzzle: expected ids of shape \[5\], got none"):
        make(KINDS["hrm"]).embed({"grid": inputs["grid"]})
    model, given, targets = counting([1, 2, 3])
    carry = model.begin(given, targets)
    with pytest.raises(ValueError, match=r"carry: it holds targets of shape \[3, 1\], the new ones have \[2, 1\]"):
        model(carry, {"at": given["at"][:2]}, targets[:2])
    with pytest.raises(ValueError, match="inputs: the carry's and the new ones differ in more"):
        model(carry, {**given, "more": given["at"]}, targets)
    with pytest.raises(ValueError, match="segments: 0 given"):
        model.solve(given, segments=0)


@pytest.mark.parametrize("kind", ["hrm", "trm mlp"])
def test_compiled_blocks_are_the_blocks(kind):
    config = KINDS[kind]
    plain, compiled = make(config), make(config)
    compiled.compile_blocks(backend="eager")
    inputs = inputs_for(config)
    found = []
    for solver in (plain, compiled):
        (y, _), output = solver(solver.start(inputs), inputs)
        grads = torch.autograd.grad(output.logits.square().sum() + y.sum(), list(solver.z_blocks.parameters()))
        found.append([output.logits, output.halt, y, *grads])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)
    assert list(plain.state_dict()) == list(compiled.state_dict())
    average = torch.optim.swa_utils.AveragedModel(compiled)  # a copy of it answers after training
    torch.testing.assert_close(average(compiled.start(inputs), inputs)[1].logits, found[0][0])
