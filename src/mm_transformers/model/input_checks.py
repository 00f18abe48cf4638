"""
Describes wrong inputs of a model in one sentence.

Shapes are checked before each forward pass, which costs almost nothing. Values are checked only after it has failed,
since that waits for a GPU.
"""

import inspect
from collections.abc import Iterator, Mapping
from typing import Any, Optional

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from .encoders import encoder_width, max_text_positions
from .messages import and_more, one_line
from .modalities import ENCODERS, OTHER_ENCODERS, own_encoders


# Input -> (its axes, whether it holds integers).
_LAYOUTS = {
    "input_ids": (("batch", "text_len"), True),
    "token_type_ids": (("batch", "text_len"), True),
    "attention_mask": (("batch", "text_len"), None),
    "inputs_embeds": (("batch", "text_len", "text hidden size"), False),
    "text_features": (("batch", "text_len", "text hidden size"), False),
    "pixel_values": (("num_images", "channels", "height", "width"), None),
    "frame_index": (("batch", "max_images"), True),
    "image_features": (("num_images", "tokens", "vision hidden size"), False),
    "input_values": (("num_clips", "samples"), None),
    "input_features": (("num_clips", "mel bins", "frames"), None),
    "audio_features": (("num_clips", "tokens", "audio hidden size"), False),
    "audio_attention_mask": (("num_clips", "samples or frames"), None),
    "audio_feature_mask": (("num_clips", "tokens"), None),
}
_IS_INTEGER = {torch.int32: True, torch.int64: True}
_IS_INTEGER |= dict.fromkeys((torch.float16, torch.bfloat16, torch.float32, torch.float64), False)
_ENCODER_OF = {encoder.features: encoder.name for encoder in ENCODERS.values() if encoder.features}


def check_layout(model: PreTrainedModel, inputs: Mapping[str, Any]) -> None:
    """
    Checks the shapes and the types of inputs.

    Args:
        model ([`MMTransformerPreTrainedModel`]): The model that gets the inputs.
        inputs: The arguments of its `forward`, by name.

    Raises:
        ValueError: one sentence, if an input is no tensor, has the wrong number of axes, or integers where floating
            point numbers belong, or the other way round.
    """
    sizes: dict[str, tuple[str, int]] = {}
    for name, (axes, is_integer) in _LAYOUTS.items():
        value = inputs.get(name)
        if value is None:
            continue
        if not isinstance(value, torch.Tensor):
            raise ValueError(f"{name} must be a tensor of shape ({', '.join(axes)}), but is a {type(value).__name__}.")
        shape = tuple(value.shape)
        if name == "input_values" and value.ndim == 3:  # of encoders of spectrograms
            axes = ("num_clips", "frames", "mel bins")
        if value.ndim != len(axes):
            raise ValueError(f"{name} must have the shape ({', '.join(axes)}), but has the shape {shape}.")
        if value.is_complex() or (is_integer is not None and _IS_INTEGER.get(value.dtype) != is_integer):
            kind = (
                "integers (int64)" if is_integer else "real numbers" if is_integer is None else "floating-point numbers"
            )
            raise ValueError(f"{name} must hold {kind}, but has the type {value.dtype}.")
        for axis, size in zip(axes, shape, strict=True):
            if axis in ("batch", "text_len"):
                known, expected = sizes.setdefault(axis, (name, size))
                if size != expected:
                    raise ValueError(
                        f"{name} has the shape {shape}, which does not fit {known}, of shape "
                        f"{tuple(inputs[known].shape)}: both begin with (batch, text_len)."
                    )
                if size == 0:
                    what = "rows" if axis == "batch" else "tokens; attention_mask 0 marks a row without text"
                    raise ValueError(f"The batch is empty: {name} has the shape {shape}, so it has no {what}.")
        if name in _ENCODER_OF and value.shape[0] > 0:
            config = getattr(model.config, f"{_ENCODER_OF[name]}_config", None)
            if config is not None and value.shape[2] != encoder_width(config):
                raise ValueError(
                    f"{name} must have the width {encoder_width(config)} of the {_ENCODER_OF[name]} encoder, but has "
                    f"the shape {shape}."
                )
    for encoder in own_encoders().values():
        config = getattr(model.config, f"{encoder.name}_config", None)
        blanks = {} if config is None or encoder.own is None else encoder.own.blank_input(config)
        for name, blank in blanks.items():
            _check_like(name, inputs.get(name), blank)
    for name in (str(encoder.index) for encoder in OTHER_ENCODERS.values()):
        value = inputs.get(name)
        if value is not None and (not isinstance(value, torch.Tensor) or value.dtype == torch.bool):
            found = getattr(value, "dtype", type(value).__name__)
            raise ValueError(f"{name} must be a tensor of integers, -1 for none, but is of {found}.")
    mask = inputs.get("audio_attention_mask")
    for name in ("input_values", "input_features"):
        sound = inputs.get(name)
        if mask is not None and sound is not None and mask.shape[1] not in sound.shape[1:]:
            raise ValueError(
                f"audio_attention_mask has the shape {tuple(mask.shape)}, which does not fit {name}, of shape "
                f"{tuple(sound.shape)}."
            )
    divisors = inputs.get("num_items_in_batch")
    if divisors is not None and hasattr(model, "tasks") and not isinstance(divisors, Mapping):
        raise ValueError(
            f"num_items_in_batch must be a dict from task name to number of labels, but is a {type(divisors).__name__}."
        )
    labels = inputs.get("labels")
    if labels is not None and hasattr(model, "tasks"):
        _check_labels(model, labels)


def _check_like(name: str, value: Any, blank: torch.Tensor) -> None:
    """Checks that an input of an encoder of ours has as many axes as a blank one, and the same kind of numbers."""
    if value is None:
        return
    kind = "floating-point numbers" if blank.is_floating_point() else "integers (int64)"
    if not isinstance(value, torch.Tensor):
        raise ValueError(f"{name} must be a tensor of {kind}, but is a {type(value).__name__}.")
    if value.ndim != blank.ndim:
        raise ValueError(f"{name} must have {blank.ndim} axes, but has the shape {tuple(value.shape)}.")
    if value.is_floating_point() != blank.is_floating_point() or value.is_complex():
        raise ValueError(f"{name} must hold {kind}, but has the type {value.dtype}.")


def _check_labels(model: PreTrainedModel, labels: Any) -> None:
    if isinstance(labels, torch.Tensor) and len(model.tasks) == 1:
        return  # of a model for sequence classification
    if not isinstance(labels, Mapping):
        raise ValueError(f"labels must be a dict from task name to tensor, but is a {type(labels).__name__}.")
    for name, value in labels.items():
        if not isinstance(value, torch.Tensor):
            raise ValueError(f"labels[{name!r}] must be a tensor, but is a {type(value).__name__}.")


def check_finite_weights(model: nn.Module) -> None:
    """
    Checks the weights of a model.

    Raises:
        ValueError: one sentence, if a weight is NaN or infinite.
    """
    weights = [*model.named_parameters(), *model.named_buffers()]
    bad = [name for name, x in weights if x.is_floating_point() and not x.is_meta and not _has_finite_sum(x)]
    # A sum may be too large for half precision.
    bad = [name for name, x in weights if name in set(bad) and not x.isfinite().all()]
    if bad:
        raise ValueError(
            f"The weight {bad[0]!r}{and_more(bad)} of the model is NaN or infinite: its checkpoint is damaged, or "
            "its training has diverged. Use another checkpoint."
        )


def _has_finite_sum(weight: torch.Tensor) -> bool:
    try:
        return bool(weight.sum().isfinite())
    except NotImplementedError:  # of torchao's integers, which only multiply
        return True


def is_finite(outputs: ModelOutput) -> bool:
    """Whether the logits, or else the fused states, are all finite."""
    found = getattr(outputs, "logits", None)
    found = getattr(outputs, "last_hidden_state", None) if found is None else found
    tensors = found.values() if isinstance(found, Mapping) else [found]
    return all(bool(x.sum().isfinite()) for x in tensors if isinstance(x, torch.Tensor))


def what_is_wrong_with_inputs(model: PreTrainedModel, args: tuple, kwargs: Mapping[str, Any]) -> Optional[str]:
    """
    A sentence about the inputs of a failed forward pass; `None` if nothing is found.

    Args:
        args, kwargs: Of `model.forward`.
    """
    try:
        inputs = inspect.signature(type(model).forward).bind_partial(model, *args, **kwargs).arguments
        inputs = {**inputs, **inputs.get("kwargs", {})}
        return next(_problems(model, inputs), None)
    except Exception:  # after an error, a GPU may fail at everything
        return None


def _problems(model: PreTrainedModel, inputs: Mapping[str, Any]) -> Iterator[str]:
    inner = getattr(model, "model", model)
    ids, length = inputs.get("input_ids"), None
    if ids is not None:
        length = ids.shape[1]
        size = inner.get_input_embeddings().weight.shape[0]
        yield from _out_of_range("input_ids", ids, size, "the vocabulary of the text encoder")
    types = inputs.get("token_type_ids")
    if types is not None:
        size = getattr(model.config.text_config, "type_vocab_size", None)
        if isinstance(size, int) and size > 0:
            yield from _out_of_range("token_type_ids", types, size, "the token types of the text encoder")
    embeds = inputs.get("inputs_embeds")
    if embeds is not None:
        length = embeds.shape[1]
        width = inner.get_input_embeddings().weight.shape[1]
        if embeds.shape[2] != width:
            yield f"inputs_embeds must have the width {width} of the text embeddings, but has {embeds.shape[2]}."
    longest = max_text_positions(model.config.text_config)
    if length is not None and longest is not None and length > longest:
        yield f"The texts have {length} tokens, but the text encoder takes at most {longest}: shorten them."
    pixels = inputs.get("pixel_values")
    if pixels is not None:
        channels = getattr(model.config.vision_config, "num_channels", None)
        if isinstance(channels, int) and pixels.shape[1] != channels:
            yield f"pixel_values must have {channels} channels, but has the shape {tuple(pixels.shape)}."
        yield from _refused(inner, "vision", "pixel_values", pixels)
    for name in ("input_values", "input_features"):
        sound = inputs.get(name)
        if sound is not None:
            yield from _refused(inner, "audio", name, sound)
    for name, labels in (inputs.get("labels") or {}).items() if isinstance(inputs.get("labels"), Mapping) else ():
        task = model.tasks.get(name)
        if task is None:
            continue
        wrong = task.wrong_labels(labels)
        if wrong is not None:
            yield f"labels[{name!r}] must be {wrong}."


def _out_of_range(name: str, ids: torch.Tensor, size: int, what: str) -> Iterator[str]:
    lowest, highest = int(ids.min()), int(ids.max())
    if lowest < 0 or highest >= size:
        yield f"{name} must be numbers from 0 to {size - 1}, {what}, but goes from {lowest} to {highest}."


def _refused(inner: PreTrainedModel, modality: str, name: str, value: torch.Tensor) -> Iterator[str]:
    try:
        with torch.no_grad():
            inner.encode(modality, **{name: value[:1]})
    except Exception as error:
        yield (
            f"The {modality} encoder takes no {name} of shape {tuple(value.shape)} and type {value.dtype} "
            f"({one_line(error)[:-1]}): create the inputs with the processor."
        )
