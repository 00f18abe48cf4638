"""Fewer tokens per image, for the fusion of many images or frames."""

import inspect
from typing import Any, Optional

import torch
from torch import nn
from transformers import PreTrainedConfig

from .fusion_layers import FusionAttention, FusionMLP, Latents, key_mask


class TokenMerging(nn.Module):
    """
    Merges the most similar tokens, two by two, until `num_tokens` are left.

    This is the bipartite soft matching of ToMe (https://arxiv.org/abs/2210.09461), applied once after the encoder and
    not in each layer. It has no parameters, and the result for an image depends on that image alone.

    (num_items, length, width) -> (num_items, at most `num_tokens`, width)
    """

    def __init__(self, config: Any, num_tokens: int) -> None:
        super().__init__()
        self.num_tokens = num_tokens

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        sizes = torch.ones_like(tokens[..., :1])  # the number of tokens in each mean
        while tokens.shape[1] > self.num_tokens:
            tokens, sizes = _merge(tokens, sizes, tokens.shape[1] - self.num_tokens)
        return tokens

    @torch.no_grad()
    def shares(self, tokens: torch.Tensor) -> torch.Tensor:
        """The share of each token in the remaining means: (num_items, remaining tokens, length); rows sum to 1."""
        sizes, length = torch.ones_like(tokens[..., :1]), tokens.shape[1]
        shares = torch.eye(length, dtype=tokens.dtype, device=tokens.device).expand(len(tokens), -1, -1)
        while tokens.shape[1] > self.num_tokens:
            both = torch.cat([tokens, shares], -1)
            both, sizes = _merge(both, sizes, tokens.shape[1] - self.num_tokens, tokens.shape[-1])
            tokens, shares = both[..., :-length], both[..., -length:]
        return shares


class Resampler(nn.Module):
    """
    Replaces the tokens of each image by `num_tokens` learned vectors that attend to them.

    It has layers of cross-attention and feed-forward (Perceiver, https://arxiv.org/abs/2103.03206; the resampler of
    Flamingo, https://arxiv.org/abs/2204.14198).

    (num_items, length, width) -> (num_items, num_tokens, width)
    """

    def __init__(self, config: PreTrainedConfig, num_tokens: int, num_layers: int = 2) -> None:
        super().__init__()
        self.config = config
        self.latents = Latents(num_tokens, config.fusion_hidden_size)
        self.layers = nn.ModuleList(_ResamplerLayer(config) for _ in range(num_layers))
        self.norm = nn.LayerNorm(config.fusion_hidden_size)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        latents = self.latents(tokens.shape[0]).to(tokens.dtype)
        mask = key_mask(self.config, latents, None)
        for layer in self.layers:
            latents = layer(latents, tokens, mask)
        return self.norm(latents)


class _ResamplerLayer(nn.Module):
    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__()
        width = config.fusion_hidden_size
        self.latents_norm, self.tokens_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = FusionAttention(config)
        self.mlp_norm = nn.LayerNorm(width)
        self.mlp = FusionMLP(config)

    def forward(self, latents: torch.Tensor, tokens: torch.Tensor, mask: Any) -> torch.Tensor:
        latents = latents + self.attention(self.latents_norm(latents), self.tokens_norm(tokens), mask)[0]
        return latents + self.mlp(self.mlp_norm(latents))


def _merge(
    tokens: torch.Tensor, sizes: torch.Tensor, at_most: int, width: Optional[int] = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Merges the most similar pairs of tokens.

    Every second token may join the most similar one of the others, by the first `width` of its values.
    """
    directions = nn.functional.normalize(tokens[..., :width].detach().float(), dim=-1)
    likeness, partners = (directions[:, ::2] @ directions[:, 1::2].transpose(1, 2)).max(-1)
    num_merged = min(at_most, partners.shape[1])
    order = likeness.argsort(dim=-1, descending=True)
    merged, kept = order[:, :num_merged, None], order[:, num_merged:, None]
    targets = partners.gather(1, merged[..., 0])[..., None]

    def joined(values: torch.Tensor) -> torch.Tensor:
        """The sums over merged tokens: (num_items, remaining tokens, ...)."""
        width = values.shape[-1]
        moved = values[:, ::2].gather(1, merged.expand(-1, -1, width))
        sums = values[:, 1::2].scatter_add(1, targets.expand(-1, -1, width), moved)
        return torch.cat([values[:, ::2].gather(1, kept.expand(-1, -1, width)), sums], dim=1)

    new_sizes = joined(sizes)
    return joined(tokens * sizes) / new_sizes, new_sizes


_KINDS: dict[Any, type[nn.Module]] = {"merge": TokenMerging, "resampler": Resampler}


def build_token_reduction(config: PreTrainedConfig, options: Optional[dict[str, Any]]) -> nn.Module:
    """The module of `config.vision_token_reduction`."""
    if options is None:
        return nn.Identity()
    rest = {name: value for name, value in options.items() if name != "kind"}
    return _KINDS[options["kind"]](config, **rest)


def check_token_reduction(options: Optional[dict[str, Any]]) -> None:
    """
    Checks `config.vision_token_reduction`.

    Raises:
        ValueError: one sentence, if it is not valid.
    """
    if options is None:
        return
    cls = _KINDS.get(options.get("kind")) if isinstance(options, dict) else None
    if cls is None:
        known = " or ".join(map(repr, _KINDS))
        raise ValueError(f"vision_token_reduction must be {{'kind': {known}, 'num_tokens': ...}}, but is {options!r}.")
    taken = [name for name in inspect.signature(cls).parameters if name != "config"]
    for name, value in options.items():
        is_count = isinstance(value, int) and not isinstance(value, bool) and value >= 1
        if name != "kind" and not (name in taken and is_count):
            raise ValueError(
                f"vision_token_reduction of kind {options['kind']!r} takes {' and '.join(taken)}, integers >= 1, but "
                f"has {name} = {value!r}."
            )
    if "num_tokens" not in options:
        raise ValueError(f"vision_token_reduction {options!r} has no num_tokens, the number of tokens that remain.")
