"""
Two processes against one, of one thread each: `examples/finetune.py` on the embedded data, started by `accelerate
launch`, with the same number of rows per step. Prints metrics of both and rows per second as a ratio.

    python benchmarks/processes.py --output_dir processes
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

from datasets import disable_progress_bars
from rich.console import Console
from rich.table import Table
from transformers import AutoModel, BertConfig, ResNetConfig, set_seed

from mm_transformers.cli.demo_model import make_processor
from mm_transformers.data.embedded import TASK_LABELS, load_demo_dataset


ROOT = Path(__file__).parents[1]
BATCH_SIZE = 64


def write_data(folder: Path) -> list[str]:
    """CSV files with pictures beside them; the texts of the training rows."""
    texts: list[str] = []
    for split, rows in load_demo_dataset(seed=0).items():
        pictures, lines = folder / split, []
        pictures.mkdir(parents=True, exist_ok=True)
        for i, row in enumerate(rows):
            row["image"].save(pictures / f"{i}.png")
            lines.append(
                {"text": row["text"], "image": f"{split}/{i}.png", **{task: row[task] for task in TASK_LABELS}}
            )
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        texts += list(rows["text"]) if split == "train" else []
    return texts


def write_encoders(folder: Path, texts: list[str]) -> None:
    """Those of the demo, with new weights."""
    set_seed(0)
    processor = make_processor(texts)
    text = BertConfig(
        vocab_size=len(processor.tokenizer), hidden_size=64, num_hidden_layers=1, num_attention_heads=4,
        intermediate_size=128, max_position_embeddings=64, initializer_range=0.1,
        pad_token_id=processor.tokenizer.pad_token_id,
    )  # fmt: skip
    vision = ResNetConfig(embedding_size=16, hidden_sizes=[16, 32, 64], depths=[1, 1, 1], layer_type="basic")
    AutoModel.from_config(text).save_pretrained(folder / "text")
    processor.tokenizer.save_pretrained(folder / "text")
    AutoModel.from_config(vision).save_pretrained(folder / "vision")
    processor.image_processor.save_pretrained(folder / "vision")


def run(folder: Path, processes: int, steps: int, learning_rate: float, seed: int) -> dict[str, float]:
    output = folder / f"out-{processes}-{seed}"
    launcher = [sys.executable, "-m", "accelerate.commands.launch"]
    launcher += ["--config_file", str(ROOT / "examples/accelerate_configs/cpu.yaml"), "--num_processes", str(processes)]
    script = [sys.executable] if processes == 1 else launcher
    options = {
        "text": folder / "text", "vision": folder / "vision", "num_fusion_layers": 1, "train_vision": True,
        "train_file": folder / "train.jsonl", "validation_file": folder / "test.jsonl",
        "tasks": ",".join(f"{task}:classification" for task in TASK_LABELS), "output_dir": output,
        "max_steps": steps, "per_device_train_batch_size": BATCH_SIZE // processes, "learning_rate": learning_rate,
        "lr_scheduler_type": "cosine", "warmup_steps": 20, "weight_decay": 0.01, "report_to": "none", "seed": seed,
        "save_strategy": "no", "per_device_eval_batch_size": 128, "disable_tqdm": True, "logging_steps": steps,
    }  # fmt: skip
    command = [*script, str(ROOT / "examples/finetune.py"), "--do_train", "--do_eval", "--use_cpu"]
    command += [str(word) for name, value in options.items() for word in (f"--{name}", value)]
    environment = {
        **os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HOME": str(folder / "cache"),
        "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")]),
    }  # fmt: skip
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stdout}\n{done.stderr}")
    train = json.loads((output / "train_results.json").read_text())
    metrics = json.loads((output / "eval_results.json").read_text())
    accuracies = {task: metrics[f"eval_{task}_accuracy"] for task in TASK_LABELS}
    return {"rows_per_second": train["train_samples_per_second"], **accuracies, "eval_loss": metrics["eval_loss"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("processes"))
    parser.add_argument("--steps", type=int, default=400, help="optimiser steps, of 64 rows each (%(default)s)")
    parser.add_argument("--learning_rate", type=float, default=4e-3, help="(%(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    disable_progress_bars()
    folder = args.output_dir.resolve()
    write_encoders(folder, write_data(folder))
    results = {n: run(folder, n, args.steps, args.learning_rate, args.seed) for n in (1, 2)}
    table = Table(title=f"{args.steps} steps of {BATCH_SIZE} rows, one thread per process; accuracy in %")
    for column in ("processes", *TASK_LABELS, "loss", "rows/s"):
        table.add_column(column, justify="right")
    for n, row in results.items():
        cells = [f"{100 * row[task]:.1f}" for task in TASK_LABELS]
        table.add_row(str(n), *cells, f"{row['eval_loss']:.3f}", f"{row['rows_per_second']:.0f}")
    ratio = results[2]["rows_per_second"] / results[1]["rows_per_second"]
    Console().print(table)
    found = {"benchmark": "processes", "steps": args.steps, "ratio": round(ratio, 3), "results": results}
    (folder / "results.json").write_text(json.dumps(found, indent=2) + "\n")
    print(json.dumps(found))


if __name__ == "__main__":
    main()
