"""Measures whether explanations are faithful to the model, by removing relevant parts of the inputs."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from ...data.sources import batches
from ...model.answers import check_tasks, evaluation_mode, unwrapped
from ...model.language_model import longest_prompt
from ...model.modeling_mm_transformer import MMTransformerForMultiTask
from ...model.pipeline_mm_transformer import read_rows
from ...model.processing_mm_transformer import MMTransformerProcessor
from .explain import apart, explain


SHARES = tuple(i / 10 for i in range(10))


class Faithfulness(NamedTuple):
    """
    The curves of positive and negative perturbation.

    Args:
        shares: the removed shares of tokens and patches.
        positive (rows, shares): probability of the answer if the most relevant parts are removed first; it should fall
            early.
        negative (rows, shares): if the least relevant are removed first; it should stay high.
    """

    shares: tuple[float, ...]
    positive: np.ndarray
    negative: np.ndarray

    @property
    def positive_auc(self) -> float:
        """Mean over the rows of the area under the curve, scaled to 0 to 1; less is better."""
        return _area(self.shares, self.positive)

    @property
    def negative_auc(self) -> float:
        """More is better."""
        return _area(self.shares, self.negative)


def _area(shares: Sequence[float], curves: np.ndarray) -> float:
    heights, widths = curves.mean(0), np.diff(shares)  # the trapezoidal rule has different names in NumPy 1 and 2
    return float(((heights[:-1] + heights[1:]) / 2 * widths).sum() / widths.sum())


def faithfulness(
    model: MMTransformerForMultiTask,
    processor: MMTransformerProcessor,
    rows: Sequence[Any],
    task: str,
    method: str = "chefer",
    modalities: Sequence[str] = ("text", "vision"),
    shares: Sequence[float] = SHARES,
    batch_size: int = 32,
    seed: int = 0,
) -> Faithfulness:
    """
    Measures how probable an answer stays while its most, or its least, relevant parts are removed.

    This is positive and negative perturbation (Samek et al. 2017, https://arxiv.org/abs/1509.06321; Chefer et al.
    2021). Removed text tokens leave the attention mask; removed patches take the mean colour of the picture. Each
    modality is ranked by its own relevances, and both are perturbed at once. The measured probability is that of the
    answer to the unchanged row.

    Args:
        model ([`MMTransformerForMultiTask`]): Runs in evaluation mode, whatever its mode.
        processor ([`MMTransformerProcessor`]): The processor of the model.
        rows: each with a text, a picture, or both.
        task: one that chooses among labels for the whole row.
        method: one of those of [`explain`].
        modalities: what is perturbed: "text", "vision", or both.

    Raises:
        ValueError: as [`explain`], or if the task has no labels for the row.

    Example:

    ```python
    >>> found = faithfulness(model, processor, [{"text": "Lovely weather!", "image": "rain.jpg"}], "sentiment")
    >>> found.positive_auc < found.negative_auc  # the most relevant parts matter most
    True
    ```
    """
    model = unwrapped(model)
    kind = model.tasks[check_tasks(model, [task])[0]]
    if kind.is_token_level or not kind.label_names:
        raise ValueError(f"faithfulness needs a task that chooses one label for each row; {task!r} does not.")
    explanations = explain(model, processor, list(rows), task, method, batch_size=batch_size, seed=seed)
    curves: dict[bool, list[np.ndarray]] = {True: [], False: []}
    for numbers, of_batch in batches(rows, batch_size):
        batch = [explanations[number] for number in numbers]
        numbered = list(zip(numbers, of_batch, strict=True))
        read = read_rows(numbered, processor, None, wants_words=False, max_length=longest_prompt(model.config))
        inputs = {name: value.to(model.device) for name, value in apart(read["tensors"]).items()}
        for first in (True, False):
            probabilities = [
                _probabilities(model, kind, _without(inputs, batch, share, first, modalities), batch)
                for share in shares
            ]
            curves[first].append(np.stack(probabilities, 1))
    return Faithfulness(tuple(shares), np.concatenate(curves[True]), np.concatenate(curves[False]))


@torch.no_grad()
def _probabilities(
    model: MMTransformerForMultiTask, kind: Any, inputs: dict[str, torch.Tensor], batch: list[Any]
) -> np.ndarray:
    with evaluation_mode(model):
        logits = model(**inputs).logits[kind.name].float()
    probabilities = kind.probabilities(logits)
    ids = [kind.label_names.index(explanation.answer) for explanation in batch]
    return probabilities[torch.arange(len(ids)), ids].cpu().numpy()


def _without(
    inputs: dict[str, torch.Tensor],
    batch: list[Any],
    share: float,
    most_relevant_first: bool,
    modalities: Sequence[str],
) -> dict[str, torch.Tensor]:
    """The inputs without this share of the words' tokens and of the patches."""
    changed = dict(inputs)
    sign = -1 if most_relevant_first else 1
    if "text" in modalities:
        mask = inputs["attention_mask"].clone()
        for row, explanation in enumerate(batch):
            places = mask[row].nonzero()[:, 0].tolist()
            # Special tokens stay: some encoders need them.
            own = [(sign * t.relevance, p) for t, p in zip(explanation.tokens, places, strict=False) if t.start < t.end]
            for _, place in sorted(own)[: round(share * len(own))]:
                mask[row, place] = 0
        changed["attention_mask"] = mask
    if "vision" in modalities and "pixel_values" in inputs:
        pixels = inputs["pixel_values"].clone()
        for row, explanation in enumerate(batch):
            items = [item for item in inputs["image_index"][row].tolist() if item >= 0]
            for item, image in zip(items, explanation.images, strict=True):
                order = np.argsort(sign * image.patches.flatten(), kind="stable")
                gone = np.zeros(image.patches.size, dtype=bool)
                gone[order[: round(share * len(order))]] = True
                hidden = torch.tensor(gone.reshape(image.patches.shape), device=pixels.device)
                hidden = _to_pixels(hidden, *pixels.shape[-2:])
                mean = pixels[item].mean((1, 2), keepdim=True)
                pixels[item] = torch.where(hidden, mean, pixels[item])
        changed["pixel_values"] = pixels
    return changed


def _to_pixels(patches: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """(rows, columns) -> (height, width), each patch as large as it is."""
    return torch.nn.functional.interpolate(patches[None, None].float(), size=(height, width), mode="nearest")[0, 0] > 0
