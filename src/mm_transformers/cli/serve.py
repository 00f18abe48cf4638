"""`mm-transformers serve`: a model over HTTP, in one or more processes."""

import dataclasses
import importlib
import os
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

from ..model.configuration_mm_transformer import MMTransformerConfig
from ..model.limits import limits
from ..model.messages import check_folder
from ..sharing.serving.settings import ServeSettings, WorkerPlan


_APP = "mm_transformers.sharing.serving.worker:app_of_worker"
# prometheus_client reads it; see `mm_transformers.sharing.serving.metrics`.
_METRICS = "PROMETHEUS_MULTIPROC_DIR"
# A busy worker does not answer at once; a dead one is replaced after this time at the latest.
_SECONDS_OF_A_PING = 20


def run_server(
    model: str, host: str, port: int, workers: int, options: Mapping[str, Any], modules: Sequence[str] = ()
) -> None:
    """
    Serves a saved model until it is interrupted. Then it answers the requests that it has, and stops.

    Args:
        model: folder or Hub id.
        workers: processes. A worker that dies is replaced, if there are several.
        options: fields of [`ServeSettings`].
        modules: modules with kinds of the user's own.

    Raises:
        ValueError, OSError, ImportError: one sentence.
    """
    try:
        for name in ("fastapi", "prometheus_client", "python_multipart", "uvicorn"):
            importlib.import_module(name)
    except ImportError as error:
        raise ImportError(f"Serving needs `{error.name}`: pip install mm-transformers[serve]") from error
    import uvicorn

    settings = ServeSettings(**options)
    check_folder(model)
    MMTransformerConfig.from_pretrained(model)  # one error here, and not one of each worker
    if settings.threads is None:
        settings = dataclasses.replace(settings, threads=max(1, _cores() // workers))
    WorkerPlan(model, settings, dataclasses.asdict(limits()), tuple(modules)).write()
    with ExitStack() as stack:
        if workers > 1 and _METRICS not in os.environ:
            os.environ[_METRICS] = stack.enter_context(tempfile.TemporaryDirectory(prefix="mm-transformers-metrics-"))
            stack.callback(os.environ.pop, _METRICS)
        uvicorn.run(
            _APP,
            factory=True,
            host=host,
            port=port,
            workers=workers,
            access_log=False,
            server_header=False,
            timeout_keep_alive=30,
            # Requests end by themselves before it.
            timeout_graceful_shutdown=int(settings.timeout) + 5,
            timeout_worker_healthcheck=_SECONDS_OF_A_PING,
        )


def _cores() -> int:
    """The cores that this process may use, which are fewer in a container."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
