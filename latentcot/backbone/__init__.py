"""The hybrid backbone: mixers, blocks, states and the language model that every method here thinks with."""

from latentcot.backbone.block import Block, SwiGLU
from latentcot.backbone.checkpoint import LoadReport, export_checkpoint, load_checkpoint
from latentcot.backbone.checkpoint_config import CheckpointError, UnknownFamilyError
from latentcot.backbone.checkpoint_keys import CheckpointMismatchError
from latentcot.backbone.config import HybridConfig
from latentcot.backbone.context import SequenceContext
from latentcot.backbone.mixers import MIXERS, Mixer
from latentcot.backbone.model import HybridForCausalLM, HybridModel, HybridOutput, next_token_loss
from latentcot.backbone.norms import GatedRMSNorm, RMSNorm
from latentcot.backbone.patterns import PatternError, describe_pattern, parse_pattern
from latentcot.backbone.presets import preset, preset_names, state_bytes
from latentcot.backbone.state import LayerState, ModelState

__all__ = [
    "MIXERS",
    "Block",
    "CheckpointError",
    "CheckpointMismatchError",
    "GatedRMSNorm",
    "HybridConfig",
    "HybridForCausalLM",
    "HybridModel",
    "HybridOutput",
    "LayerState",
    "LoadReport",
    "Mixer",
    "ModelState",
    "PatternError",
    "RMSNorm",
    "SequenceContext",
    "SwiGLU",
    "UnknownFamilyError",
    "describe_pattern",
    "export_checkpoint",
    "load_checkpoint",
    "next_token_loss",
    "parse_pattern",
    "preset",
    "preset_names",
    "state_bytes",
]
