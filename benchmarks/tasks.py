"""
What one more task costs: a training step, with the optimiser, of a model with 1 to 20 tasks, and of one model per task.

    python benchmarks/tasks.py
"""

import torch
from harness import in_turns, make_batch, make_labels, make_model, parser, prepare, report


def main() -> None:
    made = parser(__doc__, size="base", repeats=5)
    made.add_argument("--rows", type=int, default=8)
    made.add_argument("--words", type=int, default=32)
    made.add_argument("--image_size", type=int, default=112)
    made.add_argument("--tasks", type=int, nargs="+", default=[1, 2, 5, 9, 10, 20])
    args = made.parse_args()
    prepare(args)
    batch = make_batch(args, args.rows, args.words, args.image_size)

    def step(num_tasks: int):
        model = make_model(args, args.image_size, num_tasks)
        labels = make_labels(model, args.rows)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)

        def run() -> None:
            model(**batch, labels=labels).loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        return run

    ways = {f"{count} task{'s' * (count > 1)}": step(count) for count in args.tasks}
    one = ways[next(iter(ways))]
    ways["5 models with one task each"] = lambda: [one() for _ in range(5)]
    shapes = {"rows": args.rows, "words": args.words, "image_size": args.image_size}
    seconds = in_turns(ways, args.repeats, args.device, warmup=1)
    report("tasks, train step with AdamW", seconds, "9 tasks" if 9 in args.tasks else "1 task", args, **shapes)


if __name__ == "__main__":
    main()
