"""
Writes the pages of docs/reference/ from the code: public names, fields of the config, keys of a recipe, commands.

    python docs/reference.py

tests/project/test_reference.py checks that the pages are those of the code, and that no public name is missing.
"""

import dataclasses
import inspect
import re
import typing
from pathlib import Path
from typing import Any

import typer

import mm_transformers
from mm_transformers import (
    MMDataCollator,
    MMTrainingArguments,
    MMTransformerConfig,
    MMTransformerForMultiTask,
    analysis,
)
from mm_transformers.cli import app
from mm_transformers.model.task_base import TASK_KINDS
from mm_transformers.training.recipe.recipe import ColumnsSection, DataSection


FOLDER = Path(__file__).parent / "reference"
NOTE = "*Written by `python docs/reference.py` from the code.*"
# docs/hooks.py leaves out what lies between them: the site shows the whole docstrings.
BEGIN, END = "<!-- in short -->", "<!-- end -->"
# A longer signature, as that of all training arguments, says nothing.
MOST_SHOWN = 26

# Page -> its title, its first sentence, and the modules whose public names it shows.
GROUPS: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "tasks": ("Tasks", "What a model learns: one class for each kind of task.", ("model.tasks",)),
    "model": (
        "Model, config and processor",
        "The classes of the fused model; `from_encoders` makes them of pretrained encoders.",
        ("model.configuration", "model.modeling", "model.processing"),
    ),
    "data": ("Data", "From rows to batches: columns, mixtures, cached features, limits.", ("data.", "model.limits")),
    "training": ("Training", "The trainer, its arguments, metrics and answers.", ("training.", "fitting.")),
    "extending": (
        "Kinds of your own",
        "Base classes and decorators of fusions, columns and modalities.",
        ("model.fusion", "model.table", "model.modalities"),
    ),
    "analysis": ("Analysis", "What a model rests on, from `mm_transformers.analysis`.", ("analysis",)),
}


def main() -> None:
    for name, text in pages().items():
        path = FOLDER / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    print(f"Wrote {len(pages())} pages of {FOLDER.name}/.")


def pages() -> dict[str, str]:
    """File name -> text, for all pages of the reference."""
    found = {f"{name}.md": _group(name) for name in GROUPS}
    return {"index.md": _index(), **found, "config.md": _config(), "recipe.md": _recipe(), "commands.md": _commands()}


def names_of(group: str) -> list[str]:
    """The public names of a page, with their paths."""
    if group == "analysis":
        return [f"mm_transformers.analysis.{name}" for name in sorted(analysis.__all__)]
    prefixes = GROUPS[group][2]
    return [
        f"mm_transformers.{name}"
        for name in sorted(mm_transformers.__all__, key=str.lower)
        if mm_transformers._MODULE_OF[name].startswith(prefixes)
        and (group == "tasks") == (mm_transformers._MODULE_OF[name] == "model.tasks")
    ]


# Docstrings


def summary_of(thing: Any) -> str:
    """The first sentence of a docstring, in one line."""
    text = " ".join((inspect.getdoc(thing) or "").split("\n\n")[0].split())
    return _plain(re.split(r"(?<=[^.]\.) ", text)[0])


def arguments_of(*things: Any) -> dict[str, str]:
    """Argument -> what the docstrings say of it, in one line."""
    found: dict[str, str] = {}
    for thing in things:
        text = inspect.getdoc(thing) or ""
        section = re.search(r"^Args:\n(.*?)(?=^\S|\Z)", text, re.MULTILINE | re.DOTALL)
        for part in re.split(r"^    (?=\w)", section[1] if section else "", flags=re.MULTILINE)[1:]:
            head = re.match(r"([\w, `]+?)(?: \((.*?)\))?:\s(.*)", part, re.DOTALL)
            if head is not None:
                for name in head[1].replace("`", "").split(", "):
                    found.setdefault(name, _plain(" ".join(head[3].split())))
    return found


def _plain(text: str) -> str:
    return re.sub(r"\[`([^`]+)`\](?!\()", r"`\1`", text)


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def _type_name(hint: Any) -> str:
    if isinstance(hint, type) and not typing.get_args(hint):
        return hint.__name__
    return re.sub(r"\b(?:\w+\.)+(?=\w)", "", str(hint)).replace("NoneType", "None")


def _code(value: Any) -> str:
    return f"`{value!r}`"


# Pages


def _index() -> str:
    parts = [
        "# Reference",
        "",
        "Every public name, every field of the config, every key of a recipe and every command, written from the code.",
        "",
        NOTE,
        "",
        "- [Fields of the config](config.md)",
        "- [Keys of a recipe](recipe.md)",
        "- [Commands](commands.md)",
        "- [Limits](../limits.md)",
    ]
    for group, (title, sentence, _) in GROUPS.items():
        rows = []
        for path in names_of(group):
            name = path.rpartition(".")[2]
            thing = getattr(analysis if group == "analysis" else mm_transformers, name)
            rows.append([f"[`{name}`]({group}.md#{path})", summary_of(thing)])
        parts += [
            "",
            f"## {title}",
            "",
            f"{sentence} [All of it]({group}.md).",
            "",
            _table(["name", "what it is"], rows),
        ]
    return "\n".join(parts) + "\n"


def _group(group: str) -> str:
    title, sentence, _ = GROUPS[group]
    names = "\n\n".join(map(_entry, names_of(group)))
    module, _, example = names_of(group)[-1].rpartition(".")
    help_of = (
        f"The whole texts, with examples: `python -c 'import {module} as m; help(m.{example})'`, or the site "
        "(`make docs`)."
    )
    return f"# {title}\n\n{sentence}\n\n{NOTE}\n\n{help_of}\n\n{names}\n"


def _entry(path: str) -> str:
    """A name: in short for readers of the repository, then the line that the site replaces by the whole docstring."""
    module, _, name = path.rpartition(".")
    thing = getattr(analysis if module.endswith("analysis") else mm_transformers, name)
    lines = [
        BEGIN + f'<a id="{path}"></a>',
        "",
        f"## {name}",
        "",
        f"`{name}{_signature(thing)}`: {summary_of(thing)}",
        "",
    ]
    alike: dict[str, list[str]] = {}
    for argument, text in arguments_of(thing).items():
        alike.setdefault(text, []).append(f"`{argument}`")
    parts = [f"- {', '.join(arguments)}: {text}" for text, arguments in alike.items()]
    if inspect.isclass(thing):
        parts += [f"- `.{member}{_signature(value)}`: {summary_of(value)}" for member, value in _members(thing)]
    return "\n".join([*lines, *parts, *([""] if parts else []), END, f"::: {path}"])


def _members(cls: type) -> list[tuple[str, Any]]:
    """The documented methods and properties that no class above has."""
    return [
        (name, getattr(cls, name))
        for name, value in vars(cls).items()
        if not name.startswith("_")
        and not any(hasattr(base, name) for base in cls.__mro__[1:])
        and (inspect.isfunction(value) or isinstance(value, property | classmethod | staticmethod))
        and (value.fget if isinstance(value, property) else getattr(cls, name)).__doc__
    ]


def _signature(thing: Any) -> str:
    """Names and defaults; nothing for a property."""
    if isinstance(thing, property):
        return ""
    found = inspect.signature(thing)
    if len(found.parameters) > MOST_SHOWN:
        return "(...)"
    shown = [
        parameter.replace(annotation=inspect.Parameter.empty, default=_Shown.of(parameter.default))
        for parameter in found.parameters.values()
        if parameter.name != "self" and not parameter.name.startswith("_")
    ]
    return str(inspect.Signature(shown))


class _Shown:
    """A default, as a reader may write it."""

    def __init__(self, text: str) -> None:
        self.text = text

    def __repr__(self) -> str:
        return self.text

    @classmethod
    def of(cls, value: Any) -> Any:
        if value in (inspect.Parameter.empty, None, ()) or isinstance(value, bool | int | float | str):
            return value
        return cls(getattr(value, "__name__", "..."))


def _config() -> str:
    told = arguments_of(MMTransformerConfig)
    fields = MMTransformerConfig.__dataclass_fields__
    own = [name for name in MMTransformerConfig.__annotations__ if name in fields and name in told]
    rows = [[f"`{name}`", _code(fields[name].default), told[name]] for name in own]
    return (
        "# Fields of the config\n\nThe fields of `MMTransformerConfig`. All but the tasks and the configs of encoders "
        f"may also be given to `from_encoders`, and stand in the section `model` of a recipe.\n\n{NOTE}\n\n"
        + _table(["field", "default", "meaning"], rows)
        + "\n"
    )


def _fields(section: type, told: dict[str, str]) -> list[list[str]]:
    hints = typing.get_type_hints(section)
    return [
        [f"`{field.name}`", f"`{_type_name(hints[field.name])}`", _code(field.default), told.get(field.name, "")]
        for field in dataclasses.fields(section)
        if field.name != "own"
    ]


_DATA = {
    "train": "File of training rows: CSV, JSON lines or Parquet.",
    "validation": "File of validation rows.",
    "test": "File of test rows, measured once at the end.",
    "dataset_name": "In place of files: a data set of the Hub, or a folder.",
    "dataset_config_name": "Configuration of that data set.",
    "validation_fraction": "Share of the rows of `train` that is held out for validation.",
    "test_fraction": "Share of the rows of `train` that is held out for the test.",
    "group_column": "Held-out rows share no cell of this column with training rows.",
    "max_train_samples": "So many random rows of `train` only; the same ones at each call.",
    "max_eval_samples": "So many random rows of each of the others only.",
    "image_root": "Folder of relative paths. Default: the folder of each file.",
    "feature_cache": "Folder of a `FeatureCache`.",
}
_COLUMNS = {
    "text": "Column of texts, several columns, or null for a model without texts.",
    "image": "Column of images.",
    "video": "Column of videos.",
    "audio": "Column of sounds.",
    "table": "Columns of numbers and categories: names, or name to kind.",
}


def _recipe() -> str:
    head = ["key", "type", "default", "meaning"]
    told = {**arguments_of(MMDataCollator), **_DATA}
    encoders = arguments_of(MMTransformerForMultiTask.from_encoders)
    model = [
        [f"`{name}`", encoders.get(name, "")] for name in ("text", "vision", "audio", "freeze") if name in encoders
    ]
    ours = arguments_of(MMTrainingArguments)
    training = [
        [f"`{name}`", ours.get(name, "")]
        for name in vars(MMTrainingArguments)["__annotations__"]
        if name in ours and name != "automatic"
    ]
    parts = [
        "# Keys of a recipe",
        "",
        "A recipe has the sections `data`, `columns`, `model`, `tasks` and `training`. "
        "[How to use one](../how-to/recipe.md).",
        "",
        NOTE,
        "",
        "## data",
        "",
        _table(head, _fields(DataSection, told)),
        "",
        "## columns",
        "",
        _table(head, _fields(ColumnsSection, _COLUMNS)),
        "",
        "A modality of your own has a key of its name.",
        "",
        "## model",
        "",
        _table(["key", "meaning"], model),
        "",
        "Also all [fields of the config](config.md) but `tasks` and the configs of encoders, and the options of "
        "loading an encoder: `revision`, `cache_dir`, `token`, `dtype`, `attn_implementation`, `backend`, ...",
        "",
        "## tasks",
        "",
        "A list. Each task has a `name`, a `kind`, and the options of its kind:",
        "",
        _table(["kind", "options"], [[f"`{kind}`", _options(cls)] for kind, cls in sorted(TASK_KINDS.items())]),
        "",
        "[The classes of the kinds](tasks.md) say what each option means. Without `labels`, they are those of the "
        "training rows.",
        "",
        "## training",
        "",
        "All fields of `transformers.TrainingArguments`, and:",
        "",
        _table(["key", "meaning"], training),
    ]
    return "\n".join(parts) + "\n"


def _options(cls: type) -> str:
    if not cls.__module__.startswith("mm_transformers."):
        return ""
    return ", ".join(f"`{field.name}`" for field in dataclasses.fields(cls) if field.init and field.name != "name")


def _commands() -> str:
    group: Any = typer.main.get_command(app)
    parts = [
        "# Commands",
        "",
        "`mm-transformers COMMAND --help` shows the same in a terminal. An option without a default is left out unless "
        "given. Underscores and dashes are the same: `--batch_size`, `--batch-size`.",
        "",
        NOTE,
        "",
        "## Before the command",
        "",
        _parameters(group),
    ]
    for name, command in group.commands.items():
        text = " ".join((command.help or "").split("\b")[0].split("\n\n")[0].split())
        parts += ["", f"## {name}", "", text, "", _parameters(command)]
    return "\n".join(parts) + "\n"


def _parameters(command: Any) -> str:
    rows = []
    for parameter in command.params:
        if parameter.name in ("help", "install_completion", "show_completion"):
            continue
        is_option = parameter.param_type_name == "option"
        names = (
            (*parameter.opts, *parameter.secondary_opts)
            if is_option
            else (parameter.metavar or parameter.name.upper(),)
        )
        default = parameter.default
        is_plain = isinstance(default, str | int | float | Path) and not isinstance(default, bool)
        shown = f"`{default}`" if is_plain else "required" if parameter.required else ""
        if isinstance(default, bool):
            shown = "on" if default else "off"
        rows.append(
            [
                ", ".join(f"`{name}`" for name in names),
                shown,
                _plain(getattr(parameter, "help", None) or ""),
            ]
        )
    return _table(["argument", "default", "meaning"], rows)


if __name__ == "__main__":
    main()
