"""Lists of labels as texts, for tables without lists."""

import ast
import json
import re
from typing import Any, Optional


_BRACKETS = {"[": "]", "(": ")", "{": "}"}
# One item and the text behind it: a quoted text, or a word.
_ITEM = re.compile(r"""\s*('(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*"|[^\s,'"\[\]{}()]+)(\s*,|\s+|$)""", re.DOTALL)
_WORDS = {"none": None, "null": None, "nan": None, "<na>": None, "true": True, "false": False}


def split_labels(text: str, separator: Optional[str]) -> list[Any]:
    """
    The labels in a text: those of a list as JSON, Python, pandas and numpy write it, or those between separators.

    Args:
        text: such as `a|b`, `["a", "b"]`, `['a', 'b']`, `['a' 'b']` or `[0 2]`.
        separator: what stands between labels that are no such list; white space if `None`.

    Example:

    ```python
    >>> split_labels("['sea', 'sun']", "|"), split_labels("sea | sun", "|")
    (['sea', 'sun'], ['sea', 'sun'])
    ```
    """
    items = _listed(text.strip())
    return [label.strip() for label in text.split(separator) if label.strip()] if items is None else items


def _listed(text: str) -> Optional[list[Any]]:
    if len(text) < 2 or _BRACKETS.get(text[0]) != text[-1]:
        return None
    try:
        items = json.loads(text)
        return items if isinstance(items, list) else None
    except (ValueError, RecursionError):
        pass
    # Not by `ast.literal_eval` of the whole: of numpy's ['a' 'b'] it would make one text.
    inside, start, items = text[1:-1].rstrip(), 0, []
    while start < len(inside):
        found = _ITEM.match(inside, start)
        if found is None:
            return None
        try:
            items.append(_item(found.group(1)))
        except (ValueError, SyntaxError):
            return None
        start = found.end()
    return items


def _item(text: str) -> Any:
    if text[0] in "'\"":
        return ast.literal_eval(text)
    if text.lower() in _WORDS:
        return _WORDS[text.lower()]
    return int(text) if re.fullmatch(r"[-+]?[0-9]{1,400}", text) else float(text)
