"""
From rows to batches: what each step costs, how far workers help, what pictures of the right size save, and for which
part of its time a training step waits.

    python benchmarks/inputs.py
"""

import io
import statistics
import time

import torch
from datasets import Dataset
from harness import in_turns, make_labels, make_model, parser, prepare, report
from PIL import Image
from rows import jpeg, make_processor, make_rows
from torch.utils.data import DataLoader

from mm_transformers import MMDataCollator
from mm_transformers.model.images import load_image


def main() -> None:
    made = parser(__doc__, repeats=5)
    made.add_argument("--rows", type=int, default=64)
    made.add_argument("--batch_size", type=int, default=16)
    made.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2])
    args = made.parse_args()
    prepare(args)
    processor = make_processor()
    columns = make_rows(args.rows)
    data = Dataset.from_dict(columns)
    model = make_model(args)
    collator = MMDataCollator(processor, model.config)
    files = [cell["bytes"] for cell in columns["image"]]
    pictures = [load_image(file) for file in files]
    small = [{"bytes": jpeg(picture.resize((256, 192))), "path": None} for picture in pictures]
    resized = Dataset.from_dict({**columns, "image": small})
    texts = Dataset.from_dict({**columns, "image": [None] * args.rows})

    def decode_at_half() -> None:
        for file in files:
            picture = Image.open(io.BytesIO(file))
            picture.draft("RGB", (320, 240))  # decoders of JPEG can leave out what would be thrown away
            picture.load()

    def collate(rows: Dataset) -> None:
        for start in range(0, args.rows, args.batch_size):
            collator([rows[i] for i in range(start, min(start + args.batch_size, args.rows))])

    shapes = {"rows": args.rows, "pictures": "JPEG, 640 x 480"}
    ways = {
        "rows to batches": lambda: collate(data),
        "of these, texts and labels": lambda: collate(texts),
        "of these, decoding": lambda: [load_image(file) for file in files],
        "of these, resizing and scaling": lambda: processor.image_processor(images=pictures, return_tensors="pt"),
        "decoding at half the size": decode_at_half,
        "rows to batches, files of 256 x 192": lambda: collate(resized),
    }
    report("inputs, in one process", in_turns(ways, args.repeats, "cpu"), "rows to batches", args, **shapes)

    def loader(rows: Dataset, workers: int, repeat: int = 1) -> DataLoader:
        rows = rows.select(list(range(len(rows))) * repeat)
        return DataLoader(rows, args.batch_size, collate_fn=collator, num_workers=workers)

    def rate(workers: int) -> float:
        """Seconds per batch, once the workers are there."""
        batches = iter(loader(data, workers, repeat=4))
        next(batches)
        start = time.perf_counter()
        count = sum(1 for _ in batches)
        return (time.perf_counter() - start) / count

    values = {f"{workers} workers": [rate(workers) for _ in range(args.repeats)] for workers in args.workers}
    report("inputs, seconds per batch", values, f"{args.workers[0]} workers", args, batch_size=args.batch_size)

    def waiting(rows: Dataset, workers: int) -> list[float]:
        """Share of the time of each training step in which it waits for its batch."""
        labels = make_labels(model, args.batch_size)
        shares, before = [], time.perf_counter()
        for batch in loader(rows, workers, repeat=3):
            ready = time.perf_counter()
            batch = {name: value.to(args.device) for name, value in batch.items() if name != "labels"}
            model(**batch, labels=labels).loss.backward()
            if args.device == "cuda":
                torch.cuda.synchronize()
            after = time.perf_counter()
            shares.append((ready - before) / (after - before))
            before = after
        return [statistics.median(shares[1:])]  # the first waits for the workers to start

    most = max(args.workers)
    values = {
        "no worker": waiting(data, 0),
        f"{most} workers": waiting(data, most),
        "no worker, files of 256 x 192": waiting(resized, 0),
        f"{most} workers, files of 256 x 192": waiting(resized, most),
    }
    report("inputs, share of a step spent waiting", values, "no worker", args, unit="share", batch_size=args.batch_size)


if __name__ == "__main__":
    main()
