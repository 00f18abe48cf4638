"""The loaded model of a server: answers, vectors and streamed texts, as the pipelines give them."""

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Optional

import torch
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList, TextStreamer

from ...model.calibration import Calibration
from ...model.decoders import decoder_positions
from ...model.generation import WritingTask, task_that_writes, writing_tasks
from ...model.language_model import longest_prompt
from ...model.modeling_mm_transformer import MMTransformerForMultiTask
from ...model.pipeline_mm_transformer import MultimodalEmbeddingPipeline, MultimodalPipeline, RowPipeline, read_rows
from ...model.predictions import Predictions
from ...model.processing_mm_transformer import MMTransformerProcessor


PREDICT, EMBED = "predict", "embed"
# Divided by the smallest temperature that clients may choose, it is still finite.
_LARGEST_SCORE = 1e6


class Question(NamedTuple):
    """
    What is asked of rows; rows with equal questions share a forward pass.

    Args:
        kind: `PREDICT` or `EMBED`.
        options: those of the pipeline, as JSON with sorted keys.
    """

    kind: str
    options: str

    @classmethod
    def of(cls, kind: str, options: Mapping[str, Any]) -> "Question":
        """The question with these options."""
        return cls(kind, json.dumps(options, sort_keys=True))


class Kind:
    """
    What can be asked of rows, and the base class of the kinds.

    Args:
        model: the model.
        pipeline: answers rows.
    """

    def __init__(self, model: MMTransformerForMultiTask, pipeline: RowPipeline) -> None:
        self.model, self.pipeline = model, pipeline

    def check(self, options: Mapping[str, Any]) -> None:
        """
        Checks options before any row is read.

        Raises:
            ValueError: one sentence, if an option does not fit.
        """
        self.pipeline._sanitize_parameters(**options)

    def ending(self, options: dict[str, Any], is_over: Callable[[], bool]) -> dict[str, Any]:
        """The options with which the pipeline stops as soon as a function says so."""
        return options


class TaskAnswers(Kind):
    """The answers of tasks."""

    def __init__(self, model: MMTransformerForMultiTask, pipeline: RowPipeline) -> None:
        super().__init__(model, pipeline)
        config = model.config
        self.positions = decoder_positions(config.text_config, config.decoder_config) if self._writing else None

    @property
    def _writing(self) -> dict[str, WritingTask]:
        return writing_tasks(self.model.tasks)

    def check(self, options: Mapping[str, Any]) -> None:
        super().check(options)
        names = options.get("tasks") or list(self.model.tasks)
        chosen = options.get("generate_kwargs", {}).get("max_new_tokens")
        for task in (self._writing[name] for name in names if name in self._writing) if chosen else ():
            longest = chosen + len(self.model.decoder_start_ids(task)) - 1
            if self.positions is not None and longest > self.positions:
                # On a GPU, a token beyond the last position ends the process.
                raise ValueError(
                    f"generate_kwargs.max_new_tokens is {chosen:,}, too many for task {task.name!r}: the decoder has "
                    f"{self.positions:,} positions."
                )
        if options.get("coverage") is not None:
            calibration = Calibration(self.model.config.calibration)
            if not any(map(calibration.can_cover, names)):
                calibration.thresholds(names[0], [], options["coverage"])

    def ending(self, options: dict[str, Any], is_over: Callable[[], bool]) -> dict[str, Any]:
        if not self._writing:
            return options
        return {**options, "generate_kwargs": _ending(options.get("generate_kwargs", {}), is_over)}


class RowVectors(Kind):
    """The vectors of rows."""

    def check(self, options: Mapping[str, Any]) -> None:
        super().check(options)
        if options.get("task_name") is not None:
            self.model._retrieval_task(options["task_name"], None)


class ServedModel:
    """
    A model with its processor, behind both pipelines.

    Args:
        model ([`MMTransformerForMultiTask`]): Runs in evaluation mode, whatever its mode.
        processor ([`MMTransformerProcessor`]): The processor of the model.
        device: Such as `"cpu"`; by default that of the model.

    Example:

    ```python
    >>> served = ServedModel(model, processor)
    >>> served.answer(Question.of(PREDICT, {"tasks": ["sentiment"]}), [{"text": "Lovely weather!"}])
    [{'sentiment': {'label': 'positive', 'score': 0.93}}]
    ```
    """

    def __init__(
        self, model: MMTransformerForMultiTask, processor: MMTransformerProcessor, device: Optional[str] = None
    ) -> None:
        self.model, self.processor = model.eval(), processor
        chosen = {} if device is None else {"device": device}
        self.kinds: dict[str, Kind] = {
            PREDICT: TaskAnswers(model, MultimodalPipeline(model=model, processor=processor, **chosen)),
            EMBED: RowVectors(model, MultimodalEmbeddingPipeline(model=model, processor=processor, **chosen)),
        }

    @classmethod
    def load(cls, model: str, device: Optional[str] = None) -> "ServedModel":
        """
        Loads a folder or a model of the Hub.

        Raises:
            OSError, ValueError: one sentence, if there is no such model.
        """
        found = MMTransformerForMultiTask.from_pretrained(model)
        if device is None:
            device = "cuda" if torch.cuda.is_available() else "cpu"
        return cls(found, MMTransformerProcessor.from_pretrained(model), device)

    def check(self, question: Question) -> None:
        """
        Checks options before any row is read.

        Raises:
            ValueError: one sentence, if the model has no such task, or an option does not fit.
        """
        self.kinds[question.kind].check(json.loads(question.options))

    def answer(self, question: Question, rows: Sequence[Any], max_seconds: float = math.inf) -> list[Any]:
        """
        The answers or vectors of rows, computed as one batch, as JSON knows them.

        Args:
            max_seconds: after which decoders stop writing, of all tasks together; then nobody waits for the answers.

        Raises:
            ValueError: as the pipelines do.
        """
        kind, end = self.kinds[question.kind], time.monotonic() + max_seconds
        options = kind.ending(json.loads(question.options), lambda: time.monotonic() > end)
        return [as_json(result) for result in kind.pipeline.answer_batch(rows, **options)]

    def writing_task(self, name: Optional[str]) -> str:
        """
        The name of a task that writes; without a name, of the only one.

        Raises:
            ValueError: one sentence, if there is no such task.
        """
        writing = list(writing_tasks(self.model.tasks))
        if not writing:
            raise ValueError("This model has no task that writes texts; ask /predict.")
        if name not in writing and (name is not None or len(writing) > 1):
            raise ValueError(f"task must name a task that writes texts, one of {', '.join(map(repr, writing))}.")
        return task_that_writes(self.model.tasks, name).name

    def write(
        self,
        row: Any,
        task: str,
        options: Mapping[str, Any],
        emit: Callable[[str], None],
        is_over: Callable[[], bool],
    ) -> str:
        """
        Writes the answer to one row piece by piece, without beams.

        Args:
            row: as for the pipeline.
            task: that writes.
            options: for `generate`.
            emit: called with each piece of the text.
            is_over: the model stops at the next token once this says so.

        Returns:
            The whole text, as the pipeline has it.

        Raises:
            ValueError: as the pipeline does.
        """
        longest, known = longest_prompt(self.model.config), self.kinds[PREDICT].pipeline.known_keys()
        read = read_rows([(0, row)], self.processor, known, False, max_length=longest)
        if "error" in read:
            raise ValueError(read["error"])
        inputs = {name: value.to(self.model.device) for name, value in read["tensors"].items()}
        with torch.no_grad():
            outputs = Predictions.of(self.model, inputs).outputs
            ids = self.model.write(
                task_that_writes(self.model.tasks, task),
                outputs,
                **{**_ending(options, is_over), "num_beams": 1},
                streamer=_Pieces(self.processor.tokenizer, emit),
            )
        return self.processor.batch_decode(ids, skip_special_tokens=True)[0].strip()


def _ending(options: Mapping[str, Any], is_over: Callable[[], bool]) -> dict[str, Any]:
    """Options of `generate` with which it stops as soon as a function says so, and sampling cannot fail."""
    ending = {**options, "stopping_criteria": StoppingCriteriaList([_Stop(is_over)])}
    if options.get("do_sample"):
        # On a GPU, NaN among the probabilities ends the process.
        ending["logits_processor"] = LogitsProcessorList([_Finite()])
    return ending


class _Finite(LogitsProcessor):
    """Keeps scores finite, before the temperature divides them."""

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return scores.nan_to_num(0.0).clamp(-_LARGEST_SCORE, _LARGEST_SCORE)


class _Pieces(TextStreamer):
    """Hands each piece of a written text on."""

    def __init__(self, tokenizer: Any, emit: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.emit = emit

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        if text:
            self.emit(text)


class _Stop(StoppingCriteria):
    """Stops at the next token once a function says so."""

    def __init__(self, is_over: Callable[[], bool]) -> None:
        self.is_over = is_over

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        return torch.full((len(input_ids),), self.is_over(), device=input_ids.device)


def as_json(value: Any) -> Any:
    """
    A result with plain lists; NaN and infinity, which JSON lacks, are `None`.

    Example:

    ```python
    >>> as_json({"interval": [float("-inf"), 2.5]})
    {'interval': [None, 2.5]}
    ```
    """
    if isinstance(value, Mapping):
        return {str(name): as_json(item) for name, item in value.items()}
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, (list, tuple)):
        return [as_json(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
