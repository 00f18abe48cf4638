"""The best linear model of a task, from the features of a linear probe."""

import warnings
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.model_selection import GroupKFold, StratifiedGroupKFold

from ..model.linear_probe import LinearProblem


# Inverse strengths of the penalty, as `C` of scikit-learn's LogisticRegression; 1 / alpha of its Ridge.
STRENGTHS = (1.0, 3.0, 10.0, 30.0, 100.0, 300.0)
RIDGE_STRENGTHS = (0.001, 0.01, 0.1, *STRENGTHS)  # cheap to try, and numbers are often noisier than labels
NUM_FOLDS = 3
# Weight of a copy of a row that lacks one of its modalities, beside 1 for the row as it is.
COPY_WEIGHT = 0.3
# The penalty of a multi-label problem is chosen on its most frequent labels.
MAX_LABELS_TO_CHOOSE = 10


class LinearModel(NamedTuple):
    """
    The solution of one task.

    Args:
        weight (num_outputs, num_features), bias (num_outputs,): as `nn.Linear` has them.
        strength: the chosen inverse strength of the penalty.
        num_items: how many rows (or words) have a label.
    """

    weight: np.ndarray
    bias: np.ndarray
    strength: float
    num_items: int

    def __call__(self, features: np.ndarray) -> np.ndarray:
        """(num_items, num_features) -> logits (num_items, num_outputs)"""
        return features @ self.weight.T + self.bias


def solve(
    problem: LinearProblem,
    blocks: list[tuple[slice, int]],
    features: np.ndarray,
    labels: np.ndarray,
    groups: np.ndarray | None = None,
) -> LinearModel | None:
    """
    The best linear model of some features: multinomial or binary logistic regression, or ridge regression.

    Each row also counts, with a small weight, as it would be without each of its modalities, so that the model stays
    good where modalities are missing. Cross-validation chooses the strength of the penalty by the loss; its folds share
    no group.

    Args:
        problem: says which model.
        blocks: the features of each modality: its vector, and the column that is 1 where a row has the modality.
        features (num_items, num_features), labels (num_items,) or (num_items, num_outputs): without missing labels.
        groups (num_items,), *optional*: equal numbers stay on one side of a fold.

    Returns:
        The solution; `None` if there is nothing to learn: fewer than two rows, or one label only.

    Example:

    ```python
    >>> fit = solve(LinearProblem("multinomial", 3), probe.blocks, features, labels)
    >>> logits = features @ fit.weight.T + fit.bias
    ```"""
    groups = np.arange(len(labels)) if groups is None else groups
    if len(labels) < 2 or len(np.unique(labels, axis=0)) < 2:
        return None
    if problem.kind != "multinomial":
        labels = labels.reshape(len(labels), problem.num_outputs)
    small, back = _rotated(features.astype(np.float64), blocks)
    fit = {"multinomial": _multinomial, "binary": _binary, "ridge": _ridge}[problem.kind]
    strength = _choose(fit, problem, small, labels, groups)
    weight, bias = fit(problem, *_with_copies(small, labels), strength, 1e-4)
    return LinearModel((weight @ back).astype(np.float32), bias.astype(np.float32), strength, len(labels))


def majority(problem: LinearProblem, items: Any, num_items: int) -> np.ndarray:
    """(num_items, num_outputs): the logits that always give the most frequent label, or the mean, of some items."""
    labels = items.labels
    if problem.kind == "multinomial":
        answer = np.eye(problem.num_outputs)[np.bincount(labels, minlength=problem.num_outputs).argmax()]
    else:
        answer = labels.reshape(len(labels), -1).mean(0)
        answer = np.where(answer > 0.5, 1.0, -1.0) if problem.kind == "binary" else answer
    return np.tile(answer, (num_items, 1))


class _Rotated(NamedTuple):
    """Features in fewer columns: vectors by modality, (num_items, columns), and who has it, (num_items,) bool."""

    vectors: list[np.ndarray]
    present: list[np.ndarray]

    def rows(self, which: np.ndarray) -> "_Rotated":
        return _Rotated([x[which] for x in self.vectors], [x[which] for x in self.present])

    def without(self, modality: int) -> "_Rotated":
        def cleared(arrays: list[np.ndarray]) -> list[np.ndarray]:
            return [x * 0 if i == modality else x for i, x in enumerate(arrays)]

        return _Rotated(cleared(self.vectors), cleared(self.present))

    def matrix(self) -> np.ndarray:
        parts = zip(self.vectors, self.present, strict=True)
        return np.concatenate([np.column_stack([x, there.astype(x.dtype)]) for x, there in parts], 1)


def _rotated(features: np.ndarray, blocks: list[tuple[slice, int]]) -> tuple[_Rotated, np.ndarray]:
    """
    Fewer columns than features where there are fewer rows. A ridge penalty does not see the rotation, so the solution
    is the same; the matrix, (columns, num_features), takes its weights back.
    """
    vectors, present, turns = [], [], []
    for part, indicator in blocks:
        x = features[:, part]
        rotation = np.eye(x.shape[1])
        if len(x) < x.shape[1]:
            values, basis = np.linalg.eigh(x @ x.T)
            keep = values > 1e-10 * max(values.max(), 1e-30)
            rotation = (x.T @ basis[:, keep] / np.sqrt(values[keep])).T
        vectors.append(x @ rotation.T)
        present.append(features[:, indicator] > 0)
        turn = np.zeros((len(rotation) + 1, features.shape[1]))
        turn[:-1, part] = rotation
        turn[-1, indicator] = 1
        turns.append(turn)
    return _Rotated(vectors, present), np.concatenate(turns)


def _with_copies(small: _Rotated, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rows, labels and weights: the rows as they are, and without each modality if another is left."""
    num_there = np.sum(small.present, 0)
    matrices, targets, weights = [small.matrix()], [labels], [np.ones(len(labels))]
    for i, there in enumerate(small.present):
        rows = np.flatnonzero(there & (num_there > 1))
        if len(rows) and COPY_WEIGHT:
            matrices.append(small.rows(rows).without(i).matrix())
            targets.append(labels[rows])
            weights.append(np.full(len(rows), COPY_WEIGHT))
    weight = np.concatenate(weights)
    return np.concatenate(matrices), np.concatenate(targets), weight * len(labels) / weight.sum()


def _choose(fit: Any, problem: LinearProblem, small: _Rotated, labels: np.ndarray, groups: np.ndarray) -> float:
    if problem.kind == "binary" and problem.num_outputs > MAX_LABELS_TO_CHOOSE:
        frequent = np.sort(np.argsort(-np.minimum(labels.sum(0), len(labels) - labels.sum(0)))[:MAX_LABELS_TO_CHOOSE])
        labels, problem = labels[:, frequent], problem._replace(num_outputs=len(frequent))
    strengths = RIDGE_STRENGTHS if problem.kind == "ridge" else STRENGTHS
    losses = np.zeros(len(strengths))
    for train, held_out in _folds(problem, labels, groups):
        rows = _with_copies(small.rows(train), labels[train])
        seen = small.rows(held_out).matrix()
        for i, strength in enumerate(strengths):
            weight, bias = fit(problem, *rows, strength, 1e-3)
            losses[i] += _loss(problem, seen @ weight.T + bias, labels[held_out])
    return strengths[int(np.argmin(losses))]


def _folds(problem: LinearProblem, labels: np.ndarray, groups: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    num_folds = min(NUM_FOLDS, len(np.unique(groups)))
    if num_folds < 2:
        return
    classes = labels if problem.kind == "multinomial" else None
    if classes is not None and np.bincount(classes).max() >= num_folds:
        splitter: Any = StratifiedGroupKFold(num_folds, shuffle=True, random_state=0)
    else:
        splitter = GroupKFold(num_folds, shuffle=True, random_state=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of a class with fewer rows than folds
        for train, held_out in splitter.split(np.zeros((len(labels), 0)), classes, groups):
            if len(train) and len(held_out):
                yield train, held_out


def _loss(problem: LinearProblem, logits: np.ndarray, labels: np.ndarray) -> float:
    scores, target = torch.from_numpy(logits), torch.from_numpy(labels)
    if problem.kind == "multinomial":
        # A label that no training row of the fold has would cost the same, endlessly, at every strength.
        losses = torch.nn.functional.cross_entropy(scores, target, reduction="none").clamp(max=20)
    elif problem.kind == "binary":
        losses = torch.nn.functional.binary_cross_entropy_with_logits(scores, target.double(), reduction="none")
    else:
        losses = (scores - target).square()
    return float(losses.sum())


def _multinomial(
    problem: LinearProblem, x: np.ndarray, y: np.ndarray, sample_weight: np.ndarray, strength: float, tol: float
) -> tuple[np.ndarray, np.ndarray]:
    weight, bias = np.zeros((problem.num_outputs, x.shape[1])), np.full(problem.num_outputs, -20.0)
    classes = np.unique(y)
    if len(classes) == 1:
        bias[classes] = 0.0
        return weight, bias
    model = _logistic(strength, tol, x, y, sample_weight)
    if len(classes) == 2:
        # scikit-learn gives the difference of the two; half of it to each is the same model.
        weight[classes] = np.stack([-model.coef_[0], model.coef_[0]]) / 2
        bias[classes] = np.array([-model.intercept_[0], model.intercept_[0]]) / 2
    else:
        weight[classes], bias[classes] = model.coef_, model.intercept_
    return weight, bias


def _binary(
    problem: LinearProblem, x: np.ndarray, y: np.ndarray, sample_weight: np.ndarray, strength: float, tol: float
) -> tuple[np.ndarray, np.ndarray]:
    weight, bias = np.zeros((problem.num_outputs, x.shape[1])), np.zeros(problem.num_outputs)
    for i in range(problem.num_outputs):
        share = (y[:, i] * sample_weight).sum() / sample_weight.sum()
        if 0 < share < 1:
            model = _logistic(strength, tol, x, y[:, i] > 0.5, sample_weight)
            weight[i], bias[i] = model.coef_[0], model.intercept_[0]
        else:
            bias[i] = np.log((share * len(y) + 0.5) / ((1 - share) * len(y) + 0.5))
    return weight, bias


def _ridge(
    problem: LinearProblem, x: np.ndarray, y: np.ndarray, sample_weight: np.ndarray, strength: float, tol: float
) -> tuple[np.ndarray, np.ndarray]:
    model = Ridge(alpha=1 / strength).fit(x, y, sample_weight)
    return model.coef_.reshape(problem.num_outputs, -1), np.atleast_1d(model.intercept_)


def _logistic(
    strength: float, tol: float, x: np.ndarray, y: np.ndarray, sample_weight: np.ndarray
) -> LogisticRegression:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        return LogisticRegression(C=strength, tol=tol, max_iter=1000).fit(x, y, sample_weight)
