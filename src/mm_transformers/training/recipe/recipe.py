"""A recipe: all settings of one training, in one file."""

import dataclasses
import difflib
import itertools
import os
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, get_args, get_origin, get_type_hints

from huggingface_hub.dataclasses import type_validator
from transformers import TrainingArguments

from ...data.row_labels import as_columns
from ...model.configuration_mm_transformer import MMTransformerConfig
from ...model.encoders import HUB_KWARGS
from ...model.messages import shortened
from ...model.modalities import ENCODERS, PARTS, own_encoders
from ...model.safe_writing import write_atomically
from ...model.tasks import TASK_KINDS
from ..arguments import MMTrainingArguments
from .trust import check_powers
from .yaml_format import dump_yaml, parse_yaml, read_yaml


RECIPE_NAME = "recipe.yaml"
SECTIONS = ("data", "columns", "model", "tasks", "training")


@dataclass
class DataSection:
    """
    The rows and how to read them; see [`MMDataCollator`] for the last four.

    `test_fraction` and `validation_fraction` are shares of all rows of `train`; [`hold_out_rows`] takes them out. Rows
    with the same cell of `group_column` stay together. `feature_cache` is the folder of a [`FeatureCache`].
    """

    train: str | None = None
    validation: str | None = None
    test: str | None = None
    dataset_name: str | None = None
    dataset_config_name: str | None = None
    validation_fraction: float | None = None
    test_fraction: float | None = None
    group_column: str | None = None
    max_train_samples: int | None = None
    max_eval_samples: int | None = None
    image_root: str | None = None
    feature_cache: str | None = None
    label_separator: str = "|"
    on_bad_file: str = "raise"
    sampling_rate: int | None = None
    max_length: int | None = None
    pad_to_multiple_of: int | None = None

    @property
    def files(self) -> dict[str, str]:
        files = {"train": self.train, "validation": self.validation, "test": self.test}
        return {split: path for split, path in files.items() if path is not None}

    @property
    def collator_options(self) -> dict[str, Any]:
        names = ("on_bad_file", "sampling_rate", "max_length", "pad_to_multiple_of", "label_separator")
        return {name: getattr(self, name) for name in names}


@dataclass
class ColumnsSection:
    """The names of the columns of the data."""

    text: str | list[str] | None = "text"
    image: str | list[str] = "image"
    video: str = "video"
    audio: str | list[str] = "audio"
    # The columns of numbers and categories: names, or name -> kind, as in [`table_columns`].
    table: list[Any] | dict[str, Any] | None = None
    # The columns of modalities of your own: name -> column.
    own: dict[str, str] = field(default_factory=dict)

    @classmethod
    def hints(cls) -> dict[str, Any]:
        """The keys of the section in a file, with their types."""
        hints = {name: hint for name, hint in get_type_hints(cls).items() if name != "own"}
        return {**dict.fromkeys(PARTS, str), **hints}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "ColumnsSection":
        """The section from its checked content in a file."""
        known = {f.name for f in dataclasses.fields(cls)}
        own = {name: column for name, column in values.items() if name not in known}
        return cls(**{name: value for name, value in values.items() if name in known}, own=own)

    @classmethod
    def from_columns(cls, columns: typing.Mapping[str, typing.Sequence[str]]) -> "ColumnsSection":
        """The section of known columns, in the form of [`by_key`]."""
        return cls.from_dict({key: names[0] if len(names) == 1 else list(names) for key, names in columns.items()})

    @property
    def plain(self) -> dict[str, Any]:
        """The columns of texts, images, videos and sounds, as arguments."""
        names = ("text", "image", "video", "audio")
        return {f"{name}_column": getattr(self, name) for name in names}

    @property
    def collator_options(self) -> dict[str, Any]:
        return {**self.plain, **{f"{name}_column": column for name, column in self.own.items()}}

    @property
    def by_modality(self) -> dict[str, list[str]]:
        """The columns of each modality with one input per column, also of your own."""
        return {name: as_columns(self.own.get(name, getattr(self, name, name))) for name in PARTS}

    @property
    def files(self) -> list[str]:
        """The columns whose texts are paths or addresses of files."""
        return [column for name, columns in self.by_modality.items() if PARTS[name].has_files for column in columns]

    def by_key(self, modalities: typing.Sequence[str]) -> dict[str, list[str]]:
        """
        The columns that have another name than the key of a row.

        Args:
            modalities: those that the model reads beside texts.
        """
        read = {"text", *(name for name, part in PARTS.items() if part.encoder.name in modalities)}
        found = {"text": as_columns(self.text), **self.by_modality}
        return {name: names for name, names in found.items() if name in read and names and names != [name]}


def are_columns(value: Any) -> bool:
    """Whether a value of a recipe is a list of columns."""
    return isinstance(value, list) and bool(value) and all(isinstance(name, str) for name in value)


def _model_hints() -> dict[str, Any]:
    """The encoders, the config fields that do not come from them, and the options of loading an encoder."""
    made = (*(f"{name}_config" for name in ENCODERS), "tasks")
    config = {
        name: hint
        for name, hint in MMTransformerConfig.__annotations__.items()
        if name not in made and get_origin(hint) is not ClassVar
    }
    loading: dict[str, type] = dict.fromkeys(HUB_KWARGS, bool)
    loading |= dict.fromkeys(("revision", "cache_dir", "token", "dtype", "attn_implementation", "backend"), str)
    own = dict.fromkeys(own_encoders(), dict | None)
    loading["image_size"] = int  # of the processor
    return {"text": str, "vision": str | None, "audio": str | None, **own, **config, **loading}


def _training_hints() -> dict[str, Any]:
    """The fields of [`MMTrainingArguments`] that [`MMTrainer`] uses."""
    hints = get_type_hints(MMTrainingArguments)
    names = [f.name for f in dataclasses.fields(TrainingArguments) if f.init]
    names += [name for name in vars(MMTrainingArguments)["__annotations__"] if name not in names]
    return {name: hints[name] for name in [*names, "generation_max_length", "generation_num_beams"]}


# Paths that may be relative to the recipe. The latter only if such a file exists: they may be names of the Hub.
_PATHS = {"data": ("train", "validation", "test", "image_root", "feature_cache"), "training": ("output_dir",)}
_PERHAPS_PATHS = {
    "data": ("dataset_name",),
    "model": ("text", "vision", "audio", "cache_dir"),
    "training": ("resume_from_checkpoint", "deepspeed", "fsdp_config"),
}
# Options that do not affect the weights, so that a training may resume with another value.
_NO_MATTER = {
    "data": ("test", "max_eval_samples", "feature_cache"),
    "model": ("cache_dir", "token", "local_files_only", "force_download", "trust_remote_code"),
}
SECRETS = ("token", "hub_token", "push_to_hub_token")


@dataclass
class Recipe:
    """
    The checked content of a recipe file.

    Args:
        data, columns: see [`DataSection`] and [`ColumnsSection`].
        model: `text`, `vision` and `audio`, ids of the Hub or folders; `table`, sizes of [`TableConfig`]; fields of
            [`MMTransformerConfig`]; and options of `from_encoders`.
        tasks: the tasks in the form of `config.json`; labels may be missing.
        training: fields of `TrainingArguments`.
        comment: lines at the top of the file, without their "#".
    """

    data: DataSection
    columns: ColumnsSection
    model: dict[str, Any]
    tasks: list[dict[str, Any]]
    training: dict[str, Any] = field(default_factory=dict)
    # Lines at the top of the file, each without "#".
    comment: list[str] = field(default_factory=list, compare=False)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Recipe":
        """
        A recipe from the sections of a file.

        Raises:
            ValueError: one sentence with the full path of the key, if it is unknown, missing, or its value does not
                fit.
        """
        _check_keys(values, SECTIONS, "")
        for name in SECTIONS:
            kind: type = list if name == "tasks" else dict
            value = kind() if values.get(name) is None else values[name]
            if not isinstance(value, kind):
                what = "a list of tasks" if name == "tasks" else "a section with keys"
                raise ValueError(f"{name} must be {what}, but is {shortened(value)}.")
            values = {**values, name: value}
        data = DataSection(**_checked(values["data"], get_type_hints(DataSection), "data"))
        columns = ColumnsSection.from_dict(_checked(values["columns"], ColumnsSection.hints(), "columns"))
        model = _checked(values["model"], _model_hints(), "model")
        training = _checked(values["training"], _training_hints(), "training")
        tasks = [_checked_task(task, f"tasks.{i}") for i, task in enumerate(values["tasks"])]
        for section, key, known in (("model", "text", model), ("training", "output_dir", training)):
            if key == "text" and columns.text is None:
                continue  # a model that reads no text
            if known.get(key) is None:
                raise ValueError(f"The recipe needs {section}.{key}.")
        if not tasks:
            raise ValueError("The recipe needs tasks, for example tasks: [{name: topic, kind: classification}].")
        if (data.dataset_name is None) == (data.train is None):
            raise ValueError("The recipe needs either data.train, a file, or data.dataset_name.")
        if data.dataset_name is not None and (data.files or data.image_root is not None):
            other = "image_root" if data.image_root is not None else next(iter(data.files))
            raise ValueError(f"data.{other} goes with data.train; leave it out with data.dataset_name.")
        for name in ("validation_fraction", "test_fraction"):
            if (share := getattr(data, name)) is not None and not 0 < share < 1:
                raise ValueError(f"data.{name} must lie between 0 and 1, but is {share}.")
        if (data.validation_fraction or 0) + (data.test_fraction or 0) >= 1:
            raise ValueError("data.validation_fraction and data.test_fraction together must be below 1.")
        for name in ("max_train_samples", "max_eval_samples", "sampling_rate", "max_length", "pad_to_multiple_of"):
            if (number := getattr(data, name)) is not None and number < 1:
                raise ValueError(f"data.{name} must be at least 1, but is {number}.")
        for name in ("text", "image", "audio"):
            value = getattr(columns, name)
            if isinstance(value, list) and not are_columns(value):
                raise ValueError(f"columns.{name} must be a column, or a list of columns, but is {shortened(value)}.")
        return cls(data, columns, model, tasks, training)

    def to_dict(self) -> dict[str, Any]:
        """A dict that can be read again; without defaults, and without secrets."""
        values: dict[str, Any] = {
            "data": _not_default(self.data),
            "columns": {**_not_default(self.columns), **self.columns.own},
            "model": self.model,
            "tasks": self.tasks,
            "training": self.training,
        }
        for name in ("model", "training"):
            values[name] = {key: value for key, value in values[name].items() if key not in SECRETS}
        return {name: value for name, value in values.items() if value}

    def save(self, folder: Path) -> None:
        """Writes `recipe.yaml` atomically."""
        with write_atomically(folder / RECIPE_NAME) as file:
            comment = "".join(f"# {line}".rstrip() + "\n" for line in self.comment)
            file.write((comment + dump_yaml(self.to_dict())).encode())

    def differences(self, other: "Recipe") -> list[str]:
        """Differences that change the weights even with equal training: sentences without a full stop."""
        mine, others = self._matters(), other._matters()
        return [
            f"{key} is {shortened(others.get(key))} there and {shortened(mine.get(key))} here"
            for key in dict.fromkeys([*mine, *others])
            if mine.get(key) != others.get(key)
        ]

    def _matters(self) -> dict[str, Any]:
        defaults = {name: getattr(MMTransformerConfig, name, None) for name in _model_hints()}
        sections = {
            "data": dataclasses.asdict(self.data),
            "columns": dataclasses.asdict(self.columns),
            "model": {**defaults, **self.model},
        }
        flat = {
            f"{name}.{key}": value
            for name, section in sections.items()
            for key, value in section.items()
            if key not in _NO_MATTER.get(name, ())
        }
        flat["the order of the tasks"] = [task["name"] for task in self.tasks]
        for task in self.tasks:
            for key, value in {"column": task["name"], **_task_defaults(task), **task}.items():
                if key != "metrics":
                    flat[f"{key} of task {task['name']!r}"] = value
        return flat


def read_recipe(path: str | os.PathLike[str], overrides: typing.Sequence[str] = ()) -> Recipe:
    """
    The recipe of a YAML or JSON file.

    Args:
        path: the file. Relative paths in it start at its folder.
        overrides: `section.key=value`, as on a command line: values are YAML, and relative paths start at the current
            folder. Numbers are places in lists: `tasks.0.loss_weight=2`. Options that run code or send data away are
            allowed only here, as by `model.trust_remote_code=true`; see [`check_powers`].

    Raises:
        ValueError: one sentence that names the key, or the file.
    """
    path = Path(path)
    values = _with_root(read_yaml(path), path.absolute().parent)
    asked = {name: dict(section) if isinstance(section, dict) else section for name, section in values.items()}
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key:
            raise ValueError(f"{override!r} must read section.key=value, such as training.learning_rate=1e-4.")
        try:
            value = parse_yaml(text)
        except ValueError as error:
            raise ValueError(f"The value of {key} cannot be read as YAML: {error}") from error
        parts = key.split(".")
        if len(parts) <= 2:
            nested = _with_root({parts[0]: value if len(parts) == 1 else {parts[1]: value}}, Path.cwd())
            value = nested[parts[0]] if len(parts) == 1 else nested[parts[0]][parts[1]]
        _override(values, parts, value, key)
    try:
        check_powers(asked, values, overrides)
        recipe = Recipe.from_dict(values)
        recipe.comment = _comment(path)
        return recipe
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _comment(path: Path) -> list[str]:
    """The lines of comment at the top of a file."""
    lines = itertools.takewhile(lambda line: line.startswith("#"), path.read_text(encoding="utf-8-sig").splitlines())
    return [line.removeprefix("#").removeprefix(" ") for line in lines]


def _override(values: Any, parts: list[str], value: Any, whole: str) -> None:
    first, *rest = parts
    here = whole.split(".")[: -len(rest) or None]
    if isinstance(values, list):
        if not first.isdigit() or int(first) >= len(values):
            raise ValueError(
                f"{whole}: there is no {'.'.join(here)}; the places of this list are 0 to {len(values) - 1}."
            )
        key: Any = int(first)
    elif isinstance(values, dict):
        key = first
    else:
        raise ValueError(f"{whole}: {'.'.join(here[:-1])} is {shortened(values)}, so it has no keys.")
    if not rest:
        values[key] = value
        return
    if isinstance(values, dict) and values.get(key) is None:
        values[key] = {}
    _override(values[key], rest, value, whole)


def _with_root(values: dict[str, Any], folder: Path) -> dict[str, Any]:
    """A copy with absolute paths."""
    values = dict(values)
    for name, section in values.items():
        if not isinstance(section, dict):
            continue
        values[name] = section = dict(section)
        for key, value in section.items():
            if not isinstance(value, str):
                continue
            path = os.path.abspath(folder / os.path.expanduser(value))
            means_path = value.startswith(("./", "../", "~")) or os.path.exists(path)
            if key in _PATHS.get(name, ()) or (key in _PERHAPS_PATHS.get(name, ()) and means_path):
                section[key] = path
    return values


def _short_key(key: str) -> str:
    return key if len(key) <= 100 else f"{key[:100]}..."


def _keys_of_sections() -> dict[str, Any]:
    """Section -> its known keys; without tasks, since each task has its own keys."""
    return {
        "data": get_type_hints(DataSection),
        "columns": ColumnsSection.hints(),
        "model": _model_hints(),
        "training": _training_hints(),
    }


def _check_keys(values: dict[str, Any], known: typing.Iterable[str], where: str) -> None:
    for key in values:
        if key not in known:
            dotted = _short_key(f"{where}.{key}" if where else str(key))
            other = next(
                (name for name, keys in _keys_of_sections().items() if where in SECTIONS and key in keys), None
            )
            if other is not None:
                raise ValueError(f"{dotted} is unknown; did you mean {other}.{key}?")
            near = difflib.get_close_matches(str(key)[:100], known, 1) or sorted(known)
            hint = f"did you mean {f'{where}.' if where else ''}{near[0]}?"
            if len(near) > 1:
                hint = f"known are {', '.join(near)}." if len(near) < 20 else "see mm-transformers train --help."
            raise ValueError(f"{dotted} is unknown; {hint}")


def _checked(values: dict[str, Any], hints: dict[str, Any], where: str) -> dict[str, Any]:
    _check_keys(values, hints, where)
    return {key: _checked_value(value, hints[key], f"{where}.{key}") for key, value in values.items()}


def _checked_value(value: Any, hint: Any, where: str) -> Any:
    kinds = get_args(hint) or (hint,)
    if isinstance(value, int) and not isinstance(value, bool) and float in kinds and int not in kinds:
        value = float(value)
    try:
        type_validator(where, value, hint)
    except TypeError as error:
        wanted = " or ".join(_name_of(kind) for kind in kinds)
        raise ValueError(f"{where} must be {wanted}, but is {shortened(value)}.") from error
    return value


def _name_of(hint: Any) -> str:
    names = {str: "a text", int: "a whole number", float: "a number", bool: "true or false", type(None): "null"}
    names |= {dict: "a mapping", list: "a list"}
    if get_origin(hint) is typing.Literal:
        return " or ".join(map(repr, get_args(hint)))
    return names.get(get_origin(hint) or hint, getattr(hint, "__name__", str(hint)))


def _checked_task(task: Any, where: str) -> dict[str, Any]:
    if not isinstance(task, dict) or not isinstance(task.get("name"), str):
        raise ValueError(f"{where} must be a task with a name and a kind, but is {shortened(task)}.")
    kind = task.get("kind")
    if not isinstance(kind, str) or kind not in TASK_KINDS:
        near = difflib.get_close_matches(str(kind)[:100], TASK_KINDS, 1)
        hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(sorted(TASK_KINDS))}."
        raise ValueError(f"{where}.kind is {shortened(kind)}, which is unknown; {hint}")
    hints = get_type_hints(TASK_KINDS[kind])
    options = {f.name: hints[f.name] for f in dataclasses.fields(TASK_KINDS[kind])}
    # A task checks its values itself, with an error that names the task.
    _check_keys(task, {"kind": str, **options}, where)
    for key in ("loss_weight", "column"):
        if key in task:
            task = {**task, key: _checked_value(task[key], options[key], f"{where}.{key}")}
    return task


def _task_defaults(task: dict[str, Any]) -> dict[str, Any]:
    known = dataclasses.fields(TASK_KINDS[task["kind"]])
    return {f.name: f.default for f in known if f.default is not dataclasses.MISSING and f.default is not None}


def _not_default(section: Any) -> dict[str, Any]:
    values = {f.name: (getattr(section, f.name), f.default) for f in dataclasses.fields(section) if f.name != "own"}
    return {name: value for name, (value, default) in values.items() if value != default}
