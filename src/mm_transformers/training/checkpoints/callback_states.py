"""The states of callbacks in a checkpoint, such as the patience of early stopping."""

from transformers import EarlyStoppingCallback, TrainerCallback, TrainerState
from transformers.trainer_callback import ExportableState


def restore_callbacks(callbacks: list[TrainerCallback], state: TrainerState, is_restored: bool) -> bool:
    """
    Restores the states of callbacks from a checkpoint.

    Args:
        callbacks: of the trainer.
        state: that of the checkpoint. It gets an entry for each callback that did not exist when it was written.
        is_restored: whether the Trainer has restored them, and their settings too
            (`restore_callback_states_from_checkpoint`).

    Returns:
        Whether early stopping had stopped the training.
    """
    was_stopped = False
    for callback in callbacks:
        if isinstance(callback, ExportableState):
            saved = state.stateful_callbacks.setdefault(type(callback).__name__, callback.state())
            if isinstance(saved, dict) and not is_restored:
                for name, value in saved.get("attributes", {}).items():
                    setattr(callback, name, value)
        if isinstance(callback, EarlyStoppingCallback):
            patience = max(callback.early_stopping_patience, 1)
            was_stopped |= callback.early_stopping_patience_counter >= patience
    return was_stopped
