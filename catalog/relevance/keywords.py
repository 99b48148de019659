"""The keyword rule: the baseline that the trained scorer has to beat.

One point for every phrase of the field in the title, half a point for a weaker word, one point less for a word that
names another field. It is what a query of an alert service can do, and nothing here was fitted to data.
"""

import math
import re
from dataclasses import dataclass

_STRONG = (
    r"latent (?:reasoning|thoughts?|thinking|chain)", r"reasoning in (?:a )?(?:continuous )?latent", r"continuous thoughts?",
    r"soft thinking", r"implicit (?:reasoning|chain|cot)", r"looped", r"recurrent[- ]depth", r"depth[- ]recurren\w+",
    r"universal transformers?", r"recursive (?:transformers?|reasoning)", r"pause tokens?",
    r"diffusion (?:large )?language models?", r"diffusion llms?", r"\bdllms?", r"masked diffusion", r"text diffusion",
    r"linear attention", r"state[- ]space models?", r"mamba", r"rwkv", r"test-time training",
    r"deep equilibrium", r"multi-hop reasoning",
)  # fmt: skip
_WEAK = (
    r"latent", r"implicit", r"continuous", r"recurrent", r"recursive", r"loops?", r"diffusion", r"hidden states?",
    r"layers?", r"internali[sz]\w+", r"test-time", r"reasoning", r"language models?", r"llms?", r"transformers?",
)  # fmt: skip
_AGAINST = (
    r"images?", r"videos?", r"text-to-image", r"stable diffusion", r"closed-loop", r"in-the-loop", r"speech", r"audio",
    r"robot\w*", r"medical", r"clinical", r"3d", r"traffic", r"recommend\w+",
)  # fmt: skip


def _compiled(patterns: tuple[str, ...]) -> re.Pattern[str]:
    return re.compile(rf"(?<!\w)(?:{'|'.join(patterns)})(?!\w)", re.IGNORECASE)


_RULES = ((_compiled(_STRONG), 1.0), (_compiled(_WEAK), 0.25), (_compiled(_AGAINST), -0.5))


@dataclass(frozen=True)
class KeywordScore:
    """``points`` as the rule counts them, the same squeezed to [0, 1], and the terms that counted for the paper."""

    points: float
    probability: float
    terms: tuple[str, ...]


def keyword_score(title: str) -> KeywordScore:
    """The keyword rule's verdict on a title."""
    points, terms = 0.0, []
    for pattern, worth in _RULES:
        found = dict.fromkeys(match.group().lower() for match in pattern.finditer(title))
        points += worth * len(found)
        if worth > 0:
            terms += list(found)
    return KeywordScore(points, 1 / (1 + math.exp(-3 * (points - 1))), tuple(dict.fromkeys(terms)))
