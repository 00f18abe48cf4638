"""The application of one worker process, by the plan in its environment."""

import logging
import multiprocessing
import sys

import torch
from fastapi import FastAPI
from transformers.utils.logging import disable_progress_bar

from ...model.limits import set_limits
from ...model.messages import one_line
from ..own_modules import import_own_module
from .app import create_app
from .settings import WorkerPlan


_STARTUP_FAILURE = 3  # of uvicorn: it then stops, and starts no worker again


def app_of_worker() -> FastAPI:
    """
    The application for `uvicorn`, which imports this function in each worker.

    Raises:
        OSError, ValueError, ImportError: one sentence, if there is no such model. Of several workers, each prints it
            and ends with the status that stops the server.
    """
    try:
        return _app(WorkerPlan.read())
    except (OSError, ValueError, ImportError) as error:
        if multiprocessing.parent_process() is None:
            raise
        print(f"Error: {one_line(error, 2000)}", file=sys.stderr)
        raise SystemExit(_STARTUP_FAILURE) from None


def _app(plan: WorkerPlan) -> FastAPI:
    set_limits(**plan.limits)
    for name in plan.modules:
        import_own_module(name)
    if plan.settings.threads is not None:
        torch.set_num_threads(plan.settings.threads)
    disable_progress_bar()
    # Warnings about single rows: strangers would fill the log.
    logging.getLogger("mm_transformers.model").setLevel(logging.ERROR)
    return create_app(plan.model, plan.settings)
