"""The task kinds of the package: one line each."""

from .task_base import TASK_KINDS, Task, register_task, task_from_dict
from .task_classification import Classification
from .task_generation import Generation
from .task_matching import Matching
from .task_multi_label import MultiLabel
from .task_regression import Regression
from .task_retrieval import Retrieval
from .task_token_classification import TokenClassification


__all__ = [
    "TASK_KINDS",
    "Classification",
    "Generation",
    "Matching",
    "MultiLabel",
    "Regression",
    "Retrieval",
    "Task",
    "TokenClassification",
    "register_task",
    "task_from_dict",
]
