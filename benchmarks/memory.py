"""
How far memory rises in a training step: beside plain torch, with gradient checkpointing, and against the rows.

    python benchmarks/memory.py
"""

import torch
from floor import Plain
from harness import in_turns, make_batch, make_labels, make_model, parser, peak_memory, prepare, report, training_step


def make_step(args, way: str, rows: int):
    fused = make_model(args, args.image_size)
    batch = make_batch(args, rows, args.words, args.image_size)
    labels = make_labels(fused, rows)
    if way == "plain torch":
        config = fused.config
        plain = Plain(config.text_config, config.vision_config, config.num_fusion_layers).to(fused.device, fused.dtype)
        return training_step(plain, lambda: torch.nn.functional.cross_entropy(plain(**batch).float(), labels["task0"]))
    if way == "checkpointing":
        # The name that transformers 5.23 wants, or that of 5.17.
        getattr(fused, "activation_checkpointing_enable", fused.gradient_checkpointing_enable)()
    if way == "encoders frozen":
        fused.config.freeze = ["text", "vision"]
        fused.model.freeze()
    fused.train()
    return training_step(fused, lambda: fused(**batch, labels=labels).loss)


def main() -> None:
    made = parser(__doc__, repeats=5)
    made.add_argument("--rows", type=int, nargs="+", default=[8, 16, 32])
    made.add_argument("--words", type=int, default=32)
    made.add_argument("--image_size", type=int, default=224)
    args = made.parse_args()
    prepare(args)
    ways = ("plain torch", "fused", "checkpointing", "encoders frozen")
    for rows in args.rows:
        shapes = {"rows": rows, "words": args.words, "image_size": args.image_size}
        rises = {way: [peak_memory(make_step, args, way, rows) for _ in range(1)] for way in ways}
        report("memory, train step", rises, "plain torch", args, unit="MB", **shapes)
    steps = {way: make_step(args, way, args.rows[0]) for way in ways}
    seconds = in_turns(steps, args.repeats, args.device)
    report("memory, seconds of these", seconds, "plain torch", args, rows=args.rows[0], words=args.words)


if __name__ == "__main__":
    main()
