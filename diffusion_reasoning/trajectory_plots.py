r"""Pictures of a sampler's :class:`~latentcot.diffusion_reasoning.trajectory.Trajectory`.

==================== =======================================================================================
function             shows
==================== =======================================================================================
plot_reveal_order    when each position was revealed: position × step
plot_confidence      confidence of the prediction at each masked position over the steps
plot_entropy         the same for its entropy in nats
plot_settling        share of predictions that are final already, beside the share that is revealed
plot_nfe             accuracy against passes (points of ``accuracy_by_steps``)
plot_calibration     confidence at reveal against how often the token was right
plot_flips           how often revealed tokens went back to the mask
animate              the canvas filling in, as an animation that a notebook shows
token_animation      the same as a page of HTML without scripts, for any text
==================== =======================================================================================

Figures are matplotlib's (``pip install latentcot[compare]``); each function draws into ``ax`` when one is given and
returns it.
"""

import html
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from latentcot.diffusion_reasoning.depth import DepthPoint
from latentcot.diffusion_reasoning.trajectory import Trajectory

Decode = Callable[[int], str]


def _pyplot() -> Any:
    try:
        from matplotlib import pyplot
    except ImportError as error:
        raise ImportError("plots need matplotlib: pip install latentcot[compare]") from error
    return pyplot


def _axes(ax: Any, width: float = 6.0, height: float = 3.0) -> Any:
    if ax is not None:
        return ax
    return _pyplot().subplots(figsize=(width, height), layout="constrained")[1]


def _row(trajectory: Trajectory, row: int) -> int:
    if not 0 <= row < trajectory.maskable.shape[0]:
        raise ValueError(f"row: {row} given, expected a row within 0..{trajectory.maskable.shape[0] - 1}")
    if not trajectory.n_steps:
        raise ValueError("trajectory: it has no step, nothing was masked")
    return row


def _columns(trajectory: Trajectory, row: int) -> torch.Tensor:
    return trajectory.maskable[row].nonzero().squeeze(1)


def plot_reveal_order(trajectory: Trajectory, row: int = 0, ax: Any = None) -> Any:
    """Heat map, step downwards and position to the right: dark where a token is there, a mark where it was revealed."""
    columns = _columns(trajectory, _row(trajectory, row))
    ax = _axes(ax)
    held = (trajectory.tokens[:, row, columns] != trajectory.mask_id).numpy()
    ax.imshow(held, aspect="auto", cmap="Greys", vmin=0, vmax=2, interpolation="nearest")
    at = trajectory.revealed_at[row, columns].numpy()
    ax.scatter(np.arange(len(at)), at, marker="s", s=12, color="tab:red", label="revealed")
    ax.set_xlabel("position on the canvas")
    ax.set_ylabel("denoising step")
    ax.set_title("order of reveal")
    return ax


def _field(trajectory: Trajectory, name: str, row: int, ax: Any, label: str, high: float | None) -> Any:
    columns = _columns(trajectory, _row(trajectory, row))
    ax = _axes(ax)
    values = np.ma.masked_invalid(getattr(trajectory, name)[:, row, columns].float().numpy())
    image = ax.imshow(values, aspect="auto", vmin=0, vmax=high, cmap="viridis", interpolation="nearest")
    ax.figure.colorbar(image, ax=ax, label=label)
    ax.set_xlabel("position on the canvas")
    ax.set_ylabel("denoising step")
    return ax


def plot_confidence(trajectory: Trajectory, row: int = 0, ax: Any = None) -> Any:
    """Probability of the likeliest token at each masked position and step; empty where a token was revealed already."""
    return _field(trajectory, "confidence", row, ax, "confidence", 1.0)


def plot_entropy(trajectory: Trajectory, row: int = 0, ax: Any = None) -> Any:
    """Entropy of the prediction in nats at each masked position and step."""
    return _field(trajectory, "entropy", row, ax, "entropy (nats)", None)


def plot_settling(trajectory: Trajectory, ax: Any = None) -> Any:
    """Mean over rows of the share of predictions that equal the final token, beside the share revealed: the gap is what
    was decided before it was written."""
    _row(trajectory, 0)
    ax = _axes(ax)
    rows = trajectory.maskable.any(1)
    steps = np.arange(1, trajectory.n_steps + 1)
    revealed = 1 - trajectory.n_masked[:, rows].double() / trajectory.maskable[rows].sum(1)
    ax.plot(steps, trajectory.settled()[:, rows].double().mean(1).numpy(), label="predicted as at the end")
    ax.plot(steps, revealed.mean(1).numpy(), linestyle="--", label="revealed")
    ax.set_ylim(0, 1.02)
    ax.set_xlabel("denoising step")
    ax.set_ylabel("share of positions")
    ax.legend()
    return ax


def plot_nfe(points: Sequence[DepthPoint], ax: Any = None, label: str | None = None, x: str = "nfe") -> Any:
    """Accuracy with one standard error against ``x`` = ``nfe``, ``depth`` or ``flops``, logarithmic."""
    if x not in ("nfe", "depth", "flops"):
        raise ValueError(f"x: {x!r} given, expected 'nfe', 'depth' or 'flops'")
    if not points:
        raise ValueError("points: none given")
    ax = _axes(ax)
    names = {"nfe": "network passes", "depth": "blocks one after the other", "flops": "FLOPs"}
    ax.errorbar(
        [getattr(p, x) for p in points], [p.accuracy for p in points], [p.stderr for p in points],
        marker="o", capsize=2, label=label,
    )  # fmt: skip
    ax.set_xscale("log", base=10 if x == "flops" else 2)
    ax.set_xlabel(names[x])
    ax.set_ylabel("accuracy")
    if label is not None:
        ax.legend()
    return ax


def calibration(trajectory: Trajectory, truth: torch.Tensor, bins: int = 10) -> list[tuple[float, float, int]]:
    """``(mean confidence, share right, tokens)`` of each bin of confidence at reveal that holds a token. ``truth [B, L]``."""
    if truth.shape != trajectory.maskable.shape:
        raise ValueError(f"truth: shape {list(truth.shape)} given, expected {list(trajectory.maskable.shape)}")
    if bins < 1:
        raise ValueError(f"bins: at least 1, got {bins}")
    rows, columns = (trajectory.maskable & (trajectory.revealed_at >= 0)).nonzero(as_tuple=True)
    at = trajectory.revealed_at[rows, columns].long()
    confidence = trajectory.confidence[at, rows, columns].double()
    right = trajectory.final[rows, columns] == truth[rows, columns]
    known = ~confidence.isnan()
    which = (confidence[known] * bins).long().clamp(max=bins - 1)
    found = []
    for number in range(bins):
        chosen = which == number
        if chosen.any():
            share = float(right[known][chosen].double().mean())
            found.append((float(confidence[known][chosen].mean()), share, int(chosen.sum())))
    return found


def plot_calibration(trajectory: Trajectory, truth: torch.Tensor, bins: int = 10, ax: Any = None) -> Any:
    """Share of revealed tokens that equal ``truth [B, L]`` against their confidence at reveal."""
    ax = _axes(ax, 3.5, 3.5)
    found = calibration(trajectory, truth, bins)
    ax.plot([0, 1], [0, 1], color="grey", linewidth=0.8)
    ax.plot([c for c, _, _ in found], [s for _, s, _ in found], marker="o")
    ax.set_xlabel("confidence at reveal")
    ax.set_ylabel("share right")
    return ax


def plot_flips(trajectory: Trajectory, ax: Any = None) -> Any:
    """Histogram of how often maskable positions went from a token back to the mask."""
    ax = _axes(ax)
    flips = trajectory.n_flips[trajectory.maskable].long()
    counts = flips.bincount() if flips.numel() else torch.zeros(1, dtype=torch.int64)
    ax.bar(range(len(counts)), counts.numpy())
    ax.set_xlabel("times sent back to the mask")
    ax.set_ylabel("positions")
    return ax


def animate(
    trajectory: Trajectory,
    row: int = 0,
    decode: Decode = str,
    grid: tuple[int, int] | None = None,
    interval_ms: int = 400,
) -> Any:
    """The canvas filling in: a matplotlib animation. In a notebook, ``IPython.display.HTML(animate(...).to_jshtml())``.

    Given tokens are black; revealed ones blue, brighter the less confident the network was; masked positions show what
    the network would write there, in grey.

    Args:
        decode: token id to text.
        grid: (height, width) that the row's real tokens are laid out in, as for a Sudoku; ``None`` = one line, wrapped.
        interval_ms: time of a step.

    Raises:
        ValueError: a grid of another size than the row.
    """
    pyplot = _pyplot()
    from matplotlib.animation import FuncAnimation

    row = _row(trajectory, row)
    columns = trajectory.real[row].nonzero().squeeze(1)
    n = len(columns)
    height, width = grid or (-(-n // 16), min(n, 16))
    if grid is not None and height * width != n:
        raise ValueError(f"grid: {height} x {width} cells given, but the row has {n} real tokens")
    figure, ax = pyplot.subplots(figsize=(0.55 * width + 0.5, 0.55 * height + 0.7), layout="constrained")
    ax.set_xlim(0, width)
    ax.set_ylim(height, 0)
    ax.set_aspect("equal")
    ax.set_xticks(range(width + 1), labels=[])
    ax.set_yticks(range(height + 1), labels=[])
    ax.grid(linewidth=0.5)
    cells = [ax.text(i % width + 0.5, i // width + 0.5, "", ha="center", va="center", fontsize=11) for i in range(n)]
    title = ax.set_title("")

    def draw(frame: int) -> list[Any]:
        title.set_text(f"step {frame + 1} of {trajectory.n_steps}, {int(trajectory.n_masked[frame, row])} masked")
        for cell, column in zip(cells, columns.tolist(), strict=True):
            token = int(trajectory.tokens[frame, row, column])
            if not trajectory.maskable[row, column]:
                cell.set(text=decode(token), color="black", fontweight="bold")
            elif trajectory.n_masked[frame, row] and token == trajectory.mask_id:
                cell.set(text=decode(int(trajectory.pred[frame, row, column])), color="lightgrey", fontweight="normal")
            else:
                sure = float(trajectory.confidence[_last_seen(trajectory, frame, row, column), row, column])
                cell.set(text=decode(token), color=(0.0, 0.35, 1.0, 0.45 + 0.55 * sure), fontweight="normal")
        return [*cells, title]

    animation = FuncAnimation(figure, draw, frames=trajectory.n_steps, interval=interval_ms, blit=False)
    pyplot.close(figure)  # a notebook would show the first frame beside it
    return animation


def _last_seen(trajectory: Trajectory, frame: int, row: int, column: int) -> int:
    """The last step up to ``frame`` in which the network predicted this position."""
    seen = ~trajectory.confidence[: frame + 1, row, column].isnan()
    return int(seen.nonzero()[-1]) if bool(seen.any()) else 0


class TokenAnimation:
    """HTML that shows itself in a notebook; ``str`` of it is a fragment for any page."""

    def __init__(self, text: str):
        self.text = text

    def __str__(self) -> str:
        return self.text

    def _repr_html_(self) -> str:
        return self.text


def token_animation(trajectory: Trajectory, row: int = 0, decode: Decode = str, seconds: float = 4.0) -> TokenAnimation:
    """Each token of a row fades in at the moment it was revealed, over and over: HTML and CSS without a script.

    Tokens are escaped. People who ask their system for less motion see the finished text, and the number of the step in
    which a token was revealed is its tooltip.
    """
    row = _row(trajectory, row)
    if not 0.0 < seconds < float("inf"):
        raise ValueError(f"seconds: expected a time above zero, got {seconds}")
    steps, parts = trajectory.n_steps, []
    for column in trajectory.real[row].nonzero().squeeze(1).tolist():
        text = html.escape(decode(int(trajectory.final[row, column])))
        at = int(trajectory.revealed_at[row, column])
        if at < 0:
            parts.append(f'<span class="given">{text}</span>')
        else:
            parts.append(f'<span class="s{at}" title="step {at + 1} of {steps}">{text}</span>')
    used = sorted({int(a) for a in trajectory.revealed_at[row][trajectory.maskable[row]] if a >= 0})
    rules = [
        "@media (prefers-reduced-motion: no-preference) {",
        *(
            f".denoised .s{at} {{ animation: denoised-{at}-{steps} {seconds:g}s infinite; }} "
            f"@keyframes denoised-{at}-{steps} {{ 0%, {90 * at / steps:.2f}% {{ opacity: 0.12; }} "
            f"{90 * (at + 1) / steps:.2f}%, 100% {{ opacity: 1; }} }}"
            for at in used
        ),
        "}",
        ".denoised { font-family: monospace; line-height: 1.8; } .denoised .given { font-weight: bold; }",
    ]
    body = " ".join(parts)
    return TokenAnimation(f'<style>{" ".join(rules)}</style><div class="denoised">{body}</div>')
