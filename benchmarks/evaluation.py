"""
How far memory rises while [`MMTrainer`] evaluates, against the number of rows.

    python benchmarks/evaluation.py
"""

import tempfile

from datasets import Dataset
from harness import make_model, parser, peak_memory, prepare, report
from rows import make_processor, make_rows
from transformers import TrainingArguments

from mm_transformers import MMTrainer


def evaluation(args, rows: int):
    columns = make_rows(256, pictures=False)
    data = Dataset.from_dict({**columns, "image": [None] * 256}).select([i % 256 for i in range(rows)])
    folder = tempfile.mkdtemp()
    trainer = MMTrainer(
        make_model(args, image_size=64),
        TrainingArguments(
            folder, per_device_eval_batch_size=32, disable_tqdm=True, report_to=[], use_cpu=args.device == "cpu"
        ),
        processing_class=make_processor(),
        eval_dataset=data,
    )
    return trainer.evaluate


def main() -> None:
    made = parser(__doc__, size="tiny")
    made.add_argument("--rows", type=int, nargs="+", default=[256, 1024, 4096])
    args = made.parse_args()
    prepare(args)
    rises = {f"{rows} rows": [peak_memory(evaluation, args, rows)] for rows in args.rows}
    report("evaluation, memory", rises, f"{args.rows[0]} rows", args, unit="MB")


if __name__ == "__main__":
    main()
