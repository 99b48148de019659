"""The short depthwise convolution that feeds q, k and v of the delta family."""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from latentcot.kernels.checks import check_dims, check_offsets, check_shape, check_tensors, compute_dtype
from latentcot.kernels.packing import Packing
from latentcot.kernels.visibility import Causal, Visibility, check_visibility


def short_convolution(
    x: Tensor,
    weight: Tensor,
    *,
    activation: Literal["silu"] | None = "silu",
    initial_state: Tensor | None = None,
    output_state: bool = False,
    cu_seqlens: Tensor | None = None,
    lengths: Tensor | None = None,
    visibility: Visibility = Causal(),
) -> tuple[Tensor, Tensor | None]:
    r"""Depthwise convolution over the last W inputs of each channel, then SiLU.

    .. math:: y_t = \mathrm{act}\Big(\sum_{w=0}^{W-1} \mathrm{weight}_{w} \odot x_{t-(W-1)+w}\Big)

    so the last tap is the current token. With ``Bidirectional()`` one centred kernel of width 2W-1 shares its taps
    between both sides: with :math:`a_w` the tap at distance w,
    :math:`y_t = \mathrm{act}(\sum_{w \ge 0} a_w x_{t-w} + \sum_{w \ge 1} a_w x_{t+w})`.

    Args:
        x: inputs ``[B,S,D]``.
        weight: taps ``[D,W]``, oldest first.
        activation: ``"silu"`` or None.
        initial_state: the last W-1 raw inputs before x, oldest first, ``[N,D,W-1]``; None is zeros.
        output_state: return the last W-1 raw inputs of [initial_state; x], also for S < W-1.
        cu_seqlens: ``[N+1]`` offsets of sequences packed into one row (B = 1); windows never cross them.
        lengths: ``[B]`` number of real tokens of right-padded rows. Padded inputs enter neither an output nor the
            state, and padded outputs are zero. Not together with ``cu_seqlens``.
        visibility: ``Causal()`` or ``Bidirectional()`` (no states then).

    Returns:
        ``(y [B,S,D], state [N,D,W-1] or None)``; y has the dtype of x, the state is float32 (float64 for float64
        inputs).

    Raises:
        ValueError, TypeError: shapes, dtypes or devices that do not fit, named with what was expected.
    """
    name = "short_convolution"
    check_tensors(name, x=x, weight=weight, initial_state=initial_state)
    check_dims(name, "x", x, "[B,S,D]")
    check_dims(name, "weight", weight, "[D,W]")
    check_visibility(name, visibility, with_state=initial_state is not None or output_state)
    B, S, D = x.shape
    W = weight.shape[1]
    check_shape(name, "weight", weight, "[D,W]", (D, W))
    if W < 1:
        raise ValueError(f"{name}: weight has shape {tuple(weight.shape)}, expected [D,W] with W >= 1")
    if activation not in ("silu", None):
        raise ValueError(f"{name}: activation is {activation!r}, expected 'silu' or None")
    if cu_seqlens is not None and lengths is not None:
        raise ValueError(f"{name}: cu_seqlens and lengths describe the same thing two ways; give one")
    packing = None
    if cu_seqlens is not None:
        packing = Packing(check_offsets(name, cu_seqlens, B, S), x.device)
    N = packing.count if packing else B
    if initial_state is not None:
        check_shape(name, "initial_state", initial_state, "[N,D,W-1]", (N, D, W - 1))
    if lengths is not None:
        _check_lengths(lengths, B, S, x.device)

    out_dtype = x.dtype
    dtype = compute_dtype(x, weight)
    x, weight = x.to(dtype), weight.to(dtype)
    if packing is not None:
        x, lengths = packing.unpack(x), packing.lengths
    mask = None
    if lengths is not None:
        mask = (torch.arange(x.shape[1], device=x.device) >= lengths.unsqueeze(1)).unsqueeze(-1)  # [N,S,1]
        x = x.masked_fill(mask, 0.0)

    if isinstance(visibility, Causal):
        past = x.new_zeros(N, W - 1, D) if initial_state is None else initial_state.to(dtype).transpose(1, 2)
        window = torch.cat([past, x], dim=1)  # [N,W-1+S,D]
        taps = weight
    else:
        window = F.pad(x, (0, 0, W - 1, W - 1))
        taps = torch.cat([weight, weight[:, :-1].flip(1)], dim=1)  # [D,2W-1]
    y = _depthwise(window, taps, x.shape[1])
    if activation == "silu":
        y = F.silu(y)
    if mask is not None:
        y = y.masked_fill(mask, 0.0)
    state = _last_inputs(window, W - 1, lengths) if output_state else None
    if packing is not None:
        y = packing.pack(y)
    return y.to(out_dtype), state


def _depthwise(window: Tensor, taps: Tensor, S: int) -> Tensor:
    """``y[:, t] = sum_w taps[:, w] * window[:, t + w]``: ``[N,S+W-1,D], [D,W] -> [N,S,D]``."""
    y = window[:, :S] * taps[:, 0]
    for w in range(1, taps.shape[1]):
        y = torch.addcmul(y, window[:, w : w + S], taps[:, w])
    return y


def _last_inputs(window: Tensor, count: int, lengths: Tensor | None) -> Tensor:
    """The last ``count`` real rows of [state; x] per sequence, as ``[N,D,count]``; always a copy."""
    if lengths is None:
        return window[:, window.shape[1] - count :].transpose(1, 2).clone(memory_format=torch.contiguous_format)
    index = lengths.unsqueeze(1) + torch.arange(count, device=window.device)  # row 0 of x is row `count` of the window
    index = index.unsqueeze(-1).expand(-1, -1, window.shape[2])
    return window.gather(1, index).transpose(1, 2).contiguous()


def _check_lengths(lengths: Tensor, B: int, S: int, device: torch.device) -> None:
    name = "short_convolution"
    if not isinstance(lengths, Tensor) or lengths.dtype not in (torch.int32, torch.int64):
        given = lengths.dtype if isinstance(lengths, Tensor) else type(lengths).__name__
        raise TypeError(f"{name}: lengths is {given}, expected an int32 or int64 tensor of shape [B]")
    check_shape(name, "lengths", lengths, "[B]", (B,))
    if lengths.device != device:
        raise ValueError(f"{name}: lengths is on {lengths.device} but x is on {device}")
    if not lengths.is_cuda and B > 0:
        low, high = int(lengths.min()), int(lengths.max())
        if low < 0 or high > S:
            raise ValueError(f"{name}: lengths range from {low} to {high}, expected 0 … S = {S}")
