"""Fits how far to trust the answers of a model, and measures it."""

from .calibrate import calibrate
from .results import CalibrationResult, GroupMeasures


__all__ = ["CalibrationResult", "GroupMeasures", "calibrate"]
