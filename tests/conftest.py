import os


os.environ["HF_HUB_OFFLINE"] = "1"  # a test that needs the network is a mistake
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
import torch
import transformers_tests


torch.set_num_threads(1)


def pytest_configure(config):
    for name in sorted(transformers_tests.markers()):
        config.addinivalue_line("markers", f"{name}: of the tests of transformers")
