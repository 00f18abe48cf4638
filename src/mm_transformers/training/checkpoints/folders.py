"""
Finds complete checkpoints, and creates and deletes checkpoints atomically.

A checkpoint is written to the folder `_saving`, and renamed to its place when all of its files are on the disk. Before
it is deleted, it is renamed to `_deleting`. So a folder `checkpoint-<step>` is always whole, even if the process is
killed.

The manifest is the last file to be written. It lists the other files with their sizes, which reveals damage by a crash
of the machine, an interrupted copy or another program. It also holds a checksum of each file, which is checked before
training resumes.

Only folders with a mark of this package are deleted. `_saving` and `_deleting` hold the file `.mm_transformers`, and a
checkpoint holds files that a Trainer writes. A folder of the user with one of these names stays as it is.
"""

import errno
import json
import os
import re
import shutil
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Optional

import psutil
import xxhash
from safetensors import SafetensorError, safe_open
from transformers.trainer import (
    OPTIMIZER_NAME,
    OPTIMIZER_NAME_BIN,
    SCHEDULER_NAME,
    TRAINER_STATE_NAME,
    TRAINING_ARGS_NAME,
)
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, sort_checkpoints
from transformers.utils import logging

from ...model.safe_writing import drop_link, process_of


logger = logging.get_logger(__name__)

# `get_last_checkpoint` and uploads to the Hub ignore these names.
SAVING, DELETING = "_saving", "_deleting"
MANIFEST_NAME = "checkpoint_manifest.json"
MARK_NAME = ".mm_transformers"
_MARK = "A training of mm_transformers uses this folder, and deletes it.\n"
# One of these is in each checkpoint, complete or not.
_OF_CHECKPOINTS = (MANIFEST_NAME, TRAINER_STATE_NAME, TRAINING_ARGS_NAME, OPTIMIZER_NAME, SCHEDULER_NAME)

_CANNOT_WRITE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS}


def newest_complete_checkpoint(output_dir: str | os.PathLike[str], verify: bool = False) -> Optional[str]:
    """
    The complete checkpoint of the highest step in `output_dir`, or `None`.

    A warning names newer checkpoints that are not complete. With `verify`, contents are compared with their checksums.

    A checkpoint with a manifest is complete if all of its files exist and have their sizes. The plain `Trainer` writes
    no manifest. Such a checkpoint is complete if these exist and can be read: weights, optimiser, scheduler, state of
    the random number generators and `trainer_state.json`. So a checkpoint of `save_only_model` needs a manifest, or
    must be given by its path.
    """
    folders = {}
    if os.path.isdir(output_dir):
        for folder in Path(output_dir).iterdir():
            step = re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)", folder.name)
            if step and folder.is_dir():
                folders[int(step[1])] = folder
    for _, folder in sorted(folders.items(), reverse=True):
        problem = what_is_missing(folder, verify=verify)
        if problem is None:
            return str(folder)
        logger.warning(f"{folder} is not complete and is skipped: {problem}.")
    return None


def check_checkpoint(folder: str | os.PathLike[str]) -> None:
    """
    Checks that training can resume from this folder. Without a manifest, weights and `trainer_state.json` are enough.

    Raises:
        ValueError: if it cannot.
    """
    if not os.path.isdir(folder):
        raise ValueError(f"There is no checkpoint {str(folder)!r} to resume from: it is not a folder.")
    problem = what_is_missing(folder, weights_are_enough=True, verify=True)
    if problem is not None:
        raise ValueError(
            f"Training cannot be resumed from {str(folder)!r}, which is not a complete checkpoint: {problem}; "
            "trainer.train(resume_from_checkpoint=True) resumes from the newest complete checkpoint."
        )


def what_is_missing(
    folder: str | os.PathLike[str], weights_are_enough: bool = False, verify: bool = False
) -> Optional[str]:
    """
    The problem of a checkpoint, as a part of a sentence; `None` if it is complete.

    Args:
        weights_are_enough: for a checkpoint without a manifest.
        verify: whether to read all files, and compare them with the checksums of the manifest.
    """
    folder = Path(folder)
    try:
        if (folder / MANIFEST_NAME).exists():
            return _differs_from_manifest(folder, verify)
        return _plain_problem(folder, weights_are_enough)
    except OSError as error:  # deleted meanwhile, or not readable
        return f"it cannot be read ({error})"


def write_manifest(folder: str | os.PathLike[str]) -> None:
    """
    Lists all the files of a checkpoint, those in folders included, with their sizes and checksums.

    When this returns, all files are on the disk.
    """
    folder = Path(folder)
    (folder / MANIFEST_NAME).unlink(missing_ok=True)
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    names = [path.relative_to(folder).as_posix() for path in files]
    with ThreadPoolExecutor(1) as pool:  # while this thread waits for the disk
        checksums = pool.map(checksum_of, files)
        for path in files:
            _sync(path)
        found = {
            "files": {name: path.stat().st_size for name, path in zip(names, files, strict=True)},
            "xxh3_128": dict(zip(names, checksums, strict=True)),
        }
    # It gets its name when it is complete.
    draft = folder / f"{MANIFEST_NAME}.tmp"
    draft.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    _sync(draft)
    draft.rename(folder / MANIFEST_NAME)
    for inner in {folder, *(path.parent for path in files)}:
        _sync(inner)


def publish(staged: str | os.PathLike[str], final: str | os.PathLike[str]) -> None:
    """Moves a complete checkpoint to its place, and replaces an older one."""
    staged, final = Path(staged), Path(final)
    drop_link(final)
    if final.exists() and not is_own_checkpoint(final):
        kept = next(path for i in range(1, 10_000) if not (path := Path(f"{final}-kept-{i}")).exists())
        logger.warning(f"{final} is not a checkpoint of a training; it is kept as {kept.name}.")
        final.rename(kept)
    if final.exists():
        old = _set_aside(final)
        staged.rename(final)
        _remove_own(old.parent)
    else:
        staged.rename(final)
    _sync(final.parent)


def discard(folder: str | os.PathLike[str]) -> None:
    """Deletes a checkpoint atomically."""
    try:
        _remove_own(_set_aside(Path(folder)).parent)
    except OSError as error:
        logger.warning(f"{folder} could not be deleted ({error}).")


def tidy(output_dir: str | os.PathLike[str]) -> None:
    """Removes incomplete folders of a killed training, and publishes a completely written checkpoint."""
    own = {name: own_folder(output_dir, name) for name in (SAVING, DELETING)}
    for staged in own[SAVING].glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        if (staged / MANIFEST_NAME).exists() and what_is_missing(staged) is None:
            publish(staged, Path(output_dir, staged.name))
        else:
            logger.warning(f"{staged.name} was incomplete when training stopped; it is deleted.")
    for folder in own.values():
        _remove_own(folder)
    for path in list(Path(output_dir).iterdir()) if os.path.isdir(output_dir) else []:
        process = process_of(path)
        if process is not None and not psutil.pid_exists(process):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


def own_folder(output_dir: str | os.PathLike[str], name: str) -> Path:
    """
    The folder in `output_dir` that a training may write to and delete; it may not exist yet.

    Args:
        name: `SAVING` or `DELETING`. If the user has a folder, a file or a link of this name, a number is added.
    """
    for number in range(10_000):
        folder = Path(output_dir, f"{name}-{number}" if number else name)
        if not os.path.lexists(folder):
            return folder
        if folder.is_dir() and not folder.is_symlink() and (_is_marked(folder) or not any(folder.iterdir())):
            return folder
    raise OSError(f"{output_dir} has too many folders called {name}-1, {name}-2, ...: remove them.")


def make_own_folder(output_dir: str | os.PathLike[str], name: str) -> Path:
    """Creates [`own_folder`], empty, and with the mark."""
    folder = own_folder(output_dir, name)
    _remove_own(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MARK_NAME).write_text(_MARK, encoding="utf-8")
    return folder


def remove_own_folder(output_dir: str | os.PathLike[str], name: str) -> None:
    """Deletes the folder of [`make_own_folder`], if it exists."""
    _remove_own(own_folder(output_dir, name))


def is_own_checkpoint(folder: Path) -> bool:
    """Whether a training has created this folder: it has the name and the files of a checkpoint."""
    is_named = re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-\d+", folder.name) is not None
    return is_named and not folder.is_symlink() and any((folder / name).is_file() for name in _OF_CHECKPOINTS)


def checksum_of(path: Path) -> str:
    """XXH3 of a file."""
    state, buffer = xxhash.xxh3_128(), memoryview(bytearray(2**20))
    with open(path, "rb", buffering=0) as file:
        while size := file.readinto(buffer):
            state.update(buffer[:size])
    return state.hexdigest()


def rotate(output_dir: str, limit: Optional[int], keep: set[str]) -> None:
    """
    Deletes the oldest checkpoints until `limit` are left (`None` or 0: all stay).

    Incomplete checkpoints are deleted first. None of `keep` is deleted.
    """
    if not limit or limit < 0:
        return
    folders = [path for path in sort_checkpoints(output_dir, use_mtime=True) if is_own_checkpoint(Path(path))]
    kept = {os.path.normpath(path) for path in keep}
    candidates = [path for path in folders if os.path.normpath(path) not in kept]
    # `sorted` is stable: incomplete ones first, then by age.
    excess = len(folders) - max(limit, len(folders) - len(candidates))
    if excess > 0:
        for path in sorted(candidates, key=lambda path: what_is_missing(path, weights_are_enough=True) is None)[
            :excess
        ]:
            logger.info(f"Deleting older checkpoint [{path}] due to args.save_total_limit")
            discard(path)


def why_not_written(error: BaseException, folder: str | os.PathLike[str]) -> Optional[str]:
    """The reason why a file could not be written to the disk, or `None` if the error is of another kind."""
    seen: Optional[BaseException] = error
    while seen is not None:
        # The errors of Rust libraries have the number in their message, those of torch have none.
        number = re.search(r"os error (\d+)", str(seen))
        code = int(number[1]) if number else getattr(seen, "errno", None)
        if code in _CANNOT_WRITE:
            return os.strerror(code)
        if isinstance(seen, RuntimeError) and re.search("PytorchStreamWriter|inline_container|iostream", str(seen)):
            is_full = shutil.disk_usage(folder).free < 2**20
            return os.strerror(errno.ENOSPC) if is_full else "torch could not write a file"
        seen = seen.__cause__ or seen.__context__
    return None


def _set_aside(folder: Path) -> Path:
    return folder.rename(make_own_folder(folder.parent, DELETING) / folder.name)


def _is_marked(folder: Path) -> bool:
    return (folder / MARK_NAME).is_file()


def _remove_own(folder: Path) -> None:
    """Deletes a marked folder; the mark last, so that the rest after a kill is still recognised."""
    if _is_marked(folder):
        for path in folder.iterdir():
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            elif path.name != MARK_NAME:
                path.unlink(missing_ok=True)
        if [path.name for path in folder.iterdir()] == [MARK_NAME]:
            (folder / MARK_NAME).unlink()
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()


def _sync(path: Path) -> None:
    """Waits until a file, or the list of the files in a folder, is on the disk."""
    if path.is_dir() and not hasattr(os, "O_DIRECTORY"):
        return  # not possible on Windows
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _differs_from_manifest(folder: Path, verify: bool) -> Optional[str]:
    try:
        manifest = json.loads((folder / MANIFEST_NAME).read_text(encoding="utf-8"))
        sizes, checksums = dict(manifest["files"]), dict(manifest.get("xxh3_128", {}))
        if (
            not all(isinstance(size, int) and _is_inside(name) for name, size in sizes.items())
            or checksums.keys() - sizes
        ):
            raise ValueError
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return f"{MANIFEST_NAME} cannot be read"
    for name, size in sizes.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size:,} bytes instead of {size:,}"
    if verify:
        for name, expected in checksums.items():
            if checksum_of(folder / name) != expected:
                return f"the content of {name} has changed since it was written"
    return None


def _is_inside(name: str) -> bool:
    return not os.path.isabs(name) and ".." not in Path(name).parts


def _plain_problem(folder: Path, weights_are_enough: bool) -> Optional[str]:
    """The problem of a checkpoint without a manifest. The plain Trainer writes `trainer_state.json` last."""
    try:
        json.loads((folder / TRAINER_STATE_NAME).read_text(encoding="utf-8"))["global_step"]
    except FileNotFoundError:
        return f"{TRAINER_STATE_NAME} is missing"
    except (ValueError, KeyError, TypeError):
        return f"{TRAINER_STATE_NAME} cannot be read"
    names = {path.name for path in folder.iterdir()}
    # Folders inside are those of FSDP, DeepSpeed and several adapters. FSDP writes `.metadata` last.
    inner = [path for path in folder.iterdir() if path.is_dir()]
    is_sharded = any((path / ".metadata").is_file() or path.name.startswith("global_step") for path in inner)
    for path in inner:
        if any(path.glob("*.distcp")) and not (path / ".metadata").is_file():
            return f"{path.name}/.metadata is missing"
    for path in sorted(folder.rglob("*")):
        if path.is_file() and not _can_be_read(path):
            return f"{path.relative_to(folder)} cannot be read"
        if path.name.endswith(".index.json"):
            shards = set(json.loads(path.read_text(encoding="utf-8"))["weight_map"].values())
            missing = sorted(shards - names)
            if missing:
                return f"{missing[0]} is missing"
    weights = re.compile(r"(model|adapter_model|pytorch_model\w*)(\.safetensors|\.bin)(\.index\.json)?")
    if not is_sharded and not any(weights.fullmatch(path.name) for path in folder.rglob("*")):
        return "it has no weights"
    if weights_are_enough:
        return None
    if not is_sharded and not names & {OPTIMIZER_NAME, OPTIMIZER_NAME_BIN}:
        return f"{OPTIMIZER_NAME} is missing"
    if SCHEDULER_NAME not in names and not any(path.name.startswith("global_step") for path in inner):
        return f"{SCHEDULER_NAME} is missing"
    if not any(name.startswith("rng_state") for name in names):
        return "rng_state.pth is missing"
    return None


def _can_be_read(path: Path) -> bool:
    """Whether a file of tensors has its end, or a JSON file is valid."""
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                file.keys()
        elif path.suffix in (".pt", ".pth") or (path.name.startswith("pytorch_model") and path.suffix == ".bin"):
            with zipfile.ZipFile(path):  # its directory is at its end
                pass
        elif path.suffix == ".json":
            json.loads(path.read_text(encoding="utf-8"))
    except (SafetensorError, zipfile.BadZipFile, ValueError):
        return False
    return True
