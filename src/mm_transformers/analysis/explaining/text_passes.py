"""What a text encoder reads beside the text of a row: the answer that it continues, or the other modalities."""

from dataclasses import dataclass, field, replace
from typing import Any, Optional

import torch

from ...model.fusion_base import AttentionStep, Stream
from ...model.modeling_mm_transformer import MMTransformerForMultiTask, MMTransformerModelOutput
from ...model.padding import roll_rows
from ...model.row_streams import other_streams
from .methods import AttentionMethod
from .recording import Seen, TextPass


@dataclass
class Path:
    """
    Where the relevance of an answer is followed.

    Args:
        seen, outputs: of the pass that the answer depends on, with all tokens of that pass as the text.
        prompt (batch, text_len): the places of the texts of the rows among these tokens; `None` if they are the same.
    """

    seen: Seen
    outputs: MMTransformerModelOutput
    prompt: Optional[torch.Tensor] = field(default=None)

    def of_rows(self, relevance: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The relevance of the tokens of the rows, without those of the answer."""
        if self.prompt is None:
            return relevance
        return {**relevance, "text": relevance["text"].gather(1, self.prompt.to(relevance["text"].device))}


def path_of(
    model: MMTransformerForMultiTask,
    seen: Seen,
    outputs: MMTransformerModelOutput,
    runs: list[Any],
    is_continued: bool,
    method: AttentionMethod,
) -> Path:
    """
    The path of an answer.

    Args:
        outputs: of the rows.
        runs: the uses of a text encoder that reads other modalities itself, in order.
        is_continued: whether a language model has continued the texts with the answer.
    """
    reads_jointly = model.model.reads_jointly
    if not (is_continued or reads_jointly):
        return Path(seen, outputs)
    last = seen.passes[-1]
    if is_continued and not last.attentions and method.through_encoders:
        raise ValueError(
            f"The language model ({model.config.text_config.model_type!r}) has no attention of all tokens to all, "
            "through which a written answer could be followed: choose method='attention'."
        )
    encoded: dict[str, Stream] = dict(outputs.encoded or {})
    streams, mask = other_streams(encoded), encoded["text"].mask
    run = runs[-1] if reads_jointly else None
    places: Optional[torch.Tensor] = getattr(run, "places", None)
    before = sum(stream.mask.shape[1] for stream in streams)
    length = last.states.shape[1] if places is None else places.shape[1] - before
    changed: dict[str, Any] = {}
    if not reads_jointly:
        changed["fusion"] = last.crossings.get(0, ())
        changed["encoders"] = {**seen.encoders, "text": last.attentions}
    else:
        fusion = _steps(last, model.config.fusion_layers_every, method, [] if places is None else streams)
        changed |= {"fusion": fusion, "text_in_fusion": True, "places": places}
        changed["encoders"] = {**seen.encoders, "text": () if is_continued else seen.encoders["text"]}
    if is_continued:
        changed["states"] = {**seen.states, "text": last.states}
        changed["num_tokens"] = {**seen.num_tokens, "text": length}
        read = last.states if reads_jointly or last.fused is None else last.fused
        tokens = last.states if places is None else last.states.new_zeros(len(last.states), length, 1).requires_grad_()
        if places is not None:
            changed["read_places"] = places[:, before:]
        encoded["text"] = Stream("text", tokens)
        followed = type(outputs)(**{**outputs, "last_hidden_state": read, "encoded": encoded})
        return Path(replace(seen, **changed), followed, _prompt_places(mask))
    return Path(replace(seen, **changed), outputs)


def _steps(
    last: TextPass, every: Optional[int], method: AttentionMethod, streams: list[Stream]
) -> tuple[tuple[AttentionStep, ...], ...]:
    """The attentions of a pass in order: of the layers of the text encoder, and of the fusions between them."""
    crossings = [layer for place in sorted(last.crossings) for layer in last.crossings[place]]
    if crossings and not method.through_encoders:
        return tuple(crossings)
    names = (*(stream.name for stream in streams), "text")
    found: list[tuple[AttentionStep, ...]] = []
    for number, weights in enumerate(last.attentions):
        if every and (number + 1) % every == 0:
            found += last.crossings.get((number + 1) // every - 1, ())
        found.append((AttentionStep(names, names, weights),))
    return tuple(found) if last.attentions else tuple(crossings)


def _prompt_places(mask: torch.Tensor) -> torch.Tensor:
    """The places of the tokens of texts, after the writer has moved their last token to the right end."""
    places = torch.arange(mask.shape[1], device=mask.device).expand(len(mask), -1)
    ends = (mask * (places + 1)).amax(1).clamp(min=1) - mask.shape[1]
    return roll_rows(places, -ends)
