"""Text encoders that read the other modalities of their rows themselves: by layers inside, or by tokens before."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Optional

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from .decoder_layers import decoder_layers, give_places, number_of_places
from .decoders import is_language_model
from .encoder_features import EncoderFeatures
from .encoder_probe import observe, traits_of
from .fusion import fusion_class
from .fusion_base import FusionOutput
from .fusion_inside import InsideFusion, InsideRun
from .fusion_prefix import PrefixRun, let_read_prefix
from .row_streams import other_streams


def build_fusion(config: Any, text_encoder: PreTrainedModel, width: int) -> nn.Module:
    """
    The fusion of a config; with `fusion_layers_every`, the layers of the language model get places for it.

    Args:
        text_encoder: without its head.
        width: of its states.

    Raises:
        ValueError: one sentence, if this text encoder cannot read other modalities in this way.
    """
    options = config.fusion_kwargs
    kind = fusion_class(config.fusion_type, options)
    if config.reads_jointly:
        _check_encoder(config, text_encoder, width)
    if config.fusion_layers_every:
        layers = decoder_layers(text_encoder)
        give_places(layers, config.fusion_layers_every)
        count = number_of_places(len(layers), config.fusion_layers_every)
        return InsideFusion(config, config.modalities, width, count)
    if config.reads_jointly:
        let_read_prefix(text_encoder)
    return kind(config, config.modalities, width, **options)


def check_joint(config: Any) -> None:
    """
    Checks the fields of a config by which the text encoder reads the other modalities itself.

    Raises:
        ValueError: one sentence, if they do not fit each other or the text encoder.
    """
    every = config.fusion_layers_every
    if not every:
        return
    kind = fusion_class(config.fusion_type, config.fusion_kwargs or {})
    if not is_language_model(config.text_config):
        raise ValueError(
            f"fusion_layers_every={every} needs a decoder-only language model as text encoder, but text_config is "
            f"{config.text_config.model_type!r}: leave it out."
        )
    number_of_places(config.text_config.num_hidden_layers, every)
    if kind.mixes_text or kind.is_read_by_text:
        raise ValueError(
            f"fusion_layers_every={every} needs a fusion whose layers read no other text tokens, but fusion_type is "
            f"{config.fusion_type!r}: use fusion_type='cross_attention'."
        )


def _check_encoder(config: Any, text_encoder: PreTrainedModel, width: int) -> None:
    asked = (
        f"fusion_layers_every={config.fusion_layers_every}" if config.fusion_layers_every else "fusion_type='prefix'"
    )
    name, every = text_encoder.config.model_type, config.fusion_layers_every
    if any(traits_of(config.text_config).get(trait) for trait in ("by_length", "one_by_one")):
        raise ValueError(
            f"{asked}: the text encoder ({name!r}) runs on few rows at a time, since padding changes its outputs. Use "
            "another text encoder, or leave it out."
        )
    if every and not observe(config.text_config, "text").has_plain_layers:
        raise ValueError(
            f"{asked}: the layers of the language model ({name!r}) read states of another shape than (batch, tokens, "
            "width), so no fusion can stand between them: leave it out."
        )
    if not every and text_encoder.get_input_embeddings().weight.shape[1] != width:
        raise ValueError(
            f"{asked}: the input embeddings of the text encoder ({name!r}) are narrower than its states. Use another "
            "fusion_type."
        )


# Of this thread: the runs of a block, for those who follow an answer back.
_observed: ContextVar[Optional[list[Any]]] = ContextVar("_observed", default=None)


@contextmanager
def observed_runs() -> Iterator[list[Any]]:
    """Within the block, all runs of [`joint_run`] are put into the list."""
    runs: list[Any] = []
    token = _observed.set(runs)
    try:
        yield runs
    finally:
        _observed.reset(token)


def joint_run(model: Any, encoded: dict[str, Any], outputs_wanted: Optional[dict[str, Any]] = None) -> Any:
    """One use of the text encoder of a model for encoded rows: an [`InsideRun`] or a [`PrefixRun`]."""
    streams, num_rows = other_streams(encoded), len(encoded["text"].mask)
    cls = InsideRun if model.config.fusion_layers_every else PrefixRun
    run = cls(model, streams, num_rows, outputs_wanted)
    observed = None if torch.compiler.is_compiling() else _observed.get()
    if observed is not None:
        observed.append(run)
    return run


def fuse_jointly(model: Any, encoded: dict[str, Any], outputs_wanted: dict[str, Any]) -> FusionOutput:
    """
    The fused states of encoded rows: their texts are read once more, beside the other modalities.

    Raises:
        ValueError: one sentence, if the ids of the texts are not known.
    """
    text = encoded["text"]
    if text.row_ids is None:
        raise ValueError(
            "The text encoder of this model reads the texts beside the other modalities, so give them as input_ids, "
            "also beside text_features."
        )
    run = joint_run(model, encoded, outputs_wanted)
    config: PreTrainedConfig = model.config.text_config
    # Not as a frozen encoder, since gradients of the fusion pass through it.
    read = EncoderFeatures("text", model.text_encoder, config, training=model.training)
    with run.shown_to(model.text_encoder):
        states, _ = read(**run.inputs(text.row_ids, text.mask, to_the_right=False))
    return run.output(model.in_fusion_dtype(run.text_states(states)))
