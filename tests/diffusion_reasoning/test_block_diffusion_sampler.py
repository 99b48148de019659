"""Sampling block by block: against passes over the whole sequence, rows alone, counts of passes, stopping, bad input."""

# Options go through dictionaries of mixed types, and weights of modules are tensors: a type checker can not know either.
# pyright: reportOperatorIssue=false, reportIndexIssue=false, reportCallIssue=false

import pytest
import torch
from torch import Tensor

from latentcot.backbone import HybridConfig, HybridForCausalLM
from latentcot.diffusion_reasoning import DiffusionGenerationConfig, ancestral, low_confidence
from latentcot.diffusion_reasoning.block_diffusion import BlockDiffusionModel, block_generate

MASK, EOS, VOCAB = 6, 2, 19


def make(mixers=("gated_deltanet", "attention"), block_length=4, dtype=torch.float64, **settings):
    torch.manual_seed(0)
    config = HybridConfig(
        vocab_size=VOCAB,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=len(mixers),
        mixers=list(mixers),
        initializer_range=0.4,
        convolution_init="uniform",
        attention={"num_heads": 2},
        gla={"num_heads": 2},
        gated_deltanet={"num_heads": 2, "head_dim": 8},
    )
    return BlockDiffusionModel(HybridForCausalLM(config).to(dtype).eval(), block_length, MASK, **settings)


def prompts(rows=2, length=6, seed=0) -> Tensor:
    return torch.randint(7, VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))


def sampler(n=9, **options) -> DiffusionGenerationConfig:
    return DiffusionGenerationConfig(n, mask_id=MASK, eos_id=EOS, **options)


def by_whole_passes(model, ids: Tensor, n: int) -> tuple[Tensor, int]:
    """Greedy, the most confident token a pass, by two-stream passes over everything; one row, blocks from left to right."""
    z = torch.cat([ids, torch.full((1, n), MASK)], 1)
    masked = torch.arange(z.shape[1]) >= ids.shape[1]
    passes = 0
    for a in range(0, z.shape[1], model.block_length):
        b = min(a + model.block_length, z.shape[1])
        while masked[a:b].any():
            logits = model.forward_two_stream(z, z)[0, a:b].clone()
            logits[:, MASK] = -torch.inf
            best = logits.softmax(-1).max(-1)
            at = int(best.values.masked_fill(~masked[a:b], -1).argmax())
            z[0, a + at] = best.indices[at]
            masked[a + at] = False
            passes += 1
    return z, passes


@pytest.mark.parametrize("shift", [False, True], ids=["aligned", "shifted"])
@pytest.mark.parametrize("length", [4, 6, 1])
def test_a_carried_state_samples_what_whole_passes_sample(length, shift):
    """Prompts that end at a border of blocks, inside a block, before the first border."""
    model = make(shift=shift)
    ids = prompts(1, length)
    out = block_generate(model, ids, sampler())
    expected, denoised = by_whole_passes(model, ids, 9)
    assert torch.equal(out.sequences, expected)
    blocks = -(-(length + 9) // 4) - length // 4
    assert out.nfe.tolist() == [denoised + (blocks - 1) + (length >= 4)]
    assert out.exact
    assert not out.stopped.any()


def test_blocks_of_one_token_decode_as_the_autoregressive_model():
    """shift, inside="decayed", rho = 0: greedy decoding token for token."""
    model = make(("gla", "gated_deltanet", "attention"), 1, inside="decayed", shift=True, rho=0.0)
    ids = prompts(2, 3)
    out = block_generate(model, ids, sampler(8, forbid_mask_token=True))
    z = ids
    for _ in range(8):
        logits = model.backbone(z).logits[:, -1].clone()
        logits[:, MASK] = -torch.inf
        z = torch.cat([z, logits.argmax(-1, keepdim=True)], 1)
    assert torch.equal(out.sequences, z)


CONFIGS = {
    "one a pass": sampler(),
    "few passes, warm": sampler(steps=4, temperature=0.8),
    "threshold": sampler(quota="threshold", threshold=0.2, temperature=0.5),
    "random order": sampler(6, order="random", temperature=1.0, top_p=0.9),
    "ancestral": ancestral(6, 6, mask_id=MASK, eos_id=EOS),
    "bounded": sampler(max_nfe=8, temperature=0.7),
}


@pytest.mark.parametrize(
    ("name", "state_from"), [(name, "clean") for name in CONFIGS] + [("few passes, warm", "noisy_last")]
)
def test_a_row_alone_is_the_row_in_a_batch(name, state_from):
    """Prompts of 6, 4 and 1 tokens, padded on the left: tokens, passes and stops, same seed."""
    model = make(shift=True, state_from=state_from)
    ids, lengths = prompts(3), [6, 4, 1]
    mask = torch.arange(6) >= 6 - torch.tensor(lengths)[:, None]
    seeds = torch.tensor([5, 6, 7])
    out = block_generate(model, ids, CONFIGS[name], mask, row_seeds=seeds)
    assert torch.equal(out.sequences[:, :6], ids)
    assert not (out.sequences[:, 6:] == MASK).any()
    for row, n in enumerate(lengths):
        alone = block_generate(model, ids[row : row + 1, 6 - n :], CONFIGS[name], row_seeds=seeds[row : row + 1])
        assert torch.equal(out.sequences[row, 6 - n :], alone.sequences[0])
        assert int(out.nfe[row]) == int(alone.nfe[0])
        assert bool(out.stopped[row]) == bool(alone.stopped[0])
        if CONFIGS[name].max_nfe is not None:
            assert int(alone.nfe[0]) <= CONFIGS[name].max_nfe
    order = torch.tensor([2, 0, 1])
    shuffled = block_generate(model, ids[order], CONFIGS[name], mask[order], row_seeds=seeds[order])
    assert torch.equal(shuffled.sequences, out.sequences[order])


def test_passes_are_counted_with_commits_and_the_prompt():
    """12 new tokens behind 8 in blocks of 4, two a pass: the prompt, 3 · 2 passes, 2 commits; one less each without commits."""
    model, ids = make(), prompts(1, 8)
    config = sampler(12, steps=6)
    seen = []
    out = block_generate(
        model, ids, config, hook=lambda number, rows, z: seen.append((number, rows.tolist(), z.shape[1]))
    )
    assert out.nfe.tolist() == [1 + 6 + 2]
    assert seen == [(0, [0], 4), (1, [0], 4)] * 3
    quick = block_generate(make(state_from="noisy_last"), ids, config)
    assert quick.nfe.tolist() == [1 + 6]
    assert not quick.exact
    assert block_generate(model, ids, sampler(8)).nfe.tolist() == [1 + 8 + 1]


def test_given_tokens_stay_and_blocks_without_a_gap_are_only_read():
    """Infilling: gaps in the first, the fourth and the last block; the blocks between cost one pass."""
    model, ids = make(), prompts(2, 18)
    gaps = torch.zeros(2, 18, dtype=torch.bool)
    gaps[0, [1, 2, 13, 17]] = True
    out = block_generate(model, ids, sampler(0), maskable=gaps)
    assert torch.equal(out.sequences[~gaps], ids[~gaps])
    assert not (out.sequences == MASK).any()
    assert out.nfe.tolist() == [2 + 1 + 1 + 1 + 1, 0]
    nothing = block_generate(model, ids, sampler(0), maskable=torch.zeros_like(gaps))
    assert torch.equal(nothing.sequences, ids)
    assert nothing.nfe.tolist() == [0, 0]


def test_an_end_of_text_ends_a_row_and_only_that_row():
    model = make()
    with torch.no_grad():
        model.backbone.lm_head.weight[EOS] = 0.6 * model.backbone.lm_head.weight.mean(0)
    ids = prompts(6, 4, seed=3)
    plain = block_generate(model, ids, sampler(16, temperature=1.0))
    stopped = block_generate(model, ids, sampler(16, temperature=1.0, stop="eos_block"))
    cut = block_generate(model, ids, sampler(16, temperature=1.0, stop="eos_truncate"))
    ends = 0
    for row in range(6):
        new = plain.sequences[row, 4:]
        where = (new == EOS).nonzero()[:, 0]
        if not len(where):
            assert torch.equal(stopped.sequences[row], plain.sequences[row])
            continue
        block = int(where[0]) // 4
        assert torch.equal(stopped.sequences[row, 4 : 4 + 4 * (block + 1)], new[: 4 * (block + 1)])
        assert (stopped.sequences[row, 4 + 4 * (block + 1) :] == EOS).all()
        assert bool(stopped.stopped[row]) == (block < 3)
        assert int(stopped.nfe[row]) == int(plain.nfe[row]) - 5 * (3 - block)
        assert torch.equal(cut.sequences[row, 4 : 4 + int(where[0])], new[: int(where[0])])
        assert (cut.sequences[row, 4 + int(where[0]) :] == EOS).all()
        ends += block < 3
    assert ends


def test_constraints_hold():
    model, ids = make(), prompts(2, 3)
    allowed = torch.zeros(2, 12, VOCAB, dtype=torch.bool)
    allowed[..., [8, 9]] = True
    out = block_generate(model, ids, sampler(9, temperature=1.0), allowed=allowed)
    assert set(out.sequences[:, 3:].flatten().tolist()) <= {8, 9}
    allowed[1, 10] = False
    with pytest.raises(ValueError, match="no token is left for row 1"):
        block_generate(model, ids, sampler(9), allowed=allowed)
    with pytest.raises(ValueError, match="allowed: shape"):
        block_generate(model, ids, sampler(9), allowed=allowed[:, :3])


def test_more_steps_than_tokens_are_clamped_with_one_warning():
    with pytest.warns(UserWarning, match="40 passes are more than there are tokens") as caught:
        out = block_generate(make(), prompts(), sampler(steps=40))
    assert len(caught) == 1
    assert out.nfe.tolist() == [1 + 9 + 2] * 2


def test_bad_input_is_named():
    model, ids = make(), prompts()
    with pytest.raises(ValueError, match="steps: 2 given for 3 blocks"):
        block_generate(model, ids, sampler(steps=2))
    with pytest.raises(ValueError, match="max_nfe: 5 given, but row 0 needs at least 6 passes"):
        block_generate(model, ids, sampler(max_nfe=5))


@pytest.mark.parametrize("state_from", ["clean", "noisy_last"])
def test_a_given_block_between_two_to_fill_counts_as_a_pass_and_stays_within_the_bound(state_from):
    model, ids = make(block_length=2, state_from=state_from), prompts(1, 8)
    maskable = torch.tensor([[1, 1, 0, 0, 1, 1, 1, 1]]).bool()
    least = 5 if state_from == "clean" else 4  # three blocks; two commits, or one reading of what is given
    for most in range(least, 9):
        out = block_generate(model, ids, sampler(0, max_nfe=most), maskable=maskable)
        assert int(out.nfe[0]) <= most
        assert not (out.sequences == MASK).any()
    with pytest.raises(ValueError, match=f"max_nfe: {least - 1} given, but row 0 needs at least {least} passes"):
        block_generate(model, ids, sampler(0, max_nfe=least - 1), maskable=maskable)
    with pytest.raises(ValueError, match="mask_id: the sampler's is 7, the model's 6"):
        block_generate(model, ids, low_confidence(4, mask_id=7, eos_id=EOS))
    with pytest.raises(ValueError, match="block_length: 3 given"):
        block_generate(model, ids, sampler(block_length=3))
    with pytest.raises(ValueError, match="over the whole canvas"):
        block_generate(model, ids, sampler(guidance=1.0))
    with pytest.raises(ValueError, match="parity: 'llada'"):
        block_generate(model, ids, sampler(parity="llada"))
    with pytest.raises(TypeError, match="expected a BlockDiffusionModel"):
        block_generate(model.backbone, ids, sampler())  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="first token of a row is to be filled"):
        block_generate(make(shift=True), ids, sampler(0), maskable=torch.ones_like(ids, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"row_seeds: shape \[3\]"):
        block_generate(model, ids, sampler(), row_seeds=torch.zeros(3, dtype=torch.long))
    with torch.no_grad():
        model.backbone.lm_head.weight[9] = float("nan")
    with pytest.raises(FloatingPointError, match="NaN"):
        block_generate(model, ids, sampler())


def test_no_rows_are_no_rows():
    out = block_generate(make(), prompts(0, 4), sampler(3))
    assert out.sequences.shape == (0, 7)
    assert out.nfe.shape == (0,)


# -- allowed tokens as a callable, trajectories -------------------------------------------------------------------------


def test_allowed_tokens_may_depend_on_what_stands_on_the_canvas():
    """Every new token must be the one before it plus one: the callable sees padding where it was, earlier blocks and this pass."""
    model, ids = make(block_length=2), prompts(2, 5).clamp(max=9)
    real = torch.ones_like(ids, dtype=torch.bool)
    real[1, :2] = False

    def one_more(number: int, z: Tensor) -> Tensor:
        assert torch.equal(z[:, :5], ids)
        table = torch.zeros(*z.shape, VOCAB, dtype=torch.bool)
        known = z[:, :-1] != MASK
        wanted = torch.where(known, z[:, :-1] + 1, 7)
        table[:, 1:] = torch.nn.functional.one_hot(wanted, VOCAB).bool()
        return table

    order = sampler(5, order="left_to_right")
    out = block_generate(model, ids, order, real, allowed=one_more)
    assert torch.equal(out.sequences[:, 5:], ids[:, 4:5] + torch.arange(1, 6))
    fixed = torch.rand(2, 10, VOCAB, generator=torch.Generator().manual_seed(0)) < 0.4
    fixed[..., 7] = True
    table = block_generate(model, ids, sampler(5), real, allowed=fixed)
    asked = block_generate(model, ids, sampler(5), real, allowed=lambda number, z: fixed)
    assert torch.equal(table.sequences, asked.sequences)
    with pytest.raises(ValueError, match=r"allowed: shape \[2, 10\]"):
        block_generate(model, ids, sampler(5), real, allowed=lambda number, z: z > 0)
    with pytest.raises(TypeError, match="allowed: a tensor or a callable"):
        block_generate(model, ids, sampler(5), real, allowed=[1])  # type: ignore[arg-type]


@pytest.mark.filterwarnings("ignore:steps:UserWarning")
@pytest.mark.parametrize(
    ("name", "record"), [("six steps", "light"), ("threshold", "full"), ("revise", "light"), ("stops", "full")]
)
def test_a_trajectory_is_that_of_the_row_alone_and_of_the_passes(name, record, tmp_path):
    options = {
        "six steps": {"steps": 6},
        "threshold": {"threshold": 0.2, "quota": "threshold", "temperature": 0.8},
        "revise": {"remask": "revise"},
        "stops": {"stop": "eos_block", "temperature": 1.0, "max_nfe": 9},
    }[name]
    model = make()
    lengths = [6, 3, 5]
    ids = prompts(3, 6)
    real = torch.arange(6) >= 6 - torch.tensor(lengths)[:, None]
    seeds = torch.tensor([5, 6, 7])
    seen: list[list[tuple[int, Tensor]]] = [[], [], []]

    def remember(number: int, rows: Tensor, z: Tensor) -> None:
        for row, tokens in zip(rows.tolist(), z, strict=True):
            seen[row].append((number, tokens))

    config = sampler(7, record=record, **options)
    out = block_generate(model, ids, config, real, row_seeds=seeds, hook=remember)
    plain = block_generate(model, ids, sampler(7, **options), real, row_seeds=seeds)
    assert torch.equal(out.sequences, plain.sequences)
    assert torch.equal(out.nfe, plain.nfe)
    trajectory = out.trajectory
    assert trajectory is not None
    assert torch.equal(trajectory.final.long(), out.sequences)
    assert torch.equal(trajectory.nfe[-1].long(), out.nfe)
    assert (trajectory.nfe.diff(dim=0) >= 0).all()
    assert trajectory.layers == 2
    assert (trajectory.settled()[-1] == 1).all()
    for row, length in enumerate(lengths):
        steps = len(seen[row])
        assert (trajectory.revealed_at[row, :6] == -1).all()
        assert trajectory.confidence[:steps, row].isfinite().any(1).all()
        assert not trajectory.confidence[steps:, row].isfinite().any()
        # what the next pass over a block is given is what this one left there
        block = length // 4 - 1
        for step, (number, held) in enumerate(seen[row]):
            block += number == 0
            start = 4 * block + 6 - length
            if number:
                stood = trajectory.tokens[step - 1, row, start : start + len(held)]
                assert torch.equal(stood.long()[:4], held[: len(stood)])
        alone = block_generate(
            model, ids[row : row + 1, 6 - length :], config, row_seeds=seeds[row : row + 1]
        ).trajectory
        assert alone is not None
        for field in ("tokens", "pred", "n_masked", "nfe", "confidence", "entropy", "margin", "topk_ids"):
            whole, one = getattr(trajectory, field), getattr(alone, field)
            if whole is None:
                assert record == "light"
                continue
            whole, one = whole[: alone.n_steps, row], one[:, 0]
            whole = whole[:, 6 - length :] if whole.dim() > 1 else whole
            torch.testing.assert_close(whole, one, equal_nan=True, atol=2e-3, rtol=0)
        for field in ("revealed_at", "n_flips"):
            assert torch.equal(getattr(trajectory, field)[row, 6 - length :], getattr(alone, field)[0])
        assert int(trajectory.correct_early[row]) == int(alone.correct_early[0])
    if name == "revise":
        assert trajectory.n_flips.sum() > 0
    trajectory.save_npz(tmp_path / "t.npz")
    again = type(trajectory).load_npz(tmp_path / "t.npz")
    assert torch.equal(again.tokens, trajectory.tokens)


def test_a_trajectory_of_nothing_is_empty():
    ids = prompts(2, 4)
    out = block_generate(make(), ids, sampler(0, record="light"), maskable=torch.zeros_like(ids, dtype=torch.bool))
    assert out.trajectory is not None
    assert out.trajectory.n_steps == 0
    assert out.nfe.tolist() == [0, 0]
