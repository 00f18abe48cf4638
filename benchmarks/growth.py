"""
How each cost grows with the work: the exponent of the best-fitting power of the size, from a training step and a
forward pass.

    python benchmarks/growth.py
"""

import math
import statistics

import torch
from harness import in_turns, make_batch, make_labels, make_model, parser, prepare, report, training_step


# What grows, over which sizes.
GROWING = {
    "rows": [4, 8, 16, 32],
    "words": [64, 128, 256, 512],
    "image_size": [112, 224, 448],
    "images per row": [1, 2, 4, 8],
}


def exponent(sizes: list[int], seconds: list[float]) -> float:
    """Slope of the logarithms, by least squares."""
    return statistics.linear_regression([math.log(x) for x in sizes], [math.log(x) for x in seconds]).slope


def main() -> None:
    made = parser(__doc__, repeats=5)
    args = made.parse_args()
    prepare(args)
    for what, sizes in GROWING.items():
        ways = {}
        for size in sizes:
            shape = {"rows": 4, "words": 32, "image_size": 64, "images per row": 1, what: size}
            model = make_model(args, shape["image_size"])
            rows, images = shape["rows"], shape["images per row"]
            batch = make_batch(args, rows, shape["words"], shape["image_size"], rows * images)
            batch["image_index"] = torch.arange(rows * images, device=args.device).view(rows, images)
            labels = make_labels(model, rows)
            ways[str(size)] = training_step(model, lambda m=model, b=batch, la=labels: m(**b, labels=la).loss)
        seconds = in_turns(ways, args.repeats, args.device)
        medians = [statistics.median(each) for each in seconds.values()]
        last = exponent(sizes[-2:], medians[-2:])
        shapes = {"exponent": round(exponent(sizes, medians), 2), "exponent of the last two": round(last, 2)}
        report(f"growth with {what}", seconds, str(sizes[0]), args, **shapes)


if __name__ == "__main__":
    main()
