"""
Eager, compiled, `torch.export` and ONNX Runtime, on the same batches in turns: seconds and largest differences.

    python benchmarks/export.py --threads 1
    python benchmarks/export.py --size base --device cuda --dtype bfloat16 --kinds eager compiled exported
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import BertConfig, ViTConfig

from mm_transformers import Classification, MMTransformerConfig, MMTransformerForMultiTask, TokenClassification


SIZES = {
    "small": {"hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 1024},
    "base": {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072},
}
IMAGE_SIZE = {"small": 64, "base": 224}
BATCHES = [(1, 16, 1), (4, 32, 5), (16, 32, 8), (8, 64, 0)]  # rows, words, images
KINDS = ["eager", "compiled", "exported", "onnx"]


def make_batch(rows: int, words: int, images: int, size: str, device: str, dtype: torch.dtype) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(rows)
    batch: dict[str, Any] = {
        "input_ids": torch.randint(5, 1000, (rows, words), generator=generator),
        "attention_mask": torch.ones(rows, words, dtype=torch.int64),
        # Where there is no image, a graph takes a blank one that no row sees.
        "pixel_values": torch.randn(max(images, 1), 3, IMAGE_SIZE[size], IMAGE_SIZE[size], generator=generator),
        "image_index": torch.full((rows, 1), -1) if images == 0 else torch.arange(rows)[:, None] % images,
    }
    return {k: v.to(device, dtype) if v.is_floating_point() else v.to(device) for k, v in batch.items()}


class Logits(nn.Module):
    def __init__(self, model: nn.Module):
        super().__init__()
        self.model, self.config = model, model.config

    def forward(self, input_ids, attention_mask, pixel_values, image_index) -> dict[str, torch.Tensor]:
        return self.model(input_ids, attention_mask, pixel_values=pixel_values, image_index=image_index).logits


def runner(kind: str, graph: nn.Module, sample: dict[str, Any], folder: Path) -> Callable:
    dynamic = {
        name: dict.fromkeys([0] if name == "pixel_values" else [0, 1], torch.export.Dim.DYNAMIC) for name in sample
    }
    if kind == "compiled":
        graph = torch.compile(graph, dynamic=True)
    elif kind == "exported":
        exported = torch.export.export(
            graph, (), sample, dynamic_shapes=dynamic, prefer_deferred_runtime_asserts_over_guards=True
        )
        graph = exported.module()
    elif kind == "onnx":
        import onnxruntime
        from transformers.exporters import OnnxConfig, OnnxExporter

        config = OnnxConfig(dynamic=True, dynamic_shapes=dynamic, prefer_deferred_runtime_asserts_over_guards=True)
        onnx, _ = OnnxExporter().export_program(graph, sample, config)
        OnnxExporter.save_program(onnx, folder / "model.onnx")
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        path, providers = str(folder / "model.onnx"), ["CPUExecutionProvider"]
        session = onnxruntime.InferenceSession(path, options, providers=providers)
        names = [output.name for output in session.get_outputs()]

        def run(batch: dict[str, Any]) -> dict[str, torch.Tensor]:
            outputs = session.run(None, {name: value.numpy() for name, value in batch.items()})
            return dict(zip(names, map(torch.from_numpy, outputs), strict=True))

        return run
    return lambda batch: graph(**batch)


@torch.inference_mode()
def timed(run: Callable, batch: dict[str, Any]) -> tuple[float, dict[str, torch.Tensor]]:
    cuda = batch["input_ids"].is_cuda
    if cuda:
        torch.cuda.synchronize()
    start = time.perf_counter()
    logits = run(batch)
    if cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start, logits


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, help="JSON file to write")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    size, dtype = SIZES[args.size], getattr(torch, args.dtype)
    tasks = [Classification("topic", labels=["a", "b", "c"]), TokenClassification("entities", labels=["O", "NAME"])]
    vision = ViTConfig(**size, image_size=IMAGE_SIZE[args.size])
    config = MMTransformerConfig(text_config=BertConfig(vocab_size=1000, **size), vision_config=vision, tasks=tasks)
    model = MMTransformerForMultiTask(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("gate_alpha"):
                parameter.fill_(0.7)  # behind closed gates nothing of the images would be seen
    model.to(args.device, dtype)
    options = (args.size, args.device, dtype)
    with tempfile.TemporaryDirectory() as folder:
        run_of = {}
        for kind in args.kinds:
            start = time.perf_counter()
            sample = make_batch(3, 12, 2, *options)
            sample["image_index"] = sample["image_index"].repeat(1, 2)
            run_of[kind] = runner(kind, Logits(model).eval(), sample, Path(folder))
            print(f"{kind}: ready after {time.perf_counter() - start:.1f} s", flush=True)
        others = [kind for kind in run_of if kind != "eager"]
        header = " | ".join(f"eager / {kind}" for kind in others)
        print(f"\n| rows, words, images | eager (ms) | {header} | largest difference |")
        print(f"|---|---|{'---|' * len(others)}---|")
        batches = []
        for shape in BATCHES:
            batch = make_batch(*shape, *options)
            seconds: dict[str, list[float]] = {kind: [] for kind in run_of}
            difference = 0.0
            for repeat in range(args.repeats + 3):
                expected: dict[str, torch.Tensor] = {}
                for kind, run in run_of.items():
                    taken, logits = timed(run, batch)
                    expected = expected or logits
                    difference = max(difference, *((logits[n] - expected[n]).abs().max().item() for n in expected))
                    if repeat >= 3:
                        seconds[kind].append(taken)
            eager = statistics.median(seconds["eager"])
            ratios = {kind: eager / statistics.median(seconds[kind]) for kind in others}
            name, shown = ", ".join(map(str, shape)), " | ".join(f"{ratio:.2f}" for ratio in ratios.values())
            print(f"| {name} | {1000 * eager:.1f} | {shown} | {difference:.1e} |", flush=True)
            batches.append({"shape": name, "eager_ms": 1000 * eager, "ratios": ratios, "difference": difference})
    if args.output is not None:
        options = {name: value for name, value in vars(args).items() if name != "output"}
        args.output.write_text(json.dumps({"options": options, "batches": batches}, indent=2) + "\n")


if __name__ == "__main__":
    main()
