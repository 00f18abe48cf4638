"""
How long `import mm_transformers` takes beside `import transformers`, and until a model class is there. Each in fresh
processes, in turns; the median of each.

    python benchmarks/imports.py --repeats 7
"""

import subprocess
import sys

from harness import parser, report


# What comes before the clock starts, and what is timed.
STATEMENTS = {
    "import transformers": ("import time", "import transformers"),
    "import mm_transformers, after it": ("import time, transformers", "import mm_transformers"),
    "from transformers import AutoModel, PreTrainedModel": (
        "import time",
        "from transformers import AutoModel, PreTrainedModel",
    ),
    "from mm_transformers import MMTransformerForMultiTask": (
        "import time",
        "from mm_transformers import MMTransformerForMultiTask",
    ),
}
TIMED = "{}; start = time.perf_counter(); {}; print(time.perf_counter() - start)"


def main() -> None:
    args = parser(__doc__, size=None, repeats=5).parse_args()
    seconds: dict[str, list[float]] = {name: [] for name in STATEMENTS}
    for repeat in range(args.repeats + 1):
        for name, statement in STATEMENTS.items():
            command = [sys.executable, "-c", TIMED.format(*statement)]
            taken = float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
            if repeat > 0:  # the first time, files are read from the disk
                seconds[name].append(taken)
    first, second, third, fourth = seconds
    report("start-up, import", {name: seconds[name] for name in (first, second)}, first, args)
    report("start-up, until a model class is there", {name: seconds[name] for name in (third, fourth)}, third, args)


if __name__ == "__main__":
    main()
