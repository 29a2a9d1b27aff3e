"""Span corruption: removed spans of a text from the text around them (Raffel et al. 2020, "T5", section 3.1.4)."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any, ClassVar

import numpy as np

from moe.config import ConfigError, DataConfig
from moe.data.sentinels import SENTINELS, sentinel_ids, show_blanks
from moe.data.tokenizer import Tokenizer
from moe.objectives.encoder_decoder import EncoderDecoder, pieces


class SpanCorruption(EncoderDecoder):
    """Texts whose removed spans, each replaced by a sentinel, are the target."""

    sentinels: ClassVar[int] = SENTINELS

    def check_rows(self, data: DataConfig) -> None:
        """Refuse rows that are too short for their targets, and more spans than sentinels."""
        text, targets = span_lengths(data.input_length, data.corruption_rate, data.mean_span)
        if data.sequence_length < targets:
            raise ConfigError(
                f"data.sequence_length={data.sequence_length}: must be at least {targets}, the length of the targets "
                f"for data.input_length={data.input_length}"
            )
        if (spans := span_counts(text, data.corruption_rate, data.mean_span)[1]) > SENTINELS:
            raise ConfigError(
                f"data.input_length={data.input_length}: has {spans} spans, and there are {SENTINELS} sentinels; "
                "shorten it, or raise data.mean_span"
            )

    def pairs(
        self, text: str, rng: np.random.Generator, data: DataConfig, tokenizer: Tokenizer
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """The kept and the removed tokens of each piece of a text."""
        length, _ = span_lengths(data.input_length, data.corruption_rate, data.mean_span)
        sentinels = sentinel_ids(tokenizer)
        for piece in pieces(tokenizer.encode(text), length):
            mask = noise_mask(len(piece), rng, data.corruption_rate, data.mean_span)
            yield replace_spans(piece, mask, sentinels), replace_spans(piece, ~mask, sentinels)

    def title(self) -> str:
        """Blanks."""
        return "blanks as [written|removed]"

    def show(self, prompt: Any, written: np.ndarray, tokenizer: Tokenizer) -> str:
        """The text with [written|removed] in the place of each span."""
        return show_blanks(tokenizer, prompt["encoder"], written, prompt["decoder"])


def span_counts(length: int, rate: float, mean_span: float) -> tuple[int, int]:
    """Return (tokens removed, spans) of a text of `length` tokens, before :func:`noise_mask` avoids extremes."""
    removed = round(length * rate)
    return removed, round(removed / mean_span)


@functools.lru_cache  # called for each document
def span_lengths(input_length: int, rate: float, mean_span: float) -> tuple[int, int]:
    """Return (tokens of text, tokens of the target) whose inputs fill `input_length`: (568, 114) for T5's 512.

    T5's random_spans_helper: the inputs are the kept tokens, a sentinel per span and eos; the targets are the removed
    tokens, a sentinel per span and eos.
    """

    def lengths(text: int) -> tuple[int, int]:
        removed, spans = span_counts(text, rate, mean_span)
        return text - removed + spans + 1, removed + spans + 1

    text = input_length - 1
    while lengths(text + 1)[0] <= input_length:
        text += 1
    # T5 makes both lengths equal at a rate of a half.
    shorter = rate == 0.5 and lengths(text)[1] > lengths(text)[0]
    return text - shorter, lengths(text)[1] - shorter


def noise_mask(length: int, rng: np.random.Generator, rate: float, mean_span: float) -> np.ndarray:
    """Return [length] bool, True where a token is removed: spans of random lengths, the first token kept.

    T5's random_spans_noise_mask: the numbers of removed tokens and of spans are fixed by the length, and all masks
    with them are equally likely.
    """
    at_least_two = max(length, 2)
    removed, spans = span_counts(at_least_two, rate, mean_span)
    removed = min(max(removed, 1), at_least_two - 1)
    kept = at_least_two - removed
    spans = min(max(spans, 1), removed, kept)

    def segments(items: int) -> np.ndarray:
        """Lengths [spans], at least 1 each, of a random division of `items`."""
        starts = rng.permutation(np.arange(items - 1) < spans - 1)
        return np.bincount(np.concatenate([[0], np.cumsum(starts)]), minlength=spans)

    # A kept segment, a removed one, a kept one, …
    removed_lengths, kept_lengths = segments(removed), segments(kept)
    lengths = np.stack([kept_lengths, removed_lengths], axis=1).reshape(-1)
    return np.repeat(np.arange(2 * spans) % 2 == 1, lengths)[:length]


def replace_spans(ids: np.ndarray, mask: np.ndarray, sentinels: np.ndarray) -> np.ndarray:
    """Replace the i-th run of True in the mask by the i-th sentinel."""
    first = mask & ~np.concatenate([[False], mask[:-1]])
    return np.where(first, sentinels[np.cumsum(first) - 1], ids)[first | ~mask].astype(np.int32)
