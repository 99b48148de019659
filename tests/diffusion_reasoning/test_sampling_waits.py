"""What the loop asks of its device, what it leaves alone, and what it draws."""

import warnings
from dataclasses import fields, replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from latentcot.diffusion_reasoning import (
    DiffusionGenerationConfig,
    DiffusionOutput,
    Proposal,
    Revise,
    Uniform,
    ancestral,
    diffusion_generate,
    dream,
    easy_first,
    low_confidence,
    noise,
    trajectory,
)
from latentcot.diffusion_reasoning.noise import STREAMS, Noise

V, MASK = 9, 6
TABLE = torch.randn(2, V, V, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def network(z: Tensor, mask: Tensor) -> Tensor:
    return 2 * (TABLE[0][z.roll(1, 1)] + TABLE[1][mask.long().cumsum(1) % V])


SAMPLERS = {
    "confidence": low_confidence(steps=8),
    "blocks": low_confidence(steps=8, block_length=4),
    "tempered": low_confidence(steps=8, temperature=1.0, top_p=0.9, order="neg_entropy"),
    "ancestral": ancestral(10),
    "remdm": ancestral(10, remask="conf"),
    "dream": dream(steps=8, alg="entropy", alg_temp=0.2),
    "revise": low_confidence(steps=8, block_length=4, remask=Revise(1, 1)),
    "easy_first": easy_first(steps=6),
    "limited": low_confidence(threshold=0.9, max_nfe=6),
}


def generate(*arguments: Any, **named: Any) -> DiffusionOutput:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="steps:")  # clamping is another test's
        return diffusion_generate(*arguments, **named)


@pytest.fixture(params=SAMPLERS)
def sampler(request: pytest.FixtureRequest) -> DiffusionGenerationConfig:
    return SAMPLERS[request.param]


class Waits(TorchFunctionMode):
    """Counts what a GPU would have to be waited for: numbers and truth values that Python reads, results whose size
    depends on numbers, copies to the CPU."""

    NAMES = ("item", "tolist", "cpu", "numpy", "nonzero", "__bool__", "__int__", "__float__", "__index__", "unique")

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, getattr(func, "__name__", "")
        chosen = args[1] if name in ("__getitem__", "__setitem__") and len(args) > 1 else ()
        chosen = chosen if isinstance(chosen, tuple) else (chosen,)
        by_truth = any(isinstance(c, Tensor) and c.dtype == torch.bool for c in chosen)
        to_cpu = name == "to" and any(str(a) == "cpu" for a in (*args[1:], *kwargs.values()))
        self.count += name in self.NAMES or by_truth or to_cpu
        return func(*args, **kwargs)


@pytest.mark.parametrize("record", [None, "light", "full"])
def test_a_step_waits_once_and_a_recorder_never(sampler: DiffusionGenerationConfig, record):
    """Between two network passes: one wait, and one more for each step without a pass (and for one that is recorded)."""
    steps = Waits()
    counts: list[tuple[int, int]] = []

    def remember(number: int, rows: Tensor, z: Tensor) -> None:
        counts.append((number, steps.count))

    ids = torch.zeros(3, 2, dtype=torch.int64)
    maskable = torch.ones(3, 10, dtype=torch.bool)
    maskable[:, :2] = False
    maskable[2, 7:] = False  # a row that is finished sooner
    with steps:
        generate(
            network,
            ids,
            replace(sampler, max_new_tokens=8, record=record),
            maskable=maskable,
            hook=remember,
        )
    assert len(counts) > 2
    for (number, before), (later, after) in pairwise(counts):
        without_pass = later - number - 1
        assert after - before == 1 + without_pass * (1 if record is None else 2), (number, later)


def test_a_callers_order_waits_once_more():
    waits, counts = Waits(), []
    config = low_confidence(6, order=lambda p: p.uniform)
    with waits:
        ids = torch.zeros(2, 1, dtype=torch.int64)
        generate(network, ids, config, hook=lambda *_: counts.append(waits.count))
    assert {b - a for a, b in pairwise(counts)} == {2}


def test_what_is_out_of_order_is_never_shown_to_a_caller():
    def broken(z: Tensor, mask: Tensor) -> Tensor:
        logits = network(z, mask)
        if int((z == MASK).sum()) < 6:
            logits[1, 3] = torch.nan
        return logits

    def order(proposal: Proposal) -> Tensor:
        assert bool(proposal.logits.amax(-1).isfinite().all())
        return -proposal.positions.double()

    class Own(Uniform):
        def reveal(self, view):
            assert not bool(view.confidence.isnan().any())
            return super().reveal(view)

    def rewrite(number: int, rows: Tensor, z: Tensor, logits: Tensor) -> Tensor:
        assert not bool(logits.isnan().any())
        return z

    ids = torch.zeros(2, 1, dtype=torch.int64)
    config = low_confidence(3, order="left_to_right")
    for given, hook in ((replace(config, order=order), None), (replace(config, quota=Own()), None), (config, rewrite)):
        with pytest.raises(FloatingPointError, match=r"NaN or \+inf in pass 2, row 1, position 3"):
            generate(broken, ids, given, tokens_hook=hook)


@pytest.mark.parametrize("ragged", [False, True])
def test_whoever_writes_into_what_he_is_handed_changes_nothing(sampler: DiffusionGenerationConfig, ragged: bool):
    torch.manual_seed(0)
    ids = torch.randint(0, 5, (4, 3))
    config = replace(sampler, max_new_tokens=8)
    maskable = torch.ones(4, 11, dtype=torch.bool)
    maskable[:, :3] = False
    if ragged:
        maskable[1, 5:], maskable[3] = False, False

    def rude(z: Tensor, mask: Tensor) -> Tensor:
        logits = network(z, mask).clone()
        z.fill_(1)
        mask.fill_(False)
        return logits

    def rude_hook(number: int, rows: Tensor, z: Tensor, logits: Tensor) -> Tensor:
        logits.zero_()
        kept.append(z)
        if len(kept) > 1:
            kept[-2].fill_(3)
        return z

    kept: list[Tensor] = []
    plain = generate(network, ids, config, maskable=maskable)
    rude_callers: list[dict[str, Any]] = [{"hook": lambda number, rows, z: z.zero_()}, {"tokens_hook": rude_hook}]
    for named in rude_callers:
        out = generate(rude, ids, config, maskable=maskable, **named)
        assert torch.equal(out.sequences, plain.sequences)
        assert torch.equal(out.nfe, plain.nfe)


def test_numbers_are_drawn_when_they_are_read(monkeypatch):
    streams: list[str] = []
    draw = Noise.positions

    def counted(self: Noise, rows: Tensor, step: int, stream: str, positions: Tensor) -> Tensor:
        streams.append(stream)
        return draw(self, rows, step, stream, positions)

    monkeypatch.setattr(Noise, "positions", counted)
    ids = torch.zeros(2, 1, dtype=torch.int64)
    generate(network, ids, low_confidence(4, temperature=1.0))
    assert streams == []
    generate(network, ids, low_confidence(4, order="random"))
    assert streams == ["order"] * 4
    streams.clear()
    generate(network, ids, low_confidence(4, order=lambda p: p.uniform + 0 * p.uniform))
    assert streams == ["order"] * 4, "once a pass, however often it is read"


def test_every_number_is_the_hash_of_its_address(monkeypatch):
    """SplitMix64's finaliser in Python's integers."""
    golden, wrap = 0x9E3779B97F4A7C15, 2**64

    def mixed(x: int) -> int:
        x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % wrap
        x = (x ^ x >> 27) * 0x94D049BB133111EB % wrap
        return x ^ x >> 31

    def number(seed: int, step: int, stream: str, *address: int) -> float:
        key = mixed((seed + golden * (1 + 4 * step + STREAMS[stream])) % wrap)
        for part in address:
            key = mixed((key + (part + 1) * golden) % wrap)
        return ((key >> 12) + 0.5) * 2.0**-52

    seeds, rows, positions = [5, 2**62 - 3, -7], [0, 1, 2, 1, 0], [0, 3, 4096, 9, 2]
    source = Noise(torch.tensor(seeds))
    expected = [
        [number(seeds[row], 11, "token", position, token) for token in range(7)]
        for row, position in zip(rows, positions, strict=True)
    ]
    for at_once in (1, 14, 2**16):
        monkeypatch.setattr(noise, "_CACHED", at_once)
        drawn = source.tokens(torch.tensor(rows), 11, "token", torch.tensor(positions), 7)
        assert drawn.tolist() == expected
    placed = source.positions(torch.tensor([1, 2]), 3, "clock", torch.tensor([[0, 5], [8, 1]]))
    assert placed.tolist() == [
        [number(seeds[1], 3, "clock", p) for p in (0, 5)],
        [number(seeds[2], 3, "clock", p) for p in (8, 1)],
    ]


@pytest.mark.parametrize("record", ["light", "full"])
def test_steps_that_are_brought_over_early_are_the_same(sampler: DiffusionGenerationConfig, record, monkeypatch):
    torch.manual_seed(0)
    ids, config = torch.randint(0, 5, (3, 3)), replace(sampler, max_new_tokens=8, record=record)
    whole = generate(network, ids, config).trajectory
    monkeypatch.setattr(trajectory, "_MOST_HELD", 1500)
    brought = []
    bring = trajectory.Recorder._bring
    monkeypatch.setattr(trajectory.Recorder, "_bring", lambda self: (brought.append(len(self.counts)), bring(self)))
    pieces = generate(network, ids, config).trajectory
    assert len(brought) > 2
    assert whole is not None
    assert pieces is not None
    for field in fields(whole):
        one, other = getattr(whole, field.name), getattr(pieces, field.name)
        if isinstance(one, Tensor) and field.name != "seconds":
            torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)
            assert one.dtype == other.dtype


def test_of_equally_likely_tokens_the_log_shows_the_one_that_is_taken():
    def tied(z: Tensor, mask: Tensor) -> Tensor:
        logits = torch.zeros(*z.shape, 40, dtype=torch.bfloat16)
        logits[..., 11:30] = 2.0
        return logits

    config = low_confidence(4, record="light")
    out = generate(tied, torch.zeros(2, 1, dtype=torch.int64), config)
    assert out.trajectory is not None
    assert (out.sequences[:, 1:] == 11).all()
    assert (out.trajectory.pred[0, :, 1:] == 11).all()
