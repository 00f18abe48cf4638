"""Rows that hold a chat, `{"messages": [...]}`: its text by the chat template of the tokenizer, and its pictures."""

from collections.abc import Mapping, Sequence
from typing import Any

from .messages import one_line, shortened
from .text_tokens import tokenize


MESSAGES = "messages"
# The types of parts of a message beside text, and the keys of such a part that may hold the item itself.
_MEDIA = ("image", "video", "audio")
_ITEM_KEYS = ("url", "path", "base64")


def without_chat(tokenizer: Any, row: Mapping[str, Any]) -> dict[str, Any]:
    """
    A row with "text", "image", "video" and "audio" instead of "messages"; other rows unchanged.

    The text ends where the answer of the assistant begins, unless the last message is one of the assistant, which is
    then continued.

    Args:
        tokenizer: that of the language model; its chat template makes the text.
        row: may hold `messages`, as transformers has them: `[{"role": "user", "content": "Hello."}]`. The content is a
            text, or a list of parts: `{"type": "text", "text": ...}`, `{"type": "image", "image": ...}` (or `"url"`,
            `"path"`, `"base64"`), and likewise for `"video"` and `"audio"`.

    Raises:
        ValueError: one sentence, if the tokenizer has no chat template, or the messages do not have this form.
    """
    row = dict(row)
    messages = row.pop(MESSAGES, None)
    if messages is None:
        return row
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError("messages need a tokenizer with a chat template, which this one lacks: give the row as text.")
    found: dict[str, list[Any]] = {}
    texts = [_as_text(message, found) for message in _checked(messages)]
    taken = next((name for name in ("text", *found) if row.get(name) is not None), None)
    if taken is not None:
        raise ValueError(f"A row has {taken!r} and messages with it: give it once.")
    continues = texts[-1]["role"] == "assistant"
    try:
        text = tokenizer.apply_chat_template(
            texts, tokenize=False, add_generation_prompt=not continues, continue_final_message=continues
        )
    except Exception as error:  # any error of a template
        raise ValueError(f"The chat template of the tokenizer fails on the messages: {one_line(error)}") from error
    begin = tokenizer.bos_token
    if begin and text.startswith(begin) and tokenize(tokenizer, "")["input_ids"][:1] == [tokenizer.bos_token_id]:
        text = text.removeprefix(begin)  # the tokenizer adds it
    items = {name: part if name != "video" and len(part) > 1 else part[0] for name, part in found.items()}
    if len(found.get("video", [])) > 1:
        raise ValueError("A chat has one video at most, since a row has one.")
    return {**row, "text": text, **items}


def _checked(messages: Any) -> list[Mapping[str, Any]]:
    is_list = isinstance(messages, Sequence) and not isinstance(messages, (str, bytes)) and len(messages) > 0
    if not is_list or not all(
        isinstance(one, Mapping) and isinstance(one.get("role"), str) and "content" in one for one in messages
    ):
        raise ValueError(
            "messages must be a list of dicts with 'role' and 'content', such as [{'role': 'user', 'content': "
            f"'Hello.'}}], but is {shortened(messages)}."
        )
    return list(messages)


def _as_text(message: Mapping[str, Any], found: dict[str, list[Any]]) -> dict[str, Any]:
    """The message with a text as its content; its pictures and the like are added to `found`."""
    content = message["content"]
    if isinstance(content, str):
        return dict(message)
    texts = []
    for part in content if isinstance(content, (list, tuple)) else [content]:
        part_type = part.get("type") if isinstance(part, Mapping) else None
        if part_type == "text" and isinstance(part.get("text"), str):
            texts.append(part["text"])
            continue
        given = [part[key] for key in (part_type, *_ITEM_KEYS) if part_type in _MEDIA and part.get(key) is not None]
        if not given:
            raise ValueError(
                "A part of a message must be {'type': 'text', 'text': ...} or {'type': 'image', 'image': ...} (or "
                f"video or audio), but is {shortened(part)}."
            )
        found.setdefault(part_type, []).append(given[0])
    return {**message, "content": "\n".join(texts)}
