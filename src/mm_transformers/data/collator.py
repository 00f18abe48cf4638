"""Makes batches of rows."""

import copy
from collections.abc import Callable, Collection, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Optional

import torch
from transformers.utils import logging

from ..model.configuration_mm_transformer import MMTransformerConfig
from ..model.encoders import max_text_positions, pad_token_matters
from ..model.file_contents import is_absent
from ..model.image_size import check_size
from ..model.images import ProcessedPictures
from ..model.label_cells import is_null, shorten_value
from ..model.language_model import longest_prompt
from ..model.modalities import MODALITIES, OTHER_ENCODERS, PARTS, Modality, ReaderContext, modalities_of
from ..model.pairs import fingerprint
from ..model.processing_mm_transformer import MMTransformerProcessor
from ..model.task_base import LabelContext, Task
from ..model.text_tokens import end_id, join_texts
from .addresses import Addresses
from .cells import LABEL_SEPARATOR, label_of
from .feature_keys import digest_of, hash_of_text
from .feature_reading import CachedFeatures, CachedItem, unpadded_texts
from .media import MediaColumn, RowColumns, SharedCounter, check_on_bad_file
from .row_labels import as_columns
from .sources import ANY_SOURCE, ROW_KEY, SOURCE_KEY, count_rows, name_of_row, own_column


logger = logging.get_logger(__name__)


class MMDataCollator:
    """
    Makes a batch of rows with plain columns: a text, images, a video, sound, and one column per task.

    Columns of numbers and categories are read by their names in `config.table_config`.

    Files are read here, in the workers of the data loader if there are any. An image that several rows of the batch
    share, by object, path or bytes, becomes one entry of `pixel_values`. Sounds are shared in the same way. Every task
    gets labels in every batch; missing labels are -100 or NaN.

    Args:
        processor ([`MMTransformerProcessor`]): The processor of the model.
        config ([`MMTransformerConfig`]): The config of the model, with its tasks.
        text_column (`str` or `list[str]`, *optional*, defaults to `"text"`):
            Column of strings (or lists of words). `None` and "" are allowed in rows with another input. The texts of
            several columns become one, each with the name of its column before it. With `text_column=None`, no row has
            a text.
        image_column (`str` or `list[str]`, *optional*, defaults to `"image"`):
            Column of images: PIL, path, bytes, array, a cell of `datasets.Image`, a list of those, or `None`. The
            images of several columns come one after the other, in the order of the columns.
        video_column (`str`, *optional*, defaults to `"video"`):
            Column of videos: path, bytes, a cell of `datasets.Video`, the frames as a list or array, or `None`.
        audio_column (`str` or `list[str]`, *optional*, defaults to `"audio"`):
            Column of sounds: path, bytes, array, a cell of `datasets.Audio`, a list of those, or `None`; or several.
        sampling_rate (`int`, *optional*): The rate, in Hz, of sounds that are arrays without one.
        on_bad_file (`str`, *optional*, defaults to `"raise"`):
            The reaction to an image, a video or a sound that cannot be read: `"raise"` an error, or `"drop"` the item.
            `num_bad_files` counts dropped items. A row without any remaining input loses its labels too.
        max_length (`int`, *optional*): Longest text in tokens; at most, and by default, the limit of the text encoder.
            With `fusion_type="prefix"`, choose it so that the tokens of pictures and other inputs have room, too.
        pad_to_multiple_of (`int`, *optional*): Pads texts to a multiple of this length.
        label_separator (`str`, *optional*, defaults to `"|"`):
            The text between the labels of a cell that holds several as one text, and not as a list (`["a", "b"]`).
        allow_urls (`bool` or `list[str]`, *optional*, defaults to `False`):
            Whether addresses in cells are fetched. `True` allows http(s) addresses of the public Internet and stores
            such as `hf://`. A list allows only its hosts, which may be private, and its stores (`"hf://"`). Without
            permission, a cell with an address is a bad file.
        columns: the columns of modalities of your own, such as `sensor_column="sensor"`.

    [`~mm_transformers.set_limits`] sets how large a picture, a sound, a video or a text may be.

    [`MMTrainer`] reads the features of a `datasets.Dataset`: ids of a `ClassLabel` become its names. Rows without their
    data set, as from the plain `Trainer`, have no features: there a number is an id of the task.

    Raises:
        ValueError: if the tokenizer does not fit the embeddings of the model. When called, one sentence that names the
            row whose text, image, video, sound or label cannot be used.

    Example:

    ```python
    >>> collator = MMDataCollator(processor, model.config)
    >>> batch = collator([{"text": "Lovely weather!", "image": "rain.jpg", "sentiment": "negative"}])
    >>> batch["labels"]["sentiment"]
    tensor([0])
    ```
    """

    def __init__(
        self,
        processor: MMTransformerProcessor,
        config: MMTransformerConfig,
        text_column: Optional[str | Sequence[str]] = "text",
        image_column: str | Sequence[str] = "image",
        video_column: str = "video",
        audio_column: str | Sequence[str] = "audio",
        sampling_rate: Optional[int] = None,
        on_bad_file: str = "raise",
        max_length: Optional[int] = None,
        pad_to_multiple_of: Optional[int] = None,
        label_separator: str = LABEL_SEPARATOR,
        allow_urls: bool | Collection[str] = False,
        **columns: Any,
    ):
        check_on_bad_file(on_bad_file)
        for name, number in (("max_length", max_length), ("pad_to_multiple_of", pad_to_multiple_of)):
            if number is not None and number < 1:
                raise ValueError(f"{name} must be at least 1, but is {number}.")
        check_tokenizer(processor.tokenizer, config)
        if config.frame_embedding == "learned" and processor.num_frames > config.num_frames:
            raise ValueError(
                f"The processor takes {processor.num_frames} frames of a video, but the model has learned frame "
                f"vectors for only {config.num_frames}: set processor.num_frames = {config.num_frames}."
            )
        self.processor = processor
        self.tasks = config.get_tasks()
        self.takes_images = config.vision_config is not None
        self.continues_texts = config.has_language_model
        self.text_column = text_column if config.reads_text else None
        self.text_columns = as_columns(self.text_column)
        if len(self.text_columns) > 1 and any(task.is_token_level for task in self.tasks.values()):
            raise ValueError(
                f"A task that labels words needs one column of texts, but there are {len(self.text_columns)}: "
                f"{', '.join(self.text_columns)}."
            )
        self._num_bad_files = SharedCounter()
        addresses = Addresses(allow_urls)
        rules = (on_bad_file, self._num_bad_files, addresses)
        columns |= {"image_column": image_column, "video_column": video_column, "audio_column": audio_column}
        unknown = [name for name in columns if name.removesuffix("_column") not in PARTS or "_column" not in name]
        if unknown:
            raise TypeError(f"MMDataCollator takes no argument {unknown[0]!r}.")
        # By the argument of the processor. Inputs that the model does not take are not read.
        self.media: dict[str, MediaColumn] = {}
        # Likewise, modalities with several columns each.
        self.tables: dict[str, RowColumns] = {}
        context = ReaderContext(processor, addresses.fetch, sampling_rate)
        for modality in MODALITIES.values():
            name = modality.encoder.name
            if name not in config.modalities:
                continue
            if name == "vision":
                check_size(config.vision_config, processor.image_processor)
            if modality.encoder.own is not None:
                check_own_config(processor, config, name)
            if modality.columns is not None:
                own_columns = modality.columns(getattr(config, f"{name}_config"))
                self.tables[modality.argument] = RowColumns(own_columns, modality, modality.reader(context))
            else:
                own_names = as_columns(columns.get(f"{modality.name}_column", modality.name))
                check_media_columns(modality, own_names)
                self.media[modality.argument] = MediaColumn(
                    own_names, modality, modality.reader(context), *rules, process=self._process
                )
        positions = max_text_positions(config.text_config)
        limits = [max_length, positions, longest_prompt(config), processor.tokenizer.model_max_length]
        self.max_length = min(limit for limit in limits if limit is not None)
        if config.reads_jointly and not config.fusion_layers_every and max_length is None and positions is not None:
            logger.warning_once(
                f"fusion_type={config.fusion_type!r}: a text may have {self.max_length} of the {positions} positions "
                "of the text encoder, which leaves no room for the other inputs before it. If your texts are long, "
                "pass a smaller max_length: as many less as the other inputs of a row have tokens."
            )
        self.pad_to_multiple_of, self.label_separator = pad_to_multiple_of, label_separator
        self.gives_references = self.gives_word_index = self.takes_empty_rows = False
        # Set by [`FeatureCache.prepare`]: the stored features of frozen encoders.
        self.cached: Optional[CachedFeatures] = None
        self.uncached: MMDataCollator = self  # the original of this copy

    @property
    def num_bad_files(self) -> int:
        """How many times an image, a video or a sound could not be read and was treated as absent."""
        return int(self._num_bad_files)

    @property
    def input_columns(self) -> list[str]:
        """The columns that hold inputs of the model: texts, then images and the like, then numbers and categories."""
        return [
            *self.text_columns,
            *(column for name in (*self.media, *self.tables) for column in self.columns_of(name)),
        ]

    def columns_of(self, argument: str) -> list[str]:
        """The columns of a modality, by the argument of the processor; none if the model does not read it."""
        if argument in self.tables:
            return self.tables[argument].columns
        return self.media[argument].columns if argument in self.media else []

    @property
    def splitters(self) -> dict[str, Callable[[Any], list[Any]]]:
        """Each column of images, videos or sounds -> the function that splits one of its cells into items."""
        return {name: column.split for column in self.media.values() for name in column.columns}

    def has_other_input(self, row: Mapping[str, Any]) -> bool:
        """Whether a row has a cell that is not empty, beside its text."""
        in_media = any(column.cells(row) for column in self.media.values())
        return in_media or any(not is_absent(row.get(c)) for table in self.tables.values() for c in table.columns)

    def with_references(self) -> "MMDataCollator":
        """
        A copy that also gives `references`: from task to what metrics compare with, if the labels do not hold it.

        These are the reference texts of tasks that write. They are no input of the model.
        """
        collator = copy.copy(self)
        collator.gives_references = True
        return collator

    def with_word_index(self) -> "MMDataCollator":
        """A copy that also gives `word_index` (batch, text_len) for [`Task.decode`], if a task labels words."""
        collator = copy.copy(self)
        collator.gives_word_index = True
        return collator

    def with_empty_rows(self) -> "MMDataCollator":
        """
        A copy that takes rows without any content, and gives `has_content` (batch,).

        A row whose only files could not be read, and are dropped, has no content either.
        """
        collator = copy.copy(self)
        collator.takes_empty_rows = True
        return collator

    def __call__(self, rows: list[Mapping[str, Any]]) -> dict[str, Any]:
        names = [name_of_row(row, i) for i, row in enumerate(rows)]
        media: dict[str, Any] = {}
        had_any, has_any = [False] * len(rows), [False] * len(rows)
        columns: dict[str, MediaColumn | RowColumns] = {**self.media, **self.tables}
        for name, column in columns.items():
            media[name], were_there = column.read(rows, names)
            had_any = [a or b for a, b in zip(had_any, were_there, strict=True)]
            has_any = [a or bool(b) for a, b in zip(has_any, media[name], strict=True)]
        texts = [self.text_of(row, had, name) for row, had, name in zip(rows, had_any, names, strict=True)]
        # A row whose only inputs could not be read has nothing to learn from.
        is_empty = [not text.strip() and not has for text, has in zip(texts, has_any, strict=True)]
        for name in media:
            if MODALITIES[name].is_single:  # one per row
                media[name] = [row[0] if row else None for row in media[name]]
        batch = dict(
            self.processor(
                text=texts,
                **{
                    name: items for name, items in media.items() if self.cached is None or name not in self.cached.kinds
                },
                max_length=self.max_length,
                pad_to_multiple_of=self.pad_to_multiple_of,
                return_word_index=any(task.is_token_level for task in self.tasks.values()),
            )
        )
        if self.cached is not None:
            self.cached.fill(batch, media, names)
        fingerprints = self._fingerprints(texts, batch, media)
        prompts = texts if self.continues_texts else None
        context = LabelContext(batch.pop("word_index", None), self.processor.tokenizer, fingerprints, prompts)
        if not self.takes_images:
            batch.pop("image_index")
        values = {name: self._labels(task, rows, texts, names, is_empty) for name, task in self.tasks.items()}
        batch["labels"] = {name: task.collate_labels(values[name], context) for name, task in self.tasks.items()}
        if self.gives_word_index and context.word_index is not None:
            batch["word_index"] = context.word_index
        if self.takes_empty_rows:
            batch["has_content"] = ~torch.tensor(is_empty, dtype=torch.bool)
        if self.gives_references:
            found = {name: task.encode_references(values[name]) for name, task in self.tasks.items()}
            if any(value is not None for value in found.values()):
                batch["references"] = {name: value for name, value in found.items() if value is not None}
        batch.update(count_rows(rows))
        return batch

    def _fingerprints(
        self, texts: list[str], batch: dict[str, Any], media: dict[str, Any]
    ) -> Optional[dict[str, list[Optional[int]]]]:
        """Hashes of the model inputs: the ids of tokens; pixels and their size; samples."""
        if not any(task.compares_rows for task in self.tasks.values()):
            return None
        inputs = zip(texts, unpadded_texts(batch), strict=True)
        result = {"text": [fingerprint(hash_of_text(ids)) if text.strip() and ids else None for text, ids in inputs]}
        known: dict[int, bytes] = {}  # shared items are one object
        for modality in OTHER_ENCODERS:
            columns = [media[part.argument] for part in modalities_of(modality) if part.argument in media]
            rows = [[item for cell in cells for item in _items(cell)] for cells in zip(*columns, strict=True)]
            for item in (item for row in rows for item in row):
                if id(item) not in known:
                    has_digest = isinstance(item, (CachedItem, ProcessedPictures))
                    known[id(item)] = item.digest if has_digest else digest_of(item)
            result[modality] = [fingerprint(b"".join(known[id(x)] for x in row)) if row else None for row in rows]
        return {modality: rows or [None] * len(texts) for modality, rows in result.items()}

    def _process(self, item: Any) -> Any:
        """A picture or the frames of a video as the image processor resizes them."""
        pictures = item if isinstance(item, list) else [item]
        digest = b"".join(map(digest_of, pictures))
        return ProcessedPictures(self.processor.process_pictures(pictures), digest)

    def text_of(self, row: Mapping[str, Any], had_other: bool, name: str) -> str:
        """
        The text of a row, "" if it has none.

        Args:
            had_other: whether the row has another input.
            name: the name of the row in messages.
        """
        text = join_texts({column: self._text(row, column, name) for column in self.text_columns} or {"": ""})
        if not text.strip() and not had_other and not self.takes_empty_rows:
            raise ValueError(f"{name} has no content in {self.shown_inputs(row)}: remove the row.")
        return text

    def _text(self, row: Mapping[str, Any], column: str, name: str) -> str:
        if column not in row:
            columns = ", ".join(repr(column) for column in row if column not in (ROW_KEY, SOURCE_KEY))
            raise ValueError(
                f"{name} has no column {column!r} (its columns are {columns}); name the column of your texts by "
                "text_column=."
            )
        text = row[column]
        if getattr(text, "ndim", 0) == 1:
            text = text.tolist()
        if isinstance(text, (list, tuple)) and all(isinstance(word, str) for word in text):
            text = " ".join(text)
        if is_null(text):
            text = ""
        if not isinstance(text, str):
            raise ValueError(
                f"{name}, column {own_column(row, column)!r}: expected a text (or a list of words), but got "
                f"{shorten_value(text)} of type {type(text).__name__}."
            )
        try:
            text.encode()
        except UnicodeEncodeError as error:  # the error of tokenizers would only be "no string"
            raise ValueError(
                f"{name}, column {own_column(row, column)!r}: the text is not valid Unicode ({error})."
            ) from error
        return text

    def shown_inputs(self, row: Mapping[str, Any] = MappingProxyType({})) -> str:
        """The columns that the model reads, for messages; of many, the first ones."""
        columns = [repr(own_column(row, column)) for column in self.input_columns]
        return ", ".join([*columns[:20], *(["..."] if len(columns) > 20 else [])])

    def _labels(
        self, task: Task, rows: list[Mapping[str, Any]], texts: list[str], names: list[str], is_empty: list[bool]
    ) -> list[Any]:
        labels, column = [], task.column or task.name
        for row, text, name, empty in zip(rows, texts, names, is_empty, strict=True):
            unlabelled = empty or not row.get(SOURCE_KEY, ANY_SOURCE).labels(task.name)
            try:
                cell = row.get(column, task.default_cell)
                labels.append(None if unlabelled else label_of(task, cell, text, self.label_separator))
            except ValueError as error:
                raise ValueError(f"{name}, column {own_column(row, column)!r}: {error}.") from None
        return labels


def _items(cell: Any) -> list[Any]:
    return [cell] if isinstance(cell, ProcessedPictures) else cell or []


def check_media_columns(modality: Modality, columns: list[str]) -> None:
    """
    Checks the columns of a modality.

    Raises:
        ValueError: if there are several, but a row has one item; or if one is named twice.
    """
    if len(columns) > 1 and modality.is_single:
        raise ValueError(
            f"A row has one {modality.noun}, but {modality.name}_column names {len(columns)} columns: "
            f"{', '.join(columns)}. Name one of them."
        )
    if not columns or len(set(columns)) < len(columns):
        raise ValueError(f"{modality.name}_column must name different columns, but is {columns!r}.")


def check_own_config(processor: MMTransformerProcessor, config: MMTransformerConfig, name: str) -> None:
    """
    Checks that processor and model have the same config of an encoder that transformers lacks.

    Args:
        name: of the encoder, such as "table".

    Raises:
        ValueError: if the processor has none, or another one.
    """
    field = f"{name}_config"
    mine, wanted = getattr(processor, field, None), getattr(config, field)
    if mine is None or _own_fields(mine) != _own_fields(wanted):
        what = f"no {field}, unlike the model" if mine is None else f"another {field} than the model"
        raise ValueError(
            f"The processor has {what}: load the processor that belongs to the model, or make both "
            f"by from_encoders(..., {name}=...) with the same value."
        )


def _own_fields(config: Any) -> dict[str, Any]:
    """The fields of a config without those that loading and saving change."""
    changed = ("dtype", "transformers_version", "architectures")
    values = config.to_diff_dict()
    return {name: value for name, value in values.items() if name not in changed and not name.startswith("_")}


def check_tokenizer(tokenizer: Any, config: MMTransformerConfig) -> None:
    """
    Checks that the tokenizer fits the text encoder.

    Raises:
        ValueError: if the tokenizer can give ids that are outside the embedding of the text encoder. Or if its padding
            id differs from the one from which the text encoder counts positions.
    """
    vocab_size = config.vocab_size
    if config.has_decoder and len(tokenizer) > config.decoder_vocab_size:
        raise ValueError(
            f"The tokenizer has {len(tokenizer):,} tokens, but the decoder can write {config.decoder_vocab_size:,}: "
            "give it a decoder_config with the vocab_size of the tokenizer."
        )
    for task in (task for task in config.get_tasks().values() if task.needs_decoder):
        _check_writing(task, tokenizer, config)
    if len(tokenizer) > vocab_size:
        raise ValueError(
            f"The tokenizer has {len(tokenizer):,} tokens, but the text encoder has embeddings for {vocab_size:,}: "
            "load the processor that belongs to the model, or call model.resize_token_embeddings(len(tokenizer))."
        )
    pad = getattr(config.text_config, "pad_token_id", None)
    if tokenizer.pad_token_id is None:
        raise ValueError(
            "The tokenizer has no padding token; set one, for example tokenizer.pad_token = tokenizer.eos_token."
        )
    if pad_token_matters(config.text_config) and tokenizer.pad_token_id != pad:
        raise ValueError(
            f"The tokenizer pads with id {tokenizer.pad_token_id}, but the text encoder counts positions from padding "
            f"id {pad}: load the processor that belongs to the model."
        )


def _check_writing(task: Any, tokenizer: Any, config: MMTransformerConfig) -> None:
    decoder = config.decoder_config if config.decoder_config is not None else config.text_config
    if task.decoder_start_ids is not None and max(task.decoder_start_ids) >= config.decoder_vocab_size:
        raise ValueError(
            f"Task {task.name!r}: decoder_start_ids holds {max(task.decoder_start_ids)}, but the decoder knows "
            f"{config.decoder_vocab_size:,} tokens."
        )
    forced = getattr(decoder, "forced_bos_token_id", None)
    if hasattr(tokenizer, "tgt_lang") and task.decoder_start_ids is None and forced is None:
        raise ValueError(
            f"Task {task.name!r}: {type(tokenizer).__name__} is for several languages. Choose the language to write "
            "by Generation(..., decoder_start_ids=[start token, language code]), as the pretrained model expects "
            "them."
        )
    end = end_id(tokenizer)
    if config.has_language_model:
        if end is not None and tokenizer("a")["input_ids"][-1:] == [end]:
            raise ValueError(
                f"Task {task.name!r}: the tokenizer ends every text with {tokenizer.decode([end])!r}, after which a "
                "language model writes nothing: set tokenizer.add_eos_token = False, or remove it from the "
                "post-processor of the tokenizer."
            )
        return  # where generation stops is in the generation config of the model
    stops = decoder.eos_token_id if isinstance(decoder.eos_token_id, (list, tuple)) else [decoder.eos_token_id]
    if end is not None and end not in stops and (config.decoder_config is not None or stops != [None]):
        raise ValueError(
            f"Task {task.name!r}: the tokenizer ends a text with id {end}, but the decoder stops at "
            f"{decoder.eos_token_id}, so generation would never stop: set eos_token_id={end} in the config of the "
            "decoder."
        )
