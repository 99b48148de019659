"""The log of a run, its file and its pictures."""

import html
from pathlib import Path

import matplotlib
import pytest
import torch
from matplotlib import pyplot
from torch import Tensor

from latentcot.backbone import HybridConfig, HybridForCausalLM
from latentcot.diffusion_reasoning import (
    ReMDM,
    Trajectory,
    accuracy_by_steps,
    ancestral,
    diffusion_generate,
    easy_first,
    low_confidence,
)
from latentcot.diffusion_reasoning.trajectory_plots import (
    animate,
    calibration,
    plot_calibration,
    plot_confidence,
    plot_entropy,
    plot_flips,
    plot_nfe,
    plot_reveal_order,
    plot_settling,
    token_animation,
)
from latentcot.training.budget import FlopCounter

matplotlib.use("Agg")
V, MASK = 9, 6


def network(z: Tensor, mask: Tensor) -> Tensor:
    table = torch.randn(3, V, V, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return 2 * (table[0][z] + table[1][torch.arange(z.shape[1]) % V] + table[2][z.roll(1, 1)])


def tokens(*shape: int) -> Tensor:
    x = torch.randint(0, V - 1, shape)
    return x + (x >= MASK)


def run(config, ids: Tensor | None = None, **named) -> tuple[Trajectory, Tensor]:
    torch.manual_seed(0)
    out = diffusion_generate(network, tokens(3, 4) if ids is None else ids, config, **named)
    assert out.trajectory is not None
    return out.trajectory, out.sequences


def test_each_step_is_as_the_network_saw_it():
    seen: list[Tensor] = []
    trajectory, sequences = run(low_confidence(6, steps=3, record="full"), hook=lambda n, r, z: seen.append(z))
    held = [*seen[1:], sequences]
    assert trajectory.n_steps == 3
    for k, (before, after) in enumerate(zip(seen, held, strict=True)):
        assert torch.equal(trajectory.tokens[k].long(), after)
        assert torch.equal(trajectory.n_masked[k].long(), (after[:, 4:] == MASK).sum(1))
        logits = network(before, before).masked_fill(torch.arange(V) == MASK, -torch.inf)
        p = logits.softmax(-1)
        masked = before == MASK
        best = p.topk(5, -1)
        entropy = -torch.special.xlogy(p, p).sum(-1)
        for name, value in (
            ("confidence", best.values[..., 0]),
            ("entropy", entropy),
            ("margin", best.values[..., 0] - best.values[..., 1]),
        ):
            got = getattr(trajectory, name)[k]
            assert torch.equal(~got.isnan(), masked)
            torch.testing.assert_close(got[masked].double(), value[masked], rtol=2e-3, atol=1e-3)
        assert torch.equal(trajectory.pred[k].long()[masked], best.indices[..., 0][masked])
        assert trajectory.topk_ids is not None
        assert torch.equal(trajectory.topk_ids[k][masked].long(), best.indices[masked])
    assert trajectory.nfe.tolist() == [[1, 1, 1], [2, 2, 2], [3, 3, 3]]
    assert (trajectory.seconds.diff() > 0).all()
    assert torch.equal(trajectory.final.long(), sequences)


def test_reveal_order_flips_and_settling():
    trajectory, sequences = run(low_confidence(5, order="left_to_right", record="light"))
    assert trajectory.revealed_at[0].tolist() == [-1] * 4 + [0, 1, 2, 3, 4]
    assert trajectory.kendall_tau().tolist() == [1.0, 1.0, 1.0]
    assert (trajectory.n_flips == 0).all()
    assert trajectory.settled()[-1].tolist() == [1.0, 1.0, 1.0]
    for row in range(3):
        held = trajectory.tokens[:, row]
        agree = (torch.where(held == MASK, trajectory.pred[:, row], held) == sequences[row]).all(1).tolist()
        assert int(trajectory.correct_early[row]) == agree.index(True)
    assert trajectory.topk_ids is None

    backwards, _ = run(low_confidence(5, order=lambda p: p.positions.double(), record="light"))
    assert backwards.kendall_tau().tolist() == [-1.0, -1.0, -1.0]


@pytest.mark.parametrize("config", [ancestral(12, 8, remask=ReMDM(0.4)), easy_first(8, steps=6)], ids=["remdm", "easy"])
def test_flips_are_returns_to_the_mask(config):
    from dataclasses import replace

    states: list[Tensor] = []

    def remember(number: int, rows: Tensor, z: Tensor, logits: Tensor) -> Tensor:
        whole = (states[-1] if states else torch.full((3, 12), MASK)).clone()
        whole[rows] = z
        states.append(whole)
        return z

    trajectory, _ = run(replace(config, record="light"), tokens_hook=remember)
    flips = torch.zeros(3, 12, dtype=torch.int64)
    before = torch.full((3, 12), MASK)
    for state in states:
        flips += (before != MASK) & (state == MASK)
        before = state
    flips[:, :4] = 0
    assert torch.equal(trajectory.n_flips.long(), flips)
    assert int(flips.sum()) > 0
    assert (trajectory.revealed_at[:, 4:] >= 0).all()


def test_depth_and_flops_of_a_backbone():
    torch.manual_seed(0)
    model = HybridForCausalLM(
        HybridConfig(vocab_size=V, hidden_size=16, num_hidden_layers=3, attention={"num_heads": 2}, mixer="attention")
    )
    out = diffusion_generate(model, tokens(2, 4), low_confidence(6, steps=3, record="light"))
    assert out.trajectory is not None
    assert out.trajectory.depth.tolist() == [9, 9]
    a_pass = FlopCounter(model, directions=2)(10, head=10)
    assert out.trajectory.flops.tolist() == pytest.approx([3 * a_pass] * 2)


def test_rows_with_nothing_to_fill_have_an_empty_log():
    trajectory, _ = run(low_confidence(record="light"), maskable=torch.zeros(3, 4, dtype=torch.bool))
    assert trajectory.n_steps == 0
    assert trajectory.depth.tolist() == [0, 0, 0]
    with pytest.raises(ValueError, match="nothing was masked"):
        plot_reveal_order(trajectory)


def test_files_hold_everything(tmp_path: Path):
    trajectory, _ = run(low_confidence(5, record="full"))
    trajectory.save_npz(tmp_path / "run.npz")
    again = Trajectory.load_npz(tmp_path / "run.npz")
    assert [p.name for p in tmp_path.iterdir()] == ["run.npz"]
    for name, value in vars(trajectory).items():
        other = getattr(again, name)
        if isinstance(value, Tensor):
            assert other.dtype == value.dtype
            torch.testing.assert_close(other, value, rtol=0, atol=0, equal_nan=True)
        else:
            assert other == value
    (tmp_path / "other.npz").write_bytes(b"PK nothing")
    with pytest.raises(ValueError, match="no trajectory"):
        Trajectory.load_npz(tmp_path / "other.npz")


def test_calibration_counts_by_hand():
    trajectory, sequences = run(low_confidence(6, record="light"))
    truth = sequences.clone()
    truth[0, 4:] = 7
    found = calibration(trajectory, truth, bins=4)
    assert sum(count for _, _, count in found) == 18
    right = sum(share * count for _, share, count in found)
    assert right == pytest.approx(int((sequences == truth)[:, 4:].sum()))
    assert all(0 <= c <= 1 for c, _, _ in found)
    with pytest.raises(ValueError, match="truth"):
        calibration(trajectory, truth[:, 1:])
    with pytest.raises(ValueError, match="bins"):
        calibration(trajectory, truth, bins=0)


def test_every_picture_draws():
    trajectory, sequences = run(ancestral(10, 6, remask=ReMDM(0.3), record="light"))
    for plot in (plot_reveal_order, plot_confidence, plot_entropy):
        ax = plot(trajectory, row=1)
        assert ax.get_ylabel() == "denoising step"
        assert len(ax.images) == 1
    ax = plot_settling(trajectory)
    assert len(ax.lines) == 2
    assert ax.lines[0].get_ydata()[-1] == pytest.approx(1.0)
    assert plot_flips(trajectory).patches
    assert plot_calibration(trajectory, sequences).lines
    points = accuracy_by_steps(network, tokens(4, 2), lambda s: s[:, -1] == 1, low_confidence(4), [1, 2, 4])
    assert plot_nfe(points, label="confidence").get_legend() is not None
    assert plot_nfe(points, x="depth").get_xlabel() == "blocks one after the other"
    pyplot.close("all")
    for call, says in (
        (lambda: plot_reveal_order(trajectory, row=3), "row: 3 given"),
        (lambda: plot_nfe([]), "points"),
        (lambda: plot_nfe(points, x="time"), "x: 'time'"),
        (lambda: animate(trajectory, grid=(2, 2)), "grid: 2 x 2"),
        (lambda: token_animation(trajectory, seconds=0.0), "seconds"),
    ):
        with pytest.raises(ValueError, match=says):
            call()


def test_the_animation_fills_in():
    trajectory, sequences = run(low_confidence(5, record="light"))
    animation = animate(trajectory, row=0, grid=(3, 3), decode=lambda t: f"<{t}>")
    drawn = [[cell.get_text() for cell in animation._func(frame)] for frame in range(trajectory.n_steps)]
    assert drawn[-1][:-1] == [f"<{t}>" for t in sequences[0].tolist()]
    assert drawn[0][-1] == "step 1 of 5, 4 masked"
    assert drawn[0][:4] == drawn[-1][:4]
    assert "<img" in animation.to_jshtml(default_mode="once")
    pyplot.close("all")


def test_html_escapes_and_knows_every_step():
    trajectory, sequences = run(low_confidence(5, record="light"))
    page = str(token_animation(trajectory, row=2, decode=lambda t: f"<b>&{t}"))
    assert page == token_animation(trajectory, row=2, decode=lambda t: f"<b>&{t}")._repr_html_()
    assert "<b>" not in page
    assert "<script" not in page
    for token in sequences[2].tolist():
        assert html.escape(f"<b>&{token}") in page
    assert page.count("class=") == 1 + 9
    assert page.count("@keyframes") == 5
    assert "prefers-reduced-motion" in page
