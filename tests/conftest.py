import os


os.environ["HF_HUB_OFFLINE"] = "1"  # a test that needs the network is a mistake
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# As many threads as workers only get into each other's way. Set before torch is imported; child processes inherit it.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import transformers_tests


def pytest_configure(config):
    for name in sorted(transformers_tests.markers()):
        config.addinivalue_line("markers", f"{name}: of the tests of transformers")
