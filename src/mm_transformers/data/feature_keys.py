"""Hashes of encoders and their preprocessors, of items, and of texts."""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
import transformers
import xxhash
from torch import nn

from ..model.file_contents import cast_of, content_of, read_file
from ..model.modalities import Modality


KEY_SIZE = 16  # bytes of a hash


# Fields of a config that do not affect the encoder outputs.
_NOT_PART_OF_IT = {
    "transformers_version",
    "architectures",
    "dtype",
    "torch_dtype",
    "id2label",
    "label2id",
    "problem_type",
}


def hash_of(*parts: bytes) -> bytes:
    """16 bytes of BLAKE2b over the parts and their lengths, equal in every process."""
    state = hashlib.blake2b(digest_size=KEY_SIZE)
    for part in parts:
        state.update(len(part).to_bytes(8, "big"))
        state.update(part)
    return state.digest()


def hash_of_encoder(encoder: nn.Module, preprocessing: Any, dtype: torch.dtype) -> str:
    """
    A hash of everything that decides the features of an encoder.

    It covers the weights, the config, the preprocessor (an image processor, a feature extractor, or `None`) and the
    stored dtype. It also covers the release of transformers, whose code computes the features.
    """
    about = {
        "transformers": transformers.__version__,
        "class": type(encoder).__name__,
        "config": _options(encoder.config),
        "preprocessing": None if preprocessing is None else _options(preprocessing),
        "dtype": str(dtype),
    }
    state = hashlib.blake2b(json.dumps(about, sort_keys=True, default=str).encode(), digest_size=KEY_SIZE)
    for name, tensor in sorted(encoder.state_dict().items()):
        state.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        state.update(_bytes_of(tensor))
    return state.hexdigest()


def checksum(tensors: Iterable[torch.Tensor]) -> str:
    """XXH3 of the contents: far cheaper than [`hash_of`], and enough to detect changed values."""
    state = xxhash.xxh3_128()
    for tensor in tensors:
        state.update(_bytes_of(tensor))
    return state.hexdigest()


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def hash_of_text(inputs: dict[str, torch.Tensor]) -> bytes:
    """The hash of the token ids of one text, without padding."""
    return hash_of(*(f"{name}{value.tolist()}".encode() for name, value in sorted(inputs.items())))


class ItemHash:
    """
    An image, a video or a sound from a table -> the hash of its content.

    The content is the bytes of the file. Without a file, it is the pixels or samples.

    Args:
        modality: the kind of item.
        load: reads it; raises `ValueError` with one sentence.
        options: the options of `load`.
    """

    def __init__(self, modality: Modality, load: Callable[[Any], Any], options: str = ""):
        self.modality, self.load, self.options = modality, load, options

    def __call__(self, cell: Any) -> bytes:
        is_array = isinstance(cell, Mapping) and cell.get("array") is not None
        content = cell if is_array else content_of(cell)
        try:
            if isinstance(content, (str, os.PathLike)):
                content = read_file(content)
        except (OSError, ValueError):
            content = None  # `load` raises the error
        if isinstance(content, bytes):
            options = self.options + "".join(f"{name}={value};" for name, value in sorted(cast_of(cell).items()))
            return hash_of(self.modality.argument.encode(), options.encode(), b"file", content)
        return hash_of(self.modality.argument.encode(), b"read", *_read_parts(self.load(cell)))


def digest_of(item: Any) -> bytes:
    """The hash of an image, the frames of a video or a sound, after reading."""
    return hash_of(*_read_parts(item))


def _read_parts(item: Any) -> list[bytes]:
    if isinstance(item, Mapping):
        return [item["array"].tobytes()]
    frames = item if isinstance(item, list) else [item]
    return [part for frame in frames for part in (repr(frame.size).encode(), frame.tobytes())]


def _options(config: Any) -> dict[str, Any]:
    values = json.loads(json.dumps(config.to_dict(), sort_keys=True, default=str))
    return _without_names(values)


def _without_names(values: Any) -> Any:
    if isinstance(values, dict):
        keep = {k: v for k, v in values.items() if not k.startswith("_") and k not in _NOT_PART_OF_IT}
        return {key: _without_names(value) for key, value in keep.items()}
    return values
