"""
Renews a model card and keeps the text that a person wrote.

Sections and entries of metadata are merged alike. Each is generated with a fingerprint, stored in a comment at the end
of the card. An entry that still has its fingerprint is renewed. A changed entry is a person's text and stays. An entry
that a person removed stays away.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from typing import Any


_MEMORY = re.compile(r"\n*<!-- mm_transformers remembers what it generated: (\{.*\}) -->\s*$", re.DOTALL)
_HEADING = re.compile(r"^(## .+)$", re.MULTILINE)
_FENCE = re.compile(r"^(```|~~~)", re.MULTILINE)


def fingerprint(value: Any) -> str:
    text = value.strip() if isinstance(value, str) else json.dumps(value, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def merge(
    old: Mapping[str, Any], new: Mapping[str, Any], remembered: Mapping[str, str]
) -> tuple[dict[str, Any], dict[str, str]]:
    """
    The merged entries of an old and a new card.

    Args:
        old: name -> the entry of the card.
        new: name -> the entry that would be generated now.
        remembered: name -> fingerprint of the entry that was generated before.

    Returns:
        The entries of the card, in the order of `old`, with each new entry behind its predecessor in `new`; and the
            fingerprints to store.
    """
    merged: dict[str, Any] = {}
    for name, value in old.items():
        generated = remembered.get(name) == fingerprint(value)
        if not generated:
            merged[name] = value
        elif name in new:
            merged[name] = new[name]
    memory = {name: print_ for name, print_ in remembered.items() if name in new or name not in old}
    place = 0
    for name, value in new.items():
        if name not in merged and name not in remembered:
            entries = list(merged.items())
            merged = dict([*entries[:place], (name, value), *entries[place:]])
        memory[name] = fingerprint(value)
        if name in merged:
            place = list(merged).index(name) + 1
    return merged, memory


def split_sections(text: str) -> dict[str, str]:
    """
    The text of a card by its headings of the second level, "" for the text before them.

    If a heading occurs twice, the later part belongs to the text of the first one.
    """
    sections, name, start = {}, "", 0
    for match in _HEADING.finditer(text):
        inside_code = len(_FENCE.findall(text[: match.start()])) % 2 == 1
        if inside_code or match[1].strip() in sections or match[1].strip() == name:
            continue
        sections[name] = text[start : match.start()].strip()
        name, start = match[1].strip(), match.end()
    sections[name] = text[start:].strip()
    return sections


def join_sections(sections: Mapping[str, str]) -> str:
    parts = [f"{name}\n\n{text}".strip() for name, text in sections.items()]
    return "\n\n".join(part for part in parts if part) + "\n"


def take_memory(text: str) -> tuple[str, dict[str, Any]]:
    """The text without the comment at its end, and the fingerprints of the comment."""
    match = _MEMORY.search(text)
    if match is None:
        return text, {}
    try:
        return text[: match.start()], json.loads(match[1])
    except ValueError:  # a person has edited it: then all text counts as a person's
        return text[: match.start()], {}


def add_memory(text: str, memory: Mapping[str, Any]) -> str:
    # Names in it must not end the comment.
    remembered = json.dumps(memory, sort_keys=True).replace("<", "\\u003c").replace(">", "\\u003e")
    return f"{text.rstrip()}\n\n<!-- mm_transformers remembers what it generated: {remembered} -->\n"
