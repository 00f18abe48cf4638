"""The features of one encoder on disk: shards that are written once, atomically, and read without copying."""

import json
import os
import platform
import re
import time
import uuid
import weakref
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple, Optional

import psutil
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers.utils import logging

from ..model.safe_writing import drop_link, write_text_atomically
from .feature_keys import KEY_SIZE, checksum


logger = logging.get_logger(__name__)

# The files of a store; other files in its folder are not touched.
_SHARD = re.compile(r"[0-9a-f]{32}\.safetensors")
_OF_PROCESSES = re.compile(r".*~\d+~[0-9a-f]{32}\.(tmp|use)")
_OWN_NAMES = {"about.json", "last_used"}
_TENSORS = ("features", "keys", "digests", "shapes")
# The most work that an interrupted build loses.
SHARD_BYTES = 64 * 2**20
# Whether a process of another machine still runs is unknown; after a day it counts as ended.
_LONGEST_SILENCE = 24 * 3600


class Features(NamedTuple):
    """
    The features of one item.

    Args:
        key: hash of the item.
        tokens: (tokens, width) of a text, an image or a clip; (frames, tokens, width) of a video.
        digest: hash of the item as it was read, so that equal pictures in different files are recognised.
    """

    key: bytes
    tokens: torch.Tensor
    digest: bytes


class FeatureStore:
    """
    A folder of shards. A copy in another process finds its shards again.

    Args:
        folder: created if it does not exist.
        about: the content of `about.json` in the folder, for people.
        width: that of the features; by default that of the first shard.
    """

    def __init__(self, folder: Path, about: dict[str, Any], width: Optional[int] = None):
        self.folder, self.width = folder, width
        self._forget()
        folder.mkdir(parents=True, exist_ok=True)
        # Others do not evict it while this process lives. Files of dead processes are removed.
        self._mark = folder / _own_name(".use")
        self._mark.touch()
        self._release = weakref.finalize(self, _remove_own, self._mark, os.getpid())
        for path in folder.iterdir():
            if _OF_PROCESSES.fullmatch(path.name) and not path.is_dir() and not _is_alive(path):
                path.unlink(missing_ok=True)
        if not (folder / "about.json").exists():
            write_text_atomically(folder / "about.json", json.dumps(about, indent=2) + "\n")
        self.touch()
        self.refresh()

    def _forget(self) -> None:
        self.searched: set[Any] = set()  # data sets whose items are all stored
        self._shards: list[torch.Tensor] = []
        self._known: set[str] = set()
        self._index: dict[bytes, tuple[int, int, int, int, bytes]] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {"folder": self.folder, "width": self.width}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.folder, self.width = state["folder"], state["width"]
        self._forget()
        self.refresh(verify=False)  # the sending process has verified it

    def touch(self) -> None:
        """Records the time of this use."""
        self._mark.touch()
        drop_link(self.folder / "last_used")
        (self.folder / "last_used").touch()

    def refresh(self, verify: bool = True) -> None:
        """
        Reads the index of new shards, from any process.

        Args:
            verify: whether to compare their contents with their checksums.
        """
        for path in sorted(self.folder.iterdir()):
            if _SHARD.fullmatch(path.name) and path.name not in self._known:
                self._known.add(path.name)
                self._open(path, verify)

    def _open(self, path: Path, verify: bool) -> None:
        try:
            with safe_open(path, framework="pt") as shard:
                expected = (shard.metadata() or {}).get("checksum")
                if expected is None:
                    logger.warning(f"{path} was not written by a feature cache; it is not used.")
                    return
                tensors = {name: shard.get_tensor(name) for name in _TENSORS}  # mapped, not read
            if verify and checksum(tensors.values()) != expected:
                raise OSError("its content does not match its checksum")
        except FileNotFoundError:
            return
        except (SafetensorError, OSError) as error:
            # After a power failure a file may lack its content; disks and memory can flip bits.
            logger.warning(f"{path} cannot be used ({error}); it is removed, and its features are computed again.")
            path.unlink(missing_ok=True)
            return
        if not self._fits(tensors):
            logger.warning(f"{path} belongs to another encoder, or was changed; it is not used.")
            return
        keys, digests = (tensors[name].numpy().tobytes() for name in ("keys", "digests"))
        shapes = tensors["shapes"].tolist()
        number, start = len(self._shards), 0
        self._shards.append(tensors["features"])
        for i, (frames, tokens) in enumerate(shapes):
            part = slice(i * KEY_SIZE, (i + 1) * KEY_SIZE)
            self._index.setdefault(keys[part], (number, start, frames, tokens, digests[part]))
            start += max(frames, 1) * tokens

    def _fits(self, tensors: dict[str, torch.Tensor]) -> bool:
        """Whether the tensors of a shard fit each other, and have the width of earlier shards."""
        features, shapes = tensors["features"], tensors["shapes"]
        if features.ndim != 2 or shapes.ndim != 2 or shapes.shape[1] != 2 or shapes.dtype != torch.int64:
            return False
        hashes = [tensors[name] for name in ("keys", "digests")]
        width = self.width or (self._shards[0].shape[1] if self._shards else features.shape[1])
        rows = (shapes[:, 0].clamp(min=1) * shapes[:, 1]).sum()
        return (
            features.shape[1] == width
            and features.is_floating_point()
            and all(x.dtype == torch.uint8 and x.shape == (len(shapes), KEY_SIZE) for x in hashes)
            and bool((shapes >= 0).all())
            and int(rows) == len(features)
        )

    def __len__(self) -> int:
        return len(self._index)

    def __contains__(self, key: bytes) -> bool:
        return key in self._index

    def __getitem__(self, key: bytes) -> Features:
        number, start, frames, tokens, digest = self._index[key]
        features = self._shards[number][start : start + max(frames, 1) * tokens]
        return Features(key, features.unflatten(0, (frames, tokens)) if frames else features, digest)

    def write(self, items: list[Features]) -> None:
        """
        Adds a shard.

        It is written under another name first, so that it exists completely or not at all.

        Raises:
            OSError: if there is no space left, or the folder cannot be written to.
        """
        shapes = [(item.tokens.shape[0] if item.tokens.ndim == 3 else 0, item.tokens.shape[-2]) for item in items]
        tensors = {
            "features": torch.cat([item.tokens.flatten(0, -2) for item in items]).contiguous(),
            "keys": _as_tensor(item.key for item in items),
            "digests": _as_tensor(item.digest for item in items),
            "shapes": torch.tensor(shapes, dtype=torch.int64),
        }
        unfinished = self.folder / _own_name(".tmp")
        try:
            save_file(tensors, unfinished, {"checksum": checksum(tensors[name] for name in _TENSORS)})
            with open(unfinished, "rb") as file:
                os.fsync(file.fileno())
            unfinished.replace(self.folder / f"{uuid.uuid4().hex}.safetensors")
        except (SafetensorError, OSError) as error:
            raise OSError(
                f"The feature cache in {self.folder} cannot be written ({error}). The features so far are kept, and "
                "the next run continues from there: free space on the disk, or choose another folder."
            ) from error
        finally:
            unfinished.unlink(missing_ok=True)
        self.refresh()


def size_of(folder: Path) -> int:
    """The total size of the files in a folder, in bytes; others may change them meanwhile."""
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.stat().st_size if path.is_file() else 0
        except FileNotFoundError:
            continue
    return total


def in_use(folder: Path) -> bool:
    """Whether a living process, this one included, uses the folder as its store."""
    return any(_is_alive(path) for path in folder.glob("*.use") if _OF_PROCESSES.fullmatch(path.name))


def remove_store(folder: Path) -> None:
    """Removes the files of stores, and the folder if it holds nothing else."""
    for path in folder.iterdir():
        is_own = path.name in _OWN_NAMES or _OF_PROCESSES.fullmatch(path.name) or _is_own_shard(path)
        if is_own and not path.is_dir():
            path.unlink(missing_ok=True)
    if not any(folder.iterdir()):
        folder.rmdir()


def _is_own_shard(path: Path) -> bool:
    """Whether a file is a shard: by its name, and by its metadata if it can be read."""
    if not _SHARD.fullmatch(path.name):
        return False
    try:
        with safe_open(path, framework="pt") as shard:
            return "checksum" in (shard.metadata() or {})
    except (SafetensorError, OSError):
        return True  # damaged


def _as_tensor(hashes: Iterable[bytes]) -> torch.Tensor:
    return torch.frombuffer(bytearray(b"".join(hashes)), dtype=torch.uint8).view(-1, KEY_SIZE)


def _own_name(suffix: str) -> str:
    """A unique file name that contains the id of the process."""
    return f"{platform.node()}~{os.getpid()}~{uuid.uuid4().hex}{suffix}"


def _is_alive(path: Path) -> bool:
    node, _, rest = path.name.partition("~")
    pid = rest.partition("~")[0]
    if node == platform.node() and pid.isdigit():
        return psutil.pid_exists(int(pid))
    try:
        return time.time() - path.stat().st_mtime < _LONGEST_SILENCE
    except FileNotFoundError:
        return False


def _remove_own(path: Path, pid: int) -> None:
    if os.getpid() == pid:  # in a worker of a data loader, this is only a copy of the store
        path.unlink(missing_ok=True)
