"""What tasks that compare texts with pictures (or sounds) share: which pairs match, vectors, and mismatched pairs."""

import hashlib
from typing import Any, NamedTuple, Optional

import torch

from .fusion_base import Stream
from .fusion_layers import masked_mean
from .modeling_outputs import MMTransformerModelOutput
from .task_base import MAX_EXACT_FLOAT, LabelContext, as_scalar, is_missing, shorten_value


def fingerprint(content: Any) -> int:
    """The same for the same content, in every process: 63 bits of its hash."""
    data = content if isinstance(content, bytes) else str(content).encode()
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "big") >> 1


_TRUTH_VALUES = {"true": True, "1": True, "1.0": True, "false": False, "0": False, "0.0": False}


def read_truth_value(text: str, default: Any) -> Any:
    """The truth value that a text is, in upper or lower case; the default if it is none."""
    return _TRUTH_VALUES.get(text.strip().lower(), default)


def encode_pair(name: str, value: Any) -> Optional[int]:
    """
    The cell of a column of pairs: the group that it names, -1 if it is a pair without a group, `None` if it is none.

    Raises:
        ValueError: if it is neither truth value nor id.
    """
    value = as_scalar(value)
    if is_missing(value) or value is False:
        return None
    if value is True:
        return -1
    if isinstance(value, float) and value.is_integer() and abs(value) <= MAX_EXACT_FLOAT:
        value = int(value)  # tables with empty cells store integers as floats
    if isinstance(value, str):
        value = value.strip()
    if not isinstance(value, (str, int)):
        raise ValueError(
            f"task {name!r}: expected the id of what text and {name} are about, True, False or None, but got "
            f"{shorten_value(value)} of type {type(value).__name__}"
        )
    return fingerprint(value)


def pair_ids(groups: list[Optional[int]], context: LabelContext, modality: str) -> torch.Tensor:
    """(batch, 3) int64: fingerprints of the text, of the item and of the group, -100 in rows that are no pair."""
    rows = []
    texts, items = ((context.fingerprints or {}).get(kind, [None] * len(groups)) for kind in ("text", modality))
    for group, text, item in zip(groups, texts, items, strict=True):
        is_pair = group is not None and text is not None and item is not None
        rows.append([text, item, group] if is_pair else [-100] * 3)
    return torch.tensor(rows, dtype=torch.int64)


class Pairs(NamedTuple):
    """
    Which texts and items of some rows belong together.

    Args:
        texts, items: the different ones, sorted.
        numbers: of each pair, the place of its text times the number of items, plus the place of its item; sorted.
    """

    texts: torch.Tensor
    items: torch.Tensor
    numbers: torch.Tensor

    @classmethod
    def of(cls, ids: torch.Tensor) -> "Pairs":
        """
        A text belongs to an item if some row holds both, or if a row with this text and a row with this item name the
        same group. Nothing more follows: of the rows (a, 1), (a, 2) and (b, 2), the text b does not belong to the
        item 1.

        Args:
            ids (rows, 3): as [`pair_ids`] gives them.
        """
        rows = ids[ids[:, 0] != -100]
        texts, text = rows[:, 0].unique(return_inverse=True)
        items, item = rows[:, 1].unique(return_inverse=True)
        grouped = rows[:, 2] >= 0
        groups, group = rows[grouped, 2].unique(return_inverse=True)
        # Each text of a group with each item of the same group.
        of_texts = torch.stack([group, text[grouped]], 1).unique(dim=0)
        of_items = torch.stack([group, item[grouped]], 1).unique(dim=0)
        counts = torch.bincount(of_items[:, 0], minlength=len(groups))
        repeats = counts[of_texts[:, 0]]
        firsts = (counts.cumsum(0) - counts)[of_texts[:, 0]].repeat_interleave(repeats)
        places = torch.arange(len(firsts), device=ids.device) - (repeats.cumsum(0) - repeats).repeat_interleave(repeats)
        linked = of_texts[:, 1].repeat_interleave(repeats) * len(items) + of_items[firsts + places, 1]
        return cls(texts, items, torch.cat([text * len(items) + item, linked]).unique())

    def hold(self, texts: torch.Tensor, items: torch.Tensor) -> torch.Tensor:
        """Whether texts belong to items, both by fingerprint and of shapes that broadcast: bool."""
        # Of what is not known, any number will do.
        text = torch.searchsorted(self.texts, texts.contiguous())
        return torch.isin(text * len(self.items) + torch.searchsorted(self.items, items.contiguous()), self.numbers)


def matching_pairs(queries: torch.Tensor, keys: torch.Tensor, pairs: Optional[Pairs] = None) -> torch.Tensor:
    """
    Whether the text of one row belongs to the item of another: (rows, others) bool; see [`Pairs.of`].

    Args:
        queries (rows, 3): as [`pair_ids`] gives them; these rows are among `keys`.
        keys (others, 3): the same for all rows.
        pairs ([`Pairs`], *optional*): Those of `keys`, if they are known already.
    """
    pairs = Pairs.of(keys) if pairs is None else pairs
    is_pair = (queries[:, None, 0] != -100) & (keys[None, :, 0] != -100)
    return pairs.hold(queries[:, 0, None], keys[None, :, 1]) & is_pair


def labels_of_pairs_left(labels: torch.Tensor, kept: dict[str, torch.Tensor], modality: str) -> torch.Tensor:
    """A row that modality dropout has taken text or item from is no pair any more."""
    return labels.masked_fill(~(kept["text"] & kept[modality])[:, None], -100)


class PairReading:
    """The part of [`MMTransformerForMultiTask`] that compares texts with pictures (or sounds)."""

    # `config`, `tasks`, `model`, `heads` and `device` are those of the model that this is a part of.
    config: Any
    tasks: dict[str, Any]
    model: Any
    heads: Any

    @torch.no_grad()
    def encode_text(
        self,
        input_ids: torch.Tensor,
        attention_mask: Optional[torch.Tensor] = None,
        task: Optional[str] = None,
        **kwargs,
    ) -> torch.Tensor:
        """
        The vectors of texts, for search: their dot products with those of [`encode_image`] are cosines. Nothing but the
        text encoder runs.

        Args:
            input_ids (`torch.LongTensor` of shape `(num_texts, text_len)`), attention_mask (same shape, *optional*).
            task (`str`, *optional*): Name of a [`Retrieval`] task; may be left out if there is only one.
            kwargs: other inputs of the text encoder, such as `token_type_ids`; what is not for it is ignored.

        Returns:
            (num_texts, embedding_size), of length 1.

        Raises:
            ValueError: if there is no such task.
        """
        name = self._retrieval_task(task, None)
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        inputs = {"token_type_ids": kwargs["token_type_ids"]} if "token_type_ids" in kwargs else {}
        stream = self.model._encode_text(attention_mask, input_ids=input_ids, **inputs)
        return getattr(self.heads, name).embed_text(stream)

    @torch.no_grad()
    def encode_image(
        self,
        pixel_values: torch.Tensor,
        image_index: Optional[torch.Tensor] = None,
        frame_index: Optional[torch.Tensor] = None,
        task: Optional[str] = None,
        **kwargs,
    ) -> torch.Tensor:
        """
        The same for pictures, (num_images, channels, height, width) -> (num_images, embedding_size). Nothing but the
        vision encoder runs. With `image_index` (and `frame_index`, for videos) one vector per row, as the model learns
        them: (batch, embedding_size), 0 where a row has none.
        """
        return self._embed_items("vision", task, {"pixel_values": pixel_values}, image_index, frame_index)

    @torch.no_grad()
    def encode_audio(self, task: Optional[str] = None, **inputs: torch.Tensor) -> torch.Tensor:
        """The same for sounds: `input_values` or `input_features`, `audio_attention_mask` and `audio_index`."""
        wanted = ("input_values", "input_features")
        items: dict[str, torch.Tensor] = {name: inputs[name] for name in wanted if name in inputs}
        if "audio_attention_mask" in inputs:
            items["attention_mask"] = inputs["audio_attention_mask"]
        if not set(items) & set(wanted):
            raise ValueError("encode_audio needs sound: input_values or input_features, as the processor gives them.")
        return self._embed_items("audio", task, items, inputs.get("audio_index"))

    def _embed_items(
        self,
        modality: str,
        task: Optional[str],
        items: dict[str, torch.Tensor],
        index: Optional[torch.Tensor] = None,
        frame_index: Optional[torch.Tensor] = None,
    ) -> torch.Tensor:
        name = self._retrieval_task(task, modality)
        if index is not None:
            rows, _ = self.model._index(modality, index, items, index.shape[0], index.device)
            return getattr(self.heads, name).embed_item(self.model._encode_items(modality, items, rows, frame_index))
        return getattr(self.heads, name).embed_item(Stream(modality, *self.model._tokens(modality, items)[:2]))

    def _retrieval_task(self, task: Optional[str], modality: Optional[str]) -> str:
        known = [
            name
            for name, kind in self.tasks.items()
            if hasattr(getattr(self.heads, name, None), "embed_text") and modality in (None, kind.modality)
        ]
        if task is None and len(known) == 1:
            return known[0]
        if task not in known:
            of = f" of {modality}" if modality else ""
            raise ValueError(f"task must name a Retrieval task{of}, one of {known}, but is {task!r}.")
        return task

    def judge_mismatched(
        self, name: str, outputs: MMTransformerModelOutput, logits: dict[str, torch.Tensor], labels: torch.Tensor
    ) -> torch.Tensor:
        """
        What a [`Matching`] head says of pairs that do not match: each text with the item of another row, and each item
        with the text of another row; (batch, 2), NaN where the batch holds none.

        In training the others are drawn in proportion to the softmax of their similarity, in evaluation the most
        similar are taken (ALBEF, https://arxiv.org/abs/2107.07651, section 3.2). Similarity is that of a [`Retrieval`]
        task of the same modality; without one, all are equally similar (and in evaluation the first is taken).
        """
        modality = self.tasks[name].modality
        if modality not in outputs.encoded:
            return logits[name].new_full((labels.shape[0], 2), torch.nan)
        ids, is_pair = labels[:, 1:], labels[:, 0] == 1
        allowed = ~matching_pairs(ids, ids) & is_pair[:, None] & is_pair[None]
        similarity = torch.zeros(allowed.shape, device=labels.device)
        for other, task in self.tasks.items():
            if task.kind == "retrieval" and task.modality == modality:
                vectors = logits[other].detach().float()
                similarity = vectors[:, 0] @ vectors[:, 1].T
                break
        encoded, head = outputs.encoded, getattr(self.heads, name)
        verdicts = []
        for swapped, scores, may in ((modality, similarity, allowed), ("text", similarity.T, allowed.T)):
            # Where nothing may be chosen, anything is: the verdict is thrown away.
            scores = scores.masked_fill(~may & may.any(1, keepdim=True), -torch.inf)
            chosen = torch.multinomial(scores.softmax(1), 1)[:, 0] if head.training else scores.argmax(1)
            theirs = {swapped: encoded[swapped].of_rows(chosen)}
            verdict = head(self.model.fuse({**encoded, **theirs}))[:, 0]
            verdicts.append(torch.where(may.any(1), verdict, torch.nan))
        return torch.stack(verdicts, 1)


def pooled(stream: Stream) -> torch.Tensor:
    """(batch, width): the mean of the tokens of each row."""
    return masked_mean(stream.hidden_states, stream.mask)
