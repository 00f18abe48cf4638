"""The tokens of each row: its encoded items (images, clips of sound), their order, and modality dropout."""

import difflib
import inspect
from typing import Any, Optional

import torch
from torch import nn
from transformers import initialization as init


# Ignored arguments: those of all transformers models, and further outputs of tokenizers.
_COMMON_KEYWORDS = {
    "return_dict", "return_loss", "use_cache", "word_index", "special_tokens_mask", "length", "offset_mapping",
    "overflow_to_sample_mapping", "num_truncated_tokens", "references",
}  # fmt: skip


def check_keywords(model: nn.Module, unknown: dict[str, Any]) -> None:
    """
    Checks the unknown keywords of a call.

    Args:
        unknown: the keywords of a call that `model.forward` lacks.

    Raises:
        TypeError: if one of them is not among the ignored ones.
    """
    for name in unknown:
        if name not in _COMMON_KEYWORDS:
            near = difflib.get_close_matches(name, inspect.signature(type(model).forward).parameters, 1)
            hint = f"; did you mean {near[0]!r}?" if near else "."
            raise TypeError(f"{type(model).__name__} takes no argument {name!r}{hint}")


class NullText(nn.Module):
    """A learned vector (text hidden size) for rows without a text."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(hidden_size))

    def init_own_parameters(self, std: float) -> None:
        init.normal_(self.weight, mean=0.0, std=std)

    def forward(self, text_states: torch.Tensor, present: torch.Tensor) -> torch.Tensor:
        """(batch, text_len, hidden size), (batch,) bool -> (batch, text_len, hidden size)"""
        return torch.where(present[:, None, None], text_states, self.weight.to(text_states.dtype))


class SinusoidalFrames(nn.Module):
    """
    Encodes the number of a video frame by sinusoids (https://arxiv.org/abs/1706.03762).

    Args:
        num_frames: the largest number of frames of a video.
        width: the width of the tokens.
    """

    def __init__(self, num_frames: int, width: int) -> None:
        super().__init__()
        self.num_frames, self.width = num_frames, width

    def check(self, frame_index: torch.Tensor) -> None:
        """
        Checks the numbers of frames.

        Raises:
            ValueError: if there is no vector for one of the frames.
        """

    def vectors(self, number: torch.Tensor) -> torch.Tensor:
        """(...) int64 -> (..., width)"""
        half = torch.arange(self.width // 2, device=number.device)
        angles = number[..., None] / 10_000.0 ** (2 * half / self.width)
        return nn.functional.pad(torch.cat([angles.sin(), angles.cos()], -1), (0, self.width % 2))

    def forward(self, frame_index: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """(...) int64, -1 for pictures that are no frames -> (..., width), 0 there"""
        vectors = self.vectors(frame_index.clamp(min=0))
        return (vectors * (frame_index >= 0)[..., None]).to(dtype)


class LearnedFrames(SinusoidalFrames):
    """Encodes the number of a video frame by a learned vector."""

    def __init__(self, num_frames: int, width: int) -> None:
        super().__init__(num_frames, width)
        self.weight = nn.Parameter(torch.zeros(num_frames, width))

    def init_own_parameters(self, std: float) -> None:
        init.normal_(self.weight, mean=0.0, std=std)

    def check(self, frame_index: torch.Tensor) -> None:
        known = (frame_index < self.num_frames).all()
        message = f"frame_index must be less than {self.num_frames}, the num_frames of the config."
        if torch.compiler.is_compiling():
            torch._assert_async(known, message)
        elif not known:
            raise ValueError(message)

    def vectors(self, number: torch.Tensor) -> torch.Tensor:
        return self.weight[number]


# `config.frame_embedding` -> its class.
FRAME_EMBEDDINGS = {"sinusoidal": SinusoidalFrames, "learned": LearnedFrames}


class ItemOrder(nn.Module):
    """
    Encodes the places of the items of a row: "the left one", "before and after".

    The tokens of the first item stay unchanged. Those of other items are scaled and shifted, which is visible in an
    average of tokens too. Sinusoids of the place pass through a linear layer that starts at zero, so the number of
    places is unlimited.

    Args:
        width: of the tokens.
    """

    # Waves of 6 to 1,600 places.
    NUM_WAVES = 16

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(2, 2 * self.NUM_WAVES, width))

    def init_own_parameters(self, std: float) -> None:
        init.zeros_(self.weight)

    def forward(
        self, item_index: torch.Tensor, tokens: torch.Tensor
    ) -> tuple[torch.Tensor, Optional[torch.Tensor], Optional[torch.Tensor]]:
        """
        The tokens, scales and offsets of the items.

        Args:
            item_index (batch, max_items) int64: -1 where there is no item.
            tokens (num_items, item_length, width): of the distinct items.

        Returns:
            The tokens, scales and offsets, as in [`Stream`]. The latter two are (batch, max_items, width), 0 for the
                first item of each row; `None` if no row has two items.
        """
        if item_index.shape[1] < 2 and not torch.compiler.is_compiling():  # an exported model takes any number of items
            # It takes part in every training step, for DDP.
            return (tokens + self.weight.sum() * 0.0 if self.training else tokens), None, None
        place = ((item_index >= 0).to(torch.int64).cumsum(1) - 1).clamp(min=0)
        rates = 256.0 ** (-torch.arange(self.NUM_WAVES, device=place.device) / (self.NUM_WAVES - 1))
        angles = place[..., None] * rates
        waves = torch.cat([angles.sin(), angles.cos() - 1], -1).to(self.weight.dtype)
        scales, offsets = waves @ self.weight[0], waves @ self.weight[1]
        return tokens, scales.to(tokens.dtype), offsets.to(tokens.dtype)


def check_index(
    index: Optional[torch.Tensor], batch_size: int, num_items: int, device: torch.device, name: str, items: str
) -> tuple[torch.Tensor, bool]:
    """
    The items of each row, (batch, max_items) int64, -1 for none; by default row i has item i.

    The second value tells whether the index is known to have no -1, so that no mask is needed.

    Args:
        name, items: the names of index and items in messages: "image_index", "images".

    Raises:
        ValueError: if the items do not fit the rows.
    """
    if index is None:
        if num_items not in (0, batch_size):
            raise ValueError(
                f"Got {num_items} {items} for {batch_size} rows: give `{name}`, which says to which row each belongs."
            )
        first = torch.arange(batch_size, device=device)[:, None]
        return (first, True) if num_items else (torch.full_like(first, -1), False)
    if index.ndim != 2 or index.shape[0] != batch_size or index.is_floating_point():
        raise ValueError(
            f"{name} must hold integers in the shape (batch, max_{items}) with batch = {batch_size}, but is of "
            f"{index.dtype} in the shape {tuple(index.shape)}."
        )
    in_range = ((index >= -1) & (index < num_items)).all()
    if torch.compiler.is_compiling():
        # Reading a value would break the graph, and a count in the message would become a constant.
        torch._assert_async(in_range, f"{name} must hold numbers from -1 (none) to the number of {items} less 1.")
        return index, False
    # Before an encoder runs: reading a value later would make the GPU wait.
    is_right, is_full = torch.stack([in_range, (index >= 0).all()]).tolist()
    if not is_right:
        raise ValueError(f"{name} must hold numbers from -1 (none) to {num_items - 1} (there are {num_items} {items}).")
    return index, is_full and index.shape[1] > 0


def drop_modalities(present: dict[str, torch.Tensor], probabilities: dict[str, float]) -> dict[str, torch.Tensor]:
    """
    Modality dropout, row by row: the modalities that each row keeps. A row always keeps at least one.

    Args:
        present: modality -> (batch,) bool, whether the row has it.
        probabilities: modality -> the probability of dropping it.
    """
    kept = {
        name: there & (torch.rand(there.shape, device=there.device) >= probabilities.get(name, 0.0))
        for name, there in present.items()
    }
    has_any = torch.stack(list(kept.values())).any(0)
    return {name: torch.where(has_any, kept[name], there) for name, there in present.items()}
