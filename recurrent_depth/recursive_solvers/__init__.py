"""Small recursive solvers: HRM and TRM, and deep supervision with carry for any module.

``DeepSupervision(RecursiveSolver(trm(6, 16)))`` is a model; :class:`SolverTraining` trains one on grids.
"""

from latentcot.recurrent_depth.recursive_solvers.config import SolverConfig, hrm, trm
from latentcot.recurrent_depth.recursive_solvers.optimisers import ArctangentAdam, SignDescent
from latentcot.recurrent_depth.recursive_solvers.reasoner import HRMReasoner, SolverReasoner, TRMReasoner
from latentcot.recurrent_depth.recursive_solvers.solver import PositionMLP, RecursiveSolver, SegmentOutput
from latentcot.recurrent_depth.recursive_solvers.supervision import (
    IGNORED,
    DeepSupervision,
    SegmentLoss,
    Solution,
    SupervisionCarry,
    SupervisionConfig,
    softmax_cross_entropy,
    stablemax_cross_entropy,
    stablemax_log_probs,
)
from latentcot.recurrent_depth.recursive_solvers.training import SolverTraining, TrainingResult, train_solver

__all__ = [
    "IGNORED",
    "ArctangentAdam",
    "DeepSupervision",
    "HRMReasoner",
    "PositionMLP",
    "RecursiveSolver",
    "SegmentLoss",
    "SegmentOutput",
    "SignDescent",
    "Solution",
    "SolverConfig",
    "SolverReasoner",
    "SolverTraining",
    "SupervisionCarry",
    "SupervisionConfig",
    "TRMReasoner",
    "TrainingResult",
    "hrm",
    "softmax_cross_entropy",
    "stablemax_cross_entropy",
    "stablemax_log_probs",
    "train_solver",
    "trm",
]
