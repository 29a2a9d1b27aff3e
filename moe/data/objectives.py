"""Training objectives: which tokens are read and which are predicted.

causal           every token from those before it
prefix_lm        the rest of a text from its beginning, which attends in both directions or is the encoder's input
span_corruption  removed spans from the text around them (Raffel et al. 2020, "T5", section 3.1.4)
pairs            a target text from a source text

An example of an encoder-decoder is ``input eos`` for the encoder and ``target eos`` for the decoder, whose tokens are
the target shifted right. An example longer than a row is cut to the row's length and then has no eos.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import numpy as np

from moe.config import ConfigError, DataConfig
from moe.data.documents import PAIR
from moe.data.sentinels import SENTINELS, sentinel_ids, show_blanks
from moe.data.tokenizer import Tokenizer

#: Token ids without padding: "encoder" [n] and "decoder" [m], int32.
Example = dict[str, np.ndarray]


# --- Span corruption -------------------------------------------------------------------------------------------------
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


def _span_corruption(text: str, rng: np.random.Generator, data: DataConfig, tokenizer: Tokenizer) -> Iterator[Example]:
    length, _ = span_lengths(data.input_length, data.corruption_rate, data.mean_span)
    sentinels = sentinel_ids(tokenizer)
    for piece in _pieces(tokenizer.encode(text), length):
        mask = noise_mask(len(piece), rng, data.corruption_rate, data.mean_span)
        yield {
            "encoder": replace_spans(piece, mask, sentinels),
            "decoder": replace_spans(piece, ~mask, sentinels),
        }


# --- Prefix LM and pairs ---------------------------------------------------------------------------------------------
def _prefix(text: str, rng: np.random.Generator, data: DataConfig, tokenizer: Tokenizer) -> Iterator[Example]:
    # With eos, either part fits its row wherever the piece is divided.
    for piece in _pieces(tokenizer.encode(text), min(data.input_length, data.sequence_length)):
        if len(piece) > 1:
            split = int(rng.integers(1, len(piece)))
            yield {"encoder": piece[:split], "decoder": piece[split:]}


def _pair(text: str, rng: np.random.Generator, data: DataConfig, tokenizer: Tokenizer) -> Iterator[Example]:
    source, found, target = text.partition(PAIR)
    if not found:
        raise ConfigError(
            f"data.objective='pairs': needs documents with source and target, and {data.dataset!r} has texts; "
            "docs/data.md says how to write pairs"
        )
    yield {"encoder": tokenizer.encode(source), "decoder": tokenizer.encode(target)}


def _pieces(ids: np.ndarray, length: int) -> Iterator[np.ndarray]:
    return (ids[start : start + length] for start in range(0, len(ids), length))


_EXAMPLES: dict[str, Callable[[str, np.random.Generator, DataConfig, Tokenizer], Iterator[Example]]] = {
    "span_corruption": _span_corruption,
    "prefix_lm": _prefix,
    "pairs": _pair,
}


def examples(text: str, rng: np.random.Generator, data: DataConfig, tokenizer: Tokenizer) -> list[Example]:
    """Return the examples of a document for an encoder-decoder (data.input_length above 0)."""
    ends = np.asarray([tokenizer.eos_id], np.int32)
    lengths = {"encoder": data.input_length, "decoder": data.sequence_length}
    return [
        {part: np.concatenate([ids, ends]).astype(np.int32)[: lengths[part]] for part, ids in example.items()}
        for example in _EXAMPLES[data.objective](text, rng, data, tokenizer)
    ]


def show_example(example: Example, written: np.ndarray, data: DataConfig, tokenizer: Tokenizer) -> str:
    """Return an example's input with what a model wrote for it: blanks as [written|removed], or written text last."""
    if data.objective == "span_corruption":
        return show_blanks(tokenizer, example["encoder"], written, example["decoder"])
    shown = f"{tokenizer.decode(example['encoder'])} >>> {tokenizer.decode(written)}"
    return shown + (f" (reference: {tokenizer.decode(example['decoder'])})" if data.objective == "pairs" else "")


def check_lengths(data: DataConfig) -> None:
    """Refuse rows that are too short for examples of span corruption. Raises ConfigError."""
    if data.objective != "span_corruption":
        return
    text, targets = span_lengths(data.input_length, data.corruption_rate, data.mean_span)
    if data.sequence_length < targets:
        raise ConfigError(
            f"data.sequence_length={data.sequence_length}: must be at least {targets}, the length of the targets for "
            f"data.input_length={data.input_length}"
        )
    if (spans := span_counts(text, data.corruption_rate, data.mean_span)[1]) > SENTINELS:
        raise ConfigError(
            f"data.input_length={data.input_length}: has {spans} spans, and there are {SENTINELS} sentinels; shorten "
            "it, or raise data.mean_span"
        )


# --- Rows ------------------------------------------------------------------------------------------------------------
def shift_right(targets: np.ndarray, positions: np.ndarray, start_id: int) -> np.ndarray:
    """Return the decoder's tokens [T]: the start token, then the targets but the last, in each segment.

    The start token is the tokenizer's padding, as in T5.
    """
    return np.where(positions == 0, start_id, np.roll(targets, 1)).astype(np.int32)


def encoder_decoder_row(packed: Example, tokenizer: Tokenizer) -> dict[str, np.ndarray]:
    """Make the arrays of a batch (:mod:`moe.data.pipeline`) from packed examples, padding included."""
    known, filled = packed["decoder_segment_ids"] > 0, packed["encoder_segment_ids"] > 0
    tokens = shift_right(packed["decoder"], packed["decoder_positions"], tokenizer.pad_id)
    row = {
        "tokens": np.where(known, tokens, tokenizer.pad_id),
        "targets": np.where(known, packed["decoder"], -1),
        "segment_ids": packed["decoder_segment_ids"],
        "positions": packed["decoder_positions"],
        "encoder_tokens": np.where(filled, packed["encoder"], tokenizer.pad_id),
        "encoder_segment_ids": packed["encoder_segment_ids"],
        "encoder_positions": packed["encoder_positions"],
    }
    return {name: np.asarray(values, np.int32) for name, values in row.items()}


def prefix_row(row: dict[str, np.ndarray], rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Divide each segment of a decoder's row at random: "prefix" [T] is 1 in the first part, which has no targets.

    The last token of the first part predicts the first one of the second part.
    """
    segments = row["segment_ids"]
    splits = rng.integers(1, np.maximum(np.bincount(segments), 2))[segments]
    prefix = (row["positions"] < splits) & (segments > 0)
    targets = np.where(row["positions"] >= splits - 1, row["targets"], -1)
    return {**row, "targets": targets.astype(np.int32), "prefix": prefix.astype(np.int32)}
