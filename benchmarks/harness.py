"""Measures several ways to do the same thing, in turns, and writes each comparison as one line of JSON."""

import argparse
import concurrent.futures
import ctypes
import gc
import json
import multiprocessing
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import BertConfig, ViTConfig

from mm_transformers import Classification, MMTransformerConfig, MMTransformerForMultiTask


# Sizes of a transformer encoder; "base" is BERT-base and ViT-B/16, "large" BERT-large and ViT-L/16.
ENCODERS = {
    "tiny": {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 512},
    "small": {"hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 1024},
    "base": {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072},
    "large": {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096},
}


def parser(description: str | None, size: str | None = "small", repeats: int = 9) -> argparse.ArgumentParser:
    """`size=None`: the models of this script have sizes of their own."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--size", choices=ENCODERS, default=size, help="of both encoders")
    made.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    made.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    made.add_argument("--threads", type=int, default=os.cpu_count())
    made.add_argument("--repeats", type=int, default=repeats)
    made.add_argument("--output", type=Path, help="file to which lines of JSON are added")
    return made


def prepare(args: argparse.Namespace) -> None:
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    transformers.logging.set_verbosity_error()


def make_model(
    args: argparse.Namespace,
    image_size: int = 224,
    num_tasks: int = 1,
    text: Any = None,
    vision: Any = None,
    **options: Any,
) -> MMTransformerForMultiTask:
    """BERT and ViT of the size that was asked for, with new weights and without dropout."""
    size = ENCODERS[args.size]
    config = MMTransformerConfig(
        text_config=text or BertConfig(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, **size),
        vision_config=vision or ViTConfig(image_size=image_size, **size),
        tasks=[Classification(f"task{i}", labels=["a", "b", "c"]) for i in range(num_tasks)],
        fusion_dropout=0.0,
        classifier_dropout=0.0,
        **options,
    )
    return MMTransformerForMultiTask(config).to(args.device, getattr(torch, args.dtype))


def make_batch(
    args: argparse.Namespace, rows: int, words: int, image_size: int, images: int | None = None
) -> dict[str, torch.Tensor]:
    """Texts of `words` tokens, and `images` images (by default one for each row)."""
    ids = torch.randint(5, 1000, (rows, words), device=args.device)
    pixels = torch.randn(
        rows if images is None else images, 3, image_size, image_size, device=args.device,
        dtype=getattr(torch, args.dtype),
    )  # fmt: skip
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}


def make_labels(model: MMTransformerForMultiTask, rows: int) -> dict[str, torch.Tensor]:
    return {name: torch.zeros(rows, dtype=torch.int64, device=model.device) for name in model.tasks}


def training_step(model: torch.nn.Module, loss: Callable[[], torch.Tensor]) -> Callable[[], None]:
    """Forward and backward, with gradients that are made anew each time, and are gone after it."""

    def step() -> None:
        loss().backward()
        model.zero_grad(set_to_none=True)

    return step


def in_turns(
    ways: Mapping[str, Callable[[], Any]], repeats: int, device: str, warmup: int = 1
) -> dict[str, list[float]]:
    """
    Seconds of each call.

    Args:
        ways: name -> what is timed. They take turns, so that what slows the machine down slows all of them down.
    """
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for repeat in range(warmup + repeats):
        for name, way in ways.items():
            wait(device)
            start = time.perf_counter()
            way()
            wait(device)
            if repeat >= warmup:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def matmul_rate(args: argparse.Namespace) -> float:
    """Floating-point operations per second of large matrix products, the most that the machine can do."""
    n = 8192 if args.device == "cuda" else 2048
    a, b = (torch.randn(n, n, device=args.device, dtype=getattr(torch, args.dtype)) for _ in range(2))
    seconds = in_turns({"matmul": lambda: a @ b}, 10, args.device)["matmul"]
    return 2 * n**3 / min(seconds)


def peak_memory(build: Callable[..., Callable[[], Any]], args: argparse.Namespace, *given: Any) -> float:
    """
    By how many MB the peak of memory rises while something runs.

    Args:
        build: a function of a module, called with `args` and what else is given; returns what is to run. On the CPU
            this happens in a process of its own, and the memory is the resident set.
    """
    if args.device == "cuda":
        run = build(args, *given)
        run()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    with concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_rise, build, args, *given).result()


def _rise(build: Callable[..., Callable[[], Any]], args: argparse.Namespace, *given: Any) -> float:
    prepare(args)
    run = build(args, *given)
    run()
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what the run has freed
    Path("/proc/self/clear_refs").write_text("5")  # the peak is now what is resident now
    before = _status("VmRSS")
    run()
    return (_status("VmHWM") - before) / 1024


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name))


def report(
    benchmark: str,
    values: Mapping[str, list[float]],
    baseline: str,
    args: argparse.Namespace,
    unit: str = "s",
    **shapes: Any,
) -> dict[str, Any]:
    """
    Prints and keeps one comparison.

    Args:
        values: way -> what was measured in each turn. `values` of the line are the medians; `ratio` is the median over
            the turns of the way's by that of the baseline, and `spread` holds the quartiles of these.
        shapes: what tells this comparison from others of the same benchmark.
    """
    ratios = {name: [a / b for a, b in zip(each, values[baseline], strict=True)] for name, each in values.items()}
    quartiles = {
        name: statistics.quantiles(each, n=4, method="inclusive") if len(each) > 1 else each * 3
        for name, each in ratios.items()
    }
    line = {
        "benchmark": benchmark,
        "shapes": {**({"size": args.size} if args.size else {}), **shapes},
        "unit": unit,
        "values": {name: float(f"{statistics.median(each):.4g}") for name, each in values.items()},
        "baseline": baseline,
        "ratio": {name: round(middle, 4) for name, (_, middle, _) in quartiles.items()},
        "spread": {name: [round(low, 4), round(high, 4)] for name, (low, _, high) in quartiles.items()},
        "turns": len(values[baseline]),
        "machine": machine(args),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "command": " ".join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *_without_output(sys.argv[1:])]),
    }
    print(json.dumps(line), flush=True)
    if args.output is not None:
        with args.output.open("a") as file:
            file.write(json.dumps(line) + "\n")
    return line


def machine(args: argparse.Namespace) -> str:
    if args.device == "cuda":
        return f"{torch.cuda.get_device_name()}, {args.dtype}"
    return f"{args.threads} CPU core{'s' * (args.threads > 1)} ({platform.machine()}), {args.dtype}"


def _without_output(arguments: list[str]) -> list[str]:
    if "--output" in arguments:
        place = arguments.index("--output")
        arguments = arguments[:place] + arguments[place + 2 :]
    return arguments
