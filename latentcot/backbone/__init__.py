"""The hybrid backbone: mixers, blocks, states and the language model that every method here thinks with."""

from latentcot.backbone.block import Block, SwiGLU
from latentcot.backbone.config import HybridConfig
from latentcot.backbone.context import SequenceContext
from latentcot.backbone.mixers import MIXERS, Mixer
from latentcot.backbone.model import HybridForCausalLM, HybridModel, HybridOutput, next_token_loss
from latentcot.backbone.norms import GatedRMSNorm, RMSNorm
from latentcot.backbone.state import LayerState, ModelState

__all__ = [
    "MIXERS",
    "Block",
    "GatedRMSNorm",
    "HybridConfig",
    "HybridForCausalLM",
    "HybridModel",
    "HybridOutput",
    "LayerState",
    "Mixer",
    "ModelState",
    "RMSNorm",
    "SequenceContext",
    "SwiGLU",
    "next_token_loss",
]
