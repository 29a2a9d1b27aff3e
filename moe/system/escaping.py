"""Escaping of text and names from documents and other people, by where they are shown."""

from __future__ import annotations

import html
import re
from collections.abc import Iterable, Sequence
from typing import Any

#: Control characters except newline and tab, marks that change the direction of text, and surrogates.
_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
#: The start of a tag, a comment or a processing instruction.
_TAG = re.compile("<(?=[A-Za-z/!?])")


#: Underscores at the beginning or end of a word; those within one, as in d_model, are shown.
_EMPHASIS = re.compile(r"(?<![^\W_])_+|_+(?![^\W_])")

#: Settings of matplotlib with which a name such as "$_$" is not parsed as TeX.
FIGURE_TEXT: Any = {"text.parse_math": False}


def terminal(text: str) -> str:
    """Escape control characters, as \\x1b: a terminal would let them move the cursor or write to the clipboard."""
    return _CONTROLS.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


def markdown_text(text: str) -> str:
    """Escape a name, a note or an error for one line of Markdown: no tags, columns, links or formulas of its own."""
    line = html.escape(terminal(" ".join(text.split())), quote=False)
    line = re.sub(r"([\\`*\[\]|$])", r"\\\1", line)
    return _EMPHASIS.sub(lambda match: match[0].replace("_", r"\_"), line)


def markdown_cell(text: str) -> str:
    """Markdown that stays in its cell of a table."""
    return re.sub(r"(?<!\\)\|", r"\\|", " ".join(terminal(text).splitlines()))


def markdown_table(header: Sequence[object], rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table."""
    lines = [f"| {' | '.join(markdown_cell(str(cell)) for cell in row)} |" for row in (header, *rows)]
    return "\n".join([lines[0], "|" + "---|" * len(header), *lines[1:]])


def markdown_page(text: str) -> str:
    """A page of Markdown without raw HTML; what looks like a tag is shown."""
    return _TAG.sub("&lt;", terminal(text))
