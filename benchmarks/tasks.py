"""
What one more task costs: a training step, with the optimiser, of a model with 1 to 20 tasks, and of one model per task.

    python benchmarks/tasks.py
"""

from collections.abc import Callable

import torch
from harness import in_turns, make_batch, make_labels, make_model, parser, prepare, report


def adamw(module: torch.nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(module.parameters(), lr=1e-5, fused=True)


def advance(loss: torch.Tensor, optimizers: list[torch.optim.Optimizer]) -> None:
    loss.backward()
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def main() -> None:
    made = parser(__doc__, size="base", repeats=5)
    made.add_argument("--rows", type=int, default=8)
    made.add_argument("--words", type=int, default=32)
    made.add_argument("--image_size", type=int, default=112)
    made.add_argument("--tasks", type=int, nargs="+", default=[1, 2, 5, 9, 10, 20])
    args = made.parse_args()
    prepare(args)
    batch = make_batch(args, args.rows, args.words, args.image_size)
    # All models have the same shared layers, so that they differ in nothing but the task layers.
    shared = make_model(args, args.image_size).model
    optimizer = adamw(shared)

    def step(num_tasks: int) -> Callable[[], None]:
        model = make_model(args, args.image_size, num_tasks)
        model.model = shared
        labels = make_labels(model, args.rows)
        optimizers = [optimizer, adamw(model.heads)]
        return lambda: advance(model(**batch, labels=labels).loss, optimizers)

    def task_layer() -> Callable[[], None]:
        model = make_model(args, args.image_size)
        model.model = shared
        labels = make_labels(model, args.rows)
        optimizers = [adamw(model.heads)]
        with torch.no_grad():
            outputs = shared(**batch)
        outputs.pooler_output.requires_grad_()
        return lambda: advance(model(encoder_outputs=outputs, labels=labels).loss, optimizers)

    ways = {f"{count} task{'s' * (count > 1)}": step(count) for count in args.tasks}
    one = ways[next(iter(ways))]
    ways["5 models with one task each"] = lambda: [one() for _ in range(5)]
    ways["the layer of one task, by itself"] = task_layer()
    shapes = {"rows": args.rows, "words": args.words, "image_size": args.image_size}
    seconds = in_turns(ways, args.repeats, args.device, warmup=1)
    report("tasks, train step with AdamW", seconds, "9 tasks" if 9 in args.tasks else "1 task", args, **shapes)


if __name__ == "__main__":
    main()
