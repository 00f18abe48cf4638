"""The base class of task kinds, and their registry."""

import dataclasses
import re
from bisect import bisect_right
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple, Optional

import torch
from torch import nn
from transformers import PreTrainedConfig

from .conformal import LEVELS, quantile_thresholds
from .label_cells import ids_are_places, infer_labels, is_finite_number, shorten_value
from .linear_problem import LinearProblem
from .registry import registered


# Names that would collide with other values that the model and the Trainer report.
_RESERVED_NAMES = {"loss", "regularization", "runtime", "samples_per_second", "steps_per_second", "epoch"}
_VALID_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_]*")

TASK_KINDS: dict[str, type["Task"]] = {}


def register_task(cls: type["Task"]) -> type["Task"]:
    """
    Class decorator that registers a task kind, so that `config.json` can store it.

    The class becomes a dataclass; `config.json` stores its fields, so they must be JSON values.

    Raises:
        ValueError: if `kind` is missing or is already taken by another class.

    Example:

    ```python
    >>> @register_task
    ... class Stars(Regression):
    ...     kind = "stars"  # as in {"kind": "stars", "name": "rating"} of config.json and recipes
    ```
    """
    registered(TASK_KINDS, "task kind")(cls)
    return cls if "__dataclass_fields__" in vars(cls) else dataclass(cls)


def task_from_dict(values: dict[str, Any]) -> "Task":
    """
    The task of one entry of `config.tasks`.

    Raises:
        ValueError: if the kind or one of its options is unknown, or a required option is missing.
    """
    if not isinstance(values, dict):
        raise ValueError(f"A task is a Task object or a dict with a 'kind' and a 'name', but got {values!r}.")
    values = dict(values)
    kind, name = values.pop("kind", None), values.get("name")
    if not isinstance(kind, str) or kind not in TASK_KINDS:
        raise ValueError(
            f"Unknown task kind {kind!r} of task {name!r}; known kinds are {', '.join(sorted(TASK_KINDS))}. Import "
            "the module of your own kind (with @register_task) before you load the model."
        )
    cls = TASK_KINDS[kind]
    options = {f.name for f in dataclasses.fields(cls)}
    unknown = sorted(set(values) - options)
    if unknown:
        raise ValueError(
            f"Task {name!r} of kind {kind!r} has no option {unknown[0]!r}; its options are "
            f"{', '.join(sorted(options))}."
        )
    for f in dataclasses.fields(cls):
        if f.name not in values and f.default is f.default_factory is dataclasses.MISSING:
            raise ValueError(f"Task {name!r} of kind {kind!r} needs the option {f.name!r}.")
    return cls(**values)


class LabelContext(NamedTuple):
    """
    The inputs that some kinds of labels need beside the cells.

    Args:
        word_index (batch, text_len) int64: the number of the word that starts at each token, -1 elsewhere; for tasks
            that label words.
        tokenizer: that of the processor; for tasks whose labels are texts.
        fingerprints: "text" or modality -> a number per row that is equal for equal content, `None` without content;
            for tasks that compare rows.
        prompts: the text of each row, if a language model continues it; for tasks whose labels are texts.
    """

    word_index: Optional[torch.Tensor] = None
    tokenizer: Any = None
    fingerprints: Optional[dict[str, list[Optional[int]]]] = None
    prompts: Optional[Sequence[str]] = None


NO_CONTEXT = LabelContext()


class Judgement(NamedTuple):
    """
    The answer of a task to one row, compared with the label.

    Args:
        answer: the answer, in the form of reports.
        truth: the label in the same form; `None` if the row has none.
        is_right: whether both agree; `None` without a label, and for tasks whose answers are not right or wrong.
        confidence: the probability of the answer, 0 to 1; `None` if the task has no probabilities.
        label_pairs: pairs of label and answer for a confusion matrix, by name; empty for other tasks.
    """

    answer: Any = None
    truth: Any = None
    is_right: Optional[bool] = None
    confidence: Optional[float] = None
    label_pairs: tuple[tuple[str, str], ...] = ()


@dataclass
class Task:
    """
    One question about every row: its head, its loss, the encoding of labels and the decoding of logits.

    Subclass it, set `kind`, implement the methods that raise `NotImplementedError` and decorate with [`register_task`].
    No other code reads the kind of a task: it calls the methods below. A kind that chooses among labels has a field
    `labels` and the method [`probabilities`]. They provide the confusion matrix, calibration, majority share and the
    bars of the demo page.

    Args:
        name (`str`): Key of the task in `labels`, `logits`, `losses` and metric names; letters, digits, underscores.
        loss_weight (`float`, *optional*, defaults to 1.0): Weight w_j of this task in the summed loss.
        column (`str`, *optional*): Column of the data set that holds the labels. Defaults to `name`.
        metrics (`list[str]`, *optional*):
            Names of metrics, also of your own ([`register_metric`]). The first one is that of verdicts. Defaults to
            those of the kind.

    Example:

    ```python
    >>> @register_task
    ... class Length(Task):
    ...     kind = "length"  # a number; squared error
    ...     default_metrics = ("mae",)
    ...
    ...     def build_head(self, config, hidden_size):
    ...         return PooledHead(hidden_size, 1, config.classifier_dropout)
    ...
    ...     def encode_label(self, value, text):
    ...         return None if is_missing(value) else float(value)
    ...
    ...     def collate_labels(self, values, context=None):
    ...         return torch.tensor([math.nan if value is None else value for value in values])
    ...
    ...     def loss(self, logits, labels):
    ...         known = ~labels.isnan()
    ...         return (logits[known, 0].float() - labels[known]).square().sum(), self.num_labelled(labels)
    ...
    ...     def decode(self, logits, word_index=None):
    ...         return [{"value": value} for value in logits[:, 0].float().tolist()]
    ...
    ...     def predictions_and_references(self, logits, labels):
    ...         known = ~labels.isnan()
    ...         return logits[known, 0], labels[known]
    ```
    """

    name: str
    loss_weight: float = field(default=1.0, kw_only=True)
    column: Optional[str] = field(default=None, kw_only=True)
    metrics: Optional[list[str]] = field(default=None, kw_only=True)

    kind: ClassVar[str]
    # The factor that turns the loss into a negative log-likelihood, up to the noise: 1/2 for squared errors.
    likelihood_scale: ClassVar[float] = 1.0
    # Names of metrics in `mm_transformers.training.metrics`, for tasks that name none.
    default_metrics: ClassVar[tuple[str, ...]] = ()
    # The metric of ablations and their figures; `None` stands for the first of `default_metrics`.
    main_metric: ClassVar[Optional[str]] = None
    # The name of the task on the Hub, for model cards.
    hub_task: ClassVar[str] = "other"
    # The Auto class, beside `AutoModel`, that loads a model with a single task of this kind.
    auto_class: ClassVar[Optional[str]] = None
    # True if labels belong to words of the text; the context of labels then has the `word_index`.
    is_token_level: ClassVar[bool] = False
    # The keys of an answer for one word. They name the columns of a file also for a row without words.
    answer_keys: ClassVar[tuple[str, ...]] = ()
    # True if a column of texts that are all whole numbers holds numbers: ids of labels, or labels that are numbers.
    takes_whole_numbers: ClassVar[bool] = False
    # True if a decoder writes the answer; there is no head then.
    needs_decoder: ClassVar[bool] = False
    # The cell of each row if the column of the task does not exist; `None` if the column is needed.
    default_cell: ClassVar[Any] = None
    # True if the rows of a batch are compared with each other; the context of labels then has `fingerprints`.
    compares_rows: ClassVar[bool] = False
    # True if a row without other rows in its batch has no loss.
    needs_other_rows: ClassVar[bool] = False
    # The options that a head depends on: a task can use a saved head only if these are equal.
    head_options: ClassVar[tuple[str, ...]] = ("labels", "modality", "embedding_size")
    # The options that a saved head brings along, since its weights mean something else with others.
    kept_options: ClassVar[tuple[str, ...]] = ("scale",)
    # True if `tune` sets options that depend on validation rows.
    can_tune: ClassVar[bool] = False
    # True if the head also judges mismatched pairs; see [`MMTransformerForMultiTask.judge_mismatched`].
    needs_mismatches: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not _VALID_NAME.fullmatch(self.name):
            raise ValueError(
                f"Task name {self.name!r} is not valid: it must start with a letter and hold only letters, digits "
                "and underscores; use `column=` if the column of your data has another name."
            )
        if self.name in _RESERVED_NAMES or hasattr(TaskHeads({}), self.name):
            raise ValueError(f"Task name {self.name!r} is reserved; choose another and say `column={self.name!r}`.")
        weight = self.loss_weight
        if not is_finite_number(weight) or weight < 0:
            raise ValueError(f"Task {self.name!r}: loss_weight must be a number >= 0, but is {shorten_value(weight)}.")
        self.loss_weight = float(weight)  # JSON cannot store a number of numpy
        if self.column is None:
            self.column = self.name
        if self.metrics is not None:
            is_list = isinstance(self.metrics, (list, tuple))
            if not is_list or not all(isinstance(metric, str) for metric in self.metrics):
                raise ValueError(
                    f"Task {self.name!r}: metrics must be a list of names, but is {self.metrics!r}. Objects go to "
                    "MultiTaskMetrics(metrics=...)."
                )
            self.metrics = list(self.metrics)

    def to_dict(self) -> dict[str, Any]:
        """The JSON object that `config.json` stores."""
        values = {"kind": self.kind, **dataclasses.asdict(self)}
        return values if self.metrics is not None else {k: v for k, v in values.items() if k != "metrics"}

    @property
    def metric_names(self) -> tuple[str, ...]:
        """The names of its metrics: its own, or those of its kind."""
        return self.default_metrics if self.metrics is None else tuple(self.metrics)

    def build_head(self, config: PreTrainedConfig, hidden_size: int) -> nn.Module:
        """
        Builds the task layer: a module from the [`MMTransformerModelOutput`] to the logits.

        Most heads need `last_hidden_state`, the fused text tokens (batch, text_len, hidden_size). Others need
        `pooler_output`, their masked mean (batch, hidden_size).
        """
        raise NotImplementedError

    def wrong_labels(self, labels: torch.Tensor) -> Optional[str]:
        """
        The requirement that labels violate, as the end of a sentence; `None` if they are right, or it is unknown.

        Called after a computation with them has failed.
        """
        problem = self.linear_problem()
        return None if problem is None else problem.expected(labels)

    def linear_problem(self) -> Optional[LinearProblem]:
        """
        The linear model with which the task can start (see [`LinearProbe`]).

        By default there is none, and the head starts from random weights.
        """
        return None

    @property
    def label_names(self) -> list[str]:
        """The names of the labels, in the order of their ids; empty for tasks without labels."""
        return list(getattr(self, "labels", None) or [])

    @property
    def takes_ids(self) -> bool:
        """Whether a whole number in a cell is the place of a label in `label_names`."""
        names = self.label_names
        return bool(names) and ids_are_places(names)

    @classmethod
    def infer_options(
        cls, options: dict[str, Any], cells: Iterable[Any], column: str, names: Optional[Sequence[str]] = None
    ) -> dict[str, Any]:
        """
        Completes the options of a task by its column in the training rows, for recipes that leave them out.

        By default it finds `labels`, if the kind has such an option.

        Args:
            options: the given options, without `kind`.
            cells: the cells of the column; texts have passed [`read_text`].
            column: its name, for messages.
            names (*optional*): the labels, if the data set names them (`datasets.ClassLabel`).

        Returns:
            The options to build the task with.

        Raises:
            ValueError: if the column holds no label, or something that cannot be one.
        """
        if "labels" in options or all(f.name != "labels" for f in dataclasses.fields(cls)):
            return options
        return {**options, "labels": list(names) if names is not None else infer_labels(cells, column)}

    @classmethod
    def options_for(cls, cells: Iterable[Any]) -> dict[str, Any]:
        """
        Options that suit a column, for [`~mm_transformers.fit`]; none by default.

        Args:
            cells: the cells of the column, without missing ones; texts have passed [`read_text`].
        """
        return {}

    @classmethod
    def read_text(cls, text: str, separator: str) -> Any:
        """
        The value of a cell that is a text, as in a CSV file; `None` if it is missing.

        The result goes to [`encode_label`]. By default it is the text itself, and a blank text is missing.

        Args:
            text: the cell.
            separator: the separator in cells with several labels.
        """
        return text if text.strip() else None

    def read_known_text(self, text: str, separator: str) -> Any:
        """The same for a task whose labels are known. By default the result of [`read_text`]."""
        return self.read_text(text, separator)

    def encode_label(self, value: Any, text: str) -> Any:
        """
        The encoded label of a cell, for [`collate_labels`]; `None` if it is missing.

        Raises:
            ValueError: one sentence with the expected cells, if the cell is neither a label nor missing.
        """
        raise NotImplementedError

    def collate_labels(self, values: list[Any], context: LabelContext = NO_CONTEXT) -> torch.Tensor:
        """
        Stacks encoded labels, one or `None` per row; missing ones become -100 (integers) or NaN (floats).
        """
        raise NotImplementedError

    def encode_references(self, values: list[Any]) -> Optional[torch.Tensor]:
        """
        The references of metrics, as a tensor with one row each; `None`, as by default, if the labels hold all of them.

        A missing label is a row of -100.

        Args:
            values: encoded labels, one or `None` per row.
        """
        return None

    def decode_references(self, references: Any) -> list[Any]:
        """The values of such a tensor or array."""
        raise NotImplementedError

    def labels_left(self, labels: torch.Tensor, kept: dict[str, torch.Tensor]) -> torch.Tensor:
        """
        The labels after modality dropout: rows without their text have no labels of words.

        The mean of the loss is still over all labels of the step, so it falls by the dropped share.

        Args:
            kept: "text" or modality -> (batch,) bool, whether the row has it.
        """
        return labels.masked_fill(~kept["text"][:, None], -100) if self.is_token_level else labels

    @property
    def unresolved(self) -> tuple[str, ...]:
        """The options that [`prepare_for`] must still determine from the training labels; none by default."""
        return ()

    @property
    def decided_by_training(self) -> tuple[str, ...]:
        """The options that training may set: those that are `unresolved`, and those that [`balance`] changes."""
        return self.unresolved

    def prepare_for(self, labels: Iterable[Any]) -> None:
        """
        Sets the options that depend on the training labels, such as balanced class weights.

        [`MMTrainer`] calls it once before training if any option is `unresolved`. By default it does nothing.

        Args:
            labels: the encoded label of each training row, `None` where it is missing.
        """

    def balance(self, counts: Sequence[float]) -> None:
        """
        Gives all labels the same total weight in the loss, unless the user has set weights.

        [`MMTrainer`] calls it if the task has started as a linear model with balanced classes. By default it does
        nothing.

        Args:
            counts: the number of training rows of each label.
        """

    def tune(self, logits: torch.Tensor, labels: torch.Tensor) -> dict[str, float]:
        """
        Sets the thresholds that turn logits into answers, by labelled rows that were not trained on.

        [`tune_thresholds`] calls it for kinds with `can_tune`. By default it does nothing.

        Args:
            logits, labels: of all rows, on the CPU.

        Returns:
            Label -> threshold.
        """
        return {}

    def strata(self, labels: list[Any]) -> list[tuple[Hashable, ...]]:
        """
        The strata of each row: both parts of a split should hold the same share of each stratum.

        By default the encoded labels decide. Integers and truth values are classes, a list is in the stratum of each of
        its integers, and numbers fall into five quantile bins. Other labels have no strata. Integers of which more than
        half are distinct (ids) have none either.

        Args:
            labels: the encoded label of each row, `None` where it is missing.
        """
        return default_strata(labels)

    def warning_about(self, labels: Sequence[Any]) -> Optional[str]:
        """
        A sentence about training labels that are likely wrong and would decide the training; `None` if there are none.

        Args:
            labels: the encoded label of each row of the table, `None` where it is missing or the row is left out.
        """
        return None

    def label_shape(self, logits: torch.Tensor) -> Optional[tuple[int, ...]]:
        """The shape that labels must have beside these logits; `None` if only the number of rows is known."""
        return None

    def loss(self, logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The sum of the losses over labelled rows (or words), and their number, as two 0-dim float32 tensors."""
        raise NotImplementedError

    def num_labelled(self, labels: torch.Tensor) -> torch.Tensor:
        """How many rows (or words) have a label, the divisor of the summed loss: a 0-dim float32 tensor."""
        if labels.is_floating_point():
            known = ~labels.isnan()
            return (known.flatten(1).any(-1) if labels.ndim > 1 else known).sum().float()
        return (labels != -100).sum().float()

    def decode(self, logits: torch.Tensor, word_index: Optional[torch.Tensor] = None) -> list[Any]:
        """
        One answer per row, made of JSON values.

        A kind may take more options by keyword, such as `top_k`. The pipeline passes options on to the kinds that take
        them.
        """
        raise NotImplementedError

    def show_answer(self, answer: Any) -> str:
        """
        One answer of [`decode`] in a few words, for pages and the terminal.

        By default its first value, and the score if it has one.
        """
        if isinstance(answer, list):
            return ", ".join(map(self.show_answer, answer)) or "nothing"
        if not isinstance(answer, dict):
            return str(answer)
        value, score = next(iter(answer.values()), ""), answer.get("score")
        if isinstance(value, bool):
            value = "yes" if value else "no"
        if isinstance(value, list):
            value = ", ".join(map(str, value)) or "none"
        told = f"{value:.3g}" if isinstance(value, float) else str(value)
        return told if score is None else f"{told} ({100 * score:.0f}%)"

    def read_answer(self, text: str) -> Any:
        """The answer in a text of the command line, for [`answer_scores`]; by default the text."""
        return text

    def probabilities(self, logits: torch.Tensor) -> Optional[torch.Tensor]:
        """
        The probability of each label, (..., num_labels) float32, in the order of `label_names`.

        `None`, as by default, if the task does not choose among labels.

        Args:
            logits: those of this task, (batch, ...).
        """
        return None

    @property
    def logit_unit(self) -> float:
        """The size of a large difference between two logits, by which rounding errors are judged."""
        return 1.0

    @property
    def probability_names(self) -> list[str]:
        """The labels whose probabilities [`add_probabilities`] adds; none for a kind without [`probabilities`]."""
        return self.label_names if type(self).probabilities is not Task.probabilities else []

    def add_probabilities(
        self, answers: list[Any], logits: torch.Tensor, word_index: Optional[torch.Tensor] = None
    ) -> None:
        """
        Adds to each answer of [`decode`] the entry `"probabilities"`: a dict from label to probability.

        Called only if there are `probability_names`. A kind whose answers are no dicts overrides it.

        Args:
            answers: one dict per row; changed in place.
            logits, word_index: as [`decode`] takes them.
        """
        for answer, row in zip(answers, self.probabilities(logits).tolist(), strict=True):
            answer["probabilities"] = dict(zip(self.probability_names, row, strict=True))

    def judge(self, logits: torch.Tensor, label: torch.Tensor) -> Judgement:
        """
        Compares the answer to one row with its label.

        By default the most probable label is right if it is the given one; for a list of labels, if all are. Without
        probabilities, nothing is right or wrong.

        Args:
            logits, label: of this row, without a batch dimension.
        """
        probabilities = self.probabilities(logits[None])
        if probabilities is None or label.is_floating_point() or probabilities.shape[1:-1] != label.shape:
            return Judgement() if self.needs_decoder else Judgement(self.show_answer(self.decode(logits[None])[0]))
        confidence, chosen = probabilities[0].max(-1)
        names, labelled = self.label_names, label != -100
        if label.ndim == 0:
            answer, sure = names[int(chosen)], float(confidence)
            if not labelled:
                return Judgement(answer, confidence=sure)
            truth = names[int(label)]
            return Judgement(answer, truth, answer == truth, sure, ((truth, answer),))
        answers = [names[i] for i in chosen[labelled].tolist()]
        truths = [names[i] for i in label[labelled].tolist()]
        if not truths:
            return Judgement([])
        pairs = tuple(zip(truths, answers, strict=True))
        return Judgement(answers, truths, answers == truths, float(confidence[labelled].min()), pairs)

    def judge_calibrated(self, logits: torch.Tensor, calibrated: torch.Tensor, label: torch.Tensor) -> Judgement:
        """The judgement of [`judge`], with the confidence by calibrated logits."""
        judged = self.judge(logits, label)
        if judged.confidence is None:
            return judged
        return judged._replace(confidence=self.judge(calibrated, label).confidence)

    def confidences(self, logits: torch.Tensor, labels: torch.Tensor) -> Optional[tuple[torch.Tensor, torch.Tensor]]:
        """
        The probability of each labelled answer, and whether it is right, for calibration.

        `None` if the task does not choose one label per row (or word).

        Args:
            logits, labels: of many rows.
        """
        probabilities = self.probabilities(logits)
        if probabilities is None or labels.is_floating_point() or probabilities.shape[:-1] != labels.shape:
            return None
        labelled = labels != -100
        confidence, chosen = probabilities[labelled].max(-1)
        return confidence, chosen == labels[labelled]

    def temper(self, logits: torch.Tensor, temperatures: torch.Tensor) -> torch.Tensor:
        """
        Logits divided by temperatures: above 1 they make probabilities less certain, and change no answer.

        With a temperature for each label, that of the most probable label divides the logits of the row (or word).

        Args:
            logits: (batch, ..., num_labels).
            temperatures: (batch, 1) or (batch, num_labels) float32.
        """
        shape = (len(logits), *[1] * (logits.ndim - 2), temperatures.shape[-1])
        of_rows = temperatures.reshape(shape)
        if temperatures.shape[-1] > 1:
            of_rows = of_rows.expand_as(logits).gather(-1, logits.argmax(-1, keepdim=True))
        return logits.float() / of_rows

    def log_likelihood(self, logits: torch.Tensor, labels: torch.Tensor) -> Optional[torch.Tensor]:
        """
        The log-likelihood of the label of each row, (rows,): its mean over words or labels; NaN without a label.

        By default that of [`probabilities`], for one label per row (or word). `None` for tasks without probabilities:
        they have no temperature.
        """
        probabilities = self.probabilities(logits)
        if probabilities is None or labels.is_floating_point() or probabilities.shape[:-1] != labels.shape:
            return None
        known = labels != -100
        of_labels = probabilities.gather(-1, labels.clamp(min=0)[..., None])[..., 0].clamp(min=1e-30).log()
        sums, counts = (torch.where(known, of_labels, 0.0), known) if labels.ndim == 1 else (
            torch.where(known, of_labels, 0.0).flatten(1).sum(1), known.flatten(1).sum(1))  # fmt: skip
        return torch.where(counts > 0, sums / counts.clamp(min=1), torch.nan)

    def decode_calibrated(
        self, logits: torch.Tensor, calibrated: torch.Tensor, word_index: Optional[torch.Tensor] = None, **options: Any
    ) -> list[Any]:
        """The answers of [`decode`] with calibrated probabilities; by default those to the calibrated logits."""
        return self.decode(calibrated, word_index, **options)

    def conformal_thresholds(
        self, logits: torch.Tensor, labels: torch.Tensor, levels: Sequence[float] = LEVELS
    ) -> Optional[tuple[list[float], int]]:
        """
        For each coverage the threshold of [`add_region`], and the number of labelled rows.

        `None` for tasks without sets and intervals. By default the score of a label is 1 less its probability
        (https://arxiv.org/abs/1609.00451), for tasks that choose one label for the whole row.

        Args:
            logits, labels: of calibration rows. The logits are those of the model, without temperatures: these depend
                on the same rows, which would weaken the promise.
        """
        probabilities = self.probabilities(logits)
        if probabilities is None or labels.is_floating_point() or labels.ndim != 1 or probabilities.ndim != 2:
            return None
        known = labels != -100
        scores = 1 - probabilities[known].gather(1, labels[known][:, None])[:, 0]
        return quantile_thresholds(scores, levels), int(known.sum())

    def add_region(self, answers: list[Any], logits: torch.Tensor, thresholds: Sequence[float]) -> None:
        """
        Adds to each answer the labels that it cannot exclude, `"set"`, and whether to `"abstain"`.

        By default a set holds the labels whose score is at most the threshold, the most probable first, and always the
        most probable. A row whose set is not a single label should get no answer.

        Args:
            answers: dicts of [`decode`]; changed in place.
            logits: as for [`conformal_thresholds`].
            thresholds: of each row, from [`conformal_thresholds`]; infinite where no promise can be kept.
        """
        names = self.label_names
        for answer, row, threshold in zip(answers, self.probabilities(logits), thresholds, strict=True):
            values, ids = row.sort(descending=True, stable=True)
            within = (~(1 - values > threshold)).tolist()  # with NaN nothing is excluded
            found = [names[i] for i, holds in zip(ids.tolist(), within, strict=True) if holds]
            answer["set"] = found or [names[int(ids[0])]]
            answer["abstain"] = len(answer["set"]) != 1

    def answer_confidences(
        self, logits: torch.Tensor, calibrated: Optional[torch.Tensor] = None
    ) -> Optional[torch.Tensor]:
        """
        The confidence of the answer to each row, (rows,): by default the highest probability.

        `None` for tasks without probabilities, and for those that answer by word.

        Args:
            logits: those of the model, which choose the answer.
            calibrated: logits for the probabilities; by default `logits`.
        """
        probabilities = self.probabilities(logits if calibrated is None else calibrated)
        return None if probabilities is None or probabilities.ndim != 2 else probabilities.max(-1).values

    def outcomes(self, logits: torch.Tensor, labels: torch.Tensor) -> Optional[tuple[str, torch.Tensor]]:
        """
        How good the answer to each row is, for advice about missing parts; `None` if the task does not say.

        By default 1 where the most probable label is right and 0 elsewhere, for one label per row.

        Args:
            logits, labels: of rows. The logits are those of the model, which choose the answer.

        Returns:
            `"right"` (higher is better) or `"error"` (lower is better), and its value of each row (rows,), NaN without
            a label.
        """
        probabilities = self.probabilities(logits)
        if probabilities is None or labels.is_floating_point() or labels.ndim != 1 or probabilities.ndim != 2:
            return None
        return "right", torch.where(labels == -100, torch.nan, (probabilities.argmax(-1) == labels).float())

    def majority_share(self, labels: torch.Tensor) -> Optional[float]:
        """
        The share of the most frequent label, which is the accuracy of a constant answer.

        `None` if the task does not choose one label per row, or no row has a label.
        """
        if not self.label_names or labels.is_floating_point() or labels.ndim != 1:
            return None
        known = labels[labels != -100]
        return int(known.bincount().max()) / len(known) if len(known) else None

    def pair_similarity(self, logits: torch.Tensor, modality: str) -> Optional[torch.Tensor]:
        """
        The similarity of each text to each item of a modality, (batch, batch), or `None` if the task compares no pairs.

        [`Matching`] uses it to choose mismatched pairs that are hard to tell apart. The default is `None`.
        """
        return None

    def complete_answer(self, answer: Any, text: str) -> Any:
        """The answer of a row for a file; answers for words get one entry for each word."""
        return answer

    def answer_with_words(self, answer: Any, text: str) -> Any:
        """The answer of a row for the pipeline; answers for words get each word and its place in the text."""
        return answer

    def answer_scores(
        self, logits: torch.Tensor, answers: list[Any], places: Optional[torch.Tensor] = None
    ) -> tuple[torch.Tensor, list[Any]]:
        """
        The scores of answers, before any softmax. An explanation follows them back to the inputs.

        Args:
            logits: those of this task.
            answers: one per row, such as the name of a label; `None` for the answer of the model.
            places (`torch.BoolTensor` of shape `(batch, length)`, *optional*):
                For answers with a part for each token: the tokens to score; by default all.

        Returns:
            (batch,) scores, and the answers.

        Raises:
            ValueError: if this task cannot give an answer.
        """
        raise ValueError(f"Task {self.name!r}: tasks of kind {self.kind!r} do not support explanations.")

    def predictions_and_references(
        self, logits: torch.Tensor, labels: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The predictions and labels for metrics, of labelled rows (or words) only."""
        raise NotImplementedError


def check_label_shape(task: Task, logits: torch.Tensor, labels: torch.Tensor) -> None:
    """
    Checks the shape of labels against the logits.

    Raises:
        ValueError: if labels of another shape would be broadcast over the logits.
    """
    shape = task.label_shape(logits)
    if shape is not None and tuple(labels.shape) != tuple(shape):
        raise ValueError(
            f"labels[{task.name!r}] must have the shape {tuple(shape)}, but has the shape {tuple(labels.shape)}."
        )
    if labels.ndim == 0 or len(labels) != len(logits):
        raise ValueError(
            f"labels[{task.name!r}] must have one entry for each of the {len(logits)} rows, but has the shape "
            f"{tuple(labels.shape)}."
        )


class TaskHeads(nn.Module):
    """
    The task layers, by name.

    It is not an `nn.ModuleDict`, which has no `forward` for PEFT to wrap. Heads are new, so trained adapters need
    "heads" among the `modules_to_save`.
    """

    def __init__(self, heads: dict[str, nn.Module]) -> None:
        super().__init__()
        self.names = list(heads)
        for name, head in heads.items():
            self.add_module(name, head)

    def forward(self, outputs: Any) -> dict[str, torch.Tensor]:
        """The logits of each task, from a [`MMTransformerModelOutput`]."""
        return {name: getattr(self, name)(outputs) for name in self.names}


class PooledHead(nn.Module):
    """
    Dropout, dense, tanh, dropout, projection, on the pooled fused states.

    This is the sentence head of RoBERTa (https://arxiv.org/abs/1907.11692). (batch, hidden_size) -> (batch,
    num_outputs).
    """

    def __init__(self, hidden_size: int, num_outputs: int, dropout: float) -> None:
        super().__init__()
        self.dense = nn.Linear(hidden_size, hidden_size)
        self.dropout = nn.Dropout(dropout)
        self.out_proj = nn.Linear(hidden_size, num_outputs)

    def forward(self, outputs: Any) -> torch.Tensor:
        pooled = torch.tanh(self.dense(self.dropout(outputs.pooler_output)))
        return self.out_proj(self.dropout(pooled))


def default_strata(labels: list[Any]) -> list[tuple[Hashable, ...]]:
    """See [`Task.strata`]."""
    known = [label for label in labels if label is not None]
    if known and all(type(label) is float for label in known):
        ordered = sorted(known)
        edges = sorted({ordered[number * len(ordered) // 5] for number in range(1, 5)})
        return [() if label is None else (bisect_right(edges, label),) for label in labels]
    if any(isinstance(label, (list, tuple)) for label in known):
        is_list = [isinstance(label, (list, tuple)) for label in labels]
        rows = zip(labels, is_list, strict=True)
        return [tuple(sorted({x for x in label if type(x) is int and x >= 0})) if yes else () for label, yes in rows]
    are_classes = all(isinstance(label, int) for label in known) and 2 * len(set(known)) <= len(known)
    return [(label,) if are_classes and label is not None else () for label in labels]
