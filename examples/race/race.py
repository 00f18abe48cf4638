"""
The race: a fused model with defaults beside cheap models of the same features, on real data.

    python examples/race/race.py --stamps stamps_data --emoji emoji_style_data --text encoders/minilm \
        --vision encoders/lite0 --output docs/results/race.jsonl --splits 5
    python examples/race/render.py          # the tables of docs/race.md

The folders are those of examples/stamps, examples/emoji/build_styles.py and examples/pretrained. What has been measured
is a line of the output, and is not measured again; the script may be killed at any time. `--data`, `--methods`,
`--missing` and `--labels` choose a part, `--minutes` ends the script in time.
"""

import argparse
import json
import os
import platform
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import numpy as np
import sklearn
import torch
import transformers


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))
from baselines import CHEAP, Baselines, FeatureStore, scores, timed
from real_data import import_script

from mm_transformers import (
    Classification,
    FeatureCache,
    MMTrainer,
    MMTrainingArguments,
    MMTransformerForMultiTask,
    MMTransformerProcessor,
)


EXAMPLES = Path(__file__).resolve().parents[1]
# Name -> which pool, the column of the labels, and what `load_split` takes.
DATA: dict[str, tuple[str, str, dict[str, Any]]] = {
    "stamps": ("stamps", "category", {"variant": "plain"}),
    "stamps, hard": ("stamps", "category", {"variant": "hard"}),
    "emoji": ("emoji", "group", {}),
}
BUILDERS = {"stamps": "stamps/build_dataset.py", "emoji": "emoji/build_styles.py"}
# Shares of rows without a picture in the training rows -> those of the test rows.
SHARES = {0.0: (0.0, 0.3, 0.7), 0.3: (0.3,), 0.7: (0.7,)}
LABELS = (1.0, 0.1)
MISSING_TEXTS = 0.05
OURS = ("ours", "ours_frozen", "ours_all_trained", "ours_text", "ours_image")
PEERS = ("autogluon", "ludwig")
METHODS = (*CHEAP, *OURS, *PEERS)
# Those whose vision encoder is frozen.
CACHED = ("ours", "ours_frozen", "ours_image")
# What only the complete data with all labels are asked about.
ONLY_COMPLETE = ("ours_text", "ours_image")


class Setting(NamedTuple):
    """
    One training: what every method is given.

    Args:
        data: key of `DATA`.
        split: seed of the split, and of the methods.
        missing: share of training and validation rows without a picture.
        labels: share of training and validation rows that are kept; the others are left out.
    """

    data: str
    split: int
    missing: float
    labels: float


class Problem:
    """
    The rows of one setting.

    Args:
        parts: share without a picture -> what `load_split` gives for it.
        column: of the labels.
        classes: all labels of the data set, sorted.
    """

    def __init__(self, setting: Setting, parts: dict[float, datasets.DatasetDict], column: str, classes: list[str]):
        self.setting, self.column, self.classes = setting, column, classes
        own = parts[setting.missing]
        self.train = keep_labels(own["train"], column, setting.labels, setting.split)
        self.validation = keep_labels(own["validation"], column, setting.labels, setting.split)
        self.tests = {share: parts[share]["test"] for share in SHARES[setting.missing]}
        # Which baseline is the best for a share of missing pictures is chosen on validation rows with that share.
        self.validations = {
            share: keep_labels(parts[share]["validation"], column, setting.labels, setting.split)
            for share in SHARES[setting.missing]
        }

    def labels_of(self, rows: datasets.Dataset) -> np.ndarray:
        return np.array([self.classes.index(label) for label in rows[self.column]])


def keep_labels(rows: datasets.Dataset, column: str, share: float, seed: int) -> datasets.Dataset:
    """This share of the rows of each class, at least one of each; the same rows whichever pictures are missing."""
    if share == 1:
        return rows
    places: dict[str, list[int]] = {}
    for i, label in enumerate(rows[column]):
        places.setdefault(label, []).append(i)
    kept = []
    for label, found in sorted(places.items()):
        kept += random.Random(f"{seed}/{label}").sample(found, max(1, round(share * len(found))))
    return rows.select(sorted(kept))


@dataclass
class Race:
    """
    Args:
        pools: "stamps" and "emoji" -> folder with `all.parquet`.
        text, vision: folders of the encoders.
        cache: folder for features and for what trainings write; may be deleted afterwards.
        emoji_rows: at most so many training rows of the emoji.
        peers: "autogluon" and "ludwig" -> the Python interpreter of its environment.
    """

    pools: dict[str, Path]
    text: Path
    vision: Path
    cache: Path
    emoji_rows: int = 600
    peers: dict[str, Path] | None = None

    def __post_init__(self):
        self._parts: dict[tuple[str, int], tuple[dict[float, datasets.DatasetDict], str, list[str]]] = {}
        self._baselines: tuple[Setting, Baselines] | None = None

    @cached_property
    def store(self) -> FeatureStore:
        return FeatureStore(self.cache / "means", self.text, self.vision)

    def problem(self, setting: Setting) -> Problem:
        key = setting.data, setting.split
        if key not in self._parts:
            pool, column, options = DATA[setting.data]
            builder = import_script(EXAMPLES / BUILDERS[pool])
            if pool == "emoji":
                options = {**options, "rows": self.emoji_rows}
            file = self.pools[pool] / "all.parquet"
            parts = {
                share: builder.load_split(
                    file, setting.split, missing_images=share, missing_texts=MISSING_TEXTS, missing_labels=0, **options
                )
                for share in SHARES
            }
            classes = sorted({label for part in parts[0.0].values() for label in part[column]})
            self._parts = {key: (parts, column, classes)}
        return Problem(setting, *self._parts[key])

    def run(self, setting: Setting, method: str) -> dict[str, Any]:
        """The line of one method: its scores on each test, seconds, and what it chose."""
        problem = self.problem(setting)
        if method in CHEAP:
            found = self._run_cheap(problem, method)
        elif method in PEERS:
            found = self._run_peer(problem, method)
        else:
            found = self._run_ours(problem, method)
        return {**setting._asdict(), "method": method, **found, "machine": machine(), "versions": versions()}

    # Cheap models

    def _run_cheap(self, problem: Problem, method: str) -> dict[str, Any]:
        def known(rows: datasets.Dataset) -> tuple[Any, np.ndarray]:
            features, _ = self.store.features(undecoded(rows))
            return features, problem.labels_of(rows)

        train, encoding = self.store.features(undecoded(problem.train))
        if self._baselines is None or self._baselines[0] != problem.setting:
            fitter = Baselines(
                (train, problem.labels_of(problem.train)),
                known(problem.validation),
                len(problem.classes),
                problem.setting.split,
            )
            self._baselines = problem.setting, fitter
        fitted = self._baselines[1].fit(method)

        def measured(rows: datasets.Dataset) -> dict[str, float]:
            features, truth = known(rows)
            return scores(truth, fitted.probabilities(features).argmax(1))

        return {
            "tests": {str(share): measured(rows) for share, rows in problem.tests.items()},
            "validations": {str(share): measured(rows) for share, rows in problem.validations.items()},
            **in_seconds(fitted.seconds + encoding * (method != "majority")),
            "chosen": fitted.chosen,
        }

    # Ours

    def _run_ours(self, problem: Problem, method: str) -> dict[str, Any]:
        encoders: dict[str, Any] = {"text": str(self.text), "vision": str(self.vision)}
        train, validation, tests = problem.train, problem.validation, {str(k): v for k, v in problem.tests.items()}
        if method == "ours_text":
            encoders.pop("vision")
        if method == "ours_image":
            train, validation = without(train, "text"), without(validation, "text")
            tests = {name: without(rows, "text") for name, rows in tests.items()}
        sees_both = method not in ONLY_COMPLETE
        if sees_both and problem.setting[2:] == (0.0, 1.0):
            complete = problem.tests[0.0]
            tests["shuffled"] = shuffled(complete, problem.setting.split)
            tests["no picture"], tests["no text"] = without(complete, "image"), without(complete, "text")
        parts = ("text", "image") if "vision" in encoders else ("text",)
        train, validation = (rows.select(with_something(rows, parts)) for rows in (train, validation))
        options: dict[str, Any] = {"ours_frozen": {"freeze": ["text", "vision"]}, "ours_all_trained": {"freeze": []}}
        arguments: dict[str, Any] = {"seed": problem.setting.split, "report_to": [], "disable_tqdm": True}
        folder = tempfile.mkdtemp(prefix="training-", dir=self.cache)
        try:
            with timed() as seconds:
                transformers.set_seed(problem.setting.split)
                trainer = MMTrainer(
                    MMTransformerForMultiTask.from_encoders(
                        **encoders,
                        tasks=[Classification(problem.column, labels=problem.classes)],
                        **options.get(method, {}),
                    ),
                    MMTrainingArguments(folder, **arguments),
                    processing_class=MMTransformerProcessor.from_encoders(**encoders),
                    train_dataset=train,
                    eval_dataset=validation,
                    # It changes no answer.
                    feature_cache=FeatureCache(self.cache / "features") if method in CACHED else None,
                )
                trainer.train()

            def measured(rows: datasets.Dataset) -> dict[str, float]:
                # The model refuses rows of which it sees nothing; they get the most frequent class.
                answers = np.full(len(rows), np.bincount(problem.labels_of(train)).argmax())
                known = with_something(rows, parts)
                if len(known):
                    logits = trainer.predict(rows.select(known)).predictions
                    logits = logits[problem.column] if isinstance(logits, dict) else logits
                    answers[known] = np.asarray(logits).argmax(1)
                return scores(problem.labels_of(rows), answers)

            found = {
                "tests": {name: measured(rows) for name, rows in tests.items()},
                "validations": {str(problem.setting.missing): measured(validation)},
                **in_seconds(seconds),
            }
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        curve = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
        found["chosen"] = {
            "best_step": trainer.state.best_global_step,
            "steps": trainer.state.global_step,
            "validation_loss": [round(entry["eval_loss"], 4) for entry in curve],
        }
        if sees_both and problem.column in trainer.linear_models:
            linear = trainer.linear_models[problem.column]

            def of_start(rows: datasets.Dataset) -> dict[str, float]:
                # The features that the probe sees, in its order.
                features = self.store.features(undecoded(rows))[0].matrix(("text", "image"))
                return scores(problem.labels_of(rows), linear(features).argmax(1))

            found["start"] = {str(share): of_start(rows) for share, rows in problem.tests.items()}
        for verdict in trainer.verdicts:
            found["verdict"] = {
                "metric": verdict.metric,
                "model": verdict.model,
                "linear": verdict.linear,
                "text_alone": verdict.text_alone,
                "majority": verdict.majority,
                "kept_start": verdict.kept_start,
            }
        return found

    # Others' packages, each in an environment of its own

    def _run_peer(self, problem: Problem, method: str) -> dict[str, Any]:
        folder = Path(tempfile.mkdtemp(prefix=f"{method}-", dir=self.cache))
        try:
            parts = {"train": problem.train, "validation": problem.validation}
            parts |= {f"test {share}": rows for share, rows in problem.tests.items()}
            for name, rows in parts.items():
                columns = undecoded(rows).select_columns(["text", "image", problem.column])
                # For packages that cannot load the vision encoder.
                means = self.store.features(columns)[0].image.tolist()
                columns.add_column("image_means", means).to_parquet(folder / f"{name}.parquet")
            command = [
                str((self.peers or {})[method]), str(Path(__file__).parent / "peers" / f"fit_{method}.py"),
                "--folder", str(folder), "--label", problem.column, "--text", str(self.text),
                "--vision", str(self.vision), "--seed", str(problem.setting.split),
            ]  # fmt: skip
            subprocess.run(command, check=True)
            answers = json.loads((folder / "answers.json").read_text())
        finally:
            shutil.rmtree(folder, ignore_errors=True)

        def measured(name: str, rows: datasets.Dataset) -> dict[str, float]:
            found = np.array([problem.classes.index(label) for label in answers["answers"][name]])
            return scores(problem.labels_of(rows), found)

        return {
            "tests": {str(share): measured(f"test {share}", rows) for share, rows in problem.tests.items()},
            "validations": {str(problem.setting.missing): measured("validation", problem.validation)},
            "seconds": answers["seconds"],
            "cpu_seconds": answers["cpu_seconds"],
            "chosen": answers["chosen"],
        }


def undecoded(rows: datasets.Dataset) -> datasets.Dataset:
    return rows.cast_column("image", datasets.Image(decode=False))


def replaced(rows: datasets.Dataset, column: str, values: Sequence[Any]) -> datasets.Dataset:
    table = undecoded(rows).to_list()
    for row, value in zip(table, values, strict=True):
        row[column] = value
    return datasets.Dataset.from_list(table, features=rows.features)


def without(rows: datasets.Dataset, column: str) -> datasets.Dataset:
    return replaced(rows, column, [None] * len(rows))


def with_something(rows: datasets.Dataset, parts: Sequence[str]) -> np.ndarray:
    """The numbers of the rows that have at least one of these parts."""
    columns = undecoded(rows)
    return np.flatnonzero(np.any([[cell is not None for cell in columns[part]] for part in parts], axis=0))


def shuffled(rows: datasets.Dataset, seed: int) -> datasets.Dataset:
    """Each picture goes to the row of another; rows without one stay so."""
    images = undecoded(rows)["image"]
    there = [i for i, image in enumerate(images) if image is not None]
    random.Random(seed).shuffle(there)
    moved = list(images)
    for source, target in zip(there, there[1:] + there[:1], strict=True):
        moved[target] = images[source]
    return replaced(rows, "image", moved)


def in_seconds(taken: np.ndarray) -> dict[str, float]:
    return {"seconds": round(float(taken[0]), 2), "cpu_seconds": round(float(taken[1]), 2)}


def machine() -> str:
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{os.cpu_count()} CPU cores"
    return f"{name} ({platform.machine()}), {torch.get_num_threads()} threads"


def versions() -> dict[str, str]:
    return {"torch": torch.__version__, "transformers": transformers.__version__, "scikit-learn": sklearn.__version__}


# Results


def key_of(line: dict[str, Any]) -> tuple[Setting, str]:
    return Setting(*(line[name] for name in Setting._fields)), line["method"]


def read_lines(file: Path) -> list[dict[str, Any]]:
    """The lines of a result file; what was half written when the script was killed is cut off."""
    if not file.is_file():
        return []
    written = file.read_bytes()
    whole = written[: written.rfind(b"\n") + 1]
    if len(whole) < len(written):
        with open(file, "r+b") as opened:
            opened.truncate(len(whole))
    return [json.loads(line) for line in whole.decode().splitlines()]


def add_line(file: Path, line: dict[str, Any]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with open(file, "ab") as opened:
        opened.write(json.dumps(line).encode() + b"\n")
        opened.flush()
        os.fsync(opened.fileno())


def jobs(
    data: Sequence[str] = tuple(DATA),
    splits: Sequence[int] = range(5),
    methods: Sequence[str] = METHODS,
    missing: Sequence[float] = tuple(SHARES),
    labels: Sequence[float] = LABELS,
) -> Iterator[tuple[Setting, str]]:
    """All trainings, split by split, so that what there is after some hours is paired."""
    for split in splits:
        for name in data:
            for share in labels:
                for gone in missing:
                    setting = Setting(name, split, gone, share)
                    for method in methods:
                        is_complete = (gone, share) == (0.0, 1.0)
                        if method in ONLY_COMPLETE and not is_complete:
                            continue
                        # The slow ones: four cells of the plain data.
                        if method in PEERS and (name == "stamps, hard" or not is_complete):
                            continue
                        yield setting, method


def run_all(
    run: Callable[[Setting, str], dict[str, Any]],
    wanted: Iterator[tuple[Setting, str]],
    output: Path,
    minutes: float | None = None,
) -> int:
    """
    Runs what the output does not have yet.

    Args:
        run: gives the line of a setting and a method.
        minutes: nothing new is begun after so many.

    Returns:
        How many lines were added.
    """
    done = {key_of(line) for line in read_lines(output)}
    began, added = time.monotonic(), 0
    for setting, method in wanted:
        if (setting, method) in done:
            continue
        if minutes is not None and time.monotonic() - began > 60 * minutes:
            print("The time is up.", flush=True)
            break
        line = run(setting, method)
        add_line(output, line)
        added += 1
        tests = ", ".join(f"{name}: {100 * test['f1']:.1f}" for name, test in line["tests"].items())
        print(f"{' '.join(map(str, setting))} {method}: macro F1 {tests} ({line['seconds']:.0f} s)", flush=True)
    return added


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stamps", type=Path, help="folder with all.parquet of examples/stamps/build_dataset.py")
    parser.add_argument("--emoji", type=Path, help="folder with all.parquet of examples/emoji/build_styles.py")
    parser.add_argument("--text", type=Path, required=True, help="folder of the text encoder")
    parser.add_argument("--vision", type=Path, required=True, help="folder of the vision encoder")
    parser.add_argument("--output", type=Path, default=Path("docs/results/race.jsonl"), help="lines (%(default)s)")
    parser.add_argument("--cache", type=Path, default=Path("race_cache"), help="folder for features (%(default)s)")
    parser.add_argument("--splits", type=int, default=5, help="number of splits (%(default)s)")
    parser.add_argument("--first_split", type=int, default=0, help="seed of the first split (%(default)s)")
    parser.add_argument("--data", nargs="+", choices=DATA, help="by default all whose folder is given")
    parser.add_argument("--methods", nargs="+", choices=[*METHODS, "cheap"], help='"cheap": all without training')
    parser.add_argument("--missing", nargs="+", type=float, choices=SHARES, default=list(SHARES), help="in training")
    parser.add_argument("--labels", nargs="+", type=float, choices=LABELS, default=list(LABELS), help="share of them")
    parser.add_argument("--emoji_rows", type=int, default=600, help="training rows of the emoji (%(default)s)")
    parser.add_argument("--minutes", type=float, help="begin nothing new after so many")
    for peer in PEERS:
        parser.add_argument(f"--{peer}", type=Path, metavar="PYTHON", help=f"interpreter that has {peer}")
    args = parser.parse_args(arguments)
    pools = {name: folder for name in ("stamps", "emoji") if (folder := getattr(args, name)) is not None}
    for name, folder in pools.items():
        if not (folder / "all.parquet").is_file():
            parser.error(f"{folder} has no all.parquet: make it by examples/{BUILDERS[name]}.")
    peers = {name: path for name in PEERS if (path := getattr(args, name)) is not None}
    data = args.data or [name for name in DATA if DATA[name][0] in pools]
    for name in data:
        if DATA[name][0] not in pools:
            parser.error(f"--data {name!r} needs --{DATA[name][0]}.")
    methods = [method for method in METHODS if method not in PEERS or method in peers]
    if args.methods:
        chosen = [name for method in args.methods for name in (CHEAP if method == "cheap" else [method])]
        for peer in set(chosen) & set(PEERS) - set(peers):
            parser.error(f"--methods {peer} needs --{peer} with the interpreter of its environment.")
        methods = [method for method in METHODS if method in chosen]
    args.cache.mkdir(parents=True, exist_ok=True)
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    race = Race(pools, args.text, args.vision, args.cache, args.emoji_rows, peers)
    splits = range(args.first_split, args.first_split + args.splits)
    added = run_all(race.run, jobs(data, splits, methods, args.missing, args.labels), args.output, args.minutes)
    print(f"Added {added:,} lines to {args.output}.")


if __name__ == "__main__":
    main()
