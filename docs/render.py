"""
Writes the tables of README.md and of the pages in docs/ and examples/ from docs/results/*.json, between the comments
that ask for them:

    <!-- table: demo --> ... <!-- end -->

The result files are those that the commands write. To take a new one and write the pages again:

    mm-transformers demo
    python docs/render.py --take demo=demo-output/results.json

tests/project/test_figures.py checks that the pages hold what this script writes.
"""

import argparse
import json
import re
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any


ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "docs" / "results"
PLACE = re.compile(r"(<!-- table: (\w+) -->\n)(.*?)(<!-- end -->)", re.DOTALL)

# Name of a table -> the result file that it is made of, and the function that makes it.
TABLES: dict[str, tuple[str, Callable[[Any], str]]] = {}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--take", nargs="+", default=[], metavar="NAME=FILE", help="result files to copy first")
    for taken in parser.parse_args().take:
        name, _, path = taken.partition("=")
        if name not in {file for file, _ in TABLES.values()}:
            parser.error(f"No table is made of {name!r}; known are {', '.join(result_files())}.")
        text = Path(path).read_text()
        json.loads(text)
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / f"{name}.json").write_text(text)
    for page in pages():
        text = page.read_text()
        if (new := rendered(text)) != text:
            page.write_text(new)
            print(f"Wrote {page.relative_to(ROOT)}.")


def pages() -> list[Path]:
    """All pages that may hold tables."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")), *sorted((ROOT / "examples").glob("*/*.md"))]


def result_files() -> list[str]:
    return sorted({file for file, _ in TABLES.values()})


def rendered(text: str) -> str:
    """
    The text of a page with its tables as the result files have them.

    Raises:
        ValueError: if a comment asks for a table that is not known, or whose result file is missing.
    """

    def filled(match: re.Match) -> str:
        start, name, _, end = match.groups()
        if name not in TABLES:
            raise ValueError(f"The comment {start.strip()} asks for an unknown table; known are {', '.join(TABLES)}.")
        file, make = TABLES[name]
        path = RESULTS / f"{file}.json"
        if not path.exists():
            raise ValueError(f"The table {name!r} needs {path.relative_to(ROOT)}: write it by --take {file}=FILE.")
        return f"{start}{make(json.loads(path.read_text()))}\n{end}"

    return PLACE.sub(filled, text)


def renders(name: str, file: str | None = None) -> Callable:
    """Decorator of a function that makes the table `name` of the content of `docs/results/<file or name>.json`."""

    def register(make: Callable[[Any], str]) -> Callable[[Any], str]:
        TABLES[name] = (file or name, make)
        return make

    return register


# What tables are made of


def as_table(head: list[str], rows: list[list[str]], numbers: int | None = None) -> str:
    """The last `numbers` columns, by default all but the first, are right-aligned."""
    left = len(head) - (len(head) - 1 if numbers is None else numbers)
    rule = "|" + "---|" * left + "--:|" * (len(head) - left)
    return "\n".join([f"| {' | '.join(head)} |".replace("|  |", "| |"), rule, *(f"| {' | '.join(r)} |" for r in rows)])


def percent(value: float) -> str:
    return f"{100 * value:.1f}"


def mean_and_spread(values: list[float], factor: float = 100) -> str:
    """Mean and, of several values, standard deviation; a dash if there is none."""
    values = [factor * value for value in values if value == value]
    spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{spread}" if values else "–"


def with_best_bold(cells: list[str]) -> list[str]:
    """The highest of a column in bold, if it is one alone."""
    means = [float(re.match(r"[\d.]+", cell)[0]) if cell[0].isdigit() else -1.0 for cell in cells]
    alone = means.count(max(means)) == 1
    return [
        re.sub(r"^[\d.]+", r"**\g<0>**", cell) if alone and mean == max(means) else cell
        for cell, mean in zip(cells, means, strict=True)
    ]


def bold_columns(rows: list[list[str]], skip: int = 0) -> list[list[str]]:
    """Rows of a title and numbers, the best of each column in bold; the last `skip` rows are no candidates."""
    compared = rows[: len(rows) - skip]
    columns = [[row[0] for row in compared]]
    columns += [with_best_bold([row[i] for row in compared]) for i in range(1, len(rows[0]))]
    return [list(row) for row in zip(*columns, strict=True)] + rows[len(compared) :]


# The tables

_MAJORITY = "always the commonest class"
_TITLES = {
    _MAJORITY: "majority class",
    "fused, no picture": "the same model, no picture",
    "fused, no sound": "the same model, no sound (rows with a text)",
    "fused, pictures shuffled": "the same model, pictures shuffled",
    "fused, sounds shuffled": "the same model, sounds shuffled",
}
_TASKS = {"sentiment": "sentiment", "topic": "topic", "intent": "intent", "german": "German", "french": "French"}


@renders("demo")
def demo(results: dict[str, Any]) -> str:
    titles = {
        "fused": "fused", "text only": "text only", "image only": "image only",
        "shuffled pictures": "fused, pictures shuffled", "no picture": "fused, no picture",
        "majority": "majority class", "best from text": "best possible from text",
        "best from image": "best possible from image",
    }  # fmt: skip
    accuracy, likelier = results["accuracy"], results["contrastive_accuracy"]["german"]
    rows = [[title, *(percent(accuracy[task][column]) for task in _TASKS)] for column, title in titles.items()]
    table = as_table(["", *_TASKS.values()], bold_columns(rows))
    shares = [percent(likelier[view]) for view in ("fused", "no picture", "shuffled pictures")]
    return (
        f"{table}\n\nThe right German noun is likelier than that of the other sense in {shares[0]}% of the rows, in "
        f"{shares[1]}% without the picture\nand in {shares[2]}% with a shuffled one (the measure of "
        "[CoMMuTE](https://arxiv.org/abs/2212.10140))."
    )


@renders("missing_pictures")
def missing_pictures(results: dict[str, Any]) -> str:
    from mm_transformers.data.embedded import best_possible_accuracy

    limits, rows = best_possible_accuracy(), []
    for name, scores in results["scores"].items():
        for number, share in enumerate(scores["sentiment"]):
            missing = float(share.rstrip("%")) / 100
            with_dropout = "dropout" in name and not name.startswith("no")
            cells = []
            for task in _TASKS:
                best = (1 - missing) * limits[task]["both"] + missing * limits[task]["text"]
                mean = percent(statistics.mean(scores[task][share]))
                cells.append(mean if with_dropout else f"{mean} ({percent(best)})")
            title = f"{share}, trained with modality {name}" if with_dropout and number == 0 else share
            rows.append([title, *cells])
    return as_table(["pictures missing", *_TASKS.values()], rows)


@renders("emoji")
def emoji(results: dict[str, Any]) -> str:
    counts, accuracy = results["rows"], results["accuracy"]
    columns = {"group": "group", "group_ambiguous": "group, ambiguous keywords", "polarity": "polarity"}
    head = ["what the model sees", *(f"{title} ({counts[name]:,} rows)" for name, title in columns.items())]
    rows = [
        [_TITLES.get(name, name), *(mean_and_spread(values[column]) for column in columns)]
        for name, values in accuracy.items()
    ]
    return as_table(head, bold_columns(rows))


@renders("speech")
def speech(results: dict[str, Any]) -> str:
    runs = dict(results["accuracy"])
    runs[_MAJORITY] = runs.pop(_MAJORITY)
    columns = list(runs[_MAJORITY][0])
    titles = {**_TITLES, "text alone": "text alone (rows with a text)"}
    rows = [
        [titles.get(name, name), *(mean_and_spread([run[column] for run in seeds]) for column in columns)]
        for name, seeds in runs.items()
    ]
    return as_table(["what the model has", *columns], bold_columns(rows))


def _weightings(results: dict[str, Any]) -> str:
    scores = results["scores"]
    columns = [name for name in next(iter(next(iter(scores.values())).values())) if name != "seconds"]
    rows = [
        [kind, *(mean_and_spread([run[column] for run in seeds.values()]) for column in columns)]
        for kind, seeds in scores.items()
    ]
    rows.sort(key=lambda row: row[0] != "static")
    names = {**_TASKS, "group_ambiguous": "group, ambiguous keywords"}
    return as_table(["", *(names.get(column, column) for column in columns)], bold_columns(rows))


renders("task_weighting")(_weightings)
renders("task_weighting_emoji")(_weightings)


def _translations(results: dict[str, Any], split: str) -> str:
    measures = {
        "exact_match": ("exact", 100),
        "bleu": ("BLEU", 1),
        "chrf": ("chrF", 1),
        "contrastive": ("likelier", 100),
    }
    runs = results["results"]
    languages = list(next(iter(runs.values()))[split][0])
    head = ["what the model has"]
    for language in languages:
        names = [name for name, _ in measures.values()]
        head += [f"{language.title()}: {names[0]}", *names[1:]]
    rows = []
    for name, splits in runs.items():
        seeds = splits[split]
        cells = [
            mean_and_spread([run[language][measure] for run in seeds], factor)
            for language in languages
            for measure, (_, factor) in measures.items()
        ]
        title = _TITLES.get(name, name)
        rows.append([f"{title} (one seed)" if len(seeds) == 1 else title, *cells])
    return as_table(head, rows)


@renders("translation_new_keyword", "translation")
def translation_new_keyword(results: dict[str, Any]) -> str:
    return _translations(results, "new_keyword")


@renders("translation_new_emoji", "translation")
def translation_new_emoji(results: dict[str, Any]) -> str:
    return _translations(results, "new_emoji")


@renders("compare_tasks")
def compare_tasks(results: dict[str, Any]) -> str:
    from mm_transformers.analysis.task_comparison import as_cells, compare

    runs = results["runs"]
    seeds = [int(seed) for seed in next(iter(runs.values()))]
    comparisons = [c for c in compare(runs, seeds) if c.metric == "accuracy"]
    rows = [[cells[0], *cells[2:]] for cells in map(as_cells, comparisons)]
    table = as_table(["accuracy", "alone", "jointly", "gain by joint training", ""], rows)
    return table.replace("--:|\n", "---|\n", 1)  # the verdict is no number


@renders("export")
def export(results: dict[str, Any]) -> str:
    kinds = list(results["batches"][0]["ratios"])
    head = ["rows, words, images", "eager (ms)", *kinds]
    rows = [
        [batch["shape"], f"{batch['eager_ms']:.1f}", *(f"{ratio:.2f}" for ratio in batch["ratios"].values())]
        for batch in results["batches"]
    ]
    worst = max(batch["difference"] for batch in results["batches"])
    return f"{as_table(head, rows)}\n\nThe outputs differ by {worst:.0e} at most."


@renders("quantization")
def quantization(results: dict[str, Any]) -> str:
    """Accuracy of the demo's model; size and speed of the untrained one."""
    trained, wide = results["demo"], results["untrained"]
    rows = [
        [kind, percent(trained[kind]["accuracy"]), f"{wide[kind]['mb']:.1f}", f"{wide[kind]['speed']:.2f}"]
        for kind in wide
    ]
    return as_table(["", "accuracy (%)", "MB", "times as fast as float32"], rows)


@renders("feature_cache")
def feature_cache(results: dict[str, Any]) -> str:
    ratios = results["ratios"]
    speeds = with_best_bold([f"{1 / parts['later']:.1f}" for parts in ratios.values()])
    rows = [
        [way, f"{parts['first']:.2f}", f"{parts['later']:.2f}", speed]
        for (way, parts), speed in zip(ratios.items(), speeds, strict=True)
    ]
    return as_table(["", "first epoch", "later epochs", "times as fast"], rows)


@renders("processes")
def processes(results: dict[str, Any]) -> str:
    tasks = ("sentiment", "topic", "intent")
    rows = [
        [count, *(percent(run[task]) for task in tasks), f"{run['rows_per_second']:.0f}"]
        for count, run in results["results"].items()
    ]
    return as_table(["processes", *(f"{task} (%)" for task in tasks), "rows per second"], rows)


@renders("first_example")
def first_example(results: dict[str, Any]) -> str:
    methods = list(next(iter(results.values())))
    rows = [
        [f"split {seed}", *(percent(found[method][score]) for score in ("accuracy", "macro_f1") for method in methods)]
        for seed, found in results.items()
    ]
    means = [
        statistics.mean(found[method][score] for found in results.values())
        for score in ("accuracy", "macro_f1")
        for method in methods
    ]
    rows.append(["mean", *map(percent, means)])
    return as_table(["", *(f"{score}, {method}" for score in ("accuracy", "macro F1") for method in methods)], rows)


@renders("readme_example", "first_example")
def readme_example(results: dict[str, Any]) -> str:
    """What the example of README.md printed, on the split of `build_dataset.py`, and the mean of the splits."""
    ours, linear = "README's first example", "logistic regression"

    def scores(method: str, splits: list[str]) -> str:
        means = [percent(statistics.mean(results[split][method][score] for split in splits)) for score in _SCORES]
        return f"{means[0]}% accuracy and {means[1]}% macro F1"

    every = list(results)
    return (
        f"On the test rows it has {scores(ours, every[:1])}, and a logistic regression on the outputs of both encoders "
        f"{scores(linear, every[:1])}.\nThe mean over {len(every)} splits: {scores(ours, every)}, beside "
        f"{scores(linear, every)} ([all figures](docs/race.md#the-first-example))."
    )


_SCORES = ("accuracy", "macro_f1")


if __name__ == "__main__":
    main()
