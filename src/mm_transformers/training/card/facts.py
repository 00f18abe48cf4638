"""The facts about a model, its training and its metrics."""

import platform
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Optional, Protocol

import torch
import transformers
from accelerate import Accelerator
from transformers import TrainerState, TrainingArguments

from ...model.configuration_mm_transformer import MMTransformerConfig
from ...model.modeling_mm_transformer import MMTransformerForMultiTask
from ...model.tasks import Task


@dataclass
class Measurement:
    """
    Metrics of one split.

    Args:
        split (`str`): "eval", "test", ... or the name of a file.
        metrics: name without the split -> value.
        dataset (`str`, *optional*): Hub id of the data set, if it is known.
    """

    split: str
    metrics: dict[str, float]
    dataset: Optional[str] = None

    def of_task(self, task: Task, tasks: Mapping[str, Task]) -> dict[str, float]:
        """The metrics of one task. The longest matching name counts, since one task name may begin another."""
        found = {}
        for name, value in self.metrics.items():
            owner = max((other for other in tasks if name.startswith(f"{other}_")), key=len, default=None)
            if owner == task.name:
                found[name.removeprefix(f"{task.name}_")] = value
        return {name: value for name, value in found.items() if name != "loss"}


@dataclass
class Training:
    """The training of a model: rows of a table, and the end of the training."""

    rows: dict[str, str] = field(default_factory=dict)


@dataclass
class CardFacts:
    """
    All facts of a card.

    Args:
        name (`str`): Hub id, or name of the folder.
        config ([`MMTransformerConfig`]): That of the model.
        measurements: the metrics of the saved weights.
        training: `None` if unknown.
        ablation (`str`, *optional*): Markdown of [`~mm_transformers.analysis.ablation.Ablation`].
        calibration (`str`, *optional*): Markdown of [`~mm_transformers.analysis.calibration.CalibrationResult`].
        said: license, language, datasets, tags, from a person; they are never guessed.
        encoder_licenses: Hub id -> license, of pretrained encoders.
        num_parameters: of the whole model.
        is_adapter: whether adapters alone are saved, which the example of the card could not load.
        input_columns: key of a row -> columns of the training table, as the processor has them; for the example.
    """

    name: str
    config: MMTransformerConfig
    measurements: list[Measurement] = field(default_factory=list)
    training: Optional[Training] = None
    ablation: Optional[str] = None
    calibration: Optional[str] = None
    said: dict[str, Any] = field(default_factory=dict)
    encoder_licenses: dict[str, str] = field(default_factory=dict)
    num_parameters: Optional[int] = None
    is_adapter: bool = False
    input_columns: dict[str, list[str]] = field(default_factory=dict)


class TrainedModel(Protocol):
    """The part of [`MMTrainer`] that a card needs."""

    args: TrainingArguments
    state: TrainerState
    accelerator: Accelerator
    model: Any
    processing_class: Any
    refitted: Optional[str]

    @property
    def fused_model(self) -> MMTransformerForMultiTask: ...


def measurements_of(trainer: TrainedModel) -> list[Measurement]:
    """The metrics of the trainer for the weights that it would save now."""
    state = trainer.state
    history = state.log_history
    end = max((i for i, logs in enumerate(history) if "train_runtime" in logs), default=-1)
    # What comes after the end of training was measured on what training left; of what came before, the evaluation of
    # the step whose weights these are.
    has_loaded_best = trainer.args.load_best_model_at_end and state.best_model_checkpoint is not None and end >= 0
    step = state.best_global_step if has_loaded_best else state.global_step
    if trainer.refitted is not None:
        step = None  # earlier metrics are of a model that has not seen all rows
    found: dict[str, Measurement] = {}
    for i, logs in enumerate(history):
        prefix = next((name.removesuffix("_runtime") for name in logs if name.endswith("_runtime")), "train")
        if prefix != "train" and (i > end or logs.get("step") == step) and not logs.get("trained_on"):
            metrics = {
                name.removeprefix(f"{prefix}_"): value for name, value in logs.items() if name.startswith(f"{prefix}_")
            }
            found[prefix] = Measurement(prefix, metrics)
    return list(found.values())


def training_of(trainer: TrainedModel) -> Optional[Training]:
    """The training of a trainer; `None` if it has not trained."""
    args, state = trainer.args, trainer.state
    if state.global_step == 0:
        return None
    summary: dict[str, float] = next((logs for logs in reversed(state.log_history) if "train_runtime" in logs), {})
    batch = args.train_batch_size * args.world_size * args.gradient_accumulation_steps
    rows = {
        "steps": f"{state.global_step:,}",
        "epochs": f"{state.epoch:.3g}" if state.epoch is not None else "",
        "second training": trainer.refitted or "",
        "rows per step": f"{batch:,}",
        "learning rate": f"{args.learning_rate:g}",
        "learning rates by part": ", ".join(
            f"{name} {value:g}"
            for name in ("encoder", "fusion", "head")
            if (value := getattr(args, f"{name}_learning_rate", None)) is not None
        ),
        "optimizer": str(getattr(args.optim, "value", args.optim)),
        "schedule": str(getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type)),
        "weight decay": f"{args.weight_decay:g}",
        "precision": "bfloat16 (mixed)" if args.bf16 else "float16 (mixed)" if args.fp16 else "float32",
        "seed": str(args.seed),
        "task weighting": _kind_of(trainer.fused_model.config.task_weighting),
        "regularization": _kind_of(trainer.fused_model.config.regularization),
        "frozen": ", ".join(trainer.fused_model.config.freeze or []),
        "hardware": _hardware(args.world_size),
        "time": _duration(summary["train_runtime"]) if "train_runtime" in summary else "",
        "software": f"transformers {transformers.__version__}, torch {torch.__version__}",
    }
    return Training({name: value for name, value in rows.items() if value})


def _kind_of(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(str(part) if name == "kind" else f"{name} {part}" for name, part in value.items())
    return str(value or "")


def _hardware(world_size: int) -> str:
    if torch.cuda.is_available():
        device = torch.cuda.get_device_name()
    elif torch.backends.mps.is_available():
        device = "Apple GPU"
    else:
        device = f"CPU ({platform.machine()}, {torch.get_num_threads()} threads)"
    return device if world_size == 1 else f"{world_size} processes, each on: {device}"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"
