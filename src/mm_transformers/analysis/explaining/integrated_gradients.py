"""Integrated gradients, through captum: a reference without attention."""

from typing import Optional

import torch

from ...model.fusion_base import Stream
from ...model.modalities import OTHER_ENCODERS, own_encoders
from ...model.modeling_mm_transformer import MMTransformerForMultiTask
from ...model.processing_mm_transformer import MMTransformerProcessor
from .questions import Asked, Question
from .recording import Seen, embeddings_of_first_call, through_frozen_encoders, word_embeddings
from .shares import blank_text
from .token_places import patch_grid, sums_over_parts, sums_over_patches


# The number of points on the path: more, if the sum misses the difference of the scores by more than this share.
NUM_STEPS = (32, 128, 512)
TOLERANCE = 0.01
_SOUNDS = ("input_values", "input_features")


def integrated_gradients(
    model: MMTransformerForMultiTask,
    processor: MMTransformerProcessor,
    inputs: dict[str, torch.Tensor],
    question: Question,
    asked: Asked,
    texts: list[str],
    word_index: Optional[torch.Tensor],
    seen: Seen,
    encoded: dict[str, Stream],
) -> dict[str, torch.Tensor]:
    """
    Sundararajan et al. 2017 (https://arxiv.org/abs/1703.01365), from padding instead of words, grey pictures and
    silence.

    The relevances of a row sum to the difference between its score and the score of these blank inputs. The error is
    within 1%, or that of 512 steps.

    Args:
        inputs: of the model, with no item in two rows.
        asked: the answers that are explained.
        encoded: of the same inputs.

    Returns:
        As [`relevance_of_inputs`], but negative for inputs that are evidence against the answer.
    """
    try:
        from captum.attr import IntegratedGradients
    except ImportError as error:
        raise ImportError("Integrated gradients need `captum`: pip install mm-transformers[explain]") from error
    others = [encoder_kind for encoder_kind in own_encoders().values() if encoder_kind.index in inputs]
    if others:
        raise ValueError(
            f"integrated_gradients cannot explain a model that reads {others[0].plural}; choose another method."
        )
    rows = [_Row(model, processor, inputs, question, asked, texts, word_index, number) for number in range(len(texts))]
    found: dict[str, torch.Tensor] = {"text": torch.zeros(inputs["input_ids"].shape)}
    for name, encoder in OTHER_ENCODERS.items():
        if encoder.index in inputs and name in seen.num_tokens:
            found[name] = torch.zeros(*inputs[encoder.index].shape, seen.num_tokens[name])
    for number, row in enumerate(rows):
        starts, baselines = tuple(row.varied.values()), row.baselines()
        for steps in NUM_STEPS:
            with torch.enable_grad(), through_frozen_encoders(model):
                attributions, missed = IntegratedGradients(row.scores).attribute(
                    starts, baselines, n_steps=steps, internal_batch_size=8, return_convergence_delta=True
                )
            summed = sum(float(values.sum()) for values in attributions)
            if abs(float(missed)) <= TOLERANCE * abs(summed - float(missed)):
                break
        for name, values in zip(row.varied, attributions, strict=True):
            values = values.detach()[0].float().cpu()
            if name == "embeddings":
                found["text"][number] = values.sum(-1)
            elif name == "pixel_values":
                for slot, picture in enumerate(values):
                    found["vision"][number, slot] = _over_patches(model, seen, picture.sum(0))
            else:
                mask, items = encoded["audio"].token_mask, inputs["audio_index"][number]
                for slot, (clip, item) in enumerate(zip(values, items[items >= 0], strict=True)):
                    heard = seen.num_tokens["audio"] if mask is None else int(mask[item].sum())
                    found["audio"][number, slot] = _over_clip(model, seen, clip, heard)
    return found


class _Row:
    """One row as a function of its varied inputs: (copies, ...) of each -> (copies,) scores."""

    def __init__(
        self,
        model: MMTransformerForMultiTask,
        processor: MMTransformerProcessor,
        inputs: dict[str, torch.Tensor],
        question: Question,
        asked: Asked,
        texts: list[str],
        word_index: Optional[torch.Tensor],
        number: int,
    ):
        self.model, self.processor, self.question = model, processor, question
        self.answer, self.text = asked.answers[number], texts[number]
        if isinstance(self.answer, float):
            self.answer = None  # the answer of a regression is the score itself
        self.word_index = None if word_index is None else word_index[number : number + 1]
        text_parts = ("input_ids", "attention_mask", "token_type_ids")
        self.fixed = {name: inputs[name][number : number + 1] for name in text_parts if name in inputs}
        self.varied: dict[str, torch.Tensor] = {}
        with torch.no_grad():
            self.varied["embeddings"] = word_embeddings(model)(self.fixed["input_ids"]).float()
        self.indexed: dict[str, torch.Tensor] = {}
        for index, parts in (("image_index", ("pixel_values",)), ("audio_index", _SOUNDS)):
            if index in inputs:
                items = inputs[index][number]
                items = items[items >= 0]
                self.indexed[index] = torch.arange(len(items), device=items.device)[None]
                for part in parts:
                    if part in inputs and len(items):
                        self.varied[part] = inputs[part][items][None]
                if index == "audio_index" and "audio_attention_mask" in inputs and len(items):
                    self.fixed["audio_attention_mask"] = inputs["audio_attention_mask"][items]
                if index == "image_index" and "frame_index" in inputs:
                    self.fixed["frame_index"] = inputs["frame_index"][number : number + 1, : len(items)]

    def baselines(self) -> tuple[torch.Tensor, ...]:
        blank = blank_text(self.processor.tokenizer, self.fixed["input_ids"])
        with torch.no_grad():
            embeddings = word_embeddings(self.model)(blank).float()
        others = (torch.zeros_like(value) for name, value in self.varied.items() if name != "embeddings")
        return embeddings, *others

    def scores(self, *varied: torch.Tensor) -> torch.Tensor:
        copies = varied[0].shape[0]
        inputs = {name: x.repeat(copies, *[1] * (x.ndim - 1)) for name, x in self.fixed.items()}
        for index, numbers in self.indexed.items():
            offsets = torch.arange(copies, device=numbers.device)[:, None] * numbers.shape[1]
            inputs[index] = numbers + offsets if numbers.shape[1] else torch.full_like(offsets, -1)
        values = dict(zip(self.varied, varied, strict=True))
        embeddings = values.pop("embeddings")
        inputs.update({name: value.flatten(0, 1) for name, value in values.items()})
        with embeddings_of_first_call(self.model, embeddings):
            outputs = self.model.model(**inputs)
        words = None if self.word_index is None else self.word_index.expand(copies, -1)
        asked = self.question.ask(
            self.model, self.processor, outputs, [self.text] * copies, words, [self.answer] * copies
        )
        return asked.scores


def _over_patches(model: MMTransformerForMultiTask, seen: Seen, pixels: torch.Tensor) -> torch.Tensor:
    """(height, width) of pixels -> (tokens,): the sum over each patch, 0 for tokens that are no patches."""
    num_tokens = seen.num_tokens["vision"]
    shape = seen.maps.get("vision") or patch_grid(model.config.vision_config, num_tokens, *pixels.shape)
    sums = sums_over_patches(model.config.vision_config, pixels, shape).flatten()
    return torch.nn.functional.pad(sums, (num_tokens - len(sums), 0))


def _over_clip(model: MMTransformerForMultiTask, seen: Seen, values: torch.Tensor, num_heard: int) -> torch.Tensor:
    """
    (samples,), or (features, frames), of a clip -> (tokens,): the sum over the part of each token.

    Args:
        num_heard: the number of tokens, from the first, that are not padding.
    """
    num_tokens, config = seen.num_tokens["audio"], model.config.audio_config
    if config.model_type == "audio-spectrogram-transformer":
        bands = (config.num_mel_bins - config.patch_size) // config.frequency_stride + 1
        sums = sums_over_parts(sums_over_parts(values, bands).T, (num_tokens - 2) // bands)
        return torch.nn.functional.pad(sums.flatten(), (2, 0))
    if values.ndim == 2:
        # Whisper has (features, frames), Wav2Vec2-BERT and others (frames, features).
        values = values.sum(0 if config.model_type == "whisper" else 1)
    sums = sums_over_parts(values, num_tokens)
    # The last samples of a clip form no token.
    last = max(num_heard, 1) - 1
    return torch.nn.functional.pad(torch.cat([sums[:last], sums[last:].sum()[None]]), (0, num_tokens - last - 1))
