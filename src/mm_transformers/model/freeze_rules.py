"""The parameters that `config.freeze` names, and the mode of frozen parts."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Optional

from torch import nn

from .modalities import ENCODERS


def check_freeze(entries: Optional[list[str]], modalities: list[str]) -> None:
    """
    Checks `config.freeze`.

    Args:
        entries: `config.freeze`.
        modalities: those of the model, "text" among them.

    Raises:
        ValueError: if `entries` is no list of strings, or names an encoder that the model does not have. The names of
            sub-modules are checked when the model is built.
    """
    if entries is None:
        return
    if not isinstance(entries, (list, tuple)) or not all(isinstance(entry, str) for entry in entries):
        raise ValueError(f"freeze must be a list of strings, such as ['vision'], but is {entries!r}.")
    for entry in entries:
        if entry in ENCODERS and entry not in modalities:
            raise ValueError(f"freeze names {entry!r}, but the encoders of this model are {', '.join(modalities)}.")


def freeze_parameters(model: nn.Module, entries: list[str], encoders: Mapping[str, nn.Module]) -> list[str]:
    """
    Sets `requires_grad=False` for all parameters that `entries` name.

    Args:
        model: The module whose sub-modules `entries` may name.
        entries: Modalities, and names of sub-modules, such as "text_model.embeddings".
        encoders: Modality -> its encoder.

    Returns:
        The modalities whose whole encoder is frozen.

    Raises:
        ValueError: if there are no parameters of such a name.

    Example:

    ```python
    >>> freeze_parameters(model, ["vision"], {"text": model.text_model, "vision": model.vision_model})
    ['vision']
    ```
    """
    parameters = dict(model.named_parameters())
    frozen: set[int] = set()
    for entry in entries:
        if entry in encoders:
            # Includes embeddings that a decoder shares: training them would change the encoder outputs.
            named = list(encoders[entry].parameters())
        else:
            named = [p for name, p in parameters.items() if f"{name}.".startswith(f"{entry}.")]
        if not named:
            known = list(dict.fromkeys(name.partition(".")[0] for name in parameters))
            raise ValueError(
                f"freeze names {entry!r}, but there are no such parameters. Use {', '.join(encoders)}, or a "
                f"sub-module of the model, one of {', '.join(known)}, or of one of these, as 'text_model.embeddings'."
            )
        frozen.update(map(id, named))
        for parameter in named:
            parameter.requires_grad_(False)
    return [
        modality
        for modality, encoder in encoders.items()
        if frozen and all(id(parameter) in frozen for parameter in encoder.parameters())
    ]


def batch_norms(module: nn.Module) -> list[nn.Module]:
    """The layers of batch normalisation, which keep running statistics."""
    return [part for part in module.modules() if isinstance(part, nn.modules.batchnorm._BatchNorm)]


@contextmanager
def frozen_batch_norm(module: nn.Module) -> Iterator[None]:
    """Within the block running statistics do not change."""
    layers = [layer for layer in batch_norms(module) if layer.training]
    for layer in layers:
        layer.eval()
    try:
        yield
    finally:
        for layer in layers:
            layer.train()
