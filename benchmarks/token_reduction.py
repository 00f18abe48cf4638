"""
What fewer tokens per image cost in accuracy: the demo's data, and a model that sees each picture as 64 patches, with
all of them, merged, and resampled. Every answer that needs the picture suffers if what decides is lost.

    python benchmarks/token_reduction.py
"""

import tempfile
import time

import torch
from harness import parser, prepare, report
from transformers import BertConfig, TrainingArguments, ViTConfig

from mm_transformers import Classification, MMTrainer, MMTransformerConfig, MMTransformerForMultiTask
from mm_transformers.cli.demo_model import make_processor
from mm_transformers.data.embedded import TASK_LABELS, load_demo_dataset


WAYS = {
    "all 65 tokens": None,
    "merged to 16": {"kind": "merge", "num_tokens": 16},
    "merged to 4": {"kind": "merge", "num_tokens": 4},
    "resampled to 16": {"kind": "resampler", "num_tokens": 16},
    "resampled to 4": {"kind": "resampler", "num_tokens": 4},
}


def main() -> None:
    made = parser(__doc__, size=None)
    made.add_argument("--seeds", type=int, default=1)
    made.add_argument("--steps", type=int, default=600)
    args = made.parse_args()
    prepare(args)
    data = load_demo_dataset()
    processor = make_processor(data["train"]["text"])
    size = dict(hidden_size=64, num_attention_heads=4, intermediate_size=128, initializer_range=0.1)
    tokenizer = processor.tokenizer
    text = BertConfig(**size, num_hidden_layers=1, vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id)
    tasks = [Classification(name, labels=labels) for name, labels in TASK_LABELS.items()]
    accuracies: dict[str, list[float]] = {way: [] for way in WAYS}
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(args.seeds):
            for way, reduction in WAYS.items():
                torch.manual_seed(seed)
                config = MMTransformerConfig(
                    text_config=text, vision_config=ViTConfig(**size, num_hidden_layers=2, image_size=64, patch_size=8),
                    num_fusion_layers=1, initializer_range=0.1, tasks=tasks, vision_token_reduction=reduction,
                )  # fmt: skip
                trainer = MMTrainer(
                    MMTransformerForMultiTask(config),
                    TrainingArguments(
                        folder, max_steps=args.steps, per_device_train_batch_size=64, learning_rate=2e-3, seed=seed,
                        lr_scheduler_type="cosine", warmup_steps=50, save_strategy="no", report_to=[],
                        logging_strategy="no", disable_tqdm=True, use_cpu=args.device == "cpu",
                        per_device_eval_batch_size=128,
                    ),
                    processing_class=processor,
                    train_dataset=data["train"],
                    eval_dataset=data["test"],
                )  # fmt: skip
                start = time.perf_counter()
                trainer.train()
                seconds[way].append(time.perf_counter() - start)
                metrics = trainer.evaluate()
                scores = [metrics[f"eval_{task.name}_accuracy"] for task in tasks]
                accuracies[way].append(sum(scores) / len(scores))
    shapes = {"steps": args.steps, "seeds": args.seeds}
    report("token reduction, accuracy", accuracies, "all 65 tokens", args, unit="mean accuracy", **shapes)
    report("token reduction, training", seconds, "all 65 tokens", args, **shapes)


if __name__ == "__main__":
    main()
