"""The description file of exported graphs: the graphs, their inputs and outputs."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Optional

import torch

from ..model.limits import limits
from .graph_formats import FORMATS


SPEC_NAME = "export.json"
FIRST_GRAPH, DECODER, STEP = "model", "decoder", "decoder_step"
_ANY_SIZE = 16_000  # a second of sound is more than any encoder needs


def read_spec(path: Path) -> dict[str, Any]:
    """
    The description of exported graphs.

    Args:
        path: of the file, which may come from a stranger.

    Returns:
        "format", one of `FORMATS`; and "graphs": for `FIRST_GRAPH`, and perhaps `DECODER` and `STEP`, "inputs" (name ->
            shape, `None` for any size), "types" (name -> type of torch) and "outputs" (names).

    Raises:
        ValueError: one sentence, if the file has another content.
    """
    try:
        spec = json.loads(path.read_text(encoding="utf-8"))
        names = set(spec["graphs"])
        is_known = spec["format"] in FORMATS and {FIRST_GRAPH} <= names <= {FIRST_GRAPH, DECODER, STEP}
        is_known = is_known and (DECODER in names or STEP not in names)
        is_known = is_known and all(map(_is_graph, spec["graphs"].values()))
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        is_known = False
    if not is_known:
        raise ValueError(
            f"{path} is not a description of exported graphs by mm-transformers export: export the model again."
        )
    return spec


def example_shape(shape: Sequence[Optional[int]]) -> list[int]:
    """The shape of one item of an input."""
    return [1, *(_ANY_SIZE if size is None else size for size in shape[1:])]


def _is_graph(graph: Mapping[str, Any]) -> bool:
    shapes, types, outputs = graph["inputs"], graph["types"], graph["outputs"]
    return (
        set(shapes) == set(types)
        and all(
            isinstance(name, str) and isinstance(getattr(torch, name, None), torch.dtype) for name in types.values()
        )
        and all(isinstance(shape, list) and _is_shape(shape) for shape in shapes.values())
        and isinstance(outputs, list)
        and all(isinstance(name, str) for name in outputs)
    )


def _is_shape(shape: list[Any]) -> bool:
    is_size = all(size is None or (type(size) is int and size > 0) for size in shape)
    return is_size and 0 < len(shape) < 8 and math.prod(example_shape(shape)) <= 3 * limits().image_pixels
