"""
Puts tables and plots of benchmarks/results/*.jsonl into the pages of docs/benchmarks/, between the
comments that ask for them:

    <!-- table: cpu forward --> ... <!-- end -->     every comparison whose name begins so
    <!-- plot: cpu fusion kinds --> ... <!-- end -->
"""

import json
import re
from pathlib import Path
from typing import Any

import matplotlib


matplotlib.use("Agg")
import matplotlib.pyplot as plt


ROOT = Path(__file__).parent.parent
PAGES = ROOT / "docs" / "benchmarks"
PLACE = re.compile(r"(<!-- (table|plot): (\w+) (.+?) -->\n)(.*?)(<!-- end -->)", re.DOTALL)


def main() -> None:
    for page in pages():
        page.write_text(rendered(page.read_text()))
    print(f"Wrote the pages of {PAGES.relative_to(ROOT)}.")


def pages() -> list[Path]:
    return sorted(PAGES.glob("*.md"))


def rendered(text: str, draws: bool = True) -> str:
    """The text of the page with its tables and, if `draws`, its plots as the result files have them."""
    results = {
        path.stem: [json.loads(line) for line in path.read_text().splitlines()]
        for path in sorted((ROOT / "benchmarks" / "results").glob("*.jsonl"))
    }

    def filled(match: re.Match) -> str:
        start, form, name, benchmark, _, end = match.groups()
        if form == "plot" and not draws:
            return match[0]
        lines = [line for line in results.get(name, []) if line["benchmark"].startswith(benchmark)]
        if not lines:
            return f"{start}Not measured.\n{end}"
        made = table(lines) if form == "table" else plot(lines, f"{name} {benchmark}")
        return f"{start}{made}\n{end}"

    return PLACE.sub(filled, text)


def table(lines: list[dict[str, Any]]) -> str:
    """One row per way; the ratio is to the first column that all share, the baseline."""
    rows = ["| what | way | measured | ratio | quartiles of the ratio |", "|---|---|--:|--:|--:|"]
    for line in lines:
        what = ": ".join(filter(None, [line["benchmark"], shapes_of(line)]))
        for way, value in line["values"].items():
            ratio, (low, high) = line["ratio"][way], line["spread"][way]
            is_baseline = way == line["baseline"]
            spread = f"{as_ratio(low)} to {as_ratio(high)}" if not is_baseline and line["turns"] > 1 else ""
            told = "1" if is_baseline else as_ratio(ratio)
            rows.append(f"| {what} | {way} | {shown(value, line['unit'])} | {told} | {spread} |")
            what = ""
    machines = sorted({line["machine"] for line in lines})
    versions = sorted({", ".join(f"{k} {v}" for k, v in line["versions"].items()) for line in lines})
    commands = list(dict.fromkeys(line["command"] for line in lines))
    rows += ["", f"{'; '.join(machines)}; {'; '.join(versions)}. " + " ".join(f"`{command}`" for command in commands)]
    return "\n".join(rows)


def shapes_of(line: dict[str, Any]) -> str:
    parts = []
    for name, value in line["shapes"].items():
        if isinstance(value, dict):
            value = ", ".join(f"{k} {v}" for k, v in value.items())
        parts.append(f"{name.replace('_', ' ')} {value}")
    return ", ".join(parts)


def shown(value: float, unit: str) -> str:
    if unit == "s":
        return f"{value * 1000:.3g} ms" if value < 1 else f"{value:.3g} s"
    return f"{value:,.0f} MB" if unit == "MB" else f"{value:.3g} {unit}"


def as_ratio(value: float) -> str:
    return f"{value:.2f}" if value >= 0.01 else f"{value:.1g}"


def plot(lines: list[dict[str, Any]], name: str) -> str:
    """Bars of what was measured, a group for each comparison."""
    ways = list(dict.fromkeys(way for line in lines for way in line["values"]))
    figure, axes = plt.subplots(figsize=(9, 3.6), layout="constrained")
    width = 0.8 / len(ways)
    for i, way in enumerate(ways):
        heights = [line["values"].get(way, 0) for line in lines]
        axes.bar([place + i * width for place in range(len(lines))], heights, width, label=way)
    differing = [k for k in lines[0]["shapes"] if len({str(line["shapes"].get(k)) for line in lines}) > 1]
    labels = ["\n".join(f"{k} {line['shapes'].get(k)}" for k in differing) or line["benchmark"] for line in lines]
    axes.set_xticks([place + 0.4 - width / 2 for place in range(len(lines))], labels, fontsize=8)
    axes.set_ylabel(lines[0]["unit"])
    axes.set_title(name.partition(" ")[2] + f" ({lines[0]['machine']})", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=8, frameon=False)
    path = PAGES / (re.sub(r"\W+", "_", name) + ".png")
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return f"![{name}]({path.name})"


if __name__ == "__main__":
    main()
