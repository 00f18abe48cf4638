"""A Trainer that may be killed at any moment and goes on, resumed, as if it had not been."""

import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Optional

import torch
from accelerate.utils import broadcast_object_list
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import EarlyStoppingCallback, Trainer
from transformers.trainer import OPTIMIZER_NAME, TRAINER_STATE_NAME
from transformers.trainer_callback import ExportableState, TrainerControl
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, SaveStrategy
from transformers.utils import CONFIG_NAME, logging

from ...data.mixture import DataMixture
from ...data.sources import DataSource, is_iterable
from ...model.adding_tasks import check_same_heads
from ...model.configuration_mm_transformer import MMTransformerConfig
from ...model.loading import is_pickle_error
from ...model.messages import and_more
from ...model.safe_writing import drop_link, leads_outside, saved_aside, write_atomically
from ...model.task_base import Task, task_from_dict
from .folders import (
    SAVING,
    check_checkpoint,
    make_own_folder,
    newest_complete_checkpoint,
    own_folder,
    publish,
    remove_own_folder,
    rotate,
    tidy,
    why_not_written,
    write_manifest,
)
from .lock import locked


logger = logging.get_logger(__name__)

# Losses since the last log, and over the whole training, that are not in trainer_state.json.
LOSSES_NAME = "running_losses.safetensors"


class ResumableTrainer(Trainer):
    """
    [`~transformers.Trainer`] whose checkpoints are complete or not there, and whose resumed training equals one that
    was never interrupted:

    - a checkpoint is written aside and renamed; old ones are renamed before they are deleted, and only after the new
      one is in its place;
    - `train(resume_from_checkpoint=True)` takes the newest complete checkpoint; without any it starts from scratch;
    - losses that were not yet logged, their mean over the training, the numbers of labels and the patience of early
      stopping are restored;
    - a checkpoint due at the last step of an epoch is written after what else happens at its end, which a resumed
      training would leave out;
    - a training that had reached its end takes no further step when it is resumed.
    """

    # By task: sums since the last log, and the number of labels since the beginning; see [`MMTrainer`].
    _losses: dict[str, torch.Tensor]
    _num_steps: dict[str, torch.Tensor]
    _num_labels: dict[str, torch.Tensor]
    control: TrainerControl
    _is_saving = False
    _to_restore: Optional[str] = None
    _last_step_seen = -1
    _was_stopped_early = False
    _knows_all_losses = False
    _has_started = False

    def train(self, resume_from_checkpoint=None, trial=None, ignore_keys_for_eval=None):
        """
        As [`~transformers.Trainer.train`] does it.

        Args:
            resume_from_checkpoint (`str | bool`, *optional*):
                `True` takes the newest complete checkpoint in `args.output_dir`; if there is none, training starts
                from scratch. So the same command starts a training and continues it.

        Raises:
            ValueError: if the checkpoint that is named is not complete, or another process trains into this folder.
            OSError: if a checkpoint cannot be written; those before stay as they are.
        """
        if self.args.push_to_hub:
            self._check_links()
        with ExitStack() as held:
            self._lock(held)
            checkpoint = self._checkpoint_to_resume(resume_from_checkpoint)
            with clear_errors(checkpoint):
                output = super().train(checkpoint, trial, ignore_keys_for_eval)
        return output._replace(training_loss=output.metrics["train_loss"])

    def _lock(self, held: ExitStack) -> None:
        """One process locks the folder for all; a training that saves nothing needs no lock."""
        if self.args.save_strategy == SaveStrategy.NO:
            return
        problem: list[Any] = [None]
        if self.args.process_index == 0:
            try:
                held.enter_context(locked(self.args.output_dir))
            except (ValueError, OSError) as error:
                problem[0] = str(error)
        [problem[0]] = broadcast_object_list(problem)
        if problem[0] is not None:
            raise ValueError(problem[0])

    def _inner_training_loop(self, batch_size=None, *args, **kwargs):
        # Begins anew if a smaller batch size is tried.
        self._to_restore, self._last_step_seen = kwargs.get("resume_from_checkpoint"), -1
        self._was_stopped_early = self._knows_all_losses = self._has_started = False
        return super()._inner_training_loop(batch_size, *args, **kwargs)

    def on_start(self, trial: Any, ignore_keys_for_eval: Any) -> None:
        """Called before the first step of a training that is not resumed."""

    def _checkpoint_to_resume(self, wanted: Any) -> Optional[str]:
        """Decided by one process, since others may not yet see, or no longer see, what it sees."""
        if self.args.should_save and self.args.save_strategy != SaveStrategy.NO:
            tidy(self.args.output_dir)
        found: list[Any] = [None, None]
        if self.args.process_index == 0 and wanted not in (None, False):
            try:
                if wanted is True:
                    found[0] = newest_complete_checkpoint(self.args.output_dir, verify=True)
                else:
                    found[0] = os.fspath(wanted)
                    check_checkpoint(found[0])
                if found[0] is not None:
                    saved = _tasks_of(found[0])
                    if saved:
                        check_same_heads(saved, self.fused_model.tasks, found[0])
            except ValueError as error:
                found[1] = str(error)
        checkpoint, problem = broadcast_object_list(found)
        if problem is not None:
            raise ValueError(problem)
        if checkpoint is not None:
            logger.info(f"Going on from {checkpoint}.")
            names = os.listdir(checkpoint)
            if not any(name.startswith(("optimizer", "global_step")) for name in names):
                logger.warning(
                    f"{checkpoint} has no {OPTIMIZER_NAME}: weights and step are restored, but optimiser and "
                    "learning rate start anew."
                )
        elif wanted is True:
            logger.warning(f"There is no complete checkpoint in {self.args.output_dir}: training starts from scratch.")
        return checkpoint

    # Saving

    def push_to_hub(self, *args, **kwargs):
        """
        As [`~transformers.Trainer.push_to_hub`].

        Raises:
            ValueError: if a link in the folder would upload a file from elsewhere.
        """
        self._check_links()
        return super().push_to_hub(*args, **kwargs)

    def _check_links(self) -> None:
        folder = Path(self.args.output_dir)
        for path in folder.rglob("*"):
            if path.is_symlink() and leads_outside(path, folder):
                raise ValueError(
                    f"{path} is a link to {os.readlink(path)}, which a push would upload from outside of the folder: "
                    "remove it."
                )

    def _get_output_dir(self, trial) -> str:
        folder = super()._get_output_dir(trial)
        return str(own_folder(folder, SAVING)) if self._is_saving else folder

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        # It uploads in the background, so the folder must have its place.
        if not self._is_saving:
            # The stock method takes along what it knows: config and weights.
            for code in Path(checkpoint_folder).glob("*.py"):
                with write_atomically(Path(self.args.output_dir, code.name)) as copy:
                    copy.write(code.read_bytes())
            for file in os.listdir(checkpoint_folder):
                drop_link(os.path.join(self.args.output_dir, file))
            super()._push_from_checkpoint(checkpoint_folder)

    def _save_checkpoint(self, model, trial) -> None:
        run_dir = self._get_output_dir(trial)
        name = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        final = os.path.join(run_dir, name)
        if self.args.should_save:
            make_own_folder(run_dir, SAVING)
        self.accelerator.wait_for_everyone()
        staging = own_folder(run_dir, SAVING)
        self._is_saving = True
        try:
            super()._save_checkpoint(model, trial)
            self._note_best_checkpoint(run_dir)
            if not self.args.save_only_model:
                self._save_losses(staging / name)
            self.accelerator.wait_for_everyone()  # each process writes files of its own
            if self.args.should_save:
                # Again, because the best checkpoint is not where it was when this was written.
                self.state.save_to_json(str(staging / name / TRAINER_STATE_NAME))
                write_manifest(staging / name)
                publish(staging / name, final)
                remove_own_folder(run_dir, SAVING)
        except Exception as error:
            remove_own_folder(run_dir, SAVING)
            reason = why_not_written(error, run_dir)
            if reason is None:
                raise
            newest = newest_complete_checkpoint(run_dir)
            raise OSError(
                f"The checkpoint of step {self.state.global_step} could not be written to {run_dir} ({reason}); "
                f"{'there is none before it' if newest is None else f'{Path(newest).name} is the newest, unharmed'}: "
                "make room and start again with resume_from_checkpoint=True."
            ) from error
        finally:
            self._is_saving = False
        self.accelerator.wait_for_everyone()
        if self.args.push_to_hub:
            self._push_from_checkpoint(final)
        if self.args.should_save:
            best = self.state.best_model_checkpoint
            rotate(run_dir, self.args.save_total_limit, {final} if best is None else {final, best})

    def _save(self, output_dir: Optional[str] = None, state_dict: Optional[dict] = None) -> None:
        if not self.args.should_save:
            super()._save(output_dir, state_dict)
            return
        folder = Path(self.args.output_dir if output_dir is None else output_dir)
        with saved_aside(folder) as staged:
            card = folder / "README.md"
            if card.is_file() and not card.is_symlink():  # PEFT renews the one that it finds
                shutil.copy2(card, staged)
            super()._save(str(staged), state_dict)

    def save_metrics(self, split, metrics, combined=True) -> None:
        if self.is_world_process_zero():
            _drop_link_or_damage(Path(self.args.output_dir, f"{split}_results.json"))
            _drop_link_or_damage(Path(self.args.output_dir, "all_results.json"))
        super().save_metrics(split, metrics, combined)

    def save_state(self) -> None:
        if self.is_world_process_zero():
            drop_link(os.path.join(self.args.output_dir, TRAINER_STATE_NAME))
        super().save_state()

    def _note_best_checkpoint(self, run_dir: str) -> None:
        """As the Trainer does it, but where the checkpoint will be."""
        step = self.state.best_global_step
        if step is not None:
            folder = os.path.join(run_dir, f"{PREFIX_CHECKPOINT_DIR}-{step}")
            if step == self.state.global_step or os.path.exists(folder):
                self.state.best_model_checkpoint = folder

    def _maybe_log_save_evaluate(self, tr_loss, grad_norm, model, trial, *args, **kwargs) -> None:
        # Called after each step, and at the end of an epoch a second time.
        is_epoch_end = self.state.global_step == self._last_step_seen
        self._last_step_seen = self.state.global_step
        should_save, self.control.should_save = self.control.should_save, False
        super()._maybe_log_save_evaluate(tr_loss, grad_norm, model, trial, *args, **kwargs)
        self.control.should_save |= should_save
        ends_now = self.control.should_epoch_stop or self.control.should_training_stop
        ends_now = ends_now or (self.state.epoch is not None and float(self.state.epoch).is_integer())
        if self.control.should_save and (is_epoch_end or not ends_now):
            self._save_checkpoint(model, trial)
            self.control = self.callback_handler.on_save(self.args, self.state, self.control)

    def _finalize_training(self, trial, *args, **kwargs):
        self._restore_losses()
        best = self.state.best_model_checkpoint
        if self.args.should_save and best is not None and self.args.save_total_limit == 1:
            # The Trainer would delete them in their place.
            rotate(self._get_output_dir(trial), 1, {best})
            # Otherwise it would delete whatever else has a name that begins like that of a checkpoint.
            self.args.save_total_limit = None
            try:
                return super()._finalize_training(trial, *args, **kwargs)
            finally:
                self.args.save_total_limit = 1
        return super()._finalize_training(trial, *args, **kwargs)

    # Resuming

    def _run_epoch(self, *args, **kwargs) -> None:
        if self.state.global_step == 0 and self._to_restore is None and not self._has_started:
            self._has_started = True
            self.on_start(kwargs.get("trial"), kwargs.get("ignore_keys_for_eval"))
        self._restore_losses()
        if self.state.global_step >= self.state.max_steps or self._was_stopped_early:
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """A checkpoint of other weights is no checkpoint of this model; the Trainer would only warn."""
        model = self.accelerator.unwrap_model(self.model)
        tied = getattr(model, "all_tied_weights_keys", None) or {}
        computed = getattr(model, "_keys_to_ignore_on_save", None) or []  # such as sinusoidal positions
        missing = sorted(set(load_result.missing_keys) - set(tied) - set(tied.values()) - set(computed))
        for what, names in {"lacks": missing, "has": sorted(load_result.unexpected_keys)}.items():
            if names:
                raise ValueError(
                    f"The checkpoint {what} the weight {names[0]!r}{and_more(names)}, unlike the model that is trained,"
                    " so it is of another model: train into another folder, or give the model that it was saved from."
                )

    def _load_callback_state(self) -> None:
        super()._load_callback_state()
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, ExportableState):
                # One that was not there when the checkpoint was written has nothing to restore, but will be saved.
                saved = self.state.stateful_callbacks.setdefault(type(callback).__name__, callback.state())
                # With this option the Trainer has done so, and has restored their settings too.
                if isinstance(saved, dict) and not self.args.restore_callback_states_from_checkpoint:
                    for name, value in saved.get("attributes", {}).items():
                        setattr(callback, name, value)
            if isinstance(callback, EarlyStoppingCallback):
                patience = max(callback.early_stopping_patience, 1)
                self._was_stopped_early |= callback.early_stopping_patience_counter >= patience

    def _save_losses(self, folder: Path) -> None:
        losses = {
            "loss": self._tr_loss.detach(),
            **{f"losses/{name}": loss for name, loss in self._losses.items()},
            **{f"num_steps/{name}": steps for name, steps in self._num_steps.items()},
            **{f"num_labels/{name}": count for name, count in self._num_labels.items()},
        }
        # Of each process its own, since only their means are logged.
        gathered = self.accelerator.gather({name: loss.reshape(1) for name, loss in losses.items()})
        if self.args.should_save:
            numbers = {
                "last_logged_step": self._globalstep_last_logged,
                "total_loss": self._total_loss_scalar,
                "rows_per_step": self._rows_per_step,
                **self._order_of_rows,
            }
            metadata = {name: repr(number) for name, number in numbers.items()}
            # A checkpoint of adapters has no config of the model.
            metadata["tasks"] = json.dumps([task.to_dict() for task in self.fused_model.tasks.values()])
            save_file(
                {name: loss.cpu().contiguous() for name, loss in gathered.items()}, folder / LOSSES_NAME, metadata
            )

    @property
    def _rows_per_step(self) -> int:
        return self._train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size

    @property
    def _order_of_rows(self) -> dict[str, int]:
        """On what the order of the training rows depends: name -> number."""
        dataset, found = self.train_dataset, {}
        is_mixture = isinstance(dataset, DataMixture)
        is_stream = dataset.is_stream if isinstance(dataset, (DataMixture, DataSource)) else is_iterable(dataset)
        if is_stream:
            found["dataloader_num_workers"] = max(self.args.dataloader_num_workers, 1)
        if is_stream and is_mixture:  # each of them reads a part of its own
            found["processes"] = self.args.world_size
        if is_mixture or (not is_stream and getattr(self.args, "train_sampling_strategy", "random") != "sequential"):
            found["seed"] = self.args.seed if self.args.data_seed is None else self.args.data_seed
        return found

    def _restore_losses(self) -> None:
        checkpoint, self._to_restore = self._to_restore, None
        if checkpoint is None or not os.path.isfile(os.path.join(checkpoint, LOSSES_NAME)):
            return
        with safe_open(os.path.join(checkpoint, LOSSES_NAME), framework="pt") as file:
            metadata, by_process = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        losses = {}
        for name, values in by_process.items():
            # If there are now more processes, or fewer, their mean is all that remains the same.
            is_own = len(values) == self.args.world_size
            losses[name] = (values[self.args.process_index] if is_own else values.mean()).to(self.args.device)
        self._tr_loss = losses.pop("loss")
        self._losses, self._num_steps, self._num_labels = (
            {name.removeprefix(part): x for name, x in losses.items() if name.startswith(part)}
            for part in ("losses/", "num_steps/", "num_labels/")
        )
        before = int(metadata.get("rows_per_step", self._rows_per_step))
        if before != self._rows_per_step:
            logger.warning(
                f"The checkpoint was written with {before} rows per optimiser step, but now a step has "
                f"{self._rows_per_step} (batch size x accumulation x processes), so training goes on at another place "
                f"of the epoch. For the same place, make it {before} again, for example by "
                "gradient_accumulation_steps."
            )
        for name, now in self._order_of_rows.items():
            before = int(metadata.get(name, now))
            if before != now:
                logger.warning(
                    f"The checkpoint was written with {name}={before}, but now it is {now}, so training may go on with "
                    f"other rows of the epoch, some of them seen before. For the same rows, make it {before} again."
                )
        self._globalstep_last_logged = int(metadata["last_logged_step"])
        self._total_loss_scalar = float(metadata["total_loss"])
        self._knows_all_losses = True

    def log(self, logs: dict[str, float], *args, **kwargs) -> None:
        if "train_loss" in logs and self._knows_all_losses:
            # Releases of transformers differ in which steps they divide by after resuming.
            logs["train_loss"] = self._total_loss_scalar / max(self.state.global_step, 1)
        super().log(logs, *args, **kwargs)


def _tasks_of(checkpoint: str) -> dict[str, Task]:
    """The tasks of the model in a checkpoint; none if the checkpoint does not say."""
    if os.path.isfile(os.path.join(checkpoint, CONFIG_NAME)):
        return MMTransformerConfig.from_pretrained(checkpoint).get_tasks()
    tasks = []
    if os.path.isfile(os.path.join(checkpoint, LOSSES_NAME)):
        with safe_open(os.path.join(checkpoint, LOSSES_NAME), framework="pt") as file:
            tasks = [task_from_dict(task) for task in json.loads(file.metadata().get("tasks", "[]"))]
    return {task.name: task for task in tasks}


@contextmanager
def clear_errors(checkpoint: Optional[str] = None) -> Iterator[None]:
    """
    Errors of torch whose messages do not help, in one sentence.

    Args:
        checkpoint: that is loaded in the block.

    Raises:
        ValueError: if a file of the checkpoint is a pickle that holds more than tensors.
        RuntimeError: if a process that reads rows was killed.
    """
    try:
        yield
    except Exception as error:
        if checkpoint is not None and is_pickle_error(error):
            # The message of torch says how to load it all the same.
            raise ValueError(
                f"A file of {checkpoint} is a pickle that holds more than tensors, and might run code; it was not "
                "loaded. Train from another checkpoint."
            ) from None
        if isinstance(error, RuntimeError) and re.match(r"DataLoader worker \(pid", str(error)):
            raise RuntimeError(
                f"{READER_WAS_KILLED}, perhaps for lack of memory: set dataloader_num_workers to a smaller number, or "
                "to 0 to see its error."
            ) from error
        raise


READER_WAS_KILLED = "A process that reads rows was killed"


def _drop_link_or_damage(path: Path) -> None:
    """Makes room for metrics: a link goes, and a file that holds no metrics gets another name."""
    drop_link(path)
    if path.is_file():
        try:
            if isinstance(json.loads(path.read_text(encoding="utf-8")), dict):
                return
        except (ValueError, RecursionError):
            pass
        kept = path.with_name(f"{path.name}.damaged")
        logger.warning(f"{path} holds no metrics as JSON; it is renamed to {kept.name}, and a new one is written.")
        path.replace(kept)
