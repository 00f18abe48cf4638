"""
What smaller numbers cost and give: accuracy, size and seconds, one process.

    python benchmarks/quantization.py --steps 400 --threads 1   # the data that come with the package
    python benchmarks/quantization.py --model my-model --data test.parquet --threads 1   # your model and rows
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

import datasets
import torch
from transformers import BertConfig, ViTConfig

from mm_transformers import (
    MMDataCollator,
    MMTransformerConfig,
    MMTransformerForMultiTask,
    MMTransformerProcessor,
    load_demo_dataset,
)
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


def demo_model(args: argparse.Namespace, folder: Path) -> tuple[Path, MMTransformerProcessor, Any, dict[str, Any]]:
    """The trained model of the demo, or an untrained one of `--width`: folder, processor, test rows, columns."""
    data = load_demo_dataset()
    processor = make_processor(data["train"]["text"])
    config = make_config(processor.tokenizer, "cross_attention", with_images=True)
    if args.width is None:
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
    return folder / "saved", processor, data["test"], {}


def own_model(args: argparse.Namespace) -> tuple[Path, MMTransformerProcessor, Any, dict[str, Any]]:
    """The model of `--model`, and the rows of `--data`."""
    processor = MMTransformerProcessor.from_pretrained(args.model)
    return args.model, processor, datasets.Dataset.from_parquet(str(args.data)), processor.column_arguments


@torch.inference_mode()
def answer(
    models: dict[str, Any], batches: list[dict[str, Any]], choices: list[str]
) -> tuple[dict[str, list[float]], dict[str, list[dict[str, Any]]]]:
    """
    The seconds of each batch, and the chosen labels by task; by kind.

    All kinds answer a batch before the next one, so that other work on the machine slows them alike.
    """
    seconds: dict[str, list[float]] = {kind: [] for kind in models}
    answers: dict[str, list[dict[str, Any]]] = {kind: [] for kind in models}
    for batch in batches:
        for kind, model in models.items():
            dtype = getattr(model, "dtype", torch.float32)
            inputs = {k: v.to(dtype) if v.is_floating_point() else v for k, v in batch.items()}
            start = time.perf_counter()
            logits = model(**inputs).logits
            seconds[kind].append(time.perf_counter() - start)
            answers[kind].append({task: logits[task].argmax(-1) for task in choices})
    return seconds, answers


def share(found: list[dict[str, Any]], wanted: list[dict[str, Any]], choices: list[str]) -> float:
    """The share of cells with the wanted label, of those that have one."""
    pairs = [(one[task], truth[task]) for one, truth in zip(found, wanted, strict=True) for task in choices]
    equal = sum(int((one == truth)[truth >= 0].sum()) for one, truth in pairs)
    return equal / sum(int((truth >= 0).sum()) for _, truth in pairs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--width", type=int, help="of BERT and ViT of 6 layers, untrained; by default the demo's model")
    parser.add_argument("--model", type=Path, help="the folder of a trained model")
    parser.add_argument("--data", type=Path, help="with --model: a Parquet file of test rows")
    parser.add_argument("--rows", type=int, default=512, help="the most test rows (%(default)s)")
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, help="JSON file to which the figures of this model are added")
    args = parser.parse_args()
    if (args.model is None) != (args.data is None):
        parser.error("--model and --data belong together")
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        saved, processor, data, columns = demo_model(args, folder) if args.model is None else own_model(args)
        config = MMTransformerConfig.from_pretrained(saved)
        rows = data.select(range(min(args.rows, len(data))))
        collator = MMDataCollator(processor, config, **columns)
        starts = range(0, len(rows), args.batch_size)
        parts = (rows.select(range(i, min(i + args.batch_size, len(rows)))) for i in starts)
        batches = [collator(list(part)) for part in parts]
        labels = [batch.pop("labels") for batch in batches]
        choices = [task.name for task in config.get_tasks().values() if task.kind == "classification"]
        if not any(bool((one[task] >= 0).any()) for one in labels for task in choices):
            parser.error("no row has a label of a task that chooses one label")
        answering = candidates(saved, processor, folder)
        seconds, answers = answer({kind: model for kind, (model, _) in answering.items()}, batches, choices)
    baseline, reference = seconds["torch, float32"], answers["torch, float32"]
    print("\n| | accuracy (%) | same answers (%) | MB | times as fast as float32 |\n|---|---|---|---|---|")
    found = {}
    for kind, (_, size) in answering.items():
        speed = statistics.median(baseline) / statistics.median(seconds[kind])
        accuracy, same = share(answers[kind], labels, choices), share(answers[kind], reference, choices)
        shown = f"{100 * accuracy:.1f} | {100 * same:.1f}" if args.width is None else "untrained | "
        print(f"| {kind} | {shown} | {size / 1e6:.1f} | {speed:.2f} |")
        found[kind] = {"accuracy": accuracy, "same": same, "mb": size / 1e6, "speed": speed}
    if args.output is not None:
        known = json.loads(args.output.read_text()) if args.output.exists() else {}
        name = args.model.name if args.model else "demo" if args.width is None else "untrained"
        known[name] = found
        args.output.write_text(json.dumps(known, indent=2) + "\n")


if __name__ == "__main__":
    main()
