r"""
The emoji data, from random weights: how long until the validation split is answered as well as AutoGluon or Ludwig
answers it?

    python examples/emoji/build_dataset.py --npm_dir node_modules --output_dir emoji_data    # see examples/emoji
    python benchmarks/automl/fit_mm_transformers.py --data_dir emoji_data --encoders encoders --output ours.json \
        --fusion_type late --gates 1 --batch_size 32
    autogluon/bin/python benchmarks/automl/fit_autogluon.py --data_dir emoji_data --encoders encoders --output a.json \
        --batch_size 32
    ludwig/bin/python benchmarks/automl/fit_ludwig.py --data_dir emoji_data --encoders encoders --output l.json \
        --batch_size 32

The first makes small encoders with new weights and their tokenizer in the folder `--encoders`, from which the others
start, too: `--towers clip` for AutoGluon, `--towers bert-vit` for Ludwig. Batch size, learning rate and number of
epochs are the same. The others need environments of their own, without this package: autogluon.multimodal 1.6.3 with
setuptools<81, torch 2.9.1 and torchvision 0.24.1; ludwig 0.11.0 with these, torchaudio 2.9.1 and numpy<2.4.
"""

import argparse
import json
import time
from pathlib import Path

import datasets
import torch
from encoders import make_encoders
from transformers import TrainerCallback

from mm_transformers import (
    Classification,
    MMTrainer,
    MMTrainingArguments,
    MMTransformerForMultiTask,
    MMTransformerProcessor,
)


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
    parser.add_argument("--towers", choices=["clip", "bert-vit"], default="clip")
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--rows_per_image", type=int, default=1)
    parser.add_argument("--fusion_type", default="cross_attention")
    parser.add_argument("--num_fusion_layers", type=int, default=1)
    parser.add_argument("--text_dropout", type=float, default=0.2, help="modality dropout of the keyword")
    parser.add_argument("--dropout", type=float, default=0.1, help="of the fusion and the task layer")
    parser.add_argument("--gates", type=float, default=0.0, help="alpha of all gates at the start; 0 is closed")
    args = parser.parse_args()
    data = datasets.load_dataset(str(args.data_dir))
    encoders = make_encoders(args.encoders, args.towers, data["train"]["text"])
    tasks = [Classification("group", labels=sorted(set(data["train"]["group"])))]
    curve = Curve()
    torch.manual_seed(0)
    model = MMTransformerForMultiTask.from_encoders(
        **encoders, tasks=tasks, initializer_range=0.1, num_fusion_layers=args.num_fusion_layers,
        freeze=[],  # the encoders have new weights
        fusion_type=args.fusion_type, modality_dropout={"text": args.text_dropout}, fusion_dropout=args.dropout,
        classifier_dropout=args.dropout,
    )  # fmt: skip
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("gate_alpha"):
                parameter.fill_(args.gates)
    trainer = MMTrainer(
        model,
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
