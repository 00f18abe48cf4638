"""The starting weights, saved with checkpoints if a regularizer penalises the distance from them."""

from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from ...model.modeling_mm_transformer import MMTransformerForMultiTask


FILE_NAME = "starting_point.safetensors"


def save_tensors(tensors: dict[str, torch.Tensor], path: Path) -> None:
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)


def load_tensors(path: Path, names: Iterable[str], complaint: str) -> dict[str, torch.Tensor]:
    """
    The tensors of a file with these names.

    Args:
        complaint: the sentence for a tensor that the file lacks; `{name}` and `{path}` are filled in.

    Raises:
        ValueError: if a tensor is missing.
    """
    found = load_file(path) if path.is_file() else {}
    missing = sorted(set(names) - set(found))
    if missing:
        raise ValueError(complaint.format(name=missing[0], path=path))
    return {name: found[name] for name in names}


def save_starting_point(model: MMTransformerForMultiTask, folder: str) -> None:
    if model.starting_point:
        save_tensors(model.starting_point, Path(folder, FILE_NAME))


def load_starting_point(model: MMTransformerForMultiTask, folder: str) -> None:
    """
    Loads the starting point of the regularizer from a checkpoint.

    Raises:
        ValueError: if the regularizer of the model needs a starting point that the checkpoint lacks.
    """
    if model.starting_point:
        complaint = (
            "The regularization pulls {name} towards its value at the start of training, but {path} does not hold "
            "it: resume with the regularization of the checkpoint."
        )
        model.starting_point = load_tensors(Path(folder, FILE_NAME), model.starting_point, complaint)
