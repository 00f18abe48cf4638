"""Python code run in a process of its own, with what it cost."""

import json
import os
import resource
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any, NamedTuple


TESTS = Path(__file__).parent.parent
_BEFORE = f"""
import json, resource, sys
sys.path[:0] = [{str(TESTS)!r}, {str(TESTS / "security")!r}]
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
def tell(**values):
    print("TOLD " + json.dumps(values), flush=True)
"""


class Finished(NamedTuple):
    """
    What a child process did.

    Args:
        told: all that it gave to `tell(name=value, ...)`.
        stderr: what it wrote there.
        returncode: 0 if it ended well.
    """

    told: dict[str, Any]
    stderr: str
    returncode: int


def run_child(code: str, seconds: float = 120, gigabytes: float = 8, **environment: str) -> Finished:
    """
    Runs code in a new Python, which may call `peak()`, the most bytes that it has held so far, and `tell(...)`.

    Args:
        seconds: when it is killed.
        gigabytes: how much memory it may reserve.
    """

    def limit() -> None:
        most = int(gigabytes * 2**30)
        resource.setrlimit(resource.RLIMIT_AS, (most, most))

    done = subprocess.run(
        [sys.executable, "-c", _BEFORE + textwrap.dedent(code)],
        capture_output=True,
        text=True,
        timeout=seconds,
        preexec_fn=limit,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **environment},
    )
    told: dict[str, Any] = {}
    for line in done.stdout.splitlines():
        if line.startswith("TOLD "):
            told.update(json.loads(line[5:]))
    return Finished(told, done.stderr, done.returncode)
