"""The hybrid backbone: mixers, blocks, states and the language model that every method here thinks with."""

from latentcot.backbone.batching import ContinuousBatcher, generate_many
from latentcot.backbone.block import Block, SwiGLU
from latentcot.backbone.checkpoint import LoadReport, export_checkpoint, load_checkpoint
from latentcot.backbone.checkpoint_config import CheckpointError, UnknownFamilyError
from latentcot.backbone.checkpoint_keys import CheckpointMismatchError
from latentcot.backbone.config import HybridConfig
from latentcot.backbone.context import SequenceContext
from latentcot.backbone.engine import DecodeEngine
from latentcot.backbone.generation import Sampling, prefill
from latentcot.backbone.layout import lay_out_for_decoding
from latentcot.backbone.loss import next_token_loss
from latentcot.backbone.mixers import MIXERS, Mixer
from latentcot.backbone.model import HybridForCausalLM, HybridModel, HybridOutput
from latentcot.backbone.norms import GatedRMSNorm, RMSNorm
from latentcot.backbone.patterns import PatternError, describe_pattern, parse_pattern
from latentcot.backbone.presets import preset, preset_names, state_bytes
from latentcot.backbone.speculative import SpeculativeOutput, speculative_generate
from latentcot.backbone.state import ForeignStateError, LayerState, ModelState

__all__ = [
    "MIXERS",
    "Block",
    "CheckpointError",
    "CheckpointMismatchError",
    "ContinuousBatcher",
    "DecodeEngine",
    "ForeignStateError",
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
    "Sampling",
    "SequenceContext",
    "SpeculativeOutput",
    "SwiGLU",
    "UnknownFamilyError",
    "describe_pattern",
    "export_checkpoint",
    "generate_many",
    "lay_out_for_decoding",
    "load_checkpoint",
    "next_token_loss",
    "parse_pattern",
    "prefill",
    "preset",
    "preset_names",
    "speculative_generate",
    "state_bytes",
]
