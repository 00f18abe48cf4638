"""
A training loop of your own with accelerate, on the data set that comes with the package: about a minute on two cores.

    python custom_loop.py --output_dir custom_loop
    torchrun --nproc_per_node 2 custom_loop.py --output_dir custom_loop

`MMTrainer` does all of this. It also starts tasks as linear models of the mean encoder outputs, gives each part of the
model its learning rate, keeps the best weights on validation rows and stops early. It saves checkpoints from which a
killed training goes on, balances tasks, stores the outputs of frozen encoders, checks data and options before the first
step, and writes a model card. So write a loop only for what it cannot do.
"""

import argparse
import json
import time
from contextlib import nullcontext
from itertools import islice
from pathlib import Path

import datasets
import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object, send_to_device, set_seed
from torch.utils.data import DataLoader
from transformers import BertConfig, EvalPrediction, ResNetConfig, get_cosine_schedule_with_warmup, pipeline

from mm_transformers import (
    Classification,
    MMDataCollator,
    MMTransformerConfig,
    MMTransformerForMultiTask,
    MultiTaskMetrics,
)
from mm_transformers.cli.demo_model import make_processor
from mm_transformers.data.embedded import TASK_LABELS, load_demo_dataset


def make_config(vocab_size: int, pad_token_id: int) -> MMTransformerConfig:
    """A BERT of one layer and a small ResNet, with new weights; for pretrained encoders use `from_encoders`."""
    text = BertConfig(
        vocab_size=vocab_size, hidden_size=64, num_hidden_layers=1, num_attention_heads=4, intermediate_size=128,
        max_position_embeddings=64, initializer_range=0.1, pad_token_id=pad_token_id,
    )  # fmt: skip
    return MMTransformerConfig(
        text_config=text,
        vision_config=ResNetConfig(embedding_size=16, hidden_sizes=[16, 32, 64], depths=[1, 1, 1], layer_type="basic"),
        num_fusion_layers=1,
        initializer_range=0.1,
        tasks=[Classification(name, labels=labels) for name, labels in TASK_LABELS.items()],
    )


def divisors(tasks: dict, batches: list[dict], accelerator: Accelerator) -> dict[str, torch.Tensor]:
    """
    The number of labels of each task in all batches of one optimiser step.

    The loss of a task is the mean over its labels. A mean of means of batches would be another number, since batches
    have different numbers of labels. Gradients are averaged over the processes, so each divides by the mean count.
    """
    counts = torch.stack([sum(task.num_labelled(batch["labels"][name]) for batch in batches)
                          for name, task in tasks.items()])  # fmt: skip
    return dict(zip(tasks, accelerator.reduce(counts, reduction="mean"), strict=True))


def train(accelerator: Accelerator, model, loader, optimizer, schedule, args) -> None:
    tasks = accelerator.unwrap_model(model).tasks
    model.train()
    step, epoch = 0, 0
    while step < args.steps:
        loader.set_epoch(epoch)
        batches = iter(loader)
        # All batches of a step are read before the first forward pass, since their labels are counted.
        while step < args.steps and (group := list(islice(batches, args.accumulation))):
            items = divisors(tasks, group, accelerator)
            for i, batch in enumerate(group):
                # Only the last batch of a step sends gradients to the other processes.
                is_last = i == len(group) - 1
                with nullcontext() if is_last else accelerator.no_sync(model):
                    outputs = model(**batch, num_items_in_batch=items)
                    accelerator.backward(outputs.loss)
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            step += 1
            if step % 25 == 0:
                accelerator.print(f"step {step}: loss of the last batch {outputs.loss.item():.3f}")
        epoch += 1


@torch.no_grad()
def evaluate(accelerator: Accelerator, model, collator: MMDataCollator, rows: datasets.Dataset, args) -> dict:
    """Each row counts once: every process answers its share of the rows, and all get the metrics of all."""
    fused = accelerator.unwrap_model(model).eval()
    # Not a prepared loader, which would repeat rows so that all processes have equally many batches.
    mine = rows.select(range(accelerator.process_index, len(rows), accelerator.num_processes))
    answered = []
    for batch in DataLoader(mine, 4 * args.batch_size, collate_fn=collator):
        labels = batch.pop("labels")
        logits = fused(**send_to_device(batch, accelerator.device)).logits
        answered.append([{name: value.float().cpu().numpy() for name, value in part.items()}
                         for part in (logits, labels)])  # fmt: skip
    fused.train()
    parts = gather_object(answered)
    logits, labels = ({name: np.concatenate([part[side][name] for part in parts]) for name in fused.tasks}
                      for side in (0, 1))  # fmt: skip
    labels = {name: value.astype(np.int64) for name, value in labels.items()}
    metrics = MultiTaskMetrics(fused.config, collator.processor)
    return metrics(EvalPrediction(predictions=logits, label_ids=labels))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("custom_loop"), help="where to save (%(default)s)")
    parser.add_argument("--steps", type=int, default=150, help="optimiser steps (%(default)s)")
    parser.add_argument("--batch_size", type=int, default=32, help="rows per batch and process (%(default)s)")
    parser.add_argument("--accumulation", type=int, default=2, help="batches per step and process (%(default)s)")
    parser.add_argument("--learning_rate", type=float, default=4e-3, help="highest learning rate (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of weights and order (%(default)s)")
    args = parser.parse_args()
    if min(args.steps, args.batch_size, args.accumulation) < 1:
        parser.error("--steps, --batch_size and --accumulation must be at least 1.")
    return args


def main() -> None:
    args = parse_arguments()
    datasets.disable_progress_bars()
    accelerator, start = Accelerator(), time.perf_counter()
    set_seed(args.seed)
    data = load_demo_dataset(seed=args.seed)
    processor = make_processor(list(data["train"]["text"]))
    config = make_config(len(processor.tokenizer), processor.tokenizer.pad_token_id)
    model = MMTransformerForMultiTask(config)
    # The collator makes a batch on its own: `pixel_values` has one entry per picture, not per row. So accelerate must
    # not cut batches of one process for the others, which it does with `dispatch_batches` and `split_batches` only.
    collator = MMDataCollator(processor, config)
    loader = DataLoader(data["train"], args.batch_size, shuffle=True, drop_last=True, collate_fn=collator)
    optimizer = torch.optim.AdamW(model.parameters(), args.learning_rate, weight_decay=0.01)
    # Not prepared: a prepared schedule would make a step for each process.
    schedule = get_cosine_schedule_with_warmup(optimizer, min(20, args.steps // 2), args.steps)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    train(accelerator, model, loader, optimizer, schedule, args)
    metrics = evaluate(accelerator, model, collator, data["test"], args)
    if accelerator.is_main_process:
        accelerator.unwrap_model(model).save_pretrained(args.output_dir)
        processor.save_pretrained(args.output_dir)
        (args.output_dir / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
        for name in TASK_LABELS:
            print(f"{name}: {100 * metrics[f'{name}_accuracy']:.1f}% right")
        pipe = pipeline("multimodal", model=str(args.output_dir))
        row = data["test"][0]
        print(f"{row['text']!r}: {pipe({'text': row['text'], 'image': row['image']})}")
        seconds = time.perf_counter() - start
        print(f"{accelerator.num_processes} processes, {seconds:.0f} s. The model is in {args.output_dir}.")
    accelerator.wait_for_everyone()
    accelerator.end_training()


if __name__ == "__main__":
    main()
