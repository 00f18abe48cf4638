"""Loads adapters of `model.add_adapter`, which the Trainer of transformers saves but does not load."""

from torch import nn
from transformers import PreTrainedModel


def has_own_adapters(model: nn.Module) -> bool:
    """Whether the model has adapters and is no `PeftModel`, which the Trainer can load."""
    return isinstance(model, PreTrainedModel) and getattr(model, "_hf_peft_config_loaded", False)


def load_adapters(model: PreTrainedModel, folder: str) -> None:
    """
    Loads the weights of a checkpoint into the active adapter of a model.

    Args:
        model: with adapters; see [`has_own_adapters`].
        folder: the folder from `model.save_pretrained`.

    Raises:
        ValueError: if the folder has other weights than the adapter.
    """
    from peft import get_peft_model_state_dict, set_peft_model_state_dict
    from peft.utils.save_and_load import load_peft_weights

    name = model.active_adapters()[0]
    # The names of `save_pretrained`, for PEFT.
    weights = {key.removeprefix("base_model.model."): x for key, x in load_peft_weights(folder, device="cpu").items()}
    known = get_peft_model_state_dict(model, adapter_name=name)
    different = sorted(known.keys() ^ weights.keys())
    if different:
        raise ValueError(
            f"The adapter in {folder} differs from the adapter of the model ({different[0]!r} is in one of them "
            "only): give `add_adapter` the config of the saved adapter."
        )
    set_peft_model_state_dict(model, weights, adapter_name=name)
