"""The best linear model of a task, from the features of a linear probe."""

import warnings
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.model_selection import GroupKFold, StratifiedGroupKFold

from ...model.linear_problem import NEVER, LinearProblem, Solver
from .logit_factors import COPY_WEIGHT, Scales, best_scales, losses_with_copies, scaled


MIXED_STRENGTHS = (1.0, 10.0, 100.0)  # their solutions are averaged, if the problem mixes strengths
NUM_FOLDS = 3
# With fewer rows, cross-validation is repeated with other folds, since one is too noisy.
FEW_ROWS, NUM_REPEATS = 200, 3
# The largest number of rows for the choice of how to fit.
MAX_ROWS_TO_CHOOSE = 3_000


class Way(NamedTuple):
    """
    The way in which a linear model is fitted.

    Args:
        balanced: whether all classes count alike, however many rows they have.
        separate: whether each modality has its own model, fitted without the others. Their logits are added (product of
            experts: Hinton 2002, https://doi.org/10.1162/089976602760128018).
        without: the numbers of modalities that a model of all modalities leaves out.
    """

    balanced: bool = False
    separate: bool = False
    without: tuple[int, ...] = ()


class LinearModel(NamedTuple):
    """
    The solution of one task.

    Args:
        weight (num_outputs, num_features), bias (num_outputs,): as in `nn.Linear`.
        way: how it was fitted.
        scales: inverse strength of the penalty -> for each modality the factor of its logits; the solution is the mean
            over the strengths. A model of all modalities has one factor, that of all.
        num_items: the number of labelled rows (or words).
        label_counts (`num_outputs` integers, *optional*): The number of rows of each label, if classes were balanced.
    """

    weight: np.ndarray
    bias: np.ndarray
    way: Way
    scales: Scales
    num_items: int
    label_counts: list[int] | None = None

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
    The best linear model of the features: multinomial or binary logistic regression, or ridge regression.

    Cross-validation chooses how it is fitted. Its folds share no group.

    - One label per row: the classes are balanced, and each modality has its own model. Few rows cannot choose a
      strength, so the answers of several strengths are averaged, each calibrated first. A modality has a factor of its
      own where that is clearly better. So columns of noise do not outvote the others. One unbalanced model of all
      modalities replaces them if it is clearly more accurate (by two standard errors). It also does if the user gave
      label weights that do not balance the classes.
    - Otherwise: one model of all modalities, with the strength of the lowest loss. It leaves out a modality if the loss
      is then lower by two standard errors.

    A model of all modalities also sees each row without each of its modalities, with a small weight. So it stays good
    for rows with missing modalities.

    Args:
        problem: the kind of linear model.
        blocks: the features of each modality: its vector, and a column that is 1 if the row has the modality.
        features (num_items, num_features), labels (num_items,) or (num_items, num_outputs): without missing labels.
        groups (num_items,), *optional*: equal numbers stay on one side of a fold.

    Returns:
        The solution; `None` if nothing can be learned: fewer than two rows, or one label only.

    Example:

    ```python
    >>> fit = solve(MultinomialProblem(3), probe.blocks, features, labels)
    >>> logits = features @ fit.weight.T + fit.bias
    ```
    """
    groups = np.arange(len(labels)) if groups is None else groups
    weights = problem.item_weights(labels)
    if weights is not None:
        features, labels, groups = (x[weights > 0] for x in (features, labels, groups))
    if len(labels) < 2 or len(np.unique(labels, axis=0)) < 2:
        return None
    labels = problem.shaped(labels)
    small, back = _rotated(features.astype(np.float64), blocks)
    way, scales = _choose(problem, small, labels, groups)
    weight, bias = _mean(_solver(problem, small, labels, way, 1e-4), small.spread(scales))
    counts = np.bincount(labels, minlength=problem.num_outputs).tolist() if way.balanced else None
    return LinearModel((weight @ back).astype(np.float32), bias.astype(np.float32), way, scales, len(labels), counts)


def majority(problem: LinearProblem, items: Any, num_items: int) -> np.ndarray:
    """(num_items, num_outputs): constant logits for the most frequent label, or the mean, of some items."""
    return np.tile(problem.majority(items.labels), (num_items, 1))


def held_out_logits(
    problem: LinearProblem,
    blocks: list[tuple[slice, int]],
    features: np.ndarray,
    labels: np.ndarray,
    groups: np.ndarray,
    model: LinearModel,
) -> tuple[np.ndarray, np.ndarray]:
    """
    The logits of each item by a model that was fitted as another one, but without the item and its group.

    Args:
        problem, blocks, features, labels, groups: as in [`solve`].
        model: the solution of all items, for its way and its strengths.

    Returns:
        The logits (num_items, num_outputs), and whether each item has some, (num_items,) bool. An item has none if the
        training rows of its fold lack its label.
    """
    small, _ = _rotated(features.astype(np.float64), blocks)
    labels = problem.shaped(labels)
    logits, is_known = np.zeros((len(labels), problem.num_outputs)), np.zeros(len(labels), bool)
    for train, held_out in _folds(problem, labels, groups):
        if is_known[held_out].any():  # the folds begin again
            break
        if len(np.unique(labels[train], axis=0)) < 2:
            continue
        solver = _solver(problem, small.rows(train), labels[train], model.way, 1e-3)
        weight, bias = _mean(solver, small.spread(model.scales))
        logits[held_out] = small.rows(held_out).matrix() @ weight.T + bias
        is_known[held_out] = True if labels.ndim > 1 else np.isin(labels[held_out], labels[train])
    return logits, is_known


class _Rotated(NamedTuple):
    """Features in fewer columns: vectors by modality, (num_items, columns), and its presence, (num_items,) bool."""

    vectors: list[np.ndarray]
    present: list[np.ndarray]

    def rows(self, which: np.ndarray) -> "_Rotated":
        return _Rotated([x[which] for x in self.vectors], [x[which] for x in self.present])

    def without(self, modality: int) -> "_Rotated":
        def cleared(arrays: list[np.ndarray]) -> list[np.ndarray]:
            return [x * 0 if i == modality else x for i, x in enumerate(arrays)]

        return _Rotated(cleared(self.vectors), cleared(self.present))

    def spread(self, scales: Scales) -> dict[float, np.ndarray]:
        """Strength -> the factor of each column."""
        widths = [x.shape[1] + 1 for x in self.vectors]
        return {
            strength: np.repeat(np.broadcast_to(factors, len(widths)), widths) for strength, factors in scales.items()
        }

    def matrix(self) -> np.ndarray:
        parts = zip(self.vectors, self.present, strict=True)
        return np.concatenate([np.column_stack([x, there.astype(x.dtype)]) for x, there in parts], 1)


def _rotated(features: np.ndarray, blocks: list[tuple[slice, int]]) -> tuple[_Rotated, np.ndarray]:
    """
    Features in fewer columns, if there are fewer rows than features.

    A ridge penalty is invariant to the rotation, so the solution is the same. The matrix, (columns, num_features),
    rotates its weights back.
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


# Fitting


class Regressions(NamedTuple):
    """
    The regressions of scikit-learn.

    Args:
        tol: the tolerance of the optimiser.
    """

    tol: float

    def logistic(self, features: np.ndarray, labels: np.ndarray, counts: np.ndarray) -> Solver:
        model = LogisticRegression(tol=self.tol, max_iter=1000, warm_start=True)

        def solve_one(strength: float) -> tuple[np.ndarray, np.ndarray]:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", ConvergenceWarning)
                model.set_params(C=strength).fit(features, labels, counts)
            return model.coef_.copy(), model.intercept_.copy()

        return solve_one

    def ridge(self, features: np.ndarray, labels: np.ndarray, counts: np.ndarray) -> Solver:
        def solve_one(strength: float) -> tuple[np.ndarray, np.ndarray]:
            model = Ridge(alpha=1 / strength).fit(features, labels, counts)
            return model.coef_.reshape(labels.shape[1], -1), np.atleast_1d(model.intercept_)

        return solve_one


def _solver(problem: LinearProblem, small: _Rotated, labels: np.ndarray, way: Way, tol: float) -> Solver:
    regressions = Regressions(tol)
    counts = _row_weights(problem, labels, way.balanced)
    if not way.separate:
        for i in way.without:
            small = small.without(i)  # the weights of its columns are then 0
        return problem.solver(*_with_copies(small, labels, counts), regressions)
    parts = []
    for x, there in zip(small.vectors, small.present, strict=True):
        known = np.bincount(labels[there], minlength=problem.num_outputs) > 0
        solver = problem.solver(x[there], labels[there], counts[there], regressions) if known.sum() > 1 else None
        parts.append((solver, known, x.shape[1]))
    is_somewhere = np.bincount(labels, minlength=problem.num_outputs) > 0

    def solve_all(strength: float) -> tuple[np.ndarray, np.ndarray]:
        weights = []
        for solver, known, width in parts:
            weight, own = np.zeros((problem.num_outputs, width)), np.zeros(problem.num_outputs)
            if solver is not None:
                weight, own = solver(strength)
                # A class whose rows all lack this modality is neither probable nor excluded.
                own[~known] = np.where(is_somewhere, own[known].min(), 0.0)[~known]
            weights += [weight, own[:, None]]
        return np.concatenate(weights, 1), np.where(is_somewhere, 0.0, NEVER)

    return solve_all


def _row_weights(problem: LinearProblem, labels: np.ndarray, balanced: bool) -> np.ndarray:
    """(num_items,): the weight of each row; the mean is 1."""
    weights = problem.item_weights(labels)
    if weights is None:
        weights = 1 / np.bincount(labels)[labels] if balanced else np.ones(len(labels))
    return weights * len(weights) / weights.sum()


def _with_copies(small: _Rotated, labels: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rows, labels and weights: the unchanged rows, and copies without each modality if another is left."""
    num_there = np.sum(small.present, 0)
    matrices, targets, weights = [small.matrix()], [labels], [counts]
    for i, there in enumerate(small.present):
        rows = np.flatnonzero(there & (num_there > 1))
        if len(rows) and COPY_WEIGHT:
            matrices.append(small.rows(rows).without(i).matrix())
            targets.append(labels[rows])
            weights.append(COPY_WEIGHT * counts[rows])
    weight = np.concatenate(weights)
    return np.concatenate(matrices), np.concatenate(targets), weight * len(labels) / weight.sum()


def _mean(solver: Solver, scales: dict[float, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """The mean of the solutions of some strengths, each with the factors of its columns."""
    solutions = [(scale, *solver(strength)) for strength, scale in scales.items()]
    weight = np.mean([scale * weight for scale, weight, _ in solutions], 0)
    # Biases of their own have models of all modalities only: one factor for all columns.
    bias = np.mean([scale[0] * bias for scale, _, bias in solutions], 0)
    return weight, np.where(solutions[0][2] == NEVER, NEVER, bias)


# Choosing


def _choose(problem: LinearProblem, small: _Rotated, labels: np.ndarray, groups: np.ndarray) -> tuple[Way, Scales]:
    """The way of fitting, and the strengths with their scales."""
    problem, labels = problem.reduced(labels)
    if len(labels) > MAX_ROWS_TO_CHOOSE:
        some = np.sort(np.random.default_rng(0).permutation(len(labels))[:MAX_ROWS_TO_CHOOSE])
        small, labels, groups = small.rows(some), labels[some], groups[some]
    folds = list(_folds(problem, labels, groups))
    if not problem.mixes_strengths:
        way, strength = _without_noise(problem, small, labels, folds)
        return way, {strength: (1.0,)}
    # No scale makes labels that the training rows of the fold lack more probable.
    is_known = np.concatenate([np.zeros(0, bool), *(np.isin(labels[test], labels[train]) for train, test in folds)])
    rows = np.concatenate([np.zeros(0, np.int64), *(test for _, test in folds)])

    def assessed(way: Way) -> tuple[Scales, np.ndarray]:
        """The best scales of each strength, and the rows that their mean answers correctly."""
        answers, truth = _answers(problem, small, labels, folds, way, MIXED_STRENGTHS)
        if len(np.unique(truth[is_known])) < 2:  # one label carries no information about scales
            return dict.fromkeys(answers, (1.0,)), np.zeros(len(truth), bool)
        counts = _row_weights(problem, truth, way.balanced) * is_known
        scales = best_scales(
            lambda logits, items: problem.losses(logits, truth[items]), answers, counts, rows, may_differ=way.separate
        )
        total = np.sum([scaled(logits, scales[strength]) for strength, logits in answers.items()], 0)
        return scales, total.argmax(1) == truth

    if problem.label_weights is not None and not _is_balanced(problem.label_weights, labels):
        return Way(), assessed(Way())[0]
    first, second = Way(balanced=True, separate=True), Way()
    scales, is_right = assessed(first)
    if problem.label_weights is not None:
        return first, scales
    other_scales, is_also_right = assessed(second)
    gain = is_also_right.astype(float) - is_right
    # Repeated folds use the same rows again, without new information.
    is_clear = len(gain) > 0 and gain.mean() > 2 * gain.std() / np.sqrt(len(labels))
    return (second, other_scales) if is_clear else (first, scales)


def _without_noise(
    problem: LinearProblem, small: _Rotated, labels: np.ndarray, folds: list[tuple[np.ndarray, np.ndarray]]
) -> tuple[Way, float]:
    """The best strength of one model, without modalities whose absence clearly lowers the loss."""

    def best_of(way: Way, strengths: Sequence[float]) -> tuple[Way, float, np.ndarray]:
        answers, truth = _answers(problem, small, labels, folds, way, strengths)
        losses = {
            strength: losses_with_copies(lambda logits, items: problem.losses(logits, truth[items]), logits, (1.0,))
            for strength, logits in answers.items()
        }
        best = min(losses, key=lambda strength: losses[strength].sum())
        return way, best, losses[best]

    way, strength, losses = best_of(Way(), problem.strengths)
    while len(way.without) < len(small.vectors) - 1 and len(losses) > 0:
        # Without noise another strength may be better. To try all of them takes too long.
        near = [other for other in problem.strengths if strength / 10 <= other <= 10 * strength]
        tried = [
            best_of(Way(without=(*way.without, i)), near) for i in range(len(small.vectors)) if i not in way.without
        ]
        other, _, other_losses = min(tried, key=lambda trial: trial[2].sum())
        gain = losses - other_losses
        if gain.mean() <= 2 * gain.std() / np.sqrt(len(labels)):
            break
        way, strength, losses = best_of(other, problem.strengths)
    return way, strength


def _is_balanced(label_weights: Sequence[float], labels: np.ndarray) -> bool:
    """Whether these weights give all classes the same total weight."""
    counts = np.bincount(labels, minlength=len(label_weights))
    shares = (counts * label_weights)[counts > 0]
    return bool(np.allclose(shares, shares[0], rtol=0.01))


def _answers(
    problem: LinearProblem,
    small: _Rotated,
    labels: np.ndarray,
    folds: list[tuple[np.ndarray, np.ndarray]],
    way: Way,
    strengths: Sequence[float],
) -> tuple[dict[float, np.ndarray], np.ndarray]:
    """
    The logits of all held-out rows by strength, and their labels.

    Logits are (num_modalities + 1, num_rows, num_outputs): the summands of each modality, then the biases.
    """
    ends = np.cumsum([x.shape[1] + 1 for x in small.vectors])
    columns = [slice(start, end) for start, end in zip([0, *ends[:-1]], ends, strict=True)]
    found: dict[float, list[np.ndarray]] = {strength: [] for strength in strengths}
    for train, held_out in folds:
        solver = _solver(problem, small.rows(train), labels[train], way, 1e-3)
        seen = small.rows(held_out).matrix()
        for strength, parts in found.items():
            weight, bias = solver(strength)
            summands = [seen[:, of_part] @ weight[:, of_part].T for of_part in columns]
            parts.append(np.stack([*summands, np.tile(bias, (len(seen), 1))]))
    empty = np.zeros((len(columns) + 1, 0, problem.num_outputs))
    answers = {strength: np.concatenate([empty, *parts], 1) for strength, parts in found.items()}
    return answers, np.concatenate([labels[:0], *(labels[held_out] for _, held_out in folds)])


def _folds(problem: LinearProblem, labels: np.ndarray, groups: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    num_folds = min(NUM_FOLDS, len(np.unique(groups)))
    if num_folds < 2:
        return
    classes = problem.classes(labels)
    is_stratified = classes is not None and np.bincount(classes).max() >= num_folds
    for repeat in range(NUM_REPEATS if len(labels) < FEW_ROWS else 1):
        splitter = (StratifiedGroupKFold if is_stratified else GroupKFold)(num_folds, shuffle=True, random_state=repeat)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # for a class with fewer rows than folds
            for train, held_out in splitter.split(np.zeros((len(labels), 0)), classes, groups):
                if len(train) and len(held_out):
                    yield train, held_out
