"""
The internals of [`~transformers.Trainer`] that [`MMTrainer`] needs: methods that it overrides or calls, and attributes.

A release of transformers may change any of these without notice. `tests/training/test_trainer_hooks.py` compares this
table with the installed release.
"""

from typing import NamedTuple


class Hook(NamedTuple):
    """
    A method of the Trainer.

    Args:
        parameters: its parameter names, in order; later ones may be added.
        callers: the method of the Trainer that calls it -> the number of places.
    """

    parameters: tuple[str, ...]
    callers: dict[str, int]


def _hook(parameters: str, **callers: int) -> Hook:
    return Hook(tuple(parameters.split()), callers)


HOOKS: dict[str, Hook] = {
    # Rows and batches. `_get_dataloader` uses `self.data_collator` and `args.dataloader_drop_last`.
    "_get_train_sampler": _hook("train_dataset", get_train_dataloader=1),
    "_get_eval_sampler": _hook("eval_dataset", get_eval_dataloader=1, get_test_dataloader=1),
    "get_eval_dataloader": _hook("eval_dataset", evaluate=1),
    "_get_dataloader": _hook(
        "dataset description batch_size sampler_fn is_training dataloader_key",
        get_train_dataloader=1,
        get_eval_dataloader=1,
        get_test_dataloader=1,
    ),
    # Losses. `_get_num_items_in_batch` also runs in an evaluation, which must not change the training.
    "get_batch_samples": _hook("epoch_iterator num_batches device", _run_epoch=1),
    "_get_num_items_in_batch": _hook("batch_samples device", get_batch_samples=1, prediction_step=1),
    "training_step": _hook("model inputs num_items_in_batch", _run_epoch=1),
    "compute_loss": _hook("model inputs return_outputs num_items_in_batch", training_step=1, prediction_step=1),
    "_prepare_inputs": _hook("inputs", training_step=1, prediction_step=1),
    "log": _hook("logs start_time", _maybe_log_save_evaluate=1, _finalize_training=1, evaluate=1),
    # Optimiser
    "get_decay_parameter_names": _hook("model", create_optimizer=1),
    "create_optimizer": _hook("model", create_optimizer_and_scheduler=1, _prepare_for_training=2),
    # The training loop. `_inner_training_loop` gets all arguments but the batch size by name, `_run_epoch` all.
    # `_maybe_log_save_evaluate` is called after each step, and once more at the end of an epoch.
    "_inner_training_loop": _hook("batch_size args resume_from_checkpoint trial ignore_keys_for_eval", train=1),
    "_run_epoch": _hook(
        "model epoch train_dataloader steps_in_epoch num_update_steps_per_epoch trial ignore_keys_for_eval",
        _inner_training_loop=1,
    ),
    "_maybe_log_save_evaluate": _hook("tr_loss grad_norm model trial", _run_epoch=2),
    "_finalize_training": _hook("trial num_train_samples start_time", _inner_training_loop=1),
    "_load_best_model": _hook("", _finalize_training=1),
    "_determine_best_metric": _hook("metrics trial", _maybe_log_save_evaluate=1),
    # Checkpoints. All files of one are written into the folder in `_get_output_dir`.
    "_get_output_dir": _hook("trial", _save_checkpoint=1, _finalize_training=1),
    "_save_checkpoint": _hook("model trial", _maybe_log_save_evaluate=1),
    "save_model": _hook("output_dir _internal_call", _save_checkpoint=1, push_to_hub=1),
    "_save": _hook("output_dir state_dict", save_model=5),
    "_save_optimizer_and_scheduler": _hook("output_dir", _save_checkpoint=1),
    "_load_optimizer_and_scheduler": _hook("checkpoint", _prepare_for_training=1),
    "_load_from_checkpoint": _hook("resume_from_checkpoint model", train=1, _prepare_for_training=1),
    "_issue_warnings_after_load": _hook("load_result", _load_from_checkpoint=2, _load_best_model=2),
    "_load_callback_state": _hook("", _init_training_state=1),
    "_push_from_checkpoint": _hook("checkpoint_folder", _save_checkpoint=1),
    # Evaluation
    "_evaluate": _hook("trial ignore_keys_for_eval skip_scheduler", _inner_training_loop=1, _maybe_log_save_evaluate=1),
    "evaluation_loop": _hook(
        "dataloader description prediction_loss_only ignore_keys metric_key_prefix", evaluate=1, predict=1
    ),
    "prediction_step": _hook("model inputs prediction_loss_only ignore_keys", evaluation_loop=1),
}

# Attribute of the Trainer -> why it is read or set.
ATTRIBUTES: dict[str, str] = {
    "_tr_loss": "the loss since the last line of the log, for checkpoints",
    "_total_loss_scalar": "the loss of the whole training, for checkpoints",
    "_globalstep_last_logged": "the step of the last line of the log, for checkpoints",
    "_train_batch_size": "the batch size that auto_find_batch_size has found",
    "_eval_dataloaders": "the loaders of evaluations that are kept",
    "_trial": "the trial of a search for hyperparameters, which a diverging training prunes",
}
