r"""Huginn as a combination of values: its exact configuration, its initialisation, its layout of a chat.

.. math::
    e &= \mathrm{Prelude}(\sqrt D\, E[x]), \quad s_i = \mathrm{Core}(A\,[s_{i-1}; e]), \quad
    p = \mathrm{softmax}(E\, n(\mathrm{Coda}(n(s_r))))

Every block normalises the residual stream itself, :math:`u = n_2(x + \mathrm{Attn}(n_1(x)))`,
:math:`y = n_4(u + \mathrm{MLP}(n_3(u)))`; queries and keys have a bias, applied before interleaved rotary positions. Names of
the released weights: :mod:`~latentcot.recurrent_depth.huginn_checkpoint`. Source: arXiv:2502.05171 and ``huginn-0125``.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.initialization import no_init_weights

from latentcot.backbone import HybridConfig, HybridForCausalLM
from latentcot.backbone.norms import RMSNorm
from latentcot.recurrent_depth.depth_recurrence import DepthRecurrence
from latentcot.recurrent_depth.injection import Adapter
from latentcot.recurrent_depth.settings import check_keys

CLIP = 3.0  # standard deviations at which a starting weight is cut


@dataclass(frozen=True)
class HuginnShape:
    """Sizes; the defaults are those of ``huginn-0125`` (3,564,976,800 parameters, a tied head counted once).

    Args:
        prelude, core, coda: blocks of each part.
        vocab_size, hidden_size, num_heads, intermediate_size: V, D, H, MLP width.
        mean_recurrences: of the sampler, and r when answering.
        backprop: how many of the last recurrences carry gradient.
        rope_theta, norm_eps: base of the rotary angles, epsilon of the norms.
    """

    prelude: int = 2
    core: int = 4
    coda: int = 2
    vocab_size: int = 65536
    hidden_size: int = 5280
    num_heads: int = 55
    intermediate_size: int = 17920
    mean_recurrences: int = 32
    backprop: int = 8
    rope_theta: float = 50_000.0
    norm_eps: float = 1e-6

    def backbone(self) -> HybridConfig:
        """The blocks as a backbone configuration."""
        return HybridConfig(
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
            num_hidden_layers=self.prelude + self.core + self.coda,
            mixer="attention",
            intermediate_size=self.intermediate_size,
            norm_placement="sandwich_post_residual",
            norm_eps=self.norm_eps,
            embedding_scale=math.sqrt(self.hidden_size),
            attention={
                "num_heads": self.num_heads,
                "rope_theta": self.rope_theta,
                "rotary_layout": "interleaved",
                "bias": "qk",
            },
            initializer_range=math.sqrt(2 / (5 * self.hidden_size)),
            tie_word_embeddings=True,
            bos_token_id=HUGINN_TOKENS["begin_of_text"],
            eos_token_id=HUGINN_TOKENS["end_of_text"],
            pad_token_id=HUGINN_TOKENS["pad"],
        )

    def settings(self) -> dict[str, Any]:
        """The loop as settings of :class:`~latentcot.recurrent_depth.DepthRecurrence`; the values that are its defaults
        are left out."""
        return {
            "prelude": self.prelude,
            "core": self.core,
            "coda": self.coda,
            "sampler": {"mean": self.mean_recurrences},
            "gradient_window": self.backprop,
        }

    @property
    def effective_depth(self) -> int:
        """Blocks that a token passes at the mean number of recurrences: 132 for ``huginn-0125``."""
        return self.prelude + self.mean_recurrences * self.core + self.coda


def build_huginn(
    shape: HuginnShape | None = None,
    settings: Mapping[str, Any] | None = None,
    *,
    device: torch.device | str = "cpu",
    generator: torch.Generator | None = None,
) -> DepthRecurrence:
    """A Huginn with starting weights; on the ``meta`` device without any.

    Args:
        shape: sizes; default ``huginn-0125``.
        settings: override those of :meth:`HuginnShape.settings`.
        generator: of the starting weights.
    """
    shape = HuginnShape() if shape is None else shape
    with torch.device(device), no_init_weights():
        model = DepthRecurrence(HybridForCausalLM(shape.backbone()), {**shape.settings(), **(settings or {})})
    model.backbone.tie_weights()
    if torch.device(device).type != "meta":
        init_huginn(model, shape.effective_depth, generator)
    return model


@torch.no_grad()
def init_huginn(model: DepthRecurrence, effective_depth: int, generator: torch.Generator | None = None) -> None:
    r"""Starting weights of the release, in place.

    ============================================ ==========================================================
    tensor                                       starts as
    ============================================ ==========================================================
    linear weights, embedding, adapter           normal of variance 2 / (5 D), cut at ±3 deviations
    projections into the residual (attention     normal of variance 1 / (5 D l), cut the same way; l is the
    output, MLP output)                          effective depth
    norm weights / biases                        1 / 0
    ============================================ ==========================================================

    Both halves of the gated projection start alike, as in the pretraining code; another released file gives the linear
    half the smaller deviation.
    """
    width = model.backbone.config.hidden_size
    plain, small = math.sqrt(2 / (5 * width)), math.sqrt(1 / (5 * width * effective_depth))
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            _cut_normal(module.weight, small if name.endswith((".o_proj", ".down_proj")) else plain, generator)
            if isinstance(module, nn.Linear) and module.bias is not None:
                module.bias.zero_()
        elif isinstance(module, RMSNorm) and module.weight is not None:
            module.weight.fill_(1.0)
        elif isinstance(module, Adapter):
            for weight in module.parameters():
                _cut_normal(weight, plain, generator)
    model.backbone.tie_weights()


def _cut_normal(weight: Tensor, std: float, generator: torch.Generator | None) -> None:
    nn.init.trunc_normal_(weight, 0.0, std, -CLIP * std, CLIP * std, generator=generator)


# -- tokens and chats --------------------------------------------------------------------------------------------------

HUGINN_TOKENS: dict[str, int] = {
    "begin_of_text": 65504,
    "end_of_text": 65505,
    "begin_header": 65506,
    "end_header": 65507,
    "end_turn": 65508,
    "pad": 65509,
}
"""Special ids of ``huginn-0125``; 65510 to 65513 are those of fill-in-the-middle."""

HUGINN_STOP = (65504, 65505, 65508)
ASSISTANT = "Huginn"


def huginn_chat(
    messages: Sequence[Mapping[str, str]], encode: Callable[[str], list[int]], generation_prompt: bool = True
) -> list[int]:
    """Token ids of a conversation: begin of text once, then for each message its role between header tokens, a blank line,
    its content and the end of turn. Last comes the open header of the model's own turn, or, without
    ``generation_prompt``, the end of text.

    Args:
        messages: ``{"role": ..., "content": ...}``; the role ``assistant`` is written as ``Huginn``.
        encode: text to ids, without special tokens.

    Raises:
        ValueError: a message with other keys, or without one of the two.
    """
    t = HUGINN_TOKENS
    ids = [t["begin_of_text"]]
    for number, message in enumerate(messages):
        check_keys(f"messages[{number}]", message, ("role", "content"))
        if len(message) != 2:
            raise ValueError(f"messages[{number}]: {sorted(message)} given, expected role and content")
        role = ASSISTANT if message["role"] == "assistant" else message["role"]
        ids += [t["begin_header"], *encode(role), t["end_header"], *encode("\n\n" + message["content"]), t["end_turn"]]
    if generation_prompt:
        return [*ids, t["begin_header"], *encode(ASSISTANT), t["end_header"], *encode("\n\n")]
    return [*ids, t["end_of_text"]]
