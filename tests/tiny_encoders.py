"""Tiny encoders of every model type of transformers, made by shrinking the default config of each."""

import copy
import inspect
import re
import warnings
from typing import Any, Optional

import torch
from transformers import CONFIG_MAPPING, PreTrainedConfig, PreTrainedModel

from mm_transformers.model.encoder_classes import (
    modality_of,
    model_class,
    sub_config_of,
    without_random_skips,
)
from mm_transformers.model.encoder_probe import observe
from mm_transformers.model.modalities import ENCODERS


VOCAB_SIZE = 120
# The first pattern that the name of a field matches says how many there are at most; `None` leaves the field as it is.
_SIZES = (
    (r"vocab_size|^vocab$|entity_vocab|n_words", VOCAB_SIZE),
    (r"type_vocab_size|n_langs|num_mel_bins|input_feat_per_channel|conv_|kernel|stride|num_channels|in_channels", None),
    (r"window|pool|max_length|position_buckets|num_buckets|relative|patch_size|tubelet|qk_|v_head|rope_head", None),
    (r"max_position|max_seq|n_positions|max_source|max_target|n_ctx|seq_length|max_2d", 256),
    (r"num_(hidden_|encoder_|decoder_|dense_|sparse_)?layers$|_layers$|n_layers?$|num_blocks|depth$", "layers"),
    (r"key_value_heads|kv_heads|num_query_groups", "key_value_heads"),
    (r"heads$|n_heads?$|attention_heads|num_attention", 4),
    (r"head_dim|d_kv", "head_dim"),
    (r"per_tok|moe_top_?k|experts_top_k", 2),
    (r"^n_group$|topk_group", 1),
    (r"num_experts$|num_local_experts|n_routed_experts|moe_num_experts|^num_experts", 4),
    (r"intermediate|ffn|ff_dim|d_ff|d_inner|n_inner|mlp_dim|hidden_dim$|expert.*size", 64),
    (
        r"hidden_size$|d_model|d_embed|n_embd|^dim$|emb_dim$|embed_dim$|embedding_size|embedding_dim|^width$|hidden_dim",
        32,
    ),
    (r"image_size|img_size|^size$", 64),
)
_DEPTHS = re.compile(r"layers?$|depth|experts|vocab|position|image_size")
# How small each way of shrinking makes things; the first that gives an encoder that runs is taken.
_WAYS: dict[str, dict[str, Any]] = {
    "narrow": {"layers": 2, "key_value_heads": 2, "head_dim": 8},
    "tall": {"layers": 4, "key_value_heads": 4, "head_dim": None},
    "shallow": {"layers": 2},
    "shallow of four": {"layers": 4},
    "default": {},
}
# What shrinking alone does not get right.
_EFFICIENTNET: dict[str, Any] = {
    "width_coefficient": 0.25, "depth_coefficient": 1.0, "hidden_dim": 320, "kernel_sizes": [3, 3],
    "in_channels": [32, 16], "out_channels": [16, 24], "strides": [1, 2], "num_block_repeats": [1, 2],
    "expand_ratios": [1, 6], "depthwise_padding": [],
}  # fmt: skip
_FIELDS: dict[str, dict[str, Any]] = {
    "efficientnet": _EFFICIENTNET,
    "align_vision_model": _EFFICIENTNET,
    "codegen": {"rotary_dim": 4},
    "gptj": {"rotary_dim": 4},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "ernie4_5_moe": {"moe_num_experts": 4, "moe_k": 2},
    "esm": {"vocab_size": 33, "pad_token_id": 1, "mask_token_id": 32},
    "swinv2": {"embed_dim": 12, "depths": [1, 1], "num_heads": [2, 4], "window_size": 4},
    "donut-swin": {"embed_dim": 12, "depths": [1, 1], "num_heads": [2, 4], "window_size": 4},
    "maskformer-swin": {"embed_dim": 12, "depths": [1, 1], "num_heads": [2, 4], "window_size": 4},
    "bit": {"embedding_size": 32, "hidden_sizes": [32, 64], "depths": [1, 1]},
    "gpt_neo": {"num_layers": 2, "attention_types": [[["global", "local"], 1]]},
    "xmod": {"languages": ["en_XX", "de_DE"], "default_language": "en_XX"},
    "layoutlmv3": {"input_size": 64, "visual_embed": False, "coordinate_size": 5, "shape_size": 6},
}
MOST_PARAMETERS = 30_000_000


def model_types(modality: str) -> list[str]:
    """The model types of transformers whose config, or the part of it for this modality, may be such an encoder."""
    found = []
    for model_type in CONFIG_MAPPING:
        try:
            config_class = CONFIG_MAPPING[model_type]
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                config = config_class()
            if sub_config_of(config, modality) is config and _reads(config, modality):
                found.append(model_type)
        except Exception:  # not even its default config can be made
            continue
    return found


def _reads(config: PreTrainedConfig, modality: str) -> bool:
    """Whether the forward pass takes the input of a modality; many vision encoders inherit the name of another."""
    if modality_of(config) != modality:
        return False
    parameters = inspect.signature(model_class(config).forward).parameters
    return bool(set(ENCODERS[modality].inputs) & set(parameters)) or config.is_encoder_decoder or "kwargs" in parameters


def _shrunk(value: Any, name: str, way: str) -> Any:
    if isinstance(value, bool) or not isinstance(value, (int, list, tuple)):
        return value
    if isinstance(value, (list, tuple)):
        if way not in ("narrow", "tall") or not value or not all(type(x) is int for x in value):
            return value
        if re.search(r"depths|num_layers|num_block|layers$", name):
            return type(value)(1 for _ in value)
        if re.search(r"hidden_sizes|embed_dims?$|channels|widths|dims?$", name) and min(value) >= 16:
            return type(value)(max(8, x // 8) for x in value)
        return value
    if name.endswith("token_id"):
        return min(value, VOCAB_SIZE - 1)
    most = next((most for pattern, most in _SIZES if re.search(pattern, name)), None)
    if isinstance(most, str):
        most = _WAYS[way].get(most)
    if most is None or value <= 0 or way == "default" or (way.startswith("shallow") and not _DEPTHS.search(name)):
        return value
    return min(value, most)


def tiny_config(model_type: str, way: str = "narrow") -> PreTrainedConfig:
    """The default config of a model type, with smaller numbers."""
    config_class = CONFIG_MAPPING[model_type]
    default = config_class()
    names = [name for name in inspect.signature(config_class.__init__).parameters if name not in ("self", "kwargs")]
    names += [*getattr(config_class, "__annotations__", {}), "pad_token_id", "bos_token_id", "eos_token_id"]
    fields = {}
    for name in dict.fromkeys(names):
        value = getattr(default, name, None)
        smaller = _shrunk(value, name, way)
        if smaller != value:
            fields[name] = smaller
    return config_class(**{**fields, **_FIELDS.get(model_type, {})})


def make_tiny(model_type: str, modality: str) -> Optional[PreTrainedModel]:
    """
    A tiny model with random weights, `None` if none can be made.

    Weights are larger than new ones, so that what goes in can be told from what comes out.
    """
    built = None
    for way in _WAYS:
        try:
            config = without_random_skips(tiny_config(model_type, way))
            cls = model_class(config)
            with torch.device("meta"):
                size = sum(parameter.numel() for parameter in cls._from_config(copy.deepcopy(config)).parameters())
            if size > MOST_PARAMETERS:
                continue
            built = config  # where none runs, that which is most like the default says why
            observe(config, modality)
        except Exception:
            continue
        break
    if built is None:
        return None
    torch.manual_seed(0)
    try:
        model = model_class(built)._from_config(built).eval()
    except Exception:
        return None
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2 and parameter.numel() and parameter.is_floating_point():
                parameter.normal_(0, parameter[0].numel() ** -0.5)
    return model
