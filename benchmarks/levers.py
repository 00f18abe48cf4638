"""
What else makes a training step and a forward pass faster, each beside the defaults (float32 weights, SDPA, no
compilation) in one process: torch.compile, bfloat16 by autocast, the fused optimiser, channels-last, flash attention.

    python benchmarks/levers.py

On a GPU the defaults of the comparison are bfloat16 autocast.
"""

import copy

import torch
from harness import in_turns, make_batch, make_labels, make_model, parser, prepare, report
from transformers import ConvNextConfig


def main() -> None:
    made = parser(__doc__, repeats=5)
    made.add_argument("--rows", type=int, default=8)
    made.add_argument("--words", type=int, default=32)
    made.add_argument("--image_size", type=int, default=224)
    args = made.parse_args()
    prepare(args)
    shapes = {"rows": args.rows, "words": args.words, "image_size": args.image_size}
    on_gpu = args.device == "cuda"
    batch = make_batch(args, args.rows, args.words, args.image_size)
    model = make_model(args, args.image_size)
    labels = make_labels(model, args.rows)

    def forward(model, autocast: bool, batch=batch):
        def run():
            with torch.no_grad(), torch.autocast(args.device, torch.bfloat16, enabled=autocast):
                model(**batch)

        return run

    def step(model, autocast: bool, fused: bool = True, batch=batch):
        model.train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=fused, foreach=None if fused else False)

        def run():
            with torch.autocast(args.device, torch.bfloat16, enabled=autocast):
                loss = model(**batch, labels=labels).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        return run

    def compiled(**options):
        return torch.compile(copy.deepcopy(model), **options)

    half = "bfloat16 autocast"
    with torch.no_grad():
        model.eval()
        ways = {
            "defaults": forward(model, on_gpu),
            "eager attention": forward(_with_attention(model, "eager"), on_gpu),
            "compiled": forward(compiled(), on_gpu),
        }
        if on_gpu:
            ways["compiled, reduce-overhead"] = forward(compiled(mode="reduce-overhead"), on_gpu)
            ways["float32"] = forward(model, False)
        else:
            ways[half] = forward(model, True)
        report("levers, forward", in_turns(ways, args.repeats, args.device, warmup=4), "defaults", args, **shapes)
    ways = {
        "defaults": step(copy.deepcopy(model), on_gpu),
        "AdamW one by one": step(copy.deepcopy(model), on_gpu, fused=False),
        "compiled": step(compiled(), on_gpu),
        ("float32" if on_gpu else half): step(copy.deepcopy(model), not on_gpu),
    }
    report("levers, train step", in_turns(ways, args.repeats, args.device, warmup=4), "defaults", args, **shapes)

    depths = {"tiny": [1, 1, 2, 1], "small": [2, 2, 4, 2]}.get(args.size, [3, 3, 9, 3])
    conv = make_model(args, vision=ConvNextConfig(depths=depths, hidden_sizes=[64, 128, 256, 512]))
    last = copy.deepcopy(conv)
    last.model.vision_model.to(memory_format=torch.channels_last)
    images_last = {**batch, "pixel_values": batch["pixel_values"].to(memory_format=torch.channels_last)}
    ways = {"defaults": step(conv, on_gpu), "channels-last": step(last, on_gpu, batch=images_last)}
    report("levers, ConvNeXt", in_turns(ways, args.repeats, args.device), "defaults", args, **shapes)


def _with_attention(model, implementation: str):
    other = copy.deepcopy(model)
    other.set_attn_implementation(implementation)
    return other


if __name__ == "__main__":
    main()
