"""Masked-diffusion reasoning: noise schedules, objective, samplers and the ``masked_diffusion`` method on the hybrid
backbone.

Shape letters: B batch, L sequence, V vocabulary (mask token included), P prompt tokens, n new tokens or chosen
positions, R rows of one pass. Time runs from 0 (clean) to 1 (all masked). NFE = network passes. Equations and tables:
``README.md`` here.
"""

from latentcot.diffusion_reasoning.block_diffusion import (
    BlockDiffusion,
    BlockDiffusionModel,
    BlockState,
    block_diffusion_loss,
    block_generate,
)
from latentcot.diffusion_reasoning.block_plan import quota_table
from latentcot.diffusion_reasoning.carry import CARRIES, Carry, SoftMask, make_carry
from latentcot.diffusion_reasoning.confidence import CONFIDENCES, Confidence, Proposal, register_order
from latentcot.diffusion_reasoning.convert import (
    ConvertedModel,
    MaskAnnealing,
    ar_to_diffusion,
    causal_loss,
    conversion_loss,
)
from latentcot.diffusion_reasoning.convert_blocks import BlockGrowth, ar_to_block_diffusion
from latentcot.diffusion_reasoning.corruption import Corruption, corrupt, subs_logprobs
from latentcot.diffusion_reasoning.denoiser import BackboneDenoiser, Denoiser, as_denoiser, shift_right
from latentcot.diffusion_reasoning.depth import (
    DepthPoint,
    accuracy_by_steps,
    fixed_point_residual,
    generate_best_length,
)
from latentcot.diffusion_reasoning.diffusion_checkpoint import (
    export_published,
    load_diffusion_checkpoint,
    read_published_config,
)
from latentcot.diffusion_reasoning.diffusion_lm import DiffusionConfig, DiffusionLM
from latentcot.diffusion_reasoning.generation_config import DiffusionGenerationConfig
from latentcot.diffusion_reasoning.likelihood import Bound, exact_bound, guided_score, loglikelihood_bound
from latentcot.diffusion_reasoning.named_samplers import (
    ancestral,
    dream,
    easy_first,
    first_hitting,
    low_confidence,
    named_sampler,
)
from latentcot.diffusion_reasoning.objective import DiffusionLoss, diffusion_loss
from latentcot.diffusion_reasoning.policy import DiffuGRPO
from latentcot.diffusion_reasoning.policy_estimators import Coupled, Elbo, OneStep, PathProbability, Rollout
from latentcot.diffusion_reasoning.quota import (
    QUOTAS,
    Bernoulli,
    Cosine,
    Dream,
    EasyFirst,
    EntropyBudget,
    Factor,
    FirstHitting,
    PassView,
    Quota,
    Threshold,
    Uniform,
    register_quota,
)
from latentcot.diffusion_reasoning.reasoner import MaskedDiffusion
from latentcot.diffusion_reasoning.recipes import RECIPES, Recipe, answer_rows, find_recipe, random_length
from latentcot.diffusion_reasoning.remasking import REMASKINGS, Remasking, ReMDM, Revise, posterior, register_remask
from latentcot.diffusion_reasoning.samplers import DiffusionOutput, diffusion_generate, fill_block
from latentcot.diffusion_reasoning.schedule import SCHEDULES, NoiseSchedule, sample_times
from latentcot.diffusion_reasoning.stopping import unigram_entropy
from latentcot.diffusion_reasoning.trajectory import Trajectory

__all__ = [
    "CARRIES",
    "CONFIDENCES",
    "QUOTAS",
    "RECIPES",
    "REMASKINGS",
    "SCHEDULES",
    "BackboneDenoiser",
    "Bernoulli",
    "BlockDiffusion",
    "BlockDiffusionModel",
    "BlockGrowth",
    "BlockState",
    "Bound",
    "Carry",
    "Confidence",
    "ConvertedModel",
    "Corruption",
    "Cosine",
    "Coupled",
    "Denoiser",
    "DepthPoint",
    "DiffuGRPO",
    "DiffusionConfig",
    "DiffusionGenerationConfig",
    "DiffusionLM",
    "DiffusionLoss",
    "DiffusionOutput",
    "Dream",
    "EasyFirst",
    "Elbo",
    "EntropyBudget",
    "Factor",
    "FirstHitting",
    "MaskAnnealing",
    "MaskedDiffusion",
    "NoiseSchedule",
    "OneStep",
    "PassView",
    "PathProbability",
    "Proposal",
    "Quota",
    "ReMDM",
    "Recipe",
    "Remasking",
    "Revise",
    "Rollout",
    "SoftMask",
    "Threshold",
    "Trajectory",
    "Uniform",
    "accuracy_by_steps",
    "ancestral",
    "answer_rows",
    "ar_to_block_diffusion",
    "ar_to_diffusion",
    "as_denoiser",
    "block_diffusion_loss",
    "block_generate",
    "causal_loss",
    "conversion_loss",
    "corrupt",
    "diffusion_generate",
    "diffusion_loss",
    "dream",
    "easy_first",
    "exact_bound",
    "export_published",
    "fill_block",
    "find_recipe",
    "first_hitting",
    "fixed_point_residual",
    "generate_best_length",
    "guided_score",
    "load_diffusion_checkpoint",
    "loglikelihood_bound",
    "low_confidence",
    "make_carry",
    "named_sampler",
    "posterior",
    "quota_table",
    "random_length",
    "read_published_config",
    "register_order",
    "register_quota",
    "register_remask",
    "sample_times",
    "shift_right",
    "subs_logprobs",
    "unigram_entropy",
]
