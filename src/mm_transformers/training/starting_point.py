"""The weights with which training started, kept with checkpoints for as long as a regularizer pulls towards them."""

from pathlib import Path

from safetensors.torch import load_file, save_file


FILE_NAME = "starting_point.safetensors"


def save_starting_point(model, folder: str) -> None:
    if model.starting_point:
        save_file({name: tensor.contiguous() for name, tensor in model.starting_point.items()}, Path(folder, FILE_NAME))


def load_starting_point(model, folder: str) -> None:
    """
    Raises:
        ValueError: if the regularizer of the model pulls towards a start that the checkpoint does not hold.
    """
    path = Path(folder, FILE_NAME)
    if not model.starting_point:
        return
    found = load_file(path) if path.is_file() else {}
    missing = sorted(set(model.starting_point) - set(found))
    if missing:
        raise ValueError(
            f"The regularization pulls {missing[0]} towards where training started, which {path} does not hold; resume "
            "with the regularization with which the checkpoint was trained."
        )
    model.starting_point = {name: found[name] for name in model.starting_point}
