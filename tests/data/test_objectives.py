"""Objectives: noise masks, examples, packing, resuming, and what is refused."""

# ruff: noqa: F811
import contextlib
import dataclasses
import json
import math
from typing import ClassVar
from unittest import mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe.config import Config, ConfigError, DataConfig, ModelConfig
from moe.config.objectives import find_objective
from moe.data import pipeline, preparation, sentinels
from moe.data.documents import PAIR
from moe.objectives import spans as span_corruption
from moe.objectives.prefix import PrefixLM
from tests.helpers import slow_case
from tests.text_fixtures import VOCAB, assert_equal, data, prepared  # noqa: F401
from tests.tiny_text import random_text


class Reversing:
    """A random generator whose permutations are reversals and whose integers are the largest."""

    def permutation(self, values):
        return values[::-1]

    def integers(self, low, high):
        return np.asarray(high) - 1


class LetterTokenizer:
    """pad 0, bos 1, eos 2, a 3, b 4, …, z 28; sentinels from 128 down to 29."""

    vocab_size, pad_id, bos_id, eos_id = 29, 0, 1, 2
    files: ClassVar = {}

    def piece_id(self, piece):
        return -1

    def encode(self, text):
        return np.asarray([3 + ord(letter) - ord("a") for letter in text], np.int32)


def letters(*texts):
    documents = {"x": list(texts)}
    return preparation.Prepared(LetterTokenizer(), ("x",), documents, documents)


def examples(text, rng, config, tokenizer):
    """Examples of a document under a data section."""
    return find_objective(config.objective).bound(config).examples(text, rng, config, tokenizer)


def spans(**changes):
    """3 of 10 tokens removed in 2 spans."""
    return DataConfig(objective="span_corruption", corruption_rate=0.3, mean_span=1.5, **changes)


def test_span_lengths_are_found_once(monkeypatch):
    """They take a step for each removed token, and every document asks for them."""
    counted = mock.Mock(wraps=span_corruption.span_counts)
    monkeypatch.setattr(span_corruption, "span_counts", counted)
    assert span_corruption.span_lengths(4321, 0.15, 3.0) == span_corruption.span_lengths(4321, 0.15, 3.0)
    steps = counted.call_count
    assert steps > 100
    span_corruption.span_lengths(4321, 0.15, 3.0)
    assert counted.call_count == steps


# --- Noise masks, by hand --------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("inputs", "expected"),
    [
        # 568 · 0.15 = 85.2 → 85 removed, 85 / 3 = 28.3 → 28 spans: 568 − 85 + 28 + 1 = 512, 85 + 28 + 1 = 114.
        (512, (568, 114)),
        # 142 · 0.15 = 21.3 → 21, 7 spans: 142 − 21 + 7 + 1 = 129 is too long; 141: 21.15 → 21: 128, 21 + 7 + 1 = 29.
        (128, (141, 29)),
    ],
)
def test_span_lengths_by_hand(inputs, expected):
    assert span_corruption.span_lengths(inputs, 0.15, 3.0) == expected
    assert span_corruption.span_counts(18, 0.15, 1.75) == (3, 2)  # 2.7 and 3 / 1.75 = 1.71, both to the nearest integer


def test_noise_mask_by_hand():
    # 10 · 0.3 = 3 tokens removed in 3 / 1.5 = 2 spans. Reversed, [1,0] of the removed becomes [0,1]: lengths 2 and 1;
    # [1,0,0,0,0,0] of the 7 kept becomes [0,0,0,0,0,1]: lengths 6 and 1. Kept 6, removed 2, kept 1, removed 1.
    mask = span_corruption.noise_mask(10, Reversing(), 0.3, 1.5)
    np.testing.assert_array_equal(mask, [0, 0, 0, 0, 0, 0, 1, 1, 0, 1])


@pytest.mark.parametrize(("length", "removed"), [(1, 0), (2, 1), (3, 1), (568, 85)])
def test_noise_mask_of_extreme_lengths(length, removed):
    # At least one token is removed and one kept; a single token counts as two, of which the absent second is removed.
    mask = span_corruption.noise_mask(length, np.random.default_rng(0), 0.15, 3.0)
    assert (len(mask), mask.sum(), mask[0]) == (length, removed, False)


def test_masks_are_equally_likely():
    # 6 tokens, 3 removed in 2 spans: {1,2} or {2,1} kept times {1,2} or {2,1} removed, 4 masks.
    rng = np.random.default_rng(0)
    masks, counts = np.unique(
        [span_corruption.noise_mask(6, rng, 0.5, 1.5) for _ in range(4000)], axis=0, return_counts=True
    )
    assert len(masks) == 4
    assert abs(counts - 1000).max() < 140  # 5 standard deviations of 27


def test_spans_by_hand():
    # a b c d e f g h i j with the mask above: "g h" and "j" are removed. Sentinels are 128, 127, …; eos is 2.
    # Shifting completes its one row: the decoder starts with padding.
    (example,) = examples("abcdefghij", Reversing(), spans(input_length=10, sequence_length=8), LetterTokenizer())
    np.testing.assert_array_equal(example["encoder"], [3, 4, 5, 6, 7, 8, 128, 11, 127, 2])
    np.testing.assert_array_equal(example["decoder"], [128, 9, 10, 127, 12, 2])


def test_packed_rows_by_hand():
    # 4 tokens: 1.2 → 1 removed, 1 span; kept 3, so each letter quartet becomes "x y z S eos" and "S w eos".
    config = spans(input_length=10, sequence_length=8, heldout_rows=9)
    (batch,) = pipeline.heldout_batches(letters("abcd", "efgh", "ijkl"), config, domain="x", batch_size=2)
    np.testing.assert_array_equal(
        batch["encoder_tokens"], [[3, 4, 5, 128, 2, 7, 8, 9, 128, 2], [11, 12, 13, 128, 2, 0, 0, 0, 0, 0]]
    )
    np.testing.assert_array_equal(batch["encoder_segment_ids"], [[1] * 5 + [2] * 5, [1] * 5 + [0] * 5])
    np.testing.assert_array_equal(batch["encoder_positions"], [[0, 1, 2, 3, 4] * 2, [0, 1, 2, 3, 4] + [0] * 5])
    np.testing.assert_array_equal(batch["targets"], [[128, 6, 2, 128, 10, 2, -1, -1], [128, 14, 2] + [-1] * 5])
    np.testing.assert_array_equal(batch["tokens"], [[0, 128, 6, 0, 128, 10, 0, 0], [0, 128, 14] + [0] * 5])
    np.testing.assert_array_equal(batch["segment_ids"], [[1, 1, 1, 2, 2, 2, 0, 0], [1, 1, 1] + [0] * 5])
    np.testing.assert_array_equal(batch["positions"], [[0, 1, 2, 0, 1, 2, 0, 0], [0, 1, 2] + [0] * 5])
    assert all(value.dtype == np.int32 for value in batch.values())
    # Unpacked: one example per row.
    alone = pipeline.heldout_batches(
        letters("abcd", "efgh", "ijkl"), dataclasses.replace(config, pack=False), domain="x", batch_size=3
    )
    assert len(alone) == 1
    np.testing.assert_array_equal(alone[0]["encoder_segment_ids"].max(axis=1), [1, 1, 1])


def test_pairs_by_hand():
    # A target longer than its row is truncated, without eos.
    config = DataConfig(objective="pairs", input_length=5, sequence_length=3, heldout_rows=9)
    source = letters(f"ab{PAIR}c", f"d{PAIR}efgh")
    (batch,) = pipeline.heldout_batches(source, config, domain="x", batch_size=2)
    np.testing.assert_array_equal(batch["encoder_tokens"], [[3, 4, 2, 0, 0], [6, 2, 0, 0, 0]])
    np.testing.assert_array_equal(batch["targets"], [[5, 2, -1], [7, 8, 9]])
    np.testing.assert_array_equal(batch["tokens"], [[0, 5, 0], [0, 7, 8]])
    # Targets: c, eos, e, f, g. Counts are over the same: of V = 29 every one of the 5 has p = 2 / 34.
    assert pipeline.unigram_nll(source, config, "x") == pytest.approx(math.log(34 / 2), rel=1e-12)
    with pytest.raises(ConfigError, match="'pairs': needs documents with source and target, and 'embedded' has texts"):
        pipeline.heldout_batches(letters("ab"), config, domain="x", batch_size=1)


def test_prefix_of_a_decoder_by_hand():
    # bos a b eos | bos c eos: the largest splits are 3 of 4 and 2 of 3 tokens. The last token of a prefix has a target,
    # those before it do not.
    row = {
        "segment_ids": np.array([1, 1, 1, 1, 2, 2, 2, 0]),
        "positions": np.array([0, 1, 2, 3, 0, 1, 2, 0]),
        "targets": np.array([3, 4, 2, -1, 5, 2, -1, -1]),
    }
    divided = PrefixLM().divide(row, Reversing())
    np.testing.assert_array_equal(divided["prefix"], [1, 1, 1, 0, 1, 1, 0, 0])
    np.testing.assert_array_equal(divided["targets"], [-1, -1, 2, -1, -1, 2, -1, -1])


def test_prefix_of_an_encoder(prepared, data):
    config = dataclasses.replace(data, objective="prefix_lm", input_length=24)
    found = examples(random_text(3), np.random.default_rng(0), config, prepared.tokenizer)
    joined = np.concatenate([part[:-1] for example in found for part in (example["encoder"], example["decoder"])])
    assert prepared.tokenizer.decode(joined) == random_text(3)
    assert all(len(example["encoder"]) <= 24 and len(example["decoder"]) <= 32 for example in found)
    assert len({len(example["encoder"]) for example in found}) > 1


# --- Properties ------------------------------------------------------------------------------------------------------
@settings(max_examples=200, deadline=None)
@given(length=st.integers(1, 300), rate=st.floats(0.02, 0.9), mean_span=st.floats(1, 9), seed=st.integers(0, 2**32 - 1))
def test_input_and_target_reproduce_the_tokens(length, rate, mean_span, seed):
    rng = np.random.default_rng(seed)
    ids = rng.integers(3, 29, length)
    names = np.arange(1000, 1000 - length, -1)
    mask = span_corruption.noise_mask(length, rng, rate, mean_span)
    inputs, targets = (span_corruption.replace_spans(ids, where, names) for where in (mask, ~mask))
    assert sentinels.fill_blanks([*inputs, 2], [*targets, 2], names, eos_id=2) == ids.tolist()
    assert np.isin(inputs, names).sum() == (np.diff(mask, prepend=False) & mask).sum()
    if length > 1 and 1 <= round(length * rate) < length:
        assert mask.sum() == round(length * rate)


@settings(max_examples=30, deadline=None)
@given(inputs=st.integers(8, 600), rate=st.floats(0.05, 0.6), mean_span=st.floats(1, 6), seed=st.integers(0, 99))
def test_a_full_piece_of_text_fills_its_rows(inputs, rate, mean_span, seed):
    text, targets = span_corruption.span_lengths(inputs, rate, mean_span)
    removed, count = span_corruption.span_counts(text, rate, mean_span)
    if not (1 <= count <= text - removed):
        return  # the mask avoids such extremes
    mask = span_corruption.noise_mask(text, np.random.default_rng(seed), rate, mean_span)
    ids, names = np.zeros(text, int), np.arange(text)
    lengths = [len(span_corruption.replace_spans(ids, where, names)) + 1 for where in (mask, ~mask)]
    assert lengths[1] == targets or (rate == 0.5 and lengths[1] < targets)  # T5 shortens the text by one token there
    assert lengths[0] <= inputs  # the input does not always grow by one token with one more token of text


def test_examples_reproduce_the_text(prepared, data):
    config = dataclasses.replace(data, objective="span_corruption", input_length=40)
    tokenizer, names = prepared.tokenizer, sentinels.sentinel_ids(prepared.tokenizer)
    found = examples(random_text(7), np.random.default_rng(0), config, tokenizer)
    pieces = [sentinels.fill_blanks(e["encoder"], e["decoder"], names, tokenizer.eos_id) for e in found]
    assert len(pieces) > 1
    assert tokenizer.decode(np.concatenate(pieces)) == random_text(7)


# --- Training batches ------------------------------------------------------------------------------------------------
OBJECTIVES = {
    "span_corruption": {"objective": "span_corruption", "input_length": 40},
    "unpacked": {"objective": "span_corruption", "input_length": 40, "pack": False},
    "prefix_lm": {"objective": "prefix_lm"},
    "pairs": {"objective": "pairs", "input_length": 40},
}


def paired(prepared):
    texts = [f"{random_text(i, words=4)}{PAIR}{random_text(100 + i, words=3)}" for i in range(20)]
    return dataclasses.replace(prepared, train={name: texts for name in prepared.domains})


@pytest.mark.parametrize("name", [slow_case("pairs"), *(name for name in OBJECTIVES if name != "pairs")])
def test_exact_resume(prepared, data, name):
    config = dataclasses.replace(data, shuffle_window=3, **OBJECTIVES[name])
    source = paired(prepared) if name == "pairs" else prepared
    iterator = pipeline.train_iterator(source, config, batch_size=2, seed=4)
    batches, states = [], []
    for _ in range(40):
        states.append(json.dumps(iterator.get_state()))  # as a checkpoint stores it
        batches.append(next(iterator))
    for start in range(0, 40, 7):
        fresh = pipeline.train_iterator(source, config, batch_size=2, seed=4)
        fresh.set_state(json.loads(states[start]))
        assert_equal([next(fresh) for _ in batches[start:]], batches[start:])
    other = pipeline.train_iterator(source, config, batch_size=2, seed=5)
    assert any((next(other)["targets"] != batch["targets"]).any() for batch in batches[:3])


def test_noise_differs_between_epochs(data):
    source = letters("abcdefghijklmnopqrstuvwxyz")
    iterator = pipeline.train_iterator(
        source, spans(input_length=40, sequence_length=20, shuffle_window=1, pack=False), batch_size=1, seed=0
    )
    rows = {next(iterator)["targets"].tobytes() for _ in range(10)}  # the same document, ten times
    assert len(rows) == 10


def test_segments_of_encoder_and_decoder_match(prepared, data):
    config = dataclasses.replace(data, **OBJECTIVES["pairs"])
    source = paired(prepared)
    pairs = {tuple(text.split(PAIR)) for text in source.train[source.domains[0]]}
    iterator = pipeline.train_iterator(source, config, batch_size=4, seed=0)
    tokenizer, seen = source.tokenizer, 0
    for batch in (next(iterator) for _ in range(10)):
        for row in range(4):
            for segment in range(1, batch["segment_ids"][row].max() + 1):
                source_ids = batch["encoder_tokens"][row][batch["encoder_segment_ids"][row] == segment]
                target_ids = batch["targets"][row][batch["segment_ids"][row] == segment]
                if source_ids[-1] == target_ids[-1] == tokenizer.eos_id:  # neither was truncated
                    assert (tokenizer.decode(source_ids), tokenizer.decode(target_ids)) in pairs
                    seen += 1
    assert seen > 20


# --- Sentinels -------------------------------------------------------------------------------------------------------
def test_sentinels_follow_the_tokenizer(prepared, data):
    tokenizer = prepared.tokenizer
    assert sentinels.sentinel_ids(tokenizer)[[0, 99]].tolist() == [VOCAB + 99, VOCAB]
    ids = sentinels.encode_blanks(tokenizer, "red <extra_id_0> fox <extra_id_12>")
    assert np.isin([VOCAB + 99, VOCAB + 87], ids).all()
    assert sentinels.decode_blanks(tokenizer, [*ids, tokenizer.eos_id]) == "red <extra_id_0> fox <extra_id_12>"
    assert tokenizer.decode(ids) == "red  fox "
    # A trained tokenizer leaves ids for them.
    config = dataclasses.replace(data, **OBJECTIVES["span_corruption"])
    assert pipeline.prepare(config, 500, progress=lambda _: None).tokenizer.vocab_size == 400


def test_named_sentinels(prepared):
    class Named(LetterTokenizer):
        def piece_id(self, piece):
            return 5 + int(piece.removeprefix("<extra_id_").removesuffix(">"))

    assert sentinels.sentinel_ids(Named()).tolist() == list(range(5, 105))
    assert prepared.tokenizer.piece_id("<extra_id_0>") == -1
    assert prepared.tokenizer.piece_id("<s>") == prepared.tokenizer.bos_id


@pytest.mark.parametrize(
    ("changes", "vocab_size", "message"),
    [
        ({"sequence_length": 9}, 500, r"data\.sequence_length=9: must be at least 10, .* data\.input_length=40"),
        ({"input_length": 2000, "sequence_length": 2000}, 500, r"input_length=2000: has 111 spans, and there are 100"),
    ],
)
def test_lengths_that_do_not_fit_are_refused(data, changes, vocab_size, message):
    config = dataclasses.replace(data, **(OBJECTIVES["span_corruption"] | changes))
    with pytest.raises(ConfigError, match=message):
        pipeline.prepare(config, vocab_size, progress=lambda _: None)


def test_a_vocabulary_without_room_for_sentinels_is_refused(prepared, data):
    config = dataclasses.replace(data, **OBJECTIVES["span_corruption"])
    with pytest.raises(ConfigError, match=r"model\.vocab_size=499: .* after the tokenizer's 400 .*at least 500"):
        pipeline.prepare(config, 499, tokenizer=prepared.tokenizer, progress=lambda _: None)


@pytest.mark.parametrize(("objective", "rows"), [("span_corruption", 500), ("pairs", 400)])
def test_an_encoder_embedding_with_too_few_rows_is_refused(prepared, data, objective, rows, monkeypatch):
    """400 tokens; span corruption adds 100 sentinels, all of which would index the last row of a smaller table."""
    changes = OBJECTIVES["span_corruption"] if objective == "span_corruption" else {"objective": objective}
    data = dataclasses.replace(data, **changes)
    if objective == "pairs":
        monkeypatch.setattr(pipeline, "prepare", lambda *_, **__: paired(prepared))
    for size, refused in ((0, False), (rows, False), (rows - 1, True)):
        model = ModelConfig(vocab_size=512, encoder_layers=1, encoder_vocab_size=size)
        whole = Config(model=model, data=data)
        message = rf"encoder_vocab_size={size}: .* ids up to {rows - 1}; use at least {rows}, or 0"
        with pytest.raises(ConfigError, match=message) if refused else contextlib.nullcontext():
            pipeline.prepare_run(whole, tokenizer=prepared.tokenizer, progress=lambda _: None)
