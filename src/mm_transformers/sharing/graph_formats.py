"""The formats of exported graphs: how each is written and loaded."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from ..model.label_cells import shorten


# A loaded graph: its inputs -> its outputs, by name.
Run = Callable[[Mapping[str, torch.Tensor]], dict[str, torch.Tensor]]


class GraphFormat(NamedTuple):
    """
    A format of exported graphs.

    Args:
        suffix: of its files.
        write: exports a module to a file.
        load: a file, and its entry in the description -> the graph.
        takes_int8: whether matrices may be 8-bit integers.
        needs_trust: whether a file can run any code when it is loaded.
        packages: modules that it needs, and how they are installed.
    """

    suffix: str
    write: Callable[[nn.Module, dict[str, Any], dict[str, Any], Path, bool], None]
    load: Callable[[Path, Mapping[str, Any]], Run]
    takes_int8: bool
    needs_trust: bool
    packages: dict[str, str]


def _write_onnx(module: nn.Module, inputs: dict[str, Any], options: dict[str, Any], path: Path, int8: bool) -> None:
    from transformers.exporters import OnnxConfig, OnnxExporter, OnnxRuntimeDynamicConfig, OnnxRuntimeQuantizer

    quantizer = OnnxRuntimeQuantizer(OnnxRuntimeDynamicConfig(**_int8_options())) if int8 else None
    program, _ = OnnxExporter().export_program(module, inputs, OnnxConfig(quantizer=quantizer, **options))
    OnnxExporter.save_program(program, path)


def _int8_options() -> dict[str, Any]:
    """All kinds but convolutions: on CPUs, those of 8 bits took five times as long as those of float32."""
    from onnxruntime.quantization.registry import IntegerOpsRegistry

    kinds = [kind for kind in IntegerOpsRegistry if kind != "Conv"]
    return {"op_types_to_quantize": kinds, "per_channel": True}


def _write_torch(module: nn.Module, inputs: dict[str, Any], options: dict[str, Any], path: Path, int8: bool) -> None:
    from transformers.exporters import DynamoConfig, DynamoExporter

    program, _ = DynamoExporter().export_program(module, inputs, DynamoConfig(**options))
    DynamoExporter.save_program(program, path)


def _load_onnx(path: Path, spec: Mapping[str, Any]) -> Run:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # from onnxruntime: no file, no graph, weights in files outside of its folder
        raise OSError(f"{path} cannot be loaded ({shorten(' '.join(str(error).split()))}).") from error
    taken = [node.name for node in session.get_inputs()]

    def run(inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        outputs = session.run(None, {name: inputs[name].contiguous().numpy() for name in taken})
        return dict(zip(spec["outputs"], map(torch.from_numpy, outputs), strict=True))

    return run


def _load_torch(path: Path, spec: Mapping[str, Any]) -> Run:
    try:
        module = torch.export.load(path).module()
    except Exception as error:
        raise OSError(f"{path} cannot be loaded ({shorten(' '.join(str(error).split()))}).") from error

    @torch.no_grad()
    def run(inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        outputs = module(**inputs)
        return {name: outputs[name] for name in spec["outputs"]}

    return run


FORMATS = {
    "onnx": GraphFormat(
        ".onnx",
        _write_onnx,
        _load_onnx,
        takes_int8=True,
        needs_trust=False,
        packages=dict.fromkeys(("onnx", "onnxscript", "onnxruntime"), "mm-transformers[onnx]"),
    ),
    "torch": GraphFormat(".pt2", _write_torch, _load_torch, takes_int8=False, needs_trust=True, packages={}),
}
