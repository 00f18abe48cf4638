"""Vectors of rows, for search, clustering and other models: of the fused states, and of each modality alone."""

from collections.abc import Mapping
from typing import Any, Optional

import torch
from torch import nn

from .fusion_base import Stream
from .fusion_layers import masked_mean
from .modalities import ENCODERS


# The name of the vector of all inputs together.
FUSED = "fused"


def embed_rows(model: Any, inputs: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """
    The vectors of the rows of a batch. Each encoder runs once.

    Args:
        model ([`MMTransformerModel`]): In evaluation mode.
        inputs: the tensors of the processor.

    Returns:
        "fused", "text" and the other modalities of the model -> (batch, width) float32; NaN where a row lacks it.
    """
    given = {name: value for name, value in inputs.items() if value is not None}
    ids = given.pop("input_ids")
    mask = given.get("attention_mask", torch.ones_like(ids))
    present = {"text": rows_with_text(inputs)}
    # As in a forward pass: a row without a text must not give NaN.
    shown = mask if model.fusion is None else torch.where(present["text"][:, None], mask, 1)
    of_text = {name: given.pop(name) for name in ("token_type_ids",) if name in given}
    features, _ = model.encode("text", input_ids=ids, attention_mask=shown, **of_text)
    vectors = {"text": model.pool_text(features, mask.bool())}
    given |= {"text_features": features, "attention_mask": mask}
    for name in model.config.modalities:
        stream = _encode_items(model, name, given, len(ids), ids.device)
        if stream is not None:
            vectors[name], present[name] = stream.row_means, stream.present
    fused = model(**given).pooler_output
    vectors = {FUSED: fused, **vectors}
    present[FUSED] = torch.stack(list(present.values())).any(0)
    return {
        name: missing_as_nan(vectors[name], present[name]) if name in vectors else _all_missing(model, name, fused)
        for name in (FUSED, "text", *model.config.modalities)
    }


def _encode_items(
    model: Any, name: str, given: dict[str, Any], batch_size: int, device: torch.device
) -> Optional[Stream]:
    """
    The encoder outputs of a modality; `None` if the batch has none of its items.

    In `given` these outputs take the place of the inputs, so that the encoder need not run again.
    """
    kind = ENCODERS[name]
    items = {key: given[key] for key in kind.inputs if key in given and given[key].shape[0] > 0}
    index, _ = model._item_index(name, given.get(kind.index or ""), items, batch_size, device)
    if not items or index.shape[1] == 0:
        return None
    options = {"attention_mask": given[f"{name}_attention_mask"]} if f"{name}_attention_mask" in given else {}
    features, mask = model.encode(name, **items, **options)
    if kind.features is not None:  # encoders of ours are cheap, and have no such input
        for key in (*kind.inputs, f"{name}_attention_mask"):
            given.pop(key, None)
        given[kind.features] = features
        if mask is not None:
            given[f"{name}_feature_mask"] = mask
    means = features.mean(1) if mask is None else masked_mean(features, mask)
    return Stream(name, features, mask, index, item_means=means)


def rows_with_text(inputs: Mapping[str, Any]) -> torch.Tensor:
    """(batch,) bool"""
    mask = inputs.get("attention_mask")
    return torch.ones_like(inputs["input_ids"][:, 0], dtype=torch.bool) if mask is None else mask.bool().any(-1)


def _all_missing(model: Any, name: str, like: torch.Tensor) -> torch.Tensor:
    return torch.full((len(like), model.embedding_width(name)), torch.nan, device=like.device)


def missing_as_nan(vectors: torch.Tensor, present: torch.Tensor) -> torch.Tensor:
    """(batch, width) float32, NaN in rows that are not `present`."""
    return torch.where(present[:, None], vectors.float(), torch.nan)


def unit_length(vectors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The vectors scaled to length 1; NaN stays NaN."""
    return {name: nn.functional.normalize(value.float(), dim=-1) for name, value in vectors.items()}


def vectors_of_rows(vectors: Mapping[str, torch.Tensor]) -> list[dict[str, Any]]:
    """For each row a dict from name to vector, an array of NumPy; `None` where the row lacks it."""
    arrays = {name: value.cpu().numpy() for name, value in vectors.items()}
    missing = {name: value.isnan().all(-1).tolist() for name, value in vectors.items()}
    num_rows = len(next(iter(arrays.values())))
    return [{name: None if missing[name][i] else array[i] for name, array in arrays.items()} for i in range(num_rows)]
