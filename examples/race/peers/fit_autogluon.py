"""
AutoGluon MultiModal in the race; `race.py --autogluon PYTHON` calls it, in an environment of its own:

    python -m venv autogluon && autogluon/bin/pip install uv      # pip takes very long to choose versions
    autogluon/bin/uv pip install --python autogluon/bin/python autogluon.multimodal==1.6.3 "setuptools<81" \
        torch==2.13.0 torchvision==0.28.0

It starts from the same two encoders. AutoGluon takes the text encoder's folder as it is, but picture encoders of timm
only, so the weights of the vision encoder, which must be an EfficientNet-Lite0, are copied into timm's.
"""

import argparse
import json
import time
from pathlib import Path

import pandas
import timm
import torch
from autogluon.multimodal import MultiModalPredictor
from transformers import AutoImageProcessor, AutoModel


ARCHITECTURE = "tf_efficientnet_lite0"


def write_timm_folder(vision: Path, folder: Path) -> None:
    """The weights of a transformers folder of EfficientNet-Lite0 in a folder that AutoGluon takes for timm's own."""
    source, target = AutoModel.from_pretrained(vision).eval(), timm.create_model(ARCHITECTURE, num_classes=0).eval()
    # Both name convolutions and normalisations in the order in which they run; Lite0 has no squeeze-and-excite.
    given = {name: value for name, value in source.state_dict().items() if "squeeze_excite" not in name}
    wanted = target.state_dict()
    if [value.shape for value in given.values()] != [value.shape for value in wanted.values()]:
        raise SystemExit(f"{vision} holds no EfficientNet-Lite0.")
    target.load_state_dict(dict(zip(wanted, given.values(), strict=True)))
    pixels = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected, found = source(pixels).last_hidden_state.flatten(2).mean(-1), target(pixels)
    if not torch.allclose(expected, found, atol=1e-3):
        raise SystemExit(f"timm's {ARCHITECTURE} answers otherwise than {vision}.")
    processor = AutoImageProcessor.from_pretrained(vision)
    folder.mkdir()
    torch.save(target.state_dict(), folder / "pytorch_model.bin")
    preprocessing = {
        "architecture": ARCHITECTURE, "input_size": [3, 224, 224], "interpolation": "bicubic", "crop_pct": 1.0,
        "mean": list(processor.image_mean), "std": list(processor.image_std),
    }  # fmt: skip
    config = {"architecture": ARCHITECTURE, "num_classes": 0, "num_features": 1280, "pretrained_cfg": preprocessing}
    (folder / "config.json").write_text(json.dumps(config))


def read(file: Path, label: str) -> pandas.DataFrame:
    frame = pandas.read_parquet(file)
    frame["text"] = frame["text"].fillna("")
    # What is no picture becomes one of zeros.
    frame["image"] = [b"" if cell is None else cell["bytes"] for cell in frame["image"]]
    return frame[["text", "image", label]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="train.parquet, ...; answers.json is written here")
    parser.add_argument("--label", required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--vision", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, help="the time for its training; its own choice by default")
    args = parser.parse_args()
    frames = {file.stem: read(file, args.label) for file in sorted(args.folder.glob("*.parquet"))}
    write_timm_folder(args.vision, args.folder / "timm")
    began, cpu = time.perf_counter(), time.process_time()
    predictor = MultiModalPredictor(
        label=args.label, problem_type="multiclass", eval_metric="f1_macro", path=str(args.folder / "model")
    )
    chosen = {
        "model.names": ["hf_text", "timm_image", "fusion_mlp"],
        "model.hf_text.checkpoint_name": str(args.text.resolve()),
        "model.timm_image.checkpoint_name": str((args.folder / "timm").resolve()),
        "data.image.missing_value_strategy": "zero",
        "env.accelerator": "cpu",
        "env.precision": 32,
        "env.num_workers": 0,
    }
    predictor.fit(
        frames["train"],
        tuning_data=frames["validation"],
        column_types={"text": "text", "image": "image_bytearray"},
        hyperparameters=chosen,
        time_limit=None if args.minutes is None else 60 * args.minutes,
        seed=args.seed,
    )
    seconds, cpu_seconds = time.perf_counter() - began, time.process_time() - cpu
    answers = {name: predictor.predict(frame).tolist() for name, frame in frames.items() if name != "train"}
    found = {"answers": answers, "seconds": round(seconds, 2), "cpu_seconds": round(cpu_seconds, 2), "chosen": {}}
    (args.folder / "answers.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
