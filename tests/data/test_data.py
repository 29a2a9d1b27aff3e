"""Tokenizer and packed rows, on synthetic text."""

# ruff: noqa: F811
import collections
import dataclasses
import io
import json
import math
from pathlib import Path
from typing import ClassVar

import grain
import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
import sentencepiece

from moe.config import Config, ConfigError, DataConfig, ModelConfig, TrainConfig
from moe.data import pipeline, preparation, streams
from moe.data.tokenizer import Tokenizer, train_tokenizer
from moe.objectives.policy import Policy
from tests.text_fixtures import VOCAB, assert_equal, data, prepared  # noqa: F401
from tests.tiny_text import random_text

ODD_TEXT = "héllo\n\n\tnaïve  日本語 🙂 \u2581 a\r\n    x = 10\x00\n  trailing "


@pytest.fixture
def two_domains(prepared):
    texts = {name: [random_text(offset + i) for i in range(20)] for name, offset in (("one", 1000), ("two", 2000))}
    return preparation.Prepared(prepared.tokenizer, ("one", "two"), texts, texts)


class LetterTokenizer:
    """pad 0, bos 1, eos 2, a 3, b 4, c 5."""

    vocab_size, pad_id, bos_id, eos_id = 6, 0, 1, 2
    files: ClassVar = {}

    def encode(self, text):
        return np.asarray([3 + "abc".index(letter) for letter in text], np.int32)


@pytest.fixture
def letters():
    documents = {"x": ["ab", "c"]}
    return preparation.Prepared(LetterTokenizer(), ("x",), documents, documents)


# --- Tokenizer -------------------------------------------------------------------------------------------------------
def test_models_that_begin_with_a_space_read_their_symbol_for_it_as_sentencepiece_does():
    """Mixtral is one: the two parts of a▁b, encoded apart, would become "a▁ b"."""
    model, lines = io.BytesIO(), ["a b ab ba"] * 20
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=model, model_type="bpe", vocab_size=266, byte_fallback=True,
        normalization_rule_name="identity", hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    tokenizer = Tokenizer(model.getvalue())
    text = "a\u2581b"
    assert tokenizer.encode(text).tolist() == tokenizer.encode("a b").tolist()
    assert tokenizer.encode(text).tolist() == tokenizer._processor.encode(text)


def test_tokenizer_round_trip_is_exact(prepared):
    tokenizer = prepared.tokenizer
    assert (tokenizer.vocab_size, tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id) == (VOCAB, 0, 1, 2)
    assert tokenizer.token_bytes.shape == (VOCAB,)
    assert not tokenizer.token_bytes[:4].any()
    for text in [ODD_TEXT, "", " ", "\n", "<s></s><unk><0x0A>", *prepared.heldout["tiny_text/split"]]:
        ids = tokenizer.encode(text)
        assert ids.dtype == np.int32
        assert tokenizer.decode(ids) == text
        assert tokenizer.token_bytes[ids].sum() == len(text.encode())
        assert not np.isin(ids, [0, 1, 2, 3]).any()


def test_tokenizer_training_is_deterministic_and_reloads(tmp_path):
    texts = [random_text(i) for i in range(30)]
    first, second = train_tokenizer(texts, VOCAB), train_tokenizer(iter(texts), VOCAB)
    assert first.model_bytes == second.model_bytes
    (tmp_path / "some.model").write_bytes(first.model_bytes)
    for copy in (Tokenizer.from_bytes(first.model_bytes), Tokenizer.from_file(tmp_path / "some.model")):
        np.testing.assert_array_equal(copy.encode(ODD_TEXT), first.encode(ODD_TEXT))


def test_indentation_is_one_token():
    tokenizer = train_tokenizer(["def f(x):\n    if x:\n        return x\n" * 20, *map(random_text, range(20))], VOCAB)
    assert len(tokenizer.encode("    ")) == 1
    assert len(tokenizer.encode("        ")) == 1


@pytest.mark.parametrize("vocab_size", [50, 100_000])
def test_an_impossible_vocabulary_is_refused(vocab_size):
    with pytest.raises(ConfigError, match=r"model\.vocab_size"):
        train_tokenizer([random_text(0)], vocab_size)


def test_files_that_are_no_tokenizer_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="no such file"):
        Tokenizer.from_file(tmp_path / "absent")
    with pytest.raises(ConfigError, match="not a SentencePiece model"):
        Tokenizer.from_bytes(b"\x80\x04K\x01.")  # a pickle


# --- Rows, by hand ---------------------------------------------------------------------------------------------------
def test_one_row_by_hand(letters):
    # bos a b eos | bos c eos  is one row of T + 1 = 7 tokens.
    (batch,) = pipeline.heldout_batches(
        letters, DataConfig(sequence_length=6, heldout_rows=1), domain="x", batch_size=1
    )
    np.testing.assert_array_equal(batch["tokens"], [[1, 3, 4, 2, 1, 5]])
    np.testing.assert_array_equal(batch["targets"], [[3, 4, 2, -1, 5, 2]])
    np.testing.assert_array_equal(batch["segment_ids"], [[1, 1, 1, 1, 2, 2]])
    np.testing.assert_array_equal(batch["positions"], [[0, 1, 2, 3, 0, 1]])
    np.testing.assert_array_equal(batch["domain"], [0])
    assert all(value.dtype == np.int32 for value in batch.values())


def test_split_document_and_padding_by_hand(letters):
    # T + 1 = 5: [bos a b eos bos] [c eos . . .], and a row of padding to fill the batch. No batch is only
    # padding, however many rows were asked for.
    data = DataConfig(sequence_length=4, heldout_rows=1000)
    (batch,) = pipeline.heldout_batches(letters, data, domain="x", batch_size=3)
    np.testing.assert_array_equal(batch["tokens"], [[1, 3, 4, 2], [5, 2, 0, 0], [0] * 4])
    np.testing.assert_array_equal(batch["targets"], [[3, 4, 2, -1], [2, -1, -1, -1], [-1] * 4])
    np.testing.assert_array_equal(batch["segment_ids"], [[1, 1, 1, 1], [1, 1, 0, 0], [0] * 4])
    np.testing.assert_array_equal(batch["positions"], [[0, 1, 2, 3], [0, 1, 0, 0], [0] * 4])


def test_a_step_reads_one_token_more_than_the_targets_of_each_row(letters):
    """Documents of 4 and 3 tokens (bos ab eos, bos c eos); a row of T = 3 is cut from 4 tokens, so a step of 2 rows
    reads 8 of 7 tokens."""
    config = Config(data=DataConfig(sequence_length=3), train=TrainConfig(batch_size=2, sample_tokens=0))
    assert pipeline.epochs_per_step(letters, config) == {"x": pytest.approx(8 / 7)}


def test_unigram_by_hand(letters):
    # Counts of targets: eos 2, a 1, b 1, c 1; V = 6, so p(eos) = 3/11 and p(a) = p(b) = p(c) = 2/11.
    # Held-out targets in one row: a b eos c eos.
    data = DataConfig(sequence_length=6, heldout_rows=1)
    expected = -(3 * math.log(2 / 11) + 2 * math.log(3 / 11)) / 5
    assert pipeline.unigram_nll(letters, data, "x") == pytest.approx(expected, rel=1e-12)
    assert pipeline.unigram_nll(letters, data) == pytest.approx(expected, rel=1e-12)


def test_a_tokenizer_with_one_id_for_bos_and_eos_counts_every_end(letters):
    # eos is id 2 and begins every document too, but is a target only at the ends: counts as in the test above.
    data = DataConfig(sequence_length=6, heldout_rows=1)
    tokenizer = type("OneId", (LetterTokenizer,), {"bos_id": LetterTokenizer.eos_id})()
    joined = preparation.Prepared(tokenizer, letters.domains, letters.train, letters.heldout)
    expected = -(3 * math.log(2 / 11) + 2 * math.log(3 / 11)) / 5
    assert pipeline.unigram_nll(joined, data, "x") == pytest.approx(expected, rel=1e-12)


def test_sampled_ids_beyond_the_tokenizer_are_counted(letters):
    class Sampled(Policy):
        def completions(self, text):
            return [{"targets": np.array([-1, 35, 3])}]

    sampled = dataclasses.replace(letters, objective=Sampled(model=ModelConfig(vocab_size=40)), _unigram_counts={})
    counts = pipeline._unigram_counts(sampled, DataConfig(objective="policy"), "x")
    assert (len(counts), counts[3], counts[35]) == (40, len(letters.train["x"]), len(letters.train["x"]))


def test_heldout_rows_are_spread_over_the_text(letters):
    # Five documents of a row each: bos, a letter, eos.
    apart = dataclasses.replace(letters, heldout={"x": ["a", "b", "c", "b", "a"]})
    for count, expected in ((2, [3, 3]), (3, [3, 5, 3]), (5, [3, 4, 5, 4, 3])):
        data = DataConfig(sequence_length=2, heldout_rows=count)
        (batch,) = pipeline.heldout_batches(apart, data, domain="x", batch_size=count)
        assert batch["targets"][:, 0].tolist() == expected
    # Of a longer text only a stretch is read: six tokens are three rows, unless more are kept.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "MAX_STRETCH_TOKENS", 6)
        for count, expected in ((2, [3, 5]), (4, [3, 4, 5, 4])):
            data = DataConfig(sequence_length=2, heldout_rows=count)
            (batch,) = pipeline.heldout_batches(apart, data, domain="x", batch_size=count)
            assert batch["targets"][:, 0].tolist() == expected


# --- Training batches ------------------------------------------------------------------------------------------------
def test_no_target_crosses_a_document(prepared, data):
    # With eos = 2 and bos = 1 the ids show the rules: eos has no target, and bos is never a target.
    iterator = pipeline.train_iterator(prepared, data, batch_size=4, seed=0)
    for batch in (next(iterator) for _ in range(20)):
        tokens, targets, segments = batch["tokens"], batch["targets"], batch["segment_ids"]
        assert tokens.shape == (4, 32)
        assert batch["domain"].shape == (4,)
        assert (targets[tokens == 2] == -1).all()
        assert (targets != 1).all()
        has_next = targets[:, :-1] >= 0
        np.testing.assert_array_equal(has_next, segments[:, :-1] == segments[:, 1:])
        np.testing.assert_array_equal(targets[:, :-1][has_next], tokens[:, 1:][has_next])
        starts = np.diff(segments, prepend=0, axis=1) == 1
        np.testing.assert_array_equal(batch["positions"] == 0, starts)
        assert (segments > 0).all()


def test_seed_decides_the_order(prepared, data):
    def take(seed):
        iterator = pipeline.train_iterator(prepared, data, batch_size=4, seed=seed)
        return [next(iterator) for _ in range(5)]

    assert_equal(take(3), take(3))
    assert not np.array_equal(take(3)[0]["tokens"], take(4)[0]["tokens"])


def test_epochs_differ(prepared, data):
    documents = prepared.train["tiny_text/split"]
    order = grain.MapDataset.source(documents).shuffle(seed=1).repeat()
    first, second = ([order[start + i] for i in range(40)] for start in (0, 40))
    assert sorted(first) == sorted(second) == sorted(documents)
    assert first != second


def test_every_window_has_its_own_shuffle():
    shuffled = iter(streams.WindowShuffle(grain.MapDataset.range(32).to_iter_dataset(), 8, seed=0))
    windows = [tuple(int(next(shuffled)) - 8 * i for _ in range(8)) for i in range(4)]
    assert all(sorted(window) == list(range(8)) for window in windows)
    assert len(set(windows)) == 4
    # A position within a window continues with the rows that it has not given yet.
    order = [8 * i + row for i, window in enumerate(windows) for row in window]
    for taken in (0, 3, 8, 13):
        before, after = (
            iter(streams.WindowShuffle(grain.MapDataset.range(32).to_iter_dataset(), 8, seed=0)) for _ in range(2)
        )
        assert [int(next(before)) for _ in range(taken)] == order[:taken]
        after.set_state(before.get_state())
        assert [int(next(after)) for _ in range(32 - taken)] == order[taken:]


def test_streams_are_shuffled_independently(two_domains, data):
    """All mix the domains in the same order; with the same shuffle a batch would have rows of one domain only."""
    iterator = pipeline.train_iterator(two_domains, dataclasses.replace(data, shuffle_window=32), batch_size=4, seed=0)
    assert any(len(set(next(iterator)["domain"].tolist())) == 2 for _ in range(8))


def test_domains_have_orders_of_their_own_and_streams_noise(letters, data, monkeypatch):
    """The noise of an objective would otherwise repeat in all streams, and domains of one size share their order."""
    orders, seeds = {}, set()

    def rows(documents, prepared, data, domain, seed):
        orders[domain] = [documents[i] for i in range(20)]
        seeds.add(seed)
        return grain.MapDataset.range(4).repeat().to_iter_dataset()

    monkeypatch.setattr(pipeline, "_rows", rows)
    numbers = [str(i) for i in range(20)]
    prepared = dataclasses.replace(letters, domains=("one", "two"), train={"one": numbers, "two": numbers})
    for seed, number in ((0, 0), (0, 1), (1, 0)):
        pipeline._stream(prepared, dataclasses.replace(data, weights=()), number, 2, seed)
    assert orders["one"] != orders["two"]
    assert len(seeds) == 3 * 2


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("batches", [0, 7, 45])  # an epoch of both domains is about 40 batches
def test_exact_resume(two_domains, data, tmp_path, batches, asynchronous):
    def fresh():
        return pipeline.train_iterator(two_domains, dataclasses.replace(data, weights=(2, 1)), batch_size=4, seed=5)

    iterator = fresh()
    for _ in range(batches):
        next(iterator)
    options = ocp.CheckpointManagerOptions(enable_async_checkpointing=asynchronous)
    with ocp.CheckpointManager(tmp_path, options=options) as manager:
        manager.save(0, args=ocp.args.Composite(data=streams.StreamsSave(iterator)))
        expected = [next(iterator) for _ in range(12)]  # an asynchronous save may still be writing
        manager.wait_until_finished()
        restored = fresh()
        next(restored)
        manager.restore(0, args=ocp.args.Composite(data=streams.StreamsRestore(restored)))
    assert_equal([next(restored) for _ in range(12)], expected)


def test_resume_between_two_documents(letters):
    # T + 1 = 4 tokens: "ab" fills a row exactly and "c" does not, so saves fall on, before and after document ends.
    data = DataConfig(sequence_length=3, shuffle_window=1)
    iterator = pipeline.train_iterator(letters, data, batch_size=1, seed=0)
    batches, states = [], []
    for _ in range(16):
        states.append(json.dumps(iterator.get_state()))  # as CheckpointSave writes it
        batches.append(next(iterator))
    for start, state in enumerate(states):
        iterator.set_state(json.loads(state))
        assert_equal([next(iterator) for _ in batches[start:]], batches[start:])


def test_rows_do_not_depend_on_the_number_of_processes(two_domains, data, tmp_path):
    """Two processes save; one, two or four resume: their rows, concatenated, are the batch of a single process."""

    def start(processes):
        rows = np.split(np.arange(8), processes)
        return [pipeline.train_iterator(two_domains, data, batch_size=8, seed=3, rows=part) for part in rows]

    def take(iterators):
        parts = [next(iterator) for iterator in iterators]
        return {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}

    alone, pair = start(1), start(2)
    assert_equal([take(pair) for _ in range(5)], [take(alone) for _ in range(5)])
    handler = streams.StreamsHandler()
    for iterator in pair:
        handler.save(tmp_path, iterator)
    assert len(list(tmp_path.iterdir())) == 8
    expected = [take(alone) for _ in range(5)]
    for processes in (1, 2, 4):
        restored = start(processes)
        for iterator in restored:
            handler.restore(tmp_path, iterator)
        assert_equal([take(restored) for _ in range(5)], expected)


def test_processes_that_share_rows_may_save_at_once(two_domains, data, tmp_path, monkeypatch):
    """Devices of ``tensor`` hold the same rows, even in several processes: one saves while the other is saving."""
    pair = [pipeline.train_iterator(two_domains, data, batch_size=8, seed=3) for _ in range(2)]
    handler, replace, process = streams.StreamsHandler(), Path.replace, [0]

    def interrupted(path, target):
        monkeypatch.setattr(Path, "replace", replace)
        process[0] = 1
        handler.save(tmp_path, pair[1])
        process[0] = 0
        return replace(path, target)

    monkeypatch.setattr(jax, "process_index", lambda: process[0])
    monkeypatch.setattr(Path, "replace", interrupted)
    handler.save(tmp_path, pair[0])
    assert process == [0]
    assert {path.name for path in tmp_path.iterdir()} == {f"stream_{number}.json" for number in range(8)}
    handler.restore(tmp_path, pair[1])


def test_streams_share_no_document_of_an_epoch(prepared, data):
    batches = pipeline.train_iterator(prepared, data, batch_size=8, seed=0)
    rows = np.stack([next(batches)["tokens"] for _ in range(2)], 1)  # [8 streams, 2 rows, T]
    # 16 rows of 33 tokens hold a few documents of the first epoch; each names its number at the start.
    numbers = [
        {" ".join(text.split()[:2]) for row in stream for text in _documents(row, prepared.tokenizer)}
        for stream in rows
    ]
    assert all(numbers)
    assert len(set.union(*numbers)) == sum(map(len, numbers))


@pytest.mark.parametrize(
    ("size", "rows", "number"),
    [
        (640, [range(40 * i, 40 * i + 40) for i in range(16)], 16),  # 16 hosts of 40 consecutive rows: one stream each
        (640, [range(80 * i, 80 * i + 80) for i in range(8)], 8),
        (64, [[*range(8 * i, 8 * i + 2), *range(8 * i + 4, 8 * i + 6)] for i in range(8)], 32),  # pairs of a torus
        (12, [range(4), range(4, 8), range(8, 12)], 6),  # gcd(8, 12) = 4 streams of three rows do not fit
        (12, [], 4),  # the default
    ],
)
def test_the_least_number_of_streams(size, rows, number):
    assert streams.least_number(size, rows) == number


@pytest.mark.parametrize(
    ("changes", "rows", "message"),
    [
        ({"streams": 3}, None, "data.streams=3: must divide train.batch_size=8"),
        ({"streams": 1}, range(4), "data.streams=1: must be a multiple of the number of processes"),
        ({"streams": 2}, range(2, 6), "data.streams=2: must be a multiple of the number of processes"),
        ({"streams": 4}, range(5), "needs a number of processes that divides 4"),
    ],
)
def test_impossible_numbers_of_streams_are_refused(prepared, data, changes, rows, message):
    with pytest.raises(ConfigError, match=message):
        pipeline.train_iterator(prepared, dataclasses.replace(data, **changes), batch_size=8, seed=0, rows=rows)


def test_a_position_in_other_documents_is_refused(prepared, data):
    state = pipeline.train_iterator(prepared, data, batch_size=4, seed=0).get_state()
    fewer = dataclasses.replace(prepared, train={name: list(texts)[1:] for name, texts in prepared.train.items()})
    with pytest.raises(ConfigError, match=r"data\.dataset: its documents, or the tokenizer, are not those"):
        pipeline.train_iterator(fewer, data, batch_size=4, seed=0).set_state(state)


def test_a_position_belongs_to_its_documents_and_tokenizer(letters):
    one = dataclasses.replace(letters, versions={"x": "1"})
    tokenizer = type("Other", (LetterTokenizer,), {"files": {"tokenizer.model": b"other"}})()
    others = [
        dataclasses.replace(one, train={"x": ["ab"]}),
        dataclasses.replace(one, versions={"x": "2"}),
        dataclasses.replace(one, tokenizer=tokenizer),
    ]
    assert len({pipeline.digest(each) for each in (one, *others)}) == 4


def _documents(row, tokenizer):
    """Texts of the documents that start at least 20 tokens before the end of the row."""
    starts = [int(start) for start in np.flatnonzero(row == tokenizer.bos_id) if start + 20 <= len(row)]
    return [tokenizer.decode(row[start:]) for start in starts]


def test_mixture_shares_are_exact(two_domains, data):
    data = dataclasses.replace(data, weights=(3.0, 1.0))
    iterator = pipeline.train_iterator(two_domains, data, batch_size=4, seed=0)
    domains = np.concatenate([next(iterator)["domain"] for _ in range(52)])
    assert (domains == 0).mean() == 0.75  # of each of the 4 streams: 39 of 52


@pytest.mark.parametrize(("weights", "parts"), [((7.0, 3.0), (233, 100)), ((1.0, 1.009), (100, 100)), ((), (100, 100))])
def test_printed_shares_are_those_of_the_rows(data, weights, parts):
    """Grain rounds 7 / 3 of 100 down to 233, and 100.9 to 100."""
    data, domains = dataclasses.replace(data, weights=weights), ("a", "b")
    rows = {domain: grain.MapDataset.source([domain]).repeat().to_iter_dataset() for domain in domains}
    mixed = iter(
        grain.IterDataset.mix(rows, dict(zip(domains, preparation.domain_weights(data, domains), strict=True)))
    )
    count = collections.Counter(next(mixed) for _ in range(sum(parts)))
    assert tuple(count[domain] for domain in domains) == parts
    assert tuple(preparation.row_shares(data, domains).values()) == tuple(part / sum(parts) for part in parts)


# --- Preparation -----------------------------------------------------------------------------------------------------
def test_prepare_reuses_the_tokenizer(data, prepared):
    told = []
    again = pipeline.prepare(data, VOCAB, progress=told.append)
    assert not told
    assert again.tokenizer.model_bytes == prepared.tokenizer.model_bytes
    given = pipeline.prepare(dataclasses.replace(data, tokenizer="absent"), VOCAB, tokenizer=prepared.tokenizer)
    assert given.tokenizer is prepared.tokenizer
    with pytest.raises(ConfigError, match=f"model.vocab_size=300: the tokenizer has {VOCAB}"):
        pipeline.prepare(data, 300, tokenizer=prepared.tokenizer)


def test_heldout_split_or_slice(data, prepared):
    name = "tiny_text/split"
    assert prepared.domains == (name,)
    assert len(prepared.train[name]) == 40
    assert len(prepared.heldout[name]) == 10
    name = "tiny_text/whole"
    whole = pipeline.prepare(dataclasses.replace(data, dataset=name), VOCAB, progress=lambda _: None)
    train, heldout = set(whole.train[name]), set(whole.heldout[name])
    assert heldout
    assert not train & heldout
    assert len(train | heldout) == 60
    assert len(whole.train[name]) + len(whole.heldout[name]) == 120


def test_heldout_batches_are_deterministic(data, prepared):
    first, second = (pipeline.heldout_batches(prepared, data, domain="tiny_text/split", batch_size=4) for _ in range(2))
    assert_equal(first, second)
    assert [batch["tokens"].shape for batch in first] == [(4, 32), (4, 32)]
    assert not first[1]["segment_ids"][2:].any()  # 6 rows, then padding


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dataset": "embedded", "domains": ("python", "pyhton")}, r"unknown \['pyhton'\]; allowed are .*'literature'"),
        ({"weights": (1.0, 1.0)}, "data.weights"),
        ({"weights": (0.0,)}, "data.weights.*positive"),
        ({"weights": (float("nan"),)}, "data.weights.*finite"),
        ({"dataset": "no_such_dataset"}, "data.dataset='no_such_dataset'.*download_and_prepare"),
        ({"dataset": "tiny_text/absent"}, "data.dataset='tiny_text/absent'"),
        ({"tokenizer": "absent.model"}, "data.tokenizer"),
        (
            {"heldout_rows": 10_000_000},
            "data.heldout_rows=10000000: must be at most 524288 with data.sequence_length=32",
        ),
        ({"shuffle_window": 10**9}, "data.shuffle_window=1000000000: must be at most 8388608"),
        ({"directory": "/" + "long" * 2000}, r"data.directory=.*: cannot be written \(File name too long\)"),
        ({"directory": "/tmp/zero\0byte"}, r"data.directory='/tmp/zero\\x00byte': must be valid UTF-8"),
        ({"dataset": "/tmp/zero\0byte"}, r"data.dataset='/tmp/zero\\x00byte': must be valid UTF-8"),
        ({"sequence_length": 100_000}, r"data.sequence_length=100000.*has only \d+ tokens; use at most \d+"),
    ],
)
def test_errors_name_the_field(data, changes, message):
    with pytest.raises(ConfigError, match=message):
        pipeline.prepare(dataclasses.replace(data, **changes), VOCAB, progress=lambda _: None)


def test_the_longest_row_that_an_error_suggests_works(letters):
    with pytest.raises(ConfigError, match="has only 7 tokens; use at most 7"):
        pipeline.heldout_batches(letters, DataConfig(sequence_length=8), domain="x", batch_size=1)
    assert pipeline.heldout_batches(letters, DataConfig(sequence_length=7), domain="x", batch_size=1)
    with pytest.raises(ConfigError, match=r"no domain 'y'; allowed are \['x'\]"):
        pipeline.heldout_batches(letters, DataConfig(sequence_length=6), domain="y", batch_size=1)
