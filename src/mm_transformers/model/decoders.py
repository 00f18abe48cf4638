"""Text encoders that can also write: encoder-decoders of transformers, pretrained as such or put together."""

from typing import Optional

from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    EncoderDecoderConfig,
    EncoderDecoderModel,
    PreTrainedConfig,
    PreTrainedModel,
)

from .encoders import build_encoder, load_encoder


def build_seq2seq(text_config: PreTrainedConfig, decoder_config: Optional[PreTrainedConfig]) -> PreTrainedModel:
    """
    The encoder-decoder that the configs describe, with new weights.

    Args:
        text_config: of an encoder-decoder, or of an encoder.
        decoder_config: of a decoder for an encoder that has none, otherwise `None`.
    """
    if decoder_config is None:
        return AutoModelForSeq2SeqLM.from_config(text_config)
    return _join(build_encoder(text_config, "text"), decoder_config)


def load_seq2seq(path: str, decoder_config: Optional[PreTrainedConfig], **kwargs) -> PreTrainedModel:
    """The same with the weights of a Hub repository or local folder; a decoder from a config has new ones."""
    if decoder_config is None:
        return AutoModelForSeq2SeqLM.from_pretrained(path, **kwargs)
    return _join(load_encoder(path, "text", **kwargs)[0], decoder_config)


def _join(encoder: PreTrainedModel, decoder_config: PreTrainedConfig) -> PreTrainedModel:
    decoder = AutoModelForCausalLM.from_config(decoder_config)
    config = EncoderDecoderConfig.from_encoder_decoder_configs(encoder.config, decoder_config)
    for name in ("pad_token_id", "eos_token_id", "bos_token_id", "decoder_start_token_id"):
        setattr(config, name, getattr(decoder_config, name, None))
    return EncoderDecoderModel(config, encoder, decoder)


def check_decoder(text_config: PreTrainedConfig, decoder_config: Optional[PreTrainedConfig], tasks: list[str]) -> None:
    """
    Args:
        tasks: the names of the tasks that write text.

    Raises:
        ValueError: one sentence, if there is no decoder for them, one too many, or one that nobody uses.
    """
    if decoder_config is not None and text_config.is_encoder_decoder:
        raise ValueError(
            f"text_config ({text_config.model_type!r}) has a decoder of its own; leave out decoder_config."
        )
    if decoder_config is not None and not tasks:
        raise ValueError("decoder_config is given, but no task writes text; add a Generation task or leave it out.")
    if tasks and decoder_config is None and not text_config.is_encoder_decoder:
        raise ValueError(
            f"Task {tasks[0]!r} writes text, but text_config ({text_config.model_type!r}) has no decoder: take an "
            "encoder-decoder (Marian, BART, T5, ...) as text encoder, or give a decoder_config."
        )


def decoder_vocab_size(text_config: PreTrainedConfig, decoder_config: Optional[PreTrainedConfig]) -> int:
    """How many tokens the decoder can write."""
    if decoder_config is not None:
        return decoder_config.vocab_size
    return getattr(text_config, "decoder_vocab_size", None) or text_config.vocab_size
