"""The measures of a server for Prometheus; of all its worker processes together."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

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
        made = {"namespace": "mm_transformers", "registry": self.registry}
        self.requests = Counter("requests", "Requests that were answered.", ["route", "status"], **made)
        self.seconds = Histogram("request_seconds", "Seconds of a request.", ["route"], buckets=_SECONDS, **made)
        self.rows = Counter("rows", "Rows that were answered.", ["route"], **made)
        self.batch_rows = Histogram("batch_rows", "Rows of a forward pass.", buckets=_ROWS, **made)
        self.batch_seconds = Histogram("batch_seconds", "Seconds of a forward pass.", buckets=_SECONDS, **made)
        self.waiting = Gauge("waiting_rows", "Rows that wait.", multiprocess_mode="livesum", **made)
        self.streams = Gauge("streams", "Texts that are being streamed.", multiprocess_mode="livesum", **made)
        if FOLDER not in os.environ:
            ProcessCollector(registry=self.registry)

    @contextmanager
    def streaming(self) -> Iterator[None]:
        """Counts a stream while the block runs."""
        self.streams.inc()
        try:
            yield
        finally:
            self.streams.dec()

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
