"""Folders of text files and tables: documents, domains, splits, the index, and what is refused."""

# ruff: noqa: F811
import dataclasses
import datetime
import json
import os
import shutil
import sys
from pathlib import Path, PurePosixPath
from typing import ClassVar

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from etils import epath
from etils.epath import backend
from fsspec.implementations.memory import MemoryFileSystem

from moe.config import ConfigError
from moe.data import documents, folder_files, folders, pipeline
from moe.data.folder_files import find_sources
from moe.training import report
from tests.text_fixtures import VOCAB, assert_equal, data, folder  # noqa: F401
from tests.tiny_text import random_text


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
    # The sections of the long file join to its text, and have the size that `sections` cuts.
    parts = sorted((part for part in both["books"] if part in long), key=long.index)
    assert "".join(parts) == long
    assert [len(part.encode()) for part in parts[:-1]] == pytest.approx([10_000] * (len(parts) - 1), rel=0.2)
    # Again: nothing is read or trained, and the rows are the same.
    again = pipeline.prepare(config, VOCAB, progress=told.append)
    assert len(told) == 2
    first, second = (pipeline.train_iterator(p, config, batch_size=4, seed=0) for p in (prepared, again))
    assert_equal([next(first) for _ in range(3)], [next(second) for _ in range(3)])


def test_a_domain_whose_name_looks_like_tex_is_drawn(tmp_path, pictures):
    rows = [{"kind": "train", "step": 1, "cross_entropy": 2.0}]
    rows += [{"kind": f"heldout/{domain}", "step": 1, "loss": 2.0} for domain in ("all", "$_$", "$x^$")]
    report.figure(epath.Path(tmp_path / "figure.png"), rows, {"all": 3.0})
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")


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
        pipeline.prepare(dataclasses.replace(config, domains=("poems",), weights=()), VOCAB)


def test_datasets_of_several_sources_are_mixed(folder, directory):
    config, _, _ = folder
    config = dataclasses.replace(config, dataset=f"tiny_text/split,{config.dataset}", directory=str(directory))
    prepared = pipeline.prepare(config, VOCAB, progress=lambda _: None)
    assert prepared.domains == ("tiny_text/split", "books", "notes", "chat")
    config = dataclasses.replace(config, dataset=f"{config.dataset},tiny_text/split")
    with pytest.raises(ConfigError, match="two of these have a domain 'tiny_text/split'"):
        pipeline.prepare(config, VOCAB)


def test_text_without_line_ends_is_cut_between_characters(tmp_path):
    """A file of 3-byte characters without a line end: sections of 18,000 bytes plus at most the rest of a character."""
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
        ("a.jsonl", b'{"text": "x", "text": "y"}\n', r"a\.jsonl, line 1: two values of 'text'"),
        ("a.jsonl", b'{"text": "x"}\n\n{"txt": "y"}\n', r"a\.jsonl, line 3: needs an object with a string 'text'"),
        ("a.jsonl", b'{"source": "x"}\n', r"a\.jsonl, line 1: needs an object .* or 'source' and 'target'"),
        ("a.jsonl", b'{"source": "x", "target": "\\u001e"}\n', r"a\.jsonl, line 1: has the character U\+001E"),
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
        ("a.txt", b"\n \n", r"has no text in \.txt, .*\.arrow files; data\.text_suffixes names further ones"),
        ("a.txt", b"one document", r"the 1 document\(s\) of 'text' cannot be divided"),
        ("a.tex", b"text", r"has no text in \.txt, .*\.arrow files"),
    ],
)
def test_a_broken_record_is_named(tmp_path, data, name, content, message):
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / name).write_bytes(content)
    config = dataclasses.replace(data, dataset=str(tmp_path / "text"), directory=str(tmp_path / "cache"))
    with pytest.raises(ConfigError, match=message):
        pipeline.prepare(config, VOCAB, progress=lambda _: None)


def test_a_byte_order_mark_is_no_text(tmp_path):
    (tmp_path / "text").mkdir()
    texts = [random_text(i) for i in range(40)]
    for i, text in enumerate(texts):
        (tmp_path / "text" / f"{i}.txt").write_text(text, encoding="utf-8-sig")
    (tmp_path / "text" / "a.jsonl").write_text('{"text": "line"}\n{"text": "more"}\n', encoding="utf-8-sig")
    found, _ = folders.open_folder(str(tmp_path / "text"), epath.Path(tmp_path / "cache"), lambda _: None)
    assert sorted([*found["text"][0], *found["text"][1]]) == sorted([*texts, "line", "more"])
    (tmp_path / "text" / "b.txt").write_bytes(b"\xef\xbb\xbf\n\xff")
    with pytest.raises(ConfigError, match=r"b\.txt, line 2: is not UTF-8 text"):
        folders.open_folder(str(tmp_path / "text"), epath.Path(tmp_path / "cache"), lambda _: None)


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
    if os.path.exists(name):
        with pytest.raises(ConfigError, match=r"0\.txt: is not a regular file"):
            pipeline.prepare(config, VOCAB, progress=lambda _: None)


def test_the_line_of_a_document_is_counted_in_parts(tmp_path, data):
    lines = [json.dumps({"text": letter * 700_000}) for letter in "abcdef"]  # 4.2 MB, counted a megabyte at a time
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "long.jsonl").write_text("\n\n".join(lines))
    found, _ = folders.open_folder(str(tmp_path / "text"), epath.Path(data.directory), lambda _: None)
    documents = [(split, i) for split in found["text"] for i in range(len(split))]
    numbers = sorted(int(split.where(i).rpartition(" ")[2]) for split, i in documents)
    assert numbers == [1, 3, 5, 7, 9, 11]


def test_an_index_is_mapped(folder):
    """The index of billions of documents, 23 bytes each, stays on disk; a split keeps their numbers, in its order."""
    config, _, _ = folder
    found, _ = folders.open_folder(config.dataset, epath.Path(config.directory), lambda _: None)
    places = found["books"][0]._places
    assert isinstance(places, np.memmap)
    for number, splits in enumerate(found.values()):
        chosen = np.sort(np.concatenate([split._chosen for split in splits]))
        np.testing.assert_array_equal(chosen, np.flatnonzero(places["domain"] == number))
        assert all(split._places is places and (np.diff(split._chosen) > 0).all() for split in splits)


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


def test_file_names_that_are_not_utf8_are_read(folder, tmp_path):
    config, _, _ = folder
    os.rename(tmp_path / "text" / "books" / "0.txt", os.fsencode(tmp_path / "text" / "books") + b"/\xff\n.txt")
    assert pipeline.prepare(config, VOCAB, progress=lambda _: None).domains == ("books", "notes", "chat")
    with pytest.raises(ConfigError, match=r"data.dataset=.*: must be valid UTF-8"):
        dataclasses.replace(config, dataset=os.fsdecode(os.fsencode(tmp_path) + b"/\xfe"))
    os.rename(os.fsencode(tmp_path) + b"/text/books", os.fsencode(tmp_path) + b"/text/\xfd")
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
    # The same documents as JSON lines get the same split.
    lines = "".join(json.dumps({"text": text}) + "\n" for text in [*texts[:40], *texts[41::2]])
    (tmp_path / "same" / "web").mkdir(parents=True)
    (tmp_path / "same" / "web" / "a.jsonl").write_text(lines)
    same = dataclasses.replace(config, dataset=str(tmp_path / "same"))
    assert _split(pipeline.prepare(same, VOCAB, progress=lambda _: None), "web") == _split(prepared, "web")
    # A second run reads the copy in the index; if that is missing, the error names what to delete.
    next((tmp_path / "cache" / "folders").glob("*/table-00001.arrow")).unlink()
    with pytest.raises(ConfigError, match=r"table-00001\.arrow: is missing; delete .*folders"):
        pipeline.prepare(config, VOCAB, progress=lambda _: None)


def test_suffixes_are_read_without_regard_to_case(tmp_path, data):
    """A.TXT and B.PARQUET beside a good file were left out without a word."""
    root = tmp_path / "text"
    root.mkdir()
    texts = {
        name: random_text(number, words=400) for number, name in enumerate(("a.jsonl", "B.JSONL", "C.TXT", "D.Parquet"))
    }
    for name in ("a.jsonl", "B.JSONL"):
        (root / name).write_text(json.dumps({"text": texts[name]}) + "\n")
    (root / "C.TXT").write_text(texts["C.TXT"])
    pyarrow.parquet.write_table(pyarrow.table({"text": [texts["D.Parquet"]]}), root / "D.Parquet")
    (root / "e.TEX").write_text("e")
    found, _ = folders.open_folder(str(root), epath.Path(data.directory), lambda _: None, (".tex",))
    ((train, heldout),) = found.values()
    assert sorted([*train, *heldout]) == sorted([*texts.values(), "e"])
    assert not list(folders.describe_left_out_of(str(root), (".tex",)))
    (line,) = folders.describe_left_out_of(f"embedded,{root}", ())
    assert line == f"left out of {root}, since their suffixes are not read: 1 .TEX (e.TEX)"


def test_a_folder_of_unread_files_names_them(tmp_path, data):
    (tmp_path / "text").mkdir()
    for name in ("a.jsonl.gz", "b.json"):
        (tmp_path / "text" / name).write_text("{}")
    with pytest.raises(ConfigError, match=r"has no text in .*; left out: 1 \.json \(b\.json\), 1 \.jsonl\.gz \(a"):
        pipeline.prepare(dataclasses.replace(data, dataset=str(tmp_path / "text")), VOCAB, progress=lambda _: None)


def test_pairs_in_a_folder(tmp_path, data):
    pairs = [(random_text(i, words=3), random_text(100 + i, words=4)) for i in range(40)]
    (tmp_path / "text").mkdir()
    lines = [{"source": source, "target": target, "domain": "lines"} for source, target in pairs]
    lines.append({"source": "without a target", "target": " ", "domain": "lines"})
    (tmp_path / "text" / "a.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    columns = dict(zip(("source", "target"), map(list, zip(*pairs, strict=True)), strict=True))
    pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "text" / "b.parquet")
    config = dataclasses.replace(data, dataset=str(tmp_path / "text"), directory=str(tmp_path / "cache"))
    prepared = pipeline.prepare(config, VOCAB, progress=lambda _: None)
    expected = sorted(f"{source}{documents.PAIR}{target}" for source, target in pairs)
    for domain in ("lines", "text"):
        train, heldout = _split(prepared, domain)
        assert sorted(train + heldout) == expected
    assert prepared.tokenizer.piece_id(documents.PAIR) == -1  # no token is used for the separator


def test_hugging_face_datasets_with_splits(tmp_path, data, monkeypatch):
    """A folder of DatasetDict.save_to_disk, and the hub's layout of Parquet shards: the splits are kept."""
    texts = {"train": [random_text(i) for i in range(30)], "test": [random_text(100 + i) for i in range(5)]}
    unused = [random_text(200)]
    for split, documents_ in texts.items():
        _write_table(tmp_path / "saved" / split / "data-00000-of-00001.arrow", documents_, stream=True)
        _write_table(tmp_path / "saved" / split / "cache-0123456789abcdef.arrow", unused, stream=True)
        _write_table(tmp_path / "hub" / "data" / f"{split}-00000-of-00001.parquet", documents_)
        _write_table(tmp_path / "languages" / "en" / f"{split}-00000-of-00001.parquet", documents_)
    for folder_ in ("hub/data", "languages/en"):
        _write_table(tmp_path / folder_ / "unsupervised-00000-of-00001.parquet", unused)
    _write_table(tmp_path / "saved" / "other" / "data-00000-of-00001.arrow", unused, stream=True)
    (tmp_path / "saved" / "dataset_dict.json").write_text('{"splits": ["train", "test", "other"]}')
    (tmp_path / "hub" / "README.md").write_text("the dataset's card")
    for folder_, domain in (("saved", "saved"), ("hub", "hub"), ("languages", "en")):
        config = dataclasses.replace(data, dataset=str(tmp_path / folder_), directory=str(tmp_path / "cache"))
        for _ in range(2):  # indexed, then read from the index
            prepared = pipeline.prepare(config, VOCAB, progress=lambda _: None)
            assert prepared.domains == (domain,)
            assert _split(prepared, domain) == (sorted(texts["train"]), sorted(texts["test"]))
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ConfigError, match=r"\.parquet: reading this file needs pyarrow; install it with pip"):
        pipeline.prepare(dataclasses.replace(config, directory=str(tmp_path / "other")), VOCAB)


def test_folders_become_splits_with_dataset_dict_json(tmp_path):
    """The index of a copy to which that file was added last is not that of its folders as domains."""
    folder_ = tmp_path / "saved"
    for split, numbers in (("train", range(30)), ("test", range(30, 40))):
        texts = [random_text(i) for i in numbers]
        _write_table(folder_ / split / "data-00000-of-00001.arrow", texts, stream=True)

    def sizes():
        found, _ = folders.open_folder(str(folder_), epath.Path(tmp_path / "cache"), lambda _: None)
        return {domain: (len(train), len(heldout)) for domain, (train, heldout) in found.items()}

    assert sizes().keys() == {"train", "test"}
    (folder_ / "dataset_dict.json").write_text("{}")
    assert sizes() == {"saved": (30, 10)}


def test_a_split_of_unknown_name_is_not_trained_on(tmp_path):
    for split in ("train", "validation_matched", "test_matched"):
        _write_table(tmp_path / f"{split}-00000-of-00001.parquet", [split])
    (source,) = find_sources(epath.Path(tmp_path))
    assert (source.name, source.split) == ("train-00000-of-00001.parquet", folder_files.UNSPLIT)


def test_each_domain_has_its_own_splits(tmp_path):
    for name in ("de/train", "de/test", "en/train", "en/test", "en/validation", "fr/train"):
        _write_table(tmp_path / f"{name}-00000-of-00001.parquet", [name])
    found = {source.name.partition("-")[0]: source.split for source in find_sources(epath.Path(tmp_path))}
    train, heldout = folder_files.TRAIN, folder_files.HELDOUT
    whole = {"fr/train": folder_files.UNSPLIT}
    assert found == {"de/train": train, "de/test": heldout, "en/train": train, "en/validation": heldout} | whole


def test_a_domain_of_one_document_is_refused_unless_left_out(tmp_path, data):
    for domain in ("books", "web"):
        (tmp_path / "text" / domain).mkdir(parents=True)
        for i in range(40):
            (tmp_path / "text" / domain / f"{i}.txt").write_text(random_text(i))
    (tmp_path / "text" / "README.md").write_text("one document")
    config = dataclasses.replace(data, dataset=str(tmp_path / "text"), directory=str(tmp_path / "cache"))
    with pytest.raises(ConfigError, match=r"1 document\(s\) of 'text' cannot be .* leave it out by data\.domains"):
        pipeline.prepare(config, VOCAB, progress=lambda _: None)
    chosen = dataclasses.replace(config, domains=("books", "web"))
    assert pipeline.prepare(chosen, VOCAB, progress=lambda _: None).domains == ("books", "web")


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"body": ["x"]}, r"a\.parquet: needs columns that are a string 'text'.*; it has \['body'\]"),
        ({"source": ["x", "y"], "target": [None, "z"]}, r"a\.parquet, row 0: target is null"),
        ({"source": ["x\x1e"], "target": ["y"]}, r"a\.parquet, row 0: has the character U\+001E"),
        ({"text": [3]}, r"a\.parquet: column 'text' must be of strings, not int64"),
        ({"text": ["x"], "domain": [3]}, r"a\.parquet: column 'domain' must be of strings, not int64"),
        ({"text": ["x", None]}, r"a\.parquet, row 1: text is null"),
        ({"text": ["x"], "domain": [""]}, r"a\.parquet, row 0: domain='': must be a non-empty string"),
        ({"messages": ['[{"role": "user", "content": "\\ud800"}]']}, r"a\.parquet, row 0: has half a character"),
        (
            {"messages": [[{"role": "user", "content": "x", "time": datetime.datetime(2024, 7, 26)}]]},
            r"a\.parquet: cannot be read as a table \(holds a value of type datetime, which JSON lacks",
        ),
    ],
)
def test_malformed_tables_are_named(tmp_path, data, columns, message):
    (tmp_path / "text").mkdir()
    pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "text" / "a.parquet")
    config = dataclasses.replace(data, dataset=str(tmp_path / "text"), directory=str(tmp_path / "cache"))
    with pytest.raises(ConfigError, match=message):
        pipeline.prepare(config, VOCAB, progress=lambda _: None)


class Bucket(MemoryFileSystem):
    """An in-memory bucket, walked as by gcsfs: names start with neither gs:// nor a slash."""

    protocol = ("gs", "gcs")
    store: ClassVar = {}
    pseudo_dirs: ClassVar = [""]

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(str(path).removeprefix("gs://"))

    def walk(self, path, **named):
        for place, *inside in super().walk(path, **named):
            yield place.lstrip("/"), *inside


def test_a_folder_in_a_bucket_is_the_same_as_on_disk(folder, tmp_path, monkeypatch):
    config, _, _ = folder
    there = pipeline.prepare(config, VOCAB, progress=lambda _: None)
    bucket = Bucket()
    # etils keeps the first connection of a process, so its own method is replaced, not fsspec's.
    monkeypatch.setattr(backend.fsspec_backend, "_get_filesystem", {"gcs": bucket}.__getitem__)
    bucket.put(config.dataset, "gs://bucket/text", recursive=True)
    remote = dataclasses.replace(config, dataset="gs://bucket/text", directory=str(tmp_path / "elsewhere"))
    for _ in range(2):  # indexed, then read from the index
        prepared = pipeline.prepare(remote, VOCAB, tokenizer=there.tokenizer, progress=lambda _: None)
    assert prepared.domains == there.domains
    for split in ("train", "heldout"):
        assert {name: list(texts) for name, texts in getattr(prepared, split).items()} == {
            name: list(texts) for name, texts in getattr(there, split).items()
        }
    bucket.rm("gs://bucket/text/notes/all.jsonl")
    said = []
    assert pipeline.prepare(remote, VOCAB, tokenizer=there.tokenizer, progress=said.append).domains == ("books",)
    assert said == ["indexing gs://bucket/text again, because gs://bucket/text/notes/all.jsonl was removed"]


def test_a_folder_that_changes_is_indexed_beside_its_earlier_version(folder, tmp_path):
    """The earlier index is used again once its files are restored; a run's position belongs to one version."""
    config, _, _ = folder
    (tmp_path / "cache" / "folders" / "unfinished-x1" / "sub").mkdir(parents=True)  # left by a killed process
    prepared = pipeline.prepare(config, VOCAB, progress=lambda _: None)
    assert not (tmp_path / "cache" / "folders" / "unfinished-x1").exists()
    file, before = tmp_path / "text" / "notes" / "all.jsonl", (tmp_path / "text" / "notes" / "all.jsonl").read_bytes()
    state = pipeline.train_iterator(prepared, config, batch_size=4, seed=0).get_state()

    def opens(reason):
        """Number of documents of the notes; checks the reason given for indexing again."""
        said = []
        again = pipeline.prepare(config, VOCAB, tokenizer=prepared.tokenizer, progress=said.append)
        assert said == ([f"indexing {tmp_path / 'text'} again, because {reason}"] if reason else [])
        if again.versions == prepared.versions:
            pipeline.train_iterator(again, config, batch_size=4, seed=0).set_state(state)
        else:
            with pytest.raises(ConfigError, match="are not those of the checkpoint"):
                pipeline.train_iterator(again, config, batch_size=4, seed=0).set_state(state)
        return len(again.train["notes"]) + len(again.heldout["notes"])

    count = opens("")
    file.write_bytes(before + b'{"text": "more"}\n')
    assert opens(f"{file} was changed") == count + 1
    assert opens("") == count + 1
    file.write_bytes(before.replace(b"document 600", b"document 999"))  # of the same length
    os.utime(file, (0, 0))
    assert opens(f"{file} was changed") == count
    # While a run reads it: edited, which a start sees by the time, or gone.
    for changed, says in ((before.replace(b"document", b"DOCUMENT"), "touch the file"), (None, "No such file")):
        file.unlink()
        if changed:
            file.write_bytes(changed)
        with pytest.raises(ConfigError, match=rf"all\.jsonl, position \d+: no longer matches the index .*{says}"):
            prepared.train["notes"][0]
    file.write_bytes(before)
    os.utime(file, (0, 0))  # other times, the same content
    assert opens("") == count
    (tmp_path / "text" / "notes" / "new.md").write_text("# new\n")
    (tmp_path / "text" / "notes" / "new.tex").write_text("new")
    assert opens(f"{tmp_path / 'text' / 'notes' / 'new.md'} was added") == count + 1
    assert len(list((tmp_path / "cache" / "folders").iterdir())) == 4
    tex = dataclasses.replace(config, text_suffixes=(".tex",))
    with_tex = pipeline.prepare(tex, VOCAB, tokenizer=prepared.tokenizer, progress=lambda _: None)
    assert len(with_tex.train["notes"]) + len(with_tex.heldout["notes"]) == count + 2


def _table(path, texts, names=("text",)):
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pyarrow.Table.from_arrays([pyarrow.array(texts)] * len(names), names=list(names))
    pyarrow.parquet.write_table(table, path)


def test_incomplete_text_is_refused(tmp_path, data):
    """Missing shards by name, links to folders, two columns of one name, a changed copy in the index."""
    config = dataclasses.replace(data, dataset=str(tmp_path / "hub"), directory=str(tmp_path / "cache"))
    texts = [random_text(i) for i in range(40)]
    for number in (0, 1, 3):
        _table(tmp_path / "hub" / "data" / f"train-{number:05d}-of-00004.parquet", texts)
    with pytest.raises(ConfigError, match=r"train-00002-of-00004\.parquet: is missing, one of the 4 shards"):
        pipeline.prepare(config, VOCAB, progress=lambda _: None)
    _table(tmp_path / "hub" / "data" / "train-00002-of-00004.parquet", texts, ("text", "text"))
    with pytest.raises(ConfigError, match="has 2 columns named 'text'; keep one"):
        pipeline.prepare(config, VOCAB, progress=lambda _: None)
    _table(tmp_path / "hub" / "data" / "train-00002-of-00004.parquet", texts)
    _table(tmp_path / "hub" / "data" / "dev-00000-of-00001.parquet", [random_text(i) for i in range(90, 95)])
    prepared = pipeline.prepare(config, VOCAB, progress=lambda _: None)
    assert (len(prepared.train["hub"]), len(prepared.heldout["hub"])) == (160, 5)  # dev is held out
    (tmp_path / "hub" / "more").symlink_to(tmp_path / "cache")
    with pytest.raises(ConfigError, match="more: is a link to a folder, which is not followed"):
        pipeline.prepare(config, VOCAB, progress=lambda _: None)
    (tmp_path / "hub" / "more").unlink()
    (copy,) = (tmp_path / "cache").rglob("table-00001.arrow")
    copy.write_bytes(copy.read_bytes().replace(b"document", b"DOCUMENT"))
    with pytest.raises(ConfigError, match=r"table-00001\.arrow: was changed; delete"):
        pipeline.prepare(config, VOCAB, progress=lambda _: None)


def test_shards_named_with_a_fingerprint_have_splits():
    """The hub's older names, as of tatsu-lab/alpaca: data/train-00000-of-00001-a09b74b3ef9c3b56.parquet."""
    names = [f"data/train-{i:05d}-of-00002-a09b74b3ef9c3b5{i}.parquet" for i in range(2)]
    folder_files._refuse_missing_shards(epath.Path("hub"), names)
    with pytest.raises(ConfigError, match=r"train-00000-of-00002\.parquet: is missing, one of the 2 shards"):
        folder_files._refuse_missing_shards(epath.Path("hub"), names[1:])
    found = folder_files._domain_and_split(PurePosixPath(names[0]), "hub", False)
    assert found == ("hub", "train")


def test_shards_are_looked_up_once(monkeypatch):
    """100 + 100 look-ups, not 100 for each of 200 shards; each folder has its own shards."""
    made = []

    class CountedPath(PurePosixPath):
        def with_name(self, name):
            made.append(name)
            return super().with_name(name)

    monkeypatch.setattr(folder_files, "PurePosixPath", CountedPath)
    names = [f"{folder}/train-{i:05d}-of-00100.parquet" for folder in "ab" for i in range(100)]
    folder_files._refuse_missing_shards(epath.Path("text"), names)
    assert len(made) == 200
    with pytest.raises(ConfigError, match=r"b/train-00099-of-00100\.parquet: is missing"):
        folder_files._refuse_missing_shards(epath.Path("text"), names[:-1])


def test_a_saved_dataset_that_differs_from_its_state_is_refused(tmp_path):
    folder = tmp_path / "saved" / "train"
    folder.mkdir(parents=True)
    (tmp_path / "saved" / "dataset_dict.json").write_text('{"splits": ["train"]}')
    for name in ("data-00000-of-00001.arrow", "stray.arrow"):
        (folder / name).touch()
    state = {"_data_files": [{"filename": "data-00000-of-00001.arrow"}]}
    (folder / "state.json").write_text(json.dumps(state))
    with pytest.raises(ConfigError, match=r"stray\.arrow: is not a part of the dataset, by state\.json"):
        find_sources(epath.Path(tmp_path / "saved"))
    (folder / "stray.arrow").unlink()
    assert len(find_sources(epath.Path(tmp_path / "saved"))) == 1
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": "gone.arrow"}]}))
    with pytest.raises(ConfigError, match=r"(data-00000-of-00001|gone)\.arrow: is "):
        find_sources(epath.Path(tmp_path / "saved"))


def test_an_edit_of_the_same_size_within_a_second_is_detected(tmp_path, data):
    folder = tmp_path / "text"
    folder.mkdir()
    for i in range(40):
        (folder / f"{i}.txt").write_text(random_text(i))
    config = dataclasses.replace(data, dataset=str(folder), directory=str(tmp_path / "cache"))
    before = pipeline.prepare(config, VOCAB, progress=lambda _: None).versions
    about = os.stat(folder / "7.txt")
    (folder / "7.txt").write_text((folder / "7.txt").read_text().replace("document", "DOCUMENT"))
    os.utime(folder / "7.txt", ns=(about.st_atime_ns, about.st_mtime_ns + 1000))  # a microsecond later
    assert pipeline.prepare(config, VOCAB, progress=lambda _: None).versions != before


@pytest.mark.parametrize("workdir", ["text", "text/run", "other/../text/run", "link/run"])
def test_a_workdir_inside_a_folder_of_text_is_refused(tmp_path, workdir):
    (tmp_path / "link").symlink_to("text")
    dataset = f"embedded,{tmp_path / 'text'}"
    with pytest.raises(ConfigError, match=r"^--workdir=.*: is inside data\.dataset='/.*/text'"):
        folders.refuse_inside(dataset, str(tmp_path / workdir))
    for allowed in (tmp_path, tmp_path / "text2"):
        folders.refuse_inside(dataset, str(allowed))
    folders.refuse_inside(os.fspath(Path.cwd()), "gs://bucket/text")
