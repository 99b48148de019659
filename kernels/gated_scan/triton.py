r"""The gated scan in Triton, plain and with HGRN's gates formed on the way.

A program holds a block of channels and walks its tokens in tiles ``[CHUNK, BLOCK]``. The loads of the tiles to come are
in flight while one is scanned: the scan is a stream of memory, and what counts is the number of bytes under way. Each
lane is told to hold a few channels and all tokens of its warp, so that the scan along time stays inside a lane, one
multiply-add a token, without a shuffle. Several warps of a program take one stretch of the tile each, and exchange once
a tile what their stretches do to a state.

Where sequences times blocks of channels are too few to fill the card, time is cut into PARTS as well: a first launch
finds of every part the product of its decays and the state it leaves when started from zero, a second one runs each
part from the state that the summaries before it imply. That reads the inputs twice.

Forward writes h in the dtype of x and nothing else; backward reads it again, since
:math:`dg_t = \delta_t a_t h_{t-1}`, and walks right to left. There a token is the map
:math:`c \mapsto a_t (c + dh_t)` with :math:`c_t = a_t \delta_t`; kept as (a, A, D), meaning
:math:`\delta = A c + D` and :math:`c' = a \delta`, it gives :math:`\delta_t` without dividing by a decay.

Arithmetic and carried states are float32. Offsets are 64-bit: a token's number times its stride passes 2^31 for tensors
of a few gigabytes. Nothing here touches a GPU at import. Under ``TRITON_INTERPRET=1`` (set before Triton is imported)
the kernels run on CPU tensors.
"""

# Inside a kernel tl.range is a loop and any number may stand for a constexpr, which a type checker cannot know.
# pyright: reportArgumentType=false, reportGeneralTypeIssues=false

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from latentcot.kernels.launch import Launch, flat, launch_shape

# 64 channels: 4-byte loads of 16-bit inputs, the narrowest that can be copied asynchronously, and the most programs. Two
# or three tiles are under way while one is scanned. Forward, where gates made on the way keep a warp busy longer than
# the memory, two warps share a tile of time.
FORWARD = Launch(chunk=32, block=64, warps=2, stages=3)
BACKWARD = Launch(chunk=16, block=64, warps=1, stages=3)
ENOUGH_PROGRAMS = 96  # with fewer, reading the inputs twice costs less than leaving most of the card idle
WANTED_PROGRAMS = 264
LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def row_offset(row, stride):
    """Elements before ``row``, in 64 bits."""
    return row.to(tl.int64) * stride


@triton.jit
def _two_steps(a1, b1, a2, b2):
    """The map h -> a h + b of step 1, then of step 2."""
    return a2 * a1, a2 * b1 + b2


@triton.jit
def _two_steps_back(a1, A1, D1, a2, A2, D2):
    """(a, A, D) of the later tokens 1, then of the earlier tokens 2."""
    m = A2 * a1
    return a2, m * A1, m * D1 + D2


@triton.jit
def _product(a, b):
    return a * b


@triton.jit
def decay_of(g):
    """exp(g) for a log-decay; NaN above zero, where nothing is defined: growth must not pass for a result."""
    return tl.where(g > 0, float("nan"), tl.exp2(g * LOG2_E))


@triton.jit
def sigmoids(f):
    """(sigma(f), sigma(-f)) without cancellation. Below -80 both have reached their limits, 0 and 1, to float32."""
    e = tl.exp2(tl.maximum(f, -80.0) * -LOG2_E)
    r = tl.rsqrt(1.0 + e)  # squared it is the reciprocal, at a third of the instructions of a division
    r *= r
    return r, e * r


@triton.jit
def three_sigmoids(f, i):
    """(sigma(f), sigma(-f), sigma(i)) from one reciprocal: what limits the fused forward is not memory but these.

    Below -40 they stay at sigma(-40) = 4e-18, so that the product of both denominators stays in range.
    """
    e_f = tl.exp2(tl.maximum(f, -40.0) * -LOG2_E)
    e_i = tl.exp2(tl.maximum(i, -40.0) * -LOG2_E)
    r = tl.rsqrt((1.0 + e_f) * (1.0 + e_i))
    r *= r
    open_f = r * (1.0 + e_i)
    return open_f, e_f * open_f, r * (1.0 + e_f)


@triton.jit
def _place(offsets, D, FIRST_PART, PARTS: tl.constexpr, SHARES: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr):
    """What this program does: (sequence, part, block of channels, start of the sequence, tokens first … last of the part)."""
    pid = tl.program_id(0)
    blocks = tl.cdiv(D, BLOCK)
    block = pid % blocks
    part = (pid // blocks) % SHARES + FIRST_PART
    n = pid // blocks // SHARES
    start = tl.load(offsets + n)
    end = tl.load(offsets + n + 1)
    each = tl.cdiv(tl.cdiv(end - start, PARTS), CHUNK) * CHUNK
    first = tl.minimum(start + part * each, end)
    last = tl.minimum(first + each, end)
    return n, part, block, start, first, last


@triton.jit
def _at(pointer, t, d, row, TOKEN: tl.constexpr):
    """Pointers to channels d of tokens t + row, both shaped to broadcast. TOKEN is known to the compiler: offsets of rows
    are constants inside the instructions, where 64-bit arithmetic for each row would cost more than the scan.
    """
    return pointer + row_offset(t, TOKEN) + d + row_offset(row, TOKEN)


@triton.jit
def _fetch(pointer, t, d, row, mask, other, TOKEN: tl.constexpr, WHOLE: tl.constexpr):
    """A tile in float32; WHOLE says that all of it exists, so that no mask is needed."""
    at = _at(pointer, t, d, row, TOKEN)
    if WHOLE:
        return tl.load(at).to(tl.float32)
    return tl.load(at, mask=mask, other=other).to(tl.float32)


@triton.jit
def _keep(pointer, t, d, row, mask, tile, TOKEN: tl.constexpr, WHOLE: tl.constexpr):
    at = _at(pointer, t, d, row, TOKEN)
    tile = tile.to(pointer.dtype.element_ty)
    if WHOLE:
        tl.store(at, tile)
    else:
        tl.store(at, tile, mask=mask)


@triton.jit
def _sum_four(a0, b0, a1, b1, a2, b2, a3, b3, c0, d0, c1, d1, c2, d2, c3, d3):
    return a0 + c0, b0 + d0, a1 + c1, b1 + d1, a2 + c2, b2 + d2, a3 + c3, b3 + d3


@triton.jit
def _enter(decay, left, carried, WARPS: tl.constexpr):
    """What each warp's tokens begin with ``[WARPS, BLOCK]``, and what the tile ends with ``[BLOCK]``.

    ``decay, left [WARPS, BLOCK]`` are the maps h -> decay h + left of the warps' tokens, in order.
    """
    if WARPS == 1:
        enter = carried[None, :]
        carried = tl.sum(decay, 0) * carried + tl.sum(left, 0)
    else:  # all maps to all warps in one exchange
        w = tl.arange(0, WARPS)[:, None]
        a0, b0, a1, b1, a2, b2, a3, b3 = tl.reduce(
            (
                tl.where(w == 0, decay, 0.0), tl.where(w == 0, left, 0.0),
                tl.where(w == 1, decay, 0.0), tl.where(w == 1, left, 0.0),
                tl.where(w == 2, decay, 0.0), tl.where(w == 2, left, 0.0),
                tl.where(w == 3, decay, 0.0), tl.where(w == 3, left, 0.0),
            ), 0, _sum_four,
        )  # fmt: skip
        second = a0 * carried + b0
        third = a1 * second + b1
        fourth = a2 * third + b2
        enter = tl.where(w == 0, carried[None, :], second[None, :])
        if WARPS == 2:
            carried = third
        else:
            enter = tl.where(w == 2, third[None, :], tl.where(w == 3, fourth[None, :], enter))
            carried = a3 * fourth + b3
    return enter, carried


@triton.jit
def _forward_tile(
    x, g, o, floor, carried, total, t, end, d, step, row,
    D: tl.constexpr, X_TOKEN: tl.constexpr, G_TOKEN: tl.constexpr,
    SUMMARY: tl.constexpr, FUSED: tl.constexpr, WARPS: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Tokens t + row of one part: writes h (or, for a summary, only counts), returns what is carried on.

    ``row [WARPS, STEPS, 1]``, ``step [1, STEPS, 1]`` counts inside a warp, ``d [1, 1, BLOCK]``.
    """
    mask = ((t + row) < end) & (d < D)
    b = _fetch(x, t, d, row, mask, 0.0, X_TOKEN, WHOLE)
    if FUSED:  # beyond the end: sigma(inf) = 1, a decay of 1 and no input
        f, nothing, on = three_sigmoids(_fetch(g, t, d, row, mask, float("inf"), G_TOKEN, WHOLE), b)
        a = floor + (1.0 - floor) * f
        b *= on * ((1.0 - floor) * nothing)
    else:
        a = decay_of(_fetch(g, t, d, row, mask, 0.0, G_TOKEN, WHOLE))
    decay, h = tl.associative_scan((a, b), 1, _two_steps)
    last = step == step.shape[1] - 1
    whole = tl.sum(tl.where(last, decay, 0.0), 1)
    enter, carried = _enter(whole, tl.sum(tl.where(last, h, 0.0), 1), carried, WARPS)
    if SUMMARY:
        total *= tl.reduce(whole, 0, _product)
    else:
        _keep(o, t, d, row, mask, h + decay * enter[:, None, :], D, WHOLE)
    return carried, total


@triton.jit
def _forward_kernel(
    x, g, bound, o, h0, final, decays, states, offsets,
    D: tl.constexpr, X_TOKEN: tl.constexpr, G_TOKEN: tl.constexpr,
    SUMMARY: tl.constexpr, FUSED: tl.constexpr, HAS_BOUND: tl.constexpr, HAS_STATE: tl.constexpr,
    PARTS: tl.constexpr, SHARES: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK: tl.constexpr, VECTOR: tl.constexpr, WARPS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    n, part, block, _start, first, end = _place(offsets, D, 0, PARTS, SHARES, CHUNK, BLOCK)
    d = block * BLOCK + tl.max_contiguous(tl.arange(0, BLOCK), VECTOR)
    inside = d < D
    # the tokens of a warp follow one another, and a lane holds all of them for its channels
    step = tl.arange(0, CHUNK // WARPS)[None, :, None]
    row = step + CHUNK // WARPS * tl.arange(0, WARPS)[:, None, None]
    channel = d[None, None, :]
    carried = tl.zeros([BLOCK], dtype=tl.float32)
    total = tl.full([BLOCK], 1.0, dtype=tl.float32)
    if not SUMMARY:
        if HAS_STATE:
            carried = tl.load(h0 + row_offset(n, D) + d, mask=inside, other=0.0)
        if PARTS > 1:
            for j in range(part):
                at = row_offset(n * PARTS + j, D) + d
                carried = tl.load(decays + at, mask=inside, other=0.0) * carried
                carried += tl.load(states + at, mask=inside, other=0.0)
    floor = tl.zeros([1, 1, BLOCK], dtype=tl.float32)
    if HAS_BOUND:
        floor = tl.load(bound + d, mask=inside, other=0.0).to(tl.float32)[None, None, :]
    whole = ((end - first) // CHUNK).to(tl.int32)
    for tile in tl.range(0, whole, num_stages=STAGES):
        carried, total = _forward_tile(
            x, g, o, floor, carried, total, first + tile * CHUNK, end, channel, step, row, D, X_TOKEN,
            G_TOKEN, SUMMARY, FUSED, WARPS, D % BLOCK == 0,
        )  # fmt: skip
    if first + whole * CHUNK < end:
        carried, total = _forward_tile(
            x, g, o, floor, carried, total, first + whole * CHUNK, end, channel, step, row, D, X_TOKEN,
            G_TOKEN, SUMMARY, FUSED, WARPS, False,
        )  # fmt: skip
    if SUMMARY:
        at = row_offset(n * PARTS + part, D) + d
        tl.store(decays + at, total, mask=inside)
        tl.store(states + at, carried, mask=inside)
    elif part == PARTS - 1:
        tl.store(final + row_offset(n, D) + d, carried, mask=inside)


@triton.jit
def _backward_tile(
    x, g, o, before, dh, dx, dg, floor, carried, total, d_floor, t, start, end, d, row,
    D: tl.constexpr, X_TOKEN: tl.constexpr, G_TOKEN: tl.constexpr, DH_TOKEN: tl.constexpr,
    SUMMARY: tl.constexpr, FUSED: tl.constexpr, HAS_STATE: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Tokens t - row: the first row is the latest token. ``before`` is the state ahead of token ``start``."""
    back = -row[:, None]
    channel = d[None, :]
    mask = ((t + back) < end) & (channel < D)
    dh_tile = _fetch(dh, t, channel, back, mask, 0.0, DH_TOKEN, WHOLE)
    if FUSED:
        f, nothing = sigmoids(_fetch(g, t, channel, back, mask, float("inf"), G_TOKEN, WHOLE))
        a = floor + (1.0 - floor) * f
    else:
        a = decay_of(_fetch(g, t, channel, back, mask, 0.0, G_TOKEN, WHOLE))
    dh_tile += tl.where((row == 0)[:, None], carried[None, :], 0.0)
    _, _, delta = tl.associative_scan((a, tl.full(a.shape, 1.0, tl.float32), dh_tile), 0, _two_steps_back)
    c = a * delta
    carried = tl.sum(tl.where((row == row.shape[0] - 1)[:, None], c, 0.0), 0)
    if SUMMARY:
        total *= tl.reduce(a, 0, _product)
    else:
        # WHOLE tiles begin behind the first token, so that what stood before each of their tokens is in o
        earlier = mask & ((t + back) > start)
        previous = _fetch(o, t - 1, channel, back, earlier, 0.0, D, WHOLE)
        if HAS_STATE and not WHOLE:
            previous = tl.where((t + back) == start, before[None, :], previous)
        if FUSED:
            i = _fetch(x, t, channel, back, mask, 0.0, X_TOKEN, WHOLE)
            on, off = sigmoids(i)
            opening = (1.0 - floor) * nothing
            d_alpha = delta * (previous - i * on)  # alpha scales what was there and, as 1 - alpha, what comes in
            d_floor += tl.sum(d_alpha * nothing, 0)
            _keep(dg, t, channel, back, mask, d_alpha * opening * f, D, WHOLE)
            _keep(dx, t, channel, back, mask, delta * opening * on * (1.0 + i * off), D, WHOLE)
        else:
            _keep(dg, t, channel, back, mask, c * previous, D, WHOLE)
            _keep(dx, t, channel, back, mask, delta, D, WHOLE)
    return carried, total, d_floor


@triton.jit
def _backward_kernel(
    x, g, bound, o, h0, dh, dfinal, dx, dg, dh0, dbound, decays, states, offsets,
    D: tl.constexpr, X_TOKEN: tl.constexpr, G_TOKEN: tl.constexpr, DH_TOKEN: tl.constexpr,
    SUMMARY: tl.constexpr, FUSED: tl.constexpr, HAS_BOUND: tl.constexpr, HAS_STATE: tl.constexpr,
    PARTS: tl.constexpr, SHARES: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK: tl.constexpr, VECTOR: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    n, part, block, start, first, end = _place(offsets, D, PARTS - SHARES, PARTS, SHARES, CHUNK, BLOCK)
    d = block * BLOCK + tl.max_contiguous(tl.arange(0, BLOCK), VECTOR)
    inside = d < D
    row = tl.arange(0, CHUNK)
    carried = tl.zeros([BLOCK], dtype=tl.float32)
    total = tl.full([BLOCK], 1.0, dtype=tl.float32)
    d_floor = tl.zeros([BLOCK], dtype=tl.float32)
    before = tl.zeros([BLOCK], dtype=tl.float32)
    if not SUMMARY:
        if HAS_STATE:
            before = tl.load(h0 + row_offset(n, D) + d, mask=inside, other=0.0)
        carried = tl.load(dfinal + row_offset(n, D) + d, mask=inside, other=0.0)  # at the end: the state's gradient
        if PARTS > 1:
            for j in range(PARTS - 1 - part):
                at = row_offset(n * PARTS + (PARTS - 1 - j), D) + d
                carried = tl.load(decays + at, mask=inside, other=0.0) * carried
                carried += tl.load(states + at, mask=inside, other=0.0)
    floor = tl.zeros([1, BLOCK], dtype=tl.float32)
    if HAS_BOUND:
        floor = tl.load(bound + d, mask=inside, other=0.0).to(tl.float32)[None, :]
    # tiles are aligned with the beginning of the part; its last and its first tile may need masks
    tiles = tl.cdiv(end - first, CHUNK).to(tl.int32)
    whole = ((end - first) // CHUNK).to(tl.int32)
    if whole < tiles:
        carried, total, d_floor = _backward_tile(
            x, g, o, before, dh, dx, dg, floor, carried, total, d_floor, first + tiles * CHUNK - 1, start, end, d, row,
            D, X_TOKEN, G_TOKEN, DH_TOKEN, SUMMARY, FUSED, HAS_STATE, False,
        )  # fmt: skip
    for step in tl.range(0, whole - 1, num_stages=STAGES):
        carried, total, d_floor = _backward_tile(
            x, g, o, before, dh, dx, dg, floor, carried, total, d_floor, first + (whole - step) * CHUNK - 1, start, end,
            d, row, D, X_TOKEN, G_TOKEN, DH_TOKEN, SUMMARY, FUSED, HAS_STATE, D % BLOCK == 0,
        )  # fmt: skip
    if whole > 0:
        carried, total, d_floor = _backward_tile(
            x, g, o, before, dh, dx, dg, floor, carried, total, d_floor, first + CHUNK - 1, start, end, d, row,
            D, X_TOKEN, G_TOKEN, DH_TOKEN, SUMMARY, FUSED, HAS_STATE, False,
        )  # fmt: skip
    if SUMMARY:
        at = row_offset(n * PARTS + part, D) + d
        tl.store(decays + at, total, mask=inside)
        tl.store(states + at, carried, mask=inside)
    else:
        if part == 0:
            tl.store(dh0 + row_offset(n, D) + d, carried, mask=inside)
        if FUSED:
            tl.store(dbound + row_offset(n * PARTS + part, D) + d, d_floor, mask=inside)


def config(kernel: str, T: int, N: int, D: int, dtype: torch.dtype, device: torch.device) -> tuple[Launch, int]:
    """The launch shape of ``"gated_scan_forward"`` or ``"gated_scan_backward"``, and the parts that time is cut into."""
    forward = kernel.endswith("forward")
    shape = launch_shape(kernel, D, 1, dtype, device, FORWARD if forward else BACKWARD)
    if forward and (shape.warps not in (1, 2, 4) or shape.chunk % shape.warps):
        raise ValueError(f"{kernel}: launch shape {shape}, expected 1, 2 or 4 warps, a divisor of the chunk")
    programs = N * triton.cdiv(D, shape.block)
    if programs >= ENOUGH_PROGRAMS:
        return shape, 1
    tiles = triton.cdiv(triton.cdiv(T, max(N, 1)), shape.chunk)  # of an average sequence
    return shape, max(1, min(triton.cdiv(WANTED_PROGRAMS, max(programs, 1)), tiles // 4))


def _constants(shape: Launch, parts: int, across: int, **others: int) -> dict[str, Any]:
    """What a kernel is compiled for; ``across`` warps lie side by side along the channels."""
    return {
        "PARTS": parts, "CHUNK": shape.chunk, "BLOCK": shape.block, "VECTOR": max(1, shape.block // (32 * across)),
        "STAGES": shape.stages, "num_warps": shape.warps, **others,
    }  # fmt: skip


def forward(
    x: Tensor, gate: Tensor, bound: Tensor | None, initial_state: Tensor | None, offsets: Tensor, *, fused: bool
) -> tuple[Tensor, Tensor]:
    """(h ``[B,S,D]`` in the dtype of x, last state ``[N,D]`` float32).

    ``gate`` is the log-decay, or HGRN's f when ``fused`` (x is then its i and ``bound`` its lower bound ``[D]``);
    ``initial_state`` is float32, ``offsets [N+1]`` int64 on the device of x.
    """
    B, S, D = x.shape
    N = offsets.numel() - 1
    x, gate = flat(x), flat(gate)
    o = torch.empty(B, S, D, dtype=x.dtype, device=x.device)
    final = torch.empty(N, D, dtype=torch.float32, device=x.device)
    h0 = None if initial_state is None else initial_state.contiguous()
    shape, parts = config("gated_scan_forward", B * S, N, D, x.dtype, x.device)
    decays = states = None
    if parts > 1:
        decays, states = (torch.empty(N, parts, D, dtype=torch.float32, device=x.device) for _ in range(2))
    for summary in (True, False) if parts > 1 else (False,):
        shares = parts - 1 if summary else parts  # nothing follows the last part: it needs no summary
        constants = _constants(
            shape, parts, 1, D=D, X_TOKEN=x.stride(1), G_TOKEN=gate.stride(1), SUMMARY=summary, FUSED=fused,
            HAS_BOUND=bound is not None, HAS_STATE=h0 is not None, SHARES=shares, WARPS=shape.warps,
        )  # fmt: skip
        grid = (N * shares * triton.cdiv(D, shape.block),)
        _forward_kernel[grid](x, gate, bound, o, h0, final, decays, states, offsets, **constants)
    return o, final


def backward(
    x: Tensor | None, gate: Tensor, bound: Tensor | None, o: Tensor, initial_state: Tensor | None,
    dh: Tensor, dfinal: Tensor, offsets: Tensor, *, fused: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(dx, d gate, d initial state ``[N,D]``, d bound ``[D]``); ``x`` is read only when ``fused``, else None.

    ``o`` is what :func:`forward` returned, ``dh`` and ``dfinal`` the gradients of its two results. The last two results
    are float32 and have no meaning where there was no state or no bound.
    """
    B, S, D = o.shape
    N = offsets.numel() - 1
    x, gate, dh = None if x is None else flat(x), flat(gate), flat(dh)
    dx = torch.empty(B, S, D, dtype=o.dtype, device=o.device)
    dg = torch.empty(B, S, D, dtype=gate.dtype, device=o.device)
    dh0 = torch.empty(N, D, dtype=torch.float32, device=o.device)
    h0 = None if initial_state is None else initial_state.contiguous()
    dfinal = dfinal.contiguous()
    shape, parts = config("gated_scan_backward", B * S, N, D, o.dtype, o.device)
    decays = states = dbound = None
    if parts > 1:
        decays, states = (torch.empty(N, parts, D, dtype=torch.float32, device=o.device) for _ in range(2))
    if fused:
        dbound = torch.empty(N * parts, D, dtype=torch.float32, device=o.device)
    for summary in (True, False) if parts > 1 else (False,):
        shares = parts - 1 if summary else parts
        constants = _constants(
            shape, parts, shape.warps, D=D, X_TOKEN=0 if x is None else x.stride(1), G_TOKEN=gate.stride(1), DH_TOKEN=dh.stride(1),
            SUMMARY=summary, FUSED=fused, HAS_BOUND=bound is not None, HAS_STATE=h0 is not None, SHARES=shares,
        )  # fmt: skip
        grid = (N * shares * triton.cdiv(D, shape.block),)
        _backward_kernel[grid](
            x, gate, bound, o, h0, dh, dfinal, dx, dg, dh0, dbound, decays, states, offsets, **constants
        )
    return dx, dg, dh0, dh0.new_empty(0) if dbound is None else dbound.sum(0)
