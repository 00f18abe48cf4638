"""The list of all modalities: the inputs of a row, their encoders and their names."""

import numbers
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, Optional
from weakref import WeakKeyDictionary

from .audio import audio_key
from .file_contents import is_absent
from .images import check_resized, declared_pixels, image_key, load_image, num_pixels, pixels_for_each
from .own_encoders import OwnEncoder
from .table import TableEncoder, TableReader, as_rows, row_key
from .video import load_frames, video_key


@dataclass(frozen=True)
class EncoderKind:
    """
    The inputs and outputs of one encoder of a model. Configs, streams, relevances and Shapley values use its `name`.

    Args:
        name: `{name}_config` of the config, `{name}_model` of the model.
        inputs: the names of its main input; a class of transformers takes one of them, an encoder of ours all.
        noun, plural: one of its inputs, and several, in messages and tables.
        hub_tag: its tag on the Hub.
        index: the tensor with the items of each row; `None` for text, since each row has one.
        features: the tensor that may replace the output of the encoder; `None` for encoders of ours.
        processor_part: the attribute of the processor that prepares the input; `None` for encoders of ours.
        own: the class of the encoder, if transformers has none.
    """

    name: str
    inputs: tuple[str, ...]
    noun: str
    plural: str
    hub_tag: str
    index: Optional[str] = None
    features: Optional[str] = None
    processor_part: Optional[str] = None
    own: Optional[type[OwnEncoder]] = None


TEXT = EncoderKind(
    "text", inputs=("input_ids",), noun="text", plural="texts", hub_tag="text", features="text_features",
    processor_part="tokenizer",
)  # fmt: skip
VISION = EncoderKind(
    "vision", inputs=("pixel_values",), noun="image", plural="images", hub_tag="image", index="image_index",
    features="image_features", processor_part="image_processor",
)  # fmt: skip
AUDIO = EncoderKind(
    "audio", inputs=("input_values", "input_features"), noun="sound", plural="sounds", hub_tag="audio",
    index="audio_index", features="audio_features", processor_part="feature_extractor",
)  # fmt: skip
COLUMNS = EncoderKind(
    "table", inputs=("table_numbers", "table_bins", "table_categories"), noun="table", plural="tables",
    hub_tag="tabular", index="table_index", own=TableEncoder,
)  # fmt: skip

# By name, in the order of the streams of fusions.
ENCODERS = {encoder.name: encoder for encoder in (TEXT, VISION, AUDIO, COLUMNS)}
# All encoders except that of the text, which every model has.
OTHER_ENCODERS = {name: encoder for name, encoder in ENCODERS.items() if encoder is not TEXT}


def own_encoders() -> dict[str, EncoderKind]:
    """The encoders that transformers lacks, by name."""
    return {name: encoder for name, encoder in ENCODERS.items() if encoder.own is not None}


def own_inputs(arguments: dict[str, Any]) -> dict[str, Any]:
    """Takes the inputs of encoders that transformers lacks out of the keyword arguments of a model."""
    names = [name for encoder in own_encoders().values() for name in (*encoder.inputs, encoder.index)]
    return {name: arguments.pop(name) for name in names if name in arguments}


def as_one(cell: Any) -> list[Any]:
    """The item of a cell that holds one at most."""
    return [] if is_absent(cell) else [cell]


def as_list(cell: Any) -> list[Any]:
    """The images of a cell: none, one, or a list, whose empty entries do not count."""
    items = cell if isinstance(cell, (list, tuple)) and _depth(cell) not in (2, 3) else [cell]
    return [_pixels(image) for image in items if not is_absent(image)]


def as_clips(cell: Any) -> list[Any]:
    """The clips of a cell; a list of numbers is one clip."""
    items = cell if isinstance(cell, (list, tuple)) and _depth(cell) != 1 else [cell]
    return [clip for clip in items if not is_absent(clip)]


def _pixels(image: Any) -> Any:
    """Lists of numbers as an array; anything else as it is."""
    if _depth(image) not in (2, 3):
        return image
    import numpy as np

    return np.asarray(image)


def _depth(cell: Any) -> int:
    """The depth of nested lists of numbers; 0 for anything else, and for empty lists. The innermost may be arrays."""
    depth = 0
    while isinstance(cell, (list, tuple)) and len(cell) > 0:
        cell, depth = cell[0], depth + 1
    if depth > 0 and getattr(cell, "ndim", None) == 1:
        return depth + 1
    return depth if isinstance(cell, numbers.Real) else 0


def no_pixel_limit(items: list[Any]) -> Optional[int]:
    """For items that are no images."""
    return None


def no_pixels(item: Any) -> int:
    """An item that is no picture."""
    return 0


class ReaderContext(NamedTuple):
    """
    How the items of a table are read.

    Args:
        processor ([`MMTransformerProcessor`]): Its number of frames and its sampling rate.
        fetch: an address -> the bytes there.
        sampling_rate: the rate, in Hz, of clips that are arrays without one.
    """

    processor: Any
    fetch: Callable[[str], bytes]
    sampling_rate: Optional[int] = None


def _image_reader(context: ReaderContext) -> Callable[..., Any]:
    return partial(_load_image, context)


def _load_image(context: ReaderContext, image: Any, **options: Any) -> Any:
    loaded = load_image(image, fetch=context.fetch, **options)
    check_resized(loaded, getattr(context.processor, "image_processor", None))
    return loaded


def _video_reader(context: ReaderContext) -> Callable[..., Any]:
    return partial(load_frames, num_frames=context.processor.num_frames, fetch=context.fetch)


def _clip_reader(context: ReaderContext) -> Callable[..., Any]:
    return partial(_load_clip, context)


def _load_clip(context: ReaderContext, clip: Any) -> dict[str, Any]:
    waveform = context.processor.load_audio(clip, context.sampling_rate, context.fetch)
    return {"array": waveform, "sampling_rate": context.processor.feature_extractor.sampling_rate}


# Of each processor: making one takes milliseconds, and each warns once of a column.
_table_readers: WeakKeyDictionary[Any, TableReader] = WeakKeyDictionary()


def _table_reader(context: ReaderContext) -> Callable[..., Any]:
    reader, config = _table_readers.get(context.processor), context.processor.table_config
    if reader is None or not reader.fits(config):
        reader = _table_readers[context.processor] = TableReader(config)
    return reader


@dataclass(frozen=True)
class Modality:
    """
    One kind of input of a row.

    Args:
        name: the key of a row, and by default the column of a table.
        argument: the argument of the processor; a collator names its columns by it.
        encoder: the encoder that reads it.
        noun, nouns: one item, and several, in messages and on pages.
        items: splits a cell into its items.
        key: an item -> a value that is equal for equal items.
        reader: makes the function that reads an item for the processor and raises `ValueError` with one sentence.
        pixels_for_each: the items of a row -> the most pixels that the reader may keep of each; `None` for no limit.
        num_pixels: an item, read -> its pixels in memory.
        declared_pixels: an item -> the pixels that its decoder will read; 0 if they are not known before.
        axes: the numbers of axes of an item that is stored as nested lists of numbers.
        most_axes: the largest number of axes of an item that is stored as an array with a shape.
        is_sequence: whether an item is several inputs of the encoder, such as the frames of a video.
        has_one: whether a row has one item at most. Otherwise `items` must also split a list of read items.
        has_files: whether a text in a cell is the path or the address of a file.
        columns: the config of the encoder -> the columns of a row that form one item; `None` if it has one column.
    """

    name: str
    argument: str
    encoder: EncoderKind
    noun: str
    nouns: str
    items: Callable[[Any], list[Any]]
    key: Callable[[Any], Hashable]
    reader: Callable[[ReaderContext], Callable[..., Any]]
    axes: tuple[int, ...] = ()
    most_axes: int = 0
    pixels_for_each: Callable[[list[Any]], Optional[int]] = no_pixel_limit
    num_pixels: Callable[[Any], int] = no_pixels
    declared_pixels: Callable[[Any], int] = no_pixels
    is_sequence: bool = False
    has_one: bool = False
    has_files: bool = True
    columns: Optional[Callable[[Any], list[str]]] = None

    @property
    def is_single(self) -> bool:
        """Whether a row has one item at most, which the processor takes without a list."""
        return self.has_one or self.is_sequence or self.columns is not None

    def cell(self, row: Mapping[str, Any], config: Any) -> Any:
        """
        The cell of a row; a dict from column to cell, if the modality has several columns.

        Args:
            config: the config of the encoder.
        """
        if self.columns is None:
            return row.get(self.name)
        return {name: row[name] for name in self.columns(config) if name in row}


IMAGE = Modality(
    "image", argument="images", encoder=VISION, noun="picture", nouns="pictures", items=as_list, key=image_key,
    reader=_image_reader, axes=(2, 3), most_axes=3, pixels_for_each=pixels_for_each, num_pixels=num_pixels,
    declared_pixels=declared_pixels,
)  # fmt: skip
VIDEO = Modality(
    "video", argument="videos", encoder=VISION, noun="video", nouns="video", items=as_one, key=video_key,
    reader=_video_reader, axes=(3, 4), most_axes=4, num_pixels=num_pixels, is_sequence=True,
)  # fmt: skip
# An array with two axes is one clip with several channels; a list of lists is several clips.
SOUND = Modality(
    "audio", argument="audio", encoder=AUDIO, noun="sound", nouns="sound", items=as_clips, key=audio_key,
    reader=_clip_reader, axes=(1,), most_axes=2,
)  # fmt: skip
TABLE = Modality(
    "table", argument="table", encoder=COLUMNS, noun="table", nouns="numbers and categories", items=as_rows,
    key=row_key, reader=_table_reader, has_files=False, columns=lambda config: config.names,
)  # fmt: skip

# What a row may hold beside its text, by the argument of the processor.
MODALITIES = {modality.argument: modality for modality in (IMAGE, VIDEO, SOUND, TABLE)}
# Those with one column, by the key of a row.
PARTS = {modality.name: modality for modality in MODALITIES.values() if modality.columns is None}
# The keys of a row, and the arguments of the processor.
ARGUMENTS = {"text": "text", **{name: modality.argument for name, modality in PARTS.items()}}
# The noun of each key of a row.
NOUNS = {"text": "text", **{name: modality.noun for name, modality in PARTS.items()}}


def own_modalities() -> dict[str, Modality]:
    """The modalities whose encoders transformers lacks, by the argument of the processor."""
    return {name: modality for name, modality in MODALITIES.items() if modality.encoder.own is not None}


def register_modality(modality: Modality) -> Modality:
    """
    Adds a modality of your own, with its encoder.

    It must be registered before a model with it is made or loaded. The config then has the field `{encoder}_config`.

    Args:
        modality ([`Modality`]): Its encoder is an [`EncoderKind`] with the class of the encoder, `own`.

    Raises:
        ValueError: if the encoder has no class, or a name is taken.

    Example (`SENSOR` in `tests/project/test_own_kind_everywhere.py` is a whole modality):

    ```python
    >>> from mm_transformers.model.modalities import TABLE

    >>> register_modality(TABLE).encoder.own.__name__  # registered already, as all modalities of this package
    'TableEncoder'
    ```
    """
    encoder = modality.encoder
    if encoder.own is None:
        raise ValueError(f"The encoder of the modality {modality.name!r} needs its class: EncoderKind(..., own=...).")
    taken = {"text": TEXT, **MODALITIES, **PARTS}
    for name in (modality.name, modality.argument):
        if name in taken and getattr(taken[name], "encoder", None) != encoder:
            raise ValueError(f"The modality {name!r} already exists; choose another name.")
    if ENCODERS.get(encoder.name, encoder).own is None:
        raise ValueError(f"The encoder {encoder.name!r} already exists; choose another name.")
    ENCODERS[encoder.name] = OTHER_ENCODERS[encoder.name] = encoder
    MODALITIES[modality.argument] = modality
    if modality.columns is None:
        PARTS[modality.name] = modality
        ARGUMENTS[modality.name], NOUNS[modality.name] = modality.argument, modality.noun
    return modality


def modalities_of(encoder: str) -> list[Modality]:
    """The modalities that an encoder reads; none for "text", which is not a file."""
    return [modality for modality in MODALITIES.values() if modality.encoder.name == encoder]
