"""Ends a training with a NaN or infinite loss or weight, since it cannot learn any more."""

import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch

from .checkpoints import newest_complete_checkpoint


def check_finite(
    numbers: Mapping[str, Any], what: str, step: int, run_dir: Callable[[], str], trial: Any = None
) -> None:
    """
    Ends the training at NaN or infinite numbers.

    Args:
        numbers: name -> tensor or number.
        what: the word for these, such as "loss".
        step: number of the optimiser step.
        run_dir: returns the folder of the checkpoints.
        trial: of a hyperparameter search, if this training is one.

    Raises:
        ValueError: if a number is NaN or infinite; in a trial of Optuna `TrialPruned`, so that the search continues.
    """
    bad = [name for name, values in numbers.items() if not torch.isfinite(torch.as_tensor(values)).all()]
    if not bad:
        return
    good = newest_complete_checkpoint(run_dir())
    kept = "there is no checkpoint before it" if good is None else f"{good} is the newest checkpoint before it"
    message = (
        f"Training has diverged: at step {step} the {what} of {bad[-1]} is NaN or infinite ({kept}). Try a smaller "
        "learning rate, more warm-up, or float32 or bf16 in place of fp16."
    )
    if isinstance(trial, getattr(sys.modules.get("optuna"), "Trial", ())):
        raise sys.modules["optuna"].TrialPruned(message)
    raise ValueError(message)
