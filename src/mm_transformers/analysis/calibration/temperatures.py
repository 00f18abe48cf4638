"""Fits the temperatures of a group of rows (Guo et al. 2017, https://arxiv.org/abs/1706.04599)."""

import math
from typing import Optional

import numpy as np
import torch
from scipy.optimize import minimize

from ...model.task_base import Task
from .labelled_rows import LabelledRows


NUM_FOLDS = 5
# The prior of the shared logarithm: standard deviation 1. It only bounds temperatures where few rows say little.
_SHARED_PENALTY = 0.5
# The prior of the difference between a label's logarithm and the shared one: standard deviation 0.5.
_PENALTY = 2.0
# Rows per label below which labels have no temperatures of their own.
_ROWS_PER_LABEL = 10
# The bound of a temperature's logarithm: 1/20 to 20.
_WIDEST = math.log(20.0)


def fit_temperatures(task: Task, logits: torch.Tensor, labels: torch.Tensor, seed: int = 0) -> Optional[list[float]]:
    """
    The temperature with the highest likelihood, or one for each label if that pays.

    It pays if the likelihood of rows that were left out is higher by more than its standard error, in 5 folds.

    Args:
        logits, labels: of labelled rows.

    Returns:
        One number, or one for each label; `None` if the task has no probabilities.
    """
    if task.log_likelihood(logits[:1], labels[:1]) is None:
        return None
    shared = _fit(task, logits, labels, 1, 0.0)
    num_labels = logits.shape[-1] if logits.ndim > 1 else 1
    if num_labels < 2 or len(logits) < _ROWS_PER_LABEL * num_labels:
        return shared
    folds = folds_of(len(logits), seed)
    of_shared = _left_out(task, logits, labels, folds, 1, 0.0)
    gains = _left_out(task, logits, labels, folds, num_labels, _PENALTY) - of_shared
    pays = float(gains.mean()) > float(gains.std()) / math.sqrt(len(gains))
    return _fit(task, logits, labels, num_labels, _PENALTY) if pays else shared


def folds_of(num_rows: int, seed: int = 0) -> np.ndarray:
    """(num_rows,): the fold of each row, at random."""
    return np.random.default_rng(seed).permutation(num_rows) % NUM_FOLDS


def tempered(task: Task, logits: torch.Tensor, temperatures: Optional[list[float]]) -> torch.Tensor:
    """The logits of rows of one group, divided by its temperatures."""
    if temperatures is None or temperatures == [1.0]:
        return logits
    return task.temper(logits, torch.tensor([temperatures]).expand(len(logits), -1))


def cross_tempered(task: Task, rows: LabelledRows, fitted_on: LabelledRows, seed: int = 0) -> torch.Tensor:
    """
    The logits of each row, divided by temperatures that were fitted without its fold.

    Args:
        fitted_on: rows with the numbers of all `rows`, each number once.
    """
    folds, result = folds_of(len(fitted_on.labels), seed), rows.logits.clone().float()
    for fold in range(NUM_FOLDS):
        left_out = torch.as_tensor(folds == fold)
        out = torch.isin(rows.numbers, fitted_on.numbers[left_out])
        if out.any() and not left_out.all():
            found = fit_temperatures(task, fitted_on.logits[~left_out], fitted_on.labels[~left_out], seed)
            result[out] = tempered(task, rows.logits[out], found).float()
    return result


def _left_out(
    task: Task, logits: torch.Tensor, labels: torch.Tensor, folds: np.ndarray, width: int, penalty: float
) -> torch.Tensor:
    """(rows,): the log-likelihood of each row by temperatures of the other folds."""
    result = torch.zeros(len(logits))
    for fold in range(NUM_FOLDS):
        out = torch.as_tensor(folds == fold)
        found = _fit(task, logits[~out], labels[~out], width, penalty)
        result[out] = _likelihood(task, logits[out], labels[out], torch.tensor(found)).detach()
    return result.nan_to_num(0.0)


def _fit(task: Task, logits: torch.Tensor, labels: torch.Tensor, width: int, penalty: float) -> list[float]:
    def objective(values: np.ndarray) -> tuple[float, np.ndarray]:
        given = torch.tensor(values, dtype=torch.float32, requires_grad=True)
        # The first value is shared, the others are the differences of single labels.
        prior = _SHARED_PENALTY * given[0].square() + penalty * given[1:].square().sum()
        loss = prior / len(logits) - _likelihood(task, logits, labels, _logarithms(given).exp()).nanmean()
        loss.backward()
        return float(loss.detach()), np.asarray(given.grad, dtype=float)

    size = 1 + width if width > 1 else 1
    bounds, options = [(-_WIDEST, _WIDEST)] * size, {"maxiter": 30, "ftol": 1e-7}
    found = minimize(objective, np.zeros(size), jac=True, method="L-BFGS-B", bounds=bounds, options=options).x
    return [float(f"{math.exp(value):.6g}") for value in _logarithms(torch.from_numpy(found)).tolist()]


def _logarithms(values: torch.Tensor) -> torch.Tensor:
    """The logarithms of temperatures: one, or the shared one with the differences of the labels."""
    return (values[0] + values[1:] if len(values) > 1 else values).clamp(-_WIDEST, _WIDEST)


def _likelihood(task: Task, logits: torch.Tensor, labels: torch.Tensor, temperatures: torch.Tensor) -> torch.Tensor:
    found = task.log_likelihood(task.temper(logits, temperatures[None].expand(len(logits), -1)), labels)
    assert found is not None
    return found
