r"""The blocks of a :class:`~latentcot.backbone.engine.DecodeEngine`: one token ``[B, D]`` through a block, state overwritten in place.

Everything that does not depend on the token is done once, when a step is built: projections that read the same input become one
matrix, gates' constants become fp32, states become buffers whose addresses never change. Positions live on the device, so no step
waits for it and the whole model can be captured in a CUDA graph.

Launches a token on a GPU, of a block with norms in front (``pre``), counted from the code; what stands in brackets shares a launch
when there are at most four rows (:mod:`latentcot.kernels.delta_rule.triton_matvec`):

========================= ================================================================================ ========= ========
block                     launches                                                                         many rows few rows
========================= ================================================================================ ========= ========
Gated DeltaNet            [norm, projection], token (convolution to read), [gated norm, output + residual] 5         3
attention                 [norm, projection], rotation and store, softmax attention, output + residual     5         4
any other mixer           norm, what the mixer's own ``forward`` takes, a copy a state tensor              -         -
MLP                       [norm, gate and up], [SwiGLU, down + residual]                                   4         2
========================= ================================================================================ ========= ========
"""

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from latentcot.backbone.block import Block, SwiGLU
from latentcot.backbone.context import SequenceContext
from latentcot.backbone.mixers import GatedDeltaNet, Mixer, SoftmaxAttention
from latentcot.backbone.norms import RMSNorm
from latentcot.backbone.rotary import apply_rotary, rotary_table
from latentcot.backbone.state import LayerState
from latentcot.kernels import l2_norm
from latentcot.kernels.delta_rule.step import delta_rule_step
from latentcot.kernels.dispatch import missing_for_triton

ALIGNED = 8  # rows of a joined projection, so that 16-bit products take the fast path


class Clock:
    """What all blocks share of one token: its position in each row, and tables found from it once a token.

    Args:
        batch, max_length: rows B, and positions T that attention's buffers hold.
        width: D of the model.
        dtype, device: of the model.
        tables: what the model lays into every context (the lower bounds of forget gates).
    """

    def __init__(
        self,
        batch: int,
        max_length: int,
        width: int,
        dtype: torch.dtype,
        device: torch.device,
        tables: dict[Any, Any] | None = None,
    ):
        self.batch, self.max_length, self.width, self.dtype, self.device = batch, max_length, width, dtype, device
        self.position = torch.zeros(batch, dtype=torch.long, device=device)  # tokens before this one
        self.rows = torch.arange(batch, device=device)
        self.columns = torch.arange(max_length, device=device)
        self.in_triton = serves_triton(device, dtype)
        self.window = max_length  # columns of the buffers that are looked at: all tokens lie within
        self._lasting: dict[Any, tuple[Tensor, Tensor]] = {}
        self._token: dict[Any, Any] = {}
        self._tables = dict(tables or {})

    def begin(self, window: int) -> None:
        """A new token; none of the rows is at ``window`` or beyond."""
        self.window = window
        self._token = {}

    def context(self) -> SequenceContext:
        """For mixers that run by their own ``forward``."""
        if "context" not in self._token:
            self._token["context"] = SequenceContext(self.position[:, None], keep_state=True, tables=dict(self._tables))
        return self._token["context"]

    def angles(self, width: int, base: float) -> tuple[Tensor, Tensor]:
        """Cosine and sine ``[B, 1, 1, width/2]`` of every row's position, at least fp32."""
        key = (width, base)
        if key not in self._token:
            self._token[key] = tuple(table[self.position] for table in self.all_angles(width, base))
        return self._token[key]

    def all_angles(self, width: int, base: float) -> tuple[Tensor, Tensor]:
        """The same of all positions, ``[T, 1, 1, width/2]``; found once."""
        key = (width, base)
        if key not in self._lasting:
            self._lasting[key] = rotary_table(self.columns[:, None], width, base, self.dtype)
        return self._lasting[key]

    def seen(self, reach: int | None) -> Tensor:
        """What softmax attention adds to its scores, ``[B, 1, 1, window]``: minus infinity outside the last ``reach`` tokens."""
        key = ("seen", reach)
        if key not in self._token:
            columns, now = self.columns[: self.window], self.position[:, None]
            hidden = columns > now
            if reach is not None:
                hidden = hidden | (columns <= now - reach)
            mask = torch.zeros(self.batch, self.window, dtype=self.dtype, device=self.device)
            self._token[key] = mask.masked_fill_(hidden, float("-inf"))[:, None, None]
        return self._token[key]


def joined(*layers: nn.Linear) -> tuple[Tensor, Tensor | None]:
    """Weights of layers that read the same input as one matrix ``[N, D]``, N rounded up to :data:`ALIGNED`, and their biases."""
    weights = [layer.weight.detach() for layer in layers]
    missing = -sum(w.shape[0] for w in weights) % ALIGNED
    bias = None
    if any(layer.bias is not None for layer in layers):
        given = [
            w.new_zeros(w.shape[0]) if l.bias is None else l.bias.detach() for w, l in zip(weights, layers, strict=True)
        ]
        bias = F.pad(torch.cat(given), (0, missing))
    return F.pad(torch.cat(weights), (0, 0, 0, missing)), bias


def serves_triton(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the kernels of decoding run: a CUDA device with Triton, and no fp64."""
    return device.type == "cuda" and missing_for_triton("delta_rule", device, dtype) is None


def project_in(x: Tensor, weight: Tensor, bias: Tensor | None, norm: RMSNorm | None, clock: Clock) -> Tensor:
    """``norm(x) W^T + bias``: one launch for a few rows."""
    if clock.in_triton and bias is None:
        from latentcot.kernels.delta_rule.triton_matvec import matvec, serves

        if serves(x.shape[0], weight.shape[1]):
            if norm is None:
                return matvec(x, weight)
            return matvec(x, weight, before="rms", norm=norm.weight, eps=norm.eps)
    return F.linear(x if norm is None else norm(x), weight, bias)


def project_out(
    x: Tensor, layer: nn.Linear, residual: Tensor | None, clock: Clock, before: Literal["none", "swiglu"] = "none"
) -> Tensor:
    """``residual + f(x) W^T``, f the identity or SwiGLU of gate and up side by side."""
    weight = layer.weight
    if clock.in_triton:
        from latentcot.kernels.delta_rule.triton_decode import swiglu
        from latentcot.kernels.delta_rule.triton_matvec import matvec, serves

        if serves(x.shape[0], weight.shape[1]) and layer.bias is None:
            return matvec(x, weight, before=before, residual=residual)
        if before == "swiglu":
            x = swiglu(x)
    elif before == "swiglu":
        gate, up = x.chunk(2, 1)
        x = F.silu(gate) * up
    if residual is None or layer.bias is not None:
        y = F.linear(x, weight, layer.bias)
        return y if residual is None else residual + y
    return torch.addmm(residual, x, weight.t())


class MixerStep:
    """One mixer's token. ``buffers`` hold its state, batch first; ``how`` says which path it takes."""

    how = ""

    def __init__(self, mixer: Mixer, clock: Clock):
        self.mixer, self.clock = mixer, clock
        self.buffers: dict[str, Tensor] = {}

    def __call__(self, x: Tensor, residual: Tensor | None, norm: RMSNorm | None = None) -> Tensor:
        """``x [B, D]``, in front of ``norm`` if there is one, to ``residual`` plus the mixer's output."""
        raise NotImplementedError(f"{type(self).__name__} takes no step")

    def write(self, rows: Tensor, entry: LayerState, lengths: Tensor, order: Tensor) -> None:
        """Overwrite ``rows [b]`` with a state after ``lengths [b]`` tokens; ``order [b, n]`` are the columns of real tokens."""
        raise NotImplementedError(f"{type(self).__name__} takes no state")

    def read(self, lengths: Tensor, longest: int) -> LayerState:
        """The state of all rows as the mixer's ``forward`` takes it; ``longest`` is the greatest of ``lengths [B]``."""
        raise NotImplementedError(f"{type(self).__name__} gives no state")

    def reset(self) -> None:
        for buffer in self.buffers.values():
            buffer.zero_()


class PlainStep(MixerStep):
    """Any mixer with a state of fixed size, by its own ``forward``; what it returns is copied into the buffers."""

    how = "the mixer's forward"

    def __init__(self, mixer: Mixer, clock: Clock):
        super().__init__(mixer, clock)
        probe = torch.zeros(clock.batch, 1, clock.width, dtype=clock.dtype, device=clock.device)
        _, state = mixer(probe, clock.context(), None)
        assert state is not None
        self.buffers = {
            name: torch.zeros_like(t, memory_format=torch.contiguous_format) for name, t in state.tensors.items()
        }

    def __call__(self, x: Tensor, residual: Tensor | None, norm: RMSNorm | None = None) -> Tensor:
        x = x if norm is None else norm(x)
        y, state = self.mixer(x[:, None], self.clock.context(), LayerState(self.mixer.name, self.buffers))
        for name, buffer in self.buffers.items():
            buffer.copy_(state[name])
        return y[:, 0] if residual is None else residual + y[:, 0]

    def write(self, rows: Tensor, entry: LayerState, lengths: Tensor, order: Tensor) -> None:
        for name, buffer in self.buffers.items():
            buffer[rows] = entry[name].to(buffer.dtype)

    def read(self, lengths: Tensor, longest: int) -> LayerState:
        return LayerState(self.mixer.name, {name: buffer.clone() for name, buffer in self.buffers.items()})


class GatedDeltaNetStep(MixerStep):
    """Gated DeltaNet with its short convolution: see :mod:`latentcot.kernels.delta_rule.triton_decode`."""

    mixer: GatedDeltaNet

    def __init__(self, mixer: GatedDeltaNet, clock: Clock):
        super().__init__(mixer, clock)
        m, precise = mixer, torch.promote_types(clock.dtype, torch.float32)
        gate = [m.g_proj] if m.options.use_gate else []
        self.weight, _ = joined(m.q_proj, m.k_proj, m.v_proj, *gate, m.a_proj, m.b_proj)
        self.keys, self.values = m.heads * m.K, m.v_heads * m.V
        self.convolved = 2 * self.keys + self.values
        self.at_a = self.convolved + len(gate) * self.values
        taps = torch.cat([each.weight.detach() for each in m.taps])[:, 0]  # [D, W], oldest first
        self.taps = taps.flip(1).t().contiguous()  # [W, D], newest first: a load runs along the channels
        self.A_log, self.dt_bias = m.A_log.detach().to(precise), m.dt_bias.detach().to(precise)
        self.largest, self.scale = 2.0 if m.options.allow_neg_eigval else 1.0, m.K**-0.5
        self.W = taps.shape[1]
        self.offsets = torch.arange(1, self.W + 1, device=clock.device)
        self.buffers = {
            "matrix": torch.zeros(clock.batch, m.v_heads, m.K, m.V, dtype=precise, device=clock.device),
            "ring": torch.zeros(clock.batch, self.W, self.convolved, dtype=clock.dtype, device=clock.device),
        }
        self.how = "one Triton launch between its projections" if clock.in_triton else "PyTorch in place"

    def __call__(self, x: Tensor, residual: Tensor | None, norm: RMSNorm | None = None) -> Tensor:
        m, B = self.mixer, x.shape[0]
        projected = project_in(x, self.weight, None, norm, self.clock)
        o = (self._triton if self.clock.in_triton else self._torch)(projected)
        gate = projected[:, self.convolved : self.convolved + self.values] if m.options.use_gate else None
        if self.clock.in_triton:
            from latentcot.kernels.delta_rule.triton_matvec import matvec, serves

            if serves(B, self.values, m.V):
                return matvec(
                    o.view(B, -1),
                    m.o_proj.weight,
                    before="heads",
                    norm=m.o_norm.weight,
                    eps=m.o_norm.eps,
                    gate=gate,
                    head=m.V,
                    residual=residual,
                )
        o = o[:, None]
        if gate is None:
            o = m.o_norm(o)
        else:  # strides written out: the gate is read where the projection left it
            step = projected.stride(0)
            o = m.o_norm(o, gate.as_strided(o.shape, (step, step, m.V, 1)))  # type: ignore[call-arg]
        return project_out(o.view(B, -1), m.o_proj, residual, self.clock)

    def _triton(self, projected: Tensor) -> Tensor:
        from latentcot.kernels.delta_rule.triton_decode import Columns, gated_delta_decode

        columns = Columns(0, self.keys, 2 * self.keys, self.at_a, self.at_a + self.mixer.v_heads)
        return gated_delta_decode(
            projected,
            columns,
            self.buffers["ring"],
            self.taps,
            self.A_log,
            self.dt_bias,
            self.buffers["matrix"],
            self.clock.position,
            heads=self.mixer.heads,
            scale=self.scale,
            largest=self.largest,
        )

    def _torch(self, projected: Tensor) -> Tensor:
        m, ring, state = self.mixer, self.buffers["ring"], self.buffers["matrix"]
        ring[self.clock.rows, self.clock.position % self.W] = projected[:, : self.convolved]
        y = F.silu((self._window() * self.taps.flip(0).to(state.dtype)).sum(1))
        q, k, v = y.split((self.keys, self.keys, self.values), 1)
        q, k = (l2_norm(z.unflatten(1, (m.heads, m.K))) for z in (q, k))
        a, b = (projected[:, at : at + m.v_heads].to(state.dtype) for at in (self.at_a, self.at_a + m.v_heads))
        log_decay = -self.A_log.exp() * F.softplus(a + self.dt_bias)
        beta = self.largest * b.sigmoid()
        v = v.unflatten(1, (m.v_heads, m.V))
        o, _ = delta_rule_step(q, k[:, None], v[:, None], beta[:, None], log_decay, self.scale, state, in_place=True)
        return o.to(projected.dtype)

    def _window(self) -> Tensor:
        """The last W inputs, oldest first, the current one included: ``[B, W, D]`` in the state's dtype."""
        slots = (self.clock.position[:, None] + self.offsets) % self.W
        return self.buffers["ring"][self.clock.rows[:, None], slots].to(self.buffers["matrix"].dtype)

    def write(self, rows: Tensor, entry: LayerState, lengths: Tensor, order: Tensor) -> None:
        self.buffers["matrix"][rows] = entry["matrix"].to(self.buffers["matrix"].dtype)
        past = entry["conv"].transpose(1, 2).to(self.buffers["ring"].dtype)  # [b, W-1, D], oldest first
        slots = (lengths[:, None] + self.offsets[:-1]) % self.W  # W - 1 tokens back is one ahead in the ring
        self.buffers["ring"][rows[:, None], slots] = past

    def read(self, lengths: Tensor, longest: int) -> LayerState:
        conv = self._window()[:, :-1].transpose(1, 2).contiguous()  # the slot of the token to come is left out
        return LayerState(self.mixer.name, {"matrix": self.buffers["matrix"].clone(), "conv": conv})


class AttentionStep(MixerStep):
    """Softmax attention over buffers ``[B, T, H_kv, K]``: row b's token at position p is written at column p."""

    mixer: SoftmaxAttention

    def __init__(self, mixer: SoftmaxAttention, clock: Clock):
        super().__init__(mixer, clock)
        m = mixer
        self.weight, self.bias = joined(m.q_proj, m.k_proj, m.v_proj)
        self.heads = m.heads + 2 * m.kv_heads
        shape = (clock.batch, clock.max_length, m.kv_heads, m.head_width)
        self.buffers = {name: torch.zeros(shape, dtype=clock.dtype, device=clock.device) for name in ("keys", "values")}
        self.how = "static keys and values"

    def __call__(self, x: Tensor, residual: Tensor | None, norm: RMSNorm | None = None) -> Tensor:
        m, clock = self.mixer, self.clock
        projected = project_in(x, self.weight, self.bias, norm, clock)
        keys, values = self.buffers["keys"], self.buffers["values"]
        q = (self._triton if clock.in_triton else self._torch)(projected, keys, values)
        # the query heads that share a key head stand where queries of several tokens would
        q = q.unflatten(1, (m.kv_heads, m.heads // m.kv_heads))
        keys, values = (buffer[:, : clock.window].transpose(1, 2) for buffer in (keys, values))
        mask = clock.seen(m.options.window_size).expand(-1, m.kv_heads, q.shape[2], -1)
        o = F.scaled_dot_product_attention(q, keys, values, attn_mask=mask)
        return project_out(o.reshape(x.shape[0], -1), m.o_proj, residual, clock)

    def _triton(self, projected: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        from latentcot.kernels.delta_rule.triton_store import rotate_and_store

        m, theta = self.mixer, self.mixer.options.rope_theta
        angles = None if theta is None else self.clock.all_angles(m.head_width, theta)
        interleaved = m.options.rotary_layout != "half"
        return rotate_and_store(
            projected, keys, values, self.clock.position, heads=m.heads, angles=angles, interleaved=interleaved
        )

    def _torch(self, projected: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        m, clock = self.mixer, self.clock
        qkv = projected[:, : self.heads * m.head_width].unflatten(1, (self.heads, m.head_width))
        qk, v = qkv.split((m.heads + m.kv_heads, m.kv_heads), 1)
        if m.options.rope_theta is not None:
            angles = clock.angles(m.head_width, m.options.rope_theta)
            qk = apply_rotary(qk[:, None], angles, m.options.rotary_layout)[:, 0]
        q, k = qk.split((m.heads, m.kv_heads), 1)
        keys[clock.rows, clock.position] = k
        values[clock.rows, clock.position] = v
        return q

    def write(self, rows: Tensor, entry: LayerState, lengths: Tensor, order: Tensor) -> None:
        for name, buffer in self.buffers.items():
            given = entry[name].transpose(1, 2)  # [b, columns, H, K]
            real = given.take_along_dim(order[:, :, None, None], 1)
            buffer[rows, : order.shape[1]] = real.to(buffer.dtype)

    def read(self, lengths: Tensor, longest: int) -> LayerState:
        return LayerState(
            self.mixer.name,
            {name: buffer[:, :longest].transpose(1, 2).clone() for name, buffer in self.buffers.items()},
        )


class BlockStep:
    """A block's token: norms, mixer and MLP in the block's own arrangement."""

    def __init__(self, block: Block, clock: Clock):
        self.block = block
        self.mixer = mixer_step(block.attn, clock)
        self.mlp = MLPStep(block.mlp, clock)

    def __call__(self, hidden: Tensor) -> Tensor:
        for part, branch in (("attn", self.mixer), ("mlp", self.mlp)):
            norm = getattr(self.block, f"{part}_norm")
            match self.block.norm_placement:
                case "pre":
                    hidden = branch(hidden, hidden, norm)
                case "sandwich_pre_residual":
                    hidden = hidden + getattr(self.block, f"{part}_norm_2")(branch(hidden, None, norm))
                case "sandwich_post_residual":
                    hidden = getattr(self.block, f"{part}_norm_2")(branch(hidden, hidden, norm))
                case _:
                    hidden = norm(branch(hidden, hidden))
        return hidden


class MLPStep:
    """SwiGLU with gate and up in one product; any other MLP by its own ``forward``."""

    def __init__(self, mlp: nn.Module, clock: Clock):
        self.mlp = mlp
        self.weight = joined(mlp.gate_proj, mlp.up_proj)[0] if isinstance(mlp, SwiGLU) else None
        self.clock = clock

    def __call__(self, x: Tensor, residual: Tensor | None, norm: RMSNorm | None = None) -> Tensor:
        if self.weight is None:
            y = self.mlp((x if norm is None else norm(x))[:, None])[:, 0]
            return y if residual is None else residual + y
        assert isinstance(self.mlp, SwiGLU)
        both = project_in(x, self.weight, None, norm, self.clock)[:, : 2 * self.mlp.gate_proj.out_features]
        return project_out(both, self.mlp.down_proj, residual, self.clock, before="swiglu")


def mixer_step(mixer: Mixer, clock: Clock) -> MixerStep:
    """The step of a mixer: fused where there is one, else :class:`PlainStep`."""
    if isinstance(mixer, SoftmaxAttention):
        return AttentionStep(mixer, clock)
    if isinstance(mixer, GatedDeltaNet) and mixer.options.use_short_conv:
        return GatedDeltaNetStep(mixer, clock)
    return PlainStep(mixer, clock)
