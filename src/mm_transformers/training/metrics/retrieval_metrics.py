"""Recall of retrieval: how often a match is among the first results."""

from typing import Any, ClassVar

import datasets
import numpy as np

from .base import TaskMetric, register_metric


@register_metric
class RetrievalRecall(TaskMetric):
    """
    Recall at 1, 5 and 10 of a [`Retrieval`] task, over all rows at once.

    Recall at k is the share of queries with a match among the k most similar candidates. The candidates are all
    different. `from_text_recall_at_k` searches pictures by texts, `to_text_recall_at_k` texts by pictures.
    `mean_recall` is the mean of the six. Among equally similar candidates, matches count as the last, so a constant
    finds nothing.
    """

    key: ClassVar[str] = "retrieval_recall"
    ks: ClassVar[tuple[int, ...]] = (1, 5, 10)

    @classmethod
    def names(cls) -> list[str]:
        """The names of its results."""
        return [*(f"{side}_recall_at_{k}" for side in ("from_text", "to_text") for k in cls.ks), "mean_recall"]

    def columns(self) -> list[datasets.Features]:
        vectors, ids = (datasets.Sequence(datasets.Value(dtype)) for dtype in ("float32", "int64"))
        return [datasets.Features({"predictions": vectors, "references": ids})]

    @classmethod
    def fits(cls, references: Any) -> bool:
        """Whether these are the labels of a [`Retrieval`] task."""
        is_ids = isinstance(references, np.ndarray) and np.issubdtype(references.dtype, np.integer)
        return is_ids and references.ndim == 2 and references.shape[1] == 3

    def _compute(self, *, predictions: Any = None, references: Any = None, **kwargs: Any) -> dict[str, float]:
        """
        The recalls of both directions, and their mean.

        Args:
            predictions (rows, 2 * size): the vectors of text and item of each row.
            references (rows, 3): fingerprints of text, item and group; -1 is no group.
        """
        ids = np.asarray(references, np.int64)
        vectors = np.asarray(predictions, np.float32)
        sides = np.split(vectors, 2, axis=1)
        # Each distinct text and picture is one query and one candidate, whatever its number of rows.
        unique = [np.unique(ids[:, side], return_index=True, return_inverse=True) for side in (0, 1)]
        first, number = [u[1] for u in unique], [u[2] for u in unique]
        matches = np.zeros((len(first[0]), len(first[1])), bool)
        matches[number[0], number[1]] = True
        for group in np.unique(ids[ids[:, 2] != -1, 2]):
            rows = ids[:, 2] == group
            matches[np.ix_(number[0][rows], number[1][rows])] = True
        texts, items = sides[0][first[0]], sides[1][first[1]]
        results = {}
        for name, queries, candidates, belongs in (
            ("from_text", texts, items, matches),
            ("to_text", items, texts, matches.T),
        ):
            ranks = _ranks(queries, candidates, belongs)
            results.update({f"{name}_recall_at_{k}": float(np.mean(ranks < k)) for k in self.ks})
        return {**results, "mean_recall": float(np.mean(list(results.values())))}


def _ranks(queries: np.ndarray, candidates: np.ndarray, belongs: np.ndarray) -> np.ndarray:
    """The number of candidates before the first match, for each query."""
    ranks = []
    for start in range(0, len(queries), 1024):
        rows = slice(start, start + 1024)
        scores = queries[rows] @ candidates.T
        best = np.where(belongs[rows], scores, -np.inf).max(1, keepdims=True)
        ranks.append(((scores >= best) & ~belongs[rows]).sum(1))
    return np.concatenate(ranks)
