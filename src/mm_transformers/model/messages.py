"""Parts of messages: errors of other libraries in one line, shortened values, and missing folders."""

import difflib
import os
import reprlib
from collections.abc import Iterable, Sequence, Sized
from typing import Any, Optional

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id


_short = reprlib.Repr()
_short.maxstring = _short.maxother = 80
_short.maxlevel = 3
_short.maxlist = _short.maxtuple = _short.maxdict = _short.maxset = 12
# Comparing longer names takes seconds; they may come from strangers.
_LONGEST_NAME = 100


def one_line(error: Any, longest: int = 400) -> str:
    """The message of an error of another library, as one line with a full stop."""
    text = " ".join(str(error)[: 10 * longest].split()) or type(error).__name__
    text = text if len(text) <= longest else f"{text[:longest]} ..."
    return text if text.endswith((".", "!", "?")) else f"{text}."


def listed(names: Sequence[str], word: str = "and") -> str:
    """
    Names in a sentence.

    Example:

    ```python
    >>> listed(["text", "images", "sound"])
    'text, images and sound'
    ```
    """
    return f" {word} ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def and_more(names: Sized) -> str:
    """The text after the first of several names in a message."""
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""


def shortened(value: Any) -> str:
    """
    The `repr` of a value, but always short: a few kilobytes of YAML can hold gigabytes.

    Example:

    ```python
    >>> shortened(list(range(1000)))
    '[0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, ...]'
    ```"""
    return _short.repr(value)


def nearest(name: str, known: Iterable[str]) -> Optional[str]:
    """
    The known name that is most similar to an unknown one; `None` if none is similar, or the name is very long.

    Example:

    ```python
    >>> nearest("sentimant", ["topic", "sentiment"])
    'sentiment'
    ```
    """
    near = difflib.get_close_matches(name, list(known), 1) if len(name) <= _LONGEST_NAME else []
    return near[0] if near else None


def check_folder(path: Any, what: str = "a saved model") -> None:
    """
    Checks that a folder exists, unless the path can be a Hub id.

    Args:
        path: The given folder or Hub id.
        what: The expected content.

    Raises:
        OSError: one sentence, if it can be no Hub id, and there is no such folder.
    """
    text = os.fspath(path) if isinstance(path, (str, os.PathLike)) else ""
    if not text or os.path.exists(os.path.expanduser(text)):
        return
    is_path = text.startswith((".", "~", os.sep)) or text.count("/") > 1 or text.endswith("/") or "\\" in text
    if not is_path:
        try:
            validate_repo_id(text)
        except HFValidationError:
            is_path = True
    if is_path:
        raise OSError(f"There is no folder {text[:300]!r}; give the folder or the Hub id of {what}.")
