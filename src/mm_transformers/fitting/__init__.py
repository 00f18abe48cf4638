"""From a table to a trained model in one call."""

from .fit import FitResult, fit
from .plan import Plan, plan_fit


__all__ = ["FitResult", "Plan", "fit", "plan_fit"]
