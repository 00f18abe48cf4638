"""The share of each modality in an answer, measured on the model, independent of the method of explanation."""

from collections.abc import Mapping
from typing import Any, Optional

import torch
from transformers import PreTrainedTokenizerBase

from ...model.fusion_base import Stream
from ...model.modalities import own_encoders
from ...model.modeling_mm_transformer import MMTransformerForMultiTask
from ...model.processing_mm_transformer import MMTransformerProcessor
from ..ablation.contributions import shapley_values
from .questions import Asked, Question


# Smaller changes of the score, relative to it, count as rounding.
_NOTHING = 1e-5
# Plain pictures, in standard deviations of pixels from their mean: grey, dark, bright.
_LEVELS = (0.0, -1.0, 1.0)


def shares_of_modalities(
    model: MMTransformerForMultiTask,
    processor: MMTransformerProcessor,
    inputs: Mapping[str, torch.Tensor],
    encoded: Mapping[str, Stream],
    question: Question,
    asked: Asked,
    texts: list[str],
    word_index: Optional[torch.Tensor],
) -> list[dict[str, float]]:
    """
    The Shapley values of the modalities for the score of the answer, as shares of the sum of their sizes.

    A removed modality is blank, not absent: padding instead of words, plain pictures, silence, average numbers and
    unknown categories. So a picture without any
    effect has no share, even if the mere presence of a picture has an effect. A plain picture may have a meaning, such
    as a storm for a grey one. So sizes are means over a grey, a dark and a bright picture.

    The cost is one more pass of the encoders for each of these, and one of the fusion for each set of modalities.

    Args:
        inputs: of the model, with no item in two rows.
        encoded: of the same inputs.
        asked: the answers that are explained.

    Returns:
        For each row: modality -> share, for the modalities of the row. They sum to 1, or are 0 if the score depends on
            nothing.
    """
    # The answer of a regression is the score itself.
    answers = [None if isinstance(answer, float) else answer for answer in asked.answers]
    names = list(encoded)
    with torch.no_grad():

        def sizes_against(blank: Mapping[str, Stream]) -> torch.Tensor:
            def score(kept: frozenset[str]) -> torch.Tensor:
                streams = {name: (encoded if name in kept or name not in blank else blank)[name] for name in names}
                outputs = model.model.fuse(streams)
                return question.ask(model, processor, outputs, texts, word_index, answers).scores.float()

            values: Any = shapley_values(names, score)  # type: ignore[arg-type]
            return torch.stack([values[name].abs() for name in names])

        levels = _LEVELS if "pixel_values" in inputs else _LEVELS[:1]
        blanks = (_blank_rows(model, processor, inputs, level) for level in levels)
        sizes = torch.stack([sizes_against(blank) for blank in blanks]).mean(0)
    total, scores = sizes.sum(0), asked.scores.detach().float()
    is_something = total > _NOTHING * scores.abs().clamp(min=1)
    shares = torch.where(is_something, sizes / torch.where(is_something, total, 1), 0).T.tolist()
    has_text = inputs["attention_mask"].bool().any(-1)
    present = [(has_text if name == "text" else encoded[name].present).tolist() for name in names]
    return [
        {name: share for name, share, there in zip(names, row, present, strict=True) if there[number]}
        for number, row in enumerate(shares)
    ]


def blank_text(tokenizer: PreTrainedTokenizerBase, ids: torch.Tensor) -> torch.Tensor:
    """Ids with padding instead of all words, unknown ones too; other special tokens stay."""
    words = {tokenizer.unk_token_id, tokenizer.mask_token_id}
    kept = [i for i in tokenizer.all_special_ids if i not in words]
    special = torch.isin(ids, torch.tensor(kept, device=ids.device))
    return torch.where(special, ids, tokenizer.pad_token_id or 0)


def _blank_rows(
    model: MMTransformerForMultiTask,
    processor: MMTransformerProcessor,
    inputs: Mapping[str, torch.Tensor],
    level: float = 0.0,
) -> dict[str, Stream]:
    given = {**inputs, "input_ids": blank_text(processor.tokenizer, inputs["input_ids"])}
    if "pixel_values" in given:
        # All are equal, so one is enough.
        given["pixel_values"] = torch.full_like(given["pixel_values"][:1], level)
        given["image_index"] = given["image_index"].clamp(max=0)
    for name in ("input_values", "input_features"):
        if name in given:
            given[name] = torch.zeros_like(given[name])
    for encoder_kind in own_encoders().values():
        own = {name: given[name] for name in encoder_kind.inputs if name in given}
        if own and encoder_kind.own is not None:
            given |= encoder_kind.own.neutral(own)
    return model.model.encode_rows(**given)[0]
