"""Computes the logits and answers of a batch, with one pass through encoders and fusion."""

import inspect
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, Optional

import torch

from .answers import evaluation_mode
from .generation import FusedText, writing_tasks


class Predictions:
    """
    One batch after encoders and fusion, which run once. Logits and answers need the heads only, and a decoder for tasks
    that write.

    Args:
        model ([`MMTransformerForMultiTask`]): Runs in evaluation mode, whatever its mode.
        outputs ([`MMTransformerModelOutput`]): The output of `model.model` for the batch.

    Example:

    ```python
    >>> predictions = Predictions.of(model, processor(text=["Lovely weather!"]))
    >>> predictions.logits["sentiment"].shape
    torch.Size([1, 3])
    >>> predictions.answers(processor)
    [{'sentiment': {'label': 'positive', 'score': 0.93}}]
    ```
    """

    def __init__(self, model: Any, outputs: FusedText) -> None:
        self.model, self.outputs = model, outputs

    @classmethod
    def of(cls, model: Any, inputs: Mapping[str, Any]) -> "Predictions":
        """
        Runs encoders and fusion.

        Args:
            inputs: the tensors of the processor, without labels, on the device of the model.
        """
        with evaluation_mode(model), torch.no_grad():
            return cls(model, model.model(**inputs))

    @cached_property
    def logits(self) -> dict[str, torch.Tensor]:
        """The logits of each task that has a head."""
        with evaluation_mode(self.model), torch.no_grad():
            return self.model(encoder_outputs=self.outputs).logits

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
            generation_options: for `model.generate`.
        """
        model = self.model
        columns: dict[str, list[Any]] = {}
        writing = writing_tasks(model.tasks)
        with evaluation_mode(model), torch.no_grad():
            for name in model.tasks if tasks is None else tasks:
                task = model.tasks[name]
                if name in writing:
                    ids = model.write(writing[name], self.outputs, **generation_options)
                    texts = processor.batch_decode(ids, skip_special_tokens=True)
                    columns[name] = [{"text": text.strip()} for text in texts]
                else:
                    known = inspect.signature(task.decode).parameters
                    options = {key: value for key, value in (decode_options or {}).items() if key in known}
                    columns[name] = task.decode(self.logits[name], word_index, **options)
                    if probabilities and task.probability_names:
                        task.add_probabilities(columns[name], self.logits[name], word_index)
        return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
