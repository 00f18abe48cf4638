"""How the encoders of the fused model run, and what each row has of what they give."""

from contextlib import contextmanager
from typing import Any, Optional

import torch
from torch import nn

from .distributed import is_sharded
from .encoders import as_tokens, audio_token_mask, blank_input, encoder_width, min_audio_samples
from .freezing import Freezing
from .fusion_base import Stream
from .fusion_layers import masked_mean


class Encoding(Freezing):
    """The part of [`MMTransformerModel`] that runs the encoders, or takes what they gave before."""

    # All of these are those of the model that this is a part of.
    fusion: Any
    null_text: Any
    frame_embedding: Any
    vision_reduction: Any
    audio_takes_mask: bool
    training: bool

    def encode(self, modality: str, **inputs: torch.Tensor) -> tuple[torch.Tensor, Optional[torch.Tensor]]:
        """
        What the encoder of "text", "vision" or "audio" gives, before anything of the fusion has touched it.

        Args:
            inputs: `input_ids`, `attention_mask`, ... of texts; `pixel_values` of images; `input_values` or
                `input_features`, and `attention_mask` at the rate of these, of sounds.

        Returns:
            The features (items, tokens, encoder width), and for sounds which of them belong to the clip and not to its
            padding, (items, tokens) bool, if the encoder tells.
        """
        encoder, mask = self.encoder(modality), None
        attention_mask = inputs.get("attention_mask")
        if modality == "audio":
            inputs.pop("attention_mask", None)
            if attention_mask is not None and self.audio_takes_mask:
                inputs["attention_mask"] = attention_mask
            shortest = min_audio_samples(encoder.config)
            if "input_values" in inputs and inputs["input_values"].shape[-1] < shortest:
                raise ValueError(f"The audio encoder needs clips of at least {shortest} samples.")
        if modality != "text":
            inputs = {key: x if key == "attention_mask" else x.to(encoder.dtype) for key, x in inputs.items()}
        with self._gradients(modality, inputs):
            features = as_tokens(encoder(**inputs).last_hidden_state)
        if modality == "audio":
            mask = audio_token_mask(encoder, features.shape[1], attention_mask)
        return features, mask

    def _encode_text(
        self, attention_mask: torch.Tensor, features: Optional[torch.Tensor] = None, **inputs: Optional[torch.Tensor]
    ) -> Stream:
        given = {name: value for name, value in inputs.items() if value is not None}
        # The place of the text, where there is none, is taken by one token; nothing that the encoder says is seen.
        present = attention_mask.bool().any(-1)
        if features is None:
            shown = torch.where(present[:, None], attention_mask, 1) if self.fusion is not None else attention_mask
            states, _ = self.encode("text", attention_mask=shown, **given)
        else:
            if features.shape[:2] != attention_mask.shape:
                raise ValueError(
                    f"text_features must begin with the shape of attention_mask, {tuple(attention_mask.shape)}, but "
                    f"have {tuple(features.shape)}."
                )
            states = features.to(self.text_encoder.dtype)
        means = masked_mean(states, attention_mask.bool()) if self.config.linear_probe else None
        if self.fusion is None:
            return Stream("text", states, attention_mask.bool(), item_means=means)
        first = torch.arange(states.shape[1], device=states.device) == 0
        # Not by `torch.where`, which ONNX Runtime does not know for truth values.
        mask = attention_mask.bool() | (~present[:, None] & first)
        return Stream("text", self.null_text(states, present), mask, item_means=means)

    def _encode_items(
        self,
        name: str,
        items: dict[str, torch.Tensor],
        index: torch.Tensor,
        frame_index: Optional[torch.Tensor] = None,
        is_full: bool = False,
    ) -> Optional[Stream]:
        """
        The tokens that each row has of one modality, `None` if it has none and nothing has to be trained.

        Args:
            index, is_full: as [`check_index`] gives them.
        """
        if items and index.shape[1] > 0:
            tokens, token_mask, means = self._tokens(name, items)
        elif not self.training and not is_sharded(self.encoder(name)):
            return None
        else:
            # Encoder and projection take part in every training step, even where one rank has no item: DDP would
            # complain of unused parameters, and FSDP would wait for this rank, in evaluation too. A frozen encoder that
            # each rank has as a whole need not run.
            if self.is_frozen(name) and not is_sharded(self.encoder(name)):
                blank = {"features": torch.zeros(1, 1, encoder_width(getattr(self.config, f"{name}_config")))}
            else:
                blank = blank_input(getattr(self.config, f"{name}_config"), name)
            with _frozen_batch_norm(getattr(self, f"{name}_model")):
                tokens, token_mask, means = self._tokens(name, {k: v.to(index.device) for k, v in blank.items()})
            # Nobody sees it, so that one token is enough.
            tokens, token_mask = tokens[:, :1], token_mask if token_mask is None else token_mask[:, :1]
            index, frame_index = torch.full_like(index[:, :1], -1), None
            if index.shape[1] == 0:
                index = torch.full((index.shape[0], 1), -1, device=index.device)
        offsets = None
        if name == "vision":
            if frame_index is not None:
                if frame_index.shape != index.shape:
                    raise ValueError(
                        f"frame_index must have the shape of image_index, {tuple(index.shape)}, but has "
                        f"{tuple(frame_index.shape)}."
                    )
                self.frame_embedding.check(frame_index)
                offsets = self.frame_embedding(frame_index, tokens.dtype)
            elif self.training and self.config.frame_embedding == "learned":
                # It too takes part in every step.
                offsets = self.frame_embedding(torch.full_like(index, -1), tokens.dtype)
        scales = None
        if self.config.item_order:
            tokens, scales, shifts = getattr(self, f"{name}_order")(index, tokens)
            offsets = shifts if offsets is None or shifts is None else offsets + shifts
        return Stream(name, tokens, token_mask, index, offsets, is_full and token_mask is None, means, scales)

    def _tokens(
        self, name: str, items: dict[str, torch.Tensor]
    ) -> tuple[torch.Tensor, Optional[torch.Tensor], Optional[torch.Tensor]]:
        """
        The tokens of each item, (num_items, tokens per item, fusion_hidden_size), where they are none, and for linear
        probes the mean of the encoder outputs, (num_items, encoder width).
        """
        if "features" in items:
            features, mask = items["features"].to(self.encoder(name).dtype), items.get("feature_mask")
        else:
            features, mask = self.encode(name, **{key: x for key, x in items.items() if key != "feature_mask"})
        tokens = getattr(self, f"{name}_projection")(features)
        means = None
        if self.config.linear_probe:
            means = features.mean(1) if mask is None else masked_mean(features, mask)
        return (self.vision_reduction(tokens) if name == "vision" else tokens), mask, means


@contextmanager
def _frozen_batch_norm(model: nn.Module):
    """A blank image must not enter running statistics."""
    modules = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.training]
    for module in modules:
        module.eval()
    try:
        yield
    finally:
        for module in modules:
            module.train()
