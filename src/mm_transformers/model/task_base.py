"""What a task kind is, and the registry of task kinds."""

import dataclasses
import functools
import math
import numbers
import re
from bisect import bisect_right
from collections import Counter
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple, Optional

import torch
from torch import nn

from .linear_probe import LinearProblem


# Names that would collide with what the model and the Trainer report beside the tasks.
_RESERVED_NAMES = {"loss", "regularization", "runtime", "samples_per_second", "steps_per_second", "epoch"}
_VALID_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_]*")

# Floats hold all integers up to here.
MAX_EXACT_FLOAT = 2**53
# 007 is no whole number; 1.0 is one, since tables with empty cells store integers as floats.
_WHOLE_NUMBER = re.compile(r"-?(0|[1-9][0-9]{0,17})(\.0+)?")
# `float` also takes 1_000.
NUMBER = re.compile(r"[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?|[-+]?(nan|inf(inity)?)", re.IGNORECASE)

TASK_KINDS: dict[str, type["Task"]] = {}


def register_task(cls: type["Task"]) -> type["Task"]:
    """
    Class decorator that makes a task kind known, so that it can be written to and read from `config.json`.

    The class becomes a dataclass; its fields are what `config.json` stores, so they must be JSON values.

    Raises:
        ValueError: if `kind` is missing or is already taken by another class.
    """
    kind = getattr(cls, "kind", None)
    if not isinstance(kind, str) or not kind:
        raise ValueError(f"{cls.__name__} needs a class attribute `kind`, a string that names the task kind.")
    known = TASK_KINDS.get(kind)
    if known is not None and known.__qualname__ != cls.__qualname__:
        raise ValueError(f"Task kind {kind!r} is already taken by {known.__name__}; choose another `kind`.")
    if "__dataclass_fields__" not in vars(cls):
        cls = dataclass(cls)
    TASK_KINDS[kind] = cls
    return cls


def task_from_dict(values: dict[str, Any]) -> "Task":
    """
    Builds the task that one entry of `config.tasks` describes.

    Raises:
        ValueError: if the kind is unknown, one of its options is, or one that it needs is missing.
    """
    if not isinstance(values, dict):
        raise ValueError(f"A task is a Task object or a dict with a 'kind' and a 'name', but got {values!r}.")
    values = dict(values)
    kind, name = values.pop("kind", None), values.get("name")
    if not isinstance(kind, str) or kind not in TASK_KINDS:
        raise ValueError(
            f"Unknown task kind {kind!r} of task {name!r}; known kinds are {', '.join(sorted(TASK_KINDS))}. "
            "A kind of your own must be imported (and so registered by @register_task) before it is loaded."
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
    What some kinds of labels need beside the cells.

    Args:
        word_index (batch, text_len) int64: the number of the word that starts at each token, -1 elsewhere; for tasks
            that label words.
        tokenizer: that of the processor; for tasks whose labels are texts.
        fingerprints: "text" or modality -> a number per row that is equal for equal content, `None` where the row has
            none; for tasks that compare rows.
    """

    word_index: Optional[torch.Tensor] = None
    tokenizer: Any = None
    fingerprints: Optional[dict[str, list[Optional[int]]]] = None


NO_CONTEXT = LabelContext()


@dataclass
class Task:
    """
    One question asked of every row: its head, its loss, how a column becomes a label and how logits become an answer.

    Subclass it, set `kind`, implement the methods that raise `NotImplementedError` and decorate with
    [`register_task`].

    Args:
        name (`str`): Key of the task in `labels`, `logits`, `losses` and metric names; letters, digits, underscores.
        loss_weight (`float`, *optional*, defaults to 1.0): Weight w_j of this task in the summed loss.
        column (`str`, *optional*): Column of the data set that holds the labels. Defaults to `name`.
    """

    name: str
    loss_weight: float = field(default=1.0, kw_only=True)
    column: Optional[str] = field(default=None, kw_only=True)

    kind: ClassVar[str]
    # What the loss is multiplied with to be a negative log-likelihood, up to the noise: 1/2 for squared errors.
    likelihood_scale: ClassVar[float] = 1.0
    # Names of metrics, as `mm_transformers.training.metrics` knows them.
    default_metrics: ClassVar[tuple[str, ...]] = ()
    # True if labels belong to words of the text; the context of labels then has the `word_index`.
    is_token_level: ClassVar[bool] = False
    # True if a column of texts that are all whole numbers holds numbers: ids of labels, or labels that are numbers.
    takes_whole_numbers: ClassVar[bool] = False
    # True if a decoder writes the answer; there is no head then.
    needs_decoder: ClassVar[bool] = False
    # What a row has in the column of the task if there is no such column; `None` says that the column is needed.
    default_cell: ClassVar[Any] = None
    # True if the rows of a batch are compared with each other; the context of labels then has `fingerprints`.
    compares_rows: ClassVar[bool] = False
    # The options that a head depends on: a saved head is of use to a task only if these are equal.
    head_options: ClassVar[tuple[str, ...]] = ("labels", "modality", "embedding_size")
    # True if the head is also to see pairs that do not match; see [`PairReading.judge_mismatched`].
    needs_mismatches: ClassVar[bool] = False

    def __post_init__(self):
        if not isinstance(self.name, str) or not _VALID_NAME.fullmatch(self.name):
            raise ValueError(
                f"Task name {self.name!r} is not valid: it must start with a letter and hold only letters, digits "
                "and underscores; use `column=` if the column of your data is called otherwise."
            )
        if self.name in _RESERVED_NAMES or hasattr(TaskHeads({}), self.name):
            raise ValueError(f"Task name {self.name!r} is reserved; choose another and say `column={self.name!r}`.")
        weight = self.loss_weight
        if not isinstance(weight, numbers.Real) or not math.isfinite(weight) or weight < 0:
            raise ValueError(f"Task {self.name!r}: loss_weight must be a number >= 0, but is {weight!r}.")
        self.loss_weight = float(weight)  # a number of numpy's would not go into JSON
        if self.column is None:
            self.column = self.name

    def to_dict(self) -> dict[str, Any]:
        """The JSON object that `config.json` stores."""
        return {"kind": self.kind, **dataclasses.asdict(self)}

    def build_head(self, config, hidden_size: int) -> nn.Module:
        """
        The task layer: a module called with the [`MMTransformerModelOutput`], of which most need `last_hidden_state`,
        the fused text tokens (batch, text_len, hidden_size), or `pooler_output`, their masked mean (batch,
        hidden_size); returns the logits.
        """
        raise NotImplementedError

    def wrong_labels(self, labels: torch.Tensor) -> Optional[str]:
        """
        What labels must be, as the end of a sentence, if these are something else; `None` if they are right, or it is
        not known. Called after computing with them has failed.
        """
        problem = self.linear_problem()
        if problem is None:
            return None
        if problem.kind != "multinomial":
            is_right = labels.is_floating_point() and not labels.isinf().any()
            return None if is_right else f"finite floating-point numbers, NaN where missing, but are {labels.dtype}"
        last = problem.num_outputs - 1
        if labels.dtype != torch.int64:
            return f"integers from 0 to {last}, -100 where missing, but have the type {labels.dtype}"
        known = labels[labels != -100]
        if known.numel() == 0 or (int(known.min()) >= 0 and int(known.max()) <= last):
            return None
        return f"integers from 0 to {last}, -100 where missing, but go from {known.min()} to {known.max()}"

    def linear_problem(self) -> Optional[LinearProblem]:
        """
        The linear model with which the task can start (see [`LinearProbe`]); by default none, so that the head starts
        from random weights.
        """
        return None

    @classmethod
    def read_text(cls, text: str, separator: str) -> Any:
        """
        What a cell of this kind stands for if it is a text, as all cells of a CSV file are; `None` if it is missing.
        The result goes to [`encode_label`]. By default the text itself, and a blank one is missing.

        Args:
            text: the cell.
            separator: what stands between the labels of a cell that holds several.
        """
        return text if text.strip() else None

    def read_known_text(self, text: str, separator: str) -> Any:
        """The same for a task whose labels are known. By default what [`read_text`] gives."""
        return self.read_text(text, separator)

    def encode_label(self, value: Any, text: str) -> Any:
        """
        Turns the cell of a row into what [`collate_labels`] takes; `None` if it is missing.

        Raises:
            ValueError: one sentence that says what was expected, if the cell is neither a label nor missing.
        """
        raise NotImplementedError

    def collate_labels(self, values: list[Any], context: LabelContext = NO_CONTEXT) -> torch.Tensor:
        """
        Stacks encoded labels, one or `None` per row; missing ones become -100 (integers) or NaN (floats).
        """
        raise NotImplementedError

    def encode_references(self, values: list[Any]) -> Optional[torch.Tensor]:
        """
        What metrics compare with, as a tensor with one row each, if labels do not hold all of the cells; `None` if they
        do, as by default. A missing label is a row of -100.

        Args:
            values: encoded labels, one or `None` per row.
        """
        return None

    def decode_references(self, references: Any) -> list[Any]:
        """The values of such a tensor or array."""
        raise NotImplementedError

    def labels_left(self, labels: torch.Tensor, kept: dict[str, torch.Tensor]) -> torch.Tensor:
        """
        The labels that modality dropout leaves: of rows that have lost their text, none for words. The mean of the loss
        is still that over all labels of the step, so it falls by the share that has been taken away.

        Args:
            kept: "text" or modality -> (batch,) bool, whether the row has it.
        """
        return labels.masked_fill(~kept["text"][:, None], -100) if self.is_token_level else labels

    @property
    def unresolved(self) -> tuple[str, ...]:
        """The names of the options that [`prepare_for`] has yet to read from the training labels; none by default."""
        return ()

    @property
    def decided_by_training(self) -> tuple[str, ...]:
        """The options that training may set: those that are `unresolved`, and those that [`balance`] changes."""
        return self.unresolved

    def prepare_for(self, labels: Iterable[Any]) -> None:
        """
        Sets the options that depend on the training labels, such as balanced class weights. [`MMTrainer`] calls it once
        before training if any option is `unresolved`; by default it does nothing.

        Args:
            labels: the encoded label of each training row, `None` where it is missing.
        """

    def balance(self, counts: Sequence[float]) -> None:
        """
        Makes all labels count alike in the loss, unless the user has said how they count. [`MMTrainer`] calls it if the
        task has started as a linear model with balanced classes; by default it does nothing.

        Args:
            counts: how many training rows have each label.
        """

    def strata(self, labels: list[Any]) -> list[tuple[Hashable, ...]]:
        """
        The strata of each row: both parts of a split should hold the same share of each stratum.

        By default that follows from the encoded labels: integers and truth values are classes, a list is in the stratum
        of each of its integers, and numbers fall into five quantile bins. Other labels, and integers of which more than
        half are distinct (ids), have no strata.

        Args:
            labels: the encoded label of each row, `None` where it is missing.
        """
        return default_strata(labels)

    def label_shape(self, logits: torch.Tensor) -> Optional[tuple[int, ...]]:
        """The shape that labels must have beside these logits; `None` if only the number of rows is known."""
        return None

    def loss(self, logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Sum of the losses over what is labelled, and how many of those there are, as two 0-dim float32 tensors."""
        raise NotImplementedError

    def num_labelled(self, labels: torch.Tensor) -> torch.Tensor:
        """How many rows (or words) have a label, the divisor of the summed loss: a 0-dim float32 tensor."""
        if labels.is_floating_point():
            known = ~labels.isnan()
            return (known.flatten(1).any(-1) if labels.ndim > 1 else known).sum().float()
        return (labels != -100).sum().float()

    def decode(self, logits: torch.Tensor, word_index: Optional[torch.Tensor] = None) -> list[Any]:
        """
        One answer per row, made of JSON values. A kind may take more options by keyword, such as `top_k`: whoever asks
        the pipeline for them has them handed on to the kinds that know them.
        """
        raise NotImplementedError

    def complete_answer(self, answer: Any, text: str) -> Any:
        """The answer of a row as it is written to a file; answers for words get one entry for each word."""
        return answer

    def answer_scores(
        self, logits: torch.Tensor, answers: list[Any], places: Optional[torch.Tensor] = None
    ) -> tuple[torch.Tensor, list[Any]]:
        """
        How much the logits speak for an answer, before any softmax: what an explanation follows back to the inputs.

        Args:
            logits: those of this task.
            answers: one per row, such as the name of a label; `None` for the answer that the model gives.
            places (`torch.BoolTensor` of shape `(batch, length)`, *optional*):
                For answers that have a part for each token: of which tokens; by default of all.

        Returns:
            (batch,) scores, and the answers.

        Raises:
            ValueError: if an answer is none that this task can give.
        """
        raise ValueError(f"Task {self.name!r}: tasks of kind {self.kind!r} do not say how to explain their answers.")

    def predictions_and_references(
        self, logits: torch.Tensor, labels: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What metrics compare: predictions and labels, of what is labelled only."""
        raise NotImplementedError


def check_label_shape(task: Task, logits: torch.Tensor, labels: torch.Tensor) -> None:
    """
    Raises:
        ValueError: if labels of another shape would be spread over the logits.
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
    The task layers, by name. Not an `nn.ModuleDict`, which has no `forward` that PEFT could wrap: heads are new, so
    whoever trains adapters puts "heads" among the `modules_to_save`.
    """

    def __init__(self, heads: dict[str, nn.Module]):
        super().__init__()
        self.names = list(heads)
        for name, head in heads.items():
            self.add_module(name, head)

    def forward(self, outputs: Any) -> dict[str, torch.Tensor]:
        """The logits of each task, from a [`MMTransformerModelOutput`]."""
        return {name: getattr(self, name)(outputs) for name in self.names}


class PooledHead(nn.Module):
    """
    Dropout, dense, tanh, dropout, projection, on the pooled fused states: the sentence head of RoBERTa
    (https://arxiv.org/abs/1907.11692). (batch, hidden_size) -> (batch, num_outputs).
    """

    def __init__(self, hidden_size: int, num_outputs: int, dropout: float):
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


# What stands in a list in the place of a label, such as one that fills it up to the length of others.
PADDING = -100


def is_null(value: Any) -> bool:
    """True for `None`, NaN and pandas' missing values: the ways in which tables leave a cell empty."""
    value = as_scalar(value)
    if value is None or type(value).__name__ in ("NAType", "NaTType"):
        return True
    return isinstance(value, numbers.Real) and bool(value != value)


def is_missing(value: Any) -> bool:
    """True for what says "no label": an empty cell, or -100."""
    value = as_scalar(value)
    return is_null(value) or (isinstance(value, numbers.Real) and bool(value == -100))


def as_scalar(value: Any) -> Any:
    """The Python value of a scalar of numpy or torch, which formatted data sets hold; anything else as it is."""
    return value.item() if getattr(value, "ndim", None) == 0 and hasattr(value, "item") else value


def check_labels(name: str, labels: list[Any]) -> list[str]:
    """The label names as strings, checked: at least two, no duplicates."""
    if isinstance(labels, str) or not isinstance(labels, (list, tuple)):
        raise ValueError(f"Task {name!r}: labels must be a list of names, but is {labels!r}.")
    wrong = [label for label in labels if isinstance(label, (list, tuple, dict))]
    if wrong:
        raise ValueError(f"Task {name!r}: a label must be a name, but is {shorten_value(wrong[0])}.")
    labels = [str(label) for label in labels]
    if len(labels) == 0:
        raise ValueError(f"Task {name!r} needs its label names: labels=['...', '...'].")
    if str(PADDING) in labels:
        raise ValueError(f"Task {name!r}: no label can be called {PADDING}, which marks a missing label.")
    duplicates = sorted(label for label, count in Counter(labels).items() if count > 1)
    if duplicates:
        raise ValueError(f"Task {name!r}: label {duplicates[0]!r} occurs twice in labels.")
    return labels


def label_scores(task: Any, logits: torch.Tensor, answers: list[Any]) -> tuple[torch.Tensor, list[str]]:
    """Of each row the logit (batch, num_labels) of one label, by default of the highest; and the labels' names."""
    chosen = logits.argmax(-1).tolist()
    ids = [
        i if answer is None else label_id(task.name, task.labels, answer)
        for i, answer in zip(chosen, answers, strict=True)
    ]
    return logits[torch.arange(len(ids), device=logits.device), ids], [task.labels[i] for i in ids]


def label_id(name: str, labels: list[str], value: Any) -> int:
    """
    The id of one label, given as its name or its id. A whole-number float counts as an id, since tables with
    missing cells store integers as floats. If the names are themselves numbers ("1" to "5" stars), a number
    is a name, not an id. A truth value is the label "True" or "False", in upper or lower case, or "1" or "0".
    """
    value = as_scalar(value)
    if isinstance(value, str):
        found = _named(labels, value)
        if found is None and value.strip().lower() in ("true", "false"):
            found = _truth_value(labels, value.strip().lower())
        if found is not None:
            return found
        raise ValueError(f"task {name!r}: label {shorten(value)!r} is not one of: {_shown(labels)}")
    if isinstance(value, bool):
        found = _truth_value(labels, str(value).lower())
        found = _named(labels, str(int(value))) if found is None else found
        if found is not None:
            return found
    elif isinstance(value, numbers.Real):
        if isinstance(value, float) and MAX_EXACT_FLOAT < abs(value) < math.inf:
            raise ValueError(
                f"task {name!r}: the label {value:.0f} is a float, and beyond {MAX_EXACT_FLOAT:,} these are not exact; "
                "store the column as integers or texts"
            )
        names = _numbers_in(tuple(labels))
        if not names and value in range(len(labels)):
            return int(float(value))
        if value in names:
            return names[value]
        also = "" if names else f" (or an id from 0 to {len(labels) - 1})"
        raise ValueError(
            f"task {name!r}: label {shorten(str(value))} is not one of: {_shown(labels)}{also}; a missing label is "
            "None, NaN or -100"
        )
    raise ValueError(
        f"task {name!r}: a label must be a name or an id (None if it is missing), but is {shorten_value(value)} of "
        f"type {type(value).__name__}"
    )


def ids_are_places(labels: list[str]) -> bool:
    """Whether a number in a cell is the place of a label, since no label is itself a number."""
    return not _numbers_in(tuple(labels))


def _named(labels: list[str], text: str) -> Optional[int]:
    """The place of a name, with or without white space around it."""
    found = text if text in labels else text.strip()
    return labels.index(found) if found in labels else None


def _truth_value(labels: list[str], word: str) -> Optional[int]:
    """The place of "true" or "false", however written, if there is one."""
    places = [i for i, label in enumerate(labels) if label.lower() == word]
    return places[0] if len(places) == 1 else None


def _shown(labels: list[str]) -> str:
    return f"{', '.join(map(shorten, labels[:20]))}{', ...' if len(labels) > 20 else ''}"


def shorten(text: str) -> str:
    """A text as messages show it: of a long one the beginning and the length."""
    return text if len(text) <= 120 else f"{text[:60]}... ({len(text):,} characters)"


def shorten_value(value: Any) -> str:
    """What a cell holds, as messages show it: in one line, also where it is an array."""
    return shorten(repr(value)).replace("\n", " ")


@functools.cache
def _numbers_in(labels: tuple[str, ...]) -> dict[float, int]:
    """The ids of the label names that are themselves numbers."""
    ids: dict[float, int] = {}
    for i, label in enumerate(labels):
        if not NUMBER.fullmatch(label) or len(label) > 300:  # longer ones are no floats
            continue
        # Not by way of a float, which would round.
        number = int(label) if label.lstrip("+-").isdigit() else float(label)
        if math.isfinite(number) and (number not in ids or label == str(number)):  # of 007 and 7, the number is 7
            ids[number] = i
    return ids


def whole_number(text: str) -> int | None:
    """The number that a text is, if it is a whole one, as "7", "-7" or "7.0"; exactly, whatever its size."""
    return int(text.partition(".")[0]) if _WHOLE_NUMBER.fullmatch(text) else None
