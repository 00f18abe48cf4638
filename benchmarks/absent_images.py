"""
Rows without an image: does the cost fall with the images that are there?

    python benchmarks/absent_images.py
"""

import torch
from harness import in_turns, make_batch, make_labels, make_model, parser, prepare, report, training_step


def main() -> None:
    made = parser(__doc__)
    made.add_argument("--rows", type=int, default=16)
    made.add_argument("--words", type=int, default=32)
    made.add_argument("--image_size", type=int, default=224)
    args = made.parse_args()
    prepare(args)
    model = make_model(args, args.image_size)
    labels = make_labels(model, args.rows)

    def loss(images: int):
        batch = make_batch(args, args.rows, args.words, args.image_size, images)
        index = torch.arange(args.rows, device=args.device)
        batch["image_index"] = torch.where(index < images, index, -1)[:, None]
        return lambda: model(**batch, labels=labels).loss

    shares = {f"{share:.0%} of the rows": share for share in (1.0, 0.75, 0.5, 0.25)}
    ways = {name: training_step(model, loss(int(share * args.rows))) for name, share in shares.items()}
    # As a model without images would be trained; in this one a blank image runs, so that DDP finds all parameters.
    text = make_model(args, args.image_size)
    text.model.vision_model = text.model.fusion = None
    text.config.vision_config = None
    ids = make_batch(args, args.rows, args.words, args.image_size)
    del ids["pixel_values"]
    ways["no images at all"] = training_step(model, lambda: model(**ids, labels=labels).loss)
    ways["a model of texts alone"] = training_step(text, lambda: text(**ids, labels=labels).loss)
    shapes = {"rows": args.rows, "words": args.words, "image_size": args.image_size}
    report("absent images, train step", in_turns(ways, args.repeats, args.device), "100% of the rows", args, **shapes)


if __name__ == "__main__":
    main()
