"""FSDP for a model that consists of other models."""

from accelerate import FullyShardedDataParallelPlugin
from torch import nn
from transformers import PreTrainedModel


def layer_classes(model: PreTrainedModel) -> list[str]:
    """
    The names of the layer classes that FSDP shards one by one.

    These are the classes that transformers keeps on one device, except those around the input embeddings. accelerate
    shards the embeddings by themselves, and they must not be sharded twice.

    Args:
        model (`PreTrainedModel`).

    Raises:
        ValueError: if other modules share the input embeddings, as in most encoder-decoders. FSDP needs all modules
            that share a weight in one group, and accelerate puts the embeddings in a separate group.
    """
    embeddings = model.get_input_embeddings()
    if sum(getattr(module, "weight", None) is embeddings.weight for module in model.modules()) > 1:
        raise ValueError(
            "The text encoder shares its embeddings with the decoder, and FSDP cannot split shared weights: train "
            "this model without FSDP (by DDP, or DeepSpeed ZeRO)."
        )
    around = {type(m).__name__ for m in model.modules() if m is not embeddings and embeddings in m.modules()}
    return sorted(set(model._no_split_modules or ()) - around)


def check_sharding(plugin: FullyShardedDataParallelPlugin, model: PreTrainedModel) -> None:
    """
    Sets the layers for FSDP to shard, unless its config has them.

    Args:
        plugin (`FullyShardedDataParallelPlugin`): That of accelerate.
        model (`PreTrainedModel`): The model, not wrapped.

    Raises:
        ValueError: if it is FSDP1; or as in [`layer_classes`].
    """
    if plugin.fsdp_version == 1:
        raise ValueError("MMTrainer supports FSDP2 only: set fsdp_version: 2 in the config of accelerate.")
    if plugin.transformer_cls_names_to_wrap is None:
        plugin.transformer_cls_names_to_wrap = layer_classes(model)


def gather_for_method(model: nn.Module, name: str) -> None:
    """Makes FSDP gather the sharded weights for a method, as it does for `forward`."""
    from torch.distributed.fsdp import register_fsdp_forward_method

    if name not in vars(model):
        register_fsdp_forward_method(model, name)


def share_out_again(model: nn.Module) -> None:
    """
    Shards the weights again after a forward pass without a backward pass, which FSDP leaves unsharded.

    Otherwise `zero_grad` cannot reach the gradients of the sharded weights.
    """
    from torch.distributed.fsdp import FSDPModule

    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
