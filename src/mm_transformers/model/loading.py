"""
What is wrong with a checkpoint that could not be loaded, in one sentence.

It is looked at only after loading has failed, so that the good path is that of transformers alone. Only headers are
read; weights that do not fit are found by loading once more without those.
"""

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Optional

from transformers.utils import cached_file


_AGAIN = "copy or download it again"
_WHERE = ("cache_dir", "revision", "subfolder")


def what_is_wrong(path: Any, load: Callable[..., Any], **kwargs) -> Optional[Exception]:
    """
    An error that says what is wrong with a checkpoint, or `None` if nothing is found.

    Args:
        path (`str` or `Path`): Hub id or local folder of the checkpoint.
        load: Loads it, with `ignore_mismatched_sizes=True` and `output_loading_info=True`.
        kwargs: What else was given to `from_pretrained`.

    Returns:
        `OSError`, if files are missing or damaged; `ValueError`, if weights do not have the shapes that the config
        asks for.
    """
    if _looks_like_a_folder(path) and not os.path.isdir(path):
        return OSError(f"There is no folder {os.fspath(path)!r}; give the folder or the Hub id of a saved model.")
    where = {name: kwargs[name] for name in _WHERE if kwargs.get(name) is not None}
    variant = f".{kwargs['variant']}" if kwargs.get("variant") else ""
    problem = _problem_of_files(path, f"model{variant}.safetensors", where)
    if problem:
        return OSError(problem)
    try:
        _, info = load(ignore_mismatched_sizes=True, output_loading_info=True)
    except Exception:  # then shapes are not what is wrong
        return None
    mismatched = sorted(info.get("mismatched_keys", ()))
    if not mismatched:
        return None
    name, saved, wanted = mismatched[0]
    others = f" (and {len(mismatched) - 1} more)" if len(mismatched) > 1 else ""
    return ValueError(
        f"The weight {name!r}{others} in {str(path)!r} has the shape {tuple(saved)}, but its config asks for "
        f"{tuple(wanted)}: config.json and weights are not of one model; ignore_mismatched_sizes=True loads the rest "
        "and gives new values to what does not fit."
    )


def _looks_like_a_folder(path: Any) -> bool:
    text = os.fspath(path)
    return text.startswith((".", "~", os.sep)) or text.count("/") > 1 or text.endswith("/") or "\\" in text


def _problem_of_files(path: Any, name: str, where: Mapping[str, Any]) -> Optional[str]:
    single = _find(path, name, where)
    if single is not None:
        return _problem_of_file(single, path)
    index = _find(path, f"{name}.index.json", where)
    if index is None:
        return None  # transformers itself says which names it looked for
    try:
        shards = sorted(set(json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, AttributeError, TypeError):
        return f"{os.path.basename(index)} of {str(path)!r} is damaged: it is not an index of shards; {_AGAIN}."
    files = {shard: _find(path, shard, where) for shard in shards}
    missing = [shard for shard in shards if files[shard] is None]
    if missing:
        others = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        return f"{str(path)!r} lacks {missing[0]}{others} of its {len(shards)} files of weights; {_AGAIN}."
    return next((problem for file in files.values() if (problem := _problem_of_file(file, path))), None)


def _problem_of_file(file: Any, path: Any) -> Optional[str]:
    # transformers itself needs it, so it is always there; inside, since this module is also copied next to weights.
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt"):
            return None
    except (SafetensorError, OSError) as error:
        size = os.path.getsize(file)
        return (
            f"{os.path.basename(file)} of {str(path)!r} ({size:,} bytes) is damaged or cut short ({error}); {_AGAIN}."
        )


def _find(path: Any, name: str, where: Mapping[str, Any]) -> Optional[str]:
    return cached_file(
        path,
        name,
        **where,
        local_files_only=True,
        _raise_exceptions_for_gated_repo=False,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
