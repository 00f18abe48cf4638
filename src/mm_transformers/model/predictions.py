"""Computes the logits and answers of a batch, with one pass through encoders and fusion."""

import inspect
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, Optional

import torch
from transformers.utils import logging

from .advice import advice_for
from .answers import evaluation_mode
from .availability import groups_of
from .calibration import Calibration
from .embeddings import rows_with_text
from .generation import FusedText, writing_tasks
from .oddness import OddRow, row_vectors


logger = logging.get_logger(__name__)


class Predictions:
    """
    One batch after encoders and fusion, which run once. Logits and answers need the heads only, and a decoder for tasks
    that write.

    Args:
        model ([`MMTransformerForMultiTask`]): Runs in evaluation mode, whatever its mode.
        outputs ([`MMTransformerModelOutput`]): The output of `model.model` for the batch.
        has_text (`torch.BoolTensor` of shape `(batch,)`, *optional*): The rows with a text; by default all.

    Example:

    ```python
    >>> predictions = Predictions.of(model, processor(text=["Lovely weather!"]))
    >>> predictions.logits["sentiment"].shape
    torch.Size([1, 3])
    >>> predictions.answers(processor)
    [{'sentiment': {'label': 'positive', 'score': 0.93}}]
    ```
    """

    def __init__(self, model: Any, outputs: FusedText, has_text: Optional[torch.Tensor] = None) -> None:
        self.model, self.outputs, self.has_text = model, outputs, has_text
        self.calibration = Calibration(model.config.calibration)
        new = sorted(set(getattr(model, "peft_config", None) or ()) - set(self.calibration.adapters))
        if new and model.config.calibration is not None:
            logger.warning_once(
                f"The model was calibrated without its adapter {new[0]!r}, so its probabilities, sets and intervals "
                "may not hold: calibrate it again, or remove the calibration by `model.config.calibration = None`."
            )

    @classmethod
    def of(cls, model: Any, inputs: Mapping[str, Any]) -> "Predictions":
        """
        Runs encoders and fusion.

        Args:
            inputs: the tensors of the processor, without labels, on the device of the model.
        """
        with evaluation_mode(model), torch.no_grad():
            has_text = rows_with_text(inputs) if {"input_ids", "attention_mask"} & set(inputs) else None
            return cls(model, model.encode_for_answers(**inputs), has_text)

    @cached_property
    def logits(self) -> dict[str, torch.Tensor]:
        """The logits of each task that has a head."""
        with evaluation_mode(self.model), torch.no_grad():
            return self.model(encoder_outputs=self.outputs).logits

    @cached_property
    def groups(self) -> list[str]:
        """The availability group of each row, such as `"text + vision"`."""
        return groups_of(self.outputs, self.model.config.modalities, self.has_text)

    def calibrated_logits(self, task: str) -> torch.Tensor:
        """The logits of a task, divided by the temperatures of each row's group; unchanged without a calibration."""
        return self.calibrated(task, self.logits[task])

    def calibrated(self, task: str, logits: torch.Tensor) -> torch.Tensor:
        """The same for given logits of these rows."""
        return self.calibration.tempered(self.model.tasks[task], logits, self.groups)

    @cached_property
    def odd_rows(self) -> Optional[list[OddRow]]:
        """How unlike the training rows each row is; `None` for a model without statistics of them."""
        if self.model.oddness is None or self.model.config.calibration is None:
            return None
        with torch.no_grad():
            return self.model.oddness(row_vectors(self.outputs, self.has_text), self.groups)

    def labelled_logits(self, task: str, labels: torch.Tensor) -> torch.Tensor:
        """
        The logits for the loss of a task.

        For a task that writes, these are the logits of each token, given the tokens of the label before it.

        Args:
            labels: of this task, on the device of the model.
        """
        writing = writing_tasks(self.model.tasks)
        if task not in writing:
            return self.logits[task]
        with evaluation_mode(self.model), torch.no_grad():
            return self.model.read_written(writing[task], self.outputs, labels)

    def answers(
        self,
        processor: Any,
        tasks: Optional[Sequence[str]] = None,
        word_index: Optional[torch.Tensor] = None,
        decode_options: Optional[Mapping[str, Any]] = None,
        probabilities: bool = False,
        coverage: Optional[float] = None,
        advise: bool = False,
        **generation_options: Any,
    ) -> list[dict[str, Any]]:
        """
        For each row a dict from task to answer, as [`Task.decode`] gives it; for tasks that write, `{"text": ...}`.

        Args:
            processor ([`MMTransformerProcessor`]): Decodes the ids of written answers.
            tasks: names of tasks; all by default.
            word_index (`torch.LongTensor` of shape `(batch, text_len)`, *optional*):
                The number of the word that starts at each token; for tasks that label words.
            decode_options: options of `decode`, such as `top_k`, for the tasks that take them.
            probabilities: adds the probability of each label to the answers, as [`Task.add_probabilities`] does.
            coverage: adds `"set"` or `"interval"`, and `"abstain"`, for the tasks that are calibrated; see
                [`Task.add_region`]. With statistics of the training rows also `"odd"`: whether the row is unlike them.
                Such rows abstain, too.
            advise: adds `"advice"`: how much each missing part would help; see [`advice_for`].
            generation_options: for `model.generate`.

        Raises:
            ValueError: if `coverage` is not between 0 and 1, or none of the tasks is calibrated.
        """
        model = self.model
        columns: dict[str, list[Any]] = {}
        writing = writing_tasks(model.tasks)
        names = list(model.tasks if tasks is None else tasks)
        if coverage is not None and not any(map(self.calibration.can_cover, names)):
            self.calibration.thresholds(names[0], [], coverage)
        with evaluation_mode(model), torch.no_grad():
            for name in names:
                task = model.tasks[name]
                if name in writing:
                    ids = model.write(writing[name], self.outputs, **generation_options)
                    texts = processor.batch_decode(ids, skip_special_tokens=True)
                    columns[name] = [{"text": text.strip()} for text in texts]
                else:
                    known = inspect.signature(task.decode).parameters
                    options = {key: value for key, value in (decode_options or {}).items() if key in known}
                    logits, sure = self.logits[name], self.calibrated_logits(name)
                    columns[name] = (
                        task.decode(logits, word_index, **options)
                        if sure is logits
                        else task.decode_calibrated(logits, sure, word_index, **options)
                    )
                    if probabilities and task.probability_names:
                        task.add_probabilities(columns[name], sure, word_index)
                    if coverage is not None and self.calibration.can_cover(name):
                        task.add_region(columns[name], logits, self.calibration.thresholds(name, self.groups, coverage))
                        self._abstain_if_odd(columns[name])
                    if advise:
                        self._advise(task, columns[name], logits, sure)
        return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]

    def _abstain_if_odd(self, answers: list[Any]) -> None:
        """No promise holds for rows unlike the calibration rows."""
        for answer, row in zip(answers, self.odd_rows or (), strict=False):
            answer["odd"] = row.is_odd
            answer["abstain"] = answer["abstain"] or row.is_odd

    def _advise(self, task: Any, answers: list[Any], logits: torch.Tensor, calibrated: torch.Tensor) -> None:
        if not self.calibration.can_advise(task.name):
            return
        tables = [self.calibration.advice(task.name, group) for group in self.groups]
        # Without labels: only the confidence is needed.
        confidences = task.answer_confidences(logits, calibrated)
        for i, (answer, table) in enumerate(zip(answers, tables, strict=True)):
            answer["advice"] = advice_for(table, None if confidences is None else float(confidences[i]))
