"""From a batch to logits and answers, by one pass through encoders and fusion."""

import difflib
import inspect
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any, Optional

import torch

from .modeling_outputs import MMTransformerModelOutput


def unwrapped(model: Any) -> Any:
    """The model without the wrapper of PEFT; its adapters stay in it."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


_lock = threading.Lock()
# By id of a model: how many blocks are open, and the modules that were in training mode before the first.
_open_blocks: dict[int, tuple[int, list[torch.nn.Module]]] = {}


@contextmanager
def evaluation_mode(model: torch.nn.Module) -> Iterator[None]:
    """
    Within the block all modules are in evaluation mode; afterwards each is in the mode that it was in. Of several
    threads, the last to leave restores the modes.
    """
    with _lock:
        count, in_training = _open_blocks.get(id(model), (0, []))
        if count == 0:
            in_training = [module for module in model.modules() if module.training]
        _open_blocks[id(model)] = count + 1, in_training
        model.eval()
    try:
        yield
    finally:
        with _lock:
            count, in_training = _open_blocks.pop(id(model))
            if count > 1:
                _open_blocks[id(model)] = count - 1, in_training
            else:
                for module in in_training:
                    module.training = True


def check_tasks(model: Any, tasks: Optional[Sequence[str]]) -> list[str]:
    """
    The names of the tasks, or of all.

    Raises:
        ValueError: if the model has no such task.
    """
    if isinstance(tasks, str):
        tasks = [tasks]
    for name in tasks or []:
        if name not in model.tasks:
            near = difflib.get_close_matches(name, model.tasks, 1)
            hint = f"did you mean {near[0]!r}?" if near else f"its tasks are {', '.join(map(repr, model.tasks))}."
            raise ValueError(f"The model has no task {name!r}; {hint}")
    return list(dict.fromkeys(tasks)) if tasks else list(model.tasks)


class Predictions:
    """
    One batch behind encoders and fusion, which run once. Logits and answers need the heads only, and a decoder for
    tasks that write.

    Args:
        model ([`MMTransformerForMultiTask`]): Answers in evaluation mode, whatever mode it is in.
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

    def __init__(self, model: Any, outputs: MMTransformerModelOutput):
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
        The logits that the loss of a task takes. For a task that writes, those of each token, given the tokens of the
        label before it.

        Args:
            labels: of this task, on the device of the model.
        """
        kind = self.model.tasks[task]
        if not kind.needs_decoder:
            return self.logits[task]
        with evaluation_mode(self.model), torch.no_grad():
            return self.model.read_written(kind, self.outputs, labels)

    def answers(
        self,
        processor: Any,
        tasks: Optional[Sequence[str]] = None,
        word_index: Optional[torch.Tensor] = None,
        decode_options: Optional[Mapping[str, Any]] = None,
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
            generation_options: for `model.generate`.
        """
        model = self.model
        columns: dict[str, list[Any]] = {}
        with evaluation_mode(model), torch.no_grad():
            for name in model.tasks if tasks is None else tasks:
                task = model.tasks[name]
                if task.needs_decoder:
                    ids = model.write(task, self.outputs, **generation_options)
                    texts = processor.batch_decode(ids, skip_special_tokens=True)
                    columns[name] = [{"text": text.strip()} for text in texts]
                else:
                    known = inspect.signature(task.decode).parameters
                    options = {key: value for key, value in (decode_options or {}).items() if key in known}
                    columns[name] = task.decode(self.logits[name], word_index, **options)
        return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
