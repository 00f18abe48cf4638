"""Turns texts and images into the tensors of the model."""

from typing import Any, Optional

import torch
from transformers import AutoConfig, AutoTokenizer, BatchFeature, ProcessorMixin

# Not from the top: there, transformers 5.17 wants torchvision for it.
from transformers.models.auto.image_processing_auto import AutoImageProcessor
from transformers.utils import logging

from .encoders import max_text_positions, sub_config_of
from .images import image_key, load_image
from .task_base import is_null
from .task_token_classification import index_words


logger = logging.get_logger(__name__)


class MMTransformerProcessor(ProcessorMixin):
    r"""
    A tokenizer and an image processor, for texts with any number of images each.

    Args:
        image_processor (`BaseImageProcessor`, *optional*): That of the vision encoder; `None` for text alone.
        tokenizer (`PreTrainedTokenizerBase`): That of the text encoder.

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

    image_processor = None

    def __init__(self, image_processor=None, tokenizer=None, **kwargs):
        if image_processor is None:
            # The base class knows no optional parts, so this object has one the fewer.
            self.get_attributes = _tokenizer_alone
            super().__init__(tokenizer=tokenizer, **kwargs)
        else:
            super().__init__(image_processor, tokenizer, **kwargs)
        self._warned = False

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, **kwargs):
        saved, _ = cls.get_processor_dict(pretrained_model_name_or_path, **kwargs)
        if saved and "image_processor" not in saved:
            return cls(tokenizer=AutoTokenizer.from_pretrained(pretrained_model_name_or_path, **kwargs))
        return super().from_pretrained(pretrained_model_name_or_path, **kwargs)

    @classmethod
    def from_encoders(cls, text: str, vision: Optional[str] = None, backend: Optional[str] = None, **kwargs):
        """
        The processor of a model with these encoders.

        Args:
            text (`str`): Hub id or local folder of the text encoder.
            vision (`str`, *optional*): Hub id or local folder of the vision encoder.
            backend (`str`, *optional*):
                `"pil"` or `"torchvision"`, which does the resizing. Defaults to torchvision where it is installed.
            kwargs: for all `from_pretrained` (`revision`, `token`, `cache_dir`, ...).
        """
        tokenizer = AutoTokenizer.from_pretrained(text, **kwargs)
        positions = max_text_positions(sub_config_of(AutoConfig.from_pretrained(text, **kwargs), "text"))
        if positions is not None:
            tokenizer.model_max_length = min(tokenizer.model_max_length, positions)
        image_processor = None
        if vision is not None:
            chosen = {} if backend is None else {"backend": backend}
            image_processor = AutoImageProcessor.from_pretrained(vision, **chosen, **kwargs)
        return cls(image_processor=image_processor, tokenizer=tokenizer)

    def __call__(
        self,
        text: Any = None,
        images: Any = None,
        padding: Any = True,
        max_length: Optional[int] = None,
        pad_to_multiple_of: Optional[int] = None,
        return_word_index: bool = False,
        return_tensors: str = "pt",
        **kwargs,
    ) -> BatchFeature:
        """
        Args:
            text (`str` or `list[str]`): One text per row.
            images (*optional*):
                One entry per row: an image, a list of images, or `None`. For a single text, the same without the
                outer list. An image is whatever [`load_image`] takes; one that several rows share, by object, path or
                bytes, is processed once.
            padding (`bool` or `str`, *optional*, defaults to `True`): As tokenizers take it.
            max_length (`int`, *optional*): Longest text in tokens; defaults to `tokenizer.model_max_length`.
            pad_to_multiple_of (`int`, *optional*): As tokenizers take it.
            return_word_index (`bool`, *optional*, defaults to `False`):
                Whether to return `word_index`: the number of the word that starts at each token, -1 elsewhere.

        Returns:
            [`BatchFeature`] with `input_ids` and `attention_mask` (batch, text_len) int64; `pixel_values` (num_images,
            channels, height, width) float32, unless no row has an image; `image_index` (batch, max_images) int64.

        Raises:
            ValueError: if texts are not strings, or there are not as many entries in `images` as texts.
            ImageError: if an image cannot be read.
        """
        if return_tensors != "pt":
            raise ValueError(f"return_tensors must be 'pt': the model is a PyTorch model, but got {return_tensors!r}.")
        if isinstance(text, str):
            text, images = [text], None if images is None else [images]
        if not isinstance(text, (list, tuple)) or not text or not all(isinstance(item, str) for item in text):
            raise ValueError(
                "text must be a string or a list of strings, one per row; use '' where there is only an image."
            )
        text = list(text)
        if isinstance(images, (str, bytes, dict)) or not (images is None or hasattr(images, "__len__")):
            raise ValueError(
                f"images must be a list with one entry per text, as text is a list, but is of type "
                f"{type(images).__name__}."
            )
        images = [None] * len(text) if images is None else list(images)
        if len(images) != len(text):
            raise ValueError(
                f"images must have one entry per text (None where there is none), but there are {len(images)} entries "
                f"for {len(text)} texts."
            )
        data = self._tokenize(text, padding, max_length, pad_to_multiple_of, return_word_index, **kwargs)
        data.update(self._process_images(images))
        return BatchFeature(data)

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
            if length > max_length and not self._warned:
                self._warned = True
                logger.warning(
                    f"A text of {length} tokens was cut to the {max_length} that the text encoder takes; further ones "
                    "are cut without a warning."
                )
            # Rounding up would go past the last position.
            options["pad_to_multiple_of"] = None
            options.update(padding=padding, truncation=True, max_length=max_length)
            encoding = tokenizer(text, **options)
        data = dict(encoding)
        if return_word_index:
            offsets = data.pop("offset_mapping").tolist()
            data["word_index"] = torch.tensor([index_words(t, o) for t, o in zip(text, offsets, strict=True)])
        return data

    def _process_images(self, images: list[Any]) -> dict[str, torch.Tensor]:
        distinct: dict[Any, int] = {}
        pictures: list[Any] = []
        rows = []
        for entry in images:
            row = []
            for image in as_image_list(entry):
                key = image_key(image)
                if key not in distinct:
                    distinct[key] = len(pictures)
                    pictures.append(load_image(image))
                row.append(distinct[key])
            rows.append(row)
        if pictures and self.image_processor is None:
            raise ValueError(
                "This processor has no image processor, but got images; it belongs to a model of text alone."
            )
        width = max([len(row) for row in rows] + [1])
        data = {"image_index": torch.tensor([row + [-1] * (width - len(row)) for row in rows], dtype=torch.int64)}
        if self.image_processor is not None and pictures:
            data["pixel_values"] = self.image_processor(images=pictures, return_tensors="pt")["pixel_values"]
        return data

    @property
    def model_input_names(self) -> list[str]:
        names = list(self.tokenizer.model_input_names)
        return names if self.image_processor is None else [*names, "pixel_values", "image_index"]


def _tokenizer_alone() -> list[str]:
    return ["tokenizer"]


def as_image_list(entry: Any) -> list[Any]:
    """The images of a row, whatever was given: none, one, or a list, in which empty cells count for nothing."""
    entries = entry if isinstance(entry, (list, tuple)) else [entry]
    return [image for image in entries if not is_null(image)]


__all__ = ["MMTransformerProcessor"]
