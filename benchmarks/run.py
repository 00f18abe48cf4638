"""
Runs the benchmarks one after the other, writes their lines of JSON to a file, and renders docs/benchmarks from it.

    python benchmarks/run.py quick     # under five minutes on two cores; renders nothing
    python benchmarks/run.py cpu       # all figures of docs/benchmarks for the CPU
    python benchmarks/run.py serve     # the server under 200 clients, about 15 minutes
    python benchmarks/run.py gpu       # those for a GPU
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path


FOLDER = Path(__file__).parent
BF16 = "--dtype bfloat16"

PLANS = {
    "quick": [
        "floor.py --size tiny --repeats 5",
        "peers.py --size tiny --repeats 5 --image_size 112",
        "shared_images.py --size small --repeats 2 --image_size 112 --texts_per_image 5",
        "absent_images.py --size tiny --repeats 5",
        "tasks.py --size tiny --repeats 5",
        "fusion_kinds.py --size tiny --repeats 2 --words 32 --tokens 197 --images 1",
        "inputs.py --rows 16 --repeats 2",
        "padding.py --size tiny --rows 128 --repeats 1",
        "evaluation.py --rows 256 1024",
        "generation.py --width 128 --layers 2 --repeats 3",
        "imports.py --repeats 1",
        "explanations.py --size tiny --rows 16 --repeats 3",
    ],
    "cpu": [
        "floor.py --size small",
        "floor.py --size base --rows 4 --repeats 5",
        "peers.py --size base --rows 4 --repeats 3 --peers BridgeTower FLAVA",
        "peers.py --size base --rows 2 --repeats 2 --peers ViLT VisionTextDualEncoder LXMERT",
        "shared_images.py --size base --rows 20 --repeats 2 --texts_per_image 2 5 10",
        "absent_images.py --size small",
        "tasks.py --size base --rows 4 --image_size 64 --repeats 3",
        "fusion_kinds.py --size small --rows 4 --repeats 2 --words 32 512 --images 1 8",
        "token_reduction.py --steps 240",
        "inputs.py",
        "padding.py --repeats 2",
        "evaluation.py",
        "memory.py --size small --rows 8 32",
        "generation.py",
        "export_writing.py --threads 1",
        "language_model.py --threads 1 --repeats 5",
        "imports.py --repeats 3",
        "loading.py --size base --repeats 2",
        "growth.py --size small",
        "levers.py --size small",
        "explanations.py --size small --rows 32",
        "probe_start.py --rows 560 --threads 1",
    ],
    "serve": [
        "serve.py --size small --seconds 300 --stock_seconds 60 --inputs texts",
        "serve.py --size small --seconds 60 --inputs pictures shared_pictures",
        "serve.py --size small --seconds 60 --inputs overload kill",
    ],
    "gpu": [
        f"floor.py --size base --rows 32 {BF16}",
        f"floor.py --size base --rows 256 {BF16}",
        f"floor.py --size large --rows 64 {BF16}",
        f"peers.py --size base --rows 64 {BF16}",
        f"shared_images.py --size base --rows 320 --texts_per_image 1 2 5 10 --repeats 5 {BF16}",
        f"absent_images.py --size base --rows 128 {BF16}",
        f"tasks.py --size base --rows 64 --image_size 224 {BF16}",
        f"fusion_kinds.py --size base --rows 64 {BF16}",
        f"memory.py --size base --rows 32 64 128 {BF16}",
        f"generation.py {BF16}",
        f"growth.py --size base {BF16}",
        f"inputs.py --size base --rows 256 --batch_size 64 --workers 0 4 8 12 {BF16}",
        "levers.py --size base --rows 4",
        "levers.py --size base --rows 64",
    ],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("plan", choices=PLANS)
    parser.add_argument("--output", type=Path, help="defaults to benchmarks/results/PLAN.jsonl; quick keeps nothing")
    parser.add_argument("--only", nargs="+", help="scripts to run again; the lines of the others stay")
    args = parser.parse_args()
    plan = [line for line in PLANS[args.plan] if args.only is None or line.split()[0] in args.only]
    output = args.output
    if output is None and args.plan != "quick":
        output = FOLDER / "results" / f"{args.plan}.jsonl"
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        kept = output.read_text().splitlines() if args.only and output.exists() else []
        again = [f"benchmarks/{name} " for name in args.only or []]
        kept = [line for line in kept if not any(name in f"{json.loads(line)['command']} " for name in again)]
        output.write_text("".join(f"{line}\n" for line in kept))
    failed, begun = [], time.perf_counter()
    for number, line in enumerate(plan, 1):
        name, *arguments = line.split()
        start = time.perf_counter()
        print(f"[{number}/{len(plan)}] {line}", file=sys.stderr, flush=True)
        target = [] if output is None else ["--output", str(output)]
        if subprocess.run([sys.executable, str(FOLDER / name), *arguments, *target], check=False).returncode:
            failed.append(line)
        print(f"    {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
    print(f"{(time.perf_counter() - begun) / 60:.1f} minutes", file=sys.stderr)
    if failed:
        sys.exit(f"Failed: {'; '.join(failed)}")
    if output is not None and args.output is None:
        subprocess.run([sys.executable, str(FOLDER / "render.py")], check=True)


if __name__ == "__main__":
    main()
