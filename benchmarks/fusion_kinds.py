"""
Time and memory of each kind of fusion against the length of the text, the tokens of an image, and the number of images
per row: a training step, with what frozen encoders give as input, so that the fusion is nearly all that is measured.
Also what fewer tokens per image (`vision_token_reduction`) save.

    python benchmarks/fusion_kinds.py
"""

import torch
from harness import ENCODERS, in_turns, make_labels, make_model, parser, peak_memory, prepare, report, training_step

from mm_transformers.model.fusion_base import FUSION_KINDS


# Written behind the kind of fusion that they are used with.
REDUCTIONS = {
    "merged to 49": {"kind": "merge", "num_tokens": 49},
    "resampled to 32": {"kind": "resampler", "num_tokens": 32},
}
REDUCED = ["cross_attention, merged to 49", "co_attention, merged to 49", "merged, resampled to 32"]


def make_step(args, way: str, words: int, tokens: int, images: int):
    """Forward and backward of the fusion `way` on `args.rows` rows with `images` images each."""
    width = ENCODERS[args.size]["hidden_size"]
    kind, _, reduction = way.partition(", ")
    frozen = ["text", "vision"]
    model = make_model(args, freeze=frozen, fusion_type=kind, vision_token_reduction=REDUCTIONS.get(reduction))
    dtype = getattr(torch, args.dtype)
    index = torch.arange(args.rows * images, device=args.device).view(args.rows, images)
    batch = {
        "text_features": torch.randn(args.rows, words, width, device=args.device, dtype=dtype),
        "image_features": torch.randn(args.rows * images, tokens, width, device=args.device, dtype=dtype),
        "image_index": index,
    }
    labels = make_labels(model, args.rows)
    return training_step(model, lambda: model(**batch, labels=labels).loss)


def main() -> None:
    made = parser(__doc__, repeats=5)
    made.add_argument("--rows", type=int, default=8)
    made.add_argument("--words", type=int, nargs="+", default=[32, 128, 512])
    made.add_argument("--tokens", type=int, nargs="+", default=[197, 577])
    made.add_argument("--images", type=int, nargs="+", default=[1, 4, 8])
    args = made.parse_args()
    prepare(args)
    first = (args.words[0], args.tokens[0], args.images[0])
    cases = [first]
    cases += [(words, *first[1:]) for words in args.words[1:]]
    cases += [(first[0], tokens, first[2]) for tokens in args.tokens[1:]]
    cases += [(*first[:2], images) for images in args.images[1:]]
    kinds = [
        kind for kind in ("cross_attention", "co_attention", "bottleneck", "merged", "late") if kind in FUSION_KINDS
    ]
    for words, tokens, images in cases:
        ways = {way: make_step(args, way, words, tokens, images) for way in [*kinds, *REDUCED]}
        shapes = {"rows": args.rows, "words": words, "tokens per image": tokens, "images per row": images}
        seconds = in_turns(ways, args.repeats, args.device)
        report("fusion kinds, train step", seconds, "cross_attention", args, **shapes)
    for words, tokens, images in dict.fromkeys((cases[0], cases[-1])):
        shapes = {"rows": args.rows, "words": words, "tokens per image": tokens, "images per row": images}
        rises = {way: [peak_memory(make_step, args, way, words, tokens, images)] for way in [*kinds, *REDUCED]}
        report("fusion kinds, memory", rises, "cross_attention", args, unit="MB", **shapes)


if __name__ == "__main__":
    main()
