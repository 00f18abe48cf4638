"""What FSDP must be told of a model that is put together from others."""

from typing import Any


def layer_classes(model: Any) -> list[str]:
    """
    The names of the classes of layers that FSDP shards one by one: those that transformers keeps on one device, except
    the ones around the input embeddings, which accelerate shards by themselves, and which must not be sharded twice.

    Args:
        model (`PreTrainedModel`).
    """
    embeddings = model.get_input_embeddings()
    around = {type(m).__name__ for m in model.modules() if m is not embeddings and embeddings in m.modules()}
    return sorted(set(model._no_split_modules or ()) - around)
