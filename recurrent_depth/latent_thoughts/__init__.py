"""Latent thoughts: slots in the sequence that hold vectors instead of tokens (training-induced recurrence).

Importing this package registers ``coconut`` and its controls ``coconut_no_latents`` and ``coconut_pause``.
"""

from latentcot.recurrent_depth.latent_thoughts.ablation import SlotAblation
from latentcot.recurrent_depth.latent_thoughts.coconut import (
    Coconut,
    CoconutNoLatents,
    CoconutPause,
    LatentReasoner,
    Thoughts,
)
from latentcot.recurrent_depth.latent_thoughts.curriculum import Curriculum
from latentcot.recurrent_depth.latent_thoughts.slot_writer import SlotWriter

__all__ = [
    "Coconut",
    "CoconutNoLatents",
    "CoconutPause",
    "Curriculum",
    "LatentReasoner",
    "SlotAblation",
    "SlotWriter",
    "Thoughts",
]
