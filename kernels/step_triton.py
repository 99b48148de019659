r"""One token of the three operators in Triton: the state is read once and written once, in one launch.

A program holds a tile ``[K, BLOCK]`` of one state in registers. Of the decayed state :math:`\bar S` it forms both
:math:`k \bar S` and :math:`q \bar S` before it writes, because
:math:`q S = q \bar S + (q \cdot k)\,u` spares a second pass. At 16 bits in and 32 in the state, a step is all state
traffic: 2·4·K·V bytes a head. Small batches are cut into narrow tiles so that they reach many processors.

Nothing is read back to the host and shapes alone decide what is launched, so a step can be captured in a CUDA graph.
No derivatives: the callers take these kernels when gradients are off.
"""

# Inside a kernel any number may stand for a constexpr, which a type checker cannot know.
# pyright: reportArgumentType=false, reportGeneralTypeIssues=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from latentcot.kernels.gated_scan.triton import decay_of
from latentcot.kernels.launch import power_of_two

NARROW, WIDE = 8, 32  # value columns a program: 32 bytes, the least that memory moves, or a full line of 128
MANY_STATES = 256  # (sequence, head) pairs from which wide tiles keep every processor busy
SCAN_BLOCK = 512


@triton.jit
def _step_kernel(
    q, k, v, beta, g, old, new, o,
    scale, H, GROUP, K, V,
    q_batch, q_head, k_batch, k_reflection, k_head, v_batch, v_reflection, v_head,
    beta_batch, beta_reflection, beta_head, g_batch, g_head,
    HAS_STATE: tl.constexpr, ERASE: tl.constexpr, GATE: tl.constexpr, R: tl.constexpr,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """GATE: 0 none, 1 a number per head, 2 one per key channel. Heads are value heads, GROUP of them to a key head."""
    blocks = tl.cdiv(V, BLOCK)
    column = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    pair = tl.program_id(0) // blocks
    b, h = (pair // H).to(tl.int64), (pair % H).to(tl.int64)
    key_head = h // GROUP
    row = tl.arange(0, WIDTH)
    in_row, in_column = row < K, column < V
    at = pair.to(tl.int64) * K * V + row[:, None] * V + column[None, :]
    inside = in_row[:, None] & in_column[None, :]
    if HAS_STATE:
        state = tl.load(old + at, mask=inside, other=0.0)
        if GATE == 1:
            state *= decay_of(tl.load(g + b * g_batch + h * g_head).to(tl.float32))
        if GATE == 2:
            gate = tl.load(g + b * g_batch + h * g_head + row, mask=in_row, other=0.0).to(tl.float32)
            state *= decay_of(gate)[:, None]
    else:
        state = tl.zeros([WIDTH, BLOCK], dtype=tl.float32)
    query = tl.load(q + b * q_batch + key_head * q_head + row, mask=in_row, other=0.0).to(tl.float32)
    for r in tl.static_range(R):
        key = tl.load(k + b * k_batch + r * k_reflection + key_head * k_head + row, mask=in_row, other=0.0)
        key = key.to(tl.float32)
        u = tl.load(v + b * v_batch + r * v_reflection + h * v_head + column, mask=in_column, other=0.0).to(tl.float32)
        if ERASE:
            u -= tl.sum(key[:, None] * state, 0)
            u *= tl.load(beta + b * beta_batch + r * beta_reflection + h * beta_head).to(tl.float32)
        if r == R - 1:
            read = tl.sum(query[:, None] * state, 0) + tl.sum(query * key, 0) * u
            tl.store(o + pair.to(tl.int64) * V + column, (scale * read).to(o.dtype.element_ty), mask=in_column)
        state += key[:, None] * u[None, :]
    tl.store(new + at, state, mask=inside)


@triton.jit
def _scan_kernel(x, g, old, new, o, D, x_batch, g_batch, HAS_STATE: tl.constexpr, BLOCK: tl.constexpr):
    blocks = tl.cdiv(D, BLOCK)
    d = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    b = (tl.program_id(0) // blocks).to(tl.int64)
    inside = d < D
    h = tl.load(x + b * x_batch + d, mask=inside, other=0.0).to(tl.float32)
    if HAS_STATE:
        decay = decay_of(tl.load(g + b * g_batch + d, mask=inside, other=0.0).to(tl.float32))
        h += decay * tl.load(old + b * D + d, mask=inside, other=0.0)
    tl.store(o + b * D + d, h.to(o.dtype.element_ty), mask=inside)
    tl.store(new + b * D + d, h, mask=inside)


def config(states: int, K: int, V: int) -> tuple[int, int]:
    """(columns a program, warps a program) for so many states ``[K,V]``: 32 numbers of the state a thread."""
    block = min(WIDE if states >= MANY_STATES else NARROW, power_of_two(V, 1))
    return block, max(1, min(8, power_of_two(K, 1) * block // 1024))


def _dense(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _step(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor | None, log_decay: Tensor | None, scale: float,
    state: Tensor | None, new: Tensor,
) -> Tensor:  # fmt: skip
    """k ``[B,R,H,K]``, v ``[B,R,H_v,V]``, beta ``[B,R,H_v]`` or None (nothing is erased); writes ``new``, returns o."""
    B, R, H, V = v.shape
    K = q.shape[-1]
    o = torch.empty(B, H, V, dtype=v.dtype, device=v.device)
    if o.numel() == 0:
        return o
    q, k, v = _dense(q), _dense(k), _dense(v)
    gate, g_strides = 0, (0, 0)
    if log_decay is not None:
        if log_decay.dim() == 1:
            log_decay = log_decay.expand(B, H)
        elif log_decay.dim() == 3:
            log_decay = _dense(log_decay)
        gate, g_strides = log_decay.dim() - 1, log_decay.stride()[:2]
    block, warps = config(B * H, K, V)
    _step_kernel[(B * H * triton.cdiv(V, block),)](
        q, k, v, beta, log_decay, state, new, o, scale, H, H // q.shape[1], K, V,
        *q.stride()[:2], *k.stride()[:3], *v.stride()[:3], *((0, 0, 0) if beta is None else beta.stride()), *g_strides,
        HAS_STATE=state is not None, ERASE=beta is not None, GATE=gate, R=R, WIDTH=power_of_two(K, 1), BLOCK=block,
        num_warps=warps,  # pyright: ignore[reportCallIssue]
    )  # fmt: skip
    return o


def _new_state(q: Tensor, v: Tensor) -> Tensor:
    return torch.empty(v.shape[0], v.shape[-2], q.shape[-1], v.shape[-1], dtype=torch.float32, device=v.device)


@torch.library.custom_op("latentcot::decay_attention_step", mutates_args=())
def _decay_step(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, scale: float, state: Tensor | None
) -> tuple[Tensor, Tensor]:
    new, old = _new_state(q, v), None if state is None else state.contiguous()
    return _step(q, k.unsqueeze(1), v.unsqueeze(1), None, log_decay, scale, old, new), new


@_decay_step.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, scale: float, state: Tensor | None
) -> tuple[Tensor, Tensor]:
    return v.new_empty(v.shape), _new_state(q, v)


@torch.library.custom_op("latentcot::decay_attention_step_in_place", mutates_args={"state"})
def _decay_step_in_place(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, scale: float, state: Tensor
) -> Tensor:
    return _step(q, k.unsqueeze(1), v.unsqueeze(1), None, log_decay, scale, state, state)


@_decay_step_in_place.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, scale: float, state: Tensor) -> Tensor:
    return v.new_empty(v.shape)


@torch.library.custom_op("latentcot::delta_rule_step", mutates_args=())
def _delta_step(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_decay: Tensor | None, scale: float, state: Tensor | None
) -> tuple[Tensor, Tensor]:
    new, old = _new_state(q, v), None if state is None else state.contiguous()
    return _step(q, k, v, beta, log_decay, scale, old, new), new


@_delta_step.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_decay: Tensor | None, scale: float, state: Tensor | None
) -> tuple[Tensor, Tensor]:
    return v.new_empty(v.shape[0], *v.shape[2:]), _new_state(q, v)


@torch.library.custom_op("latentcot::delta_rule_step_in_place", mutates_args={"state"})
def _delta_step_in_place(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_decay: Tensor | None, scale: float, state: Tensor
) -> Tensor:
    return _step(q, k, v, beta, log_decay, scale, state, state)


@_delta_step_in_place.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_decay: Tensor | None, scale: float, state: Tensor) -> Tensor:
    return v.new_empty(v.shape[0], *v.shape[2:])


def _scan(x: Tensor, log_decay: Tensor, state: Tensor | None, new: Tensor) -> Tensor:
    B, D = x.shape
    o = torch.empty(B, D, dtype=x.dtype, device=x.device)
    if o.numel() > 0:
        x, log_decay = _dense(x), _dense(log_decay)
        _scan_kernel[(B * triton.cdiv(D, SCAN_BLOCK),)](
            x, log_decay, state, new, o, D, x.stride(0), log_decay.stride(0), HAS_STATE=state is not None,
            BLOCK=SCAN_BLOCK, num_warps=4,  # pyright: ignore[reportCallIssue]
        )  # fmt: skip
    return o


@torch.library.custom_op("latentcot::gated_scan_step", mutates_args=())
def _scan_step(x: Tensor, log_decay: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
    new = torch.empty(x.shape, dtype=torch.float32, device=x.device)
    return _scan(x, log_decay, None if state is None else state.contiguous(), new), new


@_scan_step.register_fake
def _(x: Tensor, log_decay: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape, dtype=torch.float32)


@torch.library.custom_op("latentcot::gated_scan_step_in_place", mutates_args={"state"})
def _scan_step_in_place(x: Tensor, log_decay: Tensor, state: Tensor) -> Tensor:
    return _scan(x, log_decay, state, state)


@_scan_step_in_place.register_fake
def _(x: Tensor, log_decay: Tensor, state: Tensor) -> Tensor:
    return x.new_empty(x.shape)


def _writable(name: str, state: Tensor | None) -> Tensor:
    """The state that a step may overwrite; raises when there is none or when it is not a dense float32 tensor."""
    if state is None:
        raise ValueError(f"{name}: in_place=True needs a state to write into; state is None")
    if state.dtype != torch.float32 or not state.is_contiguous():
        raise ValueError(
            f"{name}: in_place=True needs a contiguous float32 state, given {state.dtype} with strides {state.stride()}"
        )
    return state


def decay_attention_step(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, scale: float, state: Tensor | None = None,
    *, in_place: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Same as :func:`latentcot.kernels.decay_attention.step.decay_attention_step`; o has the dtype of v."""
    if in_place:
        state = _writable("decay_attention_step", state)
        return _decay_step_in_place(q, k, v, log_decay, scale, state), state
    return _decay_step(q, k, v, log_decay, scale, state)


def delta_rule_step(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_decay: Tensor | None, scale: float,
    state: Tensor | None = None, *, in_place: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Same as :func:`latentcot.kernels.delta_rule.step.delta_rule_step`; o has the dtype of v."""
    if in_place:
        state = _writable("delta_rule_step", state)
        return _delta_step_in_place(q, k, v, beta, log_decay, scale, state), state
    return _delta_step(q, k, v, beta, log_decay, scale, state)


def gated_scan_step(
    x: Tensor, log_decay: Tensor, state: Tensor | None = None, *, in_place: bool = False
) -> tuple[Tensor, Tensor]:
    """Same as :func:`latentcot.kernels.gated_scan.step.gated_scan_step`; o has the dtype of x."""
    if in_place:
        state = _writable("gated_scan_step", state)
        return _scan_step_in_place(x, log_decay, state), state
    return _scan_step(x, log_decay, state)
