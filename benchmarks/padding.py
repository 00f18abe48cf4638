"""
Texts of very different lengths: an epoch with rows in random order beside one with rows grouped by length
(`train_sampling_strategy="group_by_length"`).

    python benchmarks/padding.py
"""

import tempfile
import time

from datasets import Dataset
from harness import make_model, parser, prepare, report
from rows import make_processor, make_rows
from transformers import TrainingArguments

from mm_transformers import MMTrainer


def main() -> None:
    made = parser(__doc__, repeats=3)
    made.add_argument("--rows", type=int, default=256)
    made.add_argument("--batch_size", type=int, default=16)
    made.add_argument("--words", type=int, nargs=2, default=[4, 250], help="in the shortest and the longest text")
    args = made.parse_args()
    prepare(args)
    columns = make_rows(args.rows, tuple(args.words), pictures=False)
    # Most texts are short.
    texts = [" ".join(t.split()[: max(args.words[0], len(t.split()) ** 2 // args.words[1])]) for t in columns["text"]]
    data = Dataset.from_dict({**columns, "text": texts, "length": [len(text.split()) for text in texts]})
    processor = make_processor()
    seconds: dict[str, list[float]] = {"random": [], "group_by_length": []}
    with tempfile.TemporaryDirectory() as folder:
        for repeat in range(args.repeats):
            for strategy, taken in seconds.items():
                trainer = MMTrainer(
                    make_model(args, image_size=64),
                    TrainingArguments(
                        folder, num_train_epochs=1, per_device_train_batch_size=args.batch_size, save_strategy="no",
                        train_sampling_strategy=strategy, seed=repeat, disable_tqdm=True, report_to=[],
                        logging_strategy="no", use_cpu=args.device == "cpu",
                    ),
                    processing_class=processor,
                    train_dataset=data.add_column("image", [None] * args.rows),
                )  # fmt: skip
                start = time.perf_counter()
                trainer.train()
                taken.append(time.perf_counter() - start)
    longest, mean = max(map(len, map(str.split, texts))), sum(data["length"]) / args.rows
    shapes = {"rows": args.rows, "batch_size": args.batch_size, "longest": longest, "mean length": round(mean)}
    report("padding, epoch", seconds, "random", args, **shapes)


if __name__ == "__main__":
    main()
