"""
Checks that a checkpoint has the weights of its model; errors are one sentence.

Names, shapes and types are compared before memory for new weights is used. Files are read only after loading has
failed, and then only their headers.
"""

import copy
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any, NamedTuple, Optional, Protocol

from transformers import PreTrainedModel
from transformers.utils import cached_file

from .messages import and_more, check_folder, one_line
from .modalities import OTHER_ENCODERS


_AGAIN = "copy or download it again"
_WHERE = ("cache_dir", "revision", "subfolder")
_INTEGERS = {"BOOL", "U8", "I8", "U16", "I16", "U32", "I32", "U64", "I64"}


class Checkpoint(NamedTuple):
    """
    The checkpoint that is being loaded.

    Args:
        path: Hub id or local folder.
        options: The other arguments of `from_pretrained`.
        new_heads: The tasks whose heads get new weights.
    """

    path: str | os.PathLike[str]
    options: Mapping[str, Any]
    new_heads: tuple[str, ...] = ()


class LoadingInfo(Protocol):
    """The names of weights that do not fit, from transformers during loading."""

    missing_keys: set[str]
    unexpected_keys: set[str]
    # Each a name, the shape in the checkpoint and the shape in the model.
    mismatched_keys: set[tuple[str, Any, Any]]


# `None` without a check.
_loading: ContextVar[Optional[Checkpoint]] = ContextVar("loading", default=None)
_new_heads: ContextVar[Optional[tuple[str, ...]]] = ContextVar("new_heads", default=None)


@contextmanager
def with_new_heads(names: list[str]) -> Iterator[None]:
    """Within the block, checkpoints may lack the heads of these tasks."""
    token = _new_heads.set(tuple(names))
    try:
        yield
    finally:
        _new_heads.reset(token)


@contextmanager
def checked(path: str | os.PathLike[str] | None, options: Mapping[str, Any]) -> Iterator[None]:
    """
    Within the block, [`check_fit`] compares the weights.

    It does not if the caller passes `state_dict` or `ignore_mismatched_sizes=True`.
    """
    names = _new_heads.get()
    takes_what_fits = options.get("state_dict") is not None or options.get("ignore_mismatched_sizes")
    is_free = path is None or (takes_what_fits and names is None)
    token = _loading.set(None if is_free else Checkpoint(path, options, names or ()))
    try:
        yield
    finally:
        _loading.reset(token)


def check_fit(model: PreTrainedModel, info: LoadingInfo) -> None:
    """
    Checks that the weights of a checkpoint are those of the model.

    Args:
        model: On the meta device, where it takes no memory.
        info: The names of weights that do not fit.

    Raises:
        ValueError: one sentence, if the checkpoint lacks weights of the model, or has others.
    """
    loading = _loading.get()
    if loading is None:
        return
    info = copy.copy(info)
    if hasattr(model, "_adjust_missing_and_unexpected_keys"):
        model._adjust_missing_and_unexpected_keys(info)  # drops weights that may be absent by the rules of an encoder
    where, new = repr(str(loading.path)), tuple(f"heads.{name}." for name in loading.new_heads)
    mismatched = sorted(entry for entry in info.mismatched_keys if not entry[0].startswith(new or (" ",)))
    if mismatched:
        name, saved, wanted = mismatched[0]
        raise ValueError(
            f"The weight {name!r}{and_more(mismatched)} in {where} has the shape {tuple(saved)}, but its config asks "
            f"for {tuple(wanted)}: config.json and weights belong to different models. ignore_mismatched_sizes=True "
            "loads the other weights, and initialises these anew."
        )
    missing = set(info.missing_keys)
    for target, source in (getattr(model, "all_tied_weights_keys", None) or {}).items():
        if not {target, source} <= missing:  # one of them is enough
            missing -= {target, source}
    left = sorted(name for name in missing if not name.startswith(new or (" ",)))
    if left:
        parts = _parts_without_field(loading)
        left = [name for name in left if name.removeprefix("model.").partition(".")[0] not in parts]
    files = _weight_files(loading)
    if left and all(name.startswith("heads.") for name in left) and _is_of_base_model(files):
        left = []
    if left:
        raise ValueError(
            f"{where} lacks the weight {left[0]!r}{and_more(left)} of its model, which would get random values; "
            f"{_AGAIN}. To add tasks, use from_pretrained(..., tasks=[...]). ignore_mismatched_sizes=True loads the "
            "weights that exist."
        )
    if not hasattr(model, "heads"):
        new = ("heads.",)
    unexpected = sorted(name for name in info.unexpected_keys if not name.startswith(new or (" ",)))
    if _new_heads.get() is not None:  # the caller names the tasks, perhaps not all of the saved ones
        unexpected = [name for name in unexpected if not _is_head_of_other(name, model)]
    if unexpected:
        raise ValueError(
            f"{where} has the weight {unexpected[0]!r}{and_more(unexpected)}, which the model of its config does not "
            "have: config.json and weights belong to different models. ignore_mismatched_sizes=True loads the other "
            "weights."
        )
    _check_types(model, files, where)


def _is_head_of_other(name: str, model: PreTrainedModel) -> bool:
    first, _, rest = name.partition(".")
    return first == "heads" and rest.partition(".")[0] not in model.heads.names


def _where(options: Mapping[str, Any]) -> dict[str, Any]:
    return {name: options[name] for name in _WHERE if options.get(name) is not None}


def _weights_name(options: Mapping[str, Any]) -> str:
    return f"model.{options['variant']}.safetensors" if options.get("variant") else "model.safetensors"


def _weight_files(loading: Checkpoint) -> list[str]:
    """The safetensors files of the checkpoint."""
    if loading.options.get("use_safetensors") is False:
        return []
    where, name = _where(loading.options), _weights_name(loading.options)
    single = _find(loading.path, name, where)
    if single is not None:
        return [single]
    index = _find(loading.path, f"{name}.index.json", where)
    if index is None:
        return []
    shards = sorted(set(json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"].values()))
    return [file for shard in shards if (file := _find(loading.path, shard, where)) is not None]


def _fields_of_parts() -> dict[str, list[str]]:
    """Parts of the model, and the fields of the config without which they are absent."""
    found = {
        "vision_reduction": ["vision_token_reduction"],
        "frame_embedding": ["vision_config", "frame_embedding"],
    }
    for name in OTHER_ENCODERS:
        config = f"{name}_config"
        found |= {f"{name}_model": [config], f"{name}_projection": [config], f"{name}_order": [config, "item_order"]}
    return found


def _parts_without_field(loading: Checkpoint) -> set[str]:
    """The parts whose field the saved config lacks: the caller has added them, or the checkpoint is older."""
    path = _find(loading.path, "config.json", _where(loading.options))
    saved = json.loads(Path(path).read_text(encoding="utf-8")) if path is not None else {}
    parts = {part for part, fields in _fields_of_parts().items() if not all(saved.get(field) for field in fields)}
    if not any(saved.get(f"{name}_config") for name in OTHER_ENCODERS):
        parts |= {"fusion", "null_text"}
    return parts


def _is_of_base_model(files: list[str]) -> bool:
    """Whether the weights are of a model without heads, so that their names have no prefix."""
    return bool(files) and not any(name.startswith(("model.", "heads.")) for file in files for name in _types(file))


def _types(file: str) -> dict[str, str]:
    """Weight -> its type, by the name of safetensors."""
    # Inside, since this module is copied next to weights; transformers needs safetensors, so it is always installed.
    from safetensors import safe_open

    with safe_open(file, framework="pt") as weights:
        return {name: weights.get_slice(name).get_dtype() for name in weights.keys()}  # noqa: SIM118


def _check_types(model: PreTrainedModel, files: list[str], where: str) -> None:
    wanted = {name: value.is_floating_point() for name, value in model.state_dict().items()}
    prefix = f"{model.base_model_prefix}."
    for file in files:
        for name, dtype in _types(file).items():
            is_float = next(
                (wanted[key] for key in (name, prefix + name, name.removeprefix(prefix)) if key in wanted), None
            )
            if is_float and dtype in _INTEGERS:
                raise ValueError(
                    f"The weight {name!r} in {where} holds integers ({dtype}), but its model needs floating-point "
                    "numbers: save the model without quantization."
                )


def what_is_wrong(path: str | os.PathLike[str] | None, error: Exception, **kwargs: Any) -> Optional[Exception]:
    """
    A clear error for a checkpoint that cannot be loaded, or `None` if the error of loading is clear.

    Args:
        path: Hub id or local folder of the checkpoint.
        error: That of loading.
        kwargs: The other arguments of `from_pretrained`.

    Returns:
        `OSError`, if files are missing or damaged; `ValueError`, if the model of the config cannot be built.
    """
    if path is None:
        return None
    try:
        check_folder(path)
    except OSError as missing:
        return missing
    if is_pickle_error(error):
        return OSError(
            f"The weights of {str(path)!r} are a pickle that holds more than tensors, and might run code; they were "
            "not loaded. Ask for weights as safetensors."
        )
    problem = _problem_of_files(path, _weights_name(kwargs), _where(kwargs))
    if problem:
        return OSError(problem)
    text = one_line(error)
    if isinstance(error, (ValueError, OSError)):
        return ValueError(text) if text != str(error) and isinstance(error, ValueError) else None
    is_of_caller = isinstance(error, TypeError) and "unexpected keyword argument" in text
    is_of_caller |= "meta device context manager" in text
    if is_of_caller or not isinstance(error, _DAMAGE) or "out of memory" in text or "CUDA" in text:
        return None
    return ValueError(
        f"The model of {str(path)!r} cannot be built, so its config.json is damaged or of another release: "
        f"{type(error).__name__}: {text}"
    )


_DAMAGE = (
    ArithmeticError, AssertionError, AttributeError, IndexError, KeyError, RecursionError, RuntimeError, TypeError,
)  # fmt: skip


def is_pickle_error(error: Optional[BaseException]) -> bool:
    """Whether torch refused a pickle that holds more than tensors; its message tells how to load it anyway."""
    while error is not None:
        if type(error).__name__ == "UnpicklingError" or "weights_only" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False


def _problem_of_files(path: str | os.PathLike[str], name: str, where: Mapping[str, Any]) -> Optional[str]:
    single = _find(path, name, where)
    if single is not None:
        return _problem_of_file(single, path)
    index = _find(path, f"{name}.index.json", where)
    if index is None:
        return None  # the error of transformers lists the expected names
    try:
        shards = sorted(set(json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, AttributeError, TypeError):
        return f"{os.path.basename(index)} of {str(path)!r} is damaged: it is not an index of shards; {_AGAIN}."
    files = {shard: _find(path, shard, where) for shard in shards}
    missing = [shard for shard in shards if files[shard] is None]
    if missing:
        return f"{str(path)!r} lacks {missing[0]}{and_more(missing)} of its {len(shards)} weight files; {_AGAIN}."
    return next((problem for file in files.values() if (problem := _problem_of_file(file, path))), None)


def _problem_of_file(file: str, path: str | os.PathLike[str]) -> Optional[str]:
    # Inside, as above.
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt"):
            return None
    except (SafetensorError, OSError) as error:
        size = os.path.getsize(file)
        reason = one_line(error).rstrip(".")
        return (
            f"{os.path.basename(file)} of {str(path)!r} ({size:,} bytes) is damaged or cut short ({reason}); {_AGAIN}."
        )


def _find(path: str | os.PathLike[str], name: str, where: Mapping[str, Any]) -> Optional[str]:
    return cached_file(
        path,
        name,
        **where,
        local_files_only=True,
        _raise_exceptions_for_gated_repo=False,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
