"""The measures of a server for Prometheus; of all its worker processes together."""

import os
from functools import partial
from pathlib import Path
from typing import Any

import psutil
from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    generate_latest,
)
from prometheus_client.multiprocess import MultiProcessCollector, mark_process_dead


# prometheus_client reads this name when it is imported: then processes write their values to files in this folder.
FOLDER = "PROMETHEUS_MULTIPROC_DIR"
CONTENT_TYPE = CONTENT_TYPE_LATEST
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
_ROWS = (1, 2, 4, 8, 16, 32, 64, 128)


class Metrics:
    """
    Counters of requests and rows, and times of requests and batches.

    Example:

    ```python
    >>> metrics = Metrics()
    >>> metrics.rows.labels("/predict").inc(3)
    >>> b'mm_transformers_rows_total{route="/predict"} 3.0' in metrics.text()
    True
    ```
    """

    def __init__(self) -> None:
        # A registry of its own: one process may have several apps.
        self.registry = CollectorRegistry()
        counter, gauge, histogram = (self._named(cls) for cls in (Counter, Gauge, Histogram))
        self.requests = counter("requests", "Requests that were answered.", ["route", "status"])
        self.seconds = histogram("request_seconds", "Seconds of a request.", ["route"], buckets=_SECONDS)
        self.rows = counter("rows", "Rows that were answered.", ["route"])
        self.batch_rows = histogram("batch_rows", "Rows of a forward pass.", buckets=_ROWS)
        self.batch_seconds = histogram("batch_seconds", "Seconds of a forward pass.", buckets=_SECONDS)
        self.waiting = gauge("waiting_rows", "Rows that wait.", multiprocess_mode="livesum")
        self.streams = gauge("streams", "Texts that are being streamed.", multiprocess_mode="livesum")
        if FOLDER not in os.environ:
            ProcessCollector(registry=self.registry)

    def _named(self, cls: Any) -> Any:
        return partial(cls, namespace="mm_transformers", registry=self.registry)

    def text(self) -> bytes:
        """The values of this process, or of all workers, in the format of Prometheus."""
        folder = os.environ.get(FOLDER)
        if folder is None:
            return generate_latest(self.registry)
        _forget_dead_processes(Path(folder))
        registry = CollectorRegistry()
        MultiProcessCollector(registry, folder)
        return generate_latest(registry)


def _forget_dead_processes(folder: Path) -> None:
    """A killed worker leaves the file of its gauges behind; its counters stay, since they count what has happened."""
    for path in folder.glob("gauge_live*_*.db"):
        pid = path.stem.rpartition("_")[2]
        if pid.isdigit() and not psutil.pid_exists(int(pid)):
            mark_process_dead(int(pid), str(folder))
