"""
Several texts about one image: a batch in which the image is there once, beside one that holds a copy for each text.

    python benchmarks/shared_images.py --size base --rows 10
"""

import torch
from harness import in_turns, make_batch, make_labels, make_model, parser, peak_memory, prepare, report, training_step


def make_step(args, texts_per_image: int, shared: bool):
    """Forward and backward of `args.rows` texts."""
    model = make_model(args, args.image_size)
    images = args.rows // texts_per_image
    batch = make_batch(args, args.rows, args.words, args.image_size, images)
    owners = torch.arange(images, device=args.device).repeat_interleave(texts_per_image)
    if shared:
        batch["image_index"] = owners[:, None]
    else:
        batch["pixel_values"] = batch["pixel_values"][owners]
    labels = make_labels(model, args.rows)
    return training_step(model, lambda: model(**batch, labels=labels).loss)


def main() -> None:
    made = parser(__doc__, size="base", repeats=3)
    made.add_argument("--rows", type=int, default=10)
    made.add_argument("--words", type=int, default=32)
    made.add_argument("--image_size", type=int, default=224)
    made.add_argument("--texts_per_image", type=int, nargs="+", default=[1, 2, 5, 10])
    args = made.parse_args()
    prepare(args)
    shapes = {"rows": args.rows, "words": args.words, "image_size": args.image_size}
    counts = args.texts_per_image
    name = "{} per image".format
    ways = {"a copy for each text": make_step(args, 1, shared=False)}
    ways.update({name(count): make_step(args, count, shared=True) for count in counts})
    seconds = in_turns(ways, args.repeats, args.device, warmup=1)
    report("shared images, train step", seconds, "a copy for each text", args, **shapes)
    megabytes = {name(count): [peak_memory(make_step, args, count, True)] for count in counts if count > 1}
    megabytes["a copy for each text"] = [peak_memory(make_step, args, 1, False)]
    report("shared images, memory", megabytes, "a copy for each text", args, unit="MB", **shapes)


if __name__ == "__main__":
    main()
