"""
How long is an epoch of training, with encoders that are trained, frozen, and frozen with their features on disk?

A vision encoder of the size of ViT-B/16 and a text encoder of that of BERT-base, of random weights, on pictures of 224
pixels and keywords of the emoji data set, which `examples/emoji/build_dataset.py` makes. The ways follow each other in
one process; a later epoch of full fine-tuning is 1.

    python benchmarks/feature_cache.py --data_dir emoji_data --rows 512
"""

import argparse
import json
import platform
import statistics
import tempfile
import time
from pathlib import Path

import datasets
import torch
import transformers
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    BertConfig,
    PreTrainedTokenizerFast,
    TrainerCallback,
    TrainingArguments,
    ViTConfig,
    ViTImageProcessorPil,
)

from mm_transformers import (
    Classification,
    FeatureCache,
    MMTrainer,
    MMTransformerConfig,
    MMTransformerForMultiTask,
    MMTransformerProcessor,
)


# What is frozen, and whether what it gives is stored.
WAYS = {
    "full fine-tuning": ([], False),
    "both frozen, no cache": (["text", "vision"], False),
    "vision cached, text trained": (["vision"], True),
    "both cached": (["text", "vision"], True),
}


def make_processor(texts: list[str], image_size: int) -> MMTransformerProcessor:
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    backend = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer()
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.train_from_iterator(
        texts, trainers.WordPieceTrainer(vocab_size=2000, special_tokens=special, show_progress=False)
    )
    ids = [(token, backend.token_to_id(token)) for token in ("[CLS]", "[SEP]")]
    backend.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ids)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]",
        model_max_length=64, model_input_names=["input_ids", "attention_mask"],
    )  # fmt: skip
    return MMTransformerProcessor(ViTImageProcessorPil(size={"height": image_size, "width": image_size}), tokenizer)


def make_model(args, freeze: list[str], labels: list[str]) -> MMTransformerForMultiTask:
    sizes = dict(
        hidden_size=args.width, num_hidden_layers=args.layers, num_attention_heads=args.width // 64,
        intermediate_size=4 * args.width,
    )  # fmt: skip
    torch.manual_seed(0)
    return MMTransformerForMultiTask(
        MMTransformerConfig(
            text_config=BertConfig(**sizes),
            vision_config=ViTConfig(**sizes, image_size=args.image_size),
            tasks=[Classification("group", labels=labels)],
            freeze=freeze,
        )
    )


class Stopwatch(TrainerCallback):
    times: list[float]

    def on_epoch_end(self, args, state, control, **kwargs):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.times.append(time.perf_counter())

    @property
    def epochs(self) -> list[float]:
        return [after - before for before, after in zip(self.times, self.times[1:], strict=False)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=512)
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--workers", type=int, default=0, help="of the data loader")
    parser.add_argument("--width", type=int, default=768, help="of both encoders")
    parser.add_argument("--layers", type=int, default=12, help="of both encoders")
    parser.add_argument("--image_size", type=int, default=224)
    parser.add_argument("--cache_dtype", default=None, help="for example bfloat16")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    transformers.logging.set_verbosity_error()

    data = datasets.load_dataset(str(args.data_dir))["train"].shuffle(seed=0)
    data = data.select(range(min(args.rows, len(data))))
    labels = sorted(set(data["group"]))
    processor = make_processor(data["text"], args.image_size)
    pictures = {cell["bytes"] for cell in data.cast_column("image", datasets.Image(decode=False))["image"]}
    times: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for number, (way, (freeze, cached)) in enumerate(WAYS.items()):
            watch = Stopwatch()
            trainer = MMTrainer(
                make_model(args, freeze, labels),
                TrainingArguments(
                    folder, num_train_epochs=args.epochs, per_device_train_batch_size=args.batch_size,
                    per_device_eval_batch_size=args.batch_size, dataloader_num_workers=args.workers,
                    dataloader_pin_memory=args.device == "cuda", use_cpu=args.device == "cpu", save_strategy="no",
                    logging_strategy="no", report_to=[], disable_tqdm=True, learning_rate=1e-4,
                ),
                processing_class=processor,
                train_dataset=data,
                callbacks=[watch],
                # A cache of its own each time, so that each first epoch holds all the building.
                feature_cache=FeatureCache(f"{folder}/{number}", dtype=args.cache_dtype) if cached else None,
            )  # fmt: skip
            watch.times = [time.perf_counter()]
            trainer.train()
            times[way] = watch.epochs
        stored = sum(path.stat().st_size for path in Path(folder).glob("3/*/*.safetensors"))

    full = statistics.median(times["full fine-tuning"][1:])
    table = Table(title=f"{len(data)} rows, {len(pictures)} pictures; an epoch of full fine-tuning takes {full:.1f} s")
    for column in ("", "first epoch", "later epochs", "times as fast as full fine-tuning"):
        table.add_column(column)
    ratios = {}
    for way, (first, *later) in times.items():
        usual = statistics.median(later)
        ratios[way] = {"first": round(first / full, 4), "later": round(usual / full, 4)}
        table.add_row(way, f"{first / full:.3f}", f"{usual / full:.3f}", f"{full / usual:.1f}")
    Console().print(table)
    found = {
        "benchmark": "feature_cache", "ratios": ratios, "stored_gb": round(stored / 1e9, 4),
        "seconds": {way: [round(second, 3) for second in seconds] for way, seconds in times.items()},
        "pictures": len(pictures), "device": args.device, "machine": platform.machine(),
        "torch": torch.__version__, "transformers": transformers.__version__,
        "shapes": {name: getattr(args, name) for name in
                   ("rows", "batch_size", "epochs", "threads", "workers", "width", "layers", "image_size")},
    }  # fmt: skip
    print(json.dumps(found))
    if args.output is not None:
        args.output.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
