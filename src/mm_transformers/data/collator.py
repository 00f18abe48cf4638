"""Rows become batches."""

from collections.abc import Mapping
from typing import Any, Optional

import torch
from transformers.utils import logging

from ..model.configuration_mm_transformer import MMTransformerConfig
from ..model.encoders import max_text_positions, pad_token_matters
from ..model.images import ImageError, image_key, load_image
from ..model.processing_mm_transformer import MMTransformerProcessor, as_image_list
from ..model.task_base import LabelContext, is_null


logger = logging.get_logger(__name__)

# Under this key [`MMTrainer`] writes into each row its number in the data set, so that messages can name it.
ROW_KEY = "__row__"


class MMDataCollator:
    """
    Makes a batch of rows with plain columns: a text, an image, and one column per task.

    Images are read here, in the workers of the data loader if there are any. An image that several rows of the batch
    share, by object, path or bytes, becomes one entry of `pixel_values`. Every task gets labels in every batch; rows
    that lack one get -100 or NaN.

    Args:
        processor ([`MMTransformerProcessor`]): The processor of the model.
        config ([`MMTransformerConfig`]): The config of the model; says which tasks there are.
        text_column (`str`, *optional*, defaults to `"text"`):
            Column of strings (or lists of words). `None` and "" are fine in rows that have an image.
        image_column (`str`, *optional*, defaults to `"image"`):
            Column of images: PIL, path, bytes, array, a cell of `datasets.Image`, a list of those, or `None`.
        on_bad_image (`str`, *optional*, defaults to `"raise"`):
            What to do with an image that cannot be read: `"raise"`, or `"drop"` it as if the row had none. How often
            that happened is in `num_bad_images`. A row that is left without image and text loses its labels too.
        max_length (`int`, *optional*): Longest text in tokens; at most, and by default, what the text encoder takes.
        pad_to_multiple_of (`int`, *optional*): Pads texts to a multiple of this length.

    Raises:
        ValueError: if the tokenizer does not fit the embeddings of the model; when called, one sentence that names
            the row whose text, image or label cannot be used.
    """

    def __init__(
        self,
        processor: MMTransformerProcessor,
        config: MMTransformerConfig,
        text_column: str = "text",
        image_column: str = "image",
        on_bad_image: str = "raise",
        max_length: Optional[int] = None,
        pad_to_multiple_of: Optional[int] = None,
    ):
        if on_bad_image not in ("raise", "drop"):
            raise ValueError(f"on_bad_image must be 'raise' or 'drop', but is {on_bad_image!r}.")
        check_tokenizer(processor.tokenizer, config)
        self.processor = processor
        self.tasks = config.get_tasks()
        self.takes_images = config.vision_config is not None
        self.text_column = text_column
        self.image_column = image_column
        self.on_bad_image = on_bad_image
        limits = [max_length, max_text_positions(config.text_config), processor.tokenizer.model_max_length]
        self.max_length = min(limit for limit in limits if limit is not None)
        self.pad_to_multiple_of = pad_to_multiple_of
        # Shared with the workers of the data loader; each counts in a place of its own, so that none waits.
        self._num_bad_images = torch.zeros(256, dtype=torch.int64).share_memory_()

    @property
    def num_bad_images(self) -> int:
        """How many times an image could not be read and was treated as absent."""
        return int(self._num_bad_images.sum())

    def __setstate__(self, state: dict[str, Any]):
        self.__dict__.update(state)
        self._num_bad_images.share_memory_()  # a copy is not

    def __call__(self, rows: list[Mapping[str, Any]]) -> dict[str, Any]:
        names = [f"row {row[ROW_KEY]:,}" if ROW_KEY in row else f"row {i} of the batch" for i, row in enumerate(rows)]
        images, were_there = self._load_images(rows, names)
        texts = [self._text(row, had, name) for row, had, name in zip(rows, were_there, names, strict=True)]
        # What could not be read has left nothing: such a row has nothing to teach.
        is_empty = [not text.strip() and not image for text, image in zip(texts, images, strict=True)]
        batch = dict(
            self.processor(
                text=texts,
                images=images,
                max_length=self.max_length,
                pad_to_multiple_of=self.pad_to_multiple_of,
                return_word_index=any(task.is_token_level for task in self.tasks.values()),
            )
        )
        context = LabelContext(batch.pop("word_index", None), self.processor.tokenizer)
        if not self.takes_images:
            batch.pop("image_index")
        batch["labels"] = {
            name: task.collate_labels(self._labels(task, rows, texts, names, is_empty), context)
            for name, task in self.tasks.items()
        }
        return batch

    def _load_images(self, rows: list[Mapping[str, Any]], names: list[str]) -> tuple[list[list[Any]], list[bool]]:
        """
        The images of each row, read, and whether it had any. Shared ones are one object. A model of text alone does
        not read any.
        """
        loaded: dict[Any, Any] = {}
        kept = []  # a key may be the id of an object, which is given again once the object is gone
        worker = torch.utils.data.get_worker_info()
        place = 0 if worker is None else 1 + worker.id % (len(self._num_bad_images) - 1)
        result, were_there = [], []
        for row, name in zip(rows, names, strict=True):
            pictures = []
            cells = as_image_list(row.get(self.image_column)) if self.takes_images else []
            for image in cells:
                key = image_key(image)
                kept.append(image)
                if key not in loaded:
                    try:
                        loaded[key] = load_image(image)
                    except ImageError as error:
                        if self.on_bad_image == "raise":
                            raise ImageError(
                                f"{name}, column {self.image_column!r}: {error}; mend or remove it, or pass "
                                "on_bad_image='drop' to treat it as absent."
                            ) from error
                        if self.num_bad_images == 0:
                            logger.warning(f"{name}, column {self.image_column!r}: {error}; treated as absent.")
                        loaded[key] = None
                if loaded[key] is None:
                    self._num_bad_images[place] += 1
                else:
                    pictures.append(loaded[key])
            result.append(pictures)
            were_there.append(len(cells) > 0)
        return result, were_there

    def _text(self, row: Mapping[str, Any], had_image: bool, name: str) -> str:
        if self.text_column not in row:
            columns = ", ".join(repr(column) for column in row if column != ROW_KEY)
            raise ValueError(
                f"{name} has no column {self.text_column!r} (its columns are {columns}); name the column of your texts "
                "by text_column=."
            )
        text = row[self.text_column]
        if isinstance(text, (list, tuple)) and all(isinstance(word, str) for word in text):
            text = " ".join(text)
        if is_null(text):
            text = ""
        if not isinstance(text, str):
            raise ValueError(
                f"{name}, column {self.text_column!r}: expected a text (or a list of words), but got {text!r} of type "
                f"{type(text).__name__}."
            )
        try:
            text.encode()
        except UnicodeEncodeError as error:  # tokenizers would only say that it is no string
            raise ValueError(
                f"{name}, column {self.text_column!r}: the text is not valid Unicode ({error})."
            ) from error
        if not text.strip() and not had_image:
            raise ValueError(f"{name} has neither text nor an image; remove it.")
        return text

    def _labels(
        self, task, rows: list[Mapping[str, Any]], texts: list[str], names: list[str], is_empty: list[bool]
    ) -> list[Any]:
        labels = []
        for row, text, name, empty in zip(rows, texts, names, is_empty, strict=True):
            try:
                labels.append(None if empty else task.encode_label(row.get(task.column), text))
            except ValueError as error:
                raise ValueError(f"{name}, column {task.column!r}: {error}.") from error
        return labels


def check_tokenizer(tokenizer, config: MMTransformerConfig) -> None:
    """
    Raises:
        ValueError: if the tokenizer can give ids for which the text encoder has no embedding, or pads with another id
            than the one from which the text encoder counts positions.
    """
    vocab_size = config.vocab_size
    if config.has_decoder and len(tokenizer) > config.decoder_vocab_size:
        raise ValueError(
            f"The tokenizer has {len(tokenizer):,} tokens, but the decoder can write {config.decoder_vocab_size:,}: "
            "give it a decoder_config with the vocab_size of the tokenizer."
        )
    if len(tokenizer) > vocab_size:
        raise ValueError(
            f"The tokenizer has {len(tokenizer):,} tokens, but the text encoder has embeddings for {vocab_size:,}: "
            "load the processor that belongs to the model, or call model.resize_token_embeddings(len(tokenizer))."
        )
    pad = config.text_config.pad_token_id
    if tokenizer.pad_token_id is None:
        raise ValueError(
            "The tokenizer has no padding token; set one, for example tokenizer.pad_token = tokenizer.eos_token."
        )
    if pad_token_matters(config.text_config) and tokenizer.pad_token_id != pad:
        raise ValueError(
            f"The tokenizer pads with id {tokenizer.pad_token_id}, but the text encoder counts positions from padding "
            f"id {pad}: load the processor that belongs to the model."
        )
