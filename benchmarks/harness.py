"""Takes times of several ways to do the same thing, in turns, and writes each comparison as a line of JSON."""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers


# Sizes of a transformer encoder; "base" is BERT-base and ViT-B/16.
ENCODERS = {
    "tiny": {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 512},
    "small": {"hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 1024},
    "base": {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072},
    "large": {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096},
}


def parser(description: str | None) -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--size", choices=ENCODERS, default="small")
    made.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    made.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    made.add_argument("--threads", type=int, default=1)
    made.add_argument("--repeats", type=int, default=9)
    made.add_argument("--output", type=Path, help="file to which lines of JSON are added")
    return made


def prepare(args: argparse.Namespace) -> None:
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)


def in_turns(
    ways: Mapping[str, Callable[[], Any]], repeats: int, device: str, warmup: int = 2
) -> dict[str, list[float]]:
    """
    Seconds of each call.

    Args:
        ways: name -> what is timed. They take turns, so that what slows the machine down slows all of them down.
    """
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for repeat in range(warmup + repeats):
        for name, way in ways.items():
            _wait(device)
            start = time.perf_counter()
            way()
            _wait(device)
            if repeat >= warmup:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def report(
    benchmark: str, seconds: Mapping[str, list[float]], baseline: str, args: argparse.Namespace, **shapes: Any
) -> dict[str, Any]:
    """
    Prints and keeps one comparison: the median seconds of each way, and as ratio the median over the turns of its
    seconds by those of the baseline, with the quartiles of these as spread.
    """
    ratios = {
        name: statistics.quantiles([a / b for a, b in zip(values, seconds[baseline], strict=True)], n=4)
        for name, values in seconds.items()
    }
    line = {
        "benchmark": benchmark,
        "shapes": shapes,
        "baseline": baseline,
        "seconds": {name: round(statistics.median(values), 6) for name, values in seconds.items()},
        "ratio": {name: round(middle, 3) for name, (_, middle, _) in ratios.items()},
        "spread": {name: [round(low, 3), round(high, 3)] for name, (low, _, high) in ratios.items()},
        "size": args.size,
        "device": torch.cuda.get_device_name() if args.device == "cuda" else f"CPU {platform.machine()}",
        "dtype": args.dtype,
        "threads": args.threads,
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }
    keep(line, args)
    return line


def keep(line: dict[str, Any], args: argparse.Namespace) -> None:
    print(json.dumps(line), flush=True)
    if args.output is not None:
        with args.output.open("a") as file:
            file.write(json.dumps(line) + "\n")


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()
