"""`import mm_transformers` costs nothing, and yet the Auto classes know the model."""

import ast
import graphlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
from cases import first_quickly

import mm_transformers


def run(script: str) -> str:
    source = str(Path(mm_transformers.__file__).parents[1])
    environment = {**os.environ, "PYTHONPATH": source, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.slow
def test_what_is_heavy_is_not_imported():
    """Next to `import transformers`, which imports no torch, nothing but modules of the package and of Python."""
    script = (
        "import sys\n"
        "import transformers\n"
        "before = set(sys.modules)\n"
        "import mm_transformers\n"
        "new = {name.partition('.')[0] for name in set(sys.modules) - before}\n"
        "print(sorted(new - set(sys.stdlib_module_names)))\n"
        "heavy = ('torch', 'datasets', 'evaluate', 'sklearn', 'matplotlib')\n"
        "print([name for name in heavy if name in sys.modules])\n"
    )
    assert run(script).splitlines() == ["['mm_transformers']", "[]"]


KNOWN = """
from transformers import AutoConfig, AutoModel, AutoProcessor
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING
from mm_transformers import MMTransformerConfig, MMTransformerForMultiTask, MMTransformerProcessor
assert type(AutoConfig.for_model("mm_transformer")) is MMTransformerConfig
assert MMTransformerForMultiTask in AutoModel._model_mapping[MMTransformerConfig]
assert PROCESSOR_MAPPING[MMTransformerConfig] is MMTransformerProcessor
import sys
assert not any("_Watch" in type(finder).__name__ for finder in sys.meta_path)
assert type(sys.modules["transformers.modeling_utils"].__loader__).__name__ == "SourceFileLoader"
print("known")
"""

# What is imported first decides which modules of transformers are half imported when the Auto classes are there.
FIRST = [
    "import mm_transformers\nfrom transformers import AutoConfig",
    "from transformers import AutoModel\nimport mm_transformers",
    "import mm_transformers\nfrom transformers import BertModel",
    "import mm_transformers.model.fusion_merged",
    "import mm_transformers.training.trainer",
]
OTHERS = [
    "import mm_transformers\nfrom transformers import AutoModel",
    "import mm_transformers\nfrom transformers import AutoProcessor",
    "import mm_transformers\nfrom transformers import GenerationMixin",
    "import mm_transformers\nfrom transformers import PreTrainedModel",
    "import mm_transformers\nfrom transformers import Trainer",
    "import mm_transformers\nfrom transformers import pipeline",
    "import mm_transformers\nimport peft",
    "import mm_transformers.data.collator",
    "from mm_transformers import *",
    "from mm_transformers import MMTransformerForMultiTask",
]


@pytest.mark.parametrize(
    "first", [*first_quickly(FIRST), *(pytest.param(lines, marks=pytest.mark.nightly) for lines in OTHERS)]
)
def test_auto_classes_know_the_model_whatever_is_imported_first(first):
    assert run(first + KNOWN) == "known"


def imports(file: Path) -> set[Path]:
    """The modules of the package that a module imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            parent = file.parents[node.level - 1].joinpath(*(node.module or "").split("."))
            for path in (parent, *(parent / alias.name for alias in node.names)):
                found |= {f for f in (path.with_suffix(".py"), path / "__init__.py") if f.is_file()}
    return found - {file}


def test_no_module_imports_one_that_imports_it():
    """Imports inside of functions and for type checkers count, too."""
    package = Path(mm_transformers.__file__).parent
    files = list(package.rglob("*.py"))
    # A package imports its own modules, so what a module imports of its package's `__init__` is left to Python.
    graph = {file: {other for other in imports(file) if other.name != "__init__.py"} for file in files}
    graphlib.TopologicalSorter(graph).prepare()


# From top to bottom; see docs/architecture.md.
ROOMS = ("cli", "fitting", "analysis", "sharing", "training", "data", "model")


def test_rooms_import_downwards():
    package = Path(mm_transformers.__file__).parent
    upwards = [
        (str(file.relative_to(package)), str(other.relative_to(package)))
        for place, room in enumerate(ROOMS)
        for file in (package / room).rglob("*.py")
        for other in imports(file)
        if other.relative_to(package).parts[0] in ROOMS[:place]
    ]
    assert upwards == []
    assert {path.name for path in package.iterdir() if (path / "__init__.py").is_file()} == set(ROOMS)
