"""The hybrid language model: embedding, blocks, final norm, head. Works with ``save_pretrained`` and ``generate``.

The pieces are public, because methods run blocks in other orders than once from bottom to top::

    hidden = model.embed(input_ids)                                       # [B, S, D]
    context = SequenceContext.build(B, S, state=state)
    hidden, state = model.run(hidden, context, blocks=slice(0, 2), state=state)
    logits = model.head(hidden)                                           # [B, S, Vocab]
    state = state.advance(context)                                        # once, after every block had the tokens
"""

import inspect
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, GenerationMixin, PreTrainedModel, initialization
from transformers.utils.generic import ModelOutput

from latentcot.backbone.block import CONDITION, GELUMLP, Block, Modulation, SwiGLU
from latentcot.backbone.config import HybridConfig
from latentcot.backbone.context import SequenceContext, Visibility
from latentcot.backbone.loss import IGNORED, next_token_loss, next_token_targets, summed_cross_entropy
from latentcot.backbone.mixers import Mixer, find_mixer, make_options
from latentcot.backbone.mixers.base import LOWER_BOUNDS
from latentcot.backbone.mixers.bounds import bounds_parameter, stacked_bounds
from latentcot.backbone.norms import LayerNorm, RMSNorm, make_norm
from latentcot.backbone.state import ForeignStateError, ModelState
from latentcot.kernels import BlockCausal, Causal

# transformers renamed the keyword under which ``generate`` hands the cache around; both names are accepted, one is returned.
_PREPARE = inspect.signature(getattr(GenerationMixin, "prepare_inputs_for_generation"))  # noqa: B009 (typed by a protocol)
CACHE_KEY = "cache" if "cache" in _PREPARE.parameters else "past_key_values"


if TYPE_CHECKING or CACHE_KEY == "cache":

    @dataclass
    class HybridOutput(ModelOutput):
        """``loss`` when labels were given, ``logits [B, S, Vocab]``, ``last_hidden_state [B, S, D]`` after the final norm, and the state
        under the name that ``generate`` looks for (read it as ``.state``)."""

        loss: Tensor | None = None
        logits: Tensor | None = None
        last_hidden_state: Tensor | None = None
        cache: ModelState | None = None

        @property
        def state(self) -> ModelState | None:
            return self.cache

else:  # a field of both names is no way out: newer versions write the one over the other

    @dataclass
    class HybridOutput(ModelOutput):
        """See above; the state is called ``past_key_values`` here."""

        loss: Tensor | None = None
        logits: Tensor | None = None
        last_hidden_state: Tensor | None = None
        past_key_values: ModelState | None = None

        @property
        def state(self) -> ModelState | None:
            return self.past_key_values


class HybridPreTrainedModel(PreTrainedModel):
    config_class = HybridConfig
    config: HybridConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = False
    _no_split_modules = ["Block"]  # noqa: RUF012 (the base class declares it so)

    def _initialize_weights(self, module: nn.Module, is_custom_code: bool = False) -> None:
        # Outside transformers it skips modules without parameters of their own, and with them the taps that a mixer draws. The skip
        # guards weights that were loaded; `initialization` does that for each tensor.
        super()._initialize_weights(module)

    def _init_weights(self, module: nn.Module) -> None:
        std = self.config.initializer_range
        if isinstance(module, Modulation):
            initialization.zeros_(module.weight)
            initialization.zeros_(module.bias)
        elif isinstance(module, nn.Linear | nn.Embedding):
            initialization.normal_(module.weight, 0.0, std)
            if isinstance(module, nn.Linear) and module.bias is not None:
                initialization.zeros_(module.bias)
        elif isinstance(module, RMSNorm | LayerNorm) and module.weight is not None:
            initialization.ones_(module.weight)
        elif isinstance(module, Mixer):
            module.init_weights(std, self.config.convolution_init)  # type: ignore[arg-type]
        elif isinstance(module, HybridModel) and module.lower_bounds is not None:
            initialization.zeros_(module.lower_bounds)


class HybridModel(HybridPreTrainedModel):
    """The backbone without a head."""

    def __init__(self, config: HybridConfig):
        super().__init__(config)
        self.embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            Block(
                find_mixer(name)[0](config.hidden_size, make_options(name, getattr(config, name)), config.norm_eps),  # type: ignore[call-arg]
                (SwiGLU if config.mlp == "swiglu" else GELUMLP)(config.hidden_size, config.intermediate_size),
                config.hidden_size,
                config.norm_placement,  # type: ignore[arg-type]
                config.norm_eps,
                config.norm_affine,
                config.recompute_mlp,
                config.norm,  # type: ignore[arg-type]
                config.modulation,
            )
            for name in config.mixers
        )
        self.lower_bounds = bounds_parameter([cast(Block, block).attn for block in self.layers])
        self.norm = make_norm(config.norm, config.hidden_size, config.norm_eps, config.norm_affine)  # type: ignore[arg-type]
        self.norm_modulation = (
            None if config.modulation is None else Modulation(config.modulation, config.hidden_size, 2)
        )
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.embeddings

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.embeddings = value

    def embed(self, input_ids: Tensor) -> Tensor:
        """Token embeddings ``[B, S, D]``, scaled. Ids outside the vocabulary raise ``ValueError`` on the CPU."""
        if input_ids.dim() != 2 or input_ids.dtype not in (torch.int64, torch.int32):
            raise ValueError(
                f"input_ids: shape {list(input_ids.shape)} of {input_ids.dtype} given, expected [B, S] of int64"
            )
        if input_ids.device.type == "cpu" and input_ids.numel():
            low, high = (int(v) for v in input_ids.aminmax())
            if low < 0 or high >= self.config.vocab_size:
                raise ValueError(f"input_ids: ids within {low}..{high} given, expected 0..{self.config.vocab_size - 1}")
        embedded = self.embeddings(input_ids)
        return embedded if self.config.embedding_scale == 1.0 else embedded * self.config.embedding_scale

    def run(
        self,
        hidden: Tensor,
        context: SequenceContext,
        blocks: slice = slice(None),
        state: ModelState | None = None,
        recurrence: int = 0,
    ) -> tuple[Tensor, ModelState | None]:
        """Run a contiguous slice of blocks.

        Args:
            hidden: ``[B, S, D]``.
            context: of these S tokens (and built with ``state``, when there is one).
            blocks: which blocks.
            state: what came before; a fresh one is started when ``context.keep_state`` and none is given.
            recurrence: which pass over these blocks this is; each pass has state entries of its own.

        Returns:
            ``hidden [B, S, D]`` and the new state (the old one untouched), ``None`` unless ``context.keep_state``.
        """
        if blocks.step not in (None, 1):
            raise ValueError(f"blocks: a contiguous slice is needed, got step {blocks.step}")
        if (
            hidden.dim() != 3
            or hidden.shape[-1] != self.config.hidden_size
            or hidden.shape[:2] != context.positions.shape
        ):
            raise ValueError(
                f"hidden: shape {list(hidden.shape)} given, expected {[*context.positions.shape, self.config.hidden_size]} (context, width)"
            )
        if state is None and context.keep_state:
            state = ModelState(self.config.fingerprint)
        if state is not None and state.fingerprint != self.config.fingerprint:
            raise ForeignStateError(
                f"state: it was made by another model (fingerprint {state.fingerprint}, expected {self.config.fingerprint})"
            )
        if self.lower_bounds is not None:  # anew in every run: a context may outlive a backward pass
            context.tables[LOWER_BOUNDS] = stacked_bounds(self.lower_bounds)
        entries = {}
        for index in range(*blocks.indices(len(self.layers))):
            before = None if state is None else state.read((index, recurrence))
            hidden, after = self.layers[index](hidden, context, before)
            if after is not None:
                entries[index, recurrence] = after
        if state is None or not context.keep_state:
            return hidden, None
        return hidden, ModelState(state.fingerprint, {**state.entries, **entries}, state.lengths, state.valid)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        state: ModelState | None = None,
        use_cache: bool = False,
        cu_seqlens: Tensor | None = None,
        visibility: Visibility = Causal(),
        condition: Tensor | None = None,
    ) -> tuple[Tensor, ModelState | None]:
        """Every block once: ``(hidden after the final norm [B, S, D], state or None)``. ``condition [B, W]`` or ``[B, S, W]``: of a
        model with modulation."""
        if (condition is None) != (self.config.modulation is None):
            raise ValueError(
                f"condition: {'none' if condition is None else 'one'} given, but the model has modulation = "
                f"{self.config.modulation}"
            )
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("input_ids, inputs_embeds: exactly one of the two must be given")
        if isinstance(visibility, BlockCausal):
            raise ValueError(
                "visibility: BlockCausal(...) is run by latentcot.diffusion_reasoning.BlockDiffusionModel, or by `run` with a context "
                "of its own; expected Causal() or Bidirectional() here"
            )
        hidden = self.embed(input_ids) if input_ids is not None else inputs_embeds
        assert hidden is not None
        context = SequenceContext.build(
            hidden.shape[0],
            hidden.shape[1],
            hidden.device,
            attention_mask=attention_mask,
            cu_seqlens=cu_seqlens,
            visibility=visibility,
            state=state,
            keep_state=use_cache or state is not None,
        )
        if condition is not None:
            context.tables[CONDITION] = condition
        hidden, state = self.run(hidden, context, state=state)
        return self.normed(hidden, context), None if state is None else state.advance(context)

    def normed(self, hidden: Tensor, context: SequenceContext | None = None) -> Tensor:
        """The final norm; ``context`` holds the conditioning of a model with modulation."""
        hidden = self.norm(hidden)
        if self.norm_modulation is None:
            return hidden
        if context is None:
            raise ValueError("context: the final norm of a model with modulation needs it for its conditioning")
        shift, scale = self.norm_modulation.read(context)
        return hidden * (1 + scale) + shift


class HybridForCausalLM(HybridPreTrainedModel, GenerationMixin):
    """The backbone with a language-model head."""

    _tied_weights_keys = {"lm_head.weight": "model.embeddings.weight"}  # noqa: RUF012

    def __init__(self, config: HybridConfig):
        super().__init__(config)
        self.model = HybridModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=config.head_bias)
        self.post_init()

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.lm_head = new_embeddings

    def embed(self, input_ids: Tensor) -> Tensor:
        """See :meth:`HybridModel.embed`."""
        return self.model.embed(input_ids)

    def run(
        self,
        hidden: Tensor,
        context: SequenceContext,
        blocks: slice = slice(None),
        state: ModelState | None = None,
        recurrence: int = 0,
    ) -> tuple[Tensor, ModelState | None]:
        """See :meth:`HybridModel.run`."""
        return self.model.run(hidden, context, blocks, state, recurrence)

    def head(self, hidden: Tensor, context: SequenceContext | None = None) -> Tensor:
        """Final norm and language-model head: ``[B, S, D]`` to ``[B, S, Vocab]``. ``context``: only where the model has modulation."""
        return self.lm_head(self.model.normed(hidden, context))

    def new_state(self) -> ModelState:
        """A fresh state of this model."""
        return ModelState(self.config.fingerprint)

    def load_state(self, path: str | os.PathLike[str]) -> ModelState:
        """A state that ``state.save(path)`` wrote, on this model's device. ``ForeignStateError`` if another architecture made it."""
        return ModelState.load(path, self.config.fingerprint, self.device)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        state: ModelState | None = None,
        use_cache: bool | None = None,
        cu_seqlens: Tensor | None = None,
        visibility: Visibility = Causal(),
        logits_to_keep: int = 0,
        condition: Tensor | None = None,
        cache: ModelState | None = None,
        past_key_values: ModelState | None = None,
        return_dict: bool = True,
        **unknown: Any,
    ) -> HybridOutput:
        """Logits of every position, and the next-token loss when ``labels`` are given.

        In training with labels and ``config.loss_chunk``, logits are never held as a whole and come back as ``None``.

        Args:
            input_ids: ``[B, S]``; or ``inputs_embeds [B, S, D]``, used as they are.
            attention_mask: ``[B, S]`` or ``[B, T + S]``; 1 = real, 0 = padding, anywhere.
            labels: ``[B, S]``, -100 = not counted. Position i is scored on label i + 1; across a border of packed sequences and on
                padding nothing is scored.
            state: tokens before; also accepted as ``cache`` or ``past_key_values``, the names ``generate`` uses.
            cu_seqlens: offsets of packed sequences (B = 1).
            visibility: ``Causal()`` or ``Bidirectional()`` (no state then).
            logits_to_keep: logits of the last so many positions only; 0 = all.
            condition: ``[B, W]`` or ``[B, S, W]``, where the model has modulation.
        """
        unknown = {k: v for k, v in unknown.items() if v is not None and k not in _IGNORED_BY_FORWARD}
        if unknown:
            raise TypeError(f"forward: unknown argument(s) {sorted(unknown)}")
        if not isinstance(logits_to_keep, int) or logits_to_keep < 0:
            raise ValueError(f"logits_to_keep: expected a number of positions, or 0 for all, got {logits_to_keep!r}")
        given = [s for s in (state, cache, past_key_values) if s is not None]
        if len(given) > 1:
            raise ValueError("state: give it once, as state, cache or past_key_values")
        state = given[0] if given else None
        if state is not None and not isinstance(state, ModelState):
            raise TypeError(f"state: a latentcot ModelState is needed, got {type(state).__name__}")
        hidden, state = self.model(
            input_ids, attention_mask, inputs_embeds, state, bool(use_cache), cu_seqlens, visibility, condition
        )
        loss = logits = None
        if labels is not None and self.training and self.config.loss_chunk is not None:
            if labels.shape != hidden.shape[:2]:
                raise ValueError(f"labels: shape {list(labels.shape)} given, expected {list(hidden.shape[:2])}")
            targets = next_token_targets(labels, attention_mask, cu_seqlens).flatten()
            rows = hidden[:, :-1].flatten(0, 1)
            loss = summed_cross_entropy(rows, targets, self.lm_head, self.config.loss_chunk)
            loss = loss / (targets != IGNORED).sum()
        else:
            logits = self.lm_head(hidden[:, -logits_to_keep:] if logits_to_keep else hidden)
            if labels is not None:
                loss = next_token_loss(logits, labels, attention_mask, cu_seqlens)
        return HybridOutput(loss=loss, logits=logits, last_hidden_state=hidden, **{CACHE_KEY: state})

    if TYPE_CHECKING:  # the library types `generate` by a protocol that ordinary models do not meet

        def generate(self, *args: Any, **kwargs: Any) -> Any: ...
        def to(self, *args: Any, **kwargs: Any) -> "HybridForCausalLM": ...

    # -- what generate asks ------------------------------------------------------------------------------------------

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False  # our cache is a ModelState, made below

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> None:
        mode = str(getattr(args[0] if args else kwargs.get("generation_mode"), "value", ""))
        if "assisted" in mode or model_kwargs.get("assistant_model") is not None:
            raise ValueError(
                "assistant_model, prompt_lookup_num_tokens: assisted decoding needs a cache that can be cropped, which a recurrent "
                "state is not; use latentcot.backbone.speculative.speculative_generate(target, draft, input_ids)"
            )
        if "state" in model_kwargs:
            model_kwargs[CACHE_KEY] = model_kwargs.pop("state")
        if model_kwargs.get(CACHE_KEY) is None and generation_config.use_cache is not False:
            model_kwargs[CACHE_KEY] = self.new_state()

    def flops(
        self,
        tokens: int,
        keys: float | None = None,
        blocks: slice = slice(None),
        head_tokens: int | None = None,
        directions: int = 1,
    ) -> float:
        """Forward FLOPs of ``tokens`` tokens of one sequence.

        Args:
            keys: keys that each token sees on average in attention; default (tokens + 1) / 2, a causal pass from nothing.
            blocks: which blocks run.
            head_tokens: positions that go through the head; default all.
            directions: 2 for a bidirectional pass (give ``keys=tokens`` then).
        """
        keys = (tokens + 1) / 2 if keys is None else keys
        head_tokens = tokens if head_tokens is None else head_tokens
        head = 2.0 * self.config.vocab_size * self.config.hidden_size * head_tokens
        chosen = cast(list[Block], list(self.model.layers)[blocks])
        return head + sum(block.flops(tokens, keys, directions) for block in chosen)


_IGNORED_BY_FORWARD = {
    "position_ids",
    "output_attentions",
    "output_hidden_states",
    "num_items_in_batch",
    "cache_position",
}
"""Arguments that ``generate`` and trainers pass to every model; positions are worked out from the mask and the state here."""


AutoConfig.register(HybridConfig.model_type, HybridConfig)
AutoModel.register(HybridConfig, HybridModel)
AutoModelForCausalLM.register(HybridConfig, HybridForCausalLM)
