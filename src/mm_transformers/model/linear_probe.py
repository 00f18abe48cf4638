"""A linear model of the mean encoder outputs inside each head, as the start of a task."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import initialization as init
from transformers.utils import logging

from .encoders import encoder_width
from .fusion_layers import TEXT_POOLINGS
from .modalities import ENCODERS, own_encoders


logger = logging.get_logger(__name__)


class LinearProbe(nn.Module):
    """
    A linear layer on the mean encoder outputs of a row, without any fusion.

    It is for linear probing, then fine-tuning (Kumar et al. 2022, https://arxiv.org/abs/2202.10054). All weights are 0
    until [`start_probes`] or training sets them.

    The features are, for text and each other modality: the mean of the encoder outputs, scaled to length 1, and 1. Both
    are 0 if a row lacks the modality. With `per_token`, the text part is the encoder output of each token instead. An
    encoder of ours may have other features, such as the numbers and one-hot categories of a table, without scaling.

    Args:
        widths: modality -> width of its features, "text" first.
        num_outputs, per_token: see [`LinearProblem`].
        unscaled: the modalities whose features are not scaled to length 1 -> the token that each feature describes.
    """

    def __init__(
        self,
        widths: dict[str, int],
        num_outputs: int,
        per_token: bool = False,
        unscaled: Mapping[str, list[int]] = {},
    ) -> None:
        super().__init__()
        self.widths, self.per_token, self.unscaled = dict(widths), per_token, dict(unscaled)
        self.linear = nn.Linear(sum(widths.values()) + len(widths), num_outputs)

    def init_own_parameters(self, std: float) -> None:
        init.zeros_(self.linear.weight)
        init.zeros_(self.linear.bias)

    @property
    def blocks(self) -> list[tuple[slice, int]]:
        """For each modality, the columns of its vector, and the column that is 1 if a row has it."""
        found, start = [], 0
        for width in self.widths.values():
            found.append((slice(start, start + width), start + width))
            start += width + 1
        return found

    def features(self, outputs: Any) -> torch.Tensor:
        """
        The features of the probe.

        Args:
            outputs ([`MMTransformerModelOutput`]): the outputs of the model.

        Returns:
            (batch, number of features), or (batch, text_len, number of features) with `per_token`.
        """
        text = outputs.encoded["text"]
        batch, length = text.mask.shape
        parts = []
        for name, width in self.widths.items():
            stream = outputs.encoded.get(name)
            means = None if stream is None else stream.row_means
            if means is None:
                means = text.hidden_states.new_zeros(batch, width)
            if stream is not None and name in self.unscaled:
                # All features of a row with average numbers are 0.
                is_there = stream.present[:, None]
                parts.append(self._expanded(torch.cat([means.float(), is_there.float()], -1), length))
                continue
            is_there = (means != 0).any(-1, keepdim=True)
            if self.per_token and name == "text":
                means, is_there = torch.where(is_there[:, None], text.hidden_states, 0), is_there[:, None]
            # For zeros the gradient would be too large for half precision.
            vectors = nn.functional.normalize(torch.where(is_there, means.float(), 1), dim=-1) * is_there
            part = torch.cat([vectors, is_there.float().expand(*vectors.shape[:-1], 1)], -1)
            parts.append(part if name == "text" else self._expanded(part, length))
        return torch.cat(parts, -1)

    def _expanded(self, part: torch.Tensor, length: int) -> torch.Tensor:
        """The features of a modality, for each token if the probe is for tokens."""
        return part[:, None].expand(-1, length, -1) if self.per_token else part

    def forward(self, outputs: Any) -> torch.Tensor:
        return self.linear(self.features(outputs).to(self.linear.weight.dtype))


class ProbedHead(nn.Module):
    """
    The sum of a linear probe and a head. The head sees only the change by the fusion: fused minus unfused text states.

    This change is 0 while the gates are zero. So the probe alone answers at the start, and gates get gradients at once.

    In a model without a fusion there is no change. There the head sees the text states, and its last layer starts at 0.

    Args:
        head: from [`Task.build_head`]; at its initialisation, an input of zeros must give zeros.
        probe: has as many outputs as the head.
        has_fusion: whether the model has a fusion.
        text_pooling: as in the config.
    """

    def __init__(self, head: nn.Module, probe: LinearProbe, has_fusion: bool, text_pooling: str = "mean") -> None:
        super().__init__()
        self.pool = TEXT_POOLINGS[text_pooling]
        self.head, self.probe, self.has_fusion = head, probe, has_fusion

    def init_own_parameters(self, std: float) -> None:
        if not self.has_fusion:
            last = [module for module in self.head.modules() if isinstance(module, nn.Linear)][-1]
            init.zeros_(last.weight)
            init.zeros_(last.bias)

    def forward(self, outputs: Any) -> torch.Tensor:
        seen = outputs
        if self.has_fusion:
            text = outputs.encoded["text"]
            seen = type(outputs)(**outputs)
            seen.last_hidden_state = outputs.last_hidden_state - text.hidden_states
            seen.pooler_output = outputs.pooler_output - self.pool(text.hidden_states, text.mask)
        logits = self.head(seen)
        return logits + self.probe(outputs).view_as(logits)


def probe_widths(config: Any) -> dict[str, int]:
    """Modality -> width of its linear features, "text" first."""
    widths = {}
    for name in ("text", *config.modalities):
        encoder_config, own = getattr(config, f"{name}_config"), ENCODERS[name].own
        widths[name] = encoder_width(encoder_config) if own is None else own.linear_width(encoder_config)
    return widths


def with_probe(head: nn.Module, task: Any, config: Any) -> nn.Module:
    """
    The head of a task, with a linear probe if the config enables it and the task has a linear problem.

    The same class must define both `build_head` and `linear_problem`; otherwise the two may not fit, and there is no
    probe.
    """
    problem = task.linear_problem() if config.linear_probe else None
    if problem is None:
        return head
    of_head, of_problem, of_decode = (_owner(task, name) for name in ("build_head", "linear_problem", "decode"))
    if of_head is not of_problem:
        logger.warning_once(
            f"Task {task.name!r} has no linear start: {of_problem.__name__} defines linear_problem, but "
            f"{of_head.__name__} defines build_head. Define both in one class."
        )
        return head
    if of_decode is not of_problem and issubclass(of_decode, of_problem):
        logger.warning_once(
            f"Task {task.name!r}: {of_decode.__name__} decodes logits in its own way, but has the linear start of "
            f"{of_problem.__name__}. If its logits mean something else, define linear_problem and build_head, too."
        )
    unscaled = {
        name: encoder_kind.own.linear_tokens(getattr(config, f"{name}_config"))
        for name, encoder_kind in own_encoders().items()
        if name in config.modalities and encoder_kind.own is not None and not encoder_kind.own.scales_linear_features
    }
    probe = LinearProbe(probe_widths(config), problem.num_outputs, problem.per_token, unscaled)
    return ProbedHead(head, probe, bool(config.modalities), config.text_pooling)


def _owner(task: Any, method: str) -> type:
    """The class that defines a method."""
    return next(cls for cls in type(task).__mro__ if method in vars(cls))
