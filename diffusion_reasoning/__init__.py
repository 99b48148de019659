"""Masked-diffusion reasoning: noise schedules, objective, samplers and the ``masked_diffusion`` method on the hybrid
backbone.

Shape letters: B batch, L sequence, V vocabulary (mask token included), P prompt tokens, n new tokens or chosen
positions, R rows of one pass. Time runs from 0 (clean) to 1 (all masked). NFE = network passes. Equations and tables:
``README.md`` here.
"""

from latentcot.diffusion_reasoning.confidence import CONFIDENCES, Confidence, Proposal
from latentcot.diffusion_reasoning.corruption import Corruption, corrupt, subs_logprobs
from latentcot.diffusion_reasoning.denoiser import BackboneDenoiser, Denoiser, as_denoiser
from latentcot.diffusion_reasoning.generation_config import DiffusionGenerationConfig, ancestral, low_confidence
from latentcot.diffusion_reasoning.objective import DiffusionLoss, diffusion_loss
from latentcot.diffusion_reasoning.quota import Bernoulli, Cosine, PassView, Quota, Threshold, Uniform, quota_table
from latentcot.diffusion_reasoning.reasoner import MaskedDiffusion
from latentcot.diffusion_reasoning.remasking import Remasking, ReMDM, Revise, posterior
from latentcot.diffusion_reasoning.samplers import DiffusionOutput, diffusion_generate
from latentcot.diffusion_reasoning.schedule import SCHEDULES, NoiseSchedule, sample_times

__all__ = [
    "CONFIDENCES",
    "SCHEDULES",
    "BackboneDenoiser",
    "Bernoulli",
    "Confidence",
    "Corruption",
    "Cosine",
    "Denoiser",
    "DiffusionGenerationConfig",
    "DiffusionLoss",
    "DiffusionOutput",
    "MaskedDiffusion",
    "NoiseSchedule",
    "PassView",
    "Proposal",
    "Quota",
    "ReMDM",
    "Remasking",
    "Revise",
    "Threshold",
    "Uniform",
    "ancestral",
    "as_denoiser",
    "corrupt",
    "diffusion_generate",
    "diffusion_loss",
    "low_confidence",
    "posterior",
    "quota_table",
    "sample_times",
    "subs_logprobs",
]
