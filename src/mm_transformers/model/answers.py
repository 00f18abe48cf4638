"""The answers of a model: the selected tasks, evaluation mode, and decoding of logits."""

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Optional, Protocol

import torch

from .messages import nearest, shortened
from .task_base import Task


class HasTasks(Protocol):
    """A model that answers tasks, or its config."""

    tasks: dict[str, Task]


def unwrapped(model: Any) -> Any:
    """The model inside of a PEFT model, with its adapters; other models unchanged."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


_lock = threading.Lock()
# Id of a model -> the number of open blocks, and the modules in training mode before the first of them.
_open_blocks: dict[int, tuple[int, list[torch.nn.Module]]] = {}


@contextmanager
def evaluation_mode(model: torch.nn.Module) -> Iterator[None]:
    """
    Within the block all modules are in evaluation mode; afterwards each has its mode from before. If several threads
    use a model, the last to leave restores the modes.

    Example:

    ```python
    >>> with evaluation_mode(model):
    ...     outputs = model(**inputs)
    ```
    """
    with _lock:
        found = _in_training(model)
        count, in_training = _open_blocks.get(id(model), (0, found))
        _open_blocks[id(model)] = count + 1, in_training
        if found:
            model.eval()  # takes as long as answering a row with a small model
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


def _in_training(model: torch.nn.Module) -> list[torch.nn.Module]:
    """The modules in training mode; a shared one may be listed twice."""
    found, waiting = [], [model]
    while waiting:  # not by `modules()`, which takes several times as long
        module = waiting.pop()
        if module.training:
            found.append(module)
        waiting += [child for child in module._modules.values() if child is not None]
    return found


def check_tasks(model: HasTasks, tasks: str | Sequence[str] | None) -> list[str]:
    """
    The names of the tasks to answer, each once; by default all tasks of the model.

    Raises:
        ValueError: if the model has no such task.
    """
    if isinstance(tasks, str):
        tasks = [tasks]
    for name in tasks or []:
        if name not in model.tasks:
            near = nearest(name, model.tasks)
            hint = f"did you mean {near!r}?" if near else f"its tasks are {', '.join(map(repr, model.tasks))}."
            raise ValueError(f"The model has no task {shortened(name)}; {hint}")
    return list(dict.fromkeys(tasks)) if tasks else list(model.tasks)


def decode_answers(
    tasks: Mapping[str, Task], logits: Mapping[str, torch.Tensor], word_index: Optional[torch.Tensor] = None
) -> list[dict[str, Any]]:
    """
    The answers of heads: for each row a dict from task name to answer, from [`Task.decode`].

    Tasks that write are left out.
    """
    answers = {name: task.decode(logits[name], word_index) for name, task in tasks.items() if not task.needs_decoder}
    num_rows = len(next(iter(answers.values()), []))
    return [{name: answers[name][row] for name in answers} for row in range(num_rows)]
