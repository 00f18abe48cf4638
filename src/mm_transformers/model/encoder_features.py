"""The features of an encoder for a batch, independent of padding and of special cases of encoders."""

from contextlib import nullcontext
from typing import Optional

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from .distributed import is_sharded
from .encoder_classes import audio_token_mask, forward_options, min_audio_samples, output_tokens
from .encoder_probe import is_expert, traits_of
from .image_size import size_options
from .padding import as_long_as, leading_padding, roll_rows, run_by_length


class EncoderFeatures:
    """
    Runs the encoder of one modality.

    Args:
        modality (`str`): "text", "vision" or "audio".
        encoder (`PreTrainedModel`): The encoder; of an encoder-decoder the encoder alone.
        config (`PreTrainedConfig`): The config that says which peculiarities the encoder has; see [`traits_of`].
        training (`bool`, *optional*, defaults to `False`):
            Whether this is a training step, in which every parameter needs a gradient.
        is_frozen (`bool`, *optional*, defaults to `False`): Whether nothing of the encoder is trained.
        takes_mask (`bool`, *optional*, defaults to `True`): Whether an audio encoder reads a mask of its input.

    Example:

    ```python
    >>> vision = EncoderFeatures("vision", model.model.vision_model, model.config.vision_config)
    >>> features, mask = vision(pixel_values=torch.zeros(2, 3, 224, 224))  # (2, tokens, encoder width), None
    ```
    """

    def __init__(
        self,
        modality: str,
        encoder: PreTrainedModel,
        config: PreTrainedConfig,
        training: bool = False,
        is_frozen: bool = False,
        takes_mask: bool = True,
    ) -> None:
        self.modality, self.encoder, self.config = modality, encoder, config
        self.training, self.is_frozen, self.takes_mask = training, is_frozen, takes_mask

    def __call__(
        self, attention_mask: Optional[torch.Tensor] = None, **inputs: torch.Tensor
    ) -> tuple[torch.Tensor, Optional[torch.Tensor]]:
        """
        The output of the encoder for all items.

        Args:
            attention_mask (`torch.Tensor` of shape `(items, length)`, *optional*):
                1 where the text or the clip is, 0 at padding.
            inputs: `input_ids`, ... of texts; `pixel_values` of images; `input_values` or `input_features` of sounds.

        Returns:
            The features (items, tokens, encoder width), and for sounds which of them belong to the clip and not to its
            padding, (items, tokens) bool, if the encoder says so.

        Raises:
            ValueError: if a clip is too short, or the encoder cannot run under FSDP or ZeRO-3.
        """
        if self.modality == "text":
            return self._of_texts(inputs, attention_mask), None
        inputs = {name: value.to(self.encoder.dtype) for name, value in inputs.items()}
        if self.modality == "vision":
            return self._run(inputs), None
        shortest = min_audio_samples(self.encoder.config)
        if "input_values" in inputs and inputs["input_values"].shape[-1] < shortest:
            raise ValueError(f"The audio encoder needs clips of at least {shortest} samples.")
        features = self._run(inputs, attention_mask if self.takes_mask else None)
        return features, audio_token_mask(self.encoder, features.shape[1], attention_mask)

    def _of_texts(self, inputs: dict[str, torch.Tensor], attention_mask: Optional[torch.Tensor]) -> torch.Tensor:
        """
        The features of texts. The encoder gets the padding on the right, wherever it is in the batch.

        Absolute positions are counted from the left, with or without padding.
        """
        if attention_mask is None:
            return self._run(inputs)
        shifts, length = leading_padding(attention_mask), attention_mask.shape[1]
        rolled = {
            name: roll_rows(x, shifts) if x.ndim > 1 and x.shape[1] == length else x for name, x in inputs.items()
        }
        states = self._run(rolled, roll_rows(attention_mask, shifts))
        return roll_rows(as_long_as(states, length), -shifts)

    def _run(self, inputs: dict[str, torch.Tensor], attention_mask: Optional[torch.Tensor] = None) -> torch.Tensor:
        """The tokens that the encoder outputs, (items, tokens, width)."""
        traits, options = traits_of(self.config), forward_options(self.encoder)
        if "pixel_values" in inputs:
            options = {**options, **size_options(self.encoder, self.config, inputs["pixel_values"])}

        def run(**given: torch.Tensor) -> torch.Tensor:
            tokens = output_tokens(self.encoder(**given, **options))
            if traits.get("routed") and self.training:
                # Experts without a token in this batch need a gradient of 0, since DDP waits for it.
                firsts = [p.reshape(-1)[0].to(tokens) for name, p in self.encoder.named_parameters() if is_expert(name)]
                tokens = tokens + 0.0 * torch.stack(firsts).sum()
            return tokens

        by_length = attention_mask is not None and traits.get("by_length", False)
        if (by_length or traits.get("one_by_one")) and is_sharded(self.encoder):
            raise ValueError(
                f"The {self.modality} encoder ({self.encoder.config.model_type!r}) lets rows or padding change the "
                "outputs of other rows, so it runs on few rows at a time. FSDP and DeepSpeed ZeRO-3 do not support "
                "that: train with DDP, or choose another encoder."
            )
        # A frozen encoder keeps nothing for a backward pass, unless an explanation asks for gradients of the inputs.
        needs_gradients = not self.is_frozen or any(value.requires_grad for value in inputs.values())
        with nullcontext() if needs_gradients else torch.no_grad():
            if by_length:
                return run_by_length(run, inputs, attention_mask, traits.get("shortest", 1))
            if attention_mask is not None:
                inputs = {**inputs, "attention_mask": attention_mask}
            if traits.get("one_by_one"):
                items = next(iter(inputs.values())).shape[0]
                return torch.cat([run(**{key: x[i : i + 1] for key, x in inputs.items()}) for i in range(items)])
            return run(**inputs)
