"""Explains answers and measures the contribution of modalities; imported at first use."""

import importlib
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from .ablation import Ablation, ablate
    from .calibration import CalibrationResult, calibrate
    from .contrastive import contrastive_accuracy
    from .explaining.explain import explain
    from .explaining.explanation import Explanation
    from .explaining.faithfulness import Faithfulness, faithfulness

_MODULES = {
    "ablation": ["Ablation", "ablate"],
    "calibration": ["CalibrationResult", "calibrate"],
    "contrastive": ["contrastive_accuracy"],
    "explaining.explain": ["explain"],
    "explaining.explanation": ["Explanation"],
    "explaining.faithfulness": ["Faithfulness", "faithfulness"],
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name in _MODULE_OF:
        return getattr(importlib.import_module(f".{_MODULE_OF[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = [
    "Ablation",
    "CalibrationResult",
    "Explanation",
    "Faithfulness",
    "ablate",
    "calibrate",
    "contrastive_accuracy",
    "explain",
    "faithfulness",
]
