"""Answers the rows of a table, a list or a stream, in one process or several."""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import count, islice
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather_object, send_to_device
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from transformers.utils import logging

from ..data.cells import RowReader, opened
from ..data.collator import MMDataCollator
from ..data.folders import FolderRows
from ..data.sources import ROW_KEY, media_of, name_of_row
from ..model.answers import check_tasks, unwrapped
from ..model.conformal import level_of
from ..model.embeddings import vectors_of_rows
from ..model.modeling_mm_transformer import MMTransformerForMultiTask
from ..model.predictions import Predictions
from ..model.processing_mm_transformer import MMTransformerProcessor


logger = logging.get_logger(__name__)

_OWN_OPTIONS = ("batch_size", "num_workers", "probabilities", "coverage")


class Predictor:
    """
    Answers the rows of a table, a list or a stream, in their order, a few batches at a time.

    With n processes, each answers every n-th batch, and all get all answers.

    A row without any content gets answers whose parts are all `None`, such as `{"label": None, "score": None}`, and a
    warning counts such rows. One empty row must not cost the answers to a million others. `num_empty_rows` and
    `first_empty_row` are those of the last run.

    Args:
        model ([`MMTransformerForMultiTask`]): On the device of this process.
        collator ([`MMDataCollator`]): The columns of texts, pictures and sounds. Columns of labels are not read. The
            processor of the model stands for a collator with the default columns.
        tasks (`list[str]`, *optional*): The tasks to answer; all by default. A decoder runs only for these.
        batch_size (`int`, *optional*, defaults to 32): Rows per batch.
        num_workers (`int`, *optional*, defaults to 0): Processes that read files in the background.
        probabilities (`bool`, *optional*, defaults to `False`):
            Adds `"probabilities"` to the answers of tasks that choose among labels: a dict from label to probability.
        coverage (`float`, *optional*): Adds sets or intervals that hold the truth in this share of rows, and whether to
            abstain, for tasks that are calibrated; see [`calibrate`].
        generation_options: for `model.generate`, if a task writes texts.

    Raises:
        ValueError: if the model has no such task; when called, one sentence that names the row that cannot be read.

    Example:

    ```python
    >>> predictor = Predictor.from_pretrained("my-model", image_column="photo")  # a folder or a Hub id

    >>> table = load_dataset("csv", data_files="rows.csv")["train"]
    >>> predictor(table)[0]
    {'sentiment': {'label': 'negative', 'score': 0.87}}

    >>> stream = load_dataset("csv", data_files="rows.csv", streaming=True)["train"]
    >>> for batch in predictor.stream(stream):  # holds a few batches at a time
    ...     for row, answers in batch:
    ...         print(row["id"], answers["sentiment"]["label"])
    ```
    """

    def __init__(
        self,
        model: MMTransformerForMultiTask,
        collator: MMDataCollator | MMTransformerProcessor,
        tasks: Sequence[str] | None = None,
        batch_size: int = 32,
        num_workers: int = 0,
        probabilities: bool = False,
        coverage: float | None = None,
        **generation_options: Any,
    ):
        self.model: MMTransformerForMultiTask = unwrapped(model)
        if isinstance(collator, MMTransformerProcessor):
            collator = MMDataCollator(collator, self.model.config)
        self.collator, self.tasks = collator, check_tasks(self.model, tasks)
        self.batch_size, self.num_workers, self.generation_options = batch_size, num_workers, generation_options
        self.probabilities, self.coverage = probabilities, coverage
        self.num_empty_rows, self.first_empty_row = 0, -1
        if coverage is not None:
            level_of(coverage)

    @property
    def probability_names(self) -> dict[str, list[str]]:
        """Task -> the labels whose probabilities its answers hold; for [`answer_columns`]."""
        return {name: self.model.tasks[name].probability_names for name in self.tasks if self.probabilities}

    def example(self) -> dict[str, Any]:
        """The answers to a short text, or for a model without text to nothing: they have the types of all answers."""
        inputs = dict(self.collator.processor(text=["a"], return_word_index=True, return_tensors="pt"))
        word_index = inputs.pop("word_index", None)
        return self._answers(send_to_device(inputs, self.model.device), word_index, ["a"])[0]

    @property
    def answer_keys(self) -> dict[str, Sequence[str]]:
        """Task -> the keys of its answer for one word; for [`answer_columns`]."""
        return {name: self.model.tasks[name].answer_keys for name in self.tasks}

    @classmethod
    def from_pretrained(
        cls, name: str | os.PathLike[str], tasks: Sequence[str] | None = None, **options: Any
    ) -> "Predictor":
        """
        Loads a model and its processor.

        Args:
            name: a folder or a Hub id.
            tasks: the tasks to answer; all by default.
            options: `batch_size`, `num_workers`, `probabilities`, `coverage`, and the options of [`MMDataCollator`],
                such as `image_column`. The columns default to those of the training table, if the processor knows them.
        """
        model = MMTransformerForMultiTask.from_pretrained(name)
        own = {key: options.pop(key) for key in _OWN_OPTIONS if key in options}
        processor = MMTransformerProcessor.from_pretrained(name)
        collator = MMDataCollator(processor, model.config, **{**processor.column_arguments, **options})
        return cls(model.to(PartialState().device), collator, tasks, **own)

    def __call__(self, rows: Iterable[Mapping[str, Any]] | str | os.PathLike[str]) -> list[dict[str, Any]]:
        """
        The answers to all rows: for each row a dict from task to answer, from [`Task.decode`].

        Tasks that write answer `{"text": ...}`.

        Args:
            rows: a list, a data set, a table of pandas, or another iterable of dicts. A path is a folder of pictures,
                videos or sounds: one row for each file, in the order of the paths.
        """
        return [answers for batch in self.stream(rows, keep=_nothing) for _, answers in batch]

    def stream(
        self,
        rows: Iterable[Mapping[str, Any]] | str | os.PathLike[str],
        prepare: Callable[[Any], Mapping[str, Any]] = dict,
        keep: Callable[[Any], Any] = dict,
    ) -> Iterator[list[tuple[Any, dict[str, Any]]]]:
        """
        The same batch by batch.

        Args:
            rows: each process, and each worker, reads them on its own: they must be equal for all. The rows of a folder
                are dicts such as `{"image": "holiday/beach.png"}`.
            prepare: a row -> the row for the collator.
            keep: a row -> the part of it to return with its answers; by default all of it. A data set has its pictures
                and sounds there as they are stored.

        Yields:
            For each batch a list of pairs: the part that is kept, and the answers.
        """
        return self._each_batch(rows, prepare, keep, self._answers)

    def embed(
        self,
        rows: Iterable[Mapping[str, Any]] | str | os.PathLike[str],
        task: str | None = None,
        normalize: bool = False,
        prepare: Callable[[Any], Mapping[str, Any]] = dict,
    ) -> dict[str, np.ndarray]:
        """
        The vectors of all rows, for search, clustering or other models; see [`MMTransformerForMultiTask.embed`].

        Args:
            rows: as for answers.
            task: name of a [`Retrieval`] task, for the vectors with which it compares texts and items.
            normalize: scales all vectors to length 1.
            prepare: as in [`stream`].

        Returns:
            "fused", "text", "vision", ... -> (rows, width) float32; NaN where a row lacks the modality.

        Raises:
            ValueError: one sentence, if there is no row, no such task, or a row cannot be read.

        Example:

        ```python
        >>> vectors = Predictor(model, processor).embed(rows)
        >>> vectors["fused"].shape[0] == len(rows)
        True
        ```
        """
        batches = self.stream_embeddings(rows, task, normalize, prepare, keep=_nothing)
        found = [vectors for batch in batches for _, vectors in batch]
        if not found:
            raise ValueError("There are no rows to embed.")
        result = {}
        for name, width in self.embedding_widths(task).items():
            missing = np.full(width, np.nan, np.float32)
            result[name] = np.stack([missing if row[name] is None else row[name] for row in found])
        return result

    def embedding_widths(self, task: str | None = None) -> dict[str, int]:
        """The name of each vector of [`embed`], and its width."""
        empty = self.collator.processor(text=[""], return_tensors="pt")
        with torch.no_grad():
            vectors = self.model.embed(task, **send_to_device(dict(empty), self.model.device))
        return {name: value.shape[1] for name, value in vectors.items()}

    def stream_embeddings(
        self,
        rows: Iterable[Mapping[str, Any]] | str | os.PathLike[str],
        task: str | None = None,
        normalize: bool = False,
        prepare: Callable[[Any], Mapping[str, Any]] = dict,
        keep: Callable[[Any], Any] = dict,
    ) -> Iterator[list[tuple[Any, dict[str, Any]]]]:
        """
        The same batch by batch.

        Args:
            rows, prepare, keep: as in [`stream`].
            task, normalize: as in [`embed`].

        Yields:
            For each batch a list of pairs: the part that is kept, and a dict from name to vector, `None` where the row
            lacks the modality.
        """

        def vectors(inputs: dict[str, Any], word_index: Any, texts: list[str]) -> list[dict[str, Any]]:
            return vectors_of_rows(self.model.embed(task, normalize, **inputs))

        return self._each_batch(rows, prepare, keep, vectors)

    def _answers(
        self, inputs: dict[str, Any], word_index: torch.Tensor | None, texts: list[str]
    ) -> list[dict[str, Any]]:
        answers = Predictions.of(self.model, inputs).answers(
            self.collator.processor,
            self.tasks,
            word_index,
            probabilities=self.probabilities,
            coverage=self.coverage,
            **self.generation_options,
        )
        for answer, text in zip(answers, texts, strict=True):
            answer.update({n: self.model.tasks[n].complete_answer(answer[n], text) for n in self.tasks})
        return answers

    def _each_batch(
        self,
        rows: Iterable[Mapping[str, Any]] | str | os.PathLike[str],
        prepare: Callable[[Any], Mapping[str, Any]],
        keep: Callable[[Any], Any],
        compute: Callable[[dict[str, Any], Any, list[str]], list[dict[str, Any]]],
    ) -> Iterator[list[tuple[Any, dict[str, Any]]]]:
        """
        The results of `compute`, batch by batch, in the order of the rows.

        Args:
            compute: model inputs, numbers of words, texts -> the result of each row.
        """
        state = PartialState()
        self.num_empty_rows, self.first_empty_row = 0, -1
        if isinstance(rows, (str, os.PathLike)):
            rows = FolderRows(rows, self.collator)
            prepare = rows.read
        dataset, reader = opened(rows, media_of(self.collator))
        options = (self.batch_size, state.process_index, state.num_processes, reader, prepare, keep)
        share = _Share(dataset, self.collator, *options)
        batches = iter(DataLoader(share, batch_size=None, num_workers=self.num_workers))
        while True:
            batch = next(batches, None)
            done: list[Any] = []
            if isinstance(batch, ValueError):
                done = [batch]
            elif batch is not None:
                kept, inputs, word_index, texts, empty, first = batch
                results = compute(send_to_device(inputs, self.model.device), word_index, texts)
                for i in empty:
                    results[i] = {name: _without_values(result) for name, result in results[i].items()}
                done = [(list(zip(kept, results, strict=True)), [first + i for i in empty])]
            if state.num_processes > 1:
                done = gather_object(done)
            if not done:
                break
            for computed in done:
                if isinstance(computed, ValueError):
                    raise computed  # in all processes, so that none waits for the others
                answered, empty = computed
                if empty and not self.num_empty_rows:
                    self.first_empty_row = empty[0]
                self.num_empty_rows += len(empty)
                yield answered
        if self.num_empty_rows and state.is_main_process:
            count = self.num_empty_rows
            logger.warning(
                f"{count:,} {'row has' if count == 1 else 'rows have'} no content in {self.collator.shown_inputs()} "
                f"and no answer; the first is row {self.first_empty_row:,}."
            )


def _nothing(row: Any) -> None:
    return None


def _without_values(result: Any) -> Any:
    """The same parts, each `None`, so that a table has the same columns for each row."""
    if isinstance(result, dict):
        return dict.fromkeys(result)
    # Answers of tasks that label words are a list of dicts, one per word: a row without words has none.
    return [] if isinstance(result, list) and all(isinstance(item, dict) for item in result) else None


def answer_columns(
    answers: Mapping[str, Any],
    probability_names: Mapping[str, Sequence[str]] | None = None,
    answer_keys: Mapping[str, Sequence[str]] | None = None,
) -> dict[str, Any]:
    """
    The answers of a row as columns.

    The column with the name of the task holds the first part of its answer (a label, a number, a text). The other parts
    have columns such as `topic_score`. Answers of tasks that label words are lists, so each of their columns is a list.

    Args:
        probability_names: task -> the labels whose probabilities become columns, such as `topic_probability_animals`.
        answer_keys: task -> the keys of an answer for one word; see [`Predictor.answer_keys`].

    Raises:
        ValueError: if two tasks would have the same column, as tasks `topic` and `topic_score` do.
    """
    columns: dict[str, Any] = {}
    for name, answer in answers.items():
        labels = (probability_names or {}).get(name, ())
        keys = (answer_keys or {}).get(name, ())
        for column, value in [*_parts(name, answer, keys, bool(labels)), *_probabilities(name, answer, labels)]:
            if column in columns:
                raise ValueError(
                    f"The answers of task {name!r} and of another task would both be in a column {column!r}. Answer "
                    "these two tasks one at a time, by tasks=[...]."
                )
            columns[column] = value
    return columns


def _parts(name: str, answer: Any, keys: Sequence[str], without_probabilities: bool) -> list[tuple[str, Any]]:
    """The parts of the answer of one task, with their columns."""
    if isinstance(answer, list) and all(isinstance(item, dict) for item in answer):
        found = dict.fromkeys(key for item in answer for key in item) or keys
        answer = {key: [item.get(key) for item in answer] for key in found} or answer
    if not isinstance(answer, dict):
        return [(name, answer)]
    parts = [part for part in answer.items() if not (without_probabilities and part[0] == "probabilities")]
    return [(name if i == 0 else f"{name}_{key}", value) for i, (key, value) in enumerate(parts)]


def _probabilities(name: str, answer: Any, labels: Sequence[str]) -> list[tuple[str, Any]]:
    """The probability of each label, or a list of those of the words, with their columns."""

    def of(item: Any, label: str) -> Any:
        return (item.get("probabilities") or {}).get(label)

    return [
        (
            f"{name}_probability_{label}",
            [of(item, label) for item in answer] if isinstance(answer, list) else of(answer, label),
        )
        for label in labels
    ]


class _Share(IterableDataset[dict[str, Any]]):
    """The batches of one process, or of one of its workers: the kept parts of the rows, and the model inputs."""

    def __init__(
        self,
        rows: Iterable[Mapping[str, Any]],
        collator: MMDataCollator,
        batch_size: int,
        rank: int,
        num_processes: int,
        reader: RowReader,
        prepare: Callable[[Any], Mapping[str, Any]],
        keep: Callable[[Any], Any],
    ):
        self.rows, self.batch_size = rows, batch_size
        self.collator = collator.with_word_index().with_empty_rows()
        self.rank, self.num_processes = rank, num_processes
        self.reader, self.prepare, self.keep = reader, prepare, keep
        self.columns = collator.input_columns

    def __iter__(self) -> Iterator[Any]:
        worker = get_worker_info()
        worker_id, num_workers = (worker.id, worker.num_workers) if worker is not None else (0, 1)
        # The loader reads its workers in turn, so the outputs of each process have the order of the rows.
        mine, period = self.rank + self.num_processes * worker_id, self.num_processes * num_workers
        rows = iter(self.rows)
        for number in count():
            try:
                batch = list(islice(rows, self.batch_size))
                if number % period == mine and batch:
                    yield self._read(batch, number * self.batch_size)
            except ValueError as error:
                # Not raised here: a loader would put the traceback of its worker into the message.
                yield ValueError(str(error))
                return
            if not batch:
                return

    def _read(
        self, rows: list[Mapping[str, Any]], first: int
    ) -> tuple[list[Any], dict[str, Any], torch.Tensor | None, list[str], list[int], int]:
        # Columns of labels are left out: their cells may be no labels of the task.
        prepared = [self.prepare(self.reader(row)) for row in rows]
        known: list[Mapping[str, Any]]
        known = [{c: row[c] for c in self.columns if c in row} | {ROW_KEY: first + i} for i, row in enumerate(prepared)]
        inputs = self.collator(known)
        inputs.pop("labels")
        texts = [self.collator.text_of(row, True, name_of_row(row, i)) for i, row in enumerate(known)]
        empty = (~inputs.pop("has_content")).nonzero().flatten().tolist()
        return [self.keep(row) for row in rows], inputs, inputs.pop("word_index", None), texts, empty, first
