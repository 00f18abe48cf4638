"""Builds any text, vision or audio encoder of transformers, and knows what each of them needs."""

import copy
import importlib
import inspect
import json
import re
from contextlib import contextmanager
from typing import NamedTuple, Optional

import torch
import transformers
from transformers import MODEL_MAPPING, AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.integrations import is_deepspeed_zero3_enabled


_MAIN_INPUTS = {"text": ("input_ids",), "vision": ("pixel_values",), "audio": ("input_values", "input_features")}

# What `AutoConfig.from_pretrained` takes of the keyword arguments of `AutoModel.from_pretrained`.
HUB_KWARGS = ("revision", "token", "cache_dir", "local_files_only", "trust_remote_code", "force_download")

# Parameters of text and audio encoders that serve only a pooled output, which the fusion does not read, or the
# modelling of masked sounds: they would never get a gradient, which DDP refuses. Those of vision encoders are found.
_UNUSED_PARAMETERS = (r"(^|\.)pooler\.", r"(^|\.)mask_token$", r"(^|\.)masked_spec_embed$")
_UNUSED_PARAMETERS_OF = {
    "siglip_text_model": (r"(^|\.)head\.",),
    "wav2vec2-conformer": (r"(^|\.)pos_conv_embed\.",),
}

# Text encoders that number positions from `pad_token_id + 1`, so that fewer are left than the table has.
_POSITIONS_AFTER_PADDING = {
    "camembert", "data2vec-text", "ibert", "longformer", "luke", "mpnet", "roberta", "roberta-prelayernorm",
    "xlm-roberta", "xlm-roberta-xl", "xmod",
}  # fmt: skip
# Text encoders without a table of positions.
_RELATIVE_POSITIONS = {"t5", "mt5", "umt5", "longt5", "switch_transformers"}


def encoder_config_from_pretrained(path: str, modality: str, **kwargs) -> PreTrainedConfig:
    """The config of the `modality` ("text", "vision" or "audio") encoder in a Hub repository or local folder."""
    return sub_config_of(AutoConfig.from_pretrained(path, **kwargs), modality)


def sub_config_of(config: PreTrainedConfig, modality: str) -> PreTrainedConfig:
    """The part of the config that describes one modality's encoder, where the config has several (CLIP, SigLIP)."""
    sub_config = getattr(config, f"{modality}_config", None)
    return sub_config if isinstance(sub_config, PreTrainedConfig) else config


def build_encoder(config: PreTrainedConfig, modality: str) -> PreTrainedModel:
    """
    The encoder that a config describes, with new weights.

    Raises:
        ValueError: one sentence that says why it cannot be the encoder of this modality.
    """
    cls = _check_config(without_random_skips(config), modality)
    model = cls._from_config(config, **_options(cls))
    return _as_encoder(model, modality)


def load_encoder(path: str, modality: str, **kwargs) -> tuple[PreTrainedModel, PreTrainedConfig]:
    """
    The encoder of a Hub repository or local folder, with its weights, and the config that [`build_encoder`] needs.

    Args:
        kwargs: for `AutoModel.from_pretrained`.

    Raises:
        ValueError: one sentence that says why it cannot be the encoder of this modality.
    """
    hub_kwargs = {name: kwargs[name] for name in HUB_KWARGS if name in kwargs}
    config = encoder_config_from_pretrained(path, modality, **hub_kwargs)
    cls = _check_config(without_random_skips(config), modality)
    model = cls.from_pretrained(path, config=config, **_options(cls), **kwargs)
    return _as_encoder(model, modality), model.config


def encoder_width(config: PreTrainedConfig) -> int:
    """
    Width of the tokens that an encoder outputs.

    Text and audio encoders say it in their config, as `hidden_size`. Where the config does not, and for all vision
    encoders, whose configs call it by many names, it is read from a forward pass on the meta device. This needs neither
    memory nor weights, and is done once per config.

    Raises:
        ValueError: one sentence, if neither says it.
    """
    modality = _modality_of(config)
    if modality != "vision":
        width = getattr(config, "hidden_size", None)
        if getattr(config, "add_adapter", False):  # Wav2Vec2 and its kin
            width = config.output_hidden_size
        if isinstance(width, int):
            return width
    if modality is None:
        raise ValueError(
            f"The width of the tokens of {config.model_type!r} is not known: its config has no `hidden_size`, and "
            "transformers has no encoder for it; choose another encoder."
        )
    return _observe(config, modality).width


def as_tokens(hidden_states: torch.Tensor) -> torch.Tensor:
    """Feature maps (batch, channels, rows, columns) of convolutional encoders become (batch, tokens, channels)."""
    return hidden_states.flatten(2).transpose(1, 2) if hidden_states.ndim == 4 else hidden_states


def max_text_positions(config: PreTrainedConfig) -> Optional[int]:
    """The longest text, in tokens, that a text encoder takes; `None` if there is no limit."""
    positions = getattr(config, "max_position_embeddings", None)
    if config.model_type in _RELATIVE_POSITIONS or not isinstance(positions, int) or positions <= 0:
        return None
    if pad_token_matters(config):
        return positions - (config.pad_token_id or 0) - 1
    return positions


def pad_token_matters(config: PreTrainedConfig) -> bool:
    """True for text encoders that tell by `pad_token_id` where the text, and so its first position, begins."""
    return config.model_type in _POSITIONS_AFTER_PADDING


def without_random_skips(config: PreTrainedConfig) -> PreTrainedConfig:
    """
    The config, changed so that training neither skips a whole layer, whose weights would get no gradient in that step,
    for which DDP waits for ever, nor masks stretches of sound, which fails for clips shorter than such a stretch.
    """
    for name in ("layerdrop", "encoder_layerdrop", "decoder_layerdrop"):
        if getattr(config, name, 0):
            setattr(config, name, 0.0)
    if hasattr(config, "mask_time_prob"):
        config.apply_spec_augment = False
    return config


def audio_token_mask(
    model: PreTrainedModel, num_tokens: int, attention_mask: Optional[torch.Tensor]
) -> Optional[torch.Tensor]:
    """
    Which tokens of an audio encoder belong to the clip and not to its padding: (num_clips, num_tokens) bool, or `None`
    if the encoder does not tell (AST, whose tokens are patches of a spectrogram of fixed length).

    Args:
        attention_mask (num_clips, samples or frames): 1 where the clip is, at the rate of the encoder's input.
    """
    if attention_mask is None:
        return None
    if not hasattr(model, "_get_feat_extract_output_lengths"):
        return attention_mask.bool() if attention_mask.shape[1] == num_tokens else None
    lengths = model._get_feat_extract_output_lengths(attention_mask.sum(-1)).to(torch.int64)
    return torch.arange(num_tokens, device=attention_mask.device) < lengths[:, None]


def takes_audio_mask(model: PreTrainedModel) -> bool:
    """Whether an audio encoder heeds a mask of its input; Whisper does not."""
    return "attention_mask" in inspect.signature(model.forward).parameters and model.config.model_type != "whisper"


def blank_input(config: PreTrainedConfig, modality: str) -> dict[str, torch.Tensor]:
    """
    A small input of an encoder of images or sound, of zeros: one item.

    Raises:
        ValueError: if it is not known what the encoder takes.
    """
    if modality == "vision":
        size = getattr(config, "image_size", None) or 224
        height, width = size[-2:] if isinstance(size, (list, tuple)) else (size, size)
        return {"pixel_values": torch.zeros(1, getattr(config, "num_channels", 3), height, width)}
    if getattr(config, "conv_kernel", None) and getattr(config, "conv_stride", None):  # of waveforms
        return {"input_values": torch.zeros(1, min_audio_samples(config, 4 * getattr(config, "squeeze_factor", 1)))}
    if config.model_type == "whisper":
        return {"input_features": torch.zeros(1, config.num_mel_bins, 2 * config.max_source_positions)}
    if config.model_type == "audio-spectrogram-transformer":
        return {"input_values": torch.zeros(1, config.max_length, config.num_mel_bins)}
    if hasattr(config, "feature_projection_input_dim"):  # Wav2Vec2-BERT
        return {"input_features": torch.zeros(1, 8, config.feature_projection_input_dim)}
    if hasattr(config, "input_feat_per_channel"):  # Speech2Text
        return {"input_features": torch.zeros(1, 16, config.input_feat_per_channel * config.input_channels)}
    raise ValueError(
        f"{config.model_type!r} cannot be the audio encoder: it is not known what it takes; choose one of the kinds of "
        "Wav2Vec2, HuBERT, WavLM, Whisper or AST."
    )


def min_audio_samples(config: PreTrainedConfig, num_tokens: int = 1) -> int:
    """How many samples of sound give so many tokens of an encoder that takes waveforms; as many for others."""
    samples = num_tokens
    kernels, strides = getattr(config, "conv_kernel", ()), getattr(config, "conv_stride", ())
    for kernel, stride in reversed(list(zip(kernels, strides, strict=True))):
        samples = (samples - 1) * stride + kernel
    return samples


def _model_class(config: PreTrainedConfig) -> Optional[type[PreTrainedModel]]:
    """The class of an encoder; `None` for one that is neither part of transformers nor registered."""
    cls = MODEL_MAPPING.get(type(config), None)
    if cls is None and type(config).__module__.startswith("transformers."):
        # Towers that `AutoModel` knows only as part of a whole: SiglipTextConfig -> SiglipTextModel.
        cls = getattr(transformers, type(config).__name__.removesuffix("Config") + "Model", None)
    return cls[0] if isinstance(cls, (tuple, list)) else cls


def _options(cls: type[PreTrainedModel]) -> dict[str, bool]:
    takes = "add_pooling_layer" in inspect.signature(cls.__init__).parameters
    return {"add_pooling_layer": False} if takes else {}


def _modality_of(config: PreTrainedConfig) -> Optional[str]:
    """What the encoder of a config reads; `None` if it is not known or none of ours."""
    cls = _model_class(config)
    name = getattr(cls, "main_input_name", None)
    return next((modality for modality, inputs in _MAIN_INPUTS.items() if name in inputs), None)


class _Observation(NamedTuple):
    """What a forward pass of an encoder shows: the width of its tokens, and the parameters that it does not use."""

    width: int
    unused: frozenset[str]


_OBSERVATIONS: dict[tuple[type, str, str], _Observation] = {}
# Fields that differ before and after loading, and change nothing of what is observed.
_BOOKKEEPING = ("_name_or_path", "architectures", "dtype", "transformers_version")


def _observe(config: PreTrainedConfig, modality: str) -> _Observation:
    fields = {name: value for name, value in config.to_dict().items() if name not in _BOOKKEEPING}
    key = (type(config), json.dumps(fields, sort_keys=True, default=str), modality)
    if key not in _OBSERVATIONS:
        try:
            _OBSERVATIONS[key] = _forward_blank(config, modality, "meta")
        except RuntimeError:
            # Its operations depend on values, which tensors on the meta device do not have.
            _OBSERVATIONS[key] = _forward_blank(config, modality, "cpu")
    return _OBSERVATIONS[key]


def _forward_blank(config: PreTrainedConfig, modality: str, device: str) -> _Observation:
    """
    Builds the encoder on a device of its own, and runs it on one blank item.

    Raises:
        RuntimeError: if the meta device does not suffice.
        ValueError: one sentence, if the encoder cannot be used.
    """
    # The encoder that is kept shares its config with the whole model; building sets some of its fields.
    config = without_random_skips(copy.deepcopy(config))
    config._attn_implementation = "eager"
    cls, name = _model_class(config), f"{config.model_type!r} cannot be the {modality} encoder"
    assert cls is not None
    with (
        torch.random.fork_rng(devices=[]),
        torch.inference_mode(False),
        torch.enable_grad(),
        torch.device(device),
        _unpartitioned(),
    ):
        with _one_sentence(f"{name}: it cannot be built", device):
            model = cls(config, **_options(cls)).eval()
        model = _part_of(model, modality)
        if modality == "text":
            inputs = {"input_ids": torch.ones(1, 2, dtype=torch.int64)}
        else:
            inputs = {key: x.to(model.dtype) for key, x in blank_input(config, modality).items()}
        with _one_sentence(f"{name}: it fails on one blank item of shape {_shape_of(inputs)}", device):
            output = model(**inputs)
        states = getattr(output, "last_hidden_state", None)
        if states is None:
            raise ValueError(f"{name}: its output has no `last_hidden_state`.")
        is_map = states.ndim == 4 and not states.shape[1] == states.shape[2] != states.shape[3]
        if states.ndim != 3 and not is_map:
            raise ValueError(
                f"{name}: its output has the shape {tuple(states.shape)}, not (batch, tokens, width) or "
                "(batch, width, rows, columns)."
            )
        parameters = {key: parameter for key, parameter in model.named_parameters() if parameter.requires_grad}
        gradients = torch.autograd.grad(states.sum(), list(parameters.values()), allow_unused=True)
    unused = frozenset(key for key, gradient in zip(parameters, gradients, strict=True) if gradient is None)
    return _Observation(states.shape[1 if is_map else -1], unused)


def _shape_of(inputs: dict[str, torch.Tensor]) -> tuple[int, ...]:
    return tuple(next(iter(inputs.values())).shape)


@contextmanager
def _one_sentence(what: str, device: str):
    """Errors become one sentence, but for those of the meta device, and those that name a missing library."""
    try:
        yield
    except ImportError:
        raise
    except Exception as error:
        if device == "meta" and isinstance(error, RuntimeError) and "meta" in str(error):
            raise
        raise ValueError(f"{what}: {' '.join(str(error).split()) or type(error).__name__}") from error


@contextmanager
def _unpartitioned():
    """DeepSpeed ZeRO-3 makes each new parameter a part of itself, spread over the processes; not in here."""
    if not is_deepspeed_zero3_enabled():
        yield
        return
    # By name: code next to a checkpoint must not seem to need it.
    partition_parameters = importlib.import_module("deepspeed.runtime.zero.partition_parameters")

    partition_parameters.shutdown_init_context()
    try:
        yield
    finally:
        partition_parameters.restore_init_context()


def _check_config(config: PreTrainedConfig, modality: str) -> type[PreTrainedModel]:
    """Says what is wrong before weights are built or fetched; returns [`_model_class`]."""
    cls, wanted = _model_class(config), _MAIN_INPUTS[modality]
    if cls is None:
        raise ValueError(
            f"{config.model_type!r} cannot be the {modality} encoder: transformers has no model for its config, and "
            "code that a checkpoint names is not run; make a class of your own known with AutoModel.register first."
        )
    if cls.main_input_name not in wanted:
        raise ValueError(
            f"{config.model_type!r} cannot be the {modality} encoder: it takes {cls.main_input_name!r}, not "
            f"{' or '.join(map(repr, wanted))}."
        )
    encoder_width(config)
    if modality == "audio":
        blank_input(config, modality)
    return cls


def _part_of(model: PreTrainedModel, modality: str) -> PreTrainedModel:
    """The encoder of an encoder-decoder; other models as they are."""
    model_type = model.config.model_type
    if model.config.is_encoder_decoder:
        model = model.get_encoder()
    wanted = _MAIN_INPUTS[modality]
    if not set(wanted) & set(inspect.signature(model.forward).parameters):
        raise ValueError(
            f"{model_type!r} cannot be the {modality} encoder: its forward takes no {' or '.join(map(repr, wanted))}."
        )
    return model


def _as_encoder(model: PreTrainedModel, modality: str) -> PreTrainedModel:
    config, model_type = model.config, model.config.model_type
    model = _part_of(model, modality)
    unused = re.compile("|".join(_UNUSED_PARAMETERS + _UNUSED_PARAMETERS_OF.get(model_type, ())))
    found = _observe(config, modality).unused if modality == "vision" else frozenset()
    for name, parameter in list(model.named_parameters()):
        if name in found or unused.search(name):
            # As buffers they stay in the checkpoint and in `_init_weights`, and nothing waits for their gradient;
            # `requires_grad=False` would not survive `from_pretrained`.
            owner = model.get_submodule(name.rpartition(".")[0])
            attribute = name.rpartition(".")[2]
            delattr(owner, attribute)
            owner.register_buffer(attribute, parameter.detach())
    return model
