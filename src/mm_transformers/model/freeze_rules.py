"""Encoders, and parts of the model, that are not trained."""

from contextlib import nullcontext
from typing import Any, Optional

import torch
from torch import nn
from transformers import PreTrainedModel


def check_freeze(entries: Optional[list[Any]], modalities: list[str]) -> None:
    """
    Args:
        modalities: those of the model, "text" among them.

    Raises:
        ValueError: if `config.freeze` is no list of strings, or names an encoder that the model does not have. Whether
            the model has the sub-modules that it names is seen when the model is built.
    """
    if entries is None:
        return
    if not isinstance(entries, (list, tuple)) or not all(isinstance(entry, str) for entry in entries):
        raise ValueError(f"freeze must be a list of strings, such as ['vision'], but is {entries!r}.")
    for entry in entries:
        if entry in ("text", "vision", "audio") and entry not in modalities:
            raise ValueError(f"freeze names {entry!r}, but the encoders of this model are {', '.join(modalities)}.")


class Freezing:
    """
    The part of [`MMTransformerModel`] that keeps what `config.freeze` names as it is. An encoder that is frozen as a
    whole runs as in evaluation and without gradients, so that what it gives is a function of its input alone.
    """

    # `config`, `text_encoder` and the methods of `nn.Module` are those of the model that this is a part of.
    config: Any
    text_encoder: PreTrainedModel
    named_parameters: Any
    training: bool

    def encoder(self, modality: str) -> PreTrainedModel:
        """The encoder of "text", "vision" or "audio"; of an encoder-decoder the encoder."""
        return self.text_encoder if modality == "text" else getattr(self, f"{modality}_model")

    def freeze(self) -> None:
        """
        Says of all parameters that `config.freeze` names that they need no gradient. Called when the model is built,
        and after weights were loaded, since these come as new parameters.

        Raises:
            ValueError: if there are no parameters of such a name.
        """
        parameters = dict(self.named_parameters())
        frozen: set[int] = set()
        for entry in self.config.freeze or []:
            if entry in ("text", *self.config.modalities):
                # Embeddings that a decoder shares are frozen with the encoder: were they trained, what the encoder
                # says would change with every step.
                named = list(self.encoder(entry).parameters())
            else:
                named = [p for name, p in parameters.items() if f"{name}.".startswith(f"{entry}.")]
            if not named:
                known = list(dict.fromkeys(name.partition(".")[0] for name in parameters))
                raise ValueError(
                    f"freeze names {entry!r}, but there are no such parameters: it takes "
                    f"{', '.join(['text', *self.config.modalities])}, or a sub-module of the model, one of "
                    f"{', '.join(known)}, or of one of these, as 'text_model.embeddings'."
                )
            frozen.update(map(id, named))
            for parameter in named:
                parameter.requires_grad_(False)
        self._frozen_encoders = [
            modality
            for modality in ("text", *self.config.modalities)
            if frozen and all(id(p) in frozen for p in self.encoder(modality).parameters())
        ]
        self.train(self.training)

    def is_frozen(self, modality: str) -> bool:
        """Whether `config.freeze` covers the whole encoder, and nothing in it, such as an adapter, is trained."""
        return modality in self._frozen_encoders and not any(
            parameter.requires_grad for parameter in self.encoder(modality).parameters()
        )

    def train(self, mode: bool = True) -> nn.Module:
        super().train(mode)  # type: ignore[misc]
        for modality in self._frozen_encoders:
            if self.is_frozen(modality):
                self.encoder(modality).eval()
        if mode and self.config.freeze_batch_norm:
            for modality in ("text", *self.config.modalities):
                for module in self.encoder(modality).modules():
                    if isinstance(module, nn.modules.batchnorm._BatchNorm):
                        module.eval()
        return self  # type: ignore[return-value]

    def _gradients(self, modality: str, inputs: dict[str, torch.Tensor]) -> Any:
        """The context in which an encoder runs: a frozen one keeps nothing for a backward pass that nobody asks for."""
        wanted = any(value.requires_grad for value in inputs.values())  # as explanations do
        return torch.no_grad() if self.is_frozen(modality) and not wanted else nullcontext()
