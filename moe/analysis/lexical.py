"""Lexical class of every token from its text alone, available in every domain; merging of labels."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

#: "word" begins with a blank, "word part" does not; "layout" is blanks and newlines; "other" has no text of its own.
CLASSES = ("word", "capitalised word", "word part", "number", "punctuation", "bracket", "symbol", "layout", "other")


def lexical_classes(tokens: np.ndarray, piece: Callable[[int], str]) -> np.ndarray:
    """Returns for each token the index of its class in :data:`CLASSES`.

    Args:
        tokens: [n] token ids.
        piece: token id → its text, «id» if it has none (:func:`moe.analysis.summary.piece_of`).
    """
    ids, position = np.unique(tokens, return_inverse=True)
    return np.array([CLASSES.index(_class(piece(int(i)))) for i in ids], np.int32)[position]


def _class(piece: str) -> str:
    text = piece.strip()
    if not text:
        return "layout"
    first = text[0]
    if first == "«":
        return "other"
    if first.isalpha():
        if piece[0].isspace():
            return "capitalised word" if first.isupper() else "word"
        return "word part"
    if first.isnumeric():
        return "number"
    if first in "()[]{}<>":
        return "bracket"
    return "punctuation" if first in ".,;:!?'\"-–—’“”" else "symbol"


def merge_labels(labels: np.ndarray, values: int) -> np.ndarray:
    """Keeps the most frequent labels and merges the others, so that at most `values` different ones remain."""
    _, number, counts = np.unique(labels, return_inverse=True, return_counts=True)
    rank = np.empty(len(counts), np.int64)
    rank[np.argsort(-counts, kind="stable")] = np.arange(len(counts))
    return np.minimum(rank[number], values - 1)
