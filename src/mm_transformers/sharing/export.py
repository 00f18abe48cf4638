"""
A model as graphs that need no model code of this package: ONNX, or programs of `torch.export`.

One graph has encoders, fusion and heads. If a task writes, another one has the decoder, and a third one writes further
tokens with a cache. The exporters of transformers create them. `export.json` beside them lists their inputs and
outputs.
"""

import importlib
import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import nn

from ..model.answers import evaluation_mode
from ..model.encoder_probe import traits_of
from ..model.modalities import ENCODERS
from ..model.modeling_mm_transformer import MMTransformerForMultiTask
from ..model.processing_mm_transformer import MMTransformerProcessor
from ..model.safe_writing import drop_link
from .decoder_graphs import STATES, STATES_MASK, DecoderGraph, StepGraph, keeps_cache
from .export_spec import DECODER, FIRST_GRAPH, SPEC_NAME, STEP
from .graph_formats import FORMATS, GraphFormat


class FusedGraph(nn.Module):
    """The first graph: the logits of the heads and, for the decoder, the fused states."""

    def __init__(self, model: MMTransformerForMultiTask):
        super().__init__()
        self.model, self.config = model, model.config

    def forward(self, **inputs: torch.Tensor) -> dict[str, torch.Tensor]:
        encoded = self.model.model(**inputs)
        logits = self.model(encoder_outputs=encoded).logits
        outputs = {name: logits[name] for name, task in self.model.tasks.items() if not task.needs_decoder}
        if self.model.can_generate():
            outputs |= {STATES: encoded.last_hidden_state, STATES_MASK: encoded.attention_mask.to(torch.int64)}
        return outputs


class Sample(NamedTuple):
    """Inputs for tracing, and their dynamic dimensions."""

    inputs: dict[str, torch.Tensor]
    dynamic: dict[str, list[int]]


def export_model(
    model: MMTransformerForMultiTask,
    processor: MMTransformerProcessor,
    folder: str | os.PathLike[str],
    kind: str = "onnx",
    int8: bool = False,
) -> None:
    """
    Writes the graphs, the processor and the config into a folder, atomically.

    Args:
        model ([`MMTransformerForMultiTask`]): Stays unchanged. Exported with its own precision.
        processor ([`MMTransformerProcessor`]): The processor of the model; it determines the inputs of the graphs.
        folder (`str` or `Path`): Must not exist, or be empty.
        kind (`str`, *optional*, defaults to `"onnx"`): `"onnx"` or `"torch"`.
        int8 (`bool`, *optional*, defaults to `False`): Matrices as 8-bit integers, for ONNX.

    Raises:
        ValueError: if the folder is not empty, if int8 is requested for another kind than ONNX, if an encoder runs on
            few rows at a time, or if the text encoder reads other modalities itself.
        ImportError: if the export package is not installed.
    """
    if model.config.has_language_model:
        raise ValueError(
            "A model whose language model writes cannot be exported: an exported graph keeps no cache of the text. "
            "Serve it by the pipeline."
        )
    if model.config.reads_jointly:
        raise ValueError(
            "A model whose text encoder reads other modalities itself (fusion_layers_every, or fusion_type='prefix') "
            "cannot be exported. Serve it by the pipeline."
        )
    check_exporters(kind)
    folder = Path(folder)
    graph_format = FORMATS.get(kind)
    if graph_format is None:
        raise ValueError(f"The kind of graphs must be one of {', '.join(FORMATS)}, but is {kind!r}.")
    if int8 and not graph_format.takes_int8:
        raise ValueError("int8 needs ONNX graphs: programs of torch.export keep the precision of the model.")
    for modality in ("text", *model.config.modalities):
        encoder_config = getattr(model.config, f"{modality}_config")
        if {"by_length", "one_by_one"} & set(traits_of(encoder_config)):
            raise ValueError(
                f"A model whose {modality} encoder is {encoder_config.model_type!r} cannot be exported: with this "
                "encoder, rows of a batch or padding change the answers of other rows. An exported graph cannot "
                "prevent that."
            )
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} exists and is not empty: choose another folder.")
    folder.parent.mkdir(parents=True, exist_ok=True)
    modes = ExitStack()
    modes.enter_context(evaluation_mode(model))
    staged = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        first, second = sample_inputs(model, processor, 2), sample_inputs(model, processor, 3)
        sample = Sample(first, _differing(first, second))
        graphs: dict[str, tuple[nn.Module, Sample]] = {FIRST_GRAPH: (FusedGraph(model), sample)}
        if model.can_generate():
            graphs |= _decoder_graphs(model, first)
        spec: dict[str, Any] = {"format": kind, "int8": int8, "graphs": {}}
        for name, (module, traced) in graphs.items():
            outputs = _export(module, traced, staged / f"{name}{graph_format.suffix}", graph_format, int8)
            shapes = {
                key: [None if i in traced.dynamic[key] else n for i, n in enumerate(value.shape)]
                for key, value in traced.inputs.items()
            }
            types = {key: str(value.dtype).removeprefix("torch.") for key, value in traced.inputs.items()}
            spec["graphs"][name] = {"inputs": shapes, "types": types, "outputs": outputs}
        model.config.save_pretrained(staged)
        processor.save_pretrained(staged)
        if model.can_generate():
            model.generation_config.save_pretrained(staged)
        (staged / SPEC_NAME).write_text(json.dumps(spec, indent=2) + "\n", encoding="utf-8")
        staged.chmod(0o755)
        drop_link(folder)  # to an empty folder, or to none
        if folder.exists():
            folder.rmdir()
        staged.rename(folder)
    finally:
        shutil.rmtree(staged, ignore_errors=True)
        modes.close()


def check_exporters(kind: str) -> None:
    """
    Checks that the export packages are installed.

    Raises:
        ImportError: one sentence, if one is not.
    """
    needed = {"transformers.exporters.quantizers": "transformers 5.23 or newer"}
    known = FORMATS.get(kind)
    needed |= known.packages if known is not None else {}
    for module, package in needed.items():
        try:
            importlib.import_module(module)
        except ImportError as error:
            raise ImportError(
                f"Export needs {package} to be installed: pip install -U '{package.split()[0]}'."
            ) from error


def sample_inputs(
    model: MMTransformerForMultiTask, processor: MMTransformerProcessor, size: int
) -> dict[str, torch.Tensor]:
    """
    Inputs of `size` rows, always the same; the numbers and lengths of texts, images and sounds also depend on `size`.

    Each image and sound is another one, and the last of three or more rows has none: so the logits tell whether each
    row has its own.
    """
    modalities: dict[str, Any] = {}
    rng = np.random.default_rng(size)
    counts = [size, *[1] * (size - 1)] if size < 3 else [size, *[1] * (size - 2), 0]
    if model.config.vision_config is not None:
        modalities["images"] = [
            [Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)) for _ in range(count)]
            for count in counts
        ]
    if model.config.audio_config is not None:
        rate = processor.feature_extractor.sampling_rate
        modalities["sampling_rate"] = rate
        modalities["audio"] = [
            [(0.1 * rng.standard_normal(rate // 4 * count)).astype(np.float32) for _ in range(count)]
            for count in counts
        ]
    texts = ["a longer text " * size, *["a text"] * (size - 1)]
    inputs = dict(processor(text=texts, **modalities))
    for name, config in processor.own_configs.items():
        kind = ENCODERS[name]
        blank = {} if kind.own is None else kind.own.blank_input(config)
        inputs |= {key: value.expand(size, *value.shape[1:]) for key, value in blank.items()}
        inputs[str(kind.index)] = torch.arange(size)[:, None]
    return {
        name: value.to(model.device, model.dtype) if value.is_floating_point() else value.to(model.device)
        for name, value in inputs.items()
        if isinstance(value, torch.Tensor) and name not in ("word_index", "frame_index")
    }


def _differing(first: Mapping[str, torch.Tensor], second: Mapping[str, torch.Tensor]) -> dict[str, list[int]]:
    return {
        name: [i for i in range(value.ndim) if value.shape[i] != second[name].shape[i]] for name, value in first.items()
    }


def _decoder_graphs(
    model: MMTransformerForMultiTask, inputs: Mapping[str, torch.Tensor]
) -> dict[str, tuple[nn.Module, Sample]]:
    """The graphs of the decoder with their inputs; that of further tokens only if the decoder keeps a cache."""
    text_model = model.model.text_model
    with torch.no_grad():
        encoded = model.model(**inputs)
    states, mask = encoded.last_hidden_state, encoded.attention_mask.to(torch.int64)
    has_cache = keeps_cache(text_model, states, mask)
    first = DecoderGraph(text_model, has_cache)
    ids = torch.ones(states.shape[0], 3, dtype=torch.int64, device=states.device)
    values = {"decoder_input_ids": ids, STATES: states, STATES_MASK: mask}
    graphs: dict[str, tuple[nn.Module, Sample]] = {DECODER: (first, Sample(values, {key: [0, 1] for key in values}))}
    if has_cache:
        with torch.no_grad():
            cached = {name: value for name, value in first(**values).items() if name != "logits"}
        values = {**values, "decoder_input_ids": ids[:, :1], **cached}
        dynamic = {"decoder_input_ids": [0], STATES: [0, 1], STATES_MASK: [0, 1], **{name: [0, 2] for name in cached}}
        graphs[STEP] = (StepGraph(text_model), Sample(values, dynamic))
    return graphs


def _export(module: nn.Module, sample: Sample, path: Path, graph_format: GraphFormat, int8: bool) -> list[str]:
    """Writes one graph; returns the names of its outputs."""
    module.eval()
    with torch.no_grad():
        names = list(module(**sample.inputs))
    options = {
        "dynamic": True,
        "dynamic_shapes": {
            name: dict.fromkeys(dims, torch.export.Dim.DYNAMIC) for name, dims in sample.dynamic.items()
        },
        "prefer_deferred_runtime_asserts_over_guards": True,
    }
    graph_format.write(module, dict(sample.inputs), options, path, int8)
    return names
