"""
Makes a trained model smaller: fewer layers of its encoders, smaller pictures, and its old answers to learn from.

    python distill.py --teacher my-model --data stamps_data --text_layers 2 --image_size 128

The student is a copy of the teacher with some of its layers left out, as in DistilBERT (https://arxiv.org/abs/1910.01108).
It learns from the labels, from the logits of the teacher (mean squared differences, https://arxiv.org/abs/2105.08919),
and from its fused vectors (https://arxiv.org/abs/1412.6550). The teacher reads each training row once. Printed are the
scores, the parameters and the milliseconds per row of the teacher, of a student that saw labels only, and of the
distilled one.

The data are train.parquet and test.parquet with the columns that the teacher was trained on. Tasks that write texts are
not distilled. The student has no calibration: run `mm-transformers calibrate` again.
"""

import argparse
import json
import random
import re
import time
from pathlib import Path
from typing import NamedTuple

import datasets
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import nn
from torch.nn.functional import mse_loss
from transformers import get_cosine_schedule_with_warmup, set_seed

from mm_transformers import (
    MMDataCollator,
    MMTrainer,
    MMTrainingArguments,
    MMTransformerConfig,
    MMTransformerForMultiTask,
    MMTransformerProcessor,
)
from mm_transformers.model.image_size import set_size


ENCODERS = ("text", "vision", "audio")


class Answers(NamedTuple):
    """What the teacher says about a batch: task -> logits, and the fused vectors, (rows, width)."""

    logits: dict[str, torch.Tensor]
    vectors: torch.Tensor

    def parts(self) -> dict[str, torch.Tensor]:
        return {**{f"logits of {name}": found for name, found in self.logits.items()}, "fused vectors": self.vectors}


def smaller(
    teacher: MMTransformerForMultiTask, layers: dict[str, int | None], has_small_pictures: bool = False
) -> MMTransformerForMultiTask:
    """
    A copy of the teacher with so many layers of each encoder, evenly taken from those of the teacher.

    Encoders that change are trained, also if they were frozen in the teacher.
    """
    config = MMTransformerConfig.from_dict(teacher.config.to_dict())
    changed = [name for name, count in layers.items() if count is not None]
    if has_small_pictures:
        changed.append("vision")
    config.freeze = [part for part in config.freeze or [] if not any(part.startswith(name) for name in changed)]
    # Sets, intervals and odd rows were fitted for the teacher: calibrate the student again.
    config.calibration = None
    weights = {name: values for name, values in teacher.state_dict().items() if not name.startswith("oddness.")}
    for name, count in layers.items():
        if count is None:
            continue
        of_encoder = getattr(config, f"{name}_config")
        total = getattr(of_encoder, "num_hidden_layers", None)
        if total is None or not 1 <= count <= total:
            raise SystemExit(f"--{name}_layers must be from 1 to the layers of the encoder ({total}), but is {count}.")
        of_encoder.num_hidden_layers = count
        taken = [round((i + 1) * total / count) - 1 for i in range(count)]
        weights = {new: weights[old] for old in weights for new in renamed(old, f"model.{name}_model.", taken, total)}
    student = MMTransformerForMultiTask(config)
    missing, unknown = student.load_state_dict(weights, strict=False)
    if missing or unknown:
        raise SystemExit(f"The layers of this encoder cannot be left out: {(missing + unknown)[0]} has no counterpart.")
    return student


def renamed(name: str, encoder: str, taken: list[int], total: int) -> list[str]:
    """The names of a weight of the teacher in the student: none if its layer is left out."""
    layer = re.match(rf"({re.escape(encoder)}(?:\w+\.)*?layers?\.)(\d+)(\..*)", name)
    if layer is None or int(layer[2]) >= total:
        return [name]
    return [f"{layer[1]}{i}{layer[3]}" for i, old in enumerate(taken) if old == int(layer[2])]


def collator_of(processor: MMTransformerProcessor, model: MMTransformerForMultiTask) -> MMDataCollator:
    """Reads the columns of the table that the teacher was trained on."""
    return MMDataCollator(processor, model.config, **processor.column_arguments)


def answers_of(model: MMTransformerForMultiTask, batch: dict, names: list[str]) -> Answers:
    encoded = model.model(**batch)
    logits = model(encoder_outputs=encoded).logits
    return Answers({name: logits[name] for name in names}, encoded.pooler_output)


def variances(taught: list[Answers]) -> dict[str, torch.Tensor]:
    """The variance of each part of the teacher's answers, over all rows."""
    found = {name: torch.cat([answers.parts()[name].flatten() for answers in taught]) for name in taught[0].parts()}
    return {name: values[values.isfinite()].float().var().clamp(min=1e-6) for name, values in found.items()}


def difference(student: Answers, teacher: Answers, scales: dict[str, torch.Tensor]) -> torch.Tensor:
    """The mean squared differences of all logits and of the fused vectors, each over its variance."""
    total = torch.zeros(())
    theirs = teacher.parts()
    for name, ours in student.parts().items():
        known = theirs[name].isfinite()
        total = total + mse_loss(ours[known].float(), theirs[name][known].float()) / scales[name]
    return total


@torch.no_grad()
def teach(teacher: MMTransformerForMultiTask, collator: MMDataCollator, batches: list, names: list[str]) -> list:
    teacher.eval()
    found = []
    for rows in track(batches, "the teacher reads"):
        batch = collator(rows)
        batch.pop("labels")
        found.append(answers_of(teacher, batch, names))
    return found


def train(
    student: MMTransformerForMultiTask,
    collator: MMDataCollator,
    batches: list,
    taught: list[Answers] | None,
    args: argparse.Namespace,
) -> None:
    """Trains in place; without answers of a teacher from the labels alone."""
    set_seed(args.seed)
    scales = {} if taught is None else variances(taught)
    parameters = [p for p in student.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=args.learning_rate, weight_decay=0.01)
    steps = args.epochs * len(batches)
    schedule = get_cosine_schedule_with_warmup(optimizer, steps // 20, steps)
    order = [i for _ in range(args.epochs) for i in random.sample(range(len(batches)), len(batches))]
    student.train()
    for i in track(order, "labels alone" if taught is None else "distilling"):
        batch = collator(batches[i])
        labels = batch.pop("labels")
        encoded = student.model(**batch)
        outputs = student(encoder_outputs=encoded, labels=labels)
        loss = outputs.loss
        if taught is not None:
            # With labels, a head that compares rows has further columns, for mismatched pairs.
            own = {name: outputs.logits[name][..., : found.shape[-1]] for name, found in taught[i].logits.items()}
            ours = Answers(own, encoded.pooler_output)
            loss = loss + args.weight * difference(ours, taught[i], scales)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
    student.eval()


def measured(
    model: MMTransformerForMultiTask, processor: MMTransformerProcessor, test: datasets.Dataset, args
) -> dict[str, float]:
    """The scores of the tasks, millions of parameters, and milliseconds per row on one batch after another."""
    arguments = MMTrainingArguments(str(args.output_dir / "evaluation"), report_to=[], disable_tqdm=True)
    collator = collator_of(processor, model)
    trainer = MMTrainer(model.eval(), arguments, data_collator=collator, processing_class=processor)
    metrics = trainer.evaluate(test)
    batches = [collator([test[j] for j in range(i, min(i + 16, len(test)))]) for i in range(0, min(len(test), 64), 16)]
    seconds = []
    with torch.no_grad():
        for _ in range(3):
            start = time.perf_counter()
            for batch in batches:
                model(**{name: value for name, value in batch.items() if name != "labels"})
            seconds.append(time.perf_counter() - start)
    scores = {
        f"{name} {metric}": metrics[f"eval_{name}_{metric}"]
        for name, task in model.tasks.items()
        for metric in task.metric_names
        if f"eval_{name}_{metric}" in metrics
    }
    rows = min(len(test), 64)
    parameters = sum(p.numel() for p in model.parameters()) / 1e6
    return {**scores, "million parameters": parameters, "ms per row": 1000 * min(seconds) / rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", type=Path, required=True, help="folder of a trained model")
    parser.add_argument("--data", type=Path, required=True, help="folder of train.parquet and test.parquet")
    for name in ENCODERS:
        parser.add_argument(f"--{name}_layers", type=int, help=f"layers of the {name} encoder (all by default)")
    parser.add_argument("--image_size", type=int, help="pixels of the pictures of the student (as the teacher's)")
    parser.add_argument("--weight", type=float, default=1.0, help="of the teacher beside the labels (%(default)s)")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--learning_rate", type=float, default=5e-5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output_dir", type=Path, default=Path("distilled"), help="where to write (%(default)s)")
    args = parser.parse_args()
    set_seed(args.seed)
    teacher = MMTransformerForMultiTask.from_pretrained(args.teacher)
    names = [name for name, task in teacher.tasks.items() if not task.needs_decoder]
    if not names:
        raise SystemExit("All tasks of the teacher write texts; there are no logits of heads to learn from.")
    big = MMTransformerProcessor.from_pretrained(args.teacher)
    small = MMTransformerProcessor.from_pretrained(args.teacher)
    if args.image_size is not None:
        set_size(small.image_processor, args.image_size)
    data = {split: datasets.Dataset.from_parquet(str(args.data / f"{split}.parquet")) for split in ("train", "test")}
    places = random.sample(range(len(data["train"])), len(data["train"]))
    batches = [
        [data["train"][j] for j in places[i : i + args.batch_size]] for i in range(0, len(places), args.batch_size)
    ]
    taught = teach(teacher, collator_of(big, teacher), batches, names)
    layers = {name: getattr(args, f"{name}_layers") for name in ENCODERS}
    results, students = {"teacher": measured(teacher, big, data["test"], args)}, {}
    for way in ("labels alone", "distilled"):
        students[way] = smaller(teacher, layers, args.image_size is not None)
        train(
            students[way],
            collator_of(small, students[way]),
            batches,
            taught if way == "distilled" else None,
            args,
        )
        results[way] = measured(students[way], small, data["test"], args)
    students["distilled"].save_pretrained(args.output_dir)
    small.save_pretrained(args.output_dir)
    settings = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}
    (args.output_dir / "results.json").write_text(
        json.dumps({"settings": settings, "scores": results}, indent=1) + "\n"
    )
    table = Table(title=f"On {len(data['test'])} test rows")
    table.add_column("")
    for way in results:
        table.add_column(way, justify="right")
    for name in results["teacher"]:
        table.add_row(name, *(f"{found[name]:.3g}" for found in results.values()))
    Console(width=120).print(table)
    print(f"The distilled model is in {args.output_dir}.")


if __name__ == "__main__":
    main()
