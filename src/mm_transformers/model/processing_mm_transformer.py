"""Turns texts, images, videos and sound into the tensors of the model."""

import difflib
import functools
import inspect
import numbers
from collections.abc import Callable, Hashable, Mapping
from pathlib import Path
from typing import Any, Optional, get_type_hints

import torch
from transformers import AutoConfig, AutoFeatureExtractor, AutoTokenizer, BatchFeature, ProcessorMixin

# Not from the top: there, transformers 5.17 wants torchvision for it.
from transformers.models.auto.image_processing_auto import AutoImageProcessor
from transformers.processing_utils import ImagesKwargs, TextKwargs
from transformers.utils import logging

from .audio import AudioError, audio_key, load_audio
from .encoder_classes import sub_config_of
from .encoders import max_text_positions
from .files import describe
from .images import image_key, load_image
from .task_base import is_null
from .task_token_classification import index_words
from .travelling import write_processor_code
from .video import load_frames, video_key


logger = logging.get_logger(__name__)

# In seconds: the window of all the usual audio encoders, of waveforms and of spectrograms alike.
SHORTEST_CLIP = 0.025


class MMTransformerProcessor(ProcessorMixin):
    r"""
    A tokenizer, an image processor and a feature extractor, for texts with any number of images, a video and any number
    of clips of sound each.

    Args:
        image_processor (`BaseImageProcessor`, *optional*): That of the vision encoder; `None` where there is none.
        tokenizer (`PreTrainedTokenizerBase`): That of the text encoder.
        feature_extractor (`SequenceFeatureExtractor`, *optional*): That of the audio encoder.
        num_frames (`int`, *optional*, defaults to 8): How many frames are taken of a video, at most.

    Example:

    ```python
    >>> processor = MMTransformerProcessor.from_encoders(
    ...     text="distilbert/distilbert-base-uncased", vision="google/vit-base-patch16-224-in21k"
    ... )
    >>> inputs = processor(text=["Lovely weather!", "No picture here."], images=["rain.jpg", None])
    >>> inputs["image_index"]
    tensor([[ 0],
            [-1]])
    ```"""

    image_processor: Any = None
    feature_extractor: Any = None

    def __init__(self, image_processor=None, tokenizer=None, feature_extractor=None, num_frames: int = 8, **kwargs):
        parts = {"image_processor": image_processor, "tokenizer": tokenizer, "feature_extractor": feature_extractor}
        parts = {name: part for name, part in parts.items() if part is not None}
        # The base class knows no optional parts; this object has those that it was given.
        self.get_attributes: Any = functools.partial(list, parts)
        super().__init__(**parts, **kwargs)
        self.num_frames = num_frames
        self._warned: set[str] = set()

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, **kwargs):
        """
        As [`~transformers.ProcessorMixin.from_pretrained`].

        Raises:
            OSError: if there is no processor.
        """
        num_frames = kwargs.pop("num_frames", None)
        saved, _ = cls.get_processor_dict(pretrained_model_name_or_path, **kwargs)
        try:
            parts = {"tokenizer": AutoTokenizer.from_pretrained(pretrained_model_name_or_path, **kwargs)}
        except ValueError as error:
            if saved:
                raise
            raise OSError(
                f"{pretrained_model_name_or_path} holds no processor; save it next to the model by "
                "processor.save_pretrained(...), or push it by processor.push_to_hub(...)."
            ) from error
        for name, auto_class in (("image_processor", AutoImageProcessor), ("feature_extractor", AutoFeatureExtractor)):
            if not saved or name in saved:
                parts[name] = auto_class.from_pretrained(pretrained_model_name_or_path, **kwargs)
        if num_frames is None:
            num_frames = (saved or {}).get("num_frames", 8)
        return cls(**parts, num_frames=num_frames)

    def save_pretrained(self, save_directory, push_to_hub: bool = False, **kwargs):
        """
        As [`~transformers.ProcessorMixin.save_pretrained`] does, and copies the code of the processor into the folder,
        so that it can be loaded with `trust_remote_code=True` where this package is not installed.
        """
        saved = super().save_pretrained(save_directory, **({} if push_to_hub else kwargs))
        write_processor_code(save_directory)
        if push_to_hub:
            # Not by the stock method, which uploads before the code is there.
            self.push_to_hub(kwargs.pop("repo_id", Path(save_directory).name), **kwargs)
        return saved

    @classmethod
    def from_encoders(
        cls,
        text: str,
        vision: Optional[str] = None,
        audio: Optional[str] = None,
        backend: Optional[str] = None,
        num_frames: int = 8,
        **kwargs,
    ):
        """
        The processor of a model with these encoders.

        Args:
            text (`str`): Hub id or local folder of the text encoder.
            vision (`str`, *optional*): Hub id or local folder of the vision encoder.
            audio (`str`, *optional*): Hub id or local folder of the audio encoder.
            backend (`str`, *optional*):
                `"pil"` or `"torchvision"`, which does the resizing. Defaults to torchvision where it is installed.
            num_frames (`int`, *optional*, defaults to 8): How many frames are taken of a video, at most.
            kwargs: for all `from_pretrained` (`revision`, `token`, `cache_dir`, ...).
        """
        tokenizer = AutoTokenizer.from_pretrained(text, **kwargs)
        positions = max_text_positions(sub_config_of(AutoConfig.from_pretrained(text, **kwargs), "text"))
        if positions is not None:
            tokenizer.model_max_length = min(tokenizer.model_max_length, positions)
        image_processor = feature_extractor = None
        if vision is not None:
            chosen = {} if backend is None else {"backend": backend}
            image_processor = AutoImageProcessor.from_pretrained(vision, **chosen, **kwargs)
        if audio is not None:
            feature_extractor = AutoFeatureExtractor.from_pretrained(audio, **kwargs)
        return cls(image_processor, tokenizer, feature_extractor, num_frames)

    def __call__(
        self,
        text: Any = None,
        images: Any = None,
        videos: Any = None,
        audio: Any = None,
        sampling_rate: Optional[int] = None,
        padding: Any = True,
        max_length: Optional[int] = None,
        pad_to_multiple_of: Optional[int] = None,
        return_word_index: bool = False,
        return_tensors: str = "pt",
        **kwargs,
    ) -> BatchFeature:
        """
        Args:
            text (`str` or `list[str]`): One text per row; `None` or "" in a row that has none.
            images (*optional*):
                One entry per row: an image, a list of images, or `None`. For a single text, the same without the
                outer list. An image is whatever [`load_image`] takes; one that several rows share, by object, path or
                bytes, is processed once.
            videos (*optional*):
                One entry per row: a video, as [`load_frames`] takes it, or `None`. Its frames come after the images.
            audio (*optional*): One entry per row: a clip, as [`load_audio`] takes it, a list of clips, or `None`.
            sampling_rate (`int`, *optional*): The rate, in Hz, of clips that are arrays without one.
            padding (`bool` or `str`, *optional*, defaults to `True`): As tokenizers take it.
            max_length (`int`, *optional*): Longest text in tokens; defaults to `tokenizer.model_max_length`.
            pad_to_multiple_of (`int`, *optional*): As tokenizers take it.
            return_word_index (`bool`, *optional*, defaults to `False`):
                Whether to return `word_index`: the number of the word that starts at each token, -1 elsewhere.
            kwargs: Options of the tokenizer and of the image processor, such as `do_resize`; also as dicts,
                `text_kwargs` and `images_kwargs`.

        Returns:
            [`BatchFeature`] with `input_ids` and `attention_mask` (batch, text_len) int64, the latter 0 everywhere in
            rows without a text; `pixel_values` (num_images, channels, height, width) float32, unless no row has an
            image; `image_index` (batch, max_images) int64; `frame_index` of the same shape, if there is a video; and
            for models with sound `input_values` or `input_features` (num_clips, ...) float32 with
            `audio_attention_mask`, unless no row has a clip, and `audio_index` (batch, max_clips) int64.

        Raises:
            ValueError: if texts are not strings, if there are not as many entries in `images`, `videos` or `audio` as
                texts, or if the model has no encoder for them.
            ImageError, VideoError, AudioError: if one of them cannot be read.
            TypeError: if neither the processor nor its parts take an argument.
        """
        if return_tensors != "pt":
            raise ValueError(f"return_tensors must be 'pt': the model is a PyTorch model, but got {return_tensors!r}.")
        media = {"images": images, "videos": videos, "audio": audio}
        if isinstance(text, str):
            text = [text]
            media = {name: None if entry is None else [entry] for name, entry in media.items()}
        if not isinstance(text, (list, tuple)) or not text or not all(x is None or isinstance(x, str) for x in text):
            raise ValueError(
                "text must be a string or a list of strings, one per row; use '' where there is only an image."
            )
        entries = {name: _one_per_row(name, entry, len(text)) for name, entry in media.items()}
        text_options, image_options = self._options(kwargs)
        padding = text_options.pop("padding", padding)
        max_length = text_options.pop("max_length", max_length)
        pad_to_multiple_of = text_options.pop("pad_to_multiple_of", pad_to_multiple_of)
        data = self._tokenize(
            [x or "" for x in text], padding, max_length, pad_to_multiple_of, return_word_index, **text_options
        )
        has_text = torch.tensor([bool(x and x.strip()) for x in text])
        if self.image_processor is not None or self.feature_extractor is not None:
            data["attention_mask"] = data["attention_mask"] * has_text[:, None]
        data.update(self._process_images(entries["images"], entries["videos"], image_options))
        data.update(self._process_audio(entries["audio"], sampling_rate))
        return BatchFeature(data)

    def _options(self, given: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """Options of the tokenizer, and of the image processor."""
        text, images = dict(given.pop("text_kwargs", {})), dict(given.pop("images_kwargs", {}))
        for name, options in (("text_kwargs", text), ("images_kwargs", images)):
            if options.pop("return_tensors", "pt") != "pt" or "return_offsets_mapping" in options:
                raise ValueError(f"{name} can change neither return_tensors nor return_offsets_mapping.")
        if not given:
            return text, images
        of_text = set(TextKwargs.__annotations__)
        kind = getattr(self.image_processor, "valid_kwargs", ImagesKwargs)
        of_images = set() if self.image_processor is None else set(get_type_hints(kind))
        for name, value in given.items():
            if name in of_text:
                text[name] = value
            elif name in of_images:
                images[name] = value
            else:
                own = [name for name in inspect.signature(type(self).__call__).parameters if name != "kwargs"]
                near = difflib.get_close_matches(name, [*own, *of_text, *of_images], 1)
                hint = (
                    f"did you mean {near[0]!r}?"
                    if near
                    else f"it takes {', '.join(own[1:])}, and options of its parts."
                )
                raise TypeError(f"The processor takes no argument {name!r}; {hint}")
        return text, images

    def _tokenize(self, text, padding, max_length, pad_to_multiple_of, return_word_index, **kwargs) -> dict[str, Any]:
        tokenizer = self.tokenizer
        if return_word_index and not tokenizer.is_fast:
            raise ValueError(
                f"Labels of words need a fast tokenizer, but {type(tokenizer).__name__} is a slow one: it does not say "
                "where in the text its tokens are."
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
        encoding = tokenizer(text, **options)
        if encoding["input_ids"].shape[1] > max_length or padding == "max_length":
            length = int(encoding["attention_mask"].sum(1).max())
            if length > max_length and "text" not in self._warned:
                self._warned.add("text")
                logger.warning(
                    f"A text of {length} tokens was cut to the {max_length} that the text encoder takes; further ones "
                    "are cut without a warning."
                )
            # Rounding up would go past the last position.
            options["pad_to_multiple_of"] = None
            options.update(padding=padding, truncation=True, max_length=max_length)
            encoding = tokenizer(text, **options)
        data = dict(encoding)
        if data["input_ids"].shape[1] == 0:
            # No text, and a tokenizer without special tokens: one place for the model to put its own vector.
            data = {name: value.new_zeros(len(text), 1, *value.shape[2:]) for name, value in data.items()}
            data["input_ids"] += tokenizer.pad_token_id or 0
        if return_word_index:
            offsets = data.pop("offset_mapping").tolist()
            data["word_index"] = torch.tensor([index_words(t, o) for t, o in zip(text, offsets, strict=True)])
        return data

    def _process_images(
        self, images: list[Any], videos: list[Any], options: Mapping[str, Any]
    ) -> dict[str, torch.Tensor]:
        distinct = _Distinct()
        index, frames = [], []
        decoded: dict[Hashable, list[Any]] = {}
        for entry, video in zip(images, videos, strict=True):
            row = [distinct.add(image_key(image), functools.partial(load_image, image)) for image in as_list(entry)]
            numbers = [-1] * len(row)
            if not is_null(video):
                key = video_key(video)
                if key not in decoded:
                    decoded[key] = load_frames(video, self.num_frames)
                for number, picture in enumerate(decoded[key]):
                    row.append(distinct.add((key, number), functools.partial(load_image, picture)))
                numbers += range(len(decoded[key]))
            index.append(row)
            frames.append(numbers)
        if distinct.items and self.image_processor is None:
            raise ValueError(
                "This processor has no image processor, but got images; it belongs to a model without images."
            )
        data = {"image_index": _padded(index)}
        if any(not is_null(video) for video in videos):
            data["frame_index"] = _padded(frames)
        if distinct.items:
            processed = self.image_processor(images=distinct.items, return_tensors="pt", **options)
            data["pixel_values"] = processed["pixel_values"]
        return data

    def _process_audio(self, audio: list[Any], sampling_rate: Optional[int]) -> dict[str, torch.Tensor]:
        extractor = self.feature_extractor
        if extractor is None:
            if any(as_clips(entry) for entry in audio):
                raise ValueError(
                    "This processor has no feature extractor, but got sound; it belongs to a model without sound."
                )
            return {}
        distinct = _Distinct()
        index = [
            [distinct.add(audio_key(x), functools.partial(self.load_audio, x, sampling_rate)) for x in as_clips(entry)]
            for entry in audio
        ]
        data = {"audio_index": _padded(index)}
        if distinct.items:
            # Whisper must be padded to its full length, its default; where the default is not to pad, to the longest.
            padding = inspect.signature(type(extractor).__call__).parameters.get("padding")
            options = {"padding": padding.default or True} if padding is not None else {}
            features = extractor(
                distinct.items,
                sampling_rate=extractor.sampling_rate,
                return_attention_mask=True,
                return_tensors="pt",
                **options,
            )
            for name, value in features.items():
                data["audio_attention_mask" if name == "attention_mask" else name] = value
        return data

    def load_audio(self, clip: Any, sampling_rate: Optional[int] = None):
        """
        The waveform of a clip at the rate of the audio encoder, as [`mm_transformers.model.audio.load_audio`] gives it.

        Raises:
            AudioError: also if it is too short for the audio encoder.
        """
        rate, name = self.feature_extractor.sampling_rate, describe(clip, "sound")
        waveform = load_audio(clip, rate, sampling_rate)
        if len(waveform) < SHORTEST_CLIP * rate:
            raise AudioError(
                f"{name} lasts {1000 * len(waveform) / rate:.1f} ms, less than the "
                f"{1000 * SHORTEST_CLIP:.0f} ms that audio encoders listen to at a time"
            )
        longest = self.longest_clip
        if longest is not None and len(waveform) > longest and "audio" not in self._warned:
            self._warned.add("audio")
            logger.warning(
                f"{name} of {len(waveform) / rate:.1f} s was cut to the {longest / rate:.1f} s that the "
                "audio encoder takes; further ones are cut without a warning."
            )
        return waveform

    @property
    def longest_clip(self) -> Optional[int]:
        """How many samples the audio encoder takes; what comes after is cut off. `None` if there is no limit."""
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
        return list(dict.fromkeys(names))


class _Distinct:
    """Items of a batch, each once."""

    def __init__(self):
        self.items: list[Any] = []
        self._numbers: dict[Hashable, int] = {}

    def add(self, key: Hashable, load: Callable[[], Any]) -> int:
        """The number of the item, which is loaded if it is new."""
        if key not in self._numbers:
            self.items.append(load())
            self._numbers[key] = len(self.items) - 1
        return self._numbers[key]


def _padded(rows: list[list[int]]) -> torch.Tensor:
    """(rows, longest row) int64, with -1 behind the shorter ones; at least one column."""
    width = max([len(row) for row in rows] + [1])
    return torch.tensor([row + [-1] * (width - len(row)) for row in rows], dtype=torch.int64)


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


def as_list(entry: Any) -> list[Any]:
    """What a row has, whatever was given: none, one, or a list, in which empty cells count for nothing."""
    entries = entry if isinstance(entry, (list, tuple)) else [entry]
    return [image for image in entries if not is_null(image)]


def as_clips(entry: Any) -> list[Any]:
    """The same for sound, where a list of numbers is one clip."""
    is_waveform = isinstance(entry, (list, tuple)) and len(entry) > 0 and isinstance(entry[0], numbers.Real)
    return [entry] if is_waveform else as_list(entry)


__all__ = ["MMTransformerProcessor"]
