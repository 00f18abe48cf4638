"""
What the fused model costs beside its bare parts: text encoder + vision encoder + fusion layers in plain torch.

    python benchmarks/floor.py --size small
"""

import torch
from harness import ENCODERS, in_turns, parser, prepare, report
from torch import nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import BertConfig, BertModel, ViTConfig, ViTModel

from mm_transformers import Classification, MMTransformerConfig, MMTransformerForMultiTask


class PlainFusion(nn.Module):
    """The cross-attention fusion as one would write it down for one image per row and no more."""

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

        def split(states):
            return states.unflatten(-1, (self.heads, -1)).transpose(1, 2)

        for layer in self.layers:
            query = split(layer["q"](layer["norm1"](text)))
            attended = scaled_dot_product_attention(query, split(layer["k"](image)), split(layer["v"](image)))
            text = text + layer["out"](attended.transpose(1, 2).flatten(2))
            text = text + layer["mlp"](layer["norm2"](text))
        return text


class Plain(nn.Module):
    def __init__(self, text: BertConfig, vision: ViTConfig, layers: int):
        super().__init__()
        self.text = BertModel(text, add_pooling_layer=False)
        self.vision = ViTModel(vision, add_pooling_layer=False)
        self.fusion = PlainFusion(text.hidden_size, text.num_attention_heads, layers)
        self.head = nn.Linear(text.hidden_size, 3)

    def forward(self, input_ids, attention_mask, pixel_values):
        text = self.text(input_ids, attention_mask=attention_mask).last_hidden_state
        return self.head(self.fusion(text, self.vision(pixel_values).last_hidden_state).mean(1))


def main() -> None:
    made = parser(__doc__)
    made.add_argument("--rows", type=int, default=8)
    made.add_argument("--words", type=int, default=32)
    made.add_argument("--image_size", type=int, default=112)
    args = made.parse_args()
    prepare(args)
    size = ENCODERS[args.size]
    text = BertConfig(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, **size)
    vision = ViTConfig(image_size=args.image_size, **size)
    config = MMTransformerConfig(
        text_config=text, vision_config=vision, fusion_dropout=0.0, classifier_dropout=0.0,
        tasks=[Classification("topic", labels=["a", "b", "c"])],
    )  # fmt: skip
    dtype = getattr(torch, args.dtype)
    fused = MMTransformerForMultiTask(config).to(args.device, dtype)
    plain = Plain(text, vision, config.num_fusion_layers).to(args.device, dtype)
    ids = torch.randint(5, 1000, (args.rows, args.words), device=args.device)
    mask = torch.ones_like(ids)
    pixels = torch.randn(args.rows, 3, args.image_size, args.image_size, device=args.device, dtype=dtype)
    labels = torch.randint(0, 3, (args.rows,), device=args.device)

    def train(step):
        def run():
            step().backward()

        return run

    shapes = {"rows": args.rows, "words": args.words, "image_size": args.image_size}
    with torch.inference_mode():
        fused.eval(), plain.eval()
        ways = {
            "plain torch": lambda: plain(ids, mask, pixels),
            "fused": lambda: fused(ids, mask, pixel_values=pixels),
            "text encoder": lambda: plain.text(ids, attention_mask=mask),
            "vision encoder": lambda: plain.vision(pixels),
        }
        report("floor, forward", in_turns(ways, args.repeats, args.device), "plain torch", args, **shapes)
    fused.train(), plain.train()
    steps = {
        "plain torch": train(lambda: nn.functional.cross_entropy(plain(ids, mask, pixels), labels)),
        "fused": train(lambda: fused(ids, mask, pixel_values=pixels, labels={"topic": labels}).loss),
    }
    report("floor, train step", in_turns(steps, args.repeats, args.device), "plain torch", args, **shapes)


if __name__ == "__main__":
    main()
