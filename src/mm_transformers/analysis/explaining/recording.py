"""Runs a model and records all its attentions and their gradients."""

import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Optional

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from ...model.encoder_classes import as_tokens
from ...model.fusion_base import AttentionStep
from ...model.linear_probe import LinearProbe
from ...model.modalities import ENCODERS
from ...model.modeling_mm_transformer import MMTransformerForMultiTask
from ...model.token_reduction import Resampler, TokenMerging


_Arguments = tuple[tuple[Any, ...], dict[str, Any]]
# What `register_forward_hook` takes.
_Hook = Callable[[nn.Module, tuple[Any, ...], Any], None]


@dataclass
class TextPass:
    """
    One pass of the text encoder.

    Args:
        attentions: its self-attentions, (batch, heads, tokens, tokens) each; empty as in [`Seen`].
        states (batch, tokens, width): its outputs.
        crossings: the attentions of the layers of the fusions inside of it, by place; of a fusion behind it at 0.
        fused (batch, tokens, width): the output of the last of these fusions, if there was one.
    """

    attentions: tuple[torch.Tensor, ...] = ()
    states: Any = None
    crossings: dict[int, tuple[tuple[AttentionStep, ...], ...]] = field(default_factory=dict)
    fused: Optional[torch.Tensor] = None


@dataclass
class Seen:
    """
    The recording of one forward pass.

    Args:
        encoders: modality -> its self-attentions, (items, heads, tokens, tokens) each; empty for encoders without
            attention of all tokens to all tokens (convolutions, windows).
        states: modality -> its encoder outputs, (items, tokens, encoder width), or a feature map.
        num_tokens: modality -> the number of tokens of its encoder.
        maps: modality -> (height, width) of the feature map, for encoders that have one.
        reduction: the steps in which learned vectors attend to the tokens of each image, (items, heads, ...).
        merged (items, remaining tokens, tokens): the weights of tokens in the means that replace them.
        fusion: the attentions of each layer of the fusion.
        probes: the linear probes of all heads, with their features.
        passes: all passes of the text encoder; `encoders`, `states` and `num_tokens` are of the first.
        text_in_fusion: whether `fusion` includes the attentions of the text encoder.
        places (batch, tokens): the place of each token of `fusion` in its weights, if these are in another order.
        read_places (batch, text tokens): the places of the text among the states that are read, likewise.
    """

    encoders: dict[str, tuple[torch.Tensor, ...]] = field(default_factory=dict)
    states: dict[str, torch.Tensor] = field(default_factory=dict)
    num_tokens: dict[str, int] = field(default_factory=dict)
    maps: dict[str, tuple[int, int]] = field(default_factory=dict)
    reduction: list[AttentionStep] = field(default_factory=list)
    merged: Optional[torch.Tensor] = None
    fusion: tuple[tuple[AttentionStep, ...], ...] = ()
    probes: list[tuple[LinearProbe, torch.Tensor]] = field(default_factory=list)
    passes: list[TextPass] = field(default_factory=list)
    text_in_fusion: bool = False
    places: Optional[torch.Tensor] = None
    read_places: Optional[torch.Tensor] = None

    def in_order(self) -> "Seen":
        """The same with the weights (batch, queries, keys) of the fusion in the order of its tokens."""
        if self.places is None:
            return self
        places = self.places

        def ordered(weights: torch.Tensor) -> torch.Tensor:
            # Places beyond the weights are padding in all rows.
            there = (places < weights.shape[-1]).to(weights)
            at = places.clamp(max=weights.shape[-1] - 1)
            rows = weights.gather(1, at[:, :, None].expand(-1, -1, weights.shape[2]))
            found = rows.gather(2, at[:, None].expand(-1, at.shape[1], -1))
            return found * there[:, :, None] * there[:, None]

        fusion = tuple(tuple(step._replace(weights=ordered(step.weights)) for step in layer) for layer in self.fusion)
        return replace(self, fusion=fusion)

    def attentions(self) -> list[torch.Tensor]:
        """All attentions, in the order of [`replaced`]."""
        steps = [*self.reduction, *(step for layer in self.fusion for step in layer)]
        return [*(x for layers in self.encoders.values() for x in layers), *(step.weights for step in steps)]

    def replaced(self, weights: list[torch.Tensor]) -> "Seen":
        """The same with other weights instead of [`attentions`]."""
        rest = iter(weights)
        return replace(
            self,
            encoders={name: tuple(next(rest) for _ in layers) for name, layers in self.encoders.items()},
            reduction=[step._replace(weights=next(rest)) for step in self.reduction],
            fusion=tuple(tuple(step._replace(weights=next(rest)) for step in layer) for layer in self.fusion),
        )


@contextmanager
def watched(model: MMTransformerForMultiTask) -> Iterator[Seen]:
    """
    Records the next forward pass of the model ([`MMTransformerForMultiTask`], in evaluation mode) within the block.

    The model computes eager attention, with gradients through all encoders. After the block it is unchanged.
    """
    fused, seen = model.model, Seen()
    with ExitStack() as stack:
        stack.enter_context(eager_attention(model))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(through_frozen_encoders(model))
        # All embedding layers: some encoders do not reveal which one they call.
        tables = [part for part in fused.encoder("text").modules() if isinstance(part, nn.Embedding)]
        hooks = [table.register_forward_hook(_require_gradient) for table in tables]
        for name in ("text", *fused.config.modalities):
            encoder = fused.encoder(name)
            shows = ENCODERS[name].own is None and _shows_attentions(encoder)
            ask = _ask_for_attentions if shows else _ask_for_gradients
            hooks.append(encoder.register_forward_pre_hook(ask, with_kwargs=True))
            if name == "text":
                hooks.append(encoder.register_forward_pre_hook(lambda *_: seen.passes.append(TextPass())))
            hooks.append(encoder.register_forward_hook(_Remember(seen, name)))
        if fused.fusion is not None:
            hooks.append(fused.fusion.register_forward_hook(_remember_fusion(seen)))
            if fused.config.fusion_layers_every or not fused.reads_jointly:
                hooks.append(fused.fusion.register_forward_pre_hook(_ask_fusion_for_attentions, with_kwargs=True))
        reduction = getattr(fused, "vision_reduction", None)
        # If PEFT trains it completely, the copy is inside a wrapper.
        for part in () if reduction is None else reduction.modules():
            if isinstance(part, TokenMerging):
                hooks.append(part.register_forward_hook(_remember_merging(seen)))
            if isinstance(part, Resampler):
                for layer in part.layers:
                    hooks.append(layer.attention.register_forward_hook(_remember_reading(seen)))
        for part in model.modules():
            if isinstance(part, LinearProbe):
                hooks.append(part.linear.register_forward_pre_hook(_remember_features(seen, part)))
        for hook in hooks:
            stack.callback(hook.remove)
        yield seen


@contextmanager
def through_frozen_encoders(model: MMTransformerForMultiTask) -> Iterator[None]:
    """Within the block, gradients also go through frozen encoders, which otherwise run without."""
    fused, before = model.model, model.model._frozen_encoders
    fused._frozen_encoders = []
    try:
        yield
    finally:
        fused._frozen_encoders = before


@contextmanager
def eager_attention(model: PreTrainedModel) -> Iterator[None]:
    """Within the block, attention is eager, the only implementation that returns its weights."""
    configs: dict[int, Any] = {}
    # Of all parts, since copies that PEFT trains completely have separate configs.
    waiting = [getattr(part, "config", None) for part in model.modules()]
    while waiting:
        config = waiting.pop()
        if isinstance(config, PreTrainedConfig) and id(config) not in configs:
            configs[id(config)] = config
            waiting += [getattr(config, name, None) for name in config.sub_configs]
    before = [(config, config._attn_implementation_internal) for config in configs.values()]
    # Not by `set_attn_implementation`, which warns of each config without a separate model.
    for config, _ in before:
        config._attn_implementation_internal = "eager"
    try:
        yield
    finally:
        for config, implementation in before:
            config._attn_implementation_internal = implementation


def word_embeddings(model: MMTransformerForMultiTask) -> nn.Module:
    """The layer that the text encoder calls; `get_input_embeddings` of an encoder-decoder may return another."""
    return model.model.encoder("text").get_input_embeddings()


@contextmanager
def embeddings_of_first_call(model: MMTransformerForMultiTask, embeddings: torch.Tensor) -> Iterator[None]:
    """
    Replaces the word embeddings of the text encoder within the block, since not every encoder takes embeddings.

    Only the first call is replaced: a decoder that shares the layer comes later.

    Raises:
        ValueError: if the text encoder does not call the layer.
    """
    waiting = [embeddings]

    def hook(module: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
        return waiting.pop().to(output.dtype) if waiting else output

    handle = word_embeddings(model).register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()
    if waiting:
        kind = model.config.text_config.model_type
        raise ValueError(
            f"Integrated gradients need word embeddings, but the text encoder {kind!r} has none: choose another method."
        )


def _shows_attentions(encoder: PreTrainedModel) -> bool:
    parameters = inspect.signature(encoder.forward).parameters
    return "output_attentions" in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())


def _ask_for_attentions(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Arguments:
    return args, {**_ask_for_gradients(module, args, kwargs)[1], "output_attentions": True}


def _ask_for_gradients(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Arguments:
    """Makes pixels and samples require gradients; for words, see [`_require_gradient`]."""
    floats = {name: x for name, x in kwargs.items() if isinstance(x, torch.Tensor) and x.is_floating_point()}
    return args, {**kwargs, **{name: x.detach().requires_grad_() for name, x in floats.items() if not x.requires_grad}}


def _require_gradient(module: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
    return output if output.requires_grad else output.requires_grad_()


class _Remember:
    """Records the outputs of an encoder."""

    def __init__(self, seen: Seen, name: str):
        self.seen, self.name = seen, name

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if isinstance(output, tuple) and len(output) == 2:  # of an encoder of ours: tokens and their mask
            states = output[0] if output[0].requires_grad else output[0].requires_grad_()
            self.seen.states[self.name], self.seen.num_tokens[self.name] = states, states.shape[1]
            self.seen.encoders[self.name] = ()
            return
        states = output.last_hidden_state
        attentions = tuple(x for x in getattr(output, "attentions", None) or () if x is not None)
        if self.name == "text":
            whole = all(x.shape[-2:] == (states.shape[1], states.shape[1]) for x in attentions)
            self.seen.passes[-1].attentions, self.seen.passes[-1].states = attentions if whole else (), states
            if len(self.seen.passes) > 1:
                return
        if states.ndim == 4:
            self.seen.maps[self.name] = (states.shape[2], states.shape[3])
        num_tokens = as_tokens(states).shape[1]
        self.seen.states[self.name], self.seen.num_tokens[self.name] = states, num_tokens
        # Windows attend to a part of the tokens, and each stage has fewer tokens.
        whole = all(x.shape[-2:] == (num_tokens, num_tokens) and len(x) == len(states) for x in attentions)
        self.seen.encoders[self.name] = attentions if whole else ()


def _ask_fusion_for_attentions(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Arguments:
    return args, {**kwargs, "output_attentions": True}


def _remember_fusion(seen: Seen) -> _Hook:
    def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        # Not by `isinstance`, since a model with code of its own has other classes. A prefix has no layers.
        if hasattr(output, "layers"):
            seen.fusion = output.layers
            if seen.passes:
                place = args[0] if isinstance(args[0], int) else 0
                seen.passes[-1].crossings[place], seen.passes[-1].fused = output.layers, output.hidden_states

    return hook


def _remember_merging(seen: Seen) -> _Hook:
    def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        seen.merged = module.shares(args[0])

    return hook


def _remember_reading(seen: Seen) -> _Hook:
    def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        seen.reduction.append(AttentionStep(("vision",), ("tokens",), output[1]))

    return hook


def _remember_features(seen: Seen, probe: LinearProbe) -> Callable[[nn.Module, tuple[Any, ...]], None]:
    def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
        seen.probes.append((probe, args[0]))

    return hook
