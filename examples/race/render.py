"""
Puts tables and the plot of docs/results/race.jsonl into docs/race.md, the pages of docs/race/ and README.md, between
the comments that ask for them:

    <!-- race: gain --> ... <!-- end -->
    <!-- race: f1 stamps --> ... <!-- end -->     macro F1 of each method in each cell of a data set; also "accuracy"

    python examples/race/render.py
"""

import argparse
import json
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib


matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np


ROOT = Path(__file__).resolve().parents[2]
PLACE = re.compile(r"(<!-- race: (\w+)(?: ([^\n]+?))? -->\n)(.*?)(<!-- end -->)", re.DOTALL)

PAGES = [ROOT / "README.md", ROOT / "docs" / "race.md", *sorted((ROOT / "docs" / "race").glob("*.md"))]

NAMES = {
    "majority": "always the most frequent class",
    "logistic_text": "logistic regression, text",
    "logistic_image": "logistic regression, picture",
    "logistic_both": "logistic regression, both",
    "logistic_cross_validated": "logistic regression, both, cross-validated",
    "logistic_by_parts": "logistic regression of what is there",
    "logistic_average": "average of the two logistic regressions",
    "boosting_text": "gradient boosting, text",
    "boosting_image": "gradient boosting, picture",
    "boosting_both": "gradient boosting, both",
    "pca_boosting": "PCA and gradient boosting, both",
    "autogluon": "AutoGluon MultiModal",
    "ludwig": "Ludwig",
    "ours_start": "ours, the linear start alone",
    "ours_frozen": "ours, both encoders frozen",
    "ours_all_trained": "ours, no encoder frozen",
    "ours": "**ours, defaults**",
}
CHEAP = tuple(NAMES)[:11]
PEERS = ("autogluon", "ludwig")  # slow ones, which have fewer splits than the others
TREES = ("boosting_text", "boosting_image", "boosting_both", "pca_boosting")
# Data sets that are splits of the same rows: not independent of each other.
POOLS = {"stamps": "stamps", "stamps, hard": "stamps", "emoji": "emoji"}
DRAWS = 20_000
_KEY = ("data", "split", "missing", "labels", "method")


class Cell(NamedTuple):
    """
    Args:
        data: data set.
        labels: share of training and validation rows that are kept.
        training, test: shares of rows without a picture.
    """

    data: str
    labels: float
    training: float
    test: float

    def __str__(self) -> str:
        where = "everywhere" if self.training else "in test"
        return f"{self.data}, {self.labels:.0%} of labels, " + (
            f"{self.test:.0%} of pictures missing {where}" if self.test else "all pictures"
        )


# Cell -> method -> split -> scores
Table = dict[Cell, dict[str, dict[int, dict[str, float]]]]


def tables_of(lines: Iterable[dict[str, Any]]) -> tuple[Table, Table]:
    """The scores on the test rows, and on validation rows with the same share of pictures missing."""
    tests: Table = {}
    validations: Table = {}
    for line in lines:
        for source, table in (("tests", tests), ("validations", validations)):
            for share, found in line[source].items():
                if not _is_number(share):
                    continue  # "shuffled" and the like
                cell = Cell(line["data"], line["labels"], line["missing"], float(share))
                table.setdefault(cell, {}).setdefault(line["method"], {})[line["split"]] = found
        if line["method"] == "ours":
            for share, found in line.get("start", {}).items():
                cell = Cell(line["data"], line["labels"], line["missing"], float(share))
                tests.setdefault(cell, {}).setdefault("ours_start", {})[line["split"]] = found
    return {cell: tests[cell] for cell in sorted(tests, key=_order)}, validations


def _is_number(text: str) -> bool:
    return text.replace(".", "", 1).isdigit()


def _order(cell: Cell) -> tuple:
    return list(POOLS).index(cell.data), -cell.labels, cell.training, cell.test


def best_cheap(validations: Table, cell: Cell, splits: Sequence[int]) -> str:
    """
    The cheap method with the highest mean macro F1 on the validation rows of these splits, which lack as many pictures
    as the test rows of the cell. Of equals, the first.
    """
    found = {
        method: np.mean([by_split[split]["f1"] for split in splits])
        for method in CHEAP
        if (by_split := validations.get(cell, {}).get(method)) and set(splits) <= set(by_split)
    }
    return max(found, key=lambda method: found[method])


class Gain(NamedTuple):
    """
    Args:
        cell: where.
        rival: the cheap method that was chosen.
        splits: of which both have results.
        differences: ours minus the rival, macro F1 of each split.
    """

    cell: Cell
    rival: str
    splits: list[int]
    differences: np.ndarray

    @property
    def mean(self) -> float:
        return float(self.differences.mean())

    @property
    def deviation(self) -> float:
        return float(self.differences.std(ddof=1)) if len(self.differences) > 1 else float("nan")

    @property
    def is_below(self) -> bool:
        """Below the rival by more than one standard deviation of the differences."""
        return self.mean < -self.deviation


def gains_of(tests: Table, validations: Table, method: str = "ours") -> list[Gain]:
    """
    One for each cell that has results of the method and of all cheap methods that any cell has. Trees take part where
    they have the same splits.
    """
    cheap = {name for found in tests.values() for name in found if name in CHEAP and name not in TREES}
    gains = []
    for cell, found in tests.items():
        splits = sorted(set.intersection(*(set(found.get(name, ())) for name in {method, *cheap})))
        if splits and cheap:
            rival = best_cheap(validations, cell, splits)
            differences = np.array([found[method][split]["f1"] - found[rival][split]["f1"] for split in splits])
            gains.append(Gain(cell, rival, splits, differences))
    return gains


def interval(gains: Sequence[Gain], draws: int = DRAWS, seed: int = 0) -> tuple[float, float]:
    """
    The 95 % interval of the mean difference, by drawing splits with replacement: all cells of a split are drawn
    together, also those of another data set that has the same rows.

    Returns:
        The 2.5th and the 97.5th percentile.
    """
    clusters: dict[str, dict[int, list[float]]] = {}
    for gain in gains:
        for split, difference in zip(gain.splits, gain.differences, strict=True):
            clusters.setdefault(POOLS[gain.cell.data], {}).setdefault(split, []).append(float(difference))
    generator = np.random.default_rng(seed)
    sums, counts = np.zeros(draws), np.zeros(draws)
    for _, by_split in sorted(clusters.items()):
        drawn = generator.integers(0, len(by_split), (draws, len(by_split)))
        sums += np.array([sum(values) for _, values in sorted(by_split.items())])[drawn].sum(1)
        counts += np.array([len(values) for _, values in sorted(by_split.items())])[drawn].sum(1)
    low, high = np.percentile(sums / counts, [2.5, 97.5])
    return float(low), float(high)


# Pieces of the page


def mean_and_deviation(values: Sequence[float]) -> str:
    shown = f"{100 * np.mean(values):.1f}"
    return shown if len(values) < 2 else f"{shown} ± {100 * np.std(values, ddof=1):.1f}"


def signed(value: float) -> str:
    return f"{100 * value:+.1f}"


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table; nothing if there are no rows."""
    body = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join(["| " + " | ".join(head) + " |", "|---" + "|--:" * (len(head) - 1) + "|", *body]) if body else ""


def scores_table(tests: Table, validations: Table, data: str, score: str) -> str:
    """A table for each share of labels: a row for each method, a column for each cell."""
    parts = []
    for labels in sorted({cell.labels for cell in tests if cell.data == data}, reverse=True):
        cells = [cell for cell in tests if (cell.data, cell.labels) == (data, labels)]
        head = [f"{labels:.0%} of labels"]
        for cell in cells:
            where = "everywhere" if cell.training else "in test"
            head.append(f"{cell.test:.0%} missing {where}" if cell.test else "all pictures")
        rows = []
        for method, name in NAMES.items():
            shown = []
            if method in PEERS:
                continue
            for cell in cells:
                by_split = tests[cell].get(method, {})
                value = mean_and_deviation([found[score] for found in by_split.values()]) if by_split else ""
                splits = sorted(by_split)
                chosen = method in CHEAP and splits and best_cheap(validations, cell, splits) == method
                shown.append(f"_{value}_" if chosen else f"**{value}**" if method == "ours" and value else value)
            if any(shown):
                rows.append([name, *shown])
        parts.append(markdown(head, rows))
    return "\n\n".join(parts)


def gain_table(gains: Sequence[Gain]) -> str:
    rows = []
    for gain in gains:
        deviation = "" if np.isnan(gain.deviation) else f"{100 * gain.deviation:.1f}"
        below = "below" if gain.is_below else ""
        rows.append(
            [str(gain.cell), NAMES[gain.rival], signed(gain.mean), deviation, str(len(gain.differences)), below]
        )
    return markdown(["cell", "best cheap method", "gain", "deviation", "splits", ""], rows)


def gain_summary(gains: Sequence[Gain]) -> str:
    groups = {"all": list(gains)}
    for name in dict.fromkeys(gain.cell.data for gain in gains):
        groups[name] = [gain for gain in gains if gain.cell.data == name]
    for labels in sorted({gain.cell.labels for gain in gains}, reverse=True):
        groups[f"{labels:.0%} of labels"] = [gain for gain in gains if gain.cell.labels == labels]
    rows = []
    for name, found in groups.items():
        low, high = interval(found)
        mean = np.concatenate([gain.differences for gain in found]).mean()
        above = sum(gain.mean > 0 for gain in found)
        below = sum(gain.is_below for gain in found)
        spread = f"{signed(low)} to {signed(high)}"
        rows.append([name, signed(mean), spread, f"{above} of {len(found)}", str(below)])
    head = ["cells", "mean gain", "95% interval", "cells above", "cells below by more than one deviation"]
    return markdown(head, rows)


def start_table(lines: Sequence[dict[str, Any]]) -> str:
    """How often training was better than its linear start: on the validation rows, and on the test rows."""
    rows = []
    for method in ("ours", "ours_all_trained", "ours_frozen"):
        for data in POOLS:
            found = [line for line in lines if line["method"] == method and line["data"] == data and "verdict" in line]
            if not found:
                continue
            left = sum(not line["verdict"]["kept_start"] for line in found)
            differences = np.array([
                line["tests"][share]["f1"] - score["f1"]
                for line in found
                for share, score in line.get("start", {}).items()
            ])  # fmt: skip
            better = f"{(differences > 0).sum()} of {len(differences)}" if len(differences) else ""
            mean = signed(differences.mean()) if len(differences) else ""
            rows.append([NAMES[method].strip("*"), data, f"{left} of {len(found)}", better, mean])
    return markdown(["", "data", "trained weights kept", "better than the start in test", "mean difference"], rows)


def parts_table(lines: Sequence[dict[str, Any]], ours: str = "ours") -> str:
    """What pictures and texts are good for, with all pictures and labels; `ours` is the method that has both."""
    complete = [line for line in lines if (line["missing"], line["labels"]) == (0.0, 1.0)]
    columns: dict[str, tuple[str, str]] = {
        "ours": (ours, "0.0"),
        "pictures of other rows": (ours, "shuffled"),
        "without pictures": (ours, "no picture"),
        "without texts": (ours, "no text"),
        "trained on texts alone": ("ours_text", "0.0"),
        "trained on pictures alone": ("ours_image", "0.0"),
    }
    rows = []
    for data in dict.fromkeys(line["data"] for line in complete):
        shown = []
        for method, test in columns.values():
            found = [line for line in complete if (line["data"], line["method"]) == (data, method)]
            values = [line["tests"][test]["f1"] for line in found if test in line["tests"]]
            shown.append(mean_and_deviation(values) if values else "")
        if any(shown):
            rows.append([data, *shown])
    return markdown(["", *columns], rows)


def time_table(lines: Sequence[dict[str, Any]]) -> str:
    """Seconds of one training with all pictures and labels."""
    complete = [line for line in lines if (line["missing"], line["labels"]) == (0.0, 1.0)]
    data = list(dict.fromkeys(line["data"] for line in complete))
    rows = []
    for method, name in NAMES.items():
        shown = []
        for one in data:
            found = [line for line in complete if (line["data"], line["method"]) == (one, method)]
            shown.append("")
            if found:
                wall, cpu = (np.median([line[which] for line in found]) for which in ("seconds", "cpu_seconds"))
                shown[-1] = f"{wall:,.0f} ({cpu:,.0f})"
        if any(shown):
            rows.append([name, *shown])
    machines = sorted({line["machine"] for line in complete})
    versions = sorted({", ".join(f"{k} {v}" for k, v in line["versions"].items()) for line in complete})
    return markdown(["", *data], rows) + f"\n\n{'; '.join(machines)}; {'; '.join(versions)}."


def peers_table(tests: Table, lines: Sequence[dict[str, Any]]) -> str:
    """Other packages beside ours and the strongest linear models, on the splits that the packages have."""
    rows = []
    for cell, found in tests.items():
        for peer in PEERS:
            if not found.get(peer):
                continue
            splits = sorted(found[peer])
            for method in (peer, "logistic_cross_validated", "logistic_by_parts", "ours"):
                scores = [found[method][split] for split in splits if split in found.get(method, {})]
                same = [
                    line for line in lines
                    if (line["data"], line["missing"], line["labels"], line["method"])
                    == (cell.data, cell.training, cell.labels, method) and line["split"] in splits
                ]  # fmt: skip
                row = [str(cell), NAMES[method], mean_and_deviation([score["accuracy"] for score in scores])]
                row += [mean_and_deviation([score["f1"] for score in scores])]
                row += [f"{np.median([line['cpu_seconds'] for line in same]):,.0f}", ", ".join(map(str, splits))]
                if scores and row not in rows:
                    rows.append(row)
    return markdown(["cell", "method", "accuracy", "macro F1", "CPU seconds", "splits"], rows)


def headline_table(tests: Table, lines: Sequence[dict[str, Any]], data: str) -> str:
    """Other packages, a linear model and ours, with all labels and pictures, on the splits that all of them have."""
    shown = ("logistic_cross_validated", "autogluon", "ludwig", "ours")
    cells = {cell.test: cell for cell in tests if (cell.data, cell.labels, cell.training) == (data, 1.0, 0.0)}
    rows = []
    for method in shown:
        splits = sorted(set.intersection(*(set(tests[cell].get(one, ())) for cell in cells.values() for one in shown)))
        if not splits:
            return ""
        row = [NAMES[method].replace("ours, defaults", "mm_transformers")]
        for missing in (0.0, 0.7):
            found = [tests[cells[missing]][method][split] for split in splits]
            row += [mean_and_deviation([values[score] for values in found]) for score in ("accuracy", "f1")]
        seconds = [
            line["cpu_seconds"]
            for line in lines
            if (line["data"], line["missing"], line["labels"], line["method"]) == (data, 0.0, 1.0, method)
            and line["split"] in splits
        ]
        rows.append([*row, f"{np.median(seconds):,.0f}"])
    head = ["", "accuracy", "macro F1", "accuracy, 70% of pictures missing", "macro F1, 70% missing", "CPU seconds"]
    return markdown(head, rows)


def plot(tests: Table, validations: Table, file: Path) -> None:
    """Macro F1 over the share of missing pictures."""
    data = list(dict.fromkeys(cell.data for cell in tests))
    labels = sorted({cell.labels for cell in tests}, reverse=True)
    figure, grid = plt.subplots(
        len(labels), len(data), figsize=(3.6 * len(data), 3 * len(labels)), squeeze=False, layout="constrained"
    )
    shown = {
        "ours, defaults": ("ours", "tab:red"),
        "ours, no encoder frozen": ("ours_all_trained", "tab:orange"),
        "best cheap": (None, "black"),
        "logistic regression, both": ("logistic_both", "tab:blue"),
        "logistic regression, text": ("logistic_text", "tab:gray"),
    }
    for i, share in enumerate(labels):
        for j, name in enumerate(data):
            axes = grid[i, j]
            for label, (method, colour) in shown.items():
                for is_everywhere, style in ((False, "-"), (True, "--")):
                    points = []
                    for cell in tests:
                        # All pictures are the first point of both lines.
                        belongs = cell.test == 0 or (cell.training > 0) == is_everywhere
                        if (cell.data, cell.labels) != (name, share) or not belongs:
                            continue
                        cheap = [by_split for m, by_split in tests[cell].items() if m in CHEAP]
                        splits = sorted(set.intersection(*map(set, cheap))) if cheap else []
                        chosen = method or (best_cheap(validations, cell, splits) if splits else "majority")
                        found = tests[cell].get(chosen, {})
                        if found:
                            points.append((100 * cell.test, 100 * np.mean([x["f1"] for x in found.values()])))
                    if points:
                        shown_as = label if not is_everywhere else None
                        axes.plot(*zip(*points, strict=True), style, color=colour, marker="o", ms=3, label=shown_as)
            axes.set_title(f"{name}, {share:.0%} of labels", fontsize=9)
            axes.spines[["top", "right"]].set_visible(False)
            if i == len(labels) - 1:
                axes.set_xlabel("pictures missing (%); dashed: in training, too", fontsize=8)
            if j == 0:
                axes.set_ylabel("macro F1 (%)", fontsize=8)
    grid[0, 0].legend(fontsize=7, frameon=False)
    figure.savefig(file, dpi=110)
    plt.close(figure)


def render(lines: Sequence[dict[str, Any]], page: str, picture: Path) -> str:
    """The page with its places filled; `picture` is written where the page asks for it."""
    # Two races that write to one file may both have measured something.
    lines = list({tuple(line[name] for name in _KEY): line for line in lines}.values())
    tests, validations = tables_of(lines)

    def gains(method: str) -> list[Gain]:
        return gains_of(tests, validations, method or "ours")

    def drawn() -> str:
        plot(tests, validations, picture)
        return f"![Macro F1 over the share of missing pictures]({picture.name})"

    makers: dict[str, Callable[[str], str]] = {
        "summary": lambda method: gain_summary(found) if (found := gains(method)) else "",
        "gain": lambda method: gain_table(found) if (found := gains(method)) else "",
        "f1": lambda data: scores_table(tests, validations, data, "f1"),
        "accuracy": lambda data: scores_table(tests, validations, data, "accuracy"),
        "start": lambda _: start_table(lines),
        "parts": lambda method: parts_table(lines, method or "ours"),
        "time": lambda _: time_table(lines),
        "peers": lambda _: peers_table(tests, lines),
        "headline": lambda data: headline_table(tests, lines, data),
        "plot": lambda _: drawn(),
    }

    def filled(match: re.Match) -> str:
        start, what, data, _, end = match.groups()
        return f"{start}{makers[what](data) or 'Not measured.'}\n{end}"

    return PLACE.sub(filled, page)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=ROOT / "docs" / "results" / "race.jsonl")
    parser.add_argument("--pages", type=Path, nargs="+", default=PAGES)
    args = parser.parse_args()
    lines = [json.loads(line) for line in args.results.read_text().splitlines()]
    for page in args.pages:
        page.write_text(render(lines, page.read_text(), page.with_suffix(".png")))
        print(f"Wrote {page}.")


if __name__ == "__main__":
    main()
