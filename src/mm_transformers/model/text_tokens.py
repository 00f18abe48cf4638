"""Tokenizes texts: by one thread at a time, and no more text than needed."""

import os
import re
import threading
from collections.abc import Mapping, Sequence
from typing import Any, Optional

from .limits import limits


def _renew_lock() -> None:
    # After a fork while another thread holds the lock, the new process would never get it.
    global _lock
    _lock = threading.RLock()


_lock = threading.RLock()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_lock)


def tokenize(tokenizer: Any, *texts: Any, **options: Any) -> Any:
    """
    `tokenizer(*texts, **options)`, by one thread at a time.

    A fast tokenizer keeps padding and truncation from call to call, so two threads could get each other's options.
    """
    with _lock:
        return tokenizer(*texts, **options)


def end_id(tokenizer: Any) -> Optional[int]:
    """The id of the token that ends a written text; `None` if the tokenizer has none."""
    return tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.sep_token_id


# Extra tokens beyond the wanted ones, so that the cut changes none of these.
_MARGIN = 16
# The cut of a text: characters per wanted token, plus a constant.
_CHARACTERS = (8, 1000)


def needed_text(tokenizer: Any, text: str, num_tokens: int, key: str = "text") -> str:
    """
    The beginning of a long text, with the same first `num_tokens` tokens; a short text unchanged.

    So an endless text costs no more than one that is just too long. The text is cut before a space, where tokenizers
    begin a new word. Characters beyond the limit `text_characters` are left out. If the tokenizer truncates on the
    left, the end of the text remains, with the same last tokens.

    Args:
        tokenizer: that of transformers.
        num_tokens: the number of tokens that the caller keeps.
        key: the tokenizer's argument for the text; `"text_target"` for texts that a decoder writes, whose beginning is
            needed.
    """
    most, size = limits().text_characters, _CHARACTERS[0] * num_tokens + _CHARACTERS[1]
    keeps_end = key == "text" and getattr(tokenizer, "truncation_side", "right") != "right"
    text = text[-most:] if keeps_end else text[:most]
    while size < len(text):
        place = _space(text, size, keeps_end)
        if place > 0:
            part = text[place:] if keeps_end else text[:place]
            found = tokenize(tokenizer, **{key: part}, add_special_tokens=False, verbose=False)["input_ids"]
            if len(found) >= num_tokens + _MARGIN:
                return part
        size *= 2
    return text


def _space(text: str, size: int, keeps_end: bool) -> int:
    """The place of the space before which a text is cut to about `size` characters; not above 0 if there is none."""
    place = text.find(" ", len(text) - size, len(text) - size // 2) if keeps_end else text.rfind(" ", size // 2, size)
    while place > 0 and text[place - 1].isspace():
        place -= 1
    return place


# Stand for the end of a text: tokenizers split before a space and behind a line break.
_WORD, _LINE = "a", "\n"
# Scripts without spaces: Thai to Tibetan, Myanmar, Khmer, and those of Chinese and Japanese.
_UNSPACED = re.compile("[\u0e00-\u0fff\u1000-\u109f\u1780-\u17ff\u3000-\u30ff\u3400-\u9fff\uf900-\ufaff\uff00-\uffef]")


def _end_of(before: str, text: str, special: tuple[str, ...]) -> str:
    """What stands for the text before; "" if the text stands as it would alone."""
    if not before or not text or before.endswith(special):
        return ""
    if before[-1].isspace():
        return _LINE
    return "" if _UNSPACED.match(before[-1]) or _UNSPACED.match(text) else _WORD


def continuing_ids(tokenizer: Any, texts: Sequence[str], before: Sequence[str]) -> list[list[int]]:
    """
    The ids of texts that continue others, without special tokens.

    "dog" has one id at the start of a text, and another one behind a word and a space. So a space stands between a text
    and the one before it. There is none after white space or a special token, or in scripts without spaces.

    Args:
        tokenizer: that of transformers.
        texts, before: each text, and the text before it; "" if there is none.

    Example:

    ```python
    >>> tokenizer.convert_ids_to_tokens(continuing_ids(tokenizer, ["dog"], ["a drawing of a"])[0])
    ['Ġdog']
    ```
    """
    special = tuple(tokenizer.all_special_tokens)
    ends = [_end_of(ahead, text, special) for text, ahead in zip(texts, before, strict=True)]
    options = {"add_special_tokens": False, "verbose": False}
    joined = [
        end + (" " if end == _WORD and not text[0].isspace() else "") + text
        for end, text in zip(ends, texts, strict=True)
    ]
    of_end = {end: tokenize(tokenizer, end, **options)["input_ids"] if end else [] for end in set(ends)}
    result = []
    for text, end, ids in zip(texts, ends, tokenize(tokenizer, joined, **options)["input_ids"], strict=True):
        first = of_end[end]
        # A tokenizer may join the end with what follows. Then the text stands alone.
        is_apart = ids[: len(first)] == first
        result.append(ids[len(first) :] if is_apart else tokenize(tokenizer, text, **options)["input_ids"])
    return result


def join_texts(texts: Mapping[str, str], num_columns: Optional[int] = None) -> str:
    """
    One text from several columns, each with its name before it. Empty ones are left out.

    Args:
        texts: column -> text.
        num_columns (`int`, *optional*): The number of columns of texts, if some are not in `texts`. A single column has
            no name before it.

    Example:

    ```python
    >>> join_texts({"title": "Old chair", "colour": "", "description": "Made of oak."})
    'title: Old chair\\ndescription: Made of oak.'
    ```
    """
    if (num_columns or len(texts)) == 1:
        return next(iter(texts.values()))
    return "\n".join(f"{column}: {text}" for column, text in texts.items() if text.strip())
