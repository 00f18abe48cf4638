"""Finds the picture (or sound) for a text, and the text for a picture."""

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Optional

import torch
from torch import nn
from transformers import PreTrainedConfig
from transformers import initialization as init

from .distributed import gather_rows
from .embeddings import missing_as_nan
from .encoders import encoder_width
from .fusion_base import Stream
from .fusion_layers import TEXT_POOLINGS
from .modalities import OTHER_ENCODERS
from .pairs import Pairs, encode_pair, labels_of_pairs_left, matching_pairs, pair_ids, pooled, read_truth_value
from .task_base import NO_CONTEXT, LabelContext, Task, register_task


# As in CLIP: below this temperature training becomes unstable.
MIN_TEMPERATURE = 0.01
MAX_LOG_SCALE = math.log(1 / MIN_TEMPERATURE)


@register_task
@dataclass
class Retrieval(Task):
    """
    Embeds texts and pictures (or sounds) so that matching pairs are similar and other pairs are not.

    The loss is symmetric InfoNCE with a learned temperature (CLIP, https://arxiv.org/abs/2103.00020), over the batch of
    all processes. The task compares the encoder outputs before the fusion. So texts and pictures can be encoded, stored
    and searched separately: see [`MMTransformerForMultiTask.encode_text`].

    No column is needed: every row with a text and a picture is a pair. A text matches all pictures that some row pairs
    with it, and a picture all such texts. The target probability is shared by all that match
    (https://arxiv.org/abs/2204.03610). In a column, a cell is an id, and all rows with the same id match each other. Or
    it is True for a separate pair, and False or `None` for no pair.

    Logits (batch, 2, embedding_size): the vectors of text and item, each of the length sqrt(1 / temperature). So their
    dot products are the logits of the softmax. Rows without an item have 0. Labels (batch, 3) int64: fingerprints of
    text, item and id (-1: no id); -100 in rows without a pair.

    The other rows of a batch are the negatives, so the batch must not be small. Gradient accumulation over several
    batches is not equal to one big batch.

    Args:
        modality (`str`, *optional*, defaults to `"vision"`): The modality to compare with texts: `"vision"` or
            `"audio"`.
        embedding_size (`int`, *optional*, defaults to 256): Size of the vectors.
        temperature (`float`, *optional*, defaults to 0.07): The initial temperature; never below 0.01.

    Example:

    ```python
    >>> Retrieval("captions", embedding_size=128)
    ```
    """

    modality: str = "vision"
    embedding_size: int = 256
    temperature: float = 0.07

    kind: ClassVar[str] = "retrieval"
    default_metrics: ClassVar[tuple[str, ...]] = ("retrieval_recall",)
    hub_task: ClassVar[str] = "sentence-similarity"
    default_cell: ClassVar[Any] = True
    compares_rows: ClassVar[bool] = True
    needs_other_rows: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_modality(self)
        if not isinstance(self.embedding_size, int) or self.embedding_size < 1:
            raise ValueError(
                f"Task {self.name!r}: embedding_size must be an integer >= 1, but is {self.embedding_size!r}."
            )
        if not MIN_TEMPERATURE <= self.temperature < math.inf:
            raise ValueError(
                f"Task {self.name!r}: temperature must be at least {MIN_TEMPERATURE}, below which training becomes "
                f"unstable, but is {self.temperature!r}."
            )

    def build_head(self, config: PreTrainedConfig, hidden_size: int) -> nn.Module:
        if self.modality not in config.modalities:
            raise ValueError(
                f"Task {self.name!r} compares texts with {self.modality!r}, but the model has no such encoder; it has "
                f"{', '.join(['text', *config.modalities])}."
            )
        sizes = (encoder_width(config.text_config), config.fusion_hidden_size)
        return RetrievalHead(*sizes, self.embedding_size, self.modality, self.temperature, config.text_pooling)

    @classmethod
    def read_text(cls, text: str, separator: str) -> Any:
        # Not 1 and 0, which are ids.
        is_word = text.strip().lower() in ("true", "false")
        return read_truth_value(text, text) if is_word else (text if text.strip() else None)

    def encode_label(self, value: Any, text: str) -> Optional[int]:
        return encode_pair(self.name, value)

    def collate_labels(self, values: list[Any], context: LabelContext = NO_CONTEXT) -> torch.Tensor:
        return pair_ids(values, context, self.modality)

    def num_labelled(self, labels: torch.Tensor) -> torch.Tensor:
        return (labels[:, 0] != -100).sum().float()

    def labels_left(self, labels: torch.Tensor, kept: dict[str, torch.Tensor]) -> torch.Tensor:
        return labels_of_pairs_left(labels, kept, self.modality)

    def loss(self, logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        # In evaluation, processes may be at different places.
        together = logits.requires_grad
        everyone, ids = (gather_rows(logits), gather_rows(labels)) if together else (logits, labels)
        total = logits.new_zeros((), dtype=torch.float32)
        orders = ([0, 1, 2], [1, 0, 2])  # matches of texts, and of items
        pairs = [Pairs.of(ids[:, order]) for order in orders]
        for start in range(0, len(logits), 2048):  # a data set at once would be too much
            rows = slice(start, start + 2048)
            for side in (0, 1):
                order = orders[side]
                matches = matching_pairs(labels[rows][:, order], ids[:, order], pairs[side])
                scores = logits[rows, side].float() @ everyone[:, 1 - side].float().T
                scores = scores.masked_fill(ids[:, 0] == -100, -torch.inf)
                # Of a row that is no pair, nothing may be left: not even the NaN of a softmax of nothing.
                is_pair = labels[rows, 0] != -100
                scores = scores.masked_fill(~is_pair[:, None], 0.0)
                log_probabilities = scores.log_softmax(1).masked_fill(~matches, 0.0)
                total = total - 0.5 * (log_probabilities.sum(1) / matches.sum(1).clamp(min=1)).sum()
        return total, self.num_labelled(labels)

    def decode(self, logits: torch.Tensor, word_index: Optional[torch.Tensor] = None) -> list[dict[str, Any]]:
        """The cosine of each row's own text and item, 0 where it has none."""
        vectors = nn.functional.normalize(logits.float(), dim=-1)
        return [{"similarity": value} for value in (vectors[:, 0] * vectors[:, 1]).sum(-1).tolist()]

    def pair_similarity(self, logits: torch.Tensor, modality: str) -> Optional[torch.Tensor]:
        if modality != self.modality:
            return None
        vectors = logits.detach().float()
        return vectors[:, 0] @ vectors[:, 1].T

    def answer_scores(
        self, logits: torch.Tensor, answers: list[Any], places: Optional[torch.Tensor] = None
    ) -> tuple[torch.Tensor, list[Any]]:
        """The score is the cosine of text and item."""
        vectors = nn.functional.normalize(logits.float(), dim=-1)
        similarities = (vectors[:, 0] * vectors[:, 1]).sum(-1)
        return similarities, similarities.tolist()

    def predictions_and_references(
        self, logits: torch.Tensor, labels: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        labelled = labels[:, 0] != -100
        return logits[labelled].float().flatten(1), labels[labelled]


class RetrievalHead(nn.Module):
    """A projection of the pooled text tokens and one of the mean of the item's tokens, and the temperature."""

    def __init__(
        self,
        text_size: int,
        item_size: int,
        embedding_size: int,
        modality: str,
        temperature: float,
        text_pooling: str = "mean",
    ) -> None:
        super().__init__()
        self.pool_text = TEXT_POOLINGS[text_pooling]
        self.modality, self.temperature = modality, temperature
        self.text_projection = nn.Linear(text_size, embedding_size, bias=False)
        self.item_projection = nn.Linear(item_size, embedding_size, bias=False)
        # Not 0-dim, which FSDP cannot shard.
        self.logit_scale = nn.Parameter(torch.tensor([math.log(1 / temperature)], dtype=torch.float32))

    def init_own_parameters(self, std: float) -> None:
        init.constant_(self.logit_scale, math.log(1 / self.temperature))

    def embed_text(self, stream: Stream) -> torch.Tensor:
        return unit_vectors(self.text_projection(self.pool_text(stream.hidden_states, stream.mask)))

    def embed_item(self, stream: Stream) -> torch.Tensor:
        """Of length 1; 0 where there is no item."""
        vectors = unit_vectors(self.item_projection(pooled(stream)))
        return torch.where(stream.present[:, None], vectors, 0)

    def embed(self, encoded: dict[str, Stream], has_text: torch.Tensor) -> dict[str, torch.Tensor]:
        """
        The vectors of texts and items, (batch, embedding_size) float32; NaN where a row lacks them.

        Args:
            has_text: (batch,) bool.
        """
        text, item = self.embed_text(encoded["text"]), encoded.get(self.modality)
        vectors = torch.zeros_like(text) if item is None else self.embed_item(item)
        has_item = torch.zeros_like(text[:, 0], dtype=torch.bool) if item is None else item.present
        return {"text": missing_as_nan(text, has_text), self.modality: missing_as_nan(vectors, has_item)}

    def forward(self, outputs: Any) -> torch.Tensor:
        text = self.embed_text(outputs.encoded["text"])
        stream = outputs.encoded.get(self.modality)
        item = torch.zeros_like(text) if stream is None else self.embed_item(stream)
        log_scale = self.logit_scale.float()
        # The gradient also passes at the bound; otherwise the temperature could not leave it.
        log_scale = log_scale - (log_scale - MAX_LOG_SCALE).clamp(min=0).detach()
        scale = (log_scale / 2).exp()
        return torch.stack([text, item], 1) * scale


def unit_vectors(vectors: torch.Tensor) -> torch.Tensor:
    """Vectors of length 1, in float32, since the epsilon against zero lengths underflows in half precision."""
    return nn.functional.normalize(vectors.float(), dim=-1).to(vectors.dtype)


def check_modality(task: Any) -> None:
    if task.modality not in OTHER_ENCODERS:
        known = " or ".join(map(repr, OTHER_ENCODERS))
        raise ValueError(f"Task {task.name!r}: modality must be {known}, but is {task.modality!r}.")
