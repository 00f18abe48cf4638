"""Answers for rows that come one after another, as many as there may be, from one process or several."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import count, islice
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object, send_to_device
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from ..data.collator import ROW_KEY, MMDataCollator
from ..model.answers import answer_batch, check_tasks
from ..model.modeling_mm_transformer import MMTransformerForMultiTask
from ..model.task_base import is_null


def stream_answers(
    model: MMTransformerForMultiTask,
    collator: MMDataCollator,
    rows: Iterable[Mapping[str, Any]],
    tasks: Sequence[str] | None = None,
    batch_size: int = 32,
    num_workers: int = 0,
    prepare: Callable[[Any], Mapping[str, Any]] = dict,
    keep: Callable[[Any], Any] = dict,
    **generation_options: Any,
) -> Iterator[list[tuple[Any, dict[str, Any]]]]:
    """
    Answers rows in their order, holding a few batches at a time. Of several processes, each answers every n-th batch
    and all are given all answers.

    Args:
        model: in evaluation mode, on the device of this process.
        collator: says which columns hold text and the rest; columns of labels are not looked at.
        rows: read by each process, and each worker, on its own: must be the same for all.
        tasks: names of the tasks to answer; all by default.
        batch_size: rows per batch.
        num_workers: processes that read files in the background.
        prepare: what of a row the collator reads.
        keep: what of a row to give back with its answers.
        generation_options: for `model.generate`.

    Yields:
        For each batch, a list of what `keep` gave and the answers of the row, a dict from task to answer, as
        [`Task.decode`] gives it; of tasks that write, `{"text": ...}`.

    Raises:
        ValueError: if the model has no such task; one sentence that names the row that cannot be read.
    """
    tasks = check_tasks(model, tasks)
    state = PartialState()
    share = _Share(rows, collator, batch_size, state.process_index, state.num_processes, prepare, keep)
    batches = iter(DataLoader(share, batch_size=None, num_workers=num_workers))
    while True:
        batch = next(batches, None)
        done: list[Any] = []
        if isinstance(batch, ValueError):
            done = [batch]
        elif batch is not None:
            kept, inputs, word_index, texts = batch
            answers = answer_batch(
                model, collator.processor, send_to_device(inputs, model.device), tasks, word_index, **generation_options
            )
            for answer, text in zip(answers, texts, strict=False):
                answer.update({name: model.tasks[name].complete_answer(answer[name], text) for name in tasks})
            done = [list(zip(kept, answers, strict=True))]
        if state.num_processes > 1:
            done = gather_object(done)
        if not done:
            return
        for answered in done:
            if isinstance(answered, ValueError):
                raise answered  # in all processes, so that none waits for the others
            yield answered


def answer_columns(answers: Mapping[str, Any]) -> dict[str, Any]:
    """
    The answers of a row as columns: under the name of the task what it says first (a label, a number, a text), and the
    rest behind its name, as in `topic_score`. Of a list, as tasks that label words give it, each is a list.

    Raises:
        ValueError: if two tasks would have a column alike, as tasks `topic` and `topic_score` do.
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
                    f"The answers of task {name!r} and of another task would both be in a column {column!r}; choose "
                    "the tasks to answer, one of the two at a time."
                )
            columns[column] = value
    return columns


class _Share(IterableDataset):
    """The batches of one process, or of one of its workers: what was kept of the rows, and what the model takes."""

    def __init__(self, rows, collator: MMDataCollator, batch_size: int, rank: int, num_processes: int, prepare, keep):
        self.rows, self.collator, self.batch_size = rows, collator, batch_size
        self.rank, self.num_processes = rank, num_processes
        self.prepare, self.keep = prepare, keep
        self.columns = [collator.text_column, *(column.column for column in collator.media.values())]
        self.wants_words = any(task.is_token_level for task in collator.tasks.values())

    def __iter__(self) -> Iterator[Any]:
        worker = get_worker_info()
        worker_id, num_workers = (worker.id, worker.num_workers) if worker is not None else (0, 1)
        # The loader takes from its workers in turn, so what each process gives has the order of the rows.
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
        prepared = [self.prepare(row) for row in rows]
        known: list[Mapping[str, Any]]
        known = [{c: row[c] for c in self.columns if c in row} | {ROW_KEY: first + i} for i, row in enumerate(prepared)]
        inputs = self.collator(known)
        inputs.pop("labels")
        words, texts = None, []
        if self.wants_words:
            texts = [row[self.collator.text_column] for row in known]
            texts = ["" if is_null(t) else " ".join(t) if isinstance(t, (list, tuple)) else t for t in texts]
            options = {
                "max_length": self.collator.max_length,
                "pad_to_multiple_of": self.collator.pad_to_multiple_of,
            }
            words = self.collator.processor(text=texts, return_word_index=True, **options)["word_index"]
        return [self.keep(row) for row in rows], inputs, words, texts
