r"""A backbone as a block-diffusion model: two streams in training, a state carried from block to block in use.

.. math:: \log p(x) = \sum_c \log p(x^c \mid x^{<c}), \qquad \text{each factor a masked diffusion over } b \text{ tokens}

(arXiv:2503.09573). What the tokens of block c see of the past is the state S_c that the *clean* tokens before it have left: keys and
values in attention layers, a matrix (and the last W - 1 inputs of the convolution) in linear ones. So a linear layer denoises at the
same cost after any number of tokens. :meth:`BlockDiffusionModel.forward_two_stream` gives every noisy and every clean position of a
sequence what :meth:`~BlockDiffusionModel.denoise` and :meth:`~BlockDiffusionModel.commit` give it block by block.
"""

import json
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from latentcot.backbone import ForeignStateError, HybridForCausalLM, ModelState, SequenceContext
from latentcot.backbone.block import CONDITION
from latentcot.diffusion_reasoning.corruption import check_mask_id
from latentcot.files import write_text
from latentcot.kernels import BlockCausal
from latentcot.reasoner import SPECIAL

if TYPE_CHECKING:
    from latentcot.diffusion_reasoning.diffusion_lm import DiffusionLM

SETTINGS_FILE = "block_diffusion.json"
PREFILL_TOKENS = 2048  # of a long prompt read at a time: attention masks grow with its square

StateFrom = Literal["clean", "noisy_last"]


@dataclass(frozen=True)
class BlockState:
    """What a sequence has left when its last finished block was committed; a value: nothing changes it.

    Args:
        memory: states of every mixer, after clean tokens only.
        last: final hidden state of the last token, ``[B, D]``, where the head speaks about the next token (``shift``).
        rows: B.
        form: of the blocks that made it; another model's or another form's state is refused.
        dtype: of that model.
    """

    memory: ModelState
    last: Tensor | None
    rows: int
    form: str
    dtype: torch.dtype

    @property
    def lengths(self) -> Tensor | None:
        """Tokens committed in each row ``[B]``; ``None`` before the first."""
        return self.memory.lengths

    @property
    def nbytes(self) -> int:
        return self.memory.nbytes + (0 if self.last is None else self.last.numel() * self.last.element_size())

    def select(self, rows: Tensor) -> "BlockState":
        """The state of the chosen rows (indices or a bool mask), in that order."""
        count = int(rows.sum()) if rows.dtype == torch.bool else len(rows)
        return replace(
            self,
            memory=self.memory.select(rows),
            last=None if self.last is None else self.last[rows],
            rows=count,
        )

    def detach(self) -> "BlockState":
        return replace(self, memory=self.memory.detach(), last=None if self.last is None else self.last.detach())


class BlockDiffusionModel(nn.Module):
    """
    Args:
        backbone: any stack; its linear layers take the block form, its attention layers the mask of blocks.
        block_length: b. The last block of a sequence may be shorter. May be changed at any time.
        mask_id: the mask token.
        inside: what the tokens of a block give each other in linear layers, see :class:`latentcot.kernels.BlockCausal`; HGRN knows
            ``"decayed"`` alone.
        write: how a finished block enters the state of linear layers, see there.
        shift: the head at position i speaks about token i + 1, as an autoregressive one does; logits are moved to the position they
            are about, the first of a block from the last clean token before it.
        rho: share of the backward direction that the delta rule takes in with ``"bilinear"`` and ``"decayed"``: at 0, with
            ``inside="decayed"`` and blocks of one token, the model is the causal backbone. May be changed at any time.
        state_from: ``"clean"``, or ``"noisy_last"``: the sampler keeps the state of a block's last denoising pass instead of
            committing the finished block, one pass a block less and not exact.
        embed_time: ``sigma [B] -> [B, W]`` of a backbone with modulation, which is fed sigma = 0.

    Raises:
        ValueError: a mask token outside the vocabulary or equal to another special token, a form that a mixer does not define.
    """

    def __init__(
        self,
        backbone: HybridForCausalLM,
        block_length: int,
        mask_id: int = SPECIAL.mask,
        *,
        inside: Literal["softmax", "bilinear", "decayed", "additive"] = "softmax",
        write: Literal["recurrent", "order_free"] = "recurrent",
        shift: bool = False,
        rho: float = 1.0,
        state_from: StateFrom = "clean",
        embed_time: nn.Module | None = None,
    ):
        super().__init__()
        config = backbone.config
        check_mask_id(
            mask_id,
            config.vocab_size,
            pad_token_id=config.pad_token_id,
            bos_token_id=config.bos_token_id,
            eos_token_id=config.eos_token_id,
        )
        form = BlockCausal(block_length, inside, write)
        if "hgrn" in config.mixers and (inside, write) != ("decayed", "recurrent"):
            raise ValueError(
                f"inside: {inside!r} with write = {write!r} given, but hgrn layers have no queries and keys; expected 'decayed' and "
                f"'recurrent'"
            )
        if state_from not in ("clean", "noisy_last"):
            raise ValueError(f"state_from: {state_from!r} given, expected 'clean' or 'noisy_last'")
        if not 0.0 <= rho <= 1.0:
            raise ValueError(f"rho: expected a share within 0..1, got {rho}")
        if (embed_time is None) != (config.modulation is None):
            raise ValueError(
                f"embed_time: {'none' if embed_time is None else 'one'} given, but the backbone has modulation = {config.modulation}"
            )
        self.backbone = backbone
        self.mask_id = mask_id
        self.form = form
        self.shift = shift
        self.rho = rho
        self.state_from: StateFrom = state_from
        self.embed_time = embed_time

    @classmethod
    def from_diffusion_lm(cls, lm: "DiffusionLM", block_length: int | None = None) -> "BlockDiffusionModel":
        """The network of a :class:`~latentcot.diffusion_reasoning.DiffusionLM` (a loaded BD3-LM, for one) in blocks; it shares the
        weights. ``block_length`` instead of the one in its configuration.

        Raises:
            ValueError: no block length anywhere; a network that is conditioned on time or carries something from pass to pass.
        """
        config = lm.config
        length = config.block_length if block_length is None else block_length
        if length is None:
            raise ValueError("block_length: the model's configuration has none; give one")
        if config.time_conditioning or config.carry != "none":
            raise ValueError(
                f"lm: time_conditioning = {config.time_conditioning} and carry = {config.carry!r}; blocks have neither"
            )
        return cls(
            lm.backbone,
            length,
            config.mask_token_id,
            inside=config.in_block,  # type: ignore[arg-type]
            shift=config.shift,
            embed_time=lm.embed_time,
        )

    @property
    def block_length(self) -> int:
        return self.form.length

    @block_length.setter
    def block_length(self, length: int) -> None:
        """Blocks may grow in training; a state made in blocks of another length is refused from then on."""
        self.form = replace(self.form, length=length)

    @property
    def exact(self) -> bool:
        """Whether inference computes what training did."""
        return self.state_from == "clean"

    # -- training ----------------------------------------------------------------------------------------------------

    def two_stream_hidden(
        self, z: Tensor, x: Tensor, block_length: int | None = None, attention_mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Final hidden states ``[B, L, D]`` of the noisy and of the clean stream; the noisy ones shifted if the model is.

        Args:
            z, x: noisy and clean tokens ``[B, L]``.
            block_length: instead of the model's own.
            attention_mask: ``[B, L]``, True = real; blocks are counted over the real tokens of a row.
        """
        if z.shape != x.shape:
            raise ValueError(f"z, x: shapes {list(z.shape)} and {list(x.shape)} given, expected one shape [B, L]")
        form = self.form if block_length is None else replace(self.form, length=block_length)
        context = self._context(x, form, attention_mask, streams=2)
        hidden, _ = self.backbone.run(self.backbone.embed(torch.cat([x, z])), context)
        clean, noisy = self.backbone.model.normed(hidden, context).chunk(2)
        if self.shift:
            noisy = _from_the_token_before(clean, noisy, context)
        return noisy, clean

    def forward_two_stream(
        self,
        z: Tensor,
        x: Tensor,
        block_length: int | None = None,
        attention_mask: Tensor | None = None,
        at: Tensor | None = None,
    ) -> Tensor:
        """Logits of the noisy stream: block c of ``z`` seen after the clean blocks before c of ``x``.

        ``at [B, L]`` bool: logits ``[n, V]`` of the n chosen positions alone, so that the rest never meets the vocabulary; without it
        ``[B, L, V]``. The other arguments: :meth:`two_stream_hidden`.
        """
        hidden, _ = self.two_stream_hidden(z, x, block_length, attention_mask)
        return self.backbone.lm_head(hidden if at is None else hidden[at])

    # -- inference ---------------------------------------------------------------------------------------------------

    def init_state(self, rows: int) -> BlockState:
        """Nothing read yet, for ``rows`` sequences."""
        if isinstance(rows, bool) or not isinstance(rows, int) or rows < 1:
            raise ValueError(f"rows: expected at least one sequence, got {rows!r}")
        return BlockState(self.backbone.new_state(), None, rows, self._form_name(), self.backbone.dtype)

    def denoise(self, z_block: Tensor, state: BlockState, attention_mask: Tensor | None = None) -> Tensor:
        """Logits ``[B, n, V]`` about the tokens of one block, n <= b; ``state`` is left as it is, bit for bit.

        ``attention_mask [B, n]``: False behind the end of a row that is shorter.
        """
        return self.peek(z_block, state, attention_mask)[0]

    def peek(
        self, z_block: Tensor, state: BlockState, attention_mask: Tensor | None = None, keep: bool = False
    ) -> tuple[Tensor, BlockState | None]:
        """:meth:`denoise`, and with ``keep`` the state as it would be if these noisy tokens were committed."""
        if z_block.dim() == 2 and z_block.shape[1] > self.block_length:
            raise ValueError(
                f"z_block: {z_block.shape[1]} tokens given, but a block has {self.block_length}; `commit` reads several blocks"
            )
        hidden, after = self._read(z_block, state, attention_mask, keep)
        if self.shift:
            first = hidden[:, :1] if state.last is None else state.last[:, None]
            if state.lengths is not None:  # a row that has read nothing keeps its own, a placeholder
                first = torch.where((state.lengths > 0)[:, None, None], first, hidden[:, :1])
            hidden = torch.cat([first, hidden[:, :-1]], 1)
        return self.backbone.lm_head(hidden), after

    def commit(self, x_block: Tensor, state: BlockState, attention_mask: Tensor | None = None) -> BlockState:
        """The state after clean tokens ``[B, n]``: one block, or several from the border of a block on (a prompt).

        The last block may be shorter, and is a block then: what is committed afterwards belongs to the next one. Padding may stand
        anywhere in a row; a row of padding alone is left as it is.
        """
        self._check(x_block, state, attention_mask)
        if attention_mask is not None:
            attention_mask = attention_mask.bool()
            order = torch.argsort((~attention_mask).to(torch.uint8), dim=1, stable=True)
            x_block, attention_mask = x_block.gather(1, order), attention_mask.gather(1, order)
        step = max(1, PREFILL_TOKENS // self.block_length) * self.block_length
        for start in range(0, x_block.shape[1], step):
            piece = slice(start, start + step)
            mask = None if attention_mask is None else attention_mask[:, piece]
            if mask is not None and not bool(mask.any()):
                break
            _, after = self._read(x_block[:, piece], state, mask, True)
            assert after is not None
            state = after
        return state

    def _read(
        self, tokens: Tensor, state: BlockState, attention_mask: Tensor | None, keep: bool
    ) -> tuple[Tensor, BlockState | None]:
        """Final hidden states ``[B, n, D]`` of tokens behind a state, and the state behind them if it is to be kept."""
        self._check(tokens, state, attention_mask)
        context = self._context(tokens, self.form, attention_mask, state.memory, keep)
        hidden, memory = self.backbone.run(self.backbone.embed(tokens), context, state=state.memory)
        hidden = self.backbone.model.normed(hidden, context)
        if not keep:
            return hidden, None
        assert memory is not None
        last = None
        if self.shift:
            column = context.real_tokens.long().cumsum(1).argmax(1)  # of the last real token
            last = hidden.take_along_dim(column[:, None, None], 1)[:, 0]
            if state.last is not None:
                last = torch.where(context.real_tokens.any(1, keepdim=True), last, state.last)
        return hidden, replace(state, memory=memory.advance(context), last=last)

    def _context(
        self,
        tokens: Tensor,
        form: BlockCausal,
        attention_mask: Tensor | None,
        memory: ModelState | None = None,
        keep_state: bool = False,
        streams: int = 1,
    ) -> SequenceContext:
        if tokens.dim() != 2:
            raise ValueError(f"tokens: shape {list(tokens.shape)} given, expected [B, n]")
        context = SequenceContext.build(
            tokens.shape[0],
            tokens.shape[1],
            tokens.device,
            attention_mask=attention_mask,
            visibility=form,
            state=memory,
            keep_state=keep_state,
            streams=streams,
            rho=self.rho,
        )
        if self.embed_time is not None:
            context.tables[CONDITION] = self.embed_time(torch.zeros(streams * tokens.shape[0], device=tokens.device))
        return context

    def _check(self, tokens: Tensor, state: BlockState, attention_mask: Tensor | None) -> None:
        if not isinstance(state, BlockState):
            raise TypeError(f"state: a BlockState of init_state or commit is needed, got {type(state).__name__}")
        if tokens.dim() != 2 or not tokens.shape[1]:
            raise ValueError(f"tokens: shape {list(tokens.shape)} given, expected [B, n] with n >= 1")
        if tokens.shape[0] != state.rows:
            raise ValueError(f"state: it holds {state.rows} rows, the tokens have {tokens.shape[0]}")
        if attention_mask is not None and attention_mask.shape != tokens.shape:
            raise ValueError(
                f"attention_mask: shape {list(attention_mask.shape)} given, expected that of the tokens, {list(tokens.shape)}"
            )
        if state.memory.fingerprint != self.backbone.config.fingerprint:
            raise ForeignStateError(
                f"state: it was made by another model (fingerprint {state.memory.fingerprint}, expected "
                f"{self.backbone.config.fingerprint})"
            )
        if state.form != self._form_name():
            raise ForeignStateError(f"state: made in blocks of the form {state.form}, expected {self._form_name()}")
        if state.dtype != self.backbone.dtype:
            raise ValueError(f"state: made in {state.dtype}, but the model is in {self.backbone.dtype}")

    def _form_name(self) -> str:
        return f"{self.form.inside}/{self.form.write}/{self.form.length}{'/shift' if self.shift else ''}"

    # -- files -------------------------------------------------------------------------------------------------------

    def save_pretrained(self, path: str | os.PathLike[str]) -> None:
        """The backbone as its own ``save_pretrained`` writes it, and ``block_diffusion.json`` beside it."""
        if self.embed_time is not None:
            raise ValueError("embed_time: a model with modulation is saved as the DiffusionLM that it came from")
        self.backbone.save_pretrained(path)
        settings = {
            "block_length": self.block_length,
            "mask_id": self.mask_id,
            "inside": self.form.inside,
            "write": self.form.write,
            "shift": self.shift,
            "rho": self.rho,
            "state_from": self.state_from,
        }
        write_text(Path(path) / SETTINGS_FILE, json.dumps(settings, indent=2) + "\n")

    @classmethod
    def from_pretrained(cls, path: str | os.PathLike[str]) -> "BlockDiffusionModel":
        """What :meth:`save_pretrained` wrote."""
        file = Path(path) / SETTINGS_FILE
        if not file.is_file():
            raise ValueError(f"path: there is no {SETTINGS_FILE} in {path}; save_pretrained writes one")
        settings = json.loads(file.read_text(encoding="utf-8"))
        return cls(HybridForCausalLM.from_pretrained(path), settings.pop("block_length"), **settings)


def _from_the_token_before(clean: Tensor, noisy: Tensor, context: SequenceContext) -> Tensor:
    """``[B, L, D]``: at each real token the hidden state of the real token before it, noisy inside a block, clean across its border.

    The first token of a row keeps its own, a placeholder: it must be given.
    """
    real, block = (t.chunk(2)[0] for t in (context.real_tokens, context.block_of))
    column = torch.arange(clean.shape[1], device=clean.device).expand(real.shape)
    seen = torch.where(real, column, -1).cummax(1).values
    before = torch.cat([torch.full_like(seen[:, :1], -1), seen[:, :-1]], 1)
    at = before.clamp(min=0)
    same = block.gather(1, at) == block
    moved = torch.where(same[..., None], noisy.take_along_dim(at[..., None], 1), clean.take_along_dim(at[..., None], 1))
    return torch.where((before < 0)[..., None], noisy, moved)
