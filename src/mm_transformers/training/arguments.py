"""Training arguments with the options of a fused model."""

import math
from dataclasses import dataclass, field
from typing import Any, Optional

from transformers import Seq2SeqTrainingArguments
from transformers.trainer_utils import IntervalStrategy, SaveStrategy


AUTO = "auto"
# By part of the model, if neither `learning_rate` nor the rate of the part is given.
DEFAULT_LEARNING_RATES = {"encoder": 5e-5, "fusion": 1e-4, "head": 1e-3}
# The `learning_rate` in that case: an unusual number, so that copies of the arguments can tell it from 1e-3.
NOT_GIVEN = math.nextafter(DEFAULT_LEARNING_RATES["head"], 1.0)


@dataclass
class MMTrainingArguments(Seq2SeqTrainingArguments):
    """
    [`~transformers.Seq2SeqTrainingArguments`] with defaults for fine-tuning pretrained encoders.

    All differences are listed here. `docs/defaults.md` explains the choice of the defaults. [`MMTrainer`] uses plain
    [`~transformers.TrainingArguments`] unchanged.

    Args:
        learning_rate (`float`, *optional*):
            Of all parts without their own rate. By default encoders have 5e-5, the fusion 1e-4 and heads 1e-3. Encoders
            from random weights need more: give a `learning_rate`.
        encoder_learning_rate (`float`, *optional*): Of the encoders, and of the decoder if there is one.
        fusion_learning_rate (`float`, *optional*): Of all parts between encoders and heads. Gates have ten times this
            rate.
        head_learning_rate (`float`, *optional*): Of the task layers.
        layerwise_lr_decay (`float`, *optional*, defaults to 1.0):
            The highest layer of an encoder has the rate of the encoders times this factor, the next layer times its
            square, and so on. The embeddings have the lowest rate (ELECTRA, https://arxiv.org/abs/2003.10555; usual are
            0.65 to 0.95).
        per_device_train_batch_size (`int`, *optional*, defaults to 16): Rows per batch and process.
        per_device_eval_batch_size (`int`, *optional*, defaults to 32): The same without training.
        num_train_epochs (`float`, *optional*, defaults to 5.0): Epochs, at most.
        warmup_steps (`float`, *optional*, defaults to 0.1): Steps of warm-up; below 1 a share of all steps.
        weight_decay (`float`, *optional*, defaults to 0.01): Of all matrices that no regulariser covers.
        eval_strategy (`str`, *optional*, defaults to `"auto"`):
            `"auto"` evaluates if there are validation rows: after each epoch, or at the interval of `save_steps`. With
            `eval_steps`, the default is `"steps"`.
        save_strategy (`str`, *optional*, defaults to `"auto"`):
            `"auto"` saves a checkpoint at each evaluation; without evaluations, after each epoch. Then
            `save_total_limit` is 1 unless given: the newest checkpoint stays, and the best one.
        load_best_model_at_end (`bool`, *optional*):
            Whether to keep the weights with the best validation loss, the start included. By default yes if there are
            validation rows and `save_strategy` fits `eval_strategy`. Then, with a `start_share` and a linear start,
            losses up to 5% above the lowest count as equal. Among equal losses, the latest weights are kept.
        early_stopping_patience (`int`, *optional*, defaults to 3):
            Training ends after this number of evaluations without a better one; 0 for never. Needs
            `load_best_model_at_end`.
        validation_fraction (`float`, *optional*, defaults to 0.15):
            Share of the training rows that is held out if [`MMTrainer`] gets no `eval_dataset` and `eval_strategy` is
            `"auto"`; see [`hold_out_rows`]. 0 holds out none.
        probe_start (`bool`, *optional*):
            Whether tasks start as linear models of the mean encoder outputs; see [`start_probes`]. By default all tasks
            with a new linear probe do, as in models of `from_encoders`.
        start_share (`float`, *optional*, defaults to 0.3):
            For tasks that start as linear models: the share of the start in the weights that are evaluated during
            training and kept at its end. The rest are the trained weights (WiSE-FT, https://arxiv.org/abs/2109.01903).
            0 leaves the trained weights unchanged.
        refit (`bool`, *optional*):
            Whether to train a second time, from the start and on all rows, if [`MMTrainer`] held some out. The number
            of epochs is that of the best weights of the first training (the number of steps, with `max_steps`). By
            default yes for up to 2,000 training rows, where these few rows matter, unless the optimizer or a subclass
            of the trainer is your own. All figures of the training, and the verdicts, are about the first one. It needs
            tasks that start as linear models, and never happens with an `eval_dataset`. Callbacks run in both
            trainings, but those that report to services in the first only.
        predict_with_generate (`bool`, *optional*, defaults to `True`): Whether tasks that write do so in evaluation.
        tune_thresholds (`bool`, *optional*, defaults to `False`):
            Whether [`~mm_transformers.tune_thresholds`] chooses the thresholds of [`MultiLabel`] tasks on the
            validation rows, after the training (before a second one on all rows). Needs validation rows.
        rows_per_image (`int`, *optional*, defaults to 1):
            The largest number of rows of one image that come together, in an otherwise random order. A batch reads and
            encodes each image once, so an epoch is faster if many rows share images. Batches then hold fewer images.
        automatic (`dict`, *optional*):
            Not for users: the chosen values of options that are `"auto"` or `None`, so that copies of the arguments
            stay automatic.

    Raises:
        ValueError: if a value is out of its range, or `rows_per_image` is given together with another order of the
            rows.

    Example:

    ```python
    >>> args = MMTrainingArguments("out")  # the defaults
    >>> args = MMTrainingArguments("out", encoder_learning_rate=1e-5, num_train_epochs=3)
    ```
    """

    learning_rate: Optional[float] = field(
        default=None, metadata={"help": "Learning rate of all parts without a learning rate of their own."}
    )
    encoder_learning_rate: Optional[float] = field(
        default=None, metadata={"help": "Learning rate of the encoders; 5e-5 if no learning_rate is given."}
    )
    fusion_learning_rate: Optional[float] = field(
        default=None, metadata={"help": "Learning rate of the fusion; 1e-4 if no learning_rate is given."}
    )
    head_learning_rate: Optional[float] = field(
        default=None, metadata={"help": "Learning rate of the task layers; 1e-3 if no learning_rate is given."}
    )
    layerwise_lr_decay: float = field(
        default=1.0, metadata={"help": "Factor of the learning rate from each layer of an encoder to the one below."}
    )
    per_device_train_batch_size: int = field(default=16, metadata={"help": "Rows per batch and process."})
    per_device_eval_batch_size: int = field(default=32, metadata={"help": "Rows per batch and process, in evaluation."})
    num_train_epochs: float = field(default=5.0, metadata={"help": "Largest number of epochs."})
    warmup_steps: float = field(
        default=0.1, metadata={"help": "Warm-up steps. A number below 1 is a share of all steps."}
    )
    weight_decay: float = field(default=0.01, metadata={"help": "Weight decay of all matrices."})
    eval_strategy: IntervalStrategy | str = field(
        default=AUTO, metadata={"help": "When to evaluate. auto: after each epoch if there are validation rows."}
    )
    save_strategy: SaveStrategy | str = field(
        default=AUTO, metadata={"help": "When to save. auto: at each evaluation, or else after each epoch."}
    )
    load_best_model_at_end: Optional[bool] = field(
        default=None,
        metadata={"help": "Keep the weights with the best validation loss. Default: if there are validation rows."},
    )
    early_stopping_patience: int = field(
        default=3, metadata={"help": "Number of evaluations without improvement after which training stops. 0: never."}
    )
    validation_fraction: float = field(
        default=0.15, metadata={"help": "Share of the training rows that is held out if there is no eval_dataset."}
    )
    probe_start: Optional[bool] = field(
        default=None, metadata={"help": "Whether tasks start as linear models. Default: where possible."}
    )
    start_share: float = field(
        default=0.3,
        metadata={"help": "Share of the linear start in the final weights. The rest comes from the trained weights."},
    )
    refit: Optional[bool] = field(
        default=None,
        metadata={
            "help": "Whether to train again on all rows, including the held-out rows. Default: if there are few rows."
        },
    )
    predict_with_generate: bool = field(
        default=True, metadata={"help": "Whether tasks that write text generate it in evaluation."}
    )
    tune_thresholds: bool = field(
        default=False, metadata={"help": "Whether to choose the thresholds of labels on the validation rows."}
    )
    rows_per_image: int = field(
        default=1, metadata={"help": "Number of rows with the same image that follow each other in the training order."}
    )
    automatic: Optional[dict[str, Any]] = field(default=None, metadata={"help": "Set by the trainer."})

    def __post_init__(self) -> None:
        known = self.automatic or {}
        self.automatic = {
            name: None
            for name in _DEPENDS_ON_ROWS
            if getattr(self, name) in (AUTO, None) or (name in known and _plain(getattr(self, name)) == known[name])
        }
        if self.save_steps != _DEFAULT_SAVE_STEPS and "save_strategy" in self.automatic:
            # A given number of steps means `"steps"`.
            self.save_strategy = SaveStrategy.STEPS
            del self.automatic["save_strategy"]
        if "save_strategy" in self.automatic and getattr(self, "save_total_limit", None) is None:
            self.save_total_limit = 1
        if self.learning_rate is None:
            self.learning_rate = NOT_GIVEN
        self.reopen()
        self._check_ranges()
        wanted = self.load_best_model_at_end
        if self.automatic:
            # Otherwise transformers would refuse options that are still open.
            self.load_best_model_at_end = False
        super().__post_init__()
        self.load_best_model_at_end = wanted
        if self.rows_per_image < 1:
            raise ValueError(f"rows_per_image must be at least 1, but is {self.rows_per_image}.")
        if self.rows_per_image > 1 and self.train_sampling_strategy != "random":
            raise ValueError(
                f"rows_per_image={self.rows_per_image} defines the order of the rows: leave out "
                f"train_sampling_strategy={self.train_sampling_strategy!r}."
            )
        if not 0 < self.layerwise_lr_decay <= 1:
            raise ValueError(
                f"layerwise_lr_decay must be greater than 0 and at most 1, but is {self.layerwise_lr_decay}."
            )
        if not 0 <= self.validation_fraction < 1:
            raise ValueError(
                f"validation_fraction must be at least 0 and less than 1, but is {self.validation_fraction}."
            )
        if not 0 <= self.start_share < 1:
            raise ValueError(f"start_share must be at least 0 and less than 1, but is {self.start_share}.")
        if self.early_stopping_patience < 0:
            raise ValueError(f"early_stopping_patience must be at least 0, but is {self.early_stopping_patience}.")
        for name in ("encoder_learning_rate", "fusion_learning_rate", "head_learning_rate"):
            rate = getattr(self, name)
            if rate is not None and rate < 0:
                raise ValueError(f"{name} must be at least 0, but is {rate}.")

    def _check_ranges(self) -> None:
        """
        Checks the ranges of numbers.

        Raises:
            ValueError: one sentence, if a number is out of its range; before transformers divides by it.
        """
        for name, (lowest, highest) in _RANGES.items():
            value = getattr(self, name, None)
            if isinstance(value, (int, float)) and not isinstance(value, bool) and not lowest <= value <= highest:
                bounds = f"at least {lowest}" if highest == math.inf else f"from {lowest} to {highest}"
                raise ValueError(f"{name} must be {bounds}, but is {value}.")
        for name in ("learning_rate", "num_train_epochs", *_RANGES):
            value = getattr(self, name, None)
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError(f"{name} must be a finite number, but is {value}.")

    @property
    def wants_validation_rows(self) -> bool:
        """Whether a part of the training rows is to be held out if no `eval_dataset` is given."""
        return "eval_strategy" in self._automatic and self.validation_fraction > 0

    @property
    def chooses_best(self) -> bool:
        """Whether keeping the best weights is the default, and not requested by the user."""
        return "load_best_model_at_end" in self._automatic

    @property
    def _automatic(self) -> dict[str, Any]:
        return self.automatic if self.automatic is not None else {}

    def reopen(self) -> None:
        """Resets automatic options to their values without validation rows, so that another trainer can set them."""
        if "eval_strategy" in self._automatic:
            self._choose("eval_strategy", IntervalStrategy.NO)
        if "save_strategy" in self._automatic:
            self._choose("save_strategy", _saves_with(self.eval_strategy))
        if "load_best_model_at_end" in self._automatic:
            self._choose("load_best_model_at_end", False)

    def settle(self, has_validation: bool, has_one_loss: bool = True, has_epochs: bool = True) -> None:
        """
        Sets the open options; called by [`MMTrainer`], which has the rows.

        Args:
            has_validation: whether there are validation rows.
            has_one_loss: whether they are one data set; several have no single loss that could choose weights.
            has_epochs: whether the training rows have a length; otherwise checkpoints come by steps.

        Raises:
            ValueError: if the best weights are requested and nothing is evaluated.
        """
        args: Any = self  # mypy does not find the types of these fields
        saves_by_steps = "save_strategy" not in self._automatic and args.save_strategy == SaveStrategy.STEPS
        by_steps = args.eval_steps is not None or saves_by_steps or not has_epochs
        if "eval_strategy" in self._automatic:
            kind = IntervalStrategy.STEPS if by_steps else IntervalStrategy.EPOCH
            self._choose("eval_strategy", kind if has_validation else IntervalStrategy.NO)
            if args.eval_strategy == IntervalStrategy.STEPS and args.eval_steps is None:
                args.eval_steps = args.save_steps
        if "save_strategy" in self._automatic:
            self._choose("save_strategy", _saves_with(args.eval_strategy) if has_epochs else SaveStrategy.STEPS)
            if args.save_strategy == SaveStrategy.STEPS and args.eval_strategy == IntervalStrategy.STEPS:
                args.save_steps = args.eval_steps
        evaluates = has_validation and args.eval_strategy != IntervalStrategy.NO
        if self.chooses_best:
            fits = args.save_strategy == SaveStrategy.BEST or args.save_strategy.value == args.eval_strategy.value
            if fits and args.save_strategy == SaveStrategy.STEPS:
                fits = args.eval_steps == args.save_steps
            is_measured = has_one_loss or args.metric_for_best_model is not None
            self._choose("load_best_model_at_end", evaluates and fits and is_measured)
        elif args.load_best_model_at_end and not evaluates and self._automatic:
            raise ValueError(
                "load_best_model_at_end=True needs validation rows: give an eval_dataset, or leave eval_strategy and "
                "validation_fraction at their defaults."
            )
        if args.load_best_model_at_end and args.metric_for_best_model is None:
            args.metric_for_best_model, args.greater_is_better = "loss", False
        args.do_eval = args.do_eval or evaluates

    def _choose(self, name: str, value: Any) -> None:
        setattr(self, name, value)
        self._automatic[name] = _plain(value)


def _plain(value: Any) -> Any:
    """The value in its JSON form."""
    return getattr(value, "value", value)


# Option -> the smallest and the largest value.
_RANGES: dict[str, tuple[float, float]] = {
    **dict.fromkeys(
        (
            "per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps",
            "eval_accumulation_steps", "generation_num_beams", "generation_max_length", "torch_empty_cache_steps",
            "dataloader_prefetch_factor",
        ),
        (1, math.inf),
    ),
    **dict.fromkeys(
        (
            "learning_rate", "num_train_epochs", "weight_decay", "max_grad_norm", "warmup_steps", "adam_epsilon",
            "eval_delay", "eval_steps", "save_steps", "logging_steps", "dataloader_num_workers", "ddp_timeout",
        ),
        (0, math.inf),
    ),
    **dict.fromkeys(("adam_beta1", "adam_beta2"), (0, 1)),
    **dict.fromkeys(("seed", "data_seed"), (0, 2**32 - 1)),
}  # fmt: skip
_DEFAULT_SAVE_STEPS = 500  # of transformers
_DEPENDS_ON_ROWS = ("eval_strategy", "save_strategy", "load_best_model_at_end")


def _saves_with(eval_strategy: Any) -> SaveStrategy:
    return SaveStrategy.STEPS if IntervalStrategy(eval_strategy) == IntervalStrategy.STEPS else SaveStrategy.EPOCH
