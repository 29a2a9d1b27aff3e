"""Lexical class of every token from its text alone, available in every domain; merging of labels."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable

import numpy as np
from scipy import stats

#: "word" begins with a blank, "word part" does not; "layout" is blanks and newlines; "other" has no text of its own.
CLASSES = ("word", "capitalised word", "word part", "number", "punctuation", "bracket", "symbol", "layout", "other")


def lexical_classes(tokens: np.ndarray, piece: Callable[[int], str]) -> np.ndarray:
    """Return for each token the index of its class in :data:`CLASSES`.

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
    if re.fullmatch(r"«\d+»", text):
        return "other"
    if first.isalpha():
        if piece[0].isspace():
            return "capitalised word" if first.isupper() else "word"
        return "word part"
    if first.isnumeric():
        return "number"
    if first in "()[]{}<>":
        return "bracket"
    return "punctuation" if first in ".,;:!?'\"-–—’“”«»" else "symbol"


def merge_labels(labels: np.ndarray, experts: np.ndarray, *, num_labels: int, values: int) -> np.ndarray:
    """Merges labels until `values` groups are left, losing as little information about the expert as possible.

    Repeatedly merges the two groups whose union loses the least (the agglomerative information bottleneck, Slonim and
    Tishby 1999). Measure the information on other tokens than these.

    Args:
        labels: [n] integers below num_labels.
        experts: [n] first experts.
        num_labels: number of labels; those without tokens are merged first.
        values: number of groups.

    Returns:
        group of each label, [num_labels].
    """
    counts = np.zeros((num_labels, int(experts.max()) + 1))
    np.add.at(counts, (labels, experts), 1)
    groups = [[label] for label in range(len(counts))]
    tables, own = list(counts), [_uncertainty(table) for table in counts]
    loss = np.full((len(groups), len(groups)), np.inf)  # above the diagonal: of merging two groups

    def measure(a: int, b: int) -> None:
        loss[a, b] = _uncertainty(tables[a] + tables[b]) - own[a] - own[b]

    if len(groups) > values:
        for a, b in itertools.combinations(range(len(groups)), 2):
            measure(a, b)
    while len(groups) > values:
        a, b = divmod(int(loss.argmin()), len(groups))
        groups[a] += groups.pop(b)
        tables[a] = tables[a] + tables.pop(b)
        own.pop(b)
        own[a] = _uncertainty(tables[a])
        loss = np.delete(np.delete(loss, b, axis=0), b, axis=1)
        for other in range(len(groups)):
            if other != a:
                measure(min(a, other), max(a, other))
    result = np.zeros(len(counts), np.int64)
    for number, group in enumerate(groups):
        result[group] = number
    return result


def _uncertainty(counts: np.ndarray) -> float:
    """Entropy of the expert in nats, times the number of tokens."""
    return float(counts.sum() * stats.entropy(counts)) if counts.any() else 0.0
