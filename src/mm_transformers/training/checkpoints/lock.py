"""Allows one training at a time in a folder, by a lock file with the process that writes there."""

import json
import os
import platform
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, Optional

import psutil
from accelerate.utils import broadcast_object_list
from transformers.utils import logging

from ...model.safe_writing import own_name


logger = logging.get_logger(__name__)

# The underscore excludes it from uploads to the Hub.
LOCK_NAME = "_training_lock.json"
# Tolerance for the start time of a process, in seconds: some systems compute it from a clock that is corrected.
_TOLERANCE = 2.0
# Seconds to wait for a half-written lock of another process.
_PATIENCE = 2.0

_depths: dict[str, int] = {}  # folder -> the number of blocks of this process that hold its lock


@contextmanager
def locked(folder: str | os.PathLike[str]) -> Iterator[None]:
    """
    Locks the folder against other processes while the block runs.

    The same process may enter it again. The lock of an ended process is taken over.

    Args:
        folder (`str` or `Path`): Created if it does not exist.

    Raises:
        ValueError: one sentence that names the other process.

    Example:

    ```python
    >>> with locked("out"):
    ...     trainer.train()
    ```
    """
    path = Path(folder, LOCK_NAME)
    key = f"{os.getpid()} {path.resolve()}"
    _depths[key] = _depths.get(key, 0) + 1
    try:
        if _depths[key] == 1:
            _acquire(path)
        yield
    finally:
        _depths[key] -= 1
        if _depths[key] == 0:
            del _depths[key]
            if _is_same(_read(path), _own()):
                path.unlink(missing_ok=True)


@contextmanager
def locked_for_all(folder: str | os.PathLike[str], process_index: int) -> Iterator[None]:
    """
    [`locked`] for all processes of a training: the first one locks the folder.

    Args:
        process_index: of this process.

    Raises:
        ValueError: in all processes, if the first one cannot lock the folder.
    """
    problem: list[Any] = [None]
    with ExitStack() as held:
        if process_index == 0:
            try:
                held.enter_context(locked(folder))
            except (ValueError, OSError) as error:
                problem[0] = str(error)
        [problem[0]] = broadcast_object_list(problem)
        if problem[0] is not None:
            raise ValueError(problem[0])
        yield


def _own() -> dict[str, Any]:
    own = {"host": platform.node(), "pid": os.getpid(), "started": psutil.Process().create_time()}
    return {**own, "since_boot": _since_boot(os.getpid())}


def _since_boot(pid: int) -> Optional[str]:
    """
    The boot of this machine and the start of a process in ticks since then, which no correction of the clock changes;
    `None` on systems without them.
    """
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        # The name of the program before may hold spaces and brackets.
        ticks = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()[19]
        return f"{boot} {int(ticks)}"
    except (OSError, ValueError, IndexError):
        return None


def _is_same(one: Optional[dict[str, Any]], other: Optional[dict[str, Any]]) -> bool:
    """Whether two locks belong to the same process, or both to none."""
    if one is None or other is None:
        return one is other
    is_one_start = abs(one["started"] - other["started"]) <= _TOLERANCE
    if one["since_boot"] is not None and other["since_boot"] is not None:
        is_one_start = one["since_boot"] == other["since_boot"]
    return is_one_start and all(one[name] == other[name] for name in ("host", "pid"))


@contextmanager
def _one_at_a_time(folder: Path) -> Iterator[None]:
    """
    Makes other processes of this machine wait while the block runs.

    Between reading a lock and removing it, no other process may take it over. Systems and file systems that cannot lock
    a folder skip this.
    """
    descriptor = None
    try:
        with suppress(ImportError, OSError):
            import fcntl

            descriptor = os.open(folder, os.O_RDONLY)
            deadline = time.monotonic() + 2 * _PATIENCE
            while time.monotonic() < deadline:
                with suppress(BlockingIOError):
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                time.sleep(0.02)
        yield
    finally:
        if descriptor is not None:
            os.close(descriptor)


def _acquire(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with _one_at_a_time(path.parent):
        _acquire_alone(path)


def _acquire_alone(path: Path) -> None:
    # Written to another file first, so that no process reads half of it.
    draft = path.with_name(f"{LOCK_NAME}.{own_name()}")
    with open(draft, "x", encoding="utf-8") as file:
        json.dump(_own(), file)
    try:
        deadline = time.monotonic() + _PATIENCE
        while not _link(draft, path):
            holder = _read(path)
            if holder is None and not path.is_symlink() and time.monotonic() < deadline:
                time.sleep(0.05)  # it has just been released, or is being written
                continue
            why_not = _why_not(path, holder)
            if why_not is not None:
                raise ValueError(why_not)
            logger.warning(
                f"The training that used {path.parent} (process {holder['pid']}) has ended; the folder is free."
            )
            _remove_stale(path, holder)
    finally:
        draft.unlink(missing_ok=True)


def _link(draft: Path, path: Path) -> bool:
    """Gives the lock its name, unless a lock exists."""
    try:
        os.link(draft, path)
        return True
    except FileExistsError:
        return False
    except OSError:  # a file system without links
        with suppress(FileExistsError), open(path, "x", encoding="utf-8") as file:
            file.write(draft.read_text(encoding="utf-8"))
            return True
        return False


def _read(path: Path) -> Optional[dict[str, Any]]:
    try:
        if path.is_symlink():
            return None
        holder = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(holder["host"], str) and isinstance(holder["pid"], int) and holder["pid"] > 0:
            since_boot = holder.get("since_boot")
            return {
                "host": holder["host"],
                "pid": holder["pid"],
                "started": float(holder["started"]),
                "since_boot": since_boot if isinstance(since_boot, str) else None,
            }
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        pass
    return None


def _why_not(path: Path, holder: Optional[dict[str, Any]]) -> Optional[str]:
    """Why the lock may not be taken over, as a sentence; `None` if it may."""
    if holder is None:
        return f"{path} is not a lock file of this package: move it, or train into another folder."
    where = f"{path.parent} is in use by another training: process {holder['pid']} on {holder['host'][:100]!r}"
    with suppress(OverflowError, OSError, ValueError):
        where += f", started {time.strftime('%Y-%m-%d %H:%M:%S', time.localtime(holder['started']))}"
    if holder["host"] != platform.node():
        return f"{where}. Train into another folder; if that process has ended, remove {path}."
    try:
        process = psutil.Process(holder["pid"])
        started = process.create_time()
        if process.status() == psutil.STATUS_ZOMBIE:
            return None
    except (psutil.NoSuchProcess, OverflowError):
        return None
    except psutil.Error:
        return f"{where}. Wait until it ends, or train into another folder."
    found = {**holder, "started": started, "since_boot": _since_boot(holder["pid"])}
    if not _is_same(found, holder):
        return None  # another process has the number now
    return f"{where}. Wait until it ends, or train into another folder."


def _remove_stale(path: Path, holder: Optional[dict[str, Any]]) -> None:
    aside = path.with_name(f"{LOCK_NAME}.{own_name()}")
    with suppress(FileNotFoundError):  # another process was faster
        path.rename(aside)
        if not _is_same(_read(aside), holder):  # another process was faster, and this is its lock
            _link(aside, path)
        aside.unlink()
