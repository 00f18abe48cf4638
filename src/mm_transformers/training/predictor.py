"""Answers the rows of a table, a list or a stream, in one process or several."""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import count, islice
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object, send_to_device
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from ..data.cells import RowReader, opened
from ..data.collator import MMDataCollator
from ..data.sources import ROW_KEY, media_of, name_of_row
from ..model.answers import check_tasks, unwrapped
from ..model.modeling_mm_transformer import MMTransformerForMultiTask
from ..model.predictions import Predictions
from ..model.processing_mm_transformer import MMTransformerProcessor


class Predictor:
    """
    Answers the rows of a table, a list or a stream, in their order, a few batches at a time.

    With n processes, each answers every n-th batch, and all get all answers.

    Args:
        model ([`MMTransformerForMultiTask`]): On the device of this process.
        collator ([`MMDataCollator`]): The columns of texts, pictures and sounds. Columns of labels are not read. The
            processor of the model stands for a collator with the default columns.
        tasks (`list[str]`, *optional*): The tasks to answer; all by default. A decoder runs only for these.
        batch_size (`int`, *optional*, defaults to 32): Rows per batch.
        num_workers (`int`, *optional*, defaults to 0): Processes that read files in the background.
        decode_options (`dict`, *optional*): For the tasks that take them, such as `{"top_k": 3}` for three labels.
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
        decode_options: Mapping[str, Any] | None = None,
        **generation_options: Any,
    ):
        self.model: MMTransformerForMultiTask = unwrapped(model)
        if isinstance(collator, MMTransformerProcessor):
            collator = MMDataCollator(collator, self.model.config)
        self.collator, self.tasks = collator, check_tasks(self.model, tasks)
        self.batch_size, self.num_workers, self.generation_options = batch_size, num_workers, generation_options
        self.decode_options = dict(decode_options or {})

    @classmethod
    def from_pretrained(
        cls, name: str | os.PathLike[str], tasks: Sequence[str] | None = None, **options: Any
    ) -> "Predictor":
        """
        Loads a model and its processor.

        Args:
            name: a folder or a Hub id.
            tasks: the tasks to answer; all by default.
            options: `batch_size`, `num_workers`, and the options of [`MMDataCollator`], such as `image_column`.
        """
        model = MMTransformerForMultiTask.from_pretrained(name)
        own = {key: options.pop(key) for key in ("batch_size", "num_workers") if key in options}
        collator = MMDataCollator(MMTransformerProcessor.from_pretrained(name), model.config, **options)
        return cls(model.to(PartialState().device), collator, tasks, **own)

    def __call__(self, rows: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """
        The answers to all rows: for each row a dict from task to answer, from [`Task.decode`].

        Tasks that write answer `{"text": ...}`.

        Args:
            rows: a list, a data set, a table of pandas, or another iterable of dicts.
        """
        return [answers for batch in self.stream(rows, keep=_nothing) for _, answers in batch]

    def stream(
        self,
        rows: Iterable[Mapping[str, Any]],
        prepare: Callable[[Any], Mapping[str, Any]] = dict,
        keep: Callable[[Any], Any] = dict,
    ) -> Iterator[list[tuple[Any, dict[str, Any]]]]:
        """
        The same batch by batch.

        Args:
            rows: each process, and each worker, reads them on its own: they must be equal for all.
            prepare: a row -> the row for the collator.
            keep: a row -> the part of it to return with its answers; by default all of it. A data set has its pictures
                and sounds there as they are stored.

        Yields:
            For each batch a list of pairs: the part that is kept, and the answers.
        """
        model, state = self.model, PartialState()
        rows, reader = opened(rows, media_of(self.collator))
        options = (self.batch_size, state.process_index, state.num_processes, reader, prepare, keep)
        share = _Share(rows, self.collator, *options)
        batches = iter(DataLoader(share, batch_size=None, num_workers=self.num_workers))
        while True:
            batch = next(batches, None)
            done: list[Any] = []
            if isinstance(batch, ValueError):
                done = [batch]
            elif batch is not None:
                kept, inputs, word_index, texts = batch
                predictions = Predictions.of(model, send_to_device(inputs, model.device))
                answers = predictions.answers(
                    self.collator.processor, self.tasks, word_index, self.decode_options, **self.generation_options
                )
                for answer, text in zip(answers, texts, strict=True):
                    answer.update({n: model.tasks[n].complete_answer(answer[n], text) for n in self.tasks})
                done = [list(zip(kept, answers, strict=True))]
            if state.num_processes > 1:
                done = gather_object(done)
            if not done:
                return
            for answered in done:
                if isinstance(answered, ValueError):
                    raise answered  # in all processes, so that none waits for the others
                yield answered


def _nothing(row: Any) -> None:
    return None


def answer_columns(answers: Mapping[str, Any]) -> dict[str, Any]:
    """
    The answers of a row as columns.

    The column with the name of the task holds the first part of its answer (a label, a number, a text). The other parts
    have columns such as `topic_score`. Answers of tasks that label words are lists, so each of their columns is a list.

    Raises:
        ValueError: if two tasks would have the same column, as tasks `topic` and `topic_score` do.
    """
    columns: dict[str, Any] = {}
    for name, answer in answers.items():
        if isinstance(answer, list) and all(isinstance(item, dict) for item in answer):
            keys = list(dict.fromkeys(key for item in answer for key in item)) or ["label", "score"]
            answer = {key: [item[key] for item in answer] for key in keys}
        if not isinstance(answer, dict):
            answer = {"": answer}
        for i, (key, value) in enumerate(answer.items()):
            column = name if i == 0 else f"{name}_{key}"
            if column in columns:
                raise ValueError(
                    f"The answers of task {name!r} and of another task would both be in a column {column!r}. Answer "
                    "these two tasks one at a time, by tasks=[...]."
                )
            columns[column] = value
    return columns


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
        self.rows, self.collator, self.batch_size = rows, collator.with_word_index(), batch_size
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
    ) -> tuple[list[Any], dict[str, Any], torch.Tensor | None, list[str]]:
        # Without the columns of labels, which need not be labels, if there are any.
        prepared = [self.prepare(self.reader(row)) for row in rows]
        known: list[Mapping[str, Any]]
        known = [{c: row[c] for c in self.columns if c in row} | {ROW_KEY: first + i} for i, row in enumerate(prepared)]
        inputs = self.collator(known)
        inputs.pop("labels")
        texts = [self.collator.text_of(row, True, name_of_row(row, i)) for i, row in enumerate(known)]
        return [self.keep(row) for row in rows], inputs, inputs.pop("word_index", None), texts
