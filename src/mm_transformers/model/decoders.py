"""Text encoders that can also write: encoder-decoders and language models of transformers, or combined ones."""

import copy
from typing import Any, Optional

from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    EncoderDecoderConfig,
    EncoderDecoderModel,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.utils import logging

from .encoder_classes import sub_config_of, without_random_skips
from .encoder_probe import (
    ignores_leading_padding,
    is_causal,
    observe_seq2seq,
    observe_writing,
    probe,
    probe_seq2seq,
    probe_writing,
    traits_of,
)
from .encoders import (
    HUB_KWARGS,
    build_encoder,
    check_complete,
    load_encoder,
    max_text_positions,
    parameters_to_buffers,
    read_encoder_config,
    renamed_keys,
    without_pickles,
)


logger = logging.get_logger(__name__)


def is_language_model(text_config: PreTrainedConfig) -> bool:
    """
    Whether the text encoder of a config is a decoder-only language model, which writes by a head of its own.

    [`load_writer`] measures whether it is causal. Here this is read from the config: models that also fill in masked
    words, such as BERT, are decoders only if their config says so.
    """
    if language_model_class(text_config) is None or text_config.is_encoder_decoder:
        return False
    fills_in = MODEL_FOR_MASKED_LM_MAPPING.get(type(text_config), None) is not None
    says_otherwise = getattr(text_config, "use_bidirectional_attention", False)
    return not says_otherwise and (not fills_in or bool(getattr(text_config, "is_decoder", False)))


def language_model_class(config: PreTrainedConfig) -> Any:
    """The class of transformers that writes text by the model of a config alone; `None` if there is none."""
    return MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)


def text_encoder_of(model: PreTrainedModel) -> PreTrainedModel:
    """The part of a model from [`build_writer`] that reads texts: the encoder, or a language model without its head."""
    return model.get_encoder() if model.config.is_encoder_decoder else model.base_model


def build_writer(text_config: PreTrainedConfig, decoder_config: Optional[PreTrainedConfig]) -> PreTrainedModel:
    """
    The encoder-decoder or language model of the configs, with new weights; see [`build_seq2seq`].

    Raises:
        ValueError: one sentence, if the text encoder cannot be used.
    """
    if decoder_config is not None or not is_language_model(text_config):
        return build_seq2seq(text_config, decoder_config)
    unused = traits_of(text_config).get("unused_with_decoder")
    if unused is None:
        unused = observe_writing(
            lambda: AutoModelForCausalLM.from_config(without_random_skips(copy.deepcopy(text_config)))
        )
    return parameters_to_buffers(AutoModelForCausalLM.from_config(without_random_skips(text_config)), unused)


def load_writer(path: str, decoder_config: Optional[PreTrainedConfig], **kwargs: Any) -> PreTrainedModel:
    """
    The same with the weights of a Hub repository or local folder; see [`load_seq2seq`].

    Raises:
        ValueError: one sentence, if a language model is not causal, or padding changes its states.
    """
    hub_kwargs = {name: kwargs[name] for name in HUB_KWARGS if name in kwargs}
    whole = read_encoder_config(path, "text", **hub_kwargs)
    config = sub_config_of(whole, "text")
    if decoder_config is not None or not is_language_model(config):
        return load_seq2seq(path, decoder_config, **kwargs)
    names = renamed_keys(whole, config, language_model_class(config))
    with without_pickles(path):
        model, info = AutoModelForCausalLM.from_pretrained(
            path,
            config=without_random_skips(config),
            output_loading_info=True,
            **{"trust_remote_code": False, **names, **kwargs},
        )
    check_complete(path, model, info["missing_keys"])
    traits = probe(model.base_model, "text")
    traits.pop("unused", None)
    if not is_causal(model.base_model):
        raise ValueError(
            f"The text encoder ({config.model_type!r}) cannot write: its tokens attend to later ones. Use a "
            "decoder-only language model or an encoder-decoder, or give a decoder_config."
        )
    if not ignores_leading_padding(model.base_model):
        raise ValueError(
            f"The text encoder ({config.model_type!r}) cannot write: padding before a text changes its states, so the "
            "rows of a batch would change each other. Use another language model."
        )
    unused = probe_writing(model)
    if traits:
        model.config.encoder_traits = {**traits, "unused_with_decoder": unused}
    return parameters_to_buffers(model, unused)


def build_seq2seq(text_config: PreTrainedConfig, decoder_config: Optional[PreTrainedConfig]) -> PreTrainedModel:
    """
    The encoder-decoder of the configs, with new weights.

    Args:
        text_config: of an encoder-decoder, or of an encoder.
        decoder_config: of a decoder for an encoder that has none, otherwise `None`.
    """

    def build() -> PreTrainedModel:
        if decoder_config is None:
            return AutoModelForSeq2SeqLM.from_config(without_random_skips(copy.deepcopy(text_config)))
        return _join(build_encoder(copy.deepcopy(text_config), "text"), copy.deepcopy(decoder_config))

    unused = traits_of(text_config).get("unused_with_decoder")
    if unused is None:
        unused = observe_seq2seq(build)
    if decoder_config is None:
        model = AutoModelForSeq2SeqLM.from_config(without_random_skips(text_config))
    else:
        model = _join(build_encoder(text_config, "text"), decoder_config)
    return parameters_to_buffers(model, unused)


def load_seq2seq(path: str, decoder_config: Optional[PreTrainedConfig], **kwargs: Any) -> PreTrainedModel:
    """The same with the weights of a Hub repository or local folder; a decoder from a config has new weights."""
    if decoder_config is None:
        hub_kwargs = {name: kwargs[name] for name in HUB_KWARGS if name in kwargs}
        config = without_random_skips(read_encoder_config(path, "text", **hub_kwargs))
        with without_pickles(path):
            model = AutoModelForSeq2SeqLM.from_pretrained(path, config=config, **{"trust_remote_code": False, **kwargs})
        text_config = model.config
        traits = probe(model.get_encoder(), "text")
        traits.pop("unused", None)
    else:
        encoder, text_config = load_encoder(path, "text", **kwargs)
        model = _join(encoder, decoder_config)
        traits = traits_of(text_config)
    unused = probe_seq2seq(model)
    if traits:
        text_config.encoder_traits = {**traits, "unused_with_decoder": unused}
    return parameters_to_buffers(model, unused)


def _join(encoder: PreTrainedModel, decoder_config: PreTrainedConfig) -> PreTrainedModel:
    decoder = AutoModelForCausalLM.from_config(without_random_skips(decoder_config), dtype=encoder.dtype)
    config = EncoderDecoderConfig.from_encoder_decoder_configs(encoder.config, decoder_config)
    for name in ("pad_token_id", "eos_token_id", "bos_token_id", "decoder_start_token_id"):
        setattr(config, name, getattr(decoder_config, name, None))
    if config.decoder_start_token_id is None:
        # The Trainer of transformers replaces bos_token_id by that of the tokenizer, which may have none.
        config.decoder_start_token_id = config.bos_token_id
    model = EncoderDecoderModel(config, encoder, decoder)
    if hasattr(model, "enc_to_dec_proj"):
        model.enc_to_dec_proj.to(encoder.dtype)
    return model


def check_decoder(text_config: PreTrainedConfig, decoder_config: Optional[PreTrainedConfig], tasks: list[Any]) -> None:
    """
    Checks that there is exactly one decoder if tasks need one.

    Args:
        tasks: those that write text.

    Raises:
        ValueError: one sentence, if there is no decoder for them, one too many, an unused one, or one with too few
            positions.
    """
    if decoder_config is not None and text_config.is_encoder_decoder:
        raise ValueError(f"text_config ({text_config.model_type!r}) already has a decoder: leave out decoder_config.")
    if decoder_config is not None and not tasks:
        raise ValueError("decoder_config is given, but no task writes text; add a Generation task or leave it out.")
    can_write = text_config.is_encoder_decoder or is_language_model(text_config)
    if tasks and decoder_config is None and not can_write:
        raise ValueError(
            f"Task {tasks[0].name!r} writes text, but text_config ({text_config.model_type!r}) has no decoder: use "
            "an encoder-decoder (Marian, BART, T5, ...) or a language model (Llama, Qwen, Gemma, ...) as text encoder, "
            "or give a decoder_config."
        )
    positions = decoder_positions(text_config, decoder_config)
    for task in tasks:
        # The last token that is written is never read again.
        longest = task.max_length + len(task.decoder_start_ids or [0]) - 1
        if decoder_config is None and not text_config.is_encoder_decoder and task.decoder_start_ids:
            longest += 1  # at least one token of a text
        if positions is not None and longest > positions:
            raise ValueError(
                f"Task {task.name!r}: the decoder has {positions} positions, too few for max_length={task.max_length}."
            )


def check_starts(tasks: list[Any]) -> None:
    """
    Warns if a decoder can tell two tasks apart by the texts of their rows only.

    Args:
        tasks: those that write text.
    """
    seen: dict[tuple[int, ...], str] = {}
    for task in tasks:
        start = tuple(task.decoder_start_ids or ())
        if start in seen:
            logger.warning(
                f"Tasks {seen[start]!r} and {task.name!r} write the same answer to the same row, since their decoder "
                "starts with the same tokens: give them different decoder_start_ids, or rows with different texts."
            )
        seen[start] = task.name


def decoder_positions(text_config: PreTrainedConfig, decoder_config: Optional[PreTrainedConfig]) -> Optional[int]:
    """The most tokens that the decoder reads, of a language model with the text; `None` without a limit."""
    if decoder_config is None:
        return max_text_positions(text_config)
    try:
        return max_text_positions(decoder_config)
    except ValueError:  # of an encoder-decoder, whose other half does not fit
        positions = getattr(decoder_config, "max_position_embeddings", None)
        return positions if isinstance(positions, int) and positions > 0 else None


def decoder_vocab_size(text_config: PreTrainedConfig, decoder_config: Optional[PreTrainedConfig]) -> int:
    """The vocabulary size of the decoder."""
    if decoder_config is not None:
        return decoder_config.vocab_size
    return getattr(text_config, "decoder_vocab_size", None) or text_config.vocab_size
