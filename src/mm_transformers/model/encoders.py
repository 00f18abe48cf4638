"""Builds any text, vision or audio encoder of transformers, with the options that each needs."""

import logging
import os
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Optional

from torch import nn
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from .checkpoint_checks import is_pickle_error
from .encoder_classes import (
    check_class,
    class_options,
    encoder_part,
    modality_of,
    sub_config_of,
    without_random_skips,
)
from .encoder_probe import observe, probe, traits_of
from .hub_kernels import check_config
from .messages import check_folder, one_line


# The arguments of `AutoModel.from_pretrained` that `AutoConfig.from_pretrained` also takes.
HUB_KWARGS = ("revision", "token", "cache_dir", "local_files_only", "trust_remote_code", "force_download")

# The names in configs of the longest text, without a table of positions.
_LONGEST_TEXT = ("max_position_embeddings", "max_encoder_position_embeddings", "max_seq_len")


def encoder_config_from_pretrained(path: str, modality: str, **kwargs: Any) -> PreTrainedConfig:
    """The config of the `modality` ("text", "vision" or "audio") encoder in a Hub repository or local folder."""
    return sub_config_of(read_encoder_config(path, modality, **kwargs), modality)


def read_encoder_config(path: str, modality: str, **kwargs: Any) -> PreTrainedConfig:
    """
    The whole config in a Hub repository or local folder.

    Raises:
        OSError: one sentence, if there is no such folder, or no config in it.
        ValueError: one sentence, if its values do not fit.
    """
    check_folder(path, f"a {modality} encoder" if modality != "audio" else "an audio encoder")
    if os.path.isdir(path) and not os.path.isfile(os.path.join(path, kwargs.get("subfolder") or "", "config.json")):
        raise OSError(f"The folder {os.fspath(path)!r} holds no encoder: it has no config.json.")
    # Otherwise transformers would ask at the keyboard.
    kwargs.setdefault("trust_remote_code", False)
    try:
        config = AutoConfig.from_pretrained(path, **kwargs)
        check_config(config, path)
        return config
    except (ImportError, OSError, ValueError):
        raise
    except Exception as error:  # any error of an encoder's config about a wrong value
        raise ValueError(f"The config of {os.fspath(path)!r} cannot be read: {one_line(error)}") from error


def build_encoder(config: PreTrainedConfig, modality: str) -> PreTrainedModel:
    """
    The encoder of a config, with new weights.

    Raises:
        ValueError: one sentence with the reason why it cannot be the encoder of this modality.
    """
    cls = check_class(without_random_skips(config), modality)
    traits = traits_of(config)
    unused = traits["unused"] if "unused" in traits else observe(config, modality).unused
    model = encoder_part(cls._from_config(config, **class_options(cls)), modality)
    return parameters_to_buffers(model, unused)


def load_encoder(path: str, modality: str, **kwargs: Any) -> tuple[PreTrainedModel, PreTrainedConfig]:
    """
    The encoder of a Hub repository or local folder, with its weights, and the config for [`build_encoder`].

    The traits of the encoder are stored in the config as `encoder_traits`.

    Args:
        kwargs: for `AutoModel.from_pretrained`.

    Raises:
        ValueError: one sentence with the reason why it cannot be the encoder of this modality.
    """
    hub_kwargs = {name: kwargs[name] for name in HUB_KWARGS if name in kwargs}
    whole = read_encoder_config(path, modality, **hub_kwargs)
    config = sub_config_of(whole, modality)
    cls = check_class(without_random_skips(config), modality)
    # Before gigabytes are read.
    observed = observe(config, modality)
    names = renamed_keys(whole, config, cls) if modality == "text" else {}
    with without_pickles(path), _without_report_of_unused_weights():
        loaded, info = cls.from_pretrained(
            path, config=config, output_loading_info=True, **names, **class_options(cls), **kwargs
        )
    # A pooler or a mask token may be missing.
    check_complete(path, loaded, info["missing_keys"], most=len(loaded.state_dict()) // 2)
    model = encoder_part(loaded, modality)
    traits = probe(model, modality)
    if traits:
        loaded.config.encoder_traits = traits
    return parameters_to_buffers(model, traits.get("unused", observed.unused)), loaded.config


def renamed_keys(whole: PreTrainedConfig, config: PreTrainedConfig, cls: Any) -> dict[str, Any]:
    """
    The option of `from_pretrained` by which the language model of a larger checkpoint (LLaVA, Gemma 3) is found.

    Args:
        whole: the config of the checkpoint.
        config: its part for the text.
        cls: the class that reads it.
    """
    if config is whole:
        return {}
    base = cls.base_model_prefix
    inside = r"^(?:model\.)?language_model\."
    return {"key_mapping": {rf"{inside}lm_head": "lm_head", rf"{inside}(?:{base}\.)?": f"{base}."}}


def check_complete(path: str, model: PreTrainedModel, missing: Collection[str], most: int = 0) -> None:
    """
    Checks that a checkpoint has the weights of a model, which would have random values otherwise.

    Args:
        missing: the names of the missing weights.
        most: the number of weights that may be missing.

    Raises:
        ValueError: one sentence, if more are missing.
    """
    if len(missing) > most:
        raise ValueError(
            f"The checkpoint {os.fspath(path)!r} lacks {len(missing)} of the {len(model.state_dict())} weights of "
            f"{type(model).__name__}, such as {min(missing)!r}, so it cannot be used: choose a checkpoint that holds "
            "this model."
        )


@contextmanager
def without_pickles(path: str) -> Iterator[None]:
    """
    Turns torch's error about a pickle into one sentence.

    torch reads `pytorch_model.bin` without running its code, but its long message tells how to run it.

    Raises:
        ValueError: one sentence instead.
    """
    try:
        yield
    except Exception as error:
        if not is_pickle_error(error):
            raise
        raise ValueError(
            f"The weights of {path!r}, a pytorch_model.bin, hold more than tensors and could run any code, so they "
            "are not loaded. Choose an encoder with weights in model.safetensors."
        ) from None


@contextmanager
def _without_report_of_unused_weights() -> Iterator[None]:
    """Drops transformers' report on the weights of a checkpoint if it lists only weights that the encoder lacks."""

    def is_shown(record: logging.LogRecord) -> bool:
        message = record.getMessage()
        return "LOAD REPORT" not in message or "MISSING" in message or "MISMATCH" in message or "CONVERSION" in message

    logger = logging.getLogger("transformers.modeling_utils")
    logger.addFilter(is_shown)
    try:
        yield
    finally:
        logger.removeFilter(is_shown)


def encoder_width(config: PreTrainedConfig) -> int:
    """
    Width of the tokens that an encoder outputs.

    It is read from `encoder_traits`, or from a forward pass on the meta device. This needs neither memory nor weights,
    and is done once per config.

    Raises:
        ValueError: one sentence, if the encoder cannot be used.
    """
    width = traits_of(config).get("width")
    if width is not None:
        return width
    modality = modality_of(config)
    if modality is None:
        width = getattr(config, "hidden_size", None)
        if isinstance(width, int):
            return width
        raise ValueError(
            f"The width of the tokens of {config.model_type!r} is not known, because its config has no `hidden_size` "
            "and transformers has no encoder for it. Choose another encoder."
        )
    return observe(config, modality).width


def max_text_positions(config: PreTrainedConfig) -> Optional[int]:
    """The longest text, in tokens, that a text encoder takes; `None` if there is no limit."""
    if modality_of(config) == "text":
        positions = observe(config, "text").positions
        if positions is not None:
            return positions
    said = (getattr(config, name, None) for name in _LONGEST_TEXT)
    return next((positions for positions in said if isinstance(positions, int) and positions > 0), None)


def pad_token_matters(config: PreTrainedConfig) -> bool:
    """True for text encoders that find the start of the text, and so its first position, by `pad_token_id`."""
    return modality_of(config) == "text" and observe(config, "text").counts_from_padding


def parameters_to_buffers(model: PreTrainedModel, names: Iterable[str]) -> PreTrainedModel:
    """
    The model with these parameters as buffers.

    They stay in the checkpoint and in `_init_weights`, and DDP does not wait for their gradient. `requires_grad=False`
    would not survive `from_pretrained`.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    unused = {id(parameters[name]) for name in names if name in parameters}
    for name, parameter in parameters.items():
        if id(parameter) in unused:
            owner: nn.Module = model.get_submodule(name.rpartition(".")[0])
            attribute = name.rpartition(".")[2]
            delattr(owner, attribute)
            owner.register_buffer(attribute, parameter.detach())
    return model
