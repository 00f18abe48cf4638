"""Converts texts, images, videos and sound into the tensors of the model."""

import contextlib
import difflib
import functools
import inspect
import numbers
import os
import sys
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Optional, TypedDict

import torch
from transformers import AutoFeatureExtractor, AutoTokenizer, BatchFeature, ProcessorMixin

# Not from the top: there, transformers 5.17 wants torchvision for it.
from transformers.models.auto.image_processing_auto import AutoImageProcessor
from transformers.processing_utils import AudioKwargs, ImagesKwargs, ProcessingKwargs, TextKwargs
from transformers.utils import logging

from .audio import AudioError, audio_key, load_audio
from .chats import MESSAGES, without_chat
from .configuration_mm_transformer import resolve_own
from .custom_code import reference, write_code
from .decoders import is_language_model
from .downloads import fetch
from .encoders import encoder_config_from_pretrained, max_text_positions
from .file_contents import describe, is_absent
from .image_size import set_size
from .images import ProcessedPictures, image_key, num_pixels, pixels_for_each
from .label_cells import is_null
from .limits import limits, named
from .messages import check_folder, one_line, shortened
from .modalities import (
    ARGUMENTS,
    ENCODERS,
    IMAGE,
    MODALITIES,
    PARTS,
    Modality,
    ReaderContext,
    as_clips,
    as_list,
    own_encoders,
    own_modalities,
)
from .no_text import tokenizer_without_words
from .safe_writing import saved_aside
from .table import TableConfig
from .task_token_classification import index_words
from .text_tokens import join_texts, needed_text, tokenize
from .video import load_frames, video_key


logger = logging.get_logger(__name__)

# In seconds: the window of all the usual audio encoders, of waveforms and of spectrograms alike.
SHORTEST_CLIP = 0.025


# Options that the rows of a batch, and the places of words in them, depend on.
FIXED_OPTIONS = {
    "return_tensors": "pt",
    "return_attention_mask": True,
    "return_overflowing_tokens": False,
    "return_offsets_mapping": False,
}


class MMTransformerTextKwargs(TextKwargs, total=False):  # type: ignore[call-arg]
    return_word_index: bool


class MMTransformerVideosKwargs(TypedDict, total=False):
    num_frames: int
    do_sample_frames: bool


def _read_part(what: str, auto_class: Any, path: Any, **kwargs: Any) -> Any:
    """
    A part of a processor.

    Raises:
        OSError: one sentence, if its files are missing or damaged.
        ValueError: as transformers does, if there is none.
    """
    # Without a word of the person, transformers would ask one at the keyboard.
    kwargs.setdefault("trust_remote_code", False)
    try:
        part = auto_class.from_pretrained(path, **kwargs)
        _check_settings(part)
        _check_size(part, path)
        return part
    except (ImportError, OSError, ValueError) as error:
        if "trust_remote_code" in str(error):
            raise ValueError(
                f"The {what} in {os.fspath(path)!r} has custom code, which is not run; pass trust_remote_code=True "
                "if you trust it."
            ) from error
        # Of the two latter, those of JSON say nothing of the file.
        if "Unrecognized" in str(error):
            raise ValueError(one_line(error)) from error  # transformers lists all types of models
        if not isinstance(error, ValueError) or not os.path.isdir(path):
            raise
        cause: Exception = error
    except Exception as error:  # any error of a tokenizer about a truncated file
        cause = error
    raise OSError(
        f"The {what} in {os.fspath(path)!r} cannot be read, so one of its files is missing or damaged: "
        f"{one_line(cause)}"
    ) from cause


class MMTransformerProcessorKwargs(ProcessingKwargs, total=False):  # type: ignore[call-arg]
    """The options of a call, by modality."""

    _defaults = {}  # type: ignore[var-annotated]  # transformers 5.17 needs it
    text_kwargs: MMTransformerTextKwargs
    images_kwargs: ImagesKwargs
    videos_kwargs: MMTransformerVideosKwargs
    audio_kwargs: AudioKwargs


# Settings that this package itself uses, and that transformers does not check.
_IS_RIGHT: dict[str, Callable[[Any], bool]] = {
    "model_max_length": lambda value: _is_number(value),
    "sampling_rate": lambda value: _is_number(value),
    "max_length": lambda value: value is None or _is_number(value),
    "n_samples": lambda value: value is None or _is_number(value),
    "padding_side": lambda value: value in ("left", "right"),
    "truncation_side": lambda value: value in ("left", "right"),
}


def _is_number(value: Any) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool) and value > 0


def _check_settings(part: Any) -> None:
    """
    Checks the settings of the parts of a processor.

    Raises:
        ValueError: if a setting of a tokenizer or a feature extractor is of another type.
    """
    for name, is_right in _IS_RIGHT.items():
        if hasattr(part, name) and not is_right(value := getattr(part, name)):
            raise ValueError(f"its setting {name} cannot be {shortened(value)}")
    # The window of an audio encoder, in samples or in frames of 10 ms; shorter sounds are padded to it.
    rate = getattr(part, "sampling_rate", None) or 0
    windows = {"n_samples": rate, "max_length": 100} if hasattr(part, "sampling_rate") else {}
    for name, per_second in windows.items():
        value = getattr(part, name, None)
        if value is not None and value > limits().audio_seconds * per_second:
            raise ValueError(f"its setting {name}={shortened(value)} is longer than {named('audio_seconds')}")


def _check_size(image_processor: Any, path: Any) -> None:
    """
    Checks the size of the pictures that an image processor makes.

    Raises:
        ValueError: if an image processor makes pictures larger than those that are kept in memory.
    """
    for option in ("size", "crop_size", "pad_size"):
        size = getattr(image_processor, option, None)
        size = {name: value for name, value in dict(size).items() if isinstance(value, (int, float))} if size else {}
        # A longest edge beside a shortest one is a bound of it, and of some processors a number of pixels.
        side = size.get("shortest_edge", size.get("longest_edge", 0))
        if max(side * side, size.get("height", 0) * size.get("width", 0)) > limits().kept_image_pixels:
            raise ValueError(
                f"The image processor in {os.fspath(path)!r} has the {option} {size}, larger than "
                f"{named('kept_image_pixels')}."
            )


class MMTransformerProcessor(ProcessorMixin):
    r"""
    Prepares texts with any number of images, a video and any number of clips of sound each.

    It consists of a tokenizer, an image processor and a feature extractor.

    Args:
        image_processor (`BaseImageProcessor`, *optional*): That of the vision encoder; `None` without one.
        tokenizer (`PreTrainedTokenizerBase`): That of the text encoder.
        feature_extractor (`SequenceFeatureExtractor`, *optional*): That of the audio encoder.
        num_frames (`int`, *optional*, defaults to 8): The largest number of frames of a video.
        reads_text (`bool`, *optional*, defaults to `True`): Whether rows may have a text, as in the config.
        table_config ([`TableConfig`], *optional*):
            The columns of numbers and categories, as in the config of the model. A modality of your own has an argument
            `{encoder}_config`, too.
        input_columns (`dict[str, list[str]]`, *optional*):
            The columns of the training table by key of a row, such as `{"text": ["title", "body"], "image":
            ["photo"]}`. Rows of the pipeline may have these keys, too.

    Example:

    ```python
    >>> processor = MMTransformerProcessor.from_encoders(
    ...     text="distilbert/distilbert-base-uncased", vision="google/vit-base-patch16-224-in21k"
    ... )
    >>> inputs = processor(text=["Lovely weather!", "No picture here."], images=["rain.jpg", None])
    >>> inputs["image_index"]
    tensor([[ 0],
            [-1]])
    ```
    """

    image_processor: Any = None
    feature_extractor: Any = None
    valid_processor_kwargs = MMTransformerProcessorKwargs

    # The columns of numbers and categories; set by `table_config`.
    table_config: Optional[TableConfig] = None

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        feature_extractor: Any = None,
        num_frames: int = 8,
        reads_text: bool = True,
        input_columns: Optional[Mapping[str, Sequence[str]]] = None,
        **kwargs: Any,
    ) -> None:
        for name in own_encoders():
            config = resolve_own(kwargs.pop(f"{name}_config", None), name)
            if config is not None:
                setattr(self, f"{name}_config", config)
        parts = {"image_processor": image_processor, "tokenizer": tokenizer, "feature_extractor": feature_extractor}
        parts = {name: part for name, part in parts.items() if part is not None}
        # The base class has no optional parts; this object has the given ones.
        self.get_attributes: Any = functools.partial(list, parts)
        super().__init__(**parts, **kwargs)
        if isinstance(num_frames, bool) or not isinstance(num_frames, numbers.Integral) or num_frames < 1:
            raise ValueError(f"num_frames must be a whole number above 0, but is {shortened(num_frames)}.")
        self.num_frames: int = int(num_frames)
        self.reads_text: bool = bool(reads_text)
        self.input_columns: dict[str, list[str]] = _checked_columns(input_columns or {})
        self._warned: set[str] = set()

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike[str], **kwargs: Any
    ) -> "MMTransformerProcessor":
        """
        As [`~transformers.ProcessorMixin.from_pretrained`].

        Raises:
            OSError: if there is no processor.
        """
        num_frames = kwargs.pop("num_frames", None)
        check_folder(pretrained_model_name_or_path)
        try:
            saved, _ = cls.get_processor_dict(pretrained_model_name_or_path, **kwargs)
            saved = dict(saved)
        except (AttributeError, RecursionError, TypeError, ValueError) as error:
            raise OSError(
                f"processor_config.json of {str(pretrained_model_name_or_path)!r} is damaged: {one_line(error)}"
            ) from error
        try:
            parts = {"tokenizer": _read_part("tokenizer", AutoTokenizer, pretrained_model_name_or_path, **kwargs)}
        except ValueError as error:
            if saved:
                raise
            raise OSError(
                f"{pretrained_model_name_or_path} holds no processor; save it next to the model by "
                "processor.save_pretrained(...), or push it by processor.push_to_hub(...)."
            ) from error
        for name, auto_class in (("image_processor", AutoImageProcessor), ("feature_extractor", AutoFeatureExtractor)):
            if not saved or name in saved:
                what = name.replace("_", " ")
                parts[name] = _read_part(what, auto_class, pretrained_model_name_or_path, **kwargs)
        if num_frames is None:
            num_frames = (saved or {}).get("num_frames", 8)
        own = {field: saved.get(field) for field in (f"{name}_config" for name in own_encoders())}
        own |= {"reads_text": saved.get("reads_text", True), "input_columns": saved.get("input_columns")}
        return cls(**parts, num_frames=num_frames, **own)

    def to_dict(self) -> dict[str, Any]:
        values = super().to_dict()
        if self.reads_text:
            values.pop("reads_text", None)
        if not self.input_columns:
            values.pop("input_columns", None)
        return {**values, **{f"{name}_config": config.to_diff_dict() for name, config in self.own_configs.items()}}

    @property
    def own_configs(self) -> dict[str, Any]:
        """The configs of the encoders that transformers lacks, by name."""
        found = {name: getattr(self, f"{name}_config", None) for name in own_encoders()}
        return {name: config for name, config in found.items() if config is not None}

    @property
    def table_columns(self) -> list[str]:
        """The columns of a row that are numbers and categories; none without `table_config`."""
        return [] if self.table_config is None else self.table_config.names

    @property
    def row_keys(self) -> list[str]:
        """The keys of a row that this processor reads: "text", "image", ..., and the columns of a table."""
        names = [name for name in ARGUMENTS if name != "text" or self.reads_text]
        columns = [column for column in self._known_columns if column not in names]
        if getattr(self.tokenizer, "chat_template", None) and MESSAGES not in columns:
            names.append(MESSAGES)
        return [*names, *columns]

    @property
    def _known_columns(self) -> list[str]:
        """The columns of a row whose names the processor knows."""
        configs = self.own_configs
        several = [
            m.columns(configs[m.encoder.name]) for m in MODALITIES.values() if m.columns and m.encoder.name in configs
        ]
        return [column for columns in (*self.input_columns.values(), *several) for column in columns]

    @property
    def _takes_chats(self) -> bool:
        """Whether "messages" is a chat, and no column of the training table."""
        return MESSAGES not in self._known_columns

    @property
    def column_arguments(self) -> dict[str, list[str]]:
        """The columns of the training table, as arguments of [`MMDataCollator`]: `{"image_column": ["photo"]}`."""
        return {f"{key}_column": list(columns) for key, columns in self.input_columns.items()}

    def with_keys(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """
        A row with the keys "text", "image" and the like instead of the columns of the training table.

        Example:

        ```python
        >>> processor.input_columns = {"text": ["title", "body"]}
        >>> processor.with_keys({"title": "Old chair", "body": "Made of oak."})
        {'text': 'title: Old chair\\nbody: Made of oak.'}
        ```
        """
        row = self.without_chat(row) if MESSAGES in row and self._takes_chats else dict(row)
        for key, columns in self.input_columns.items():
            # A column may be called as the key: then it is one of the columns, and not all of them.
            cells = {column: row.pop(column) for column in columns if column in row}
            if key in row or not cells:
                continue
            if key == "text":
                texts = {column: "" if is_null(cell) else str(cell) for column, cell in cells.items()}
                row[key] = join_texts(texts, len(columns))
            elif len(columns) == 1:
                [row[key]] = cells.values()
            else:
                row[key] = [item for cell in cells.values() for item in PARTS[key].items(cell)] or None
        return row

    def without_chat(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """
        A row with "text", "image" and the like instead of "messages", by the chat template of the tokenizer.

        The pipeline does this itself. For training rows: `data.map(processor.without_chat)`.

        Args:
            row: `{"messages": [{"role": "user", "content": ...}]}`. The content is a text, or a list of parts as in
                transformers: `{"type": "text", "text": ...}`, `{"type": "image", "image": ...}`.

        Raises:
            ValueError: one sentence, if the tokenizer has no chat template, or the messages have another form.

        Example:

        ```python
        >>> row = processor.without_chat({"title": "Old chair"})  # unchanged, since it has no messages
        ```
        """
        return without_chat(self.tokenizer, row)

    def cells_of(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """
        The cells of a row, by the argument of the processor that takes them.

        Example:

        ```python
        >>> processor.cells_of({"text": "Lovely weather!", "image": None})
        {'text': 'Lovely weather!', 'image': None}
        ```
        """
        configs, cells = self.own_configs, {"text": row.get("text")}
        for argument, modality in MODALITIES.items():
            if modality.columns is None:
                cells[argument] = row.get(modality.name)
            elif modality.encoder.name in configs:
                cells[argument] = modality.cell(row, configs[modality.encoder.name]) or None
        return cells

    def save_pretrained(
        self, save_directory: str | os.PathLike[str], push_to_hub: bool = False, **kwargs: Any
    ) -> list[str]:
        """
        As [`~transformers.ProcessorMixin.save_pretrained`], and copies the code of the processor into the folder.

        So it can be loaded with `trust_remote_code=True` without this package.
        """
        with saved_aside(save_directory) as staged:
            saved = super().save_pretrained(staged, **({} if push_to_hub else kwargs))
            auto_map = {"AutoProcessor": reference(MMTransformerProcessor)}
            write_code(staged, __file__, "processor_config.json", {"auto_map": auto_map})
            saved = [os.path.join(save_directory, os.path.relpath(file, staged)) for file in saved or ()]
        if push_to_hub:
            # Not by the stock method, which uploads before the code is there.
            self.push_to_hub(kwargs.pop("repo_id", Path(save_directory).name), **kwargs)
        return saved

    @classmethod
    def from_encoders(
        cls,
        text: Optional[str],
        vision: Optional[str] = None,
        audio: Optional[str] = None,
        backend: Optional[str] = None,
        num_frames: int = 8,
        table: Any = None,
        image_size: Optional[int | Sequence[int]] = None,
        **kwargs: Any,
    ) -> "MMTransformerProcessor":
        """
        The processor of a model with these encoders.

        Args:
            text (`str`): Hub id or local folder of the text encoder; `None` for a model that reads no text.
            vision (`str`, *optional*): Hub id or local folder of the vision encoder.
            audio (`str`, *optional*): Hub id or local folder of the audio encoder.
            backend (`str`, *optional*):
                `"pil"` or `"torchvision"`, which does the resizing. Defaults to torchvision where it is installed.
            num_frames (`int`, *optional*, defaults to 8): How many frames are taken of a video, at most.
            table ([`TableConfig`], *optional*): The columns of numbers and categories, from [`table_columns`]. Likewise
                a config for each modality of your own, by the name of its encoder.
            image_size (`int` or `(int, int)`, *optional*): Height and width of the pictures that the encoder gets; by
                default those that it was pretrained on. Encoders like ViT then interpolate their position embeddings.
            kwargs: for all `from_pretrained` (`revision`, `token`, `cache_dir`, ...).
        """
        own = {"table_config": table}
        own |= {f"{name}_config": kwargs.pop(name) for name in own_encoders() if name in kwargs}
        for name, path in {"text": text, "vision": vision, "audio": audio}.items():
            if path is not None:
                check_folder(path, f"the {name} encoder")
        if text is None:
            tokenizer = tokenizer_without_words()
        else:
            text_config = encoder_config_from_pretrained(text, "text", **kwargs)
            positions = max_text_positions(text_config)
            tokenizer = _read_part("tokenizer", AutoTokenizer, text, **kwargs)
            if positions is not None:
                tokenizer.model_max_length = min(tokenizer.model_max_length, positions)
            if tokenizer.pad_token_id is None and tokenizer.eos_token_id is not None:
                # As of most language models; the mask says which tokens are padding.
                tokenizer.pad_token = tokenizer.eos_token
            if is_language_model(text_config):
                # The end of a prompt holds the question, and in a chat the beginning of the answer.
                tokenizer.truncation_side = tokenizer.init_kwargs["truncation_side"] = "left"  # also when it is saved
        image_processor = feature_extractor = None
        if vision is not None:
            chosen = {} if backend is None else {"backend": backend}
            image_processor = _read_part("image processor", AutoImageProcessor, vision, **chosen, **kwargs)
        if image_size is not None:
            if image_processor is None:
                raise ValueError("image_size needs a vision encoder: give vision=..., or leave image_size out.")
            set_size(image_processor, image_size)
            _check_size(image_processor, vision)
        if audio is not None:
            feature_extractor = _read_part("feature extractor", AutoFeatureExtractor, audio, **kwargs)
        return cls(image_processor, tokenizer, feature_extractor, num_frames, reads_text=text is not None, **own)

    def __call__(
        self,
        text: Any = None,
        images: Any = None,
        videos: Any = None,
        audio: Any = None,
        table: Any = None,
        **kwargs: Any,
    ) -> BatchFeature:
        """
        The inputs of the model for some rows.

        Args:
            text (`str` or `list[str]`): One text per row; `None` or "" in a row that has none.
            images (*optional*):
                One entry per row: an image, a list of images, or `None`. For a single text, the same without the
                outer list. An image is whatever [`load_image`] takes; one that several rows share, by object, path or
                bytes, is processed once.
            videos (*optional*):
                One entry per row: a video, as [`load_frames`] takes it, or `None`. Its frames come after the images.
            audio (*optional*): One entry per row: a clip, as [`load_audio`] takes it, a list of clips, or `None`.
            table (*optional*):
                One entry per row: a dict from column to cell, such as `{"price": 3.5}`, or `None`. Missing columns and
                empty cells are absent. A modality of your own has an argument, too.
            kwargs:
                Options, by name or as the dicts `text_kwargs`, `images_kwargs`, `videos_kwargs`, `audio_kwargs`:

                - of the tokenizer. `padding` defaults to `True`, `max_length` to `tokenizer.model_max_length`, and
                  `truncation` is always on. By name, `padding` and `max_length` are for the text only.
                - `return_word_index` (`bool`, defaults to `False`): whether to return `word_index`, the number of the
                  word that starts at each token, -1 elsewhere.
                - of the image processor, such as `do_resize`, for images and the frames of videos.
                - `num_frames` (`int`, defaults to that of the processor): how many frames are taken of a video, at
                  most; `do_sample_frames=False` takes all of them.
                - `sampling_rate` (`int`): the rate, in Hz, of clips that are arrays without one.
                - in `audio_kwargs` alone: other options of the feature extractor.

        Returns:
            [`BatchFeature`] with `input_ids` and `attention_mask` (batch, text_len) int64, the latter 0 everywhere in
            rows without a text; `pixel_values` (num_images, channels, height, width) float32, unless no row has an
            image; `image_index` (batch, max_images) int64; `frame_index` of the same shape, if there is a video; and
            for models with sound `input_values` or `input_features` (num_clips, ...) float32 with
            `audio_attention_mask`, unless no row has a clip, and `audio_index` (batch, max_clips) int64; for models
            with columns `table_numbers` (num_tables, num_numbers) float32, `table_bins` (num_tables, num_bins) float32
            and `table_categories` (num_tables, num_categories) int64, unless no row has a cell, and `table_index`
            (batch, 1) int64.

        Raises:
            ValueError: if texts are not strings, if there are not as many entries in `images`, `videos` or `audio` as
                texts, if the model has no encoder for them, or if an option is given twice.
            ImageError, VideoError, AudioError, TableError: if one of them cannot be read.
            TypeError: if neither the processor nor its parts take an argument.
        """
        own = own_modalities()
        media = {"images": images, "videos": videos, "audio": audio, "table": table}
        media |= {name: kwargs.pop(name) for name in own if name in kwargs}
        options = self._options(kwargs)
        if not self.reads_text:
            if text is not None and any(text):
                raise ValueError("This processor belongs to a model that reads no text, but got one.")
            given = [entries for entries in media.values() if isinstance(entries, (list, tuple))]
            text = [None] * len(given[0]) if text is None and given else text
        if isinstance(text, str):
            text = [text]
            media = {name: None if entry is None else [entry] for name, entry in media.items()}
        if not isinstance(text, (list, tuple)) or not text or not all(x is None or isinstance(x, str) for x in text):
            raise ValueError("text must be a string or a list of strings, one per row; for a row without text, use ''.")
        entries = {name: _one_per_row(name, entry, len(text)) for name, entry in media.items()}
        data = self._tokenize([x or "" for x in text], **options["text_kwargs"])
        has_text = torch.tensor([bool(x and x.strip()) for x in text])
        if self.image_processor is not None or self.feature_extractor is not None or self.own_configs:
            data["attention_mask"] = data["attention_mask"] * has_text[:, None]
        data.update(
            self._process_images(
                entries["images"], entries["videos"], options["images_kwargs"], **options["videos_kwargs"]
            )
        )
        data.update(self._process_audio(entries["audio"], **options["audio_kwargs"]))
        for name, modality in own.items():
            if name in entries:
                data.update(self._process_own(modality, entries[name]))
        return BatchFeature(data)

    def _process_own(self, modality: Modality, entries: list[Any]) -> dict[str, torch.Tensor]:
        """The items of a modality whose encoder transformers lacks."""
        encoder = modality.encoder
        config = self.own_configs.get(encoder.name)
        if config is None or encoder.own is None:
            if any(modality.items(entry) for entry in entries):
                raise ValueError(
                    f"This processor has no {encoder.name}_config, but got {modality.argument}. It belongs to a "
                    f"model without {modality.nouns}."
                )
            return {}
        distinct, read = _Distinct(), modality.reader(ReaderContext(self, fetch))
        index = []
        for number, entry in enumerate(entries):
            check_number(modality.items(entry), modality.nouns)
            try:
                found = [
                    distinct.add(modality.key(item), functools.partial(read, item)) for item in modality.items(entry)
                ]
            except ValueError as error:
                where = f"{modality.argument}[{number}]: " if len(entries) > 1 else ""
                raise type(error)(f"{where}{error}") from None
            index.append([place for place in found if place is not None])
        data = {str(encoder.index): _padded(index)}
        if distinct.items:
            data.update(encoder.own.prepare(config, distinct.items))
        return data

    def _options(self, given: dict[str, Any]) -> dict[str, dict[str, Any]]:
        """
        The options of a call by modality, as `text_kwargs` and the like.

        `ProcessorMixin._merge_kwargs` is not used: it cuts sound to the `max_length` of texts, and ignores unknown
        names.
        """
        kinds = self._option_names
        options = {part: dict(given.pop(part, None) or {}) for part in kinds}
        common = given.pop("common_kwargs", None) or {}
        for kind, values in options.items():
            for name in values:
                if name not in kinds[kind]:
                    raise TypeError(f"{kind} takes no {name!r}; {_hint(name, kinds[kind])}")
                if name in given:
                    raise ValueError(f"{name!r} is given twice: in {kind} and by its name.")
        for name, value in {**common, **given}.items():
            # Text comes first: `padding` and `max_length` of sound are in `audio_kwargs` only.
            kind = next((kind for kind, names in kinds.items() if name in names), None)
            if kind is None:
                own = {"text", *MODALITIES, *kinds}
                raise TypeError(f"The processor takes no argument {name!r}; {_hint(name, own.union(*kinds.values()))}")
            options[kind].setdefault(name, value)
        for kind, values in options.items():
            for name, value in FIXED_OPTIONS.items():
                got = values.pop(name, None)
                if got not in (None, value):
                    raise ValueError(f"{name} must be {value!r}, as the model needs it, but {kind} has {got!r}.")
        return options

    @property
    def _option_names(self) -> dict[str, set[str]]:
        """The names of the options of each modality."""
        of_images = set() if self.image_processor is None else _image_options(self.image_processor.__class__)
        of_sound = set(AudioKwargs.__annotations__)
        if self.feature_extractor is not None:
            of_sound |= _call_arguments(self.feature_extractor.__class__)
        of_sound -= {"self", "raw_speech", "kwargs"}
        return {
            "text_kwargs": set(MMTransformerTextKwargs.__annotations__),
            "images_kwargs": of_images,
            "videos_kwargs": set(MMTransformerVideosKwargs.__annotations__),
            "audio_kwargs": of_sound,
        }

    def _tokenize(
        self,
        text: Any,
        padding: Any = None,
        max_length: Optional[int] = None,
        pad_to_multiple_of: Optional[int] = None,
        return_word_index: bool = False,
        **kwargs: Any,
    ) -> dict[str, Any]:
        tokenizer = self.tokenizer
        if padding is None:
            # Loaded with `padding="max_length", max_length=64`, a tokenizer makes all texts as long as that.
            saved = max_length or tokenizer.init_kwargs.get("max_length") or tokenizer.model_max_length
            to_length = tokenizer.init_kwargs.get("padding") == "max_length" and saved <= limits().padded_tokens
            padding = "max_length" if to_length else True
            max_length = saved if to_length else max_length
        if return_word_index and not tokenizer.is_fast:
            raise ValueError(
                f"Labels of words need a fast tokenizer, but {type(tokenizer).__name__} is a slow one, which does "
                "not return the positions of tokens in the text."
            )
        max_length = max_length or tokenizer.model_max_length
        options = {
            "padding": padding,
            "pad_to_multiple_of": pad_to_multiple_of,
            "return_attention_mask": True,
            "return_offsets_mapping": return_word_index,
            "return_tensors": "pt",
            "verbose": False,
            **kwargs,
        }
        if padding == "max_length":
            options["padding"] = True  # at first, to see how long the texts are
        given = text
        if "text_pair" not in kwargs:
            text = [needed_text(tokenizer, one, max_length) for one in given]
        encoding = tokenize(tokenizer, text, **options)
        if encoding["input_ids"].shape[1] > max_length or padding == "max_length":
            length = int(encoding["attention_mask"].sum(1).max())
            if length > max_length and "text" not in self._warned:
                self._warned.add("text")
                logger.warning(
                    f"A text of {'more than ' * (text != given)}{length} tokens was cut to {max_length}, the most "
                    "that the text encoder accepts. More such texts are cut without a warning."
                )
            # Rounding up would go past the last position.
            options["pad_to_multiple_of"] = None
            options.update(padding=padding, truncation=True, max_length=max_length)
            encoding = tokenize(tokenizer, text, **options)
        data = dict(encoding)
        if data["input_ids"].shape[1] == 0:
            # No text, and a tokenizer without special tokens: one place for the model to put its own vector.
            data = {name: value.new_zeros(len(text), 1, *value.shape[2:]) for name, value in data.items()}
            data["input_ids"] += tokenizer.pad_token_id or 0
        if return_word_index:
            offsets = data.pop("offset_mapping").tolist()
            if tokenizer.truncation_side != "right":
                # Words count from the beginning, which may be cut off.
                offsets = [_shifted(o, len(g) - len(t)) for o, g, t in zip(offsets, given, text, strict=True)]
                text = given
            data["word_index"] = torch.tensor([index_words(t, o) for t, o in zip(text, offsets, strict=True)])
        return data

    def _process_images(
        self,
        images: list[Any],
        videos: list[Any],
        options: Mapping[str, Any],
        num_frames: Optional[int] = None,
        do_sample_frames: bool = True,
    ) -> dict[str, torch.Tensor]:
        num_frames = (num_frames or self.num_frames) if do_sample_frames else sys.maxsize
        distinct, load = _Distinct(), IMAGE.reader(ReaderContext(self, fetch))
        index, frames, pixels = [], [], 0
        decoded: dict[Hashable, Sequence[Any]] = {}

        def read_image(image: Any, **kwargs: Any) -> Any:
            nonlocal pixels
            if isinstance(image, ProcessedPictures):
                return image.pixel_values[0]
            picture = load(image, **kwargs)
            pixels += num_pixels(picture)
            # Beyond the limit, pictures are resized one by one as they are read.
            return picture if pixels <= limits().batch_pixels else self.process_pictures([picture], **options)[0]

        for entry, video in zip(images, videos, strict=True):
            pictures = as_list(entry)
            check_number(pictures, "images")
            # What is processed already needs no limit.
            most = pixels_for_each([image for image in pictures if not isinstance(image, ProcessedPictures)])
            row = [
                distinct.add(("image", image_key(image), most), functools.partial(read_image, image, most_pixels=most))
                for image in pictures
            ]
            numbers = [-1] * len(row)
            if not is_absent(video):
                key = video_key(video)
                if key not in decoded:
                    is_processed = isinstance(video, ProcessedPictures)
                    decoded[key] = video.frames if is_processed else load_frames(video, num_frames)
                for number, picture in enumerate(decoded[key]):
                    row.append(distinct.add((key, number), functools.partial(read_image, picture)))
                numbers += range(len(decoded[key]))
            index.append(row)
            frames.append(numbers)
        data = {"image_index": _padded(index)}
        if any(not is_absent(video) for video in videos):
            data["frame_index"] = _padded(frames)
        if distinct.items:
            data["pixel_values"] = self._pixel_values(distinct.items, options)
        return data

    def _pixel_values(self, pictures: list[Any], options: Mapping[str, Any]) -> torch.Tensor:
        """
        All pictures, processed: (num_images, channels, height, width).

        Args:
            pictures: `PIL.Image.Image`s, and tensors (channels, height, width) of processed pictures.
        """
        unprocessed = [picture for picture in pictures if not isinstance(picture, torch.Tensor)]
        if len(unprocessed) == len(pictures):
            return self.process_pictures(unprocessed, **options)
        rest = iter(self.process_pictures(unprocessed, **options) if unprocessed else ())
        everything = [picture if isinstance(picture, torch.Tensor) else next(rest) for picture in pictures]
        if len({picture.shape for picture in everything}) > 1:
            raise ValueError(
                "The image processor returns pictures of different sizes, which fit only into a batch of at most "
                f"{named('batch_pixels')}; or give it do_resize=True and a fixed size."
            )
        return torch.stack(everything)

    def process_pictures(self, pictures: list[Any], **options: Any) -> torch.Tensor:
        """
        Pictures as the image processor resizes and normalises them.

        Args:
            pictures: RGB `PIL.Image.Image`s.
            options: of the image processor.

        Returns:
            (pictures, channels, height, width) float32.

        Raises:
            ValueError: one sentence, if the image processor cannot process them.
        """
        if self.image_processor is None:
            raise ValueError(
                "This processor has no image processor, but got images. It belongs to a model without images."
            )
        with _errors_of("image processor"):
            return self.image_processor(images=pictures, return_tensors="pt", **options)["pixel_values"]

    def _process_audio(
        self, audio: list[Any], sampling_rate: Optional[int] = None, **given: Any
    ) -> dict[str, torch.Tensor]:
        extractor = self.feature_extractor
        if extractor is None:
            if any(as_clips(entry) for entry in audio):
                raise ValueError(_NO_EXTRACTOR)
            return {}
        distinct = _Distinct()
        for entry in audio:
            check_number(as_clips(entry), "sounds")
        index = [
            [distinct.add(audio_key(x), functools.partial(self.load_audio, x, sampling_rate)) for x in as_clips(entry)]
            for entry in audio
        ]
        data = {"audio_index": _padded(index)}
        if distinct.items:
            # Whisper must be padded to its full length, its default; where the default is not to pad, to the longest.
            padding = inspect.signature(type(extractor).__call__).parameters.get("padding")
            options = {"padding": padding.default or True} if padding is not None else {}
            with _errors_of("feature extractor"):
                features = extractor(
                    distinct.items,
                    sampling_rate=extractor.sampling_rate,
                    return_attention_mask=True,
                    return_tensors="pt",
                    **{**options, **given},
                )
            for name, value in features.items():
                data["audio_attention_mask" if name == "attention_mask" else name] = value
        return data

    def load_audio(self, clip: Any, sampling_rate: Optional[int] = None, fetch: Callable[[str], bytes] = fetch) -> Any:
        """
        The waveform of a clip at the rate of the audio encoder, from [`mm_transformers.model.audio.load_audio`].

        Args:
            clip: as in [`mm_transformers.model.audio.load_audio`].
            sampling_rate (`int`, *optional*): The rate, in Hz, of arrays that come without one.
            fetch: turns an http(s) address into bytes, or raises `OSError` or `ValueError`.

        Raises:
            AudioError: also if it is too short for the audio encoder.
            ValueError: if there is no feature extractor.
        """
        if self.feature_extractor is None:
            raise ValueError(_NO_EXTRACTOR)
        rate, name = self.feature_extractor.sampling_rate, describe(clip, "sound")
        waveform = load_audio(clip, rate, sampling_rate, fetch)
        if len(waveform) < SHORTEST_CLIP * rate:
            raise AudioError(
                f"{name} lasts {1000 * len(waveform) / rate:.1f} ms, less than the {1000 * SHORTEST_CLIP:.0f} ms of "
                "the shortest input of audio encoders"
            )
        longest = self.longest_clip
        if len(waveform) > longest and "audio" not in self._warned:
            self._warned.add("audio")
            logger.warning(
                f"{name} of {len(waveform) / rate:.1f} s was cut to the {longest / rate:.1f} s that the audio "
                "encoder accepts. More such sounds are cut without a warning."
            )
        # A feature extractor with its own window cuts better: it needs the samples just behind it.
        return waveform if self._window is not None else waveform[:longest]

    @property
    def longest_clip(self) -> int:
        """The longest clip of the audio encoder, in samples; the rest is cut off."""
        return self._window or int(limits().encoded_seconds * self.feature_extractor.sampling_rate)

    @property
    def _window(self) -> Optional[int]:
        extractor = self.feature_extractor
        if getattr(extractor, "max_length", None) is not None:  # of AST, in frames of 10 ms
            return extractor.max_length * extractor.sampling_rate // 100
        return getattr(extractor, "n_samples", None)

    @property
    def model_input_names(self) -> list[str]:
        names = list(self.tokenizer.model_input_names)
        if self.image_processor is not None:
            names += ["pixel_values", "image_index", "frame_index"]
        if self.feature_extractor is not None:
            names += [*self.feature_extractor.model_input_names, "audio_attention_mask", "audio_index"]
        for name in self.own_configs:
            names += [*ENCODERS[name].inputs, str(ENCODERS[name].index)]
        return list(dict.fromkeys(names))


_NO_EXTRACTOR = "This processor has no feature extractor, but got sound. It belongs to a model without sound."


@contextlib.contextmanager
def _errors_of(part: str) -> Iterator[None]:
    """Turns errors of a part into one sentence: its settings may come from a stranger."""
    try:
        yield
    except (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"The {part} fails with its settings: {type(error).__name__}: {one_line(error)}") from error


def _checked_columns(columns: Any) -> dict[str, list[str]]:
    is_right = isinstance(columns, Mapping) and all(
        key in ARGUMENTS and isinstance(names, (list, tuple)) and names and all(isinstance(x, str) for x in names)
        for key, names in columns.items()
    )
    if not is_right:
        raise ValueError(
            f"input_columns must be a dict from {', '.join(ARGUMENTS)} to lists of columns, but is "
            f"{shortened(columns)}."
        )
    return {key: list(names) for key, names in columns.items()}


def _hint(name: str, known: set[str]) -> str:
    near = difflib.get_close_matches(name, sorted(known), 1)
    return f"did you mean {near[0]!r}?" if near else f"it takes {', '.join(sorted(known))}."


@functools.cache
def _image_options(cls: Any) -> set[str]:
    # Not by `get_type_hints`, which fails for classes that name a type they do not import.
    return set(getattr(cls, "valid_kwargs", ImagesKwargs).__annotations__)


@functools.cache
def _call_arguments(cls: Any) -> set[str]:
    return set(inspect.signature(cls.__call__).parameters)


class _Distinct:
    """Items of a batch, each once."""

    def __init__(self) -> None:
        self.items: list[Any] = []
        self._numbers: dict[Hashable, Any] = {}
        self._kept: list[Any] = []  # a key may be the id of an object, which is reused after its deletion

    def add(self, key: Hashable, load: Callable[[], Any]) -> Any:
        """The number of the item, which is loaded if it is new; `None` if it is empty."""
        self._kept.append(load)
        if key not in self._numbers:
            item = load()
            self._numbers[key] = None if item is None else len(self.items)
            self.items += [] if item is None else [item]
        return self._numbers[key]


def _padded(rows: list[list[int]]) -> torch.Tensor:
    """(rows, longest row) int64, with -1 behind the shorter ones; at least one column."""
    width = max([len(row) for row in rows] + [1])
    return torch.tensor([row + [-1] * (width - len(row)) for row in rows], dtype=torch.int64)


def _shifted(spans: list[list[int]], by: int) -> list[list[int]]:
    """Offsets of tokens further behind; special tokens stay without a place."""
    return [[start + by, end + by] if start < end else [start, end] for start, end in spans]


def _one_per_row(name: str, entries: Any, num_rows: int) -> list[Any]:
    if entries is None:
        return [None] * num_rows
    if isinstance(entries, (str, bytes, dict)) or not hasattr(entries, "__len__"):
        raise ValueError(
            f"{name} must be a list with one entry per text, as text is a list, but is of type "
            f"{type(entries).__name__}."
        )
    if len(entries) != num_rows:
        raise ValueError(
            f"{name} must have one entry per text (None where there is none), but there are {len(entries)} entries "
            f"for {num_rows} texts."
        )
    return list(entries)


def check_number(items: list[Any], kind: str) -> None:
    """
    Checks the number of items of a row.

    Raises:
        ValueError: if a row has more items than are allowed.
    """
    if len(items) > limits().row_items:
        raise ValueError(f"there are {len(items):,} {kind}, more than {named('row_items')}")


__all__ = ["MMTransformerProcessor"]
