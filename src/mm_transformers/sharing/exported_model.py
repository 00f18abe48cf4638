"""Exported graphs, used like the original model."""

import copy
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, Optional

import torch
from transformers import EncoderDecoderCache, GenerationConfig, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput, Seq2SeqLMOutput

from ..model.answers import decode_answers
from ..model.configuration_mm_transformer import MMTransformerConfig
from ..model.generation import AnswerDecoder, split_inputs, task_that_writes
from ..model.modalities import OTHER_ENCODERS
from ..model.modeling_mm_transformer import MMTransformerOutput
from .decoder_graphs import CACHE, CROSS, NEXT, SELF, STATES, STATES_MASK, named, pairs
from .export_spec import DECODER, FIRST_GRAPH, SPEC_NAME, STEP, example_shape, read_spec
from .graph_formats import FORMATS, Run


class ExportedModel:
    """
    The graphs from [`~mm_transformers.sharing.export.export_model`], on the CPU, as a model.

    It takes the outputs of the processor, and returns the outputs of [`MMTransformerForMultiTask`], without losses.
    `generate` and `decode` are those of the model. If the folder has a graph for it, the keys and values of written
    tokens are cached. Older folders, and decoders without a cache, read the whole written text again for each token.

    Args:
        folder (`str` or `Path`): The folder of the graphs.
        trust_pickle (`bool`, *optional*, defaults to `False`):
            Whether to load programs of `torch.export` (`.pt2`): torch reads them by pickle, so they can run any code.
            ONNX graphs need no trust.

    Raises:
        OSError: if there are none, or they cannot be loaded.
        ValueError: one sentence, if there are programs of `torch.export` without `trust_pickle`, or the description of
            the graphs is not one of `export_model`.

    Example:

    ```python
    >>> model = ExportedModel("exported")
    >>> processor = MMTransformerProcessor.from_pretrained("exported")
    >>> model.decode(model(**processor(text=["Lovely weather!"], images=["rain.jpg"])))
    ```
    """

    def __init__(self, folder: str | os.PathLike[str], trust_pickle: bool = False):
        path = Path(folder, SPEC_NAME)
        if not path.is_file():
            raise OSError(
                f"{folder} holds no exported model: it has no {SPEC_NAME}. Export a model by `mm-transformers export`."
            )
        spec = read_spec(path)
        graph_format = FORMATS[spec["format"]]
        if graph_format.needs_trust and not trust_pickle:
            raise ValueError(
                f"{folder} holds programs of torch.export, which can run any code when they are loaded. Export to "
                "ONNX instead, or pass trust_pickle=True if you trust their author."
            )
        self.config = MMTransformerConfig.from_pretrained(folder)
        self.tasks = self.config.get_tasks()
        graphs = {
            name: graph_format.load(Path(folder, f"{name}{graph_format.suffix}"), graph)
            for name, graph in spec["graphs"].items()
        }
        self.model = _Fused(graphs[FIRST_GRAPH], spec["graphs"][FIRST_GRAPH])
        if DECODER in graphs:
            decoder_config: Any = copy.deepcopy(self.config.decoder_config or self.config.text_config)
            decoder_config.is_encoder_decoder = True  # also for a decoder that was added to an encoder
            self.model.text_model = _Decoder(decoder_config, graphs[DECODER], graphs.get(STEP))
            self.model.text_model.generation_config = GenerationConfig.from_pretrained(folder)

    def __call__(self, **inputs: torch.Tensor) -> MMTransformerOutput:
        """
        The outputs of the heads.

        Args:
            inputs: the outputs of the processor; images and sounds may be absent.
        """
        return MMTransformerOutput(logits=self.model(**inputs).logits)

    def decode(self, outputs: MMTransformerOutput, word_index: Optional[torch.Tensor] = None) -> list[dict[str, Any]]:
        """See [`MMTransformerForMultiTask.decode`]."""
        return decode_answers(self.tasks, outputs.logits or {}, word_index)

    def can_generate(self) -> bool:
        """Whether there is a graph of a decoder."""
        return self.model.text_model is not None

    @torch.no_grad()
    def generate(self, task: Optional[str] = None, **kwargs: Any) -> torch.Tensor:
        """See [`MMTransformerForMultiTask.generate`]."""
        writing = task_that_writes(self.tasks, task)
        inputs, options = split_inputs(_Fused.forward, kwargs)
        return AnswerDecoder(self.model.text_model).generate(writing, self.model(**inputs), **options)


class _FusedOutput(NamedTuple):
    """Outputs of the first graph; the fused states only if there is a decoder."""

    logits: dict[str, torch.Tensor]
    last_hidden_state: torch.Tensor
    attention_mask: torch.Tensor


class _Fused:
    """The first graph. It needs images, so rows without images get a blank one that is masked."""

    text_model: Optional[PreTrainedModel] = None

    def __init__(self, run: Run, spec: Mapping[str, Any]):
        self.run, self.shapes, self.types = run, spec["inputs"], spec["types"]

    def __call__(self, **inputs: Any) -> _FusedOutput:
        return self.forward(**inputs)

    def forward(
        self,
        input_ids: Optional[torch.Tensor] = None,
        attention_mask: Optional[torch.Tensor] = None,
        token_type_ids: Optional[torch.Tensor] = None,
        pixel_values: Optional[torch.Tensor] = None,
        image_index: Optional[torch.Tensor] = None,
        frame_index: Optional[torch.Tensor] = None,
        input_values: Optional[torch.Tensor] = None,
        input_features: Optional[torch.Tensor] = None,
        audio_attention_mask: Optional[torch.Tensor] = None,
        audio_index: Optional[torch.Tensor] = None,
        word_index: Optional[torch.Tensor] = None,
        **own: Any,
    ) -> _FusedOutput:
        given = {name: value for name, value in {**locals(), **own}.items() if isinstance(value, torch.Tensor)}
        given.pop("word_index", None)
        if frame_index is not None and (given.pop("frame_index") >= 0).any():
            raise ValueError("An exported model takes pictures and no videos.")
        unknown = sorted(set(given) - set(self.shapes))
        if unknown:
            raise ValueError(f"The exported model takes {', '.join(self.shapes)}, but got {unknown[0]}.")
        feed = {name: self._value(name, given) for name in self.shapes}
        outputs = self.run(feed)
        logits = {name: value for name, value in outputs.items() if name not in (STATES, STATES_MASK)}
        none = torch.zeros(0)
        return _FusedOutput(logits, outputs.get(STATES, none), outputs.get(STATES_MASK, none))

    def _value(self, name: str, given: Mapping[str, torch.Tensor]) -> torch.Tensor:
        dtype = getattr(torch, self.types[name])
        if name in given and given[name].shape[0] > 0:
            return given[name].to("cpu", dtype)
        rows = given["input_ids"].shape[0]
        if name == "attention_mask":
            return torch.ones(given["input_ids"].shape, dtype=dtype)
        items = next(
            (encoder_kind.inputs for encoder_kind in OTHER_ENCODERS.values() if encoder_kind.index == name), None
        )
        if items is not None:
            has_any = any(item in given and given[item].shape[0] > 0 for item in items)
            return torch.arange(rows)[:, None] if has_any else torch.full((rows, 1), -1)
        if name == "token_type_ids":
            return torch.zeros(given["input_ids"].shape, dtype=dtype)
        if name == "audio_attention_mask" and "input_values" in given:
            return torch.ones(given["input_values"].shape[:2], dtype=dtype)
        shape = example_shape(self.shapes[name])  # one blank item
        return torch.zeros(shape, dtype=dtype) if name != "audio_attention_mask" else torch.ones(shape, dtype=dtype)


class _Decoder(PreTrainedModel, GenerationMixin):
    """The graphs of the decoder, with the interface of transformers' generation."""

    main_input_name = "input_ids"

    def __init__(self, config: PreTrainedConfig, run: Run, step: Optional[Run]):
        super().__init__(config)
        self.run, self.step = run, step
        self.nothing = torch.nn.Parameter(torch.zeros(()), requires_grad=False)

    def get_encoder(self, *args: Any, **kwargs: Any) -> None:
        return None  # it has run

    def prepare_inputs_for_generation(
        self,
        input_ids: torch.Tensor,
        encoder_outputs: Optional[BaseModelOutput] = None,
        attention_mask: Optional[torch.Tensor] = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        cache: Optional[EncoderDecoderCache] = kwargs.get(CACHE)
        is_cached = cache is not None and cache.get_seq_length() > 0
        return {
            "decoder_input_ids": input_ids[:, -1:] if is_cached else input_ids,
            "encoder_outputs": encoder_outputs,
            "attention_mask": attention_mask,
            CACHE: cache,
        }

    def generate(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        return super().generate(*args, **(kwargs if self.step is not None else {**kwargs, "use_cache": False}))

    def forward(
        self,
        decoder_input_ids: Optional[torch.Tensor] = None,
        encoder_outputs: Optional[BaseModelOutput] = None,
        attention_mask: Optional[torch.Tensor] = None,
        **kwargs: Any,
    ) -> Seq2SeqLMOutput:
        states = encoder_outputs[0]
        feed = {"decoder_input_ids": decoder_input_ids, STATES: states, STATES_MASK: attention_mask}
        cache: Optional[EncoderDecoderCache] = kwargs.get(CACHE)
        if cache is None or self.step is None:
            return Seq2SeqLMOutput(logits=self.run(feed)["logits"])
        if cache.get_seq_length() == 0:
            outputs = self.run(feed)
            for name, part in ((SELF, cache.self_attention_cache), (CROSS, cache.cross_attention_cache)):
                for i, (keys, values) in enumerate(pairs(name, outputs)):
                    part.update(keys, values, i)
        else:
            cached = {**named(SELF, cache.self_attention_cache), **named(CROSS, cache.cross_attention_cache)}
            outputs = self.step({**feed, **cached})
            for layer, (keys, values) in zip(cache.self_attention_cache.layers, pairs(NEXT, outputs), strict=True):
                layer.keys, layer.values = keys, values
        return Seq2SeqLMOutput(logits=outputs["logits"], **{CACHE: cache})
