r"""From an autoregressive model to a diffusion model, without a new architecture: :func:`ar_to_diffusion`.

Three things change (DiffuLLaMA, arXiv:2410.17891; Dream, arXiv:2508.15487):

* **Alignment.** The head at position i of an autoregressive model speaks about token i + 1. It keeps doing so (``shift``), and logits are
  moved here, and here alone, to the token they are about. The first token of a row has none: it must be given.
* **Who sees whom.** In step s of training a share :math:`\rho = \min(1, (s + 1) / \mathrm{steps})` of the pairs that a causal mask closes
  is opened. Attention: :math:`(j \le i) \vee \mathrm{Bernoulli}(\rho)`, one L × L draw a step for the batch, all heads and all layers.
  Linear layers of a hybrid: :math:`o = \mathrm{Fwd} + \rho(\mathrm{Rev} - \mathrm{diag})`. Before the first step rho is 0, and the
  logits are those of the model as it was; from step ``steps - 1`` on it is 1.
* **A mask token.** A reserved id, or a new row of the embedding, begun as the mean of all others. It is never predicted: its logit is
  minus infinity.
"""

import inspect
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from latentcot.backbone import HybridForCausalLM, SequenceContext, next_token_loss
from latentcot.diffusion_reasoning.corruption import check_mask_id
from latentcot.diffusion_reasoning.noise import mix
from latentcot.diffusion_reasoning.objective import DiffusionLoss, diffusion_loss
from latentcot.diffusion_reasoning.schedule import NoiseSchedule
from latentcot.kernels import Bidirectional


@dataclass(frozen=True)
class MaskAnnealing:
    """How the causal mask opens: ``rho(step) = min(1, (step + 1) / steps)``.

    Args:
        steps: of the annealing; 10 000 in the published recipe, 1 for a model that is bidirectional already.
        seed: of the draws; the draw of a step follows from it and the step, so a run that goes on draws what it would have drawn.
    """

    steps: int = 10_000
    seed: int = 0

    def __post_init__(self) -> None:
        if isinstance(self.steps, bool) or not isinstance(self.steps, int) or self.steps < 1:
            raise ValueError(f"steps: expected a positive number of annealing steps, got {self.steps!r}")

    def rho(self, step: int) -> float:
        """Share that is open in ``step`` (from 0); 0 before the first."""
        return min(1.0, max(0, step + 1) / self.steps)

    def ahead(self, step: int, length: int) -> Tensor:
        """The pairs opened in ``step``, ``[length, length]`` bool on the CPU."""
        seed = int(mix(torch.tensor(self.seed * 1_000_003 + step))) % 2**63
        generator = torch.Generator().manual_seed(seed)
        return torch.rand(length, length, generator=generator) < self.rho(step)


class ConvertedModel(nn.Module):
    """A causal language model as a denoiser ``(z [B, L], attention_mask [B, L]) -> logits [B, L, V]``, position i's about token i.

    Made by :func:`ar_to_diffusion`. Call :meth:`set_step` before every optimiser step while the mask anneals; losses and samplers of
    this package take the model as it is. ``model`` is the model itself, whose ``save_pretrained`` saves the result.
    """

    def __init__(self, model: PreTrainedModel, mask_id: int, shift: bool = True, anneal: MaskAnnealing | None = None):
        super().__init__()
        self.model = model
        self.mask_id = mask_id
        self.shift = shift
        self.anneal = anneal
        self.step = -1
        self._drawn: tuple[int, Tensor] | None = None
        accepted = inspect.signature(model.forward).parameters
        self._takes = {name for name in ("position_ids", "logits_to_keep", "use_cache") if name in accepted}

    @property
    def rho(self) -> float:
        """Share of what lies ahead that is open now."""
        return 1.0 if self.anneal is None else self.anneal.rho(self.step)

    def set_step(self, step: int) -> None:
        """Take the mask of this optimiser step (from 0; -1 = before the first)."""
        if isinstance(step, bool) or not isinstance(step, int) or step < -1:
            raise ValueError(f"step: expected an optimiser step >= 0, or -1 for before the first, got {step!r}")
        self.step, self._drawn = step, None

    def forward(self, z: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        real = self._real(z, attention_mask)
        logits = self._logits(z, real, None)
        if self.shift:
            logits = logits.take_along_dim(previous_real(real)[..., None], 1)
        return self._without_mask_token(logits)

    def at(self, z: Tensor, attention_mask: Tensor | None, positions: Tensor) -> Tensor:
        """Logits ``[n, V]`` of the n chosen positions (``[B, L]`` bool); the head runs at the columns that they need."""
        real = self._real(z, attention_mask)
        row, column = positions.nonzero(as_tuple=True)
        if self.shift:
            column = previous_real(real)[row, column]
        columns, where = torch.unique(column, return_inverse=True)
        return self._without_mask_token(self._logits(z, real, columns)[row, where])

    def _logits(self, z: Tensor, real: Tensor, columns: Tensor | None) -> Tensor:
        """Of every column, or of the chosen ones ``[n]``; not moved yet."""
        rho, ahead = self.rho, self._ahead(z)
        if isinstance(self.model, HybridForCausalLM):
            context = SequenceContext.build(
                z.shape[0], z.shape[1], z.device, attention_mask=real, visibility=Bidirectional(), rho=rho, ahead=ahead
            )
            hidden, _ = self.model.run(self.model.embed(z), context)
            hidden = self.model.model.normed(hidden, context)
            return self.model.lm_head(hidden if columns is None else hidden[:, columns])
        named: dict[str, Any] = {"attention_mask": self._additive(real, rho, ahead)}
        if "position_ids" in self._takes:
            named["position_ids"] = (real.long().cumsum(1) - 1).clamp(min=0)
        if "use_cache" in self._takes:
            named["use_cache"] = False
        if columns is None or "logits_to_keep" not in self._takes:
            logits = self.model(input_ids=z, **named).logits
            return logits if columns is None else logits[:, columns]
        return self.model(input_ids=z, **named, logits_to_keep=columns).logits

    def _ahead(self, z: Tensor) -> Tensor | None:
        """The open pairs of this step; drawn once a step and length."""
        if self.anneal is None or not 0 < self.rho < 1:
            return None
        length = z.shape[1]
        if self._drawn is None or self._drawn[0] != length:
            self._drawn = length, self.anneal.ahead(self.step, length)
        return self._drawn[1].to(z.device)

    def _additive(self, real: Tensor, rho: float, ahead: Tensor | None) -> Tensor:
        """What transformers adds to the scores, ``[B, 1, L, L]``: it takes a mask of four axes as it is. Padding sees itself alone."""
        length = real.shape[1]
        seen = torch.ones(length, length, dtype=torch.bool, device=real.device)
        if rho < 1:
            seen = seen.tril() if ahead is None else seen.tril() | ahead
        itself = torch.eye(length, dtype=torch.bool, device=real.device)
        seen = (seen & real[:, None, :] & real[:, :, None]) | (itself & ~real[:, :, None])
        dtype = self.model.dtype
        return torch.zeros(seen.shape, dtype=dtype, device=real.device).masked_fill(~seen, torch.finfo(dtype).min)[
            :, None
        ]

    def _without_mask_token(self, logits: Tensor) -> Tensor:
        return logits.masked_fill(torch.arange(logits.shape[-1], device=logits.device) == self.mask_id, -torch.inf)

    @staticmethod
    def _real(z: Tensor, attention_mask: Tensor | None) -> Tensor:
        if z.dim() != 2:
            raise ValueError(f"z: shape {list(z.shape)} given, expected [B, L]")
        if attention_mask is None:
            return torch.ones_like(z, dtype=torch.bool)
        if attention_mask.shape != z.shape:
            raise ValueError(f"attention_mask: shape {list(attention_mask.shape)} given, expected {list(z.shape)}")
        return attention_mask.bool()


def ar_to_diffusion(
    model: PreTrainedModel,
    shift: bool = True,
    anneal: MaskAnnealing | int | None = MaskAnnealing(),
    mask_token: Literal["append"] | int = "append",
) -> ConvertedModel:
    """Turn a causal language model into a denoiser, in place: its embedding may grow by a row.

    Args:
        model: any causal LM of transformers whose attention takes a mask of four axes (Llama, Qwen, GPT-2, ...; eager or sdpa attention),
            or a :class:`~latentcot.backbone.HybridForCausalLM` without HGRN layers.
        shift: the head keeps speaking about the next token.
        anneal: how the causal mask opens, or its number of steps; ``None`` = fully bidirectional from the start.
        mask_token: ``"append"`` a row to the embedding, or the id of a reserved token. Either row starts as the mean of all others.

    Raises:
        TypeError: not a language model of transformers.
        ValueError: a reserved id that is in use or outside the vocabulary; a model whose tokens do not come to see what lies ahead
            (recurrent layers, flash attention): found by running three tokens.
    """
    if not isinstance(model, PreTrainedModel) or model.get_output_embeddings() is None:
        raise TypeError(f"model: expected a causal language model of transformers, got {type(model).__name__}")
    if isinstance(anneal, int):
        anneal = MaskAnnealing(anneal)
    config = model.config.get_text_config()
    if "hgrn" in getattr(config, "mixers", ()):
        raise ValueError("model: hgrn layers see one direction only and can not be made bidirectional")
    mask_id = prepare_mask_token(model, mask_token)
    converted = ConvertedModel(model, mask_id, shift, anneal)
    _check_sees_ahead(converted)
    return converted


@torch.no_grad()
def prepare_mask_token(model: PreTrainedModel, mask_token: Literal["append"] | int = "append") -> int:
    """The id of the mask token, whose embedding is set to the mean of all others; ``"append"`` adds a row for it.

    Raises:
        ValueError: an id outside the vocabulary or one of the model's special tokens.
    """
    config = model.config.get_text_config()
    size = int(model.get_input_embeddings().weight.shape[0])  # type: ignore[arg-type, union-attr, index]
    if mask_token == "append":
        mask_id = size
        model.resize_token_embeddings(size + 1, mean_resizing=False)
    elif isinstance(mask_token, str):
        raise ValueError(f"mask_token: {mask_token!r} given, expected 'append' or the id of a reserved token")
    else:
        mask_id = mask_token
        ends = config.eos_token_id
        for eos in ends if isinstance(ends, list) else [ends]:  # some models have several
            check_mask_id(
                mask_id, size, pad_token_id=config.pad_token_id, bos_token_id=config.bos_token_id, eos_token_id=eos
            )
    table = model.get_input_embeddings().weight
    assert isinstance(table, Tensor)
    others = torch.arange(table.shape[0], device=table.device) != mask_id
    table[mask_id] = table[others].to(torch.promote_types(table.dtype, torch.float32)).mean(0).to(table.dtype)
    return mask_id


@torch.no_grad()
def _check_sees_ahead(converted: ConvertedModel) -> None:
    """Three tokens, the last one changed: the first must notice once the mask is open."""
    model, annealing, training = converted.model, converted.anneal, converted.model.training
    converted.anneal, converted.step = None, -1
    model.eval()
    try:
        size = model.get_input_embeddings().weight.shape[0]  # type: ignore[union-attr]
        ids = [i for i in range(min(size, 8)) if i != converted.mask_id]
        z = torch.tensor([[ids[0], ids[1], ids[0]], [ids[0], ids[1], ids[-1]]], device=model.device)
        real = torch.ones_like(z, dtype=torch.bool)
        logits = converted._logits(z, real, None)[:, 0]
    finally:
        converted.anneal = annealing
        model.train(training)
    if torch.equal(logits[0], logits[1]):
        raise ValueError(
            f"model: {type(model).__name__} does not see what lies ahead under an open mask; it needs attention that takes a mask of "
            f"four axes (attn_implementation='eager' or 'sdpa')"
        )


def previous_real(real: Tensor) -> Tensor:
    """Column of the real token before each position ``[B, L]``; its own where there is none."""
    column = torch.arange(real.shape[1], device=real.device).expand(real.shape)
    last = torch.where(real, column, -1).cummax(1).values
    before = torch.cat([torch.full_like(last[:, :1], -1), last[:, :-1]], 1)
    return torch.where(before < 0, column, before)


def conversion_loss(
    model: ConvertedModel,
    x0: Tensor,
    *,
    attention_mask: Tensor | None = None,
    maskable: Tensor | None = None,
    ar_coefficient: float = 0.0,
    schedule: NoiseSchedule | None = None,
    generator: torch.Generator | None = None,
    **options: Any,
) -> DiffusionLoss:
    """The published recipe: weight 1/t, by the number of masked tokens, never the first token of a row of a shifted model.

    Args:
        x0: clean tokens ``[B, L]``.
        maskable: ``[B, L]``; default: all real tokens (that are not first).
        ar_coefficient: of an added next-token loss, which gets a causal pass of its own (0.5 keeps the model autoregressive as well).
        options: further ones of :func:`~latentcot.diffusion_reasoning.diffusion_loss`.

    Raises:
        ValueError: the first token of a row is maskable in a shifted model; and as ``diffusion_loss``.
    """
    real = torch.ones_like(x0, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
    first = real & (real.long().cumsum(1) == 1)
    if maskable is None:
        maskable = real & ~first if model.shift else real
    elif model.shift and bool((maskable & first).any()):
        raise ValueError("maskable: it is True at the first token of a row, which a shifted model says nothing about")
    options = {"normalise": "masked", **options}
    out = diffusion_loss(
        model,
        x0,
        schedule=NoiseSchedule() if schedule is None else schedule,
        mask_id=model.mask_id,
        maskable=maskable,
        attention_mask=real,
        generator=generator,
        **options,
    )
    if not ar_coefficient:
        return out
    if ar_coefficient < 0:
        raise ValueError(f"ar_coefficient: expected a number >= 0, got {ar_coefficient}")
    fields = {**vars(out), "loss": out.loss + ar_coefficient * causal_loss(model, x0, real)}
    return type(out)(**fields)


def causal_loss(model: ConvertedModel, x0: Tensor, attention_mask: Tensor | None = None) -> Tensor:
    """Next-token loss in nats a token by a causal pass: a bidirectional one knows the answer, and so does the clean half of a two-stream
    pass, which sees its whole block."""
    real = ConvertedModel._real(x0, attention_mask)
    annealing, step = model.anneal, model.step
    model.anneal, model.step = MaskAnnealing(1), -1  # rho = 0
    try:
        logits = model._logits(x0, real, None)
    finally:
        model.anneal, model.step = annealing, step
    return next_token_loss(model._without_mask_token(logits), x0, real)
