"""Sentinels: ids that stand for no text, or for text that was removed, written ``<extra_id_0>``, ``<extra_id_1>``, …"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable

import numpy as np

from moe.config import ConfigError
from moe.config.objectives import Objective
from moe.data.tokenizer import Tokenizer

SENTINELS = 100  # as in T5
_NAME = re.compile(r"<extra_id_(\d\d?)>")


def sentinel_ids(tokenizer: Tokenizer, count: int = SENTINELS) -> np.ndarray:
    """Return the ids [count] int32 of an objective's sentinels, the first one's first.

    They are the pieces ``<extra_id_i>`` of the tokenizer, or, where it has none, the ids after its vocabulary, counted
    down from the last (T5: 32,000 pieces, so that sentinel 0 is 32,099).
    """
    named = [tokenizer.piece_id(f"<extra_id_{i}>") for i in range(count)]
    if min(named) >= 0:
        return np.asarray(named, np.int32)
    return np.arange(count - 1, -1, -1, dtype=np.int32) + tokenizer.vocab_size


def check_sentinels(tokenizer: Tokenizer, vocab_size: int, objective: Objective) -> None:
    """Refuse a vocabulary without room for an objective's sentinels. Raises ConfigError."""
    if not objective.sentinels:
        return
    if (needed := int(sentinel_ids(tokenizer, objective.sentinels).max()) + 1) > vocab_size:
        raise ConfigError(
            f"model.vocab_size={vocab_size}: data.objective={objective.name!r} needs {objective.sentinels} sentinels "
            f"after the tokenizer's {tokenizer.vocab_size} tokens; use at least {needed}"
        )


def encode_blanks(tokenizer: Tokenizer, text: str, count: int = SENTINELS) -> np.ndarray:
    """Return the ids [n] int32 of a text in which ``<extra_id_i>`` stands for sentinel i; no eos.

    Raises:
      ConfigError: there are fewer sentinels.
    """
    sentinels = sentinel_ids(tokenizer, count)
    parts: list[np.ndarray] = []
    for number, part in enumerate(_NAME.split(text)):  # text, i, text, i, …
        if number % 2 and int(part) >= count:
            raise ConfigError(f"<extra_id_{part}>: must be below <extra_id_{count}>, since there are {count} sentinels")
        parts.append(sentinels[[int(part)]] if number % 2 else tokenizer.encode(part))
    return np.concatenate(parts).astype(np.int32)


def decode_blanks(tokenizer: Tokenizer, ids: Iterable[int] | np.ndarray, count: int = SENTINELS) -> str:
    """Return the text of ids [n], with sentinel i as ``<extra_id_i>``."""
    numbers = {int(sentinel): i for i, sentinel in enumerate(sentinel_ids(tokenizer, count))}
    text, part = "", []
    for token in map(int, ids):
        if token in numbers:
            text, part = f"{text}{tokenizer.decode(part)}<extra_id_{numbers[token]}>", []
        else:
            part.append(token)
    return text + tokenizer.decode(part)


def fill_blanks(inputs: Iterable[int], outputs: Iterable[int], sentinels: np.ndarray, eos_id: int) -> list[int]:
    """Put what follows each sentinel in the outputs in that sentinel's place in the inputs; eos ends both.

    A sentinel that the outputs lack is removed.
    """
    spans, blanks = _spans(outputs, sentinels, eos_id), {int(i) for i in sentinels}
    return [
        filled for token in _until(inputs, eos_id) for filled in (spans.get(token, []) if token in blanks else [token])
    ]


def show_blanks(tokenizer: Tokenizer, inputs: Iterable[int], written: Iterable[int], removed: Iterable[int]) -> str:
    """Return the text of the inputs with [written|removed] in the place of each sentinel."""
    sentinels = sentinel_ids(tokenizer)
    mine, theirs = (_spans(ids, sentinels, tokenizer.eos_id) for ids in (written, removed))
    text = ""
    part = []
    blanks = {int(i) for i in sentinels}
    for token in _until(inputs, tokenizer.eos_id):
        if token in blanks:
            shown = "|".join(tokenizer.decode(spans.get(token, [])) for spans in (mine, theirs))
            text, part = f"{text}{tokenizer.decode(part)}[{shown}]", []
        else:
            part.append(token)
    return text + tokenizer.decode(part)


def _spans(ids: Iterable[int], sentinels: np.ndarray, eos_id: int) -> dict[int, list[int]]:
    """Sentinel → the tokens that follow it."""
    spans: dict[int, list[int]] = {}
    current, blanks = [], {int(i) for i in sentinels}
    for token in _until(ids, eos_id):
        if token in blanks:
            current = spans.setdefault(token, [])
        else:
            current.append(token)
    return spans


def _until(ids: Iterable[int], end: int) -> list[int]:
    return list(itertools.takewhile(lambda token: token != end, map(int, ids)))
