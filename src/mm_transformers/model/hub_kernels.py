"""Attention implementations that are code of the Hub: only the caller can request them, not a file."""

from collections.abc import Iterator, Mapping
from typing import Any

import transformers.utils
from transformers import PreTrainedConfig


# Implementations of experts that transformers takes from the Hub.
_KERNELS = ("deepgemm", "sonicmoe")


def asks_for_kernel(implementation: Any) -> bool:
    """
    Whether transformers would fetch code from the Hub, and run it.

    Args:
        implementation: A name, or a dict from part of a model to name.

    Example:

    ```python
    >>> asks_for_kernel("sdpa"), asks_for_kernel("me/kernel@main:attend")
    (False, True)
    ```
    """
    if isinstance(implementation, Mapping):
        return any(map(asks_for_kernel, implementation.values()))
    name = str(implementation).rpartition("|")[2]
    if "/" in name or ":" in name or name in _KERNELS:
        return True
    # FlashAttention comes from the Hub if only the package `kernels` is installed.
    _, is_flash, version = name.partition("flash_attention_")
    return bool(is_flash) and _is_available("kernels") and not _is_available(f"flash_attn_{version}")


def _is_available(package: str) -> bool:
    # The available functions depend on the release of transformers.
    return bool(getattr(transformers.utils, f"is_{package}_available", lambda: False)())


def check_values(values: Mapping[str, Any]) -> None:
    """
    Checks that a config names no attention kernel of the Hub.

    Args:
        values: Of a `config.json`. No saved config has such an implementation.

    Raises:
        ValueError: one sentence, if it asks for code of the Hub.
    """
    pending: list[Mapping[str, Any]] = [values]
    while pending:
        for name, value in pending.pop().items():
            name = str(name)  # an id of `id2label` is a number
            if name.endswith(("_implementation", "_implementation_internal")):
                if asks_for_kernel(value):
                    raise ValueError(_refusal("config", name, value))
            elif isinstance(value, Mapping):
                pending.append(value)


def check_config(config: PreTrainedConfig, path: Any) -> None:
    """
    The same for the config of an encoder that was loaded.

    Args:
        path: Its folder or Hub id, for the message.
    """
    for part in _with_parts(config):
        for name in ("_attn_implementation", "_experts_implementation"):
            value = getattr(part, name, None)
            if asks_for_kernel(value):
                raise ValueError(_refusal(f"config of {str(path)!r}", name, value))


def _with_parts(config: PreTrainedConfig) -> Iterator[PreTrainedConfig]:
    """The config and all configs in it, at any depth."""
    yield config
    for name in config.sub_configs:
        part = getattr(config, name, None)
        if isinstance(part, PreTrainedConfig):
            yield from _with_parts(part)


def _refusal(what: str, name: str, value: Any) -> str:
    return (
        f"The {what} asks for {name}={str(value)[:100]!r}, which is code of the Hub, and a checkpoint may not load "
        "it. Remove it, and pass it to from_pretrained if you trust it."
    )
