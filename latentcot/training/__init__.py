"""Training: one loop for every method, checkpoints that resume exactly, and the count of what it cost."""

from latentcot.training.budget import FlopCounter, count_parameters
from latentcot.training.checkpoint import load_checkpoint, save_checkpoint
from latentcot.training.loop import BatchSource, TrainConfig, TrainReport, phase_borders, rate, train
from latentcot.training.progress import progress_bar, training_progress

__all__ = [
    "BatchSource",
    "FlopCounter",
    "TrainConfig",
    "TrainReport",
    "count_parameters",
    "load_checkpoint",
    "phase_borders",
    "progress_bar",
    "rate",
    "save_checkpoint",
    "train",
    "training_progress",
]
