"""
What the linear start costs beside one epoch of training, with both encoders frozen and their features cached: CPU
seconds of reading the features and solving, and of an epoch. Random features of the shapes of MiniLM (width 384) and
EfficientNet-Lite0 (49 tokens of width 1280), rows of 12 classes.

    python benchmarks/probe_start.py --rows 560
"""

import tempfile
import time
from typing import Any

import torch
from datasets import Dataset
from harness import parser, prepare, report
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertConfig, EfficientNetConfig, EfficientNetImageProcessor, PreTrainedTokenizerFast

from mm_transformers import (
    Classification,
    FeatureCache,
    MMTrainer,
    MMTrainingArguments,
    MMTransformerConfig,
    MMTransformerForMultiTask,
    MMTransformerProcessor,
)
from mm_transformers.training.linear_start.probe_start import start_probes


WORDS = [f"w{i}" for i in range(400)]
LABELS = [f"class {i}" for i in range(12)]


def make_trainer(rows: int, folder: str) -> MMTrainer:
    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[UNK]", *WORDS])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="[PAD]", unk_token="[UNK]")
    # The encoders run once, when the cache is filled; what counts is the shape of what they give.
    text = BertConfig(
        vocab_size=len(vocabulary), hidden_size=384, num_attention_heads=12, num_hidden_layers=1, intermediate_size=64
    )
    vision = EfficientNetConfig(
        width_coefficient=1.0, depth_coefficient=0.1, hidden_dim=1280, image_size=224, hidden_act="relu6"
    )
    tasks = [Classification("label", labels=LABELS)]
    config = MMTransformerConfig(
        text_config=text,
        vision_config=vision,
        tasks=tasks,
        linear_probe=True,
        freeze=["text", "vision"],
        num_fusion_layers=1,
    )
    processor = MMTransformerProcessor(
        tokenizer=tokenizer, image_processor=EfficientNetImageProcessor(size={"height": 224, "width": 224})
    )
    generator = torch.Generator().manual_seed(0)
    numbers = torch.randint(len(WORDS), (rows, 8), generator=generator).tolist()
    colours = torch.randint(256, (rows, 3), generator=generator).tolist()
    data = Dataset.from_dict(
        {
            "text": [" ".join(WORDS[i] for i in row) for row in numbers],
            "image": [Image.new("RGB", (64, 64), tuple(colour)) for colour in colours],
            "label": [LABELS[row[0] % len(LABELS)] for row in numbers],
        }
    )
    args = MMTrainingArguments(
        folder, num_train_epochs=1, validation_fraction=0, report_to=[], disable_tqdm=True, use_cpu=True,
        save_strategy="no", dataloader_pin_memory=False,
    )  # fmt: skip
    torch.manual_seed(0)
    return MMTrainer(
        MMTransformerForMultiTask(config), args, processing_class=processor, train_dataset=data,
        feature_cache=FeatureCache(f"{folder}/features"),
    )  # fmt: skip


def main() -> None:
    options = parser(__doc__, size=None, repeats=3)
    options.add_argument("--rows", type=int, default=560)
    args = options.parse_args()
    prepare(args)
    values: dict[str, list[float]] = {"an epoch": [], "the linear start": []}
    with tempfile.TemporaryDirectory() as folder:
        make_trainer(args.rows, folder).train()  # fills the cache
        for _ in range(args.repeats):
            trainer: Any = make_trainer(args.rows, folder)
            begun = time.process_time()
            assert start_probes(trainer).models
            values["the linear start"].append(time.process_time() - begun)
            trainer.args.probe_start = False
            begun = time.process_time()
            trainer.train()
            values["an epoch"].append(time.process_time() - begun)
    report("probe start", values, "an epoch", args, "CPU s", rows=args.rows)


if __name__ == "__main__":
    main()
