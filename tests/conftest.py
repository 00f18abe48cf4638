import os
import sys
from pathlib import Path


os.environ["HF_HUB_OFFLINE"] = "1"  # a test that needs the network is a mistake
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Tests import the modules of this folder, and helpers from tests of other rooms, by their plain names.
TESTS = Path(__file__).parent
rooms = sorted(path for path in TESTS.iterdir() if path.is_dir() and path.name[0] not in "._")
sys.path[:0] = [str(path) for path in (TESTS, *rooms)]

import torch  # noqa: E402
import transformers_tests  # noqa: E402


torch.set_num_threads(1)


def pytest_configure(config):
    for name in sorted(transformers_tests.markers()):
        config.addinivalue_line("markers", f"{name}: of the tests of transformers")
