"""The short depthwise convolution that feeds q, k and v of the delta family."""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from latentcot.kernels.checks import check_dims, check_offsets, check_shape, check_tensors, compute_dtype
from latentcot.kernels.dispatch import BACKENDS, Backend, missing_for_triton
from latentcot.kernels.packing import Packing
from latentcot.kernels.visibility import Causal, Visibility, check_visibility

WINDOWS = range(2, 9)  # W that the Triton kernels serve: the windows of a wider one would not fit their registers


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
    backend: Backend = "auto",
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
        backend: ``"auto"`` (Triton for CUDA tensors that are not float64, W in 2 … 8, else PyTorch), ``"triton"``;
            ``"chunked"`` and ``"reference"`` both name the PyTorch path.

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
    _, _, D = x.shape
    W = weight.shape[1]
    check_shape(name, "weight", weight, "[D,W]", (D, W))
    if W < 1:
        raise ValueError(f"{name}: weight has shape {tuple(weight.shape)}, expected [D,W] with W >= 1")
    offsets = _check_call(name, x, D, W, activation, initial_state, output_state, cu_seqlens, lengths, visibility)
    dtype = compute_dtype(x, weight)
    if takes_triton(name, x.device, dtype, W, backend) and x.numel() > 0:
        from latentcot.kernels.convolution_registered import one_forward

        initial_state = None if initial_state is None else initial_state.float()
        y, state = one_forward(
            x, weight, initial_state, cu_seqlens, lengths, activation == "silu", not isinstance(visibility, Causal),
            output_state,
        )  # fmt: skip
        return y, state if output_state else None

    out_dtype = x.dtype
    packing = None if offsets is None else Packing(offsets, x.device)
    x, weight = x.to(dtype), weight.to(dtype)
    if packing is not None:
        x, lengths = packing.unpack(x), packing.lengths
    mask = None
    if lengths is not None:
        mask = (torch.arange(x.shape[1], device=x.device) >= lengths.unsqueeze(1)).unsqueeze(-1)  # [N,S,1]
        x = x.masked_fill(mask, 0.0)

    if isinstance(visibility, Causal):
        past = x.new_zeros(x.shape[0], W - 1, D) if initial_state is None else initial_state.to(dtype).transpose(1, 2)
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


def short_convolution_qkv(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    weight_q: Tensor,
    weight_k: Tensor,
    weight_v: Tensor,
    *,
    activation: Literal["silu"] | None = "silu",
    initial_state: Tensor | None = None,
    output_state: bool = False,
    cu_seqlens: Tensor | None = None,
    lengths: Tensor | None = None,
    visibility: Visibility = Causal(),
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """:func:`short_convolution` of q, k and v, in one launch on the Triton back end.

    The three are read where they are, views of a wider buffer included, and come out as three contiguous tensors.

    Args:
        q, k, v: inputs ``[B,S,D_q]``, ``[B,S,D_k]``, ``[B,S,D_v]`` of one dtype.
        weight_q, weight_k, weight_v: their taps ``[D_q,W]``, ``[D_k,W]``, ``[D_v,W]``, oldest first.
        initial_state: ``[N,D_q+D_k+D_v,W-1]``, the states of q, k and v one after the other.
        activation, output_state, cu_seqlens, lengths, visibility, backend: as for :func:`short_convolution`.

    Returns:
        ``(q, k, v, state [N,D_q+D_k+D_v,W-1] or None)``.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices that do not fit, named with what was expected.
    """
    name = "short_convolution_qkv"
    check_tensors(
        name, q=q, k=k, v=v, weight_q=weight_q, weight_k=weight_k, weight_v=weight_v, initial_state=initial_state
    )
    check_dims(name, "q", q, "[B,S,D_q]")
    check_dims(name, "weight_q", weight_q, "[D_q,W]")
    B, S, _ = q.shape
    W = weight_q.shape[1]
    for letter, x, weight in (("q", q, weight_q), ("k", k, weight_k), ("v", v, weight_v)):
        check_dims(name, letter, x, f"[B,S,D_{letter}]")
        check_shape(name, letter, x, f"[B,S,D_{letter}]", (B, S, x.shape[2]))
        check_shape(name, f"weight_{letter}", weight, f"[D_{letter},W]", (x.shape[2], W))
        if x.dtype != q.dtype:
            raise TypeError(f"{name}: {letter} has dtype {x.dtype} and q has {q.dtype}, expected one dtype")
    widths = [q.shape[2], k.shape[2], v.shape[2]]
    weight = torch.cat([weight_q, weight_k, weight_v])
    dtype = compute_dtype(q, weight)
    if not takes_triton(name, q.device, dtype, W, backend) or min(q.numel(), k.numel(), v.numel()) == 0:
        y, state = short_convolution(
            torch.cat([q, k, v], dim=-1), weight, activation=activation, initial_state=initial_state,
            output_state=output_state, cu_seqlens=cu_seqlens, lengths=lengths, visibility=visibility, backend=backend,
        )  # fmt: skip
        return *(part.contiguous() for part in y.split(widths, dim=-1)), state  # pyright: ignore[reportReturnType]

    _check_call(name, q, sum(widths), W, activation, initial_state, output_state, cu_seqlens, lengths, visibility)
    from latentcot.kernels.convolution_registered import qkv_forward

    initial_state = None if initial_state is None else initial_state.float()
    *outputs, state = qkv_forward(
        q, k, v, weight, initial_state, cu_seqlens, lengths, activation == "silu", not isinstance(visibility, Causal),
        output_state,
    )  # fmt: skip
    return outputs[0], outputs[1], outputs[2], state if output_state else None


def _check_call(
    name: str, x: Tensor, D: int, W: int, activation: str | None, initial_state: Tensor | None, output_state: bool,
    cu_seqlens: Tensor | None, lengths: Tensor | None, visibility: Visibility,
) -> list[int] | None:  # fmt: skip
    """What both entries ask of their options; returns the offsets of packed sequences as a list."""
    B, S, _ = x.shape
    check_visibility(name, visibility, with_state=initial_state is not None or output_state)
    if activation not in ("silu", None):
        raise ValueError(f"{name}: activation is {activation!r}, expected 'silu' or None")
    if cu_seqlens is not None and lengths is not None:
        raise ValueError(f"{name}: cu_seqlens and lengths describe the same thing two ways; give one")
    offsets = None if cu_seqlens is None else check_offsets(name, cu_seqlens, B, S)
    if initial_state is not None:
        N = B if offsets is None else len(offsets) - 1
        check_shape(name, "initial_state", initial_state, "[N,D,W-1]", (N, D, W - 1))
    if lengths is not None:
        _check_lengths(lengths, B, S, x.device)
    return offsets


def takes_triton(name: str, device: torch.device, dtype: torch.dtype, W: int, backend: str) -> bool:
    """Whether a call runs in Triton; raises ValueError for an unknown back end and for a missing Triton."""
    if backend not in BACKENDS:
        raise ValueError(f"{name}: backend is {backend!r}, expected one of {BACKENDS}")
    if backend in ("chunked", "reference") or (backend == "auto" and device.type != "cuda"):
        return False
    missing = missing_for_triton("gated_scan", device, dtype)  # what any kernel needs: a device, Triton, a dtype
    if missing is None and W not in WINDOWS:
        missing = f"the kernels serve {WINDOWS[0]} … {WINDOWS[-1]} taps, not {W}"
    if missing is not None and backend == "triton":
        raise ValueError(f"{name}: backend='triton' cannot run: {missing}; use backend='auto'")
    return missing is None


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
