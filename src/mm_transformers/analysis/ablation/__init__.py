"""Measures the contribution of each modality: rows with it, without it, and with that of other rows."""

from .ablate import ablate
from .results import Ablation


__all__ = ["Ablation", "ablate"]
