"""The task weightings of the package: one line each."""

from .base import WEIGHTINGS, StepSignals, TaskWeighting, WeightedTasks, build_weighting, register_weighting
from .db_mtl import DBMTLWeighting
from .famo import FAMOWeighting
from .gradnorm import GradNormWeighting
from .pcgrad import PCGradWeighting
from .static import StaticWeighting
from .uncertainty import UncertaintyWeighting


__all__ = [
    "WEIGHTINGS",
    "DBMTLWeighting",
    "FAMOWeighting",
    "GradNormWeighting",
    "PCGradWeighting",
    "StaticWeighting",
    "StepSignals",
    "TaskWeighting",
    "UncertaintyWeighting",
    "WeightedTasks",
    "build_weighting",
    "register_weighting",
]
