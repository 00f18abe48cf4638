"""The application of one worker process, by the plan in its environment."""

import importlib
import sys

import torch
from fastapi import FastAPI

from ...model.limits import set_limits
from .app import create_app
from .settings import WorkerPlan


def app_of_worker() -> FastAPI:
    """
    The application for `uvicorn`, which imports this function in each worker.

    Raises:
        OSError, ValueError: one sentence, if there is no such model.
    """
    plan = WorkerPlan.read()
    set_limits(**plan.limits)
    sys.path.insert(0, "")  # modules in the current folder, as `python -m` finds them
    try:
        for name in plan.modules:
            importlib.import_module(name)
    finally:
        sys.path.remove("")
    if plan.settings.threads is not None:
        torch.set_num_threads(plan.settings.threads)
    return create_app(plan.model, plan.settings)
