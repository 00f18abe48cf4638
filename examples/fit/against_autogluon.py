"""
`fit` and AutoGluon MultiModal with the same encoders, the same rows and the same minutes, one after the other.

    python examples/stamps/build_dataset.py --output_dir whole --missing_images 0 --missing_texts 0 --missing_labels 0
    python examples/fit/against_autogluon.py --data whole --text my-text-encoder --vision my-vision \
        --autogluon autogluon/bin/python --minutes 10 5

The head of `examples/race/peers/fit_autogluon.py` says how to install AutoGluon. Minutes are seconds of the clock, so
nothing else should run. Results are printed, and written to `against_autogluon.json` beside this script.
"""

import argparse
import json
import resource
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

import datasets
from sklearn.metrics import accuracy_score, f1_score

from mm_transformers import fit


PEER = Path(__file__).parents[1] / "race" / "peers" / "fit_autogluon.py"
SPLITS = ("train", "validation", "test")


def cpu_seconds() -> float:
    """Of this process and of its children."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


def of_fit(rows: dict[str, datasets.Dataset], label: str, args: argparse.Namespace, folder: Path, minutes: float):
    result = fit(
        rows["train"], [f"{label}:classification"], folder / "fit", validation=rows["validation"], test=rows["test"],
        text=str(args.text), vision=str(args.vision), minutes=minutes, report=False, training={"report_to": "none"},
        preset=args.preset,
    )  # fmt: skip
    return {name: result.metrics["test"][f"test_{label}_{name}"] for name in ("accuracy", "f1")}


def of_autogluon(rows: dict[str, datasets.Dataset], label: str, args: argparse.Namespace, folder: Path, minutes: float):
    inputs = folder / "autogluon"
    inputs.mkdir()
    for split in SPLITS:
        shutil.copy(args.data / f"{split}.parquet", inputs)
    command = [args.autogluon, PEER, "--folder", inputs, "--label", label, "--text", args.text, "--vision", args.vision]
    subprocess.run([*map(str, command), "--minutes", str(minutes)], check=True)
    answers = json.loads((inputs / "answers.json").read_text())["answers"]["test"]
    truth = rows["test"][label]
    return {"accuracy": accuracy_score(truth, answers), "f1": f1_score(truth, answers, average="macro")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with train.parquet, validation.parquet, ...")
    parser.add_argument("--label", default="category")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--vision", type=Path, required=True)
    parser.add_argument("--autogluon", type=Path, required=True, help="the Python that has AutoGluon")
    parser.add_argument("--minutes", type=float, nargs="+", default=[10, 5])
    parser.add_argument("--preset", default="fast")
    parser.add_argument("--methods", nargs="+", choices=["fit", "autogluon"], default=["fit", "autogluon"])
    parser.add_argument("--output", type=Path, default=Path(__file__).with_suffix(".json"))
    args = parser.parse_args()
    columns = ["text", "image", args.label]
    rows = {
        split: datasets.Dataset.from_parquet(str(args.data / f"{split}.parquet")).select_columns(columns)
        for split in SPLITS
    }
    methods = {"fit": of_fit, "autogluon": of_autogluon}
    results = json.loads(args.output.read_text()) if args.output.exists() else []
    for minutes in args.minutes:
        for name in args.methods:
            began, used = time.monotonic(), cpu_seconds()
            with tempfile.TemporaryDirectory() as folder:
                scores = methods[name](rows, args.label, args, Path(folder), minutes)
            spent = {"seconds": round(time.monotonic() - began), "cpu_seconds": round(cpu_seconds() - used)}
            results.append({"method": name, "minutes": minutes, **scores, **spent})
            print(results[-1], flush=True)
            args.output.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
