"""The learning rate of each parameter."""

from collections.abc import Iterator

import torch
from torch import nn
from torch.nn.utils.parametrize import ParametrizationList
from transformers import TrainingArguments

from ..model.modeling_mm_transformer import MMTransformerForMultiTask, MMTransformerModel
from .arguments import DEFAULT_LEARNING_RATES, NOT_GIVEN


# A gate starts at 0, and at first only gates learn; see Flamingo (https://arxiv.org/abs/2204.14198), section 2.2.
GATE_LEARNING_RATE_FACTOR = 10.0


def is_gate(name: str) -> bool:
    return name.endswith("gate_alpha")


def never_decays(name: str) -> bool:
    return name.endswith(("gate_alpha", "logit_scale"))


def set_learning_rates(
    optimizer: torch.optim.Optimizer, fused: MMTransformerForMultiTask, args: TrainingArguments
) -> None:
    """
    Splits the groups of an optimizer, so that each part of the model has its rate; gates also lose their weight decay.

    Args:
        fused ([`MMTransformerForMultiTask`]): Whose parameters these are.
        args (`TrainingArguments` or [`MMTrainingArguments`]).
    """
    rates = learning_rates(fused, args, float(optimizer.defaults["lr"]))
    gates = {id(p) for name, p in fused.named_parameters() if is_gate(name)}
    for group in list(optimizer.param_groups):
        parts: dict[tuple[float, bool], list[nn.Parameter]] = {}
        for parameter in group["params"]:
            rate = rates.get(id(parameter), float(group["lr"]))
            parts.setdefault((rate, id(parameter) in gates), []).append(parameter)
        options = {name: value for name, value in group.items() if name not in ("params", "lr")}
        for i, ((rate, is_gates), parameters) in enumerate(parts.items()):
            is_tensor = isinstance(group["lr"], torch.Tensor)  # torchao's optimisers take no other
            new_rate = torch.full_like(group["lr"], rate) if is_tensor else rate
            if i == 0:
                group.update(params=parameters, lr=new_rate)
                if is_gates:
                    group["weight_decay"] = 0.0
            else:
                decay = {"weight_decay": 0.0} if is_gates else {}
                optimizer.add_param_group({**options, **decay, "params": parameters, "lr": new_rate})


def learning_rates(fused: MMTransformerForMultiTask, args: TrainingArguments, default: float) -> dict[int, float]:
    """`id` of each parameter -> its rate; the default is for parts without a rate in the arguments."""

    # Unless a rate was given for all parts, or is set by a hyperparameter search.
    by_part = default == NOT_GIVEN

    def rate_of(name: str) -> float:
        rate = getattr(args, f"{name}_learning_rate", None)
        if rate is not None:
            return rate
        return DEFAULT_LEARNING_RATES[name] if by_part else default

    decay = getattr(args, "layerwise_lr_decay", 1.0)
    rates: dict[int, float] = {}
    for name, parameter in fused.named_parameters():
        rates[id(parameter)] = rate_of("fusion") * (GATE_LEARNING_RATE_FACTOR if is_gate(name) else 1.0)
    for parameter in fused.heads.parameters():
        rates[id(parameter)] = rate_of("head")
    for encoder in _stacks(fused.model):
        numbers = layer_numbers(encoder)
        top = max(numbers.values(), default=0)
        for parameter in encoder.parameters():
            rates[id(parameter)] = rate_of("encoder") * decay ** (top + 1 - numbers[id(parameter)])
    return rates


def _stacks(model: MMTransformerModel) -> Iterator[nn.Module]:
    """The modules with layers; an encoder-decoder comes first as a whole, for parameters outside its two halves."""
    if model.has_decoder:
        yield model.text_model
        yield model.text_model.get_decoder()
    yield model.text_encoder
    for name in model.config.modalities:
        yield getattr(model, f"{name}_model")


def layer_numbers(encoder: nn.Module) -> dict[int, int]:
    """
    The number of the layer of each parameter of an encoder, by the `id` of the parameter.

    Parameters before the first layer (embeddings) have 0, the layers 1, 2, ... Parameters after a layer (norms) count
    to it. Layers are the members of module lists. In encoders with stages, they are the layers of the stages.
    """
    numbers: dict[int, int] = {}
    current = 0

    def visit(module: nn.Module) -> None:
        nonlocal current
        for parameter in module.parameters(recurse=False):
            numbers.setdefault(id(parameter), current)
        for child in module.children():
            # A weight-normed layer keeps its two weights in a list that is no list of layers.
            if isinstance(child, nn.ModuleList) and not isinstance(child, ParametrizationList):
                for layer in child:
                    if _is_stage(layer):
                        visit(layer)
                    else:
                        current += 1
                        for parameter in layer.parameters():
                            numbers.setdefault(id(parameter), current)
            else:
                visit(child)

    visit(encoder)
    return numbers


def _is_stage(layer: nn.Module) -> bool:
    """Whether it holds a list of layers of one type, unlike attention and feed-forward of one layer."""
    lists = [child for child in layer.children() if isinstance(child, nn.ModuleList)]
    return any(len({type(member) for member in members}) == 1 for members in lists)
