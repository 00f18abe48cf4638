"""
Properties of an encoder, measured by running it once.

They are the width of its tokens, the parameters that do not affect the fusion, and whether padding changes its output.

[`probe`] runs an encoder that `from_encoders` has loaded, and the result is stored in its config as `encoder_traits`.
Configs without weights lack these traits. For them, [`observe`] builds the encoder again on the meta device, which
needs no memory but cannot measure the effect of padding.
"""

import copy
import importlib
import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, Optional

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutput

from .encoder_classes import (
    arguments_of,
    audio_token_mask,
    blank_input,
    check_class,
    class_options,
    encoder_part,
    forward_options,
    min_audio_samples,
    output_tokens,
    takes_audio_mask,
    without_random_skips,
)
from .modalities import ENCODERS


# Numbers of tokens before and after padding. The second pair reveals mixing over blocks of tokens.
_TEXT_LENGTHS = ((9, 12), (40, 72))
# Larger encoders (in parameters) are run on the meta device only, not with values.
_MOST_TO_BUILD = 100_000_000
# The largest minimum length of texts, in tokens, that an encoder may need.
_SHORT_TEXT = 16
# The tolerated difference of a row in two batches, as a share of the spread of its states.
_TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-3}
_LOW_PRECISION_TOLERANCE = 0.2


class Observation(NamedTuple):
    """The properties of an encoder without weights."""

    width: int
    unused: frozenset[str]
    positions: Optional[int]  # the longest text for its table of positions
    counts_from_padding: bool  # whether that table begins after the index of the padding token
    has_plain_layers: bool = True  # whether all layers read states of shape (batch, tokens, width)


def traits_of(config: PreTrainedConfig) -> dict[str, Any]:
    """
    The stored traits of an encoder.

    "width": the width of its tokens. "unused": its unused parameters. "routed": some parameters are used by some tokens
    only. "by_length": padding changes its output, so it runs on texts of equal length, of at least "shortest" tokens.
    "one_by_one": it makes one sequence of all images, so they run one by one.
    """
    return getattr(config, "encoder_traits", None) or {}


# --- On the meta device ---

_OBSERVATIONS: dict[tuple[type, str, str], Observation] = {}
# Fields that differ before and after loading, and do not affect the properties.
_BOOKKEEPING = ("_name_or_path", "architectures", "dtype", "transformers_version", "encoder_traits")


def observe(config: PreTrainedConfig, modality: str) -> Observation:
    """
    The properties of the encoder of a config; computed once per config.

    Raises:
        ValueError: one sentence, if the encoder cannot be used.
    """
    fields = {name: value for name, value in config.to_dict().items() if name not in _BOOKKEEPING}
    key = (type(config), json.dumps(fields, sort_keys=True, default=str), modality)
    if key not in _OBSERVATIONS:
        try:
            _OBSERVATIONS[key] = _forward_blank(config, modality, "meta")
        except _NeedsValues:
            _OBSERVATIONS[key] = _forward_blank(config, modality, "cpu")
    return _OBSERVATIONS[key]


class _NeedsValues(Exception):
    """The forward pass fails on the meta device, perhaps because its tensors have no values."""


def _forward_blank(config: PreTrainedConfig, modality: str, device: str) -> Observation:
    # The final encoder shares its config with the whole model, and building sets some of its fields.
    config = without_random_skips(copy.deepcopy(config))
    config._attn_implementation = "eager"
    cls, name = check_class(config, modality), f"{config.model_type!r} cannot be the {modality} encoder"
    with (
        torch.random.fork_rng(devices=[]),
        torch.inference_mode(False),
        torch.enable_grad(),
        torch.device(device),
        _unpartitioned(),
    ):
        with one_sentence(f"{name}: it cannot be built"):
            model = training_mode(cls(config, **class_options(cls)))
        model = encoder_part(model, modality)
        positions = table_of_positions(model)
        if modality == "text":
            inputs = {"input_ids": torch.ones(1, 8, dtype=torch.int64)}
        else:
            with one_sentence(f"{name}: it has no blank input"):
                inputs = {key: x.to(model.dtype) for key, x in blank_input(config, modality).items()}
        # Loading sets `requires_grad` on parameters that were built without it, such as tables of sinusoids.
        parameters = _floating_parameters(model)
        for parameter in parameters.values():
            parameter.requires_grad_(True)
        dimensions = _dimensions_at_layers(model)
        try:
            with one_sentence(f"{name}: it fails on {_blank(inputs, modality)}"):
                output = model(**inputs, **forward_options(model))
                check_layout(output, name, inputs["input_ids"].shape[1] if modality == "text" else None)
                tokens = output_tokens(output)
                gradients = torch.autograd.grad(tokens.sum(), list(parameters.values()), allow_unused=True)
        except ValueError as error:
            if modality == "vision" and _takes_videos(model, inputs["pixel_values"]):
                raise ValueError(
                    f"{name}: it takes videos of shape (batch, frames, channels, rows, columns), not images."
                ) from error
            if device != "meta" or isinstance(error.__cause__, (TypeError, ValueError)) or error.__cause__ is None:
                raise
            width = getattr(config, "hidden_size", None)
            if sum(p.numel() for p in parameters.values()) > _MOST_TO_BUILD:
                if not isinstance(width, int):
                    raise
                # The loaded encoder will show it.
                return Observation(width, frozenset(), *positions)
            raise _NeedsValues from error
    unused = {key for key, gradient in zip(parameters, gradients, strict=True) if gradient is None}
    never_used = frozenset(name for name in unused if not is_expert(name))
    return Observation(tokens.shape[-1], never_used, *positions, has_plain_layers=dimensions <= {3})


def _dimensions_at_layers(model: PreTrainedModel) -> set[int]:
    """A set that collects, as the model runs, the numbers of dimensions of the states that its layers read."""
    found: set[int] = set()

    def look(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        states = args[0] if args else kwargs.get("hidden_states")
        if isinstance(states, torch.Tensor):
            found.add(states.ndim)

    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer):
            module.register_forward_pre_hook(look, with_kwargs=True)
    return found


def _takes_videos(model: PreTrainedModel, pixel_values: torch.Tensor) -> bool:
    frames = getattr(model.config, "num_frames", None)
    if not isinstance(frames, int):
        return False
    try:
        model(pixel_values=pixel_values[:, None].expand(-1, frames, -1, -1, -1))
    except Exception:
        return False
    return True


def training_mode(model: PreTrainedModel) -> PreTrainedModel:
    """Training mode, but with fixed running statistics, since they cannot be computed from one item."""
    model.train()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()
    return model


def is_expert(name: str) -> bool:
    """Whether a parameter without gradient may get one with other tokens, since a router chooses the experts."""
    return _EXPERT.search(name) is not None


_EXPERT = re.compile(r"experts\.\w*\d")


def check_layout(output: Any, name: str, num_tokens: Optional[int]) -> None:
    """
    Checks the tokens of an encoder output.

    Args:
        name: the beginning of messages.
        num_tokens: the expected number of tokens, if known.

    Raises:
        ValueError: one sentence, if the output holds no tokens.
    """
    states = getattr(output, "last_hidden_state", None)
    if states is None:
        raise ValueError(f"{name}: its output has no `last_hidden_state`.")
    is_map = states.ndim == 4 and not states.shape[1] == states.shape[2] != states.shape[3]
    if states.ndim != 3 and not is_map:
        raise ValueError(
            f"{name}: its output has the shape {tuple(states.shape)}, not (batch, tokens, width) or "
            "(batch, width, rows, columns)."
        )
    if num_tokens is not None and states.shape[1] != num_tokens:
        raise ValueError(f"{name}: it outputs {states.shape[1]} tokens for a text of {num_tokens}.")


# The tables of token positions of text encoders; not those of places on a page, of entities or of pictures.
_POSITIONS = re.compile(r"(^|\.)(char_)?(embed_positions|position_embeddings?|positions_embed|wpe)\.weight$")
_NO_TEXT_POSITIONS = re.compile(r"entity|visual|image|vision|bias")


def table_of_positions(model: nn.Module) -> tuple[Optional[int], bool]:
    """The number of tokens in the table of positions of a text encoder or decoder, and where they begin."""
    for name, table in [*model.named_parameters(), *model.named_buffers()]:
        if table.ndim == 2 and _POSITIONS.search(name) and not _NO_TEXT_POSITIONS.search(name):
            owner = model.get_submodule(name.rpartition(".")[0])
            after_padding = getattr(owner, "padding_idx", None)
            taken = after_padding + 1 if after_padding is not None else getattr(owner, "offset", 0) or 0
            # Some tables have unused rows.
            said = getattr(getattr(model, "config", None), "max_position_embeddings", None)
            most = said if isinstance(said, int) and said > 0 else table.shape[0]
            return min(table.shape[0] - taken, most), after_padding is not None
    return None, False


def _floating_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.is_floating_point()}


def _blank(inputs: dict[str, torch.Tensor], modality: str) -> str:
    return f"one blank {ENCODERS[modality].noun} of shape {tuple(next(iter(inputs.values())).shape)}"


@contextmanager
def one_sentence(what: str) -> Iterator[None]:
    """Turns errors into one sentence, except those that are one, and those that name a missing library."""
    try:
        yield
    except ImportError:
        raise
    except Exception as error:
        if isinstance(error, ValueError) and str(error).startswith(what.partition(":")[0]):
            raise
        reason = " ".join(str(error).split()) or type(error).__name__
        if len(reason) > 300:
            reason = reason[:300] + " ..."
        raise ValueError(f"{what}: {reason}") from error


@contextmanager
def _unpartitioned() -> Iterator[None]:
    """Turns off DeepSpeed ZeRO-3, which would split each new parameter over the processes."""
    if not is_deepspeed_zero3_enabled():
        yield
        return
    # Imported by name: otherwise transformers would list it as a requirement of the code next to a checkpoint.
    partition_parameters = importlib.import_module("deepspeed.runtime.zero.partition_parameters")

    partition_parameters.shutdown_init_context()
    try:
        yield
    finally:
        partition_parameters.restore_init_context()


# --- The loaded encoder ---


def probe(model: PreTrainedModel, modality: str) -> dict[str, Any]:
    """
    The traits of an encoder, from a few small inputs and one backward pass.

    Args:
        model: the encoder; for an encoder-decoder, its encoder.

    Returns:
        The traits; see [`traits_of`].

    Raises:
        ValueError: one sentence, if the encoder cannot be used.
    """
    if is_deepspeed_zero3_enabled():  # each process has only a part of each parameter
        return {}
    was_training, seen = model.training, _Probe(model, modality)
    devices = [model.device] if model.device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices=devices), torch.inference_mode(False):
            torch.manual_seed(0)
            return seen.traits()
    finally:
        model.train(was_training)


def unused_parameters(model: PreTrainedModel, run: Any) -> list[str]:
    """
    The parameters that get no gradient (`grad is None`; 0 is one) from a backward pass.

    Args:
        run: runs the model, and returns its output tensor.
    """
    parameters, hooks = _floating_parameters(model), []
    if any(parameter.is_inference() for parameter in parameters.values()):
        return []  # a model that is loaded under `torch.inference_mode` cannot be trained
    reached: set[str] = set()
    wanted = {name: parameter.requires_grad for name, parameter in parameters.items()}
    for name, parameter in parameters.items():

        def note(reached_parameter: torch.Tensor, name: str = name) -> None:
            reached.add(name)
            reached_parameter.grad = None  # keep one gradient at a time

        parameter.requires_grad_(True)
        hooks.append(parameter.register_post_accumulate_grad_hook(note))
    try:
        with torch.enable_grad():
            run().float().sum().backward()
    finally:
        for hook in hooks:
            hook.remove()
        for name, parameter in parameters.items():
            parameter.grad = None
            parameter.requires_grad_(wanted[name])
    # Within `from_pretrained` weights are not tied yet: a gradient of one counts for both.
    for pair in (getattr(model, "all_tied_weights_keys", None) or {}).items():
        if reached & set(pair):
            reached |= set(pair)
    return [name for name in parameters if name not in reached]


class _Probe:
    """One loaded encoder."""

    def __init__(self, model: PreTrainedModel, modality: str) -> None:
        self.model, self.modality = model, modality
        self.name = f"{model.config.model_type!r} cannot be the {modality} encoder"
        self.options = forward_options(model)
        self.passes_mask = modality == "text" or (modality == "audio" and takes_audio_mask(model))

    def traits(self) -> dict[str, Any]:
        traits: dict[str, Any] = {}
        self.model.eval()
        items = self._items()
        alone = self._run(items[0])
        traits["width"] = alone.shape[-1]
        unused = self._unused(items[0])
        traits["unused"] = [name for name in unused if not is_expert(name)]
        if len(traits["unused"]) < len(unused):
            traits["routed"] = True
        self.model.eval()
        if not self._takes_padding():
            if self._mixes_items(items, alone):
                self._check_repeats(items[0], alone)
                traits["one_by_one"] = True
        elif self._mixes_padding():
            self._check_repeats(items[0], alone)
            traits["by_length"] = True
            shortest = self._shortest()
            if shortest > 1:
                traits["shortest"] = shortest
        return traits

    def _items(self) -> list[dict[str, torch.Tensor]]:
        if self.modality == "text":
            return [self._text(_TEXT_LENGTHS[0][0])]
        blank = blank_input(self.model.config, self.modality)
        values = [{key: torch.randn_like(x) for key, x in blank.items()} for _ in range(2)]
        return [{key: x.to(self.model.device, self.model.dtype) for key, x in item.items()} for item in values]

    def _text(self, length: int) -> dict[str, torch.Tensor]:
        config = self.model.config
        said = [value for name, value in config.to_dict().items() if name.endswith("token_id")]
        special = {i for value in said for i in (value if isinstance(value, (list, tuple)) else [value])}
        ids = [i for i in range(min(getattr(config, "vocab_size", None) or 1000, 1000)) if i not in special]
        chosen = torch.tensor(ids or [0])[torch.randint(len(ids or [0]), (1, length))]
        return {"input_ids": chosen.to(self.model.device)}

    def _run(self, item: dict[str, torch.Tensor], mask: Optional[torch.Tensor] = None) -> torch.Tensor:
        with torch.no_grad():
            return self._tokens(item, mask)

    def _tokens(self, item: dict[str, torch.Tensor], mask: Optional[torch.Tensor] = None) -> torch.Tensor:
        inputs = dict(item)
        if self.passes_mask:
            main = next(iter(item.values()))
            inputs["attention_mask"] = torch.ones_like(main[..., 0] if main.ndim > 2 else main, dtype=torch.int64)
            if mask is not None:
                inputs["attention_mask"] = mask
        with one_sentence(f"{self.name}: it fails on {_blank(item, self.modality)}"):
            output = self.model(**inputs, **self.options)
        check_layout(output, self.name, item["input_ids"].shape[1] if self.modality == "text" else None)
        return output_tokens(output)

    def _unused(self, item: dict[str, torch.Tensor]) -> list[str]:
        if getattr(self.model, "is_quantized", False):
            return []
        training_mode(self.model)
        with one_sentence(f"{self.name}: it fails in training on {_blank(item, self.modality)}"):
            return unused_parameters(self.model, lambda: self._tokens(item))

    def _differ(self, given: torch.Tensor, expected: torch.Tensor) -> bool:
        given, expected = given.float(), expected.float()
        tolerance = _TOLERANCE.get(self.model.dtype, _LOW_PRECISION_TOLERANCE)
        return bool((given - expected).abs().max() > tolerance * expected.std().clamp(min=1e-6))

    def _check_repeats(self, item: dict[str, torch.Tensor], tokens: torch.Tensor) -> None:
        again = self._run(item)
        if again.shape != tokens.shape or self._differ(again, tokens):
            raise ValueError(f"{self.name}: in evaluation it outputs other tokens each time for the same input.")

    def _mixes_items(self, items: list[dict[str, torch.Tensor]], alone: torch.Tensor) -> bool:
        """Whether another item in the batch changes the tokens of an item."""
        try:
            both = self._run({key: torch.cat([item[key] for item in items]) for key in items[0]})
        except ValueError:  # alone, it has just run
            return True
        return both.shape != (2, *alone.shape[1:]) or self._differ(both[:1], alone)

    def _takes_padding(self) -> bool:
        """Whether a batch may hold items of several lengths, with a mask."""
        if self.modality == "audio":
            # Not spectrograms of one fixed length, (1, bands, frames).
            values = next(iter(blank_input(self.model.config, "audio").values()))
            return self.passes_mask and (values.ndim == 2 or "max_length" not in self.model.config.to_dict())
        return self.modality == "text"

    def _lengths(self) -> list[tuple[int, int]]:
        if self.modality == "audio":
            squeeze = getattr(self.model.config, "squeeze_factor", 1)
            return [tuple(min_audio_samples(self.model.config, n * squeeze) for n in (9, 14))]  # type: ignore[list-item]
        longest = table_of_positions(self.model)[0]
        return [pair for pair in _TEXT_LENGTHS if longest is None or pair[1] <= longest] or [(2, 3)]

    def _item_of(self, length: int) -> dict[str, torch.Tensor]:
        if self.modality == "text":
            return self._text(length)
        key, blank = next(iter(blank_input(self.model.config, self.modality).items()))
        values = torch.randn(1, length, *blank.shape[2:])
        return {key: values.to(self.model.device, self.model.dtype)}

    def _mixes_padding(self) -> bool:
        """Whether padding on the right, to the length of a longer row, changes the tokens of a row."""
        pad: Optional[int] = getattr(self.model.config, "pad_token_id", None)
        for short, long in self._lengths():
            (key, whole), places = next(iter(self._item_of(long).items())), torch.arange(long, device=self.model.device)
            alone = self._run({key: whole[:, :short]})
            padded = whole.clone()
            padded[:, short:] = 0 if self.modality == "audio" or pad is None else pad
            mask = torch.stack([places < short, places >= 0]).to(torch.int64)
            try:
                beside = self._run({key: torch.cat([padded, whole])}, mask)[:1]
            except ValueError:  # alone, it has just run
                return True
            kept = audio_token_mask(self.model, alone.shape[1], mask[:1, :short]) if self.modality == "audio" else None
            num_tokens = alone.shape[1] if kept is None else int(kept.sum())
            if self._differ(beside[:, :num_tokens], alone[:, :num_tokens]):
                return True
        return False

    def _shortest(self) -> int:
        """The shortest text that the encoder takes, in tokens."""
        if self.modality != "text":
            return 1
        failing = 0
        for length in range(1, _SHORT_TEXT + 1):
            try:
                self._run(self._text(length))
            except ValueError:
                failing = length
        return failing + 1


def probe_seq2seq(model: PreTrainedModel) -> list[str]:
    """The parameters of a whole encoder-decoder that get no gradient when it writes."""
    if is_deepspeed_zero3_enabled():
        return []
    ids = torch.ones(1, 4, dtype=torch.int64, device=model.device)

    def run() -> torch.Tensor:
        # As in a fused model, the decoder gets the states and no further encoder outputs.
        with one_sentence(f"{model.config.model_type!r} cannot write: its decoder fails on one blank text"):
            states = model.get_encoder()(input_ids=ids).last_hidden_state
            encoded = BaseModelOutput(last_hidden_state=states)
            mask = torch.ones_like(ids)
            return model(encoder_outputs=encoded, attention_mask=mask, decoder_input_ids=ids, use_cache=False).logits

    with torch.inference_mode(False):
        return [name for name in unused_parameters(model, run) if not is_expert(name)]


def probe_writing(model: PreTrainedModel) -> list[str]:
    """The parameters of a language model that get no gradient when it writes."""
    if is_deepspeed_zero3_enabled():
        return []
    ids = torch.ones(1, 4, dtype=torch.int64, device=model.device)

    def run() -> torch.Tensor:
        with one_sentence(f"{model.config.model_type!r} cannot write: it fails on one blank text"):
            return model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits

    with torch.inference_mode(False):
        return [name for name in unused_parameters(model, run) if not is_expert(name)]


def is_causal(model: PreTrainedModel) -> bool:
    """Whether the states of a text encoder depend on no later token."""

    def holds(seen: _Probe) -> bool:
        first, second = seen._text(8), seen._text(8)
        both = torch.cat([first["input_ids"][:, :5], second["input_ids"][:, 5:]], 1)
        return not seen._differ(seen._run({"input_ids": both})[:, :5], seen._run(first)[:, :5])

    return _measured(model, holds)


def ignores_leading_padding(model: PreTrainedModel) -> bool:
    """Whether padding before a text, with a mask, changes none of its states."""
    cls: Any = model.__class__

    def holds(seen: _Probe) -> bool:
        text = seen._text(8)["input_ids"]
        inputs, mask = {"input_ids": torch.cat([torch.zeros_like(text[:, :3]), text], 1)}, torch.ones(1, 11).long()
        mask[:, :3] = 0
        if "position_ids" in arguments_of(cls):
            inputs["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0).to(text.device)
        padded = seen._run(inputs, mask.to(text.device))
        return not seen._differ(padded[:, 3:], seen._run({"input_ids": text}))

    return _measured(model, holds)


def _measured(model: PreTrainedModel, holds: Callable[[_Probe], bool]) -> bool:
    if is_deepspeed_zero3_enabled():  # each process has only a part of each parameter
        return True
    was_training = model.training
    devices = [model.device] if model.device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices=devices), torch.inference_mode(False):
            torch.manual_seed(0)
            return holds(_Probe(model.eval(), "text"))
    finally:
        model.train(was_training)


def observe_writing(build: Callable[[], PreTrainedModel]) -> list[str]:
    """[`probe_writing`] of a language model, built again on the meta device."""
    return _on_meta(build, probe_writing)


def observe_seq2seq(build: Callable[[], PreTrainedModel]) -> list[str]:
    """[`probe_seq2seq`] of an encoder-decoder, built again on the meta device."""
    return _on_meta(build, probe_seq2seq)


def _on_meta(build: Callable[[], PreTrainedModel], probe_it: Callable[[PreTrainedModel], list[str]]) -> list[str]:
    with torch.random.fork_rng(devices=[]), torch.device("meta"), _unpartitioned():
        try:
            return probe_it(build().eval())
        except (RuntimeError, NotImplementedError, ValueError):  # its operations depend on values
            return []
