"""
A task with a linear problem starts as the best linear model of the mean encoder outputs.

Linear probing, then fine-tuning: a random head distorts good features in the first steps, a solved one does not (Kumar
et al. 2022, https://arxiv.org/abs/2202.10054).
"""

import json
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from accelerate.utils import broadcast_object_list, gather_object, send_to_device
from torch.utils.data import ConcatDataset, DataLoader, Subset
from transformers import TrainingArguments
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.utils import logging

from ...data.collator import MMDataCollator
from ...data.mixture import DataMixture
from ...data.sources import ROWS_PER_SOURCE, DataSource
from ...data.splitting import find_groups
from ...model.answers import evaluation_mode
from ...model.linear_probe import LinearProbe, ProbedHead
from ...model.linear_problem import LinearProblem
from ...model.modeling_mm_transformer import MMTransformerForMultiTask, MMTransformerModelOutput
from ...model.task_base import Task
from .linear_models import NUM_FOLDS, LinearModel, majority, solve
from .study import Study, doubtful_labels
from .verdict import Verdict, verdict_of


logger = logging.get_logger(__name__)

# More rows (or words, for tasks that label words) hardly improve a linear model.
MAX_ROWS, MAX_TOKENS = 20_000, 40_000


def probes_of(model: torch.nn.Module) -> dict[str, list[LinearProbe]]:
    """Task -> its probe; if PEFT trains the heads completely, also the trained copy."""
    probes: dict[str, list[LinearProbe]] = {}
    for name, module in model.named_modules():
        if isinstance(module, ProbedHead):
            probes.setdefault(name.rpartition(".")[2], []).append(module.probe)
    return probes


def is_new(probe: LinearProbe) -> bool:
    """Whether its weights have not been set by a start or by training."""
    return not probe.linear.weight.any() and not probe.linear.bias.any()


FILE_NAME = "linear_start.json"


@dataclass
class Start:
    """
    The start of the tasks.

    Args:
        tasks: names of the tasks that started as linear models.
        models: task -> its linear model; empty in a resumed training.
        verdicts: task -> the linear model beside simpler ones on the validation rows; empty without such rows.
        label_counts: task with balanced classes -> the number of training rows of each label.
    """

    tasks: list[str] = field(default_factory=list)
    models: dict[str, LinearModel] = field(default_factory=dict)
    verdicts: dict[str, Verdict] = field(default_factory=dict)
    label_counts: dict[str, list[int]] = field(default_factory=dict)

    def save(self, folder: str) -> None:
        """Saves the data for a resumed training beside a checkpoint; nothing without linear starts."""
        if self.tasks:
            verdicts = {name: asdict(verdict) for name, verdict in self.verdicts.items()}
            found = {"tasks": self.tasks, "verdicts": verdicts, "label_counts": self.label_counts}
            text = json.dumps(found, indent=2)
            Path(folder, FILE_NAME).write_text(f"{text}\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: str) -> "Start":
        """Loads the start that [`save`] wrote."""
        path = Path(folder, FILE_NAME)
        if not path.is_file():
            return cls()
        found = json.loads(path.read_text(encoding="utf-8"))
        verdicts = {name: Verdict(**values) for name, values in found["verdicts"].items()}
        return cls(found.get("tasks", list(verdicts)), verdicts=verdicts, label_counts=found["label_counts"])


class StartedTrainer(Protocol):
    """The part of [`MMTrainer`] that the start needs."""

    args: TrainingArguments
    train_dataset: Any
    eval_dataset: Any
    data_collator: Any
    is_fsdp_enabled: bool
    study: Study | None

    @property
    def fused_model(self) -> MMTransformerForMultiTask: ...

    def rows_of(self, dataset: Any) -> tuple[Any, Any]: ...

    def collator_for(self, rows: Any) -> MMDataCollator: ...

    def compute_loss_context_manager(self) -> AbstractContextManager[Any]: ...


def start_probes(trainer: StartedTrainer) -> Start:
    """
    Solves the linear problem of each task with a new probe, and copies the solution into the probe.

    After that the model answers exactly as the linear model.

    Args:
        trainer ([`MMTrainer`]): Its model is not yet wrapped for training. All processes must call this.

    Returns:
        The start, equal in all processes.
    """
    fused, dataset = trainer.fused_model, trainer.train_dataset
    if dataset is None or not probes_of(fused):
        return Start()
    why_not = _why_not(trainer)
    if why_not is not None:
        logger.warning(f"The tasks do not start as linear models: {why_not}. probe_start=False turns this start off.")
        return Start()
    waiting = {name: probes for name, probes in probes_of(fused).items() if all(map(is_new, probes))}
    if not waiting:
        return Start()
    parts = _map_style(dataset, trainer)
    assert parts is not None  # it is no stream
    reader = _Reader(trainer, {name: probes[0] for name, probes in waiting.items()})
    train = reader.read(parts, "linear start")
    if len(parts) == 1:  # where the trainer held rows out, the numbers in the data set of the user
        numbers = np.asarray(parts[0][0].numbers)
        train = {name: items._replace(rows=numbers[items.rows]) for name, items in train.items()}
    held_out = trainer.eval_dataset
    others = None if held_out is None or isinstance(held_out, dict) else _map_style(held_out, trainer)
    known = {} if others is None else reader.read(others, "linear start: validation rows", with_groups=False)
    study, also = trainer.study, {}
    if study is not None and study.rows is not None and (more := _map_style(study.rows, trainer)) is not None:
        also = reader.read(more, "linear start: further rows", with_groups=False)
    found: list[Any] = [None, {}, {}]
    if trainer.args.process_index == 0:
        start = _solved(fused.tasks, reader.probes, train, known, also, study, fused.config.reads_text)
        found = [start, *((study.verdicts, study.doubtful) if study is not None else ({}, {}))]
    start, verdicts, doubtful = broadcast_object_list(found)
    if study is not None:
        study.verdicts, study.doubtful = verdicts, doubtful
    for name, model in start.models.items():
        for probe in waiting[name]:
            with torch.no_grad():
                probe.linear.weight.copy_(torch.from_numpy(model.weight))
                probe.linear.bias.copy_(torch.from_numpy(model.bias))
    if start.models and trainer.args.process_index == 0:
        names = ", ".join(f"{name} ({model.num_items:,} labels)" for name, model in start.models.items())
        logger.warning(f"Started as linear models of the mean encoder outputs: {names}.")
    return start


def _why_not(trainer: StartedTrainer) -> str | None:
    """The reason why the encoders cannot run on all rows before training; a part of a sentence."""
    if not isinstance(trainer.data_collator, MMDataCollator):
        return f"the data_collator is a {type(trainer.data_collator).__name__}, not an MMDataCollator"
    if _map_style(trainer.train_dataset, trainer) is None:
        return "the training rows are a stream"
    if is_deepspeed_zero3_enabled() or trainer.is_fsdp_enabled:
        return "FSDP and ZeRO-3 split the model"
    return None


def _solved(
    tasks: dict[str, Task],
    probes: dict[str, LinearProbe],
    train: dict[str, "_Items"],
    held_out: dict[str, "_Items"],
    further: dict[str, "_Items"],
    study: Study | None,
    reads_text: bool,
) -> Start:
    start = Start()
    for name, probe in probes.items():
        problem, items = problem_of(tasks[name]), train[name]
        model = solve(problem, probe.blocks, items.features, items.labels, items.groups)
        if model is None:
            continue
        start.tasks.append(name)
        start.models[name] = model
        if model.label_counts is not None:
            start.label_counts[name] = model.label_counts
        text = probe.blocks[:1]
        width = text[0][1] + 1
        alone: LinearModel | None = None
        for rows, verdicts in ((held_out, start.verdicts), (further, study.verdicts if study is not None else {})):
            others = rows.get(name)
            if others is None or len(others.labels) == 0:
                continue
            if reads_text and alone is None:
                alone = solve(problem, text, items.features[:, :width], items.labels, items.groups)
                assert alone is not None  # the labels are the same
            logits, labels = problem.as_tensors(model(others.features), others.labels)
            constant, _ = problem.as_tensors(majority(problem, items, len(others.labels)), others.labels)
            of_text = None
            if alone is not None:
                of_text, _ = problem.as_tensors(alone(others.features[:, :width]), others.labels)
            verdict = verdict_of(tasks[name], labels, logits, of_text, constant)
            if verdict is not None:
                verdicts[name] = verdict
        if study is not None:
            study.doubtful[name] = doubtful_labels(tasks[name], problem, probe.blocks, model, items)
    return start


def problem_of(task: Task) -> LinearProblem:
    problem = task.linear_problem()
    assert problem is not None  # it has a probe
    return problem


# Features


def _map_style(dataset: Any, trainer: StartedTrainer) -> list[tuple[Any, Any]] | None:
    """The data sets of a training set, each as the data loader reads it and unchanged; `None` for streams."""
    if isinstance(dataset, DataMixture):
        sources = dataset.sources.items()
        if any(source.is_stream for _, source in sources):
            return None
        return [(source.rows(trainer.data_collator, name), source) for name, source in sources]
    source = dataset if isinstance(dataset, DataSource) else DataSource(dataset)
    return None if source.is_stream else [(trainer.rows_of(dataset)[0], source)]


def _groups(parts: list[tuple[Any, Any]], collator: MMDataCollator) -> np.ndarray:
    """(num_rows,) int64: rows of one picture, video or sound have the same number."""
    groups: list[np.ndarray] = []
    for _, source in parts:
        found = find_groups(source, 1 / NUM_FOLDS, collator.text_column, collator.splitters)
        groups.append(found + sum(len(known) for known in groups))
    return np.concatenate(groups)


class _Items(NamedTuple):
    features: np.ndarray
    labels: np.ndarray
    groups: np.ndarray
    rows: np.ndarray


class _Reader:
    """Reads features, labels and groups of labelled rows."""

    def __init__(self, trainer: StartedTrainer, probes: dict[str, LinearProbe]):
        self.trainer, self.probes = trainer, probes
        self.problems = {name: problem_of(trainer.fused_model.tasks[name]) for name in probes}

    def read(self, parts: list[tuple[Any, Any]], what: str, with_groups: bool = True) -> dict[str, _Items]:
        """Task -> the items of all processes; without groups, all have the same group."""
        args, fused = self.trainer.args, self.trainer.fused_model
        rows: Any = ConcatDataset([part for part, _ in parts])
        collator = self.trainer.collator_for(rows)
        rng = np.random.default_rng(args.seed)
        groups = _groups(parts, collator) if with_groups else np.zeros(len(rows), np.int64)
        chosen = np.sort(rng.permutation(len(rows))[:MAX_ROWS])
        mine = chosen[args.process_index :: args.world_size].tolist()
        loader = DataLoader(
            Subset(rows, mine),
            batch_size=args.eval_batch_size,
            collate_fn=collator,
            num_workers=args.dataloader_num_workers,
        )
        device = next(fused.parameters()).device
        pieces: dict[str, list[_Items]] = {name: [] for name in self.probes}
        place = 0
        # Reading must not change the random numbers of training.
        rng_kept = torch.random.fork_rng(devices=range(torch.cuda.device_count()))
        with rng_kept, evaluation_mode(fused), torch.no_grad(), self.trainer.compute_loss_context_manager():
            for batch in logging.tqdm(
                loader, desc=what, disable=args.disable_tqdm or args.process_index > 0, leave=False
            ):
                labels = batch.pop("labels")
                batch.pop(ROWS_PER_SOURCE, None)
                size = len(batch["attention_mask"])
                numbers = torch.tensor(mine[place : place + size])
                place += size
                encoded, _ = fused.model.encode_rows(**send_to_device(dict(batch), device))
                outputs = MMTransformerModelOutput(encoded=encoded)
                features: dict[bool, torch.Tensor] = {}
                for name, probe in self.probes.items():
                    problem = self.problems[name]
                    if problem.per_token not in features:
                        features[problem.per_token] = probe.features(outputs).float().cpu()
                    items = _labelled(problem, features[problem.per_token], labels[name], numbers, groups)
                    # For words, each batch contributes its share of the used words.
                    share = -(-MAX_TOKENS * size // len(chosen))
                    if len(items.labels) > share:
                        some = np.sort(rng.permutation(len(items.labels))[:share])
                        items = _Items(*(x[some] for x in items))
                    pieces[name].append(items)
        return {name: self._joined(found, rng) for name, found in pieces.items()}

    def _joined(self, found: list[_Items], rng: np.random.Generator) -> _Items:
        gathered = gather_object([_concatenated(found)] if found else [])
        if not gathered:  # no rows at all
            nothing = np.zeros(0, np.int64)
            return _Items(np.zeros((0, 0)), nothing, nothing, nothing)
        items = _concatenated(gathered)
        if len(items.labels) > MAX_TOKENS:
            some = np.sort(rng.permutation(len(items.labels))[:MAX_TOKENS])
            items = _Items(*(x[some] for x in items))
        return items


def _concatenated(parts: list[_Items]) -> _Items:
    return _Items(*(np.concatenate(x) for x in zip(*parts, strict=True)))


def _labelled(
    problem: LinearProblem, features: torch.Tensor, labels: torch.Tensor, rows: torch.Tensor, groups: np.ndarray
) -> _Items:
    """
    The items that have a label.

    Args:
        rows: the numbers of the rows.
        groups: of all rows.
    """
    labels, known = problem.known(labels)
    if problem.per_token:
        rows = rows[:, None].expand(labels.shape)
    numbers = rows[known].numpy()
    return _Items(features[known].numpy(), labels[known].numpy(), groups[numbers], numbers)
