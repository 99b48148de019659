"""The backbone as a model of lm-eval: log-likelihoods, rolling log-likelihoods and greedy generation.

lm-eval's own class for transformers models does the work, batches and caches included; this one makes our models known to it (their
Auto classes are registered by importing the backbone), checks what it would only complain of later, and offers a tokenizer of bytes.

.. code-block:: python

    from lm_eval import simple_evaluate
    from latentcot.evaluation import LatentCotLM

    results = simple_evaluate(LatentCotLM("out/model", tokenizer="out/tokenizer"), tasks=["lambada_openai", "piqa"])
"""

import os
from pathlib import Path
from typing import Any

from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from transformers import AutoTokenizer, ByT5Tokenizer

from latentcot.backbone import HybridForCausalLM

_Base: Any = HFLM  # its decorator makes it abstract in the eyes of type checkers


class LatentCotLM(_Base):
    """
    Args:
        pretrained: a :class:`HybridForCausalLM`, or a folder that its ``save_pretrained`` wrote.
        tokenizer: of transformers, or a folder of one, or ``"bytes"``: UTF-8 bytes shifted by three ids; ``None`` = the one in the
            model's folder.
        max_length: longest input in tokens; longer contexts lose their beginning. Our models have no limit of their own.
        batch_size: requests a pass.
        device: default the model's own, or CUDA where there is one.
        options: of lm-eval's ``HFLM`` (``dtype``, ``prefix_token_id``, ...).

    Raises:
        ValueError: a folder that holds no model, no tokenizer, or a tokenizer with more ids than the model.
        TypeError: another kind of model.
    """

    def __init__(
        self,
        pretrained: HybridForCausalLM | str | os.PathLike[str],
        tokenizer: Any = None,
        max_length: int = 2048,
        batch_size: int = 8,
        device: str | None = None,
        **options: Any,
    ):
        if isinstance(pretrained, str | os.PathLike):
            folder = Path(pretrained)
            if not (folder / "config.json").is_file():
                raise ValueError(f"pretrained: {folder} holds no config.json, so it is not a saved model")
            if tokenizer is None and not any(folder.glob("tokenizer*")):
                raise ValueError(f"tokenizer: {folder} holds none; name one, or 'bytes'")
            model = HybridForCausalLM.from_pretrained(folder)
            tokenizer = folder if tokenizer is None else tokenizer
        elif isinstance(pretrained, HybridForCausalLM):
            model = pretrained
            if tokenizer is None:
                raise ValueError("tokenizer: a model in memory has none; give one, or 'bytes'")
        else:
            raise TypeError(f"pretrained: expected a HybridForCausalLM or a folder, got {type(pretrained).__name__}")
        if isinstance(max_length, bool) or not isinstance(max_length, int) or max_length < 2:
            raise ValueError(f"max_length: expected an integer of at least 2, got {max_length!r}")
        if isinstance(tokenizer, str) and tokenizer == "bytes":
            tokenizer = ByT5Tokenizer(extra_ids=0)
        elif isinstance(tokenizer, str | os.PathLike):
            tokenizer = AutoTokenizer.from_pretrained(tokenizer)
        if tokenizer.bos_token_id is None:
            # Otherwise special tokens are the tokenizer's business, and one without <bos> may close a context with its end token.
            options.setdefault("add_bos_token", False)
        if device is not None:
            model = model.to(device)
        super().__init__(
            pretrained=model.eval(),  # type: ignore[arg-type]
            backend="causal",
            tokenizer=tokenizer,
            max_length=max_length,
            batch_size=batch_size,
            **options,
        )
        if len(self.tokenizer) > model.config.vocab_size:
            raise ValueError(
                f"tokenizer: it has {len(self.tokenizer)} ids, the model knows {model.config.vocab_size}: they do not belong together"
            )


register_model("latentcot")(LatentCotLM)  # as a call: the decorator would hide the class from type checkers
