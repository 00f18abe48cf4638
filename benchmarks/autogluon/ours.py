"""
The emoji data, from random weights: how long until the validation split is answered as well as AutoGluon answers it?

    python examples/emoji/build_dataset.py --npm_dir node_modules --output_dir emoji_data    # see examples/emoji
    python benchmarks/autogluon/ours.py --data_dir emoji_data --encoders clip --output ours.json
    autogluon/bin/python benchmarks/autogluon/theirs.py --data_dir emoji_data --encoders clip --output theirs.json

The first makes a small CLIP with new weights and its tokenizer in the folder `--encoders`, which both then start from:
the same towers, batch size, learning rate and number of epochs. The second needs an environment of its own with
autogluon.multimodal 1.6.3 (and setuptools<81), in which this package is not.
"""

import argparse
import json
import time
from pathlib import Path

import datasets
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    PreTrainedTokenizerFast,
    TrainerCallback,
)

from mm_transformers import (
    Classification,
    MMTrainer,
    MMTrainingArguments,
    MMTransformerForMultiTask,
    MMTransformerProcessor,
)


def make_clip(folder: Path, texts: list[str]) -> None:
    """Towers of width 128 with 4 layers, pictures of 64 pixels in patches of 8."""
    start, end = "<|startoftext|>", "<|endoftext|>"
    backend = Tokenizer(models.BPE(unk_token=end, continuing_subword_prefix="", end_of_word_suffix="</w>"))
    backend.normalizer = normalizers.Lowercase()
    backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Whitespace(), pre_tokenizers.ByteLevel(False)])
    trainer = trainers.BpeTrainer(vocab_size=2000, special_tokens=[start, end], end_of_word_suffix="</w>")
    backend.train_from_iterator(texts, trainer)
    ids = [(token, backend.token_to_id(token)) for token in (start, end)]
    backend.post_processor = processors.TemplateProcessing(single=f"{start} $A {end}", special_tokens=ids)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=start, eos_token=end, unk_token=end, pad_token=end, model_max_length=32,
        model_input_names=["input_ids", "attention_mask"],
    )  # fmt: skip
    tower = dict(hidden_size=128, intermediate_size=512, num_hidden_layers=4, num_attention_heads=4, projection_dim=128)
    ends = dict(bos_token_id=ids[0][1], eos_token_id=ids[1][1], pad_token_id=ids[1][1])
    config = CLIPConfig(
        text_config=dict(**tower, **ends, vocab_size=len(tokenizer), max_position_embeddings=32),
        vision_config=dict(**tower, image_size=64, patch_size=8),
        projection_dim=128,
    )
    torch.manual_seed(0)
    CLIPModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    image_processor = CLIPImageProcessorPil(size={"shortest_edge": 64}, crop_size={"height": 64, "width": 64})
    image_processor.save_pretrained(folder)


class Curve(TrainerCallback):
    """Seconds since the start, and accuracy, after each epoch."""

    def __init__(self):
        self.start, self.points = time.perf_counter(), []

    def on_evaluate(self, args, state, control, metrics, **kwargs):
        self.points.append([round(time.perf_counter() - self.start, 1), metrics["eval_group_accuracy"]])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", type=Path, required=True)
    parser.add_argument("--encoders", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--rows_per_image", type=int, default=4)
    parser.add_argument("--fusion_type", default="cross_attention")
    parser.add_argument("--num_fusion_layers", type=int, default=1)
    parser.add_argument("--text_dropout", type=float, default=0.2, help="modality dropout of the keyword")
    args = parser.parse_args()
    data = datasets.load_dataset(str(args.data_dir))
    if not args.encoders.exists():
        make_clip(args.encoders, data["train"]["text"])
    encoders = dict(text=str(args.encoders), vision=str(args.encoders))
    tasks = [Classification("group", labels=sorted(set(data["train"]["group"])))]
    curve = Curve()
    torch.manual_seed(0)
    trainer = MMTrainer(
        MMTransformerForMultiTask.from_encoders(
            **encoders, tasks=tasks, initializer_range=0.1, num_fusion_layers=args.num_fusion_layers,
            fusion_type=args.fusion_type, modality_dropout={"text": args.text_dropout},
        ),
        MMTrainingArguments(
            str(args.output.with_suffix("")), num_train_epochs=args.epochs, per_device_train_batch_size=args.batch_size,
            per_device_eval_batch_size=128, learning_rate=args.learning_rate, lr_scheduler_type="cosine",
            warmup_steps=0.1, eval_strategy="epoch", save_strategy="no", report_to=[], disable_tqdm=True, use_cpu=True,
            rows_per_image=args.rows_per_image,
        ),
        processing_class=MMTransformerProcessor.from_encoders(**encoders),
        train_dataset=data["train"],
        eval_dataset=data["validation"],
        callbacks=[curve],
    )  # fmt: skip
    trainer.train()
    args.output.write_text(json.dumps({"curve": curve.points}))
    print(curve.points)


if __name__ == "__main__":
    main()
