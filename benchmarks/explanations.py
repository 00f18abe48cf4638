"""
What an explanation costs, beside a forward and a backward pass of the same row; and what an ablation costs, beside
evaluating each variant of the rows from the beginning.

    python benchmarks/explanations.py
"""

import tempfile

import datasets
import torch
from harness import in_turns, make_model, parser, prepare, report, training_step
from rows import jpeg, make_picture, make_processor, make_rows
from transformers import TrainingArguments

from mm_transformers import MMTrainer
from mm_transformers.analysis import ablate, explain
from mm_transformers.analysis.explaining.methods import ATTENTION_METHODS


def main() -> None:
    made = parser(__doc__, size="base", repeats=5)
    made.add_argument("--words", type=int, default=30)
    made.add_argument("--rows", type=int, default=64, help="of the ablation")
    made.add_argument("--permutations", type=int, default=5)
    args = made.parse_args()
    prepare(args)
    model, processor = make_model(args).eval(), make_processor()
    for name, parameter in model.named_parameters():
        if name.endswith("gate_alpha"):
            parameter.data.fill_(0.5)
    row = {"text": " ".join(f"word{i}" for i in range(args.words)), "image": jpeg(make_picture(0))}

    def loss() -> torch.Tensor:
        inputs = processor(text=[row["text"]], images=[row["image"]]).to(args.device)
        return model(**inputs).logits["task0"].max()

    ways = {"forward and backward": training_step(model, loss)}
    ways.update({m: lambda m=m: explain(model, processor, row, "task0", m) for m in ATTENTION_METHODS})
    report("explanations", in_turns(ways, args.repeats, args.device), "forward and backward", args, words=args.words)

    columns = make_rows(args.rows)
    rows = datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image())
    options = dict(per_device_eval_batch_size=64, report_to=[], disable_tqdm=True, use_cpu=args.device == "cpu")
    with tempfile.TemporaryDirectory() as folder:
        trainer = MMTrainer(model, TrainingArguments(folder, **options), processing_class=processor, eval_dataset=rows)
    # All, each alone, nothing, and each exchanged so many times: as many evaluations of the rows as they are.
    variants = 4 + 2 * args.permutations

    def from_the_beginning() -> None:
        for _ in range(variants):
            trainer.evaluate()

    ways = {
        "each variant from the beginning": from_the_beginning,
        "ablate": lambda: ablate(model, processor, rows, num_permutations=args.permutations, num_additive_rows=0),
    }
    shapes = {"rows": args.rows, "variants": variants}
    report("ablation", in_turns(ways, 1, args.device), "each variant from the beginning", args, **shapes)


if __name__ == "__main__":
    main()
