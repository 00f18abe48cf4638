"""How the encoders of the fused model run, and what each row has of what they give."""

from contextlib import contextmanager
from typing import Any, Optional

import torch
from torch import nn

from .distributed import is_sharded
from .encoder_classes import audio_token_mask, blank_input, forward_options, min_audio_samples, output_tokens
from .encoder_probe import is_expert, traits_of
from .encoders import encoder_width
from .freeze_rules import Freezing
from .fusion_base import Stream
from .fusion_layers import masked_mean
from .padding import as_long_as, leading_padding, roll_rows, run_by_length


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
        attention_mask = inputs.pop("attention_mask", None)
        if modality == "text":
            return self._encode_rolled(inputs, attention_mask), None
        inputs = {key: x.to(encoder.dtype) for key, x in inputs.items()}
        if modality == "audio":
            shortest = min_audio_samples(encoder.config)
            if "input_values" in inputs and inputs["input_values"].shape[-1] < shortest:
                raise ValueError(f"The audio encoder needs clips of at least {shortest} samples.")
        given = attention_mask if modality == "audio" and self.audio_takes_mask else None
        features = self._run(modality, inputs, given)
        if modality == "audio":
            mask = audio_token_mask(encoder, features.shape[1], attention_mask)
        return features, mask

    def _encode_rolled(self, inputs: dict[str, torch.Tensor], attention_mask: Optional[torch.Tensor]) -> torch.Tensor:
        """
        Texts are given to the encoder with their padding on the right, wherever it is in the batch: encoders with
        absolute positions count them from the left, padding or not.
        """
        if attention_mask is None:
            return self._run("text", inputs, None)
        shifts, length = leading_padding(attention_mask), attention_mask.shape[1]
        rolled = {
            name: roll_rows(x, shifts) if x.ndim > 1 and x.shape[1] == length else x for name, x in inputs.items()
        }
        states = self._run("text", rolled, roll_rows(attention_mask, shifts))
        return roll_rows(as_long_as(states, length), -shifts)

    def _run(
        self, modality: str, inputs: dict[str, torch.Tensor], attention_mask: Optional[torch.Tensor]
    ) -> torch.Tensor:
        """The tokens that an encoder outputs, (items, tokens, width)."""
        encoder, traits = self.encoder(modality), traits_of(getattr(self.config, f"{modality}_config"))
        options = forward_options(encoder)

        def run(**given: torch.Tensor) -> torch.Tensor:
            tokens = output_tokens(encoder(**given, **options))
            if traits.get("routed") and self.training:
                # Experts that no token of this batch is sent to get a gradient of 0, for which DDP waits.
                firsts = [p.reshape(-1)[0].to(tokens) for name, p in encoder.named_parameters() if is_expert(name)]
                tokens = tokens + 0.0 * torch.stack(firsts).sum()
            return tokens

        by_length = attention_mask is not None and traits.get("by_length", False)
        if (by_length or traits.get("one_by_one")) and is_sharded(encoder):
            raise ValueError(
                f"The {modality} encoder ({encoder.config.model_type!r}) mixes the rows of a batch, or its padding, so "
                "it runs on few of them at a time, which FSDP and DeepSpeed ZeRO-3 do not allow: train it with DDP, or "
                "choose another encoder."
            )
        with self._gradients(modality, inputs):
            if by_length:
                return run_by_length(run, inputs, attention_mask, traits.get("shortest", 1))
            if attention_mask is not None:
                inputs = {**inputs, "attention_mask": attention_mask}
            if traits.get("one_by_one"):
                items = next(iter(inputs.values())).shape[0]
                return torch.cat([run(**{key: x[i : i + 1] for key, x in inputs.items()}) for i in range(items)])
            return run(**inputs)

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
