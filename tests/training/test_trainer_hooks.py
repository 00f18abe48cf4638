"""The Trainer of the transformers that is installed has what ours relies on."""

import ast
import inspect
import textwrap
from pathlib import Path

import pytest
from transformers import Trainer

from mm_transformers import MMTrainer
from mm_transformers.training import trainer as trainer_module
from mm_transformers.training.trainer_hooks import ATTRIBUTES, HOOKS


# What users call, whose contract transformers documents.
PUBLIC = {"train", "evaluate", "push_to_hub", "create_model_card", "save_metrics", "save_state"}


def attributes_in(source: str, context: type) -> list[str]:
    """The names after `self.` or `trainer.`."""
    return [
        node.attr
        for node in ast.walk(ast.parse(textwrap.dedent(source)))
        if isinstance(node, ast.Attribute)
        and isinstance(node.ctx, context)
        and isinstance(node.value, ast.Name)
        and node.value.id in ("self", "trainer")
    ]


@pytest.mark.parametrize("name", HOOKS)
def test_a_hook_is_as_we_think(name):
    hook = HOOKS[name]
    parameters = list(inspect.signature(getattr(Trainer, name)).parameters)[1:]
    assert tuple(parameters[: len(hook.parameters)]) == hook.parameters
    for caller, times in hook.callers.items():
        assert attributes_in(inspect.getsource(getattr(Trainer, caller)), ast.Load).count(name) == times, caller


def test_all_that_is_overridden_is_listed():
    both = {name for name in vars(MMTrainer) if hasattr(Trainer, name) and not name.startswith("__")}
    assert both - PUBLIC <= set(HOOKS)
    assert both >= PUBLIC


def test_all_that_is_used_is_listed():
    """Private methods and attributes, in all files of training/."""
    set_by_trainer = set(attributes_in(inspect.getsource(Trainer), ast.Store))
    assert set(ATTRIBUTES) <= set_by_trainer
    used = set()
    for path in Path(trainer_module.__file__).parent.rglob("*.py"):
        source = path.read_text(encoding="utf-8")
        used |= {*attributes_in(source, ast.Load), *attributes_in(source, ast.Store)}
    private = {name for name in used if name.startswith("_")}
    assert private & {name for name in dir(Trainer) if not name.startswith("__")} <= set(HOOKS)
    assert private & set_by_trainer <= set(ATTRIBUTES)
