"""
Which checkpoints are complete, and how one comes to be, and goes, in one instant.

A checkpoint is written in the folder `_saving` and renamed to its place when all of its files are on the disk; it is
renamed away, into `_deleting`, before it is deleted. So a folder `checkpoint-<step>` is whole whenever a process is
killed. Its manifest, the last file to be written, lists the others with their sizes: what a crash of the machine, an
interrupted copy or another program has left of it is recognised.
"""

import errno
import json
import os
import re
import shutil
import zipfile
from pathlib import Path
from typing import Optional

from safetensors import SafetensorError, safe_open
from transformers.trainer import OPTIMIZER_NAME, OPTIMIZER_NAME_BIN, SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, sort_checkpoints
from transformers.utils import logging


logger = logging.get_logger(__name__)

# Names that neither `get_last_checkpoint` nor an upload to the Hub takes for a checkpoint or for a part of the model.
SAVING, DELETING = "_saving", "_deleting"
MANIFEST_NAME = "checkpoint_manifest.json"

_CANNOT_WRITE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS}


def newest_complete_checkpoint(output_dir: str | os.PathLike) -> Optional[str]:
    """
    The complete checkpoint of the highest step in `output_dir`, or `None` if there is none. What is newer but not
    complete is named in a warning.

    A checkpoint with a manifest is complete if all of its files are there and have their sizes. One without, as the
    plain `Trainer` writes it, is complete if weights, optimiser, scheduler, state of the random number generators and
    `trainer_state.json` are there and can be read; so one that was saved by `save_only_model` is taken only with a
    manifest, or if it is given by its path.
    """
    folders = {}
    if os.path.isdir(output_dir):
        for folder in Path(output_dir).iterdir():
            step = re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)", folder.name)
            if step and folder.is_dir():
                folders[int(step[1])] = folder
    for _, folder in sorted(folders.items(), reverse=True):
        problem = what_is_missing(folder)
        if problem is None:
            return str(folder)
        logger.warning(f"{folder} is not complete and is skipped: {problem}.")
    return None


def check_checkpoint(folder: str | os.PathLike) -> None:
    """
    Raises:
        ValueError: if training cannot be resumed from this folder. Without a manifest weights and
            `trainer_state.json` are enough.
    """
    if not os.path.isdir(folder):
        raise ValueError(f"There is no checkpoint {str(folder)!r} to resume from: it is not a folder.")
    problem = what_is_missing(folder, weights_are_enough=True)
    if problem is not None:
        raise ValueError(
            f"Training cannot be resumed from {str(folder)!r}, which is not a complete checkpoint: {problem}; "
            "trainer.train(resume_from_checkpoint=True) takes the newest complete one."
        )


def what_is_missing(folder: str | os.PathLike, weights_are_enough: bool = False) -> Optional[str]:
    """What is wrong with a checkpoint, as a part of a sentence; `None` if it is complete."""
    folder = Path(folder)
    try:
        if (folder / MANIFEST_NAME).exists():
            return _differs_from_manifest(folder)
        return _plain_problem(folder, weights_are_enough)
    except OSError as error:  # deleted while it is looked at, or not to be read
        return f"it cannot be read ({error})"


def write_manifest(folder: str | os.PathLike) -> None:
    """Lists all the files of a checkpoint, those in folders included; when this returns, all are on the disk."""
    folder = Path(folder)
    (folder / MANIFEST_NAME).unlink(missing_ok=True)
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    for path in files:
        _sync(path)
    sizes = {path.relative_to(folder).as_posix(): path.stat().st_size for path in files}
    # Not under its own name before it is whole.
    draft = folder / f"{MANIFEST_NAME}.tmp"
    draft.write_text(json.dumps({"files": sizes}, indent=2) + "\n", encoding="utf-8")
    _sync(draft)
    draft.rename(folder / MANIFEST_NAME)
    for inner in {folder, *(path.parent for path in files)}:
        _sync(inner)


def publish(staged: str | os.PathLike, final: str | os.PathLike) -> None:
    """Moves a complete checkpoint to its place. What was there goes."""
    staged, final = Path(staged), Path(final)
    if final.exists():
        old = _set_aside(final)
        staged.rename(final)
        shutil.rmtree(old.parent, ignore_errors=True)
    else:
        staged.rename(final)
    _sync(final.parent)


def discard(folder: str | os.PathLike) -> None:
    """Deletes a checkpoint. Half of it is never in its place."""
    try:
        shutil.rmtree(_set_aside(Path(folder)).parent, ignore_errors=True)
    except OSError as error:
        logger.warning(f"{folder} could not be deleted ({error}).")


def tidy(output_dir: str | os.PathLike) -> None:
    """Removes what a killed training has left half-written or half-deleted, and puts in its place what was written."""
    for staged in Path(output_dir, SAVING).glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        if (staged / MANIFEST_NAME).exists() and what_is_missing(staged) is None:
            publish(staged, Path(output_dir, staged.name))
        else:
            logger.warning(f"{staged.name} was not yet written when training was stopped; what there is of it goes.")
    for name in (SAVING, DELETING):
        shutil.rmtree(Path(output_dir, name), ignore_errors=True)


def rotate(output_dir: str, limit: Optional[int], keep: set[str]) -> None:
    """
    Deletes the oldest checkpoints until `limit` are left (`None` or 0: all stay), those that are not complete before
    all others, and none of `keep`.
    """
    if not limit or limit < 0:
        return
    folders = sort_checkpoints(output_dir, use_mtime=True)
    kept = {os.path.normpath(path) for path in keep}
    candidates = [path for path in folders if os.path.normpath(path) not in kept]
    # `sorted` is stable: first those that are of no use, then by age.
    excess = len(folders) - max(limit, len(folders) - len(candidates))
    if excess > 0:
        for path in sorted(candidates, key=lambda path: what_is_missing(path, weights_are_enough=True) is None)[
            :excess
        ]:
            logger.info(f"Deleting older checkpoint [{path}] due to args.save_total_limit")
            discard(path)


def why_not_written(error: BaseException, folder: str | os.PathLike) -> Optional[str]:
    """The reason why a file could not be written to the disk, or `None` if the error is of another kind."""
    seen: Optional[BaseException] = error
    while seen is not None:
        # Libraries in Rust give the number in their message, torch gives none.
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
    aside = folder.parent / DELETING / folder.name
    if aside.exists():
        shutil.rmtree(aside)
    aside.parent.mkdir(exist_ok=True)
    return folder.rename(aside)


def _sync(path: Path) -> None:
    """Waits until a file, or the list of the files in a folder, is on the disk."""
    if path.is_dir() and not hasattr(os, "O_DIRECTORY"):
        return  # Windows has no such thing
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _differs_from_manifest(folder: Path) -> Optional[str]:
    try:
        sizes = json.loads((folder / MANIFEST_NAME).read_text(encoding="utf-8"))["files"]
    except (ValueError, KeyError, TypeError):
        return f"{MANIFEST_NAME} cannot be read"
    for name, size in sizes.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size:,} bytes instead of {size:,}"
    return None


def _plain_problem(folder: Path, weights_are_enough: bool) -> Optional[str]:
    """Of a checkpoint without a manifest. `trainer_state.json` is what the plain Trainer writes last."""
    try:
        json.loads((folder / TRAINER_STATE_NAME).read_text(encoding="utf-8"))["global_step"]
    except FileNotFoundError:
        return f"{TRAINER_STATE_NAME} is missing"
    except (ValueError, KeyError, TypeError):
        return f"{TRAINER_STATE_NAME} cannot be read"
    names = {path.name for path in folder.iterdir()}
    # Folders inside are those of FSDP, DeepSpeed and several adapters: of FSDP's, `.metadata` is written last.
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
    """Of a file of tensors, whether it has its end; of JSON, whether it is JSON."""
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
