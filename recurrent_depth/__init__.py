"""Recurrent depth: the same blocks run again and again, so that thinking longer needs no more parameters.

:class:`DepthRecurrence` is the method; the values :class:`InitialState`, :class:`Injection`, :class:`StepSampler`,
:class:`GradientWindow`, :class:`ExitRule`, :class:`StepCache` and :class:`Readout` are what a published variant is a combination of.
:class:`Ouro`, :class:`UniversalTransformer`, :class:`PonderNet`, :class:`MixtureOfRecursions`, :class:`CoTFormer` and
:class:`PonderLM` halt, route or ponder in ways of their own. Latent thoughts (Coconut) live in
:mod:`latentcot.recurrent_depth.latent_thoughts`.
"""

from latentcot.recurrent_depth.act import UniversalTransformer
from latentcot.recurrent_depth.cotformer import CoTFormer
from latentcot.recurrent_depth.depth_recurrence import DepthRecurrence
from latentcot.recurrent_depth.example_queue import ExampleQueue
from latentcot.recurrent_depth.exit_rule import ExitRule
from latentcot.recurrent_depth.gradient_window import GradientWindow
from latentcot.recurrent_depth.huginn import (
    HUGINN_STOP,
    HUGINN_TOKENS,
    HuginnShape,
    build_huginn,
    huginn_chat,
    init_huginn,
)
from latentcot.recurrent_depth.huginn_checkpoint import export_huginn, load_huginn
from latentcot.recurrent_depth.huginn_speculative import SelfSpeculation, self_speculative_generate
from latentcot.recurrent_depth.initial_state import InitialState
from latentcot.recurrent_depth.injection import Adapter, Injection
from latentcot.recurrent_depth.loop import DepthLoop, LoopOutput
from latentcot.recurrent_depth.mixture_of_recursions import MixtureOfRecursions
from latentcot.recurrent_depth.monitors import diagnose, relative_residual, state_rms, token_correlation
from latentcot.recurrent_depth.ouro import Ouro
from latentcot.recurrent_depth.ouro_checkpoint import load_ouro
from latentcot.recurrent_depth.ponder_lm import PonderLM
from latentcot.recurrent_depth.ponder_net import PonderNet
from latentcot.recurrent_depth.readout import Readout
from latentcot.recurrent_depth.retrofit import Cut, retrofit
from latentcot.recurrent_depth.step_cache import StepCache
from latentcot.recurrent_depth.step_sampler import StepSampler
from latentcot.recurrent_depth.wavefront import Wavefront, WavefrontOutput, wavefront_generate

__all__ = [
    "HUGINN_STOP",
    "HUGINN_TOKENS",
    "Adapter",
    "CoTFormer",
    "Cut",
    "DepthLoop",
    "DepthRecurrence",
    "ExampleQueue",
    "ExitRule",
    "GradientWindow",
    "HuginnShape",
    "InitialState",
    "Injection",
    "LoopOutput",
    "MixtureOfRecursions",
    "Ouro",
    "PonderLM",
    "PonderNet",
    "Readout",
    "SelfSpeculation",
    "StepCache",
    "StepSampler",
    "UniversalTransformer",
    "Wavefront",
    "WavefrontOutput",
    "build_huginn",
    "diagnose",
    "export_huginn",
    "huginn_chat",
    "init_huginn",
    "load_huginn",
    "load_ouro",
    "relative_residual",
    "retrofit",
    "self_speculative_generate",
    "state_rms",
    "token_correlation",
    "wavefront_generate",
]
