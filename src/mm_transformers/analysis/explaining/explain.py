"""`explain`: the words, patches and sounds that an answer depends on."""

import difflib
from collections.abc import Mapping, Sequence
from typing import Any, Optional, overload

import numpy as np
import torch

from ...data.cells import as_records
from ...data.sources import batches
from ...model.answers import check_tasks, unwrapped
from ...model.generation import repeatable
from ...model.images import load_image, pixels_for_each
from ...model.joint_reading import observed_runs
from ...model.label_cells import is_null
from ...model.language_model import longest_prompt
from ...model.modalities import as_clips, as_list, own_encoders
from ...model.modeling_mm_transformer import MMTransformerForMultiTask, MMTransformerModelOutput
from ...model.padding import leading_padding, roll_rows
from ...model.pipeline_mm_transformer import read_rows
from ...model.processing_mm_transformer import MMTransformerProcessor
from ...model.video import load_frames
from .explanation import ColumnRelevance, Explanation, ImageRelevance, SoundRelevance, TokenRelevance
from .input_relevance import relevance_of_inputs
from .methods import ATTENTION_METHODS, check_method
from .own_copy import own_copy
from .questions import Asked, Question
from .recording import watched
from .shares import shares_of_modalities
from .text_passes import path_of
from .token_places import over_time, patch_grid, seen_region, spread_over_pixels, token_spans


@overload
def explain(
    model: MMTransformerForMultiTask,
    processor: MMTransformerProcessor,
    row: str | Mapping[str, Any],
    task: Optional[str] = ...,
    method: str = ...,
    answer: Any = ...,
    word: Optional[int] = ...,
    batch_size: int = ...,
    seed: int = ...,
    **generation_options: Any,
) -> Explanation: ...


@overload
def explain(
    model: MMTransformerForMultiTask,
    processor: MMTransformerProcessor,
    row: Sequence[str | Mapping[str, Any]],
    task: Optional[str] = ...,
    method: str = ...,
    answer: Any = ...,
    word: Optional[int] = ...,
    batch_size: int = ...,
    seed: int = ...,
    **generation_options: Any,
) -> list[Explanation]: ...


def explain(
    model: MMTransformerForMultiTask,
    processor: MMTransformerProcessor,
    row: str | Mapping[str, Any] | Sequence[str | Mapping[str, Any]],
    task: Optional[str] = None,
    method: str = "chefer",
    answer: Any = None,
    word: Optional[int] = None,
    batch_size: int = 8,
    seed: int = 0,
    **generation_options: Any,
) -> Explanation | list[Explanation]:
    """
    The words, image patches and parts of the sound that an answer depends on.

    Methods:

    - `"chefer"`: gradient times attention through all layers of encoders and fusion, by the bi-modal rules of Chefer et
      al. 2021 (https://arxiv.org/abs/2103.15679);
    - `"rollout"`: the product of the attentions of all layers (https://arxiv.org/abs/2005.00928). It does not depend on
      the answer;
    - `"gradient_attention"`: gradient times attention of the last layer of the fusion;
    - `"attention"`: the attention of that layer. It does not depend on the answer;
    - `"integrated_gradients"`: uses no attention (https://arxiv.org/abs/1703.01365). It needs the extra `explain` and
      takes 32 times as long;
    - `"random"`: the baseline that the others must beat.

    The share of each modality is measured separately, in the same way for all methods: see [`Explanation.shares`].

    In some encoders the tokens do not attend to all others (Swin, ConvNeXt, ResNet). Relevance is then not followed
    through the encoder: each token stands for its own part of the picture. Some models have no attention to read: the
    fusion `late`, and heads that read the encoder outputs ([`Retrieval`]). For these, every method uses gradient times
    activation.

    A head with a linear probe (`config.linear_probe`) depends on the encoder outputs directly, even while the gates of
    the fusion are zero. The relevance of an encoder output is what it adds to the score of the probe, followed through
    its encoder. The relevance from the fusion is added to it. `"rollout"` and `"attention"` use no gradients: both
    parts sum to about 1, and the part of the probe depends on the answer. `"integrated_gradients"` needs no special
    rule for the probe.

    Args:
        model ([`MMTransformerForMultiTask`]):
            Runs in evaluation mode, whatever its mode. It is not changed, so several threads may use it at once.
        processor ([`MMTransformerProcessor`]): The processor of the model.
        row (`dict`, `str`, or a list, a data set or a table of these):
            As in [`MultimodalPipeline`]; keys that are no input are ignored.
        task (`str`, *optional*): The task whose answer to explain; may be left out if the model has one task.
        method (`str`, *optional*, defaults to `"chefer"`): One of the above.
        answer (*optional*): The label or text to explain. By default the answer of the model.
        word (`int`, *optional*):
            The number of the word, counted from 0: of the text for tasks that label words, of the answer for tasks that
            write. By default all words together.
        batch_size (`int`, *optional*, defaults to 8): Rows at once, for a list.
        seed (`int`, *optional*, defaults to 0): The seed of `"random"`.
        generation_options: for `model.generate`, if the task writes texts. Nothing is drawn at random without
            `do_sample=True`.

    Returns:
        [`Explanation`], or a list of them for a list of rows.

    Raises:
        ValueError: one sentence, if a row cannot be read, or there is no such task, method, answer or word.
        ImportError: if the extra `explain` is needed and not installed.

    Example:

    ```python
    >>> explanation = explain(model, processor, {"text": "Lovely weather!", "image": "rain.jpg"}, task="sentiment")
    >>> explanation.plot().savefig("why.png")
    ```
    """
    check_method(method)
    model = unwrapped(model)
    if task is None and len(model.tasks) > 1:
        raise ValueError(f"Choose the task to explain by task=, one of {', '.join(model.tasks)}.")
    names = check_tasks(model, None if task is None else [task])
    is_continued = model.config.has_language_model and model.tasks[names[0]].needs_decoder
    if method == "integrated_gradients" and (is_continued or model.config.reads_jointly):
        raise ValueError(
            f"Task {names[0]!r}: the text encoder reads more than the text of a row, which integrated_gradients does "
            "not follow: choose another method, such as 'chefer'."
        )
    if word is not None and word < 0:
        raise ValueError(f"word must be at least 0, but is {word}.")
    question = Question(names[0], answer, word, repeatable(model, generation_options))
    is_one = isinstance(row, (str, Mapping))
    given = [row] if is_one else as_records(row)
    rows = [given[i] for i in range(len(given))]
    model = own_copy(model).eval()
    found: list[Explanation] = []
    is_table = not is_one and hasattr(row, "column_names")
    for numbers, of_batch in batches(rows, batch_size):
        batch = list(zip(numbers, of_batch, strict=True))
        found += _explain_batch(model, processor, batch, question, method, seed + numbers.start, is_table)
    return found[0] if is_one else found


def _explain_batch(
    model: MMTransformerForMultiTask,
    processor: MMTransformerProcessor,
    numbered: list[tuple[int, Any]],
    question: Question,
    method: str,
    seed: int,
    is_table: bool,
) -> list[Explanation]:
    known = _known_keys(model, processor, numbered)
    wants_words = model.tasks[question.task].is_token_level
    longest = longest_prompt(model.config)
    read = read_rows(numbered, processor, known, wants_words, is_table=is_table, max_length=longest)
    if "error" in read:
        raise ValueError(read["error"])
    inputs = {name: x.to(model.device) for name, x in apart(read["tensors"]).items()}
    words = None if read["word_index"] is None else read["word_index"].to(model.device)
    # As text encoders get it, so that their attentions have the places of the tokens.
    shifts, length = leading_padding(inputs["attention_mask"]), inputs["attention_mask"].shape[1]
    for name in ("input_ids", "token_type_ids", "attention_mask"):
        if name in inputs:
            inputs[name] = roll_rows(inputs[name], shifts)
    if words is not None and words.shape[1] == length:
        words = roll_rows(words, shifts)
    is_continued = model.config.has_language_model and model.tasks[question.task].needs_decoder
    answers = None
    if is_continued:
        # Written before anything is recorded.
        with torch.no_grad():
            written = question.ask(
                model, processor, model.model(**inputs), read["texts"], words, first_row=numbered[0][0]
            )
        answers = written.answers
    with watched(model) as seen, observed_runs() as runs:
        outputs = model.model(**inputs, output_attentions=True)
        asked = question.ask(model, processor, outputs, read["texts"], words, answers, first_row=numbered[0][0])
        if method in ATTENTION_METHODS:
            kind = ATTENTION_METHODS[method]
            path = path_of(model, seen, outputs, runs, is_continued, kind)
            relevance = path.of_rows(relevance_of_inputs(path.seen, path.outputs, asked.scores, kind))
    if method == "random":
        relevance = _random(outputs, seen.num_tokens, seed)
    elif method == "integrated_gradients":
        from .integrated_gradients import integrated_gradients

        relevance = integrated_gradients(
            model, processor, inputs, question, asked, read["texts"], words, seen, outputs.encoded
        )
    shares = shares_of_modalities(model, processor, inputs, outputs.encoded, question, asked, read["texts"], words)
    placing = _Placing(model, processor, inputs, outputs, relevance, seen.maps, shares)
    # Columns of numbers keep their names beside the keys.
    rows = [{**row, **processor.with_keys(row)} if isinstance(row, Mapping) else {"text": row} for _, row in numbered]
    return [placing.explanation(i, row, question.task, asked, method) for i, row in enumerate(rows)]


def _known_keys(
    model: MMTransformerForMultiTask, processor: MMTransformerProcessor, numbered: list[tuple[int, Any]]
) -> list[str]:
    """The known keys of rows. Other columns of a table are ignored, but a name close to a key is an error."""
    keys = {key for _, row in numbered if isinstance(row, Mapping) for key in row}
    others = [key for key in keys if not difflib.get_close_matches(str(key), processor.row_keys, 1)]
    return [*processor.row_keys, *(task.column for task in model.tasks.values()), *others]


def apart(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """
    The same inputs with nothing shared between rows, so that the gradient of an item belongs to one row.

    An item that occurs twice in a row is there twice.
    """
    result = dict(tensors)
    for index, parts in (
        ("image_index", ["pixel_values"]),
        ("audio_index", ["input_values", "input_features", "audio_attention_mask"]),
        *((str(encoder_kind.index), list(encoder_kind.inputs)) for encoder_kind in own_encoders().values()),
    ):
        given = [part for part in parts if part in result]
        if index in result and given:
            has_item = result[index] >= 0
            which = result[index][has_item]
            result.update({part: result[part][which] for part in given})
            result[index] = torch.where(has_item, has_item.flatten().cumsum(0).view_as(has_item) - 1, -1)
    return result


def _random(outputs: Any, num_tokens: Mapping[str, int], seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {
        name: (len(stream.mask), num_tokens[name])
        if stream.item_index is None
        else (*stream.item_index.shape, num_tokens[name])
        for name, stream in outputs.encoded.items()
    }
    return {name: torch.rand(shape, generator=generator) for name, shape in shapes.items()}


class _Placing:
    """Assigns the relevance of tokens to their places in the row."""

    def __init__(
        self,
        model: MMTransformerForMultiTask,
        processor: MMTransformerProcessor,
        inputs: dict[str, torch.Tensor],
        outputs: MMTransformerModelOutput,
        relevance: dict[str, torch.Tensor],
        maps: dict[str, tuple[int, int]],
        shares: list[dict[str, float]],
    ):
        self.shares = shares
        self.model, self.processor, self.inputs, self.outputs = model, processor, inputs, outputs
        self.relevance = {name: values.float().cpu().numpy() for name, values in relevance.items()}
        self.maps = maps

    def explanation(self, number: int, row: Mapping[str, Any], task: str, asked: Asked, method: str) -> Explanation:
        text: str = "" if is_null(row.get("text")) else row["text"]
        return Explanation(
            task,
            asked.answers[number],
            float(asked.scores[number].detach()),
            method,
            text,
            self._tokens(number, text),
            self._images(number, row),
            self._sounds(number, row),
            asked.words[number],
            self.shares[number],
            self._columns(number, row),
        )

    def _tokens(self, number: int, text: str) -> list[TokenRelevance]:
        places = self.inputs["attention_mask"][number].nonzero()[:, 0].tolist()
        if not text.strip() or not places:
            return []
        tokenizer = self.processor.tokenizer
        ids = self.inputs["input_ids"][number][places].tolist()
        spans = token_spans(tokenizer, text, ids)
        names = tokenizer.convert_ids_to_tokens(ids)
        return [
            TokenRelevance(text[start:end] if start < end else name, start, end, float(value))
            for name, (start, end), value in zip(names, spans, self.relevance["text"][number][places], strict=True)
        ]

    def _images(self, number: int, row: Mapping[str, Any]) -> list[ImageRelevance]:
        given = as_list(row.get("image"))
        most_pixels = pixels_for_each(given)
        pictures = [load_image(image, most_pixels=most_pixels) for image in given]
        if not is_null(row.get("video")):
            pictures += load_frames(row["video"], self.processor.num_frames)
        if not pictures:
            return []
        height, width = self.inputs["pixel_values"].shape[-2:]
        found = []
        for picture, values in zip(pictures, self.relevance["vision"][number], strict=False):
            shape = self.maps.get("vision")
            if shape is None:
                shape = patch_grid(self.model.config.vision_config, len(values), height, width)
            patches = values[len(values) - shape[0] * shape[1] :].reshape(shape)
            region = seen_region(self.processor.image_processor, *picture.size)
            pixels = spread_over_pixels(patches, picture.width, picture.height, region)
            found.append(ImageRelevance(picture, patches, pixels))
        return found

    def _sounds(self, number: int, row: Mapping[str, Any]) -> list[SoundRelevance]:
        clips: Sequence[Any] = as_clips(row.get("audio"))
        if not clips:
            return []
        config, stream = self.model.config.audio_config, self.outputs.encoded["audio"]
        found = []
        for clip, values, item in zip(clips, self.relevance["audio"][number], stream.item_index[number], strict=False):
            rate = self.processor.feature_extractor.sampling_rate
            num_samples = len(self.processor.load_audio(clip))
            seconds = min(num_samples, self.processor.longest_clip or num_samples) / rate
            if stream.token_mask is not None:
                values = values[stream.token_mask[item].cpu().numpy()]
            if config.model_type == "audio-spectrogram-transformer":
                seconds = config.max_length / 100  # its window, in frames of 10 ms
            found.append(SoundRelevance(seconds, np.asarray(over_time(config, values))))
        return found

    def _columns(self, number: int, row: Mapping[str, Any]) -> list[ColumnRelevance]:
        if "table" not in self.relevance:
            return []
        stream, table = self.outputs.encoded["table"], self.processor.table_config
        item = int(stream.item_index[number, 0])
        if item < 0:
            return []
        cells = zip(table.token_names, self.relevance["table"][number, 0], stream.token_mask[item], strict=True)
        return [ColumnRelevance(name, row[name], float(value)) for name, value, is_there in cells if is_there]
