"""
Samples per second of the fused model beside other models of transformers that take a text and a picture, with encoders
of the same size and as many tokens: forward, and a step of training with one classification.

    python benchmarks/peers.py --size small

Each peer is compared with this model as it is by default (three fusion layers), and with so many fusion layers that it
has at least as many parameters.
"""

from collections.abc import Callable
from typing import Any

import torch
from harness import ENCODERS, in_turns, make_batch, make_labels, make_model, parser, prepare, report, training_step
from torch import nn
from transformers import (
    BertConfig,
    BridgeTowerConfig,
    BridgeTowerModel,
    FlavaConfig,
    FlavaModel,
    LxmertConfig,
    LxmertModel,
    PreTrainedModel,
    ViltConfig,
    ViltModel,
    VisionTextDualEncoderConfig,
    VisionTextDualEncoderModel,
    ViTConfig,
)


VOCABULARY = 30_522


class Peer(nn.Module):
    """A model with a head of two layers on the vector (batch, width) that `pool` takes from its output."""

    def __init__(self, model: PreTrainedModel, width: int, pool: Callable[[Any], torch.Tensor]):
        super().__init__()
        self.model, self.pool = model, pool
        self.head = nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 3))

    def forward(self, **batch: torch.Tensor) -> torch.Tensor:
        return self.head(self.pool(self.model(**batch)))


def bridgetower(size: dict[str, int], image_size: int) -> Peer:
    """https://arxiv.org/abs/2206.08657: as many layers that fuse as half of those of an encoder, as published."""
    width, layers = size["hidden_size"], size["num_hidden_layers"]
    config = BridgeTowerConfig(
        hidden_size=width, num_attention_heads=size["num_attention_heads"], num_hidden_layers=layers // 2,
        intermediate_size=size["intermediate_size"], hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        text_config=dict(**size, vocab_size=VOCABULARY, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0),
        vision_config=dict(hidden_size=width, num_hidden_layers=layers, patch_size=16, image_size=image_size),
    )  # fmt: skip
    return Peer(BridgeTowerModel(config), 2 * width, lambda output: output.pooler_output)


def flava(size: dict[str, int], image_size: int) -> Peer:
    """https://arxiv.org/abs/2112.04482: as many layers that fuse as half of those of an encoder, as published."""
    off = dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    config = FlavaConfig(
        text_config=dict(**size, **off, vocab_size=VOCABULARY),
        image_config=dict(**size, **off, image_size=image_size),
        multimodal_config=dict(**{**size, "num_hidden_layers": size["num_hidden_layers"] // 2}, **off),
        hidden_size=size["hidden_size"], projection_dim=size["hidden_size"],
    )  # fmt: skip
    return Peer(FlavaModel(config), size["hidden_size"], lambda output: output.multimodal_embeddings[:, 0])


def vilt(size: dict[str, int], image_size: int) -> Peer:
    """https://arxiv.org/abs/2102.03334: one encoder of both, so half of the layers and parameters."""
    config = ViltConfig(
        **size, vocab_size=VOCABULARY, image_size=image_size, patch_size=16, hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0, max_image_length=-1,
    )  # fmt: skip
    return Peer(ViltModel(config), size["hidden_size"], lambda output: output.pooler_output)


def dual_encoder(size: dict[str, int], image_size: int) -> Peer:
    """No fusion at all: what the encoders alone cost."""
    off = dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    config = VisionTextDualEncoderConfig.from_vision_text_configs(
        ViTConfig(**size, image_size=image_size), BertConfig(**size, **off), projection_dim=size["hidden_size"]
    )
    model = VisionTextDualEncoderModel(config)
    return Peer(model, 2 * size["hidden_size"], lambda out: torch.cat([out.text_embeds, out.image_embeds], -1))


PEERS = {"BridgeTower": bridgetower, "FLAVA": flava, "ViLT": vilt, "VisionTextDualEncoder": dual_encoder}


def parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def as_large_as(peer: nn.Module, make: Callable[[int], nn.Module]) -> nn.Module:
    """Ours with the fewest fusion layers that have at least the parameters of the peer."""
    one, two = parameters(make(1)), parameters(make(2))
    return make(max(1, 1 - (one - parameters(peer)) // (two - one)))


def compare(name: str, models: dict[str, nn.Module], batch: dict[str, Any], args: Any, **shapes: Any) -> None:
    """Forward and training step of several models, the peer first."""
    rows = batch["input_ids"].shape[0]
    shapes["parameters (M)"] = {way: round(parameters(model) / 1e6, 1) for way, model in models.items()}

    def loss(model: nn.Module) -> torch.Tensor:
        if hasattr(model, "tasks"):
            return model(**batch, labels=make_labels(model, rows)).loss
        labels = torch.zeros(rows, dtype=torch.int64, device=args.device)
        given = {**batch}
        if "image_features" in given:
            given = as_lxmert(given)
        return nn.functional.cross_entropy(model(**given).float(), labels)

    def forward(model: nn.Module) -> torch.Tensor:
        is_peer = not hasattr(model, "tasks")
        return model(**(as_lxmert(batch) if is_peer and "image_features" in batch else batch))

    baseline = next(iter(models))
    for model in models.values():
        model.to(args.device, getattr(torch, args.dtype)).eval()
    with torch.no_grad():
        ways = {way: lambda model=model: forward(model) for way, model in models.items()}
        seconds = in_turns(ways, args.repeats, args.device)
    report(f"peers, forward, {name}", seconds, baseline, args, **shapes)
    ways = {way: training_step(model.train(), lambda model=model: loss(model)) for way, model in models.items()}
    report(f"peers, train step, {name}", in_turns(ways, args.repeats, args.device), baseline, args, **shapes)


def as_lxmert(batch: dict[str, Any]) -> dict[str, Any]:
    features = batch["image_features"]
    boxes = torch.zeros(*features.shape[:2], 4, device=features.device, dtype=features.dtype)
    return {**{k: v for k, v in batch.items() if k != "image_features"}, "visual_feats": features, "visual_pos": boxes}


def lxmert(args: Any, rows: int, words: int) -> None:
    """https://arxiv.org/abs/1908.07490: features of 36 regions, found by a detector, in place of a vision encoder."""
    size = ENCODERS[args.size]
    width, heads, layers = size["hidden_size"], size["num_attention_heads"], size["num_hidden_layers"]
    regions, fusing = 36, 5
    text_layers = max(1, layers - 3)
    off = dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    config = LxmertConfig(
        **off, vocab_size=VOCABULARY, hidden_size=width, num_attention_heads=heads, visual_feat_dim=width,
        l_layers=text_layers, x_layers=fusing, r_layers=fusing, intermediate_size=size["intermediate_size"],
    )  # fmt: skip

    def ours(fusion_layers: int) -> nn.Module:
        model = make_model(
            args,
            text=BertConfig(**{**size, "num_hidden_layers": text_layers}, **off),
            vision=ViTConfig(**{**size, "num_hidden_layers": 1}),
            num_fusion_layers=fusion_layers,
        )
        # Does not run, and is not counted.
        model.model.vision_model.embeddings = model.model.vision_model.layers = nn.Identity()
        return model

    peer = Peer(LxmertModel(config), width, lambda output: output.pooled_output)
    batch = make_batch(args, rows, words, 16)
    del batch["pixel_values"]
    batch["image_features"] = torch.randn(rows, regions, width, device=args.device, dtype=getattr(torch, args.dtype))
    models = {"LXMERT": peer, "ours": ours(3), "ours, as many parameters": as_large_as(peer, ours)}
    compare("LXMERT", models, batch, args, rows=rows, words=words, regions=regions)


def main() -> None:
    made = parser(__doc__)
    made.add_argument("--rows", type=int, default=8)
    made.add_argument("--words", type=int, default=32)
    made.add_argument("--image_size", type=int, default=224)
    made.add_argument("--peers", nargs="+", choices=[*PEERS, "LXMERT"], default=[*PEERS, "LXMERT"])
    args = made.parse_args()
    prepare(args)
    batch = make_batch(args, args.rows, args.words, args.image_size)
    shapes = {"rows": args.rows, "words": args.words, "image_size": args.image_size}

    def ours(fusion_layers: int) -> nn.Module:
        return make_model(args, args.image_size, num_fusion_layers=fusion_layers)

    for name in args.peers:
        if name == "LXMERT":
            lxmert(args, args.rows, args.words)
            continue
        peer = PEERS[name](ENCODERS[args.size], args.image_size)
        models = {name: peer, "ours": ours(3)}
        if parameters(peer) > parameters(ours(1)):
            models["ours, as many parameters"] = as_large_as(peer, ours)
            layers = models["ours, as many parameters"].config.num_fusion_layers
            merged = {"kind": "merge", "num_tokens": 49}
            models["the same, 49 tokens per image"] = make_model(
                args, args.image_size, num_fusion_layers=layers, vision_token_reduction=merged
            )
        compare(name, models, batch, args, **shapes)


if __name__ == "__main__":
    main()
