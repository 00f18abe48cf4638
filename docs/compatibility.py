"""
Writes docs/compatibility.md: versions from pyproject.toml and the constraints, encoders from docs/encoders.md, GPUs
from the results of the benchmarks, and what is known of other platforms.

    python docs/compatibility.py
"""

import json
import re
from pathlib import Path


ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "compatibility.md"
LIBRARIES = (
    "torch",
    "transformers",
    "datasets",
    "accelerate",
    "huggingface_hub",
    "tokenizers",
    "numpy",
    "scikit-learn",
)
# What nobody has measured says so here; a platform moves up when somebody runs the tests on it.
NOT_TRIED = {
    "CUDA, several GPUs": "not tried; two processes on a CPU are tested",
    "MPS (Apple)": "not tried",
    "ROCm, XPU, TPU": "not tried",
    "macOS, Windows": "not tried",
}


def main() -> None:
    PAGE.write_text(page(), encoding="utf-8")
    print(f"Wrote {PAGE.relative_to(ROOT)}.")


def page() -> str:
    project = (ROOT / "pyproject.toml").read_text()
    newest, floor = _pins("constraints.txt"), _pins("constraints-floor.txt")
    pythons = re.findall(r'"Programming Language :: Python :: (3\.\d+)"', project)
    versions = []
    for name in LIBRARIES:
        lowest = re.search(rf'^    "{name}>=([\d.]+)"', project, re.MULTILINE)
        pin = name.replace("_", "-")
        versions.append([name, lowest[1] if lowest else "", newest[pin], floor.get(pin, "")])
    counts, supported, all_types = _encoders()
    platforms = [["CPU, Linux (x86_64)", "tried: all tests, and the benchmarks"], *_gpus()]
    return "\n".join([
        "# Compatibility",
        "",
        f"Python {pythons[0]} to {pythons[-1]}, transformers {versions[1][1]} or newer, torch {versions[0][1]} "
        f"or newer; {supported} of {all_types} types of encoders. Tested on CPUs, measured on one kind of GPU.",
        "",
        "*Written by `python docs/compatibility.py`; do not edit this page.*",
        "",
        "## Versions",
        "",
        "*Lowest* is what can work. *Tested* is the version in `constraints.txt` for Python 3.11 or newer; for 3.10 it "
        "has older ones where it must. Continuous integration runs the tests on Python 3.10 to 3.14, and with the "
        "oldest transformers (`make test-floor`).",
        "",
        f"Check yours: `pip show transformers` must say {versions[1][1]} or newer. The installation needs 1.4 GB of "
        "disk with the CPU build of torch; [decision 35](decisions/0035-one-installation-without-plot-extras.md) has "
        "the parts.",
        "",
        _table(["library", "lowest", "tested", "tested with the oldest transformers"], versions),
        "",
        "## Platforms",
        "",
        _table(["platform", "state"], platforms + [[name, state] for name, state in NOT_TRIED.items()]),
        "",
        "The figures for the GPU are in [the benchmarks](benchmarks.md).",
        "",
        "## Encoders",
        "",
        "A tiny random model of each type was tried; [the table](encoders.md) has every type and the cause of each "
        "refusal.",
        "",
        _table(["modality", "supported", "refused"], counts),
        "",
    ])  # fmt: skip


def _pins(file: str) -> dict[str, str]:
    """Library -> version, for the newest Python."""
    found = re.findall(r"^([\w-]+)==([^\s;]+)(?:; (.*))?$", (ROOT / file).read_text(), re.MULTILINE)
    return {name: version for name, version, condition in found if "<" not in condition}


def _gpus() -> list[list[str]]:
    lines = [json.loads(line) for line in (ROOT / "benchmarks/results/gpu.jsonl").read_text().splitlines()]
    machines = {(line["machine"], line["versions"]["torch"], line["versions"]["transformers"]) for line in lines}
    return [
        [f"CUDA, one GPU: {machine}", f"tried: the benchmarks, with torch {torch} and transformers {transformers}"]
        for machine, torch, transformers in sorted(machines)
    ]


def _encoders() -> tuple[list[list[str]], int, int]:
    text = (ROOT / "docs/encoders.md").read_text()
    all_of = re.search(r"(\d+) of (\d+) types are supported", text)
    assert all_of is not None
    counts = []
    for section in text.split("\n## ")[1:]:
        plain = re.search(r"^Supported: (.*)\.$", section, re.MULTILINE)
        rows = re.findall(r"^\| (`.*?`) \| (yes|no) \|", section, re.MULTILINE)
        number = {
            state: sum(names.count(",") + 1 for names, found in rows if found == state) for state in ("yes", "no")
        }
        number["yes"] += plain[1].count(",") + 1 if plain else 0
        counts.append([section.splitlines()[0].lower(), str(number["yes"]), str(number["no"])])
    return counts, int(all_of[1]), int(all_of[2])


def _table(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(line) + " |" for line in [head, ["---"] * len(head), *rows])


if __name__ == "__main__":
    main()
