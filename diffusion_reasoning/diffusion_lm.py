r"""A masked-diffusion language model that saves, loads and generates like any other model of transformers.

>>> config = DiffusionConfig(vocab_size=20, hidden_size=32, num_hidden_layers=2, mixer="attention",
...                          attention={"num_heads": 2}, mask_token_id=6)
>>> model = DiffusionLM(config)  # doctest: +SKIP

It is a :class:`~latentcot.backbone.HybridForCausalLM` run bidirectionally, with what diffusion adds: a mask token, a
schedule, the shift of converted autoregressive models, time, and a carry from pass to pass.
"""

import inspect
import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PreTrainedModel, initialization
from transformers.utils.generic import ModelOutput

from latentcot.backbone import HybridConfig, HybridForCausalLM
from latentcot.backbone.config import refuse_misspelt
from latentcot.diffusion_reasoning.carry import CARRIES, Carry, make_carry
from latentcot.diffusion_reasoning.corruption import check_mask_id
from latentcot.diffusion_reasoning.denoiser import BackboneDenoiser
from latentcot.diffusion_reasoning.generation_config import DiffusionGenerationConfig
from latentcot.diffusion_reasoning.named_samplers import DREAM_ORDERS, dream, low_confidence
from latentcot.diffusion_reasoning.objective import diffusion_loss
from latentcot.diffusion_reasoning.samplers import DiffusionOutput, diffusion_generate
from latentcot.diffusion_reasoning.schedule import NoiseSchedule

IN_BLOCK = ("softmax", "bilinear", "decayed")
_TIME_WIDTH = 256


_OWN_FIELDS = [
    "mask_token_id", "schedule", "schedule_eps", "sigma_min", "sigma_max", "block_length", "shift", "time_conditioning",
    "carry", "in_block", "combine", "max_position_embeddings", "loss_weight", "loss_normalise",
]  # fmt: skip


class DiffusionConfig(HybridConfig):
    """:class:`~latentcot.backbone.HybridConfig` and

    Args:
        mask_token_id: within the vocabulary, and no other special token.
        schedule: name of a :class:`~latentcot.diffusion_reasoning.schedule.NoiseSchedule`; ``schedule_eps``,
            ``sigma_min``, ``sigma_max``: its values.
        block_length: tokens of a block in semi-autoregressive or block diffusion; ``None`` = the whole canvas.
        shift: the head at position i speaks about token i + 1 (Dream, and everything converted from an autoregressive
            model); the model's logits are aligned all the same.
        time_conditioning: the network is given sigma; needs ``modulation``. A modulated network without it is given
            sigma = 0.
        carry: ``none``, ``soft_topk``, ``soft_full``, ``self_cond`` or ``hidden``.
        in_block: what linear layers do inside a block of block diffusion: ``softmax``, ``bilinear`` or ``decayed``.
        combine: how the two directions of linear layers that have such an option join, ``average`` or ``gate``;
            ``None`` = as their own options say.
        max_position_embeddings: longest sequence with full-attention layers; ``None`` = any.
        loss_weight, loss_normalise: of the loss that ``forward`` returns.

    Raises:
        ValueError: a mask token that is not one, an unknown schedule or carry, time without modulation, and what
            ``HybridConfig`` refuses.
    """

    model_type = "latentcot_diffusion"

    def __init__(
        self,
        mask_token_id: int = 6,
        schedule: str = "loglinear",
        schedule_eps: float = 1e-3,
        sigma_min: float | None = None,
        sigma_max: float | None = None,
        block_length: int | None = None,
        shift: bool = False,
        time_conditioning: bool = False,
        carry: str = "none",
        in_block: str = "softmax",
        combine: str | None = None,
        max_position_embeddings: int | None = None,
        loss_weight: str = "elbo",
        loss_normalise: str = "elbo",
        **kwargs: Any,
    ):
        inherited = inspect.signature(HybridConfig.__init__).parameters
        refuse_misspelt({k: v for k, v in kwargs.items() if k not in inherited}, _OWN_FIELDS)
        if combine is not None:
            for mixer in ("deltanet", "gated_deltanet"):
                kwargs[mixer] = {**(kwargs.get(mixer) or {}), "combine": combine}
        super().__init__(**kwargs)
        check_mask_id(
            mask_token_id,
            self.vocab_size,
            pad_token_id=self.pad_token_id,
            bos_token_id=self.bos_token_id,
            eos_token_id=self.eos_token_id,
        )
        if carry not in CARRIES:
            make_carry(carry, 1)  # says what is wrong with it
        if in_block not in IN_BLOCK:
            raise ValueError(f"in_block: {in_block!r} given, expected one of {', '.join(map(repr, IN_BLOCK))}")
        if time_conditioning and self.modulation is None:
            raise ValueError(
                "time_conditioning: the network takes its time through modulation; give modulation = a width"
            )
        for name, value in (("block_length", block_length), ("max_position_embeddings", max_position_embeddings)):
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise ValueError(f"{name}: expected a positive integer or None, got {value!r}")
        self.mask_token_id = mask_token_id
        self.schedule, self.schedule_eps = schedule, schedule_eps
        self.sigma_min, self.sigma_max = sigma_min, sigma_max
        self.block_length, self.shift, self.time_conditioning = block_length, shift, time_conditioning
        self.carry, self.in_block, self.combine = carry, in_block, combine
        self.max_position_embeddings = max_position_embeddings
        self.loss_weight, self.loss_normalise = loss_weight, loss_normalise
        self.noise_schedule  # noqa: B018 (an unknown name fails here)

    @property
    def noise_schedule(self) -> NoiseSchedule:
        return NoiseSchedule(self.schedule, self.schedule_eps, self.sigma_min, self.sigma_max)


@dataclass
class DiffusionLMOutput(ModelOutput):
    """``loss`` when labels were given; ``logits [B, L, V]``, position i's about token i (``None`` with labels, where only
    masked positions meet the vocabulary); ``nats_per_token``: the bound of that one draw."""

    loss: Tensor | None = None
    logits: Tensor | None = None
    nats_per_token: Tensor | None = None


class TimeEmbedding(nn.Module):
    r"""sigma ``[B]`` to conditioning ``[B, W]``: 256 sinusoids :math:`[\cos \sigma f_j, \sin \sigma f_j]`,
    :math:`f_j = 10^{-4 j/128}`, then linear, SiLU, linear and a last SiLU (MDLM, arXiv:2406.07524)."""

    def __init__(self, width: int):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(_TIME_WIDTH, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, sigma: Tensor) -> Tensor:
        weight = self.mlp[0].weight
        assert isinstance(weight, Tensor)
        precise = torch.promote_types(weight.dtype, torch.float32)
        half = _TIME_WIDTH // 2
        frequency = torch.exp(-math.log(10000) * torch.arange(half, device=sigma.device, dtype=precise) / half)
        angle = sigma.to(precise)[:, None] * frequency
        return torch.nn.functional.silu(self.mlp(torch.cat([angle.cos(), angle.sin()], -1).to(weight.dtype)))


class DiffusionLM(PreTrainedModel):
    """See the module. The network is ``backbone``; ``denoiser()`` is what samplers, losses and bounds take."""

    config_class = DiffusionConfig
    config: DiffusionConfig
    base_model_prefix = "backbone"
    supports_gradient_checkpointing = False
    _tied_weights_keys = {"backbone.lm_head.weight": "backbone.model.embeddings.weight"}  # noqa: RUF012

    def __init__(self, config: DiffusionConfig):
        super().__init__(config)
        self.backbone = HybridForCausalLM(config)
        self.embed_time = None if config.modulation is None else TimeEmbedding(config.modulation)
        self.carry: Carry | None = make_carry(config.carry, config.hidden_size)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, Carry):
            fresh = make_carry(self.config.carry, self.config.hidden_size)
            assert fresh is not None
            for (_, own), start in zip(module.named_parameters(), fresh.parameters(), strict=True):
                initialization.copy_(own, start)
        elif self.carry is None or module not in set(self.carry.modules()):
            self.backbone._init_weights(module)

    def get_input_embeddings(self) -> nn.Module:
        return self.backbone.model.embeddings

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.backbone.model.embeddings = value  # type: ignore[assignment]

    def get_output_embeddings(self) -> nn.Module:
        return self.backbone.lm_head

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.backbone.lm_head = new_embeddings  # type: ignore[assignment]

    def denoiser(self) -> BackboneDenoiser:
        """The network as samplers, losses and bounds call it."""
        config = self.config
        return BackboneDenoiser(self.backbone, config.shift, self.embed_time, config.time_conditioning, self.carry)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        maskable: Tensor | None = None,
        labels: Tensor | None = None,
        sigma: Tensor | None = None,
        generator: torch.Generator | None = None,
        return_dict: bool = True,
        **unknown: Any,
    ) -> DiffusionLMOutput:
        """Logits of noisy ``input_ids [B, L]``, or, with ``labels``, the loss of clean ones.

        Args:
            input_ids: with ``labels``: clean tokens, noised here; without: a canvas, as it is.
            attention_mask: ``[B, L]``, 1 = real.
            maskable: ``[B, L]``, what takes part in noise and loss; default: all real tokens.
            labels: ``[B, L]``: ``input_ids`` again, with -100 where a token is given (as trainers pass it).
            sigma: ``[B]``, for a time-conditioned network.
            generator: of times and masks.
        """
        if unknown := {k: v for k, v in unknown.items() if v is not None and k not in _IGNORED_BY_FORWARD}:
            raise TypeError(f"forward: unknown argument(s) {sorted(unknown)}")
        real = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
        if labels is None:
            return DiffusionLMOutput(logits=self.denoiser()(input_ids, real, sigma))
        if labels.shape != input_ids.shape:
            raise ValueError(f"labels: shape {list(labels.shape)} given, expected {list(input_ids.shape)}")
        learned = real & (labels != -100)
        if bool((learned & (labels != input_ids)).any()):
            raise ValueError("labels: they differ from input_ids; diffusion learns the tokens themselves, unshifted")
        out = diffusion_loss(
            self.denoiser(),
            input_ids,
            schedule=self.config.noise_schedule,
            mask_id=self.config.mask_token_id,
            maskable=learned if maskable is None else learned & maskable,
            attention_mask=real,
            weight=self.config.loss_weight,  # type: ignore[arg-type]
            normalise=self.config.loss_normalise,  # type: ignore[arg-type]
            carry=self.config.carry,
            generator=generator,
        )
        return DiffusionLMOutput(loss=out.loss, nats_per_token=out.nats_per_token)

    def generation_defaults(self, **changes: Any) -> DiffusionGenerationConfig:
        """LLaDA's sampler with this model's mask, end-of-text and block; keywords as for
        :func:`~latentcot.diffusion_reasoning.named_samplers.low_confidence`."""
        return low_confidence(**{**self._own_fields(changes), "block_length": self.config.block_length, **changes})

    def _own_fields(self, changes: Mapping[str, Any]) -> dict[str, Any]:
        """Those of the model; ``ValueError`` where ``changes`` look for an end of text and the model has not just one."""
        config = self.config
        own: dict[str, Any] = {
            "mask_id": config.mask_token_id, "carry": config.carry, "schedule": config.noise_schedule
        }  # fmt: skip
        if isinstance(config.eos_token_id, int):
            own["eos_id"] = config.eos_token_id
        elif "eos_id" not in changes and (
            str(changes.get("stop")).startswith("eos")
            or changes.get("logits_eos_inf")
            or changes.get("confidence_eos_eot_inf")
        ):
            raise ValueError(
                f"eos_id: the sampler looks for the end of a text, and the model's eos_token_id is {config.eos_token_id}; give one"
            )
        return own

    def diffusion_generate(
        self,
        input_ids: Tensor,
        config: DiffusionGenerationConfig | None = None,
        attention_mask: Tensor | None = None,
        maskable: Tensor | None = None,
        allow_extrapolation: bool = False,
        allowed: Any = None,
        row_seeds: Tensor | None = None,
        hook: Any = None,
        logits_hook: Any = None,
        tokens_hook: Any = None,
        infer_from_mask: bool = False,
        **changes: Any,
    ) -> DiffusionOutput:
        """:func:`~latentcot.diffusion_reasoning.samplers.diffusion_generate` with this model.

        Args:
            config: the sampler; default :meth:`generation_defaults`. Its mask token must be the model's.
            allow_extrapolation: go beyond ``config.max_position_embeddings`` instead of raising. Stacks without full
                attention only warn.
            changes: fields of ``config`` to replace; or Dream's argument names ``steps, alg, alg_temp, eps,
                output_history, max_length`` (``output_history=True`` records a trajectory).
        """
        config = self._sampler(config, input_ids, changes)
        if config.mask_id != self.config.mask_token_id:
            raise ValueError(
                f"config: its mask_id is {config.mask_id}, the model's mask token {self.config.mask_token_id}"
            )
        self._check_length(input_ids.shape[1] + config.max_new_tokens, allow_extrapolation)
        return diffusion_generate(
            self, input_ids, config, attention_mask, maskable, allowed, row_seeds, hook, logits_hook, tokens_hook,
            infer_from_mask,
        )  # fmt: skip

    def generate(self, inputs: Tensor | None = None, **arguments: Any) -> Tensor:
        """Sequences ``[B, P + n]`` of :meth:`diffusion_generate`, for code that expects transformers' name. Arguments
        that only mean something to autoregressive decoding raise ``TypeError``."""
        ids = arguments.pop("input_ids", inputs)
        if ids is None or (inputs is not None and ids is not inputs):
            raise ValueError("input_ids: give the prompt once, as input_ids or as first argument")
        arguments.pop("use_cache", None)  # what every caller passes; there is nothing to keep
        do_sample = arguments.pop("do_sample", None)
        if do_sample is False:
            arguments["temperature"] = 0.0
        elif do_sample and "temperature" not in arguments:
            arguments["temperature"] = 1.0
        known = {*_GENERATE, *DiffusionGenerationConfig.__dataclass_fields__, *_DREAM}
        if unknown := sorted(set(arguments) - known):
            raise TypeError(f"generate: {unknown} mean nothing to masked diffusion; see diffusion_generate")
        return self.diffusion_generate(ids, **arguments).sequences

    def _sampler(
        self, config: DiffusionGenerationConfig | None, ids: Tensor, changes: dict[str, Any]
    ) -> DiffusionGenerationConfig:
        if "max_length" in changes:
            changes["max_new_tokens"] = changes.pop("max_length") - ids.shape[1]
        if changes.pop("output_history", False):
            changes["record"] = changes.get("record") or "light"
        if unknown := sorted(set(changes) - {*DiffusionGenerationConfig.__dataclass_fields__, *_DREAM}):
            raise TypeError(f"diffusion_generate: unknown argument(s) {unknown}")
        if "alg" in changes or "alg_temp" in changes or "eps" in changes:
            if config is not None:
                raise ValueError(f"config: given beside Dream's arguments {sorted(set(changes) & _DREAM)}; give one")
            if changes.get("alg", "origin") not in ("origin", *DREAM_ORDERS):
                raise ValueError(f"alg: unknown algorithm {changes['alg']!r}; valid: origin, {', '.join(DREAM_ORDERS)}")
            return dream(**{**self._own_fields(changes), **changes})
        if config is None:
            return self.generation_defaults(**changes)
        return replace(config, **changes) if changes else config

    def _check_length(self, length: int, allow_extrapolation: bool) -> None:
        most = self.config.max_position_embeddings
        if most is None or length <= most or allow_extrapolation:
            return
        if "attention" in self.config.mixers:
            raise ValueError(
                f"input_ids: {length} tokens with the new ones, but the model was trained on {most}; "
                "allow_extrapolation=True tries it"
            )
        warnings.warn(f"{length} tokens are more than the {most} that the model was trained on", stacklevel=3)


_DREAM = {"alg", "alg_temp", "eps"}
_GENERATE = {
    "config", "attention_mask", "maskable", "allow_extrapolation", "allowed", "row_seeds", "hook", "logits_hook",
    "tokens_hook", "infer_from_mask", "max_length", "output_history",
}  # fmt: skip
_IGNORED_BY_FORWARD = {"position_ids", "output_attentions", "output_hidden_states", "num_items_in_batch", "use_cache"}

AutoConfig.register(DiffusionConfig.model_type, DiffusionConfig)
AutoModel.register(DiffusionConfig, DiffusionLM)
