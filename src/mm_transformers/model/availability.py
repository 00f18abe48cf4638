"""Availability groups: the modalities that a row has."""

from collections.abc import Iterable, Sequence
from typing import Any, Optional

import torch


# The cell of rows whose group has no cell of its own.
OTHER = "other"
_JOINT = " + "


def group_name(modalities: Iterable[str]) -> str:
    """The name of a group: `"text + vision"`; the order is that of the modalities."""
    return _JOINT.join(modalities)


def modalities_in(group: str) -> list[str]:
    """The modalities of a group."""
    return group.split(_JOINT) if group else []


def groups_of(outputs: Any, names: Sequence[str], has_text: Optional[torch.Tensor] = None) -> list[str]:
    """
    The group of each row of a batch.

    Args:
        outputs ([`MMTransformerModelOutput`]): After encoders and fusion.
        names: the modalities of the model beside text, in order.
        has_text (`torch.BoolTensor` of shape `(batch,)`, *optional*): The rows with a text; by default all. The tokens
            do not tell it.
    """
    encoded, num_rows = outputs.encoded or {}, len(outputs.attention_mask)
    present = {"text": [True] * num_rows if has_text is None else has_text.tolist()}
    for name in names:
        present[name] = encoded[name].present.tolist() if name in encoded else [False] * num_rows
    return [group_name(name for name, there in present.items() if there[row]) for row in range(num_rows)]
