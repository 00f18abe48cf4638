"""The pages that are written from the code are those of the code, and leave nothing out."""

import ast
import re
from typing import ClassVar, get_origin

import pytest
import typer
from documents import ROOT, name_of
from scripts import import_script

import mm_transformers
from mm_transformers import MMTransformerConfig, analysis
from mm_transformers.cli import app
from mm_transformers.training.recipe.recipe import ColumnsSection, DataSection


reference = import_script(ROOT / "docs" / "reference.py")
compatibility = import_script(ROOT / "docs" / "compatibility.py")


def test_pages_are_those_of_the_code():
    """If this fails: `python docs/reference.py` writes them again."""
    written = {path.name: path.read_text() for path in reference.FOLDER.glob("*.md")}
    assert written == reference.pages()


def test_compatibility_is_that_of_the_constraints():
    """If this fails: `python docs/compatibility.py` writes it again."""
    assert compatibility.PAGE.read_text() == compatibility.page()


def test_every_public_name_has_its_place():
    shown = [
        name for page in reference.FOLDER.glob("*.md") for name in re.findall(r"^::: (\S+)$", page.read_text(), re.M)
    ]
    public = [f"{module.__name__}.{name}" for module in (mm_transformers, analysis) for name in module.__all__]
    assert sorted(shown) == sorted(public)


def test_every_field_key_and_command_is_there():
    config, recipe, commands = (
        (reference.FOLDER / f"{name}.md").read_text() for name in ("config", "recipe", "commands")
    )
    own = [name for name, hint in MMTransformerConfig.__annotations__.items() if get_origin(hint) is not ClassVar]
    assert [name for name in own if f"| `{name}` |" not in config] == []
    keys = [*DataSection.__dataclass_fields__, *ColumnsSection.__dataclass_fields__]
    assert [key for key in keys if key != "own" and f"| `{key}` |" not in recipe] == []
    for name, command in typer.main.get_command(app).commands.items():
        assert f"\n## {name}\n" in commands
        for parameter in command.params:
            for option in (one for one in parameter.opts if one.startswith("--")):
                assert f"`{option}`" in commands, (name, option)


def test_every_row_of_the_reference_says_something():
    for page in reference.FOLDER.glob("*.md"):
        empty = re.findall(r"^\| `[^|]*`? \|(?:[^|]*\|)* *\|$", page.read_text(), re.M)
        assert empty == [], name_of(page)


def messages() -> str:
    """All texts in the code; what an f-string fills in is "…"."""
    texts = []
    for file in (ROOT / "src").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.JoinedStr):
                texts.append("".join(part.value if isinstance(part, ast.Constant) else "…" for part in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.append(node.value)
    return "\n".join(texts)


def test_troubleshooting_quotes_sentences_of_the_code():
    page = (ROOT / "docs/troubleshooting.md").read_text()
    quoted = re.findall(r"^\| (`+)(.*?)\1 \|", page, re.MULTILINE)
    assert len(quoted) > 30
    known = messages()
    assert [sentence for _, sentence in quoted if sentence.strip() not in known] == []


@pytest.mark.parametrize("page", sorted((ROOT / "docs").rglob("*.md")), ids=name_of)
def test_no_page_is_long(page):
    text = page.read_text()
    # The commands are looked up, not read from top to bottom.
    assert len(text.splitlines()) <= (300 if reference.NOTE in text else 250)
