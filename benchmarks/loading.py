"""
Time and memory of `from_pretrained`, against reading the same file with `safetensors.torch.load_file`. Each in fresh
processes that have imported everything before, in turns; medians. Memory is the rise of the resident set's peak.

    python benchmarks/loading.py --size base --repeats 5
"""

import json
import subprocess
import sys
import tempfile

from harness import ENCODERS, parser, report


SAVE = """
import json, sys, torch
from transformers import BertConfig, ViTConfig
from mm_transformers import Classification, MMTransformerConfig, MMTransformerForMultiTask
folder, size, dtype = sys.argv[1], json.loads(sys.argv[2]), sys.argv[3]
config = MMTransformerConfig(
    text_config=BertConfig(**size), vision_config=ViTConfig(**size), tasks=[Classification("topic", labels=["a", "b"])]
)
MMTransformerForMultiTask(config).to(getattr(torch, dtype)).save_pretrained(folder)
"""

# `load_file` only maps the file, so time and memory count once every weight has been read.
LOAD = """
import json, resource, sys, time
import torch
from safetensors.torch import load_file
from mm_transformers import MMTransformerForMultiTask
torch.set_num_threads(1)
torch.ones(8, 8) @ torch.ones(8, 8)
how, folder = sys.argv[1:]
before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
if how == "load_file":
    tensors = load_file(folder + "/model.safetensors")
else:
    tensors = MMTransformerForMultiTask.from_pretrained(folder).state_dict()
largest = max(tensor.max().item() for tensor in tensors.values() if tensor.is_floating_point())
seconds = time.perf_counter() - start
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(json.dumps({"seconds": seconds, "rise_mb": (peak - before) / 1024, "peak_mb": peak / 1024}))
"""


def main() -> None:
    args = parser(__doc__, size="base", repeats=5).parse_args()
    with tempfile.TemporaryDirectory() as folder:
        _run(SAVE, folder, json.dumps(ENCODERS[args.size]), args.dtype)
        measured: dict[str, list[dict[str, float]]] = {"load_file": [], "from_pretrained": []}
        for _ in range(args.repeats):
            for how, results in measured.items():
                results.append(json.loads(_run(LOAD, how, folder).splitlines()[-1]))
    for name, unit in {"rise_mb": "MB", "peak_mb": "MB", "seconds": "s"}.items():
        values = {how: [result[name] for result in results] for how, results in measured.items()}
        what = {"rise_mb": "rise of memory", "peak_mb": "peak of the process", "seconds": "time"}[name]
        report(f"start-up, load, {what}", values, "load_file", args, unit=unit)


def _run(code: str, *arguments: str) -> str:
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, check=True).stdout


if __name__ == "__main__":
    main()
