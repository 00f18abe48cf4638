"""The dtypes of a model whose frozen encoders are stored in another one, such as a language model in bfloat16."""

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Optional

import torch
from torch import nn
from transformers import PreTrainedModel


_DTYPES = {name: getattr(torch, name) for name in ("float16", "bfloat16", "float32", "float64")}
# Of this thread: whether a model that is being loaded gets the dtypes that it was saved with.
_as_saved: ContextVar[bool] = ContextVar("_as_saved", default=False)


def main_dtype(model: nn.Module) -> Optional[torch.dtype]:
    """The dtype of the parts outside of the encoders; `None` if there are none yet."""
    fused = getattr(model, "model", model)
    inside = {id(p) for name, part in fused.named_children() if name.endswith("_model") for p in part.parameters()}
    # Gates are vectors or numbers, which stay in float32.
    outside = (p for p in model.parameters() if p.ndim > 1 and p.is_floating_point() and id(p) not in inside)
    return next((parameter.dtype for parameter in outside), None)


def dtypes_of_encoders(model: PreTrainedModel) -> Optional[dict[str, str]]:
    """
    The encoders whose dtype is not that of the rest, for `config.encoder_dtypes`; `None` without any.

    The dtype of an encoder is that of most of its weights: some keep a few layers in float32.
    """
    main, fused = main_dtype(model), getattr(model, "model", model)
    if getattr(model, "is_quantized", False):
        return None
    if main is None:  # the weights are on other processes
        return model.config.encoder_dtypes
    found = {}
    for name, part in fused.named_children():
        sizes: Counter[str] = Counter()
        for parameter in part.parameters():
            sizes[str(parameter.dtype).removeprefix("torch.")] += parameter.numel()
        most = sizes.most_common(1)[0][0] if name.endswith("_model") and sizes else ""
        if most in _DTYPES and _DTYPES[most] != main:
            found[name.removesuffix("_model")] = most
    return found or None


@contextmanager
def loading(options: Mapping[str, Any]) -> Iterator[None]:
    """
    Within the block, and this thread, models get the dtypes that they were saved with.

    Args:
        options: of `from_pretrained`; a dtype among them is that of all parts.
    """
    given = (options.get("dtype"), options.get("torch_dtype"))
    token = _as_saved.set(all(dtype in (None, "auto") for dtype in given))
    try:
        yield
    finally:
        _as_saved.reset(token)


def saved_dtypes(config: Any) -> dict[str, torch.dtype]:
    """Name of an encoder in the model -> its dtype, for the encoders that get another one than the rest."""
    return {f"{name}_model": _DTYPES[value] for name, value in (config.encoder_dtypes or {}).items() if _as_saved.get()}


def restore_dtypes(model: nn.Module, config: Any) -> None:
    """
    Gives the encoders of a loaded model their dtypes.

    Tensors outside the checkpoint, such as frequencies of positions, keep the dtype in which they were computed, as
    when transformers loads a model in half precision.
    """
    fused = getattr(model, "model", model)
    for name, dtype in saved_dtypes(config).items():
        for stored in getattr(fused, name).state_dict(keep_vars=True).values():
            if stored.is_floating_point():
                stored.data = stored.data.to(dtype)


def check_encoder_dtypes(value: Any, encoders: list[str]) -> None:
    """
    Checks `config.encoder_dtypes`.

    Raises:
        ValueError: one sentence, if it is no dict from encoders to dtypes.
    """
    if value is None:
        return
    if not isinstance(value, dict) or not all(isinstance(one, str) and one in _DTYPES for one in value.values()):
        raise ValueError(f"encoder_dtypes must be a dict from encoders to {', '.join(_DTYPES)}, but is {value!r}.")
    unknown = [name for name in value if name not in encoders]
    if unknown:
        raise ValueError(f"encoder_dtypes names {unknown[0]!r}, but the encoders are {', '.join(encoders)}.")
