"""
The mean of the weights at the start and after training.

It is about as good as the trained weights on new rows that are like the training rows, and better on others. See
WiSE-FT (Wortsman et al. 2022, https://arxiv.org/abs/2109.01903).
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Optional

import torch
from safetensors.torch import load_file
from transformers import EarlyStoppingCallback, TrainerControl, TrainerState, TrainingArguments

from ..checkpoints.starting_point import load_tensors, save_tensors


FILE_NAME = "start_weights.safetensors"
# Validation losses that are higher by so small a share count as equal, and of equals the latest weights are kept: with
# few validation rows the loss says no more, and answers that become surer raise it before they become worse (Guo et al.
# 2017, https://arxiv.org/abs/1706.04599).
TOLERANCE = 0.05


def is_as_good(loss: float, lowest: float) -> bool:
    return loss <= lowest + TOLERANCE * abs(lowest)


class TolerantEarlyStopping(EarlyStoppingCallback):
    """
    [`~transformers.EarlyStoppingCallback`] that is as tolerant as the choice of the best weights.

    Args:
        early_stopping_patience, early_stopping_threshold: as in [`~transformers.EarlyStoppingCallback`].
        is_tolerant (`Callable`, *optional*): Returns whether it is tolerant now; by default it is not.
    """

    def __init__(
        self,
        early_stopping_patience: int = 1,
        early_stopping_threshold: float = 0.0,
        is_tolerant: Callable[[], bool] = lambda: False,
    ):
        super().__init__(early_stopping_patience, early_stopping_threshold)
        self.is_tolerant = is_tolerant

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, Any],
        **kwargs: Any,
    ) -> None:
        # An evaluation of other rows, with a prefix of its own, is no reason to stop or to warn.
        if any(name.startswith("eval_") for name in metrics):
            super().on_evaluate(args, state, control, metrics, **kwargs)

    def check_metric_value(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, metric_value: float
    ) -> None:
        if not self.is_tolerant():
            super().check_metric_value(args, state, control, metric_value)
        elif state.best_metric is None or is_as_good(metric_value, state.best_metric):
            self.early_stopping_patience_counter = 0
        else:
            self.early_stopping_patience_counter += 1


class StartAverage:
    """
    Stores a copy of the current trainable weights and buffers of a model on the CPU.

    Buffers are not averaged: an unfrozen batch norm has the running statistics of the trained weights. Both factors of
    a LoRA adapter are averaged. So their product is between `(1 - share) ** 2` and `1 - share` of the learnt one.

    Args:
        model: not wrapped, and not sharded.
        share (`float`): of the start in the mean, from 0 to 1.
    """

    def __init__(self, model: torch.nn.Module, share: float):
        self.model, self.share = model, share
        self.start = {name: p.detach().to("cpu", copy=True) for name, p in model.named_parameters() if p.requires_grad}
        saved = model.state_dict().keys()
        self.buffers = {name: b.detach().to("cpu", copy=True) for name, b in model.named_buffers() if name in saved}

    @classmethod
    def of(cls, model: torch.nn.Module, share: float, checkpoint: Optional[str]) -> Optional["StartAverage"]:
        """The start of a model, or the start in a resumed checkpoint; `None` if the checkpoint has none."""
        average = cls(model, share)
        return average if checkpoint is None or average.load(checkpoint) else None

    def _parameters(self) -> Iterator[tuple[str, torch.nn.Parameter]]:
        """The parameters that were trainable at the start, even if they have been frozen since."""
        return ((name, p) for name, p in self.model.named_parameters() if name in self.start)

    @torch.no_grad()
    def apply(self) -> None:
        """Replaces the weights of the model by their mean with the start."""
        for name, parameter in self._parameters():
            start = self.start[name].to(parameter.device, torch.float32)
            parameter.copy_(parameter.float().lerp(start, self.share))

    @torch.no_grad()
    def begin_anew(self) -> None:
        """Resets the weights of the model to the start."""
        for name, parameter in self._parameters():
            parameter.copy_(self.start[name])
        for name, buffer in self.model.named_buffers():
            if name in self.buffers:
                buffer.copy_(self.buffers[name])

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Within the block the weights are the mean; afterwards they are restored bit for bit."""
        trained = {name: parameter.detach().to("cpu", copy=True) for name, parameter in self._parameters()}
        self.apply()
        try:
            yield
        finally:
            with torch.no_grad():
                for name, parameter in self._parameters():
                    parameter.copy_(trained[name])

    def save(self, folder: str) -> None:
        save_tensors({**self.start, **self.buffers}, Path(folder, FILE_NAME))

    def load(self, folder: str) -> bool:
        """Loads the start that [`save`] wrote; `False` if there is none."""
        path = Path(folder, FILE_NAME)
        if not path.is_file():
            return False
        complaint = (
            "{path} does not hold the start of {name}: freeze the same parameters as when the checkpoint was "
            "written, and resume."
        )
        self.start = load_tensors(path, self.start, complaint)
        # Checkpoints of earlier versions have no buffers.
        self.buffers = {name: value for name, value in load_file(path).items() if name in self.buffers}
        return True
