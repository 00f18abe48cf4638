"""
What smaller numbers cost and give: accuracy on the data that come with the package, size and seconds, one process.

    python benchmarks/quantization.py --steps 400 --threads 1
    python benchmarks/quantization.py --width 512 --threads 1   # a larger model with random weights: size and seconds

Kinds that are not installed (torchao) are left out.
"""

import argparse
import copy
import importlib.util
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import BertConfig, ViTConfig

from mm_transformers import MMDataCollator, MMTransformerConfig, MMTransformerForMultiTask, load_demo_dataset
from mm_transformers.cli.demo_model import make_config, make_processor, train
from mm_transformers.sharing.export import export_model
from mm_transformers.sharing.exported_model import ExportedModel


def candidates(saved: Path, processor: Any, folder: Path) -> dict[str, tuple[Callable, int]]:
    """Name -> what answers, and its bytes on the disk."""
    model = MMTransformerForMultiTask.from_pretrained(saved)
    found: dict[str, tuple[Callable, int]] = {}

    def add(name: str, answering: torch.nn.Module) -> None:
        torch.save(answering.state_dict(), folder / "weights")  # of any kind of tensor, to weigh them
        found[name] = (answering, (folder / "weights").stat().st_size)

    add("torch, float32", model)
    add("torch, bfloat16", copy.deepcopy(model).to(torch.bfloat16))
    if importlib.util.find_spec("torchao") is not None:
        from torchao.quantization import Int8DynamicActivationInt8WeightConfig, Int8WeightOnlyConfig
        from transformers import TorchAoConfig

        for name, kind in {
            "torchao, int8 weights": Int8WeightOnlyConfig(),
            "torchao, int8": Int8DynamicActivationInt8WeightConfig(),
        }.items():
            add(name, MMTransformerForMultiTask.from_pretrained(saved, quantization_config=TorchAoConfig(kind)))
    for name, int8 in {"ONNX, float32": False, "ONNX, int8": True}.items():
        export_model(model, processor, folder / name, int8=int8)
        size = sum(path.stat().st_size for path in (folder / name).glob("*.onnx*"))
        found[name] = (ExportedModel(folder / name), size)
    return found


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--width", type=int, help="of BERT and ViT of 6 layers, untrained; by default the demo's model")
    parser.add_argument("--rows", type=int, default=512)
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, help="JSON file to which the figures of this model are added")
    args = parser.parse_args()
    data = load_demo_dataset()
    processor = make_processor(data["train"]["text"])
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        config = make_config(processor.tokenizer, "cross_attention", with_images=True)
        if args.width is None:
            with torch.inference_mode(False):
                trainer = train("the demo's model", data, processor, config, args.steps, 0, folder / "training")
            trainer.save_model(str(folder / "saved"))
        else:
            size = {"hidden_size": args.width, "num_hidden_layers": 6, "num_attention_heads": 8}
            size["intermediate_size"] = 4 * args.width
            text = BertConfig(vocab_size=len(processor.tokenizer), **size)
            vision = ViTConfig(image_size=64, **size)
            tasks = [task for task in config.tasks if task["kind"] == "classification"]
            config = MMTransformerConfig(text_config=text, vision_config=vision, tasks=tasks)
            MMTransformerForMultiTask(config).save_pretrained(folder / "saved")
        torch.set_num_threads(args.threads)
        rows = data["test"].select(range(args.rows))
        collator = MMDataCollator(processor, config)
        starts = range(0, args.rows, args.batch_size)
        parts = (rows.select(range(i, min(i + args.batch_size, args.rows))) for i in starts)
        batches = [collator(list(part)) for part in parts]
        labels = [batch.pop("labels") for batch in batches]
        answering = candidates(folder / "saved", processor, folder)
        seconds: dict[str, list[float]] = {kind: [] for kind in answering}
        right: dict[str, int] = dict.fromkeys(answering, 0)
        choices = [task.name for task in config.get_tasks().values() if task.kind == "classification"]
        for batch, wanted in zip(batches, labels, strict=True):
            for kind, (model, _) in answering.items():
                dtype = getattr(model, "dtype", torch.float32)
                inputs = {k: v.to(dtype) if v.is_floating_point() else v for k, v in batch.items()}
                start = time.perf_counter()
                logits = model(**inputs).logits
                seconds[kind].append(time.perf_counter() - start)
                right[kind] += sum(int((logits[task].argmax(-1) == wanted[task]).sum()) for task in choices)
    baseline = statistics.median(seconds["torch, float32"])
    print("\n| | accuracy (%) | MB | float32 / this (seconds) |\n|---|---|---|---|")
    found = {}
    for kind, (_, size) in answering.items():
        accuracy, speed = right[kind] / (len(choices) * args.rows), baseline / statistics.median(seconds[kind])
        shown = f"{100 * accuracy:.1f}" if args.width is None else "untrained"
        print(f"| {kind} | {shown} | {size / 1e6:.2f} | {speed:.2f} |")
        found[kind] = {"accuracy": accuracy, "mb": size / 1e6, "speed": speed}
    if args.output is not None:
        known = json.loads(args.output.read_text()) if args.output.exists() else {}
        known["demo" if args.width is None else "untrained"] = found
        args.output.write_text(json.dumps(known, indent=2) + "\n")


if __name__ == "__main__":
    main()
