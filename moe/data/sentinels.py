"""Sentinels of span corruption: ids that stand for removed text, written ``<extra_id_0>``, ``<extra_id_1>``, …"""

from __future__ import annotations

import re
from collections.abc import Iterable

import numpy as np

from moe.config import ConfigError
from moe.data.tokenizer import Tokenizer

SENTINELS = 100  # as in T5
_NAME = re.compile(r"<extra_id_(\d\d?)>")


def sentinel_ids(tokenizer: Tokenizer) -> np.ndarray:
    """Returns the ids [SENTINELS] int32, the first sentinel's first.

    They are the pieces ``<extra_id_i>`` of the tokenizer, or, where it has none, the ids after its vocabulary, counted
    down from the last (T5: 32,000 pieces, so that sentinel 0 is 32,099).
    """
    named = [tokenizer.piece_id(f"<extra_id_{i}>") for i in range(SENTINELS)]
    if min(named) >= 0:
        return np.asarray(named, np.int32)
    return np.arange(SENTINELS - 1, -1, -1, dtype=np.int32) + tokenizer.vocab_size


def check_sentinels(tokenizer: Tokenizer, vocab_size: int) -> None:
    """Refuses a vocabulary without room for the sentinels. Raises ConfigError."""
    if (needed := int(sentinel_ids(tokenizer).max()) + 1) > vocab_size:
        raise ConfigError(
            f"model.vocab_size={vocab_size}: data.objective='span_corruption' needs {SENTINELS} sentinels after the "
            f"tokenizer's {tokenizer.vocab_size} tokens; use at least {needed}"
        )


def encode_blanks(tokenizer: Tokenizer, text: str) -> np.ndarray:
    """Returns the ids [n] int32 of a text in which ``<extra_id_i>`` stands for sentinel i; no eos."""
    sentinels = sentinel_ids(tokenizer)
    parts: list[np.ndarray] = []
    for number, part in enumerate(_NAME.split(text)):  # text, i, text, i, …
        parts.append(sentinels[[int(part)]] if number % 2 else tokenizer.encode(part))
    return np.concatenate(parts).astype(np.int32)


def decode_blanks(tokenizer: Tokenizer, ids: Iterable[int] | np.ndarray) -> str:
    """Returns the text of ids [n], with sentinel i as ``<extra_id_i>``."""
    numbers = {int(sentinel): i for i, sentinel in enumerate(sentinel_ids(tokenizer))}
    text, part = "", []
    for token in map(int, ids):
        if token in numbers:
            text, part = f"{text}{tokenizer.decode(part)}<extra_id_{numbers[token]}>", []
        else:
            part.append(token)
    return text + tokenizer.decode(part)


def fill_blanks(inputs: Iterable[int], outputs: Iterable[int], sentinels: np.ndarray, eos_id: int) -> list[int]:
    """Puts what follows each sentinel in the outputs in that sentinel's place in the inputs; eos ends both.

    A sentinel that the outputs lack leaves nothing.
    """
    kept, spans, current = {int(i) for i in sentinels}, {}, []
    for token in _until(outputs, eos_id):
        if token in kept:
            current = spans.setdefault(token, [])
        else:
            current.append(token)
    return [out for token in _until(inputs, eos_id) for out in (spans.get(token, []) if token in kept else [token])]


def _until(ids: Iterable[int], end: int) -> list[int]:
    ids = [int(i) for i in ids]
    return ids[: ids.index(end)] if end in ids else ids
