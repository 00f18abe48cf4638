"""The pretrained encoders of a new model, and the config around them."""

import difflib
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from .configuration_mm_transformer import MMTransformerConfig
from .decoders import load_writer
from .encoders import HUB_KWARGS, encoder_config_from_pretrained, load_encoder
from .no_text import config_without_text
from .tasks import Task, task_from_dict


# For models with pretrained encoders; `docs/defaults.md` explains the choice.
MODALITY_DROPOUT = 0.3


class PretrainedEncoders(NamedTuple):
    """
    What a new model is built from.

    Args:
        config: the config of the model.
        models: "text_model", ... -> the encoder; with a task that writes, "text_model" is an encoder-decoder.
        attention: the config of each encoder, and the attention implementation that it was loaded with.
        dtype: of the new parts.
    """

    config: MMTransformerConfig
    models: dict[str, PreTrainedModel]
    attention: list[tuple[PreTrainedConfig, str]]
    dtype: torch.dtype = torch.float32

    def restore_attention(self) -> None:
        """Building a model resets the attention implementation of its parts; this sets it again."""
        for config, implementation in self.attention:
            config._attn_implementation = implementation


def split_options(arguments: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """
    Splits the arguments of `from_encoders` into fields of the config and arguments of `AutoModel.from_pretrained`.

    Raises:
        ValueError: if one of the latter looks like a misspelt field.
    """
    fields = MMTransformerConfig.__annotations__
    for name in arguments:
        meant = difflib.get_close_matches(name, fields, n=1, cutoff=0.85) if name not in fields else []
        if meant:
            raise ValueError(f"from_encoders has no argument {name!r}; did you mean {meant[0]!r}?")
    options = {name: value for name, value in arguments.items() if name in fields}
    return options, {name: value for name, value in arguments.items() if name not in fields}


def with_defaults(options: Mapping[str, Any], modalities: Collection[str]) -> dict[str, Any]:
    """
    The fields of the config, with the defaults for pretrained encoders.

    Args:
        options: the fields that the caller gives.
        modalities: those of the model, "text" among them unless it reads no text.

    Example:

    ```python
    >>> with_defaults({"num_fusion_layers": 2}, ["text"])["num_fusion_layers"]
    2
    ```
    """
    defaults: dict[str, Any] = {
        # Pretrained features suit a linear probe, and pretrained statistics are better than those of small batches.
        "linear_probe": True,
        "freeze_batch_norm": True,
        "item_order": len(modalities) > 1,
        "num_fusion_layers": 1,
        "modality_dropout": _modality_dropout(modalities, options.get("tasks") or []),
    }
    if "vision" in modalities:
        defaults["freeze"] = ["vision"]
    if "text" not in modalities:
        # Its text encoder only stands in.
        defaults |= {"text_config": config_without_text(), "reads_text": False}
        options = {**options, "freeze": ["text", *(options.get("freeze") or defaults.get("freeze", []))]}
    return {**defaults, **options}


def load_encoders(paths: Mapping[str, str], options: Mapping[str, Any], **kwargs: Any) -> PretrainedEncoders:
    """
    The encoders and the config of a new model.

    Args:
        paths: modality -> Hub id or local folder of its encoder.
        options: fields of the config.
        kwargs: for `AutoModel.from_pretrained`; `dtype` may be a dict from modality to dtype.

    Raises:
        ValueError: one sentence, if an encoder cannot be used or an option does not fit.
    """
    # A checkpoint may be stored in half precision; training starts from float32 unless the caller asks for another.
    given = kwargs.pop("dtype", torch.float32)
    dtypes = given if isinstance(given, Mapping) else dict.fromkeys(paths, given)
    unknown = [name for name in dtypes if name not in paths]
    if unknown:
        raise ValueError(f"dtype names {unknown[0]!r}, but the encoders are {', '.join(paths)}.")
    # A wrong option is an error before gigabytes are read.
    hub_kwargs = {name: kwargs[name] for name in HUB_KWARGS if name in kwargs}
    text_config = options.get("text_config")
    if "text" in paths:
        text_config = encoder_config_from_pretrained(paths["text"], "text", **hub_kwargs)
    # These two may name an encoder that this early config lacks.
    left = ("freeze", "modality_dropout", "text_config", "reads_text")
    early = {name: value for name, value in options.items() if name not in left}
    config = MMTransformerConfig(**early, text_config=text_config)
    models, configs = {}, {}
    for modality, path in paths.items():
        own = {**kwargs, "dtype": dtypes.get(modality, torch.float32)}
        if modality == "text" and config.has_decoder:
            model = load_writer(path, config.decoder_config, **own)
            configs[modality] = model.config if config.decoder_config is None else model.encoder.config
        else:
            model, configs[modality] = load_encoder(path, modality, **own)
        models[f"{modality}_model"] = model
    attention = [(found, found._attn_implementation) for found in configs.values()]
    parts = {f"{modality}_config": found for modality, found in configs.items()}
    config = MMTransformerConfig(**{**options, **parts}, attn_implementation=kwargs.get("attn_implementation"))
    first = next(iter(models.values()), None)
    dtype = torch.float32 if first is None or isinstance(given, Mapping) else first.dtype
    return PretrainedEncoders(config, models, attention, dtype)


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Within the block new parameters have this dtype."""
    previous = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(previous)


def _modality_dropout(modalities: Collection[str], tasks: list[Task | dict[str, Any]]) -> dict[str, float]:
    """The dropout of each modality; 0 for the text if a task writes, since the answer depends on that text."""
    if len(modalities) < 2:
        return {}
    known = [task_from_dict(task) if isinstance(task, dict) else task for task in tasks]
    keeps_text = any(task.needs_decoder for task in known)
    return {name: MODALITY_DROPOUT for name in modalities if not (name == "text" and keeps_text)}
