"""One learned number per task."""

import torch


_ADAM = ("step", "exp_avg", "exp_avg_sq")


class TaskNumbers:
    """
    A learned number for each task, each with its own Adam optimiser (https://arxiv.org/abs/1412.6980).

    A step without labels of a task leaves its number, its moments and its step count unchanged. One Adam for all would
    shrink the moments of rare tasks in such steps, and their next step would be too large.

    Args:
        start: the initial value of each number.
        num_tasks: the number of tasks.
        learning_rate, weight_decay: of Adam.
    """

    def __init__(self, start: float, num_tasks: int, learning_rate: float, weight_decay: float = 0.0):
        self._parameters = [torch.nn.Parameter(torch.tensor(start)) for _ in range(num_tasks)]
        self._optimizer = torch.optim.Adam(self._parameters, lr=learning_rate, weight_decay=weight_decay)

    @property
    def values(self) -> torch.Tensor:
        """(num_tasks,) float32, a copy."""
        return torch.stack([parameter.detach() for parameter in self._parameters])

    @values.setter
    def values(self, values: torch.Tensor) -> None:
        for parameter, value in zip(self._parameters, values, strict=True):
            parameter.detach().copy_(value)

    def step(self, gradients: torch.Tensor, seen: torch.Tensor) -> None:
        """
        One step of Adam.

        Args:
            gradients (num_tasks,) float32: by the numbers.
            seen (num_tasks,) bool: the tasks that take the step.
        """
        for parameter, gradient, is_seen in zip(self._parameters, gradients, seen.tolist(), strict=True):
            parameter.grad = gradient.clone() if is_seen else None
        self._optimizer.step()

    def state_dict(self) -> dict[str, torch.Tensor]:
        states = [self._optimizer.state[parameter] for parameter in self._parameters]
        zero = torch.zeros(())
        moments = {f"adam_{name}": torch.stack([state.get(name, zero) for state in states]) for name in _ADAM}
        return {"values": self.values, **moments}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        self.values = state["values"]
        for i, parameter in enumerate(self._parameters):
            self._optimizer.state[parameter].update({name: state[f"adam_{name}"][i].clone() for name in _ADAM})
