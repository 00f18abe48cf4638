import importlib
import logging
import os


os.environ["HF_HUB_OFFLINE"] = "1"  # a test that needs the network is a mistake
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# As many threads as workers only get into each other's way. Set before torch is imported; child processes inherit it.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import hypothesis
import pytest
import transformers_tests


# Continuous integration tries 100 examples where a test does not say how many, a person at work fewer.
hypothesis.settings.register_profile("quick", max_examples=40, deadline=None)
if "CI" not in os.environ:
    hypothesis.settings.load_profile("quick")


@pytest.fixture(autouse=True)
def same_loggers():
    """Undoes what a test did to the loggers, for example by a command that silences them."""
    loggers = [logging.getLogger(name) for name in ("transformers", "mm_transformers")]
    before = [(logger, logger.level, logger.propagate) for logger in loggers]
    yield
    for logger, level, propagate in before:
        logger.setLevel(level)
        logger.propagate = propagate


@pytest.fixture
def without_shares(monkeypatch):
    """`explain` without the shares of the modalities, which take most of its time, for tests of the rest."""
    module = importlib.import_module("mm_transformers.analysis.explaining.explain")
    monkeypatch.setattr(
        module, "shares_of_modalities", lambda model, processor, inputs, *_: [{}] * len(inputs["input_ids"])
    )


def pytest_configure(config):
    for name in sorted(transformers_tests.markers()):
        config.addinivalue_line("markers", f"{name}: of the tests of transformers")
