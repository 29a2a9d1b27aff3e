"""Text of documents, and names of others, made harmless for where it is shown."""

from __future__ import annotations

import re

#: Controls but for newline and tab, marks that reverse the direction of text, and halves of characters.
_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
#: What begins a tag, a comment or a processing instruction.
_TAG = re.compile("<(?=[A-Za-z/!?])")


def terminal(text: str) -> str:
    """Text whose controls are spelled out, as \\x1b: they would move the cursor, or write to the clipboard."""
    return _CONTROLS.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


def markdown_name(name: str) -> str:
    """A name as itself within a line or a table of Markdown."""
    printable = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in name)
    return re.sub(r"([\\`*<>\[\]|])", r"\\\1", printable)


def markdown_cell(text: str) -> str:
    """Markdown that stays in its cell of a table."""
    return re.sub(r"(?<!\\)\|", r"\\|", " ".join(terminal(text).splitlines()))


def markdown_page(text: str) -> str:
    """A page of Markdown without raw HTML; what looks like a tag is shown."""
    return _TAG.sub("&lt;", terminal(text))
