"""The transformers class of the encoder of a config, and the inputs of such a class."""

import functools
import inspect
from typing import Any, Optional

import torch
import transformers
from transformers import MODEL_MAPPING, PreTrainedConfig, PreTrainedModel

from .modalities import ENCODERS


def sub_config_of(config: PreTrainedConfig, modality: str) -> PreTrainedConfig:
    """The part of the config that describes one modality's encoder, where the config has several (CLIP, SigLIP)."""
    sub_config = getattr(config, f"{modality}_config", None)
    return sub_config if isinstance(sub_config, PreTrainedConfig) else config


def model_class(config: PreTrainedConfig) -> Optional[type[PreTrainedModel]]:
    """The class of an encoder; `None` for one that is neither part of transformers nor registered."""
    cls = MODEL_MAPPING.get(type(config), None)
    if cls is None and type(config).__module__.startswith("transformers."):
        # Towers that `AutoModel` knows only as part of a whole: SiglipTextConfig -> SiglipTextModel.
        cls = getattr(transformers, type(config).__name__.removesuffix("Config") + "Model", None)
    return cls[0] if isinstance(cls, (tuple, list)) else cls


def class_options(cls: type[PreTrainedModel]) -> dict[str, bool]:
    """Keyword arguments that leave out parts unused by the fusion."""
    takes = "add_pooling_layer" in inspect.signature(cls.__init__).parameters
    return {"add_pooling_layer": False} if takes else {}


def forward_options(model: PreTrainedModel) -> dict[str, bool]:
    """Keyword arguments of a forward pass without a cache."""
    cls: Any = model.__class__
    return {"use_cache": False} if "use_cache" in arguments_of(cls) else {}


@functools.cache
def arguments_of(cls: Any) -> frozenset[str]:
    """The names of the arguments of its forward pass."""
    return frozenset(inspect.signature(cls.forward).parameters)


def modality_of(config: PreTrainedConfig) -> Optional[str]:
    """The modality of the encoder of a config; `None` if it is unknown or not supported."""
    name = getattr(model_class(config), "main_input_name", None)
    return next((encoder.name for encoder in ENCODERS.values() if name in encoder.inputs), None)


def check_class(config: PreTrainedConfig, modality: str) -> type[PreTrainedModel]:
    """
    The class of the encoder of a config; see [`model_class`].

    Raises:
        ValueError: one sentence, if there is none, or if it does not read this modality.
    """
    cls, wanted = model_class(config), ENCODERS[modality].inputs
    if cls is None:
        raise ValueError(
            f"{config.model_type!r} cannot be the {modality} encoder: transformers has no model for its config, and "
            "code from a checkpoint is not run. Register your own class by AutoModel.register first."
        )
    if cls.main_input_name not in wanted:
        raise ValueError(
            f"{config.model_type!r} cannot be the {modality} encoder: it takes {cls.main_input_name!r}, not "
            f"{' or '.join(map(repr, wanted))}."
        )
    return cls


def encoder_part(model: PreTrainedModel, modality: str) -> PreTrainedModel:
    """The encoder of an encoder-decoder; other models unchanged."""
    model_type = model.config.model_type
    if model.config.is_encoder_decoder:
        model = model.get_encoder()
    if not isinstance(model, PreTrainedModel):
        raise ValueError(f"{model_type!r} cannot be the {modality} encoder: its encoder is not a PreTrainedModel.")
    wanted = ENCODERS[modality].inputs
    if not set(wanted) & set(inspect.signature(model.forward).parameters):
        raise ValueError(
            f"{model_type!r} cannot be the {modality} encoder: its forward takes no {' or '.join(map(repr, wanted))}."
        )
    return model


def without_random_skips(config: PreTrainedConfig) -> PreTrainedConfig:
    """
    The config with random skips turned off, changed in place.

    - No layer is skipped in training: its weights would have no gradient in that step, and DDP would wait forever.
    - No stretches of sound are masked: this fails for clips shorter than a stretch.
    - No image patches are left out at random, as masked autoencoders do even in evaluation.
    - All words of a text attend to all others, not to random blocks.
    """
    for name in ("layerdrop", "encoder_layerdrop", "decoder_layerdrop", "mask_ratio"):
        if getattr(config, name, 0):
            setattr(config, name, 0.0)
    if hasattr(config, "mask_time_prob"):
        config.apply_spec_augment = False
    if getattr(config, "attention_type", None) == "block_sparse":
        # BigBird would also change permanently to full attention at the first short text.
        config.attention_type = "original_full"
    return config


def output_tokens(output: Any) -> torch.Tensor:
    """
    The tokens of an encoder output, (batch, tokens, width).

    Feature maps (batch, channels, rows, columns) of convolutional encoders become tokens. Masked autoencoders shuffle
    their patches; these are put back in order.
    """
    states, order = as_tokens(output.last_hidden_state), getattr(output, "ids_restore", None)
    if order is None:
        return states
    others = states.shape[1] - order.shape[1]  # the class token
    patches = states[:, others:].gather(1, order[..., None].expand(-1, -1, states.shape[-1]))
    return torch.cat([states[:, :others], patches], 1)


def as_tokens(hidden_states: torch.Tensor) -> torch.Tensor:
    """Feature maps (batch, channels, rows, columns) of convolutional encoders become (batch, tokens, channels)."""
    return hidden_states.flatten(2).transpose(1, 2) if hidden_states.ndim == 4 else hidden_states


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
        f"{config.model_type!r} cannot be the audio encoder: its inputs are not known. Use a kind like Wav2Vec2, "
        "HuBERT, WavLM, Whisper or AST."
    )


def min_audio_samples(config: PreTrainedConfig, num_tokens: int = 1) -> int:
    """The number of samples for this number of tokens of a waveform encoder; the same number for other encoders."""
    samples = num_tokens
    kernels, strides = getattr(config, "conv_kernel", ()), getattr(config, "conv_stride", ())
    for kernel, stride in reversed(list(zip(kernels, strides, strict=True))):
        samples = (samples - 1) * stride + kernel
    return samples


def takes_audio_mask(model: PreTrainedModel) -> bool:
    """Whether an audio encoder uses a mask of its input; Whisper does not."""
    return "attention_mask" in inspect.signature(model.forward).parameters and model.config.model_type != "whisper"


def audio_token_mask(
    model: PreTrainedModel, num_tokens: int, attention_mask: Optional[torch.Tensor]
) -> Optional[torch.Tensor]:
    """
    The tokens of an audio encoder that belong to the clip and not to its padding: (num_clips, num_tokens) bool.

    `None` if the encoder does not compute it (AST, whose tokens are patches of a spectrogram of fixed length).

    Args:
        attention_mask (num_clips, samples or frames): 1 for the clip, 0 for padding, at the rate of the encoder's
            input.
    """
    if attention_mask is None:
        return None
    if not hasattr(model, "_get_feat_extract_output_lengths"):
        return attention_mask.bool() if attention_mask.shape[1] == num_tokens else None
    lengths = model._get_feat_extract_output_lengths(attention_mask.sum(-1)).to(torch.int64)
    return torch.arange(num_tokens, device=attention_mask.device) < lengths[:, None]
