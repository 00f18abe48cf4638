"""
The shared tests of transformers: `ModelTesterMixin`, `ProcessorTesterMixin`.

They are in the source distribution of transformers, not in its wheel. Run this file to download those of the installed
release into the environment (about 10 MB):

    python tests/transformers_tests.py

The variable TRANSFORMERS_TESTS names another folder, such as `tests` of a checkout of the same release. A checkout also
has the tests of generation and export, which the source distribution lacks.
"""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import types
from importlib.metadata import version
from pathlib import Path


PACKAGE = "transformers_shared_tests"


class TestsMissing(Exception):
    """Says in one sentence why the tests of transformers cannot run here."""


def folder() -> Path:
    """Where the tests of the installed release are, or will be."""
    chosen = os.environ.get("TRANSFORMERS_TESTS")
    return Path(chosen) if chosen else Path(sys.prefix, "transformers-tests", version("transformers"))


def load(name: str) -> types.ModuleType:
    """
    A module of the tests of transformers, such as "test_modeling_common".

    Raises:
        TestsMissing: if they are not here.
    """
    if not (folder() / f"{name}.py").is_file():
        raise TestsMissing(
            f"The tests of transformers are not in {folder()}: run `python tests/transformers_tests.py`."
        )
    if PACKAGE not in sys.modules:
        package = sys.modules[PACKAGE] = types.ModuleType(PACKAGE)
        package.__path__ = [str(folder())]
        _stand_in("generation.test_utils", GenerationTesterMixin=type("GenerationTesterMixin", (), {}))
        _stand_in("exporters.test_export", ExportTesterMixin=type("ExportTesterMixin", (), {}))
    # It would turn addresses of test media into names of files in the cache of transformers' own servers.
    media = types.ModuleType("fetch_hub_objects_for_ci")
    media.url_to_local_path = lambda url: url
    sys.modules.setdefault(media.__name__, media)
    try:
        return importlib.import_module(f"{PACKAGE}.{name}")
    except ModuleNotFoundError as error:
        raise TestsMissing(f"The tests of transformers need {error.name!r}, which is not installed.") from error


def markers() -> set[str]:
    """The names of the pytest markers that the tests of transformers use."""
    package = importlib.util.find_spec("transformers").origin
    files = [Path(package).with_name("testing_utils.py"), *folder().glob("test_*_common.py")]
    found = {name for file in files if file.is_file() for name in re.findall(r"\bmark\.(\w+)", file.read_text("utf8"))}
    return found - {"parametrize", "skip", "skipif", "usefixtures", "xfail", "slow"}


def has(name: str) -> bool:
    """Whether a file of the tests is here, such as "generation/test_utils.py"."""
    return (folder() / name).is_file()


def _stand_in(name: str, **content: object) -> None:
    """An empty class in the place of one that only a checkout has, and from which others inherit."""
    parent, _, child = name.partition(".")
    if not has(f"{parent}/{child}.py"):
        for path in (parent, name):
            sys.modules[f"{PACKAGE}.{path}"] = module = types.ModuleType(f"{PACKAGE}.{path}")
            module.__path__ = []
        module.__dict__.update(content)


def download() -> None:
    target = folder()
    if (target / "test_modeling_common.py").is_file():
        return
    wanted = f"transformers=={version('transformers')}"
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-build-isolation"]
    with tempfile.TemporaryDirectory() as temporary:
        subprocess.run([*pip, "--no-binary", "transformers", "--dest", temporary, wanted], check=True)
        with tarfile.open(next(Path(temporary).glob("*.tar.gz"))) as archive:
            members = [member for member in archive.getmembers() if member.isfile() and "/tests/" in member.name]
            for member in members:
                member.name = member.name.partition("/tests/")[2]
            unpacked = Path(temporary, "tests")
            archive.extractall(unpacked, members, filter="data")
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.move(unpacked, target)


if __name__ == "__main__":
    try:
        download()
    except (subprocess.CalledProcessError, OSError, StopIteration) as error:
        sys.exit(f"The tests of transformers could not be downloaded, so that those that use them are skipped: {error}")
