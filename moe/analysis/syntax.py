"""Syntax class of every token of Python source, from Python's ``tokenize``."""

from __future__ import annotations

import io
import keyword
import token
import tokenize

import numpy as np

from moe.analysis.documents import Document

#: "layout" is indentation, newlines, blanks between tokens, and line continuations.
CLASSES = ("keyword", "name", "operator", "number", "string", "comment", "layout")
LAYOUT = CLASSES.index("layout")
#: Class of tokens without text: bos and eos.
NONE = -1

_KINDS = {"NAME": "name", "OP": "operator", "NUMBER": "number", "STRING": "string", "COMMENT": "comment"}


def byte_classes(source: str) -> np.ndarray | None:
    """Class of every byte of the UTF-8 source, int32; None if Python cannot tokenize it.

    Text in f-strings is string; expressions in f-strings have their own classes. Soft keywords (match, type) are names.
    """
    lines = source.split("\n")
    # First byte of each line.
    begins = np.cumsum([0, *(len(line.encode()) + 1 for line in lines)])

    def byte(position: tuple[int, int]) -> int:
        line, column = position
        if line > len(lines):
            return len(encoded)
        return int(begins[line - 1]) + len(lines[line - 1][:column].encode())

    encoded = source.encode()
    classes = np.full(len(encoded), LAYOUT, np.int32)
    try:
        for found in tokenize.generate_tokens(io.StringIO(source, newline="\n").readline):
            name = token.tok_name[found.type]
            # FSTRING_START, FSTRING_MIDDLE, FSTRING_END, and t-strings' alike.
            kind = "string" if "STRING" in name else _KINDS.get(name)
            if kind is not None:
                kind = "keyword" if keyword.iskeyword(found.string) else kind
                classes[byte(found.start) : byte(found.end)] = CLASSES.index(kind)
    except (tokenize.TokenError, SyntaxError, SystemError, ValueError):  # the last two: a NUL among the text
        return None
    return classes


def token_classes(document: Document) -> np.ndarray | None:
    """Index into :data:`CLASSES` for each of m tokens: the class of its first non-blank byte; NONE for bos and eos.

    A token that covers several Python tokens, such as ``):``, has the class of the first. None: see
    :func:`byte_classes`.
    """
    classes = byte_classes(document.text)
    if classes is None:
        return None
    encoded = document.text.encode()
    result = np.full(len(document.tokens), NONE, np.int32)
    for i, (start, end) in enumerate(document.spans):
        if end > start:
            piece = encoded[start:end]
            blanks = len(piece) - len(piece.lstrip(b" \t\r\n\f"))
            result[i] = classes[start + blanks] if blanks < len(piece) else classes[start]
    return result
