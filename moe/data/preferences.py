"""Rows of preferences: pairs of conversations, the first of which was preferred to the second.

A row holds whole pairs and padding. Pair p = 1, 2, ... has segments 2p − 1 (chosen) and 2p (rejected), each with
positions from 0, so that neither attends to the other. As with conversations only answers have targets, from the first
one on in which the two differ.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np

from moe.config import ConfigError
from moe.data import chat
from moe.data.documents import CONVERSATION, PREFERENCE, TOOLS
from moe.data.tokenizer import Tokenizer

_KEYS = ("tokens", "targets")


def example(text: str, length: int, tokenizer: Tokenizer, dataset: str) -> list[dict[str, np.ndarray]]:
    """``tokens``, ``targets`` and ``rejected`` (0 or 1) [n], n ≤ length, of a document; no example without answers.

    Each conversation is cut at half of the length; a pair that is equal after the cut gives no example.

    Raises:
        ConfigError: the document is no pair, or see :func:`moe.data.chat.rendered_answers`.
    """
    found = json.loads(text.removeprefix(CONVERSATION)) if text.startswith(CONVERSATION) else None
    if not isinstance(found, dict) or not set(PREFERENCE) <= found.keys():
        raise ConfigError(
            f"data.objective='preferences': needs documents with prompt, chosen and rejected, and {dataset!r} "
            "has others; docs/finetuning.md shows the formats"
        )
    parts = []
    for name in PREFERENCE:
        # Earlier answers that a template renders in separate texts belong to the prompt, which both conversations have.
        encoded = chat.encoded_answers(found[name], tokenizer, found.get(TOOLS))[-1:]
        parts += [{key: values[: length // 2] for key, values in one.items()} for one in encoded]
    if len(parts) < len(PREFERENCE) or all(np.array_equal(*(part[key] for part in parts)) for key in _KEYS):
        return []
    begin = _first_own_answer(*parts)
    for part in parts:
        part["targets"] = np.where(np.arange(len(part["targets"])) < begin, -1, part["targets"])
    if not all((part["targets"] >= 0).any() for part in parts):
        return []
    rejected = [np.full(len(part["tokens"]), number, np.int32) for number, part in enumerate(parts)]
    joined = {key: np.concatenate([part[key] for part in parts]) for key in _KEYS}
    return [joined | {"rejected": np.concatenate(rejected)}]


def _first_own_answer(chosen: dict[str, np.ndarray], rejected: dict[str, np.ndarray]) -> int:
    """Where the first answer begins that the two conversations do not share: earlier ones are part of the prompt."""
    size = min(len(part["tokens"]) for part in (chosen, rejected))
    differs = np.any([chosen[key][:size] != rejected[key][:size] for key in _KEYS], axis=0)
    first = int(differs.argmax()) if differs.any() else size
    return int(max(np.flatnonzero(chosen["targets"][:first] < 0), default=-1)) + 1


def row(packed: dict[str, np.ndarray], domain: int, pad_id: int) -> dict[str, np.ndarray]:
    """The arrays of a batch (:mod:`moe.data.pipeline`) from packed pairs."""
    found: dict[str, Any] = chat.chat_row(packed, domain, pad_id)
    pairs = found["segment_ids"]
    segments = np.where(pairs > 0, 2 * pairs - 1 + packed["rejected"], 0).astype(np.int32)
    places = np.arange(len(segments), dtype=np.int32)
    first = np.maximum.accumulate(np.where(np.diff(segments, prepend=-1) != 0, places, 0))
    return found | {"segment_ids": segments, "positions": np.where(segments > 0, places - first, 0).astype(np.int32)}


def without_rejected(found: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """A row with targets only in the chosen conversations."""
    return found | {"targets": np.where(found["segment_ids"] % 2 == 1, found["targets"], -1).astype(np.int32)}
