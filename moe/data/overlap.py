"""Overlap of held-out text with training text, by whole lines."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from moe.data.documents import CONVERSATION, TOOLS

#: Shorter lines, such as `return result`, are shared by chance.
MIN_LINE = 40  # characters, without surrounding blanks


def long_lines(text: str) -> list[str]:
    """Lines of at least MIN_LINE characters, stripped; of a conversation, those of its messages."""
    if text.startswith(CONVERSATION):
        found = json.loads(text.removeprefix(CONVERSATION))
        if isinstance(found, dict):
            found.pop(TOOLS, None)
        text = "\n".join(_strings(found))
    return [line for line in map(str.strip, text.splitlines()) if len(line) >= MIN_LINE]


def _strings(tree: Any) -> Iterator[str]:
    """Strings in JSON, without the names of fields."""
    if isinstance(tree, str):
        yield tree
    elif isinstance(tree, dict | list):
        for part in tree.values() if isinstance(tree, dict) else tree:
            yield from _strings(part)


def line_overlap(heldout: Sequence[str], train: Iterable[str]) -> list[tuple[int, int]]:
    """Return for each held-out document (characters in long lines that some training document has too, in all)."""
    documents = [long_lines(text) for text in heldout]
    unseen = {line for lines in documents for line in lines}
    seen: set[str] = set()
    for text in train:
        found = unseen.intersection(long_lines(text))
        seen |= found
        unseen -= found
    return [(sum(len(line) for line in lines if line in seen), sum(map(len, lines))) for lines in documents]
