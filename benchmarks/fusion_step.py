"""
What a training step costs where both encoders are frozen and their features cached, so that only the fusion and the
heads work: CPU seconds of forward, backward and optimiser, beside the same step of an earlier commit.

The shapes are those of MiniLM (width 384) and EfficientNet-Lite0 (49 tokens of width 1280): eight rows, texts of 5 to
12 tokens, one row in ten without a picture, dropout, clipping and AdamW as `MMTrainer` has them.

    python benchmarks/fusion_step.py --against 811672d
    python benchmarks/fusion_step.py --layers 1 2 3      # beside other sizes of the fusion
"""

import argparse
import importlib.util
import io
import json
import os
import resource
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import Any

import torch
from harness import parser, prepare, report


ROOT = Path(__file__).parent.parent
PARTS = ("forward", "backward", "clip", "optimiser")


def cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def make_step(args: argparse.Namespace, layers: int) -> Any:
    """A function that makes so many steps and returns the CPU seconds of each part of one, and the page faults."""
    from transformers import BertConfig, ViTConfig

    from mm_transformers import Classification, MMTransformerConfig, MMTransformerForMultiTask

    # The encoders do not run; what counts is their width.
    small = {"num_hidden_layers": 1, "intermediate_size": 64}
    model = MMTransformerForMultiTask(
        MMTransformerConfig(
            text_config=BertConfig(hidden_size=384, num_attention_heads=12, **small),
            vision_config=ViTConfig(hidden_size=1280, num_attention_heads=20, **small),
            tasks=[Classification("category", labels=[str(i) for i in range(12)])],
            freeze=["text", "vision"],
            num_fusion_layers=layers,
        )
    ).train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)
    generator = torch.Generator().manual_seed(0)
    batches = [make_batch(args, generator) for _ in range(10)]

    def steps(count: int) -> dict[str, float]:
        seconds = dict.fromkeys(PARTS, 0.0)
        for i in range(count):
            times = [cpu_seconds()]
            loss = model(**batches[i % len(batches)]).loss
            times.append(cpu_seconds())
            loss.backward()
            times.append(cpu_seconds())
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            times.append(cpu_seconds())
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            times.append(cpu_seconds())
            for part, before, after in zip(PARTS, times, times[1:], strict=False):
                seconds[part] += (after - before) / count
        return seconds

    return steps


def make_batch(args: argparse.Namespace, generator: torch.Generator) -> dict[str, Any]:
    lengths = torch.randint(5, args.words + 1, (args.rows,), generator=generator)
    mask = (torch.arange(int(lengths.max())) < lengths[:, None]).long()
    has_image = torch.rand(args.rows, generator=generator) >= 0.1
    index = torch.where(has_image, has_image.cumsum(0) - 1, -1)
    return {
        "attention_mask": mask,
        "text_features": torch.randn(*mask.shape, 384, generator=generator),
        "image_features": torch.randn(int(has_image.sum()), args.tokens, 1280, generator=generator),
        "image_index": index[:, None],
        "labels": {"category": torch.randint(12, (args.rows,), generator=generator)},
    }


def work(args: argparse.Namespace) -> None:
    """In a process of its own: for each line that comes in, makes steps and tells what they took."""
    told, sys.stdout = sys.stdout, sys.stderr
    if importlib.util.find_spec("mm_transformers.training.freed_memory"):
        # As `MMTrainer` does.
        importlib.import_module("mm_transformers.training.freed_memory").keep_freed_memory()
    steps = make_step(args, args.layers[-1])
    steps(3)
    for _ in sys.stdin:
        print(json.dumps(steps(args.steps)), file=told, flush=True)


def start(source: Path, layers: int) -> subprocess.Popen:
    """A process that imports the package from the folder `source`."""
    command = [sys.executable, __file__, *sys.argv[1:], "--layers", str(layers), "--work"]
    environment = {**os.environ, "PYTHONPATH": str(source)}
    return subprocess.Popen(
        command, env=environment, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT
    )


def code_of(commit: str, folder: str) -> Path:
    """Writes the package as it was at a commit into the folder, and returns the folder to import it from."""
    packed = subprocess.run(["git", "archive", commit, "src"], cwd=ROOT, check=True, capture_output=True).stdout
    with tarfile.open(fileobj=io.BytesIO(packed)) as archive:
        archive.extractall(folder, filter="data")
    return Path(folder) / "src"


def main() -> None:
    made = parser(__doc__, size=None, repeats=15)
    made.add_argument("--rows", type=int, default=8)
    made.add_argument("--words", type=int, default=12, help="tokens of the longest text")
    made.add_argument("--tokens", type=int, default=49, help="of an image")
    made.add_argument("--layers", type=int, nargs="+", default=[3], help="of the fusion; the last is the baseline")
    made.add_argument("--against", metavar="COMMIT", help="an earlier commit, which then is the baseline")
    made.add_argument("--steps", type=int, default=10, help="in each turn")
    made.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    made.set_defaults(threads=1)
    args = made.parse_args()
    prepare(args)
    if args.work:
        work(args)
        return
    with tempfile.TemporaryDirectory() as folder:
        now, last = ROOT / "src", args.layers[-1]
        if args.against is None:
            ways = {f"{layers} layer{'s' * (layers > 1)}": (now, layers) for layers in args.layers}
        else:
            ways = {args.against: (code_of(args.against, folder), last), "now": (now, last)}
        workers = {name: start(source, layers) for name, (source, layers) in ways.items()}
        parts: dict[str, dict[str, list[float]]] = {part: {name: [] for name in ways} for part in PARTS}
        for _ in range(args.repeats):
            for name, worker in workers.items():
                worker.stdin.write("go\n")
                worker.stdin.flush()
                for part, seconds in json.loads(worker.stdout.readline()).items():
                    parts[part][name].append(seconds)
        for worker in workers.values():
            worker.communicate()
    baseline = list(ways)[-1] if args.against is None else args.against
    shapes = {"rows": args.rows, "words": args.words, "tokens": args.tokens}
    whole = {name: [sum(each) for each in zip(*(parts[p][name] for p in PARTS), strict=True)] for name in ways}
    report("fusion step, CPU seconds", whole, baseline, args, **shapes)
    for part in PARTS:
        report(f"fusion step, {part}", parts[part], baseline, args, **shapes)


if __name__ == "__main__":
    main()
