"""Calls of a tokenizer, one thread at a time, with no more text than is needed."""

import os
import threading
from typing import Any

from .limits import limits


def _renew_lock() -> None:
    # A process that forks while another thread holds the lock would never get it.
    global _lock
    _lock = threading.RLock()


_lock = threading.RLock()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_lock)


def tokenize(tokenizer: Any, *texts: Any, **options: Any) -> Any:
    """
    `tokenizer(*texts, **options)`. A fast tokenizer keeps padding and truncation from call to call: of two threads, one
    would tokenize with the options of the other.
    """
    with _lock:
        return tokenizer(*texts, **options)


# How many tokens behind the wanted ones must be known, so that none of these depends on where the text was cut.
_MARGIN = 16
# How long a text is before it is cut: so many characters for each wanted token, and so many more.
_CHARACTERS = (8, 1000)


def needed_text(tokenizer: Any, text: str, num_tokens: int, key: str = "text") -> str:
    """
    A beginning of a text with more than `num_tokens` tokens, of which these are those of the whole text; the text
    itself, if it is not long. So an endless text costs no more than one that is just too long.

    The text is cut before a space, where tokenizers begin a new word. What exceeds the limit `text_characters` is left
    out, wherever that is. Where the tokenizer keeps the end of a text, that is what remains.

    Args:
        tokenizer: says which side it cuts off.
        num_tokens: how many tokens the caller keeps.
        key: what the tokenizer calls the text; `"text_target"` if a decoder is to write it.
    """
    most = limits().text_characters
    if getattr(tokenizer, "truncation_side", "right") != "right":
        return text[-most:]
    text, size = text[:most], _CHARACTERS[0] * num_tokens + _CHARACTERS[1]
    while size < len(text):
        end = text.rfind(" ", size // 2, size)
        while end > 0 and text[end - 1].isspace():
            end -= 1
        if end > 0:
            start = tokenize(tokenizer, **{key: text[:end]}, add_special_tokens=False, verbose=False)["input_ids"]
            if len(start) >= num_tokens + _MARGIN:
                return text[:end]
        size *= 2
    return text
