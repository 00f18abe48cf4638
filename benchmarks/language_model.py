"""
What pictures cost a language model: behind its layers, inside, or as a prefix, beside the language model alone.

Writing: tokens per second with pictures that were encoded before. Training: the rise of memory in a step of the
answers, with a frozen language model and frozen pictures. The shape of the language model is that of SmolLM2-135M.

    python benchmarks/language_model.py
"""

import argparse
from typing import Any

import torch
from harness import in_turns, parser, peak_memory, prepare, report, training_step
from transformers import LlamaConfig, ViTConfig

from mm_transformers import Generation, MMTransformerConfig, MMTransformerForMultiTask


WAYS: dict[str, dict[str, Any]] = {
    "behind": {"num_fusion_layers": 1},
    "inside": {"num_fusion_layers": 1, "fusion_layers_every": 4},
    "prefix": {"fusion_type": "prefix"},
}
# 49 patches and the class token.
IMAGE_SIZE = 112


def language_model_config(args: argparse.Namespace) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=args.vocab_size, hidden_size=args.width, intermediate_size=8 * args.width // 3,
        num_hidden_layers=args.layers, num_attention_heads=args.width // 64, num_key_value_heads=args.width // 192,
        tie_word_embeddings=True, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip


def make_model(args: argparse.Namespace, way: str) -> MMTransformerForMultiTask:
    vision = ViTConfig(
        image_size=IMAGE_SIZE, hidden_size=192, num_hidden_layers=2, num_attention_heads=3, intermediate_size=768
    )
    torch.manual_seed(0)
    config = MMTransformerConfig(
        text_config=language_model_config(args), vision_config=vision, freeze=["text", "vision"],
        tasks=[Generation("caption", max_length=args.new_tokens)], **WAYS[way],
    )  # fmt: skip
    model = MMTransformerForMultiTask(config).to(args.device, getattr(torch, args.dtype))
    # Closed gates compute as much; open ones are what a trained model has.
    for name, parameter in model.named_parameters():
        if name.endswith("gate_alpha"):
            parameter.data.fill_(0.5)
    return model


def make_inputs(args: argparse.Namespace) -> dict[str, torch.Tensor]:
    ids = torch.randint(3, args.vocab_size, (args.batch_size, args.text_len), device=args.device)
    dtype = getattr(torch, args.dtype)
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": torch.randn(args.batch_size, 3, IMAGE_SIZE, IMAGE_SIZE, device=args.device, dtype=dtype),
        "image_index": torch.arange(args.batch_size, device=args.device)[:, None],
    }


def make_step(args: argparse.Namespace, way: str) -> Any:
    inputs = make_inputs(args)
    labels = torch.randint(3, args.vocab_size, (args.batch_size, args.new_tokens), device=args.device)
    model = make_model(args, way).train()
    return training_step(model, lambda: model(**inputs, labels={"caption": labels}).loss)


def main() -> None:
    made = parser(__doc__, size=None, repeats=3)
    made.add_argument("--width", type=int, default=576)
    made.add_argument("--layers", type=int, default=30)
    made.add_argument("--vocab_size", type=int, default=49_152)
    made.add_argument("--batch_size", type=int, default=4)
    made.add_argument("--text_len", type=int, default=16)
    made.add_argument("--new_tokens", type=int, default=32)
    args = made.parse_args()
    prepare(args)
    inputs = make_inputs(args)
    texts = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    length = {"min_new_tokens": args.new_tokens, "max_new_tokens": args.new_tokens}
    names = ("width", "layers", "vocab_size", "batch_size", "text_len", "new_tokens")
    shapes = {name: getattr(args, name) for name in names}
    for way in WAYS:
        model = make_model(args, way).eval()
        # The same weights, since two copies of one model differ by several percent.
        bare = model.model.text_model
        with torch.no_grad():
            encoded = model.model(**inputs)
        writers = {
            "alone": lambda bare=bare: bare.generate(**texts, do_sample=False, **length),
            way: lambda model=model, encoded=encoded: model.generate("caption", encoded, **length),
        }
        seconds = in_turns(writers, args.repeats, args.device, warmup=1)
        tokens = args.batch_size * args.new_tokens
        rates = {name: [tokens / each for each in values] for name, values in seconds.items()}
        millions = {
            "alone": round(sum(p.numel() for p in bare.parameters()) / 1e6, 1),
            "added": round(sum(p.numel() for name, p in model.named_parameters() if "fusion" in name) / 1e6, 1),
        }
        report(
            "language model, tokens per second", rates, "alone", args, unit="tokens/s", parameters=millions, **shapes
        )
    rises = {way: [peak_memory(make_step, args, way)] for way in WAYS}
    report("language model, memory of a training step", rises, "prefix", args, unit="MB", **shapes)
    steps = {way: make_step(args, way) for way in WAYS}
    report("language model, training step", in_turns(steps, args.repeats, args.device), "prefix", args, **shapes)


if __name__ == "__main__":
    main()
