"""Reads the docstrings of this package for the site: [`Name`] becomes a link, types are as Google writes them."""

import re
from typing import Any

import griffe


PACKAGE = "mm_transformers"


class Docstrings(griffe.Extension):
    def on_package(self, *, pkg: griffe.Module, **_: Any) -> None:
        public = {}
        for module in (pkg["analysis"], pkg):
            for name in (str(export) for export in module.exports or ()):
                public[name] = f"{module.path}.{name}"
        for thing in _everything(pkg):
            if thing.docstring is not None:
                thing.docstring.value = rewritten(thing.docstring.value, public)


def _everything(thing: Any) -> Any:
    yield thing
    for member in thing.members.values():
        if not member.is_alias:
            yield from _everything(member)


def rewritten(text: str, public: dict[str, str]) -> str:
    """
    Args:
        text: a docstring.
        public: public name -> its path.
    """

    def linked(match: re.Match[str]) -> str:
        return f"[`{match[1]}`][{public[match[1]]}]" if match[1] in public else f"`{match[1]}`"

    def without_marks(match: re.Match[str]) -> str:
        return f"{match[1]} ({re.sub('[`*]', '', match[2])}):"

    # Before links are made: types as transformers writes them, "name (`str`, *optional*):", as Google does.
    text = re.sub(r"^(\s+\w+) \(\[?(`[^)]*?)\]?\):", without_marks, text, flags=re.MULTILINE)
    return re.sub(r"\[`~?([\w.]+)`\](?![\[(])", linked, text)
