"""What is freed is kept: the system is not asked for the same pages in every step."""

import platform
import subprocess
import sys

import pytest


SCRIPT = """
import resource, sys
import numpy as np
if sys.argv[1] == "kept":
    from mm_transformers.training.freed_memory import keep_freed_memory
    keep_freed_memory()

def step():
    return [np.ones(600_000, np.float32) for _ in range(10)]  # 24 MB in ten pieces, all freed again

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

for _ in range(3):
    step()
before = faults()
for _ in range(10):
    step()
print(faults() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only the allocator of glibc is told")
def test_a_step_asks_for_no_new_pages():
    faults = {}
    for way in ("by default", "kept"):
        done = subprocess.run([sys.executable, "-c", SCRIPT, way], capture_output=True, text=True, check=True)
        faults[way] = int(done.stdout)
    assert faults["kept"] < 100 < faults["by default"]
