"""Texts that spreadsheets would run: how they are written in CSV files, and read again as labels."""

import re


_FORMULA = re.compile(r"'*[=+\-@\t\r\n＝＋－＠]")
_ESCAPED = re.compile(r"'+[=+\-@\t\r\n＝＋－＠]")
_NUMBER = re.compile(r"[-+]?(\d[\d.,]*|\.\d+|inf|infinity|nan)([eE][-+]?\d+)?%?", re.IGNORECASE)


def without_formula(text: str) -> str:
    """
    A cell that no spreadsheet takes for a formula: what begins like one has an apostrophe before it. Numbers, and signs
    alone, stay as they are.

    Example:

    ```python
    >>> without_formula("=1+1"), without_formula("-1")
    ("'=1+1", '-1')
    ```
    """
    is_formula = len(text) > 1 and _FORMULA.match(text) and not _NUMBER.fullmatch(text)
    return f"'{text}" if is_formula else text


def with_formula(text: str) -> str:
    """What [`without_formula`] was given."""
    return text[1:] if _ESCAPED.match(text) else text
