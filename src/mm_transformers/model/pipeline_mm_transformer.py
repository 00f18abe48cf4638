"""`pipeline("multimodal")`: from rows to the answers of all tasks."""

import functools
import os
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import Any, Optional, overload

from torch.utils.data import DataLoader, Dataset, IterableDataset
from transformers import Pipeline
from transformers.pipelines.pt_utils import PipelineIterator
from transformers.utils import logging

from .answers import check_tasks, unwrapped
from .conformal import level_of
from .downloads import is_url
from .embeddings import vectors_of_rows
from .file_contents import content_of, describe
from .label_cells import is_null
from .language_model import longest_prompt
from .limits import CarriedLimits
from .messages import listed, nearest, shortened
from .modalities import ARGUMENTS, PARTS, as_list
from .oddness import odd_sentence
from .predictions import Predictions


logger = logging.get_logger(__name__)


class RowPipeline(Pipeline):
    """Reads rows for a model with tasks, in batches; its subclasses say what is computed."""

    _load_processor = True
    _load_image_processor = False
    _load_feature_extractor = False
    _load_tokenizer = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.model: Any = unwrapped(self.model)
        if not hasattr(self.model, "tasks"):
            raise ValueError(
                f"The multimodal pipeline needs a model with tasks, MMTransformerForMultiTask, but got a "
                f"{type(self.model).__name__}."
            )
        if self.processor is None:
            raise ValueError("The multimodal pipeline needs the processor of the model: processor=...")
        self._longest_prompt = longest_prompt(self.model.config)

    @overload
    def __call__(self, inputs: str | dict[str, Any], **kwargs: Any) -> dict[str, Any]: ...

    @overload
    def __call__(self, inputs: Sequence[Any], **kwargs: Any) -> list[dict[str, Any]]: ...

    @overload
    def __call__(self, inputs: Iterable[Any], **kwargs: Any) -> Iterator[dict[str, Any]]: ...

    def __call__(self, inputs: Any, **kwargs: Any) -> Any:
        if isinstance(inputs, (str, dict)):
            return super().__call__([inputs], **kwargs)[0]
        if isinstance(inputs, (list, tuple)):
            return super().__call__(list(inputs), **kwargs) if len(inputs) > 0 else []
        if hasattr(inputs, "__getitem__") and hasattr(inputs, "__len__"):
            return super().__call__(_NumberedRows(inputs), **kwargs)
        return super().__call__(_NumberedStream(inputs), **kwargs)

    def get_iterator(
        self,
        inputs: Any,
        num_workers: int,
        batch_size: int,
        preprocess_params: dict[str, Any],
        forward_params: dict[str, Any],
        postprocess_params: dict[str, Any],
    ) -> Any:
        # Unlike in the stock method, a batch is built from rows, not from tensors of single rows. Only then is a
        # shared image read and encoded once.
        if isinstance(inputs, list):
            inputs = _NumberedRows(inputs)
        elif isinstance(inputs, _NumberedStream):
            num_workers = min(num_workers, 1)
        # An unknown key is an error in a row made by hand; a table may have any columns.
        is_table = hasattr(inputs.rows, "column_names")
        inputs.names = _names_of_values(inputs.rows, self.processor.table_columns)
        read = self._reader(forward_params, is_table)
        loader = DataLoader(inputs, batch_size=batch_size, num_workers=num_workers, collate_fn=read)
        answered = PipelineIterator(loader, self.forward, forward_params, loader_batch_size=batch_size)
        return PipelineIterator(answered, self.postprocess, postprocess_params)

    def answer_batch(self, rows: Sequence[Any], **options: Any) -> list[dict[str, Any]]:
        """
        The results of some rows, computed as one batch in this thread, without a data loader.

        Args:
            rows: as for a call; there must be one at least.
            options: those of a call.

        Raises:
            ValueError: as a call does; the rows are numbered from 0.
        """
        _, given, _ = self._sanitize_parameters(**options)
        params = {**self._forward_params, **given}
        return self.forward(self._reader(params)(list(enumerate(rows))), **params)["answers"]

    def known_keys(self) -> tuple[str, ...]:
        """The keys that a row may have: inputs, and labels, which are ignored."""
        return (*self.processor.row_keys, *(task.column for task in self.model.tasks.values()))

    def _reader(self, forward_params: dict[str, Any], is_table: bool = False) -> Callable[[Any], dict[str, Any]]:
        """The function that turns numbered rows into model inputs."""
        names = forward_params.get("tasks") or list(self.model.tasks)
        return functools.partial(
            read_rows,
            processor=self.processor,
            known=None if is_table else self.known_keys(),
            wants_words=any(self.model.tasks[name].is_token_level for name in names),
            limits=CarriedLimits(),
            is_table=is_table,
            max_length=self._longest_prompt,
        )

    def save_pretrained(self, save_directory: str | os.PathLike[str], **kwargs: Any) -> None:
        """Saves model and processor; the stock method saves only the parts of the processor."""
        self.model.save_pretrained(save_directory, **kwargs)
        self.processor.save_pretrained(save_directory)

    def preprocess(self, input_: Any, **kwargs: Any) -> Any:
        raise NotImplementedError("Rows are preprocessed in batches by get_iterator.")

    def postprocess(self, model_outputs: Any) -> Any:
        answers = model_outputs["answers"]
        return answers[0] if isinstance(answers, list) else answers  # batches of one row are not taken apart


class MultimodalPipeline(RowPipeline):
    """
    Answers the tasks of a [`MMTransformerForMultiTask`] for rows of text, images, video, sound and columns.

    A row is a dict with any of `"text"`, `"image"` (or a list of images), `"video"` and `"audio"`. Each is as
    [`MMTransformerProcessor`] takes it: a path, a URL, a PIL image, bytes, an array. A string is a text. Columns of
    numbers and categories have their own names: `{"text": "A lamp", "price": 3.5}`. In a
    `datasets` data set, label columns and other columns are ignored, and addresses in cells are not fetched.

    For one row the pipeline returns a dict from task to answer; for a list of rows, a list. For a generator or a data
    set it returns an iterator, which holds one batch at a time. `batch_size` answers several rows together, and encodes
    their shared images once.

    Options, of the pipeline or of a call:
        tasks (`list[str]`): Names of the tasks to answer; all by default. A decoder only runs for those.
        top_k (`int`, *optional*):
            For tasks that choose one label: the number of labels in the answer, the most probable first. `None` gives
            all; without this option, the answer is one label.
        threshold (`float`): For tasks with any number of labels: the lowest probability of a label in the answer.
        generate_kwargs (`dict`): For tasks that write: `num_beams`, `max_new_tokens`, ...
        coverage (`float`, *optional*):
            For calibrated tasks (see [`calibrate`]): adds `"set"` or `"interval"`, which hold the truth in this share
            of rows. `"abstain"` says whether the row should get no answer, and `"odd"` whether it is unlike the
            training rows.
        advise (`bool`, *optional*, defaults to `False`):
            Adds `"advice"` to the answers of rows with missing parts: how much each part would help.

    A calibrated model warns of rows unlike the training rows.

    Raises:
        ValueError: one sentence, if a row is empty, has an unknown key, or has an input that cannot be read or has no
            encoder. Also if the model has no such task, or an option does not fit.

    Example:

    ```python
    >>> pipe = pipeline("multimodal", model="my-model")
    >>> pipe({"text": "Lovely weather!", "image": "rain.jpg"}, tasks=["sentiment"])
    {'sentiment': {'label': 'negative', 'score': 0.87}}
    ```
    """

    def _sanitize_parameters(
        self,
        tasks: Optional[Sequence[str]] = None,
        top_k: Any = "",
        threshold: Any = None,
        generate_kwargs: Optional[dict[str, Any]] = None,
        coverage: Optional[float] = None,
        advise: Optional[bool] = None,
        **unknown: Any,
    ) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        known = ["tasks", "top_k", "threshold", "generate_kwargs", "coverage", "advise"]
        _refuse_options(unknown, "multimodal", known)
        if top_k != "" and (coverage is not None or advise):
            raise ValueError("coverage and advise are about one answer, so they do not go with top_k.")
        if coverage is not None:
            level_of(coverage)
        # As in the pipelines of transformers, "" stands for an option that is not given.
        top_k = sys.maxsize if top_k is None else None if top_k == "" else top_k
        if top_k is not None and (isinstance(top_k, bool) or not isinstance(top_k, int) or top_k < 1):
            raise ValueError(f"top_k must be an integer >= 1, but is {top_k!r}.")
        if threshold is not None and not 0 <= threshold <= 1:
            raise ValueError(f"threshold must lie between 0 and 1, but is {threshold!r}.")
        options = {name: value for name, value in (("top_k", top_k), ("threshold", threshold)) if value is not None}
        given = {
            "tasks": None if tasks is None else check_tasks(self.model, tasks),
            "decode_options": options or None,
            "generate_kwargs": generate_kwargs,
            "coverage": coverage,
            "advise": advise,
        }
        return {}, {name: value for name, value in given.items() if value is not None}, {}

    def _forward(
        self,
        inputs: Any,
        tasks: Optional[Sequence[str]] = None,
        decode_options: Optional[dict[str, Any]] = None,
        generate_kwargs: Optional[dict[str, Any]] = None,
        coverage: Optional[float] = None,
        advise: bool = False,
    ) -> Any:
        if "error" in inputs:
            raise ValueError(inputs["error"])
        names, texts, word_index = tasks or list(self.model.tasks), inputs["texts"], inputs["word_index"]
        predictions = Predictions.of(self.model, inputs["tensors"])
        answers = predictions.answers(
            self.processor,
            names,
            word_index,
            decode_options,
            coverage=coverage,
            advise=advise,
            **(generate_kwargs or {}),
        )
        for row, odd in zip(inputs["numbers"], predictions.odd_rows or (), strict=False):
            if odd.is_odd:
                logger.warning(odd_sentence(f"Row {row}", odd))
        for row, text in zip(answers, texts, strict=True):
            row.update({name: self.model.tasks[name].answer_with_words(row[name], text) for name in names})
        return {"answers": answers}


class MultimodalEmbeddingPipeline(RowPipeline):
    """
    Gives the vectors of rows, for search, clustering or other models; see [`MMTransformerForMultiTask.embed`].

    The rows are those of [`MultimodalPipeline`]. The result of a row is a dict from name ("fused", "text", "vision",
    ...) to vector, a float32 array of NumPy; `None` where the row lacks the modality.

    Options, of the pipeline or of a call:
        task_name (`str`): Name of a [`Retrieval`] task, for the vectors with which it compares texts and items.
        normalize (`bool`): Scales all vectors to length 1.

    Example:

    ```python
    >>> pipe = pipeline("multimodal-feature-extraction", model="my-model")
    >>> pipe({"text": "Lovely weather!", "image": "rain.jpg"})["fused"].shape
    (768,)
    ```
    """

    def _sanitize_parameters(
        self, task_name: Optional[str] = None, normalize: Optional[bool] = None, **unknown: Any
    ) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        _refuse_options(unknown, "multimodal-feature-extraction", ["task_name", "normalize"])
        given = {"task_name": task_name, "normalize": normalize}
        return {}, {name: value for name, value in given.items() if value is not None}, {}

    def _forward(self, inputs: Any, task_name: Optional[str] = None, normalize: bool = False) -> Any:
        if "error" in inputs:
            raise ValueError(inputs["error"])
        return {"answers": vectors_of_rows(self.model.embed(task_name, normalize, **inputs["tensors"]))}


def _refuse_options(unknown: dict[str, Any], pipeline: str, known: list[str]) -> None:
    for name in unknown:
        near = nearest(name, known)
        hint = f"did you mean {near!r}?" if near else f"its options are {', '.join(known)}."
        raise ValueError(f"The {pipeline} pipeline has no option {name!r}; {hint}")


def read_rows(
    numbered: Sequence[tuple[int, Any]],
    processor: Any,
    known: Optional[Sequence[str]],
    wants_words: bool,
    limits: Optional[CarriedLimits] = None,
    is_table: bool = False,
    max_length: Optional[int] = None,
) -> dict[str, Any]:
    """
    The model inputs of some rows: `tensors`, `numbers`, `texts` and, for tasks that label words, `word_index`.

    If a row cannot be read, the result is the `error`, in one sentence. It is not raised here, since the loader would
    put the traceback of its worker into the message.

    Args:
        limits: passes the limits on to the workers that are started with this.
        is_table: whether the rows come from a data set, whose addresses the user has not typed. These are not fetched.
        max_length: the longest text in tokens, as [`longest_prompt`] gives it, if it is shorter than the processor's.
    """
    try:
        rows = [checked_row(row, number, known, processor) for number, row in numbered]
        for (number, _), row in zip(numbered if is_table else (), rows, strict=False):
            _refuse_addresses(row, number)
        try:
            tensors = _process(rows, processor, wants_words, max_length)
        except ValueError as error:
            # Find the row with the error.
            for (number, _), row in zip(numbered, rows, strict=True):
                try:
                    _process([row], processor, wants_words, max_length)
                except ValueError as found:
                    raise ValueError(f"Row {number}: {found}") from error
            raise
    except ValueError as error:
        return {"error": str(error)}
    return {
        "tensors": tensors,
        "numbers": [number for number, _ in numbered],
        "texts": [row.get("text") or "" for row in rows],
        "word_index": tensors.pop("word_index", None),
    }


def _process(
    rows: list[dict[str, Any]], processor: Any, wants_words: bool, max_length: Optional[int]
) -> dict[str, Any]:
    cells = [processor.cells_of(row) for row in rows]
    parts = {argument: [row[argument] for row in cells] for argument in cells[0]}
    given = {name: part for name, part in parts.items() if name == "text" or any(x is not None for x in part)}
    most = {} if max_length is None else {"max_length": min(max_length, processor.tokenizer.model_max_length)}
    return dict(processor(**given, **most, return_word_index=wants_words))


def checked_row(row: Any, number: int, known: Optional[Collection[str]], processor: Any) -> dict[str, Any]:
    """
    The inputs of the row: those of its keys that the processor reads, without missing values.

    Args:
        row: a dict, or a text.
        number: of the row, in messages.
        known: the keys that a row may have; `None` for any.
        processor ([`MMTransformerProcessor`]): Its keys.

    Raises:
        ValueError: one sentence, if the row has an unknown key, or no content.
    """
    keys = processor.row_keys
    if isinstance(row, str):
        row = {"text": row}
    if not isinstance(row, dict):
        raise ValueError(
            f"Row {number} must be a dict with any of {_listed(keys)}, or a string, but is a {type(row).__name__}."
        )
    for key in row:
        if known is not None and key not in known:
            near = nearest(str(key), keys)
            hint = f"did you mean {near!r}?" if near else f"a row has any of {_listed(keys)}."
            raise ValueError(f"Row {number} has the key {shortened(key)}; {hint}")
    try:
        row = processor.with_keys(row)
    except ValueError as error:
        raise ValueError(f"Row {number}: {error}") from error
    parts = {name: row[name] for name in keys if name in row and not is_null(row[name])}
    if isinstance(parts.get("image"), (list, tuple)):
        parts["image"] = as_list(parts["image"]) or None
    if not isinstance(parts.get("text", ""), str):
        raise ValueError(f"Row {number}: the text must be a string, but is a {type(parts['text']).__name__}.")
    parts = {name: part for name, part in parts.items() if part is not None}
    if not any(name in PARTS or not isinstance(part, str) or part.strip() for name, part in parts.items()):
        if set(keys) != set(ARGUMENTS):
            raise ValueError(f"Row {number} has no content in {_listed(keys)}.")
        raise ValueError(f"Row {number} has neither a text nor an image, a video or a sound.")
    return parts


def _listed(names: Sequence[str]) -> str:
    """Names for messages; of many, the first ones."""
    shown = [repr(name) for name in names[:20]]
    return f"{', '.join(shown)}, ..." if len(names) > 20 else listed(shown)


def _refuse_addresses(row: dict[str, Any], number: int) -> None:
    for name in PARTS:
        waiting = [row.get(name)]
        while waiting:
            item = waiting.pop()
            content = content_of(item)
            if isinstance(content, (list, tuple)) and any(isinstance(x, (str, dict)) for x in content):
                waiting += content
            if is_url(content):
                raise ValueError(
                    f"Row {number}: {describe(item, name)} is an address in a data set, which is not fetched. If you "
                    "trust the rows, give them as dicts, in a list or a generator."
                )


def _names_of_values(rows: Any, columns: Sequence[str]) -> dict[str, list[str]]:
    """Column of categories -> the names of its ids, if the data set has a `ClassLabel` there."""
    features = getattr(rows, "features", None) or {}
    return {column: list(features[column].names) for column in columns if hasattr(features.get(column), "names")}


def _with_names(row: Any, names: dict[str, list[str]]) -> Any:
    """The row with names instead of ids; the id -1 is a missing value."""
    ids = {column: row[column] for column in names if type(row.get(column)) is int} if names else {}
    return {**row, **{column: names[column][i] if i >= 0 else None for column, i in ids.items()}} if ids else row


class _NumberedRows(Dataset):
    def __init__(self, rows: Any):
        self.rows = rows
        self.names: dict[str, list[str]] = {}

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number: int) -> tuple[int, Any]:
        return number, _with_names(self.rows[number], self.names)


class _NumberedStream(IterableDataset):
    def __init__(self, rows: Iterable[Any]):
        self.rows = rows
        self.names: dict[str, list[str]] = {}

    def __iter__(self) -> Iterator[tuple[int, Any]]:
        return ((number, _with_names(row, self.names)) for number, row in enumerate(self.rows))


__all__ = ["MultimodalEmbeddingPipeline", "MultimodalPipeline"]
