"""
The YAML of recipes: only the plain words true, false and null have a meaning, and 1e-4 is a number.

This is the core schema of YAML 1.2, which includes JSON. PyYAML reads YAML 1.1: there a label `no` is a truth value,
`12:30` is 750, and `1e-4` is a text.
"""

import re
from pathlib import Path
from typing import Any

import yaml

from ...model.limits import limits, named
from ...model.messages import one_line, shortened


_PLAIN = {
    "null": (r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    "bool": (r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    "int": (r"[-+]?[0-9]+", list("-+0123456789")),
    "float": (
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        list("-+0123456789."),
    ),
}


# With aliases, a few hundred bytes can hold billions of values.
_MOST_VALUES = 100_000
_DEEPEST = 50


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: dict[str, Any] = {}
    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        self.depth += 1
        if self.depth > _DEEPEST:
            mark = self.peek_event().start_mark
            raise yaml.MarkedYAMLError(problem=f"it is nested more than {_DEEPEST} levels deep", problem_mark=mark)
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def get_single_node(self) -> yaml.Node | None:
        node = super().get_single_node()
        if node is not None:
            _count(node, {}, ())
        return node

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except yaml.YAMLError:
            raise
        except Exception as error:  # from a tag that does not fit its value
            value = shortened(node.value) if isinstance(node, yaml.ScalarNode) else "this"
            kind = node.tag.rpartition(":")[2]
            raise yaml.MarkedYAMLError(
                problem=f"{value} cannot be read as {kind}", problem_mark=node.start_mark
            ) from error

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                raise yaml.MarkedYAMLError(problem="a key must be a text", problem_mark=key_node.start_mark)
            key_node.tag = "tag:yaml.org,2002:str"  # as keys of JSON are
            key = key_node.value
            if key in seen:
                raise yaml.MarkedYAMLError(problem=f"{key!r} occurs twice", problem_mark=key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


def _count(node: yaml.Node, known: dict[int, int], parents: tuple[int, ...]) -> int:
    """The number of values of a node; those of aliases count each time."""
    if id(node) in known:
        return known[id(node)]
    if id(node) in parents:
        raise yaml.MarkedYAMLError(problem="an alias refers to its own parent", problem_mark=node.start_mark)
    children: list[Any] = [] if isinstance(node, yaml.ScalarNode) else list(node.value)
    flat = [part for child in children for part in (child if isinstance(child, tuple) else (child,))]
    number = 1 + sum(_count(child, known, (*parents, id(node))) for child in flat)
    if number > _MOST_VALUES:
        raise yaml.MarkedYAMLError(
            problem=f"its aliases expand to more than {_MOST_VALUES:,} values", problem_mark=node.start_mark
        )
    known[id(node)] = number
    return number


class _Dumper(yaml.SafeDumper):
    yaml_implicit_resolvers: dict[str, Any] = {}

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _as_int(loader: _Loader, node: yaml.ScalarNode) -> int:
    return int(loader.construct_scalar(node))  # 010 is ten


_Loader.add_constructor("tag:yaml.org,2002:int", _as_int)
for _kind, (_pattern, _first) in _PLAIN.items():
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(f"tag:yaml.org,2002:{_kind}", re.compile(rf"^(?:{_pattern})$"), _first)


def parse_yaml(text: str) -> Any:
    """
    The value of a YAML text.

    Raises:
        ValueError: one sentence with the place where the text is not valid YAML.
    """
    if len(text) > limits().recipe_bytes:
        raise ValueError(f"it has more characters than {named('recipe_bytes')}.")
    try:
        return yaml.load(text, Loader=_Loader)
    except RecursionError as error:
        raise ValueError("it is nested too deeply.") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark is not None else ""
        raise ValueError(f"{where}{one_line(getattr(error, 'problem', None) or error)}") from error


def read_yaml(path: Path) -> dict[str, Any]:
    """
    The sections of a recipe file, YAML or JSON.

    Raises:
        ValueError: one sentence, if the file does not exist, or holds something else.
    """
    if not path.is_file():
        raise ValueError(f"There is no recipe {path}.")
    try:
        with path.open(encoding="utf-8-sig") as file:
            values = parse_yaml(file.read(limits().recipe_bytes + 1))
    except (ValueError, OSError) as error:
        raise ValueError(f"{path} cannot be read as YAML: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold the sections of a recipe, but holds {type(values).__name__}.")
    return values


def dump_yaml(values: dict[str, Any]) -> str:
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=110)
