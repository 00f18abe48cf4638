"""
What the fused model costs beside the same encoders with fusion layers in plain torch (SDPA), and which part of the
machine's rate of matrix products (MFU) each way reaches.

    python benchmarks/floor.py --size base --rows 8
"""

from typing import Any

import torch
from harness import (
    in_turns,
    make_batch,
    make_labels,
    make_model,
    matmul_rate,
    parser,
    prepare,
    report,
    training_step,
)
from torch import nn
from torch.nn.functional import cross_entropy, scaled_dot_product_attention
from torch.utils.flop_counter import FlopCounterMode
from transformers import BertConfig, BertModel, ViTConfig, ViTModel


class PlainFusion(nn.Module):
    """Cross-attention fusion as one would write it down for one image per row, and no more."""

    def __init__(self, width: int, heads: int, layers: int):
        super().__init__()
        self.heads = heads
        self.project = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width))
        self.layers = nn.ModuleList(
            nn.ModuleDict({
                "norm1": nn.LayerNorm(width), "q": nn.Linear(width, width), "k": nn.Linear(width, width),
                "v": nn.Linear(width, width), "out": nn.Linear(width, width), "norm2": nn.LayerNorm(width),
                "mlp": nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)),
            })
            for _ in range(layers)
        )  # fmt: skip

    def forward(self, text: torch.Tensor, image: torch.Tensor) -> torch.Tensor:
        image = self.project(image)

        def split(states: torch.Tensor) -> torch.Tensor:
            return states.unflatten(-1, (self.heads, -1)).transpose(1, 2)

        for layer in self.layers:
            query = split(layer["q"](layer["norm1"](text)))
            attended = scaled_dot_product_attention(query, split(layer["k"](image)), split(layer["v"](image)))
            text = text + layer["out"](attended.transpose(1, 2).flatten(2))
            text = text + layer["mlp"](layer["norm2"](text))
        return text


class Plain(nn.Module):
    """BERT, ViT, [`PlainFusion`], the mean, and a head of two layers."""

    def __init__(self, text: BertConfig, vision: ViTConfig, layers: int):
        super().__init__()
        self.text = BertModel(text, add_pooling_layer=False)
        self.vision = ViTModel(vision, add_pooling_layer=False)
        width = text.hidden_size
        self.fusion = PlainFusion(width, text.num_attention_heads, layers)
        self.head = nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 3))

    def forward(self, input_ids, attention_mask, pixel_values):
        text = self.text(input_ids, attention_mask=attention_mask).last_hidden_state
        return self.head(self.fusion(text, self.vision(pixel_values).last_hidden_state).mean(1))


def main() -> None:
    made = parser(__doc__)
    made.add_argument("--rows", type=int, default=8)
    made.add_argument("--words", type=int, default=32)
    made.add_argument("--image_size", type=int, default=224)
    args = made.parse_args()
    prepare(args)
    fused = make_model(args, args.image_size)
    plain = Plain(fused.config.text_config, fused.config.vision_config, fused.config.num_fusion_layers)
    plain = plain.to(args.device, getattr(torch, args.dtype))
    batch = make_batch(args, args.rows, args.words, args.image_size)
    labels = make_labels(fused, args.rows)
    shapes = {"rows": args.rows, "words": args.words, "image_size": args.image_size}
    rate = matmul_rate(args)

    def reached(line: dict[str, Any], ways: dict[str, Any], **shapes: Any) -> None:
        """Reports the share of the rate of matrix products."""
        shares = {}
        for name, way in ways.items():
            with FlopCounterMode(display=False) as counter:
                way()
            shares[name] = [counter.get_total_flops() / line["values"][name] / rate]
        report(f"{line['benchmark']}, MFU", shares, line["baseline"], args, unit="of the matmul rate", **shapes)

    with torch.no_grad():
        fused.eval(), plain.eval()
        ways = {
            "plain torch": lambda: plain(**batch),
            "fused": lambda: fused(**batch),
            "text encoder": lambda: plain.text(batch["input_ids"], attention_mask=batch["attention_mask"]),
            "vision encoder": lambda: plain.vision(batch["pixel_values"]),
        }
        line = report("forward", in_turns(ways, args.repeats, args.device), "plain torch", args, **shapes)
        reached(line, {name: ways[name] for name in ("plain torch", "fused")}, **shapes)
    fused.train(), plain.train()
    ways = {
        "plain torch": training_step(plain, lambda: cross_entropy(plain(**batch).float(), labels["task0"])),
        "fused": training_step(fused, lambda: fused(**batch, labels=labels).loss),
    }
    line = report("train step", in_turns(ways, args.repeats, args.device), "plain torch", args, **shapes)
    reached(line, ways, **shapes)


if __name__ == "__main__":
    main()
