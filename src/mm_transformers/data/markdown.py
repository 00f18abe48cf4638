"""Names, labels and texts from untrusted sources as plain text in Markdown."""

import re
from typing import Any


_CONTROLS = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]+")
_SPECIAL = re.compile(r"([\\`*<>\[\]|~&$]|(?<=www)\.|:(?=//))", re.IGNORECASE)


def plain_markdown(text: Any) -> str:
    """
    A text that Markdown shows unchanged, in one line: without links, HTML, code or new cells of a table.

    Example:

    ```python
    >>> plain_markdown("a|b <b>")
    'a\\\\|b \\\\<b\\\\>'
    ```
    """
    return _SPECIAL.sub(r"\\\1", _CONTROLS.sub(" ", str(text)))
