"""The linear models with which a task can start: how labels depend on features."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Optional, Protocol

import torch


# Inverse strengths of the penalty, as `C` of scikit-learn's LogisticRegression; 1 / alpha of its Ridge.
STRENGTHS = (1.0, 3.0, 10.0, 30.0, 100.0, 300.0)
# The penalty of a multi-label problem is chosen on its most frequent labels.
MAX_LABELS_TO_CHOOSE = 10
# The logit of a label without training rows.
NEVER = -20.0

# NumPy arrays. NumPy is imported by functions, since a model does not need it.
Array = Any
# Inverse strength -> weights (num_outputs, columns) and biases (num_outputs,). Each call begins at the solution of the
# call before, which is close if strengths rise.
Solver = Callable[[float], tuple[Array, Array]]


class Regressions(Protocol):
    """
    The regressions that a problem needs, passed in by training.

    A pulled checkpoint must not need scikit-learn, so no module here imports it.
    """

    def logistic(self, features: Array, labels: Array, counts: Array) -> Solver:
        """Of labels (num_items,), integers or truth values; of two classes the coefficients of the second alone."""

    def ridge(self, features: Array, labels: Array, counts: Array) -> Solver:
        """Of labels (num_items, num_outputs)."""


@dataclass(frozen=True)
class LinearProblem(ABC):
    """
    The linear model of a task. A kind of your own may be a subclass.

    Args:
        num_outputs (`int`): The number of outputs, as many as the head has logits.
        per_token (`bool`, *optional*, defaults to `False`): Whether each token has a label of its own, or the row.
        label_weights (`tuple[float, ...]`, *optional*): How much each label counts, `num_outputs` numbers.
    """

    num_outputs: int
    per_token: bool = False
    label_weights: Optional[tuple[float, ...]] = None

    # The inverse strengths among which cross-validation chooses.
    strengths: ClassVar[tuple[float, ...]] = STRENGTHS

    @property
    def mixes_strengths(self) -> bool:
        """Whether the solution is the mean over several strengths, each with a scale; see [`solve`]."""
        return False

    @abstractmethod
    def expected(self, labels: torch.Tensor) -> Optional[str]:
        """What labels must be, as the end of a sentence, if these are something else; `None` if they are right."""

    @abstractmethod
    def known(self, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Labels of a batch, and a bool tensor of the labelled items.

        Labels are (num_items,) or (num_items, num_outputs), or have a token dimension behind the first.
        """

    @abstractmethod
    def majority(self, labels: Array) -> Array:
        """(num_outputs,): the logits of the best constant answer to these labels."""

    @abstractmethod
    def losses(self, logits: Array, labels: Array) -> Array:
        """(num_items,): the loss of each item."""

    def likelihoods(self, logits: Array, labels: Array) -> Optional[Array]:
        """(num_items,): the likelihood of the labels, from 0 to 1; `None` if the problem has no probabilities."""
        return None

    @abstractmethod
    def solver(self, features: Array, labels: Array, counts: Array, regressions: Regressions) -> Solver:
        """
        The function that fits the linear model.

        Args:
            features (num_items, columns), labels: of the training items.
            counts (num_items,): how much each item counts.
            regressions: the regressions to choose from.
        """

    def as_tensors(self, logits: Array, labels: Array) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits (num_items, num_outputs) and labels as the metrics of the task take them."""
        return torch.from_numpy(logits).float(), torch.from_numpy(labels)

    def shaped(self, labels: Array) -> Array:
        """Labels of some items, in the shape that the methods below take; by default as they are."""
        return labels

    def item_weights(self, labels: Array) -> Optional[Array]:
        """(num_items,): how much the user lets each item count; `None` if all count alike."""
        return None

    def classes(self, labels: Array) -> Optional[Array]:
        """(num_items,): integers whose shares the folds of a cross-validation should keep; `None` for none."""
        return None

    def reduced(self, labels: Array) -> tuple["LinearProblem", Array]:
        """A smaller problem on which the strength can be chosen, and its labels; by default the same."""
        return self, labels


@dataclass(frozen=True)
class MultinomialProblem(LinearProblem):
    """
    One of `num_outputs` labels: multinomial logistic regression. Labels are int64, -100 where missing.

    Example:

    ```python
    >>> MultinomialProblem(3, label_weights=(1.0, 1.0, 2.0))
    ```"""

    @property
    def mixes_strengths(self) -> bool:
        return not self.per_token

    def expected(self, labels: torch.Tensor) -> Optional[str]:
        last = self.num_outputs - 1
        if labels.dtype != torch.int64:
            return f"integers from 0 to {last}, -100 where missing, but have the type {labels.dtype}"
        known = labels[labels != -100]
        if known.numel() == 0 or (int(known.min()) >= 0 and int(known.max()) <= last):
            return None
        return f"integers from 0 to {last}, -100 where missing, but go from {known.min()} to {known.max()}"

    def known(self, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return labels, labels != -100

    def majority(self, labels: Array) -> Array:
        import numpy as np

        return np.eye(self.num_outputs)[np.bincount(labels, minlength=self.num_outputs).argmax()]

    def losses(self, logits: Array, labels: Array) -> Array:
        scores, targets = torch.from_numpy(logits), torch.from_numpy(labels)
        # The loss of a label without training rows in the fold is infinite at every strength.
        return torch.nn.functional.cross_entropy(scores, targets, reduction="none").clamp(max=20).numpy()

    def likelihoods(self, logits: Array, labels: Array) -> Optional[Array]:
        import numpy as np

        return np.exp(-self.losses(logits, labels))

    def item_weights(self, labels: Array) -> Optional[Array]:
        import numpy as np

        return None if self.label_weights is None else np.asarray(self.label_weights, dtype=np.float64)[labels]

    def classes(self, labels: Array) -> Optional[Array]:
        return labels

    def solver(self, features: Array, labels: Array, counts: Array, regressions: Regressions) -> Solver:
        import numpy as np

        classes = np.unique(labels)
        model = regressions.logistic(features, labels, counts) if len(classes) > 1 else None

        def solve_one(strength: float) -> tuple[Array, Array]:
            weight, bias = np.zeros((self.num_outputs, features.shape[1])), np.full(self.num_outputs, NEVER)
            if model is None:
                bias[classes] = 0.0
                return weight, bias
            coefficients, intercepts = model(strength)
            if len(classes) == 2:
                # scikit-learn gives the difference of the two; half of it to each is the same model.
                coefficients, intercepts = (np.concatenate([-a, a]) / 2 for a in (coefficients, intercepts))
            weight[classes], bias[classes] = coefficients, intercepts
            return weight, bias

        return solve_one


class _FloatProblem(LinearProblem):
    """Labels are floats, one per output, NaN where missing."""

    def expected(self, labels: torch.Tensor) -> Optional[str]:
        is_right = labels.is_floating_point() and not labels.isinf().any()
        return None if is_right else f"finite floating-point numbers, NaN where missing, but are {labels.dtype}"

    def known(self, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        labels = labels.reshape(len(labels), -1)
        return labels, ~labels.isnan().any(-1)

    def shaped(self, labels: Array) -> Array:
        return labels.reshape(len(labels), self.num_outputs)


@dataclass(frozen=True)
class BinaryProblem(_FloatProblem):
    """
    `num_outputs` decisions: a logistic regression each. Labels are 0.0 or 1.0, (..., num_outputs), NaN where missing.
    A label weight says how much a 1 counts beside a 0.

    Example:

    ```python
    >>> BinaryProblem(4)
    ```"""

    def majority(self, labels: Array) -> Array:
        import numpy as np

        return np.where(labels.reshape(len(labels), -1).mean(0) > 0.5, 1.0, -1.0)

    def losses(self, logits: Array, labels: Array) -> Array:
        scores, targets = torch.from_numpy(logits), torch.from_numpy(labels).double()
        losses = torch.nn.functional.binary_cross_entropy_with_logits(scores, targets, reduction="none")
        return losses.sum(1).numpy()

    def likelihoods(self, logits: Array, labels: Array) -> Optional[Array]:
        import numpy as np

        return np.exp(-self.losses(logits, labels))

    def reduced(self, labels: Array) -> tuple[LinearProblem, Array]:
        import numpy as np

        if self.num_outputs <= MAX_LABELS_TO_CHOOSE:
            return self, labels
        frequent = np.sort(np.argsort(-np.minimum(labels.sum(0), len(labels) - labels.sum(0)))[:MAX_LABELS_TO_CHOOSE])
        weights = None if self.label_weights is None else tuple(self.label_weights[i] for i in frequent)
        return replace(self, num_outputs=len(frequent), label_weights=weights), labels[:, frequent]

    def solver(self, features: Array, labels: Array, counts: Array, regressions: Regressions) -> Solver:
        import numpy as np

        weight, bias = np.zeros((self.num_outputs, features.shape[1])), np.zeros(self.num_outputs)
        models = {}
        for i in range(self.num_outputs):
            factor = 1.0 if self.label_weights is None else self.label_weights[i]
            weights = np.where(labels[:, i] > 0.5, factor, 1.0) * counts
            share = (labels[:, i] * weights).sum() / max(weights.sum(), 1e-30)
            if 0 < share < 1:
                models[i] = regressions.logistic(features, labels[:, i] > 0.5, weights)
            else:
                num_items = len(labels)
                bias[i] = np.log((share * num_items + 0.5) / ((1 - share) * num_items + 0.5))

        def solve_all(strength: float) -> tuple[Array, Array]:
            for i, model in models.items():
                coefficients, intercepts = model(strength)
                weight[i], bias[i] = coefficients[0], intercepts[0]
            return weight.copy(), bias.copy()

        return solve_all


@dataclass(frozen=True)
class RidgeProblem(_FloatProblem):
    """
    `num_outputs` numbers: ridge regression. Labels are floats, NaN where missing.

    Example:

    ```python
    >>> RidgeProblem(1)
    ```"""

    # Cheap to try, and numbers are often noisier than labels.
    strengths: ClassVar[tuple[float, ...]] = (0.001, 0.01, 0.1, *STRENGTHS)

    def majority(self, labels: Array) -> Array:
        return labels.reshape(len(labels), -1).mean(0)

    def losses(self, logits: Array, labels: Array) -> Array:
        return ((logits - labels) ** 2).sum(1)

    def as_tensors(self, logits: Array, labels: Array) -> tuple[torch.Tensor, torch.Tensor]:
        shape = (-1, self.num_outputs) if self.num_outputs > 1 else (-1,)
        scores, targets = super().as_tensors(logits, labels)
        return scores.reshape(shape), targets.reshape(shape)

    def solver(self, features: Array, labels: Array, counts: Array, regressions: Regressions) -> Solver:
        return regressions.ridge(features, labels, counts)
