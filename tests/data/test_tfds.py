"""Prepared TFDS datasets: published layouts, and broken shards."""

# ruff: noqa: F811
import dataclasses
import json
import os
import resource
import shutil
import types

import pytest
from etils import epath

from moe.config import ConfigError
from moe.data import pipeline, tfds_datasets
from tests.text_fixtures import VOCAB, data, prepared  # noqa: F401
from tests.tiny_text import published, random_text


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
    """Directories in TFDS's layout with a few invented texts; the splits are the published ones."""
    length = 20_000 if name == "tiny_shakespeare" else 60  # in words: tiny_shakespeare has one document per split
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


def test_only_scanned_documents_are_listed(tmp_path, data, prepared, monkeypatch):
    """A split of 30 documents, of which 10 are scanned: all but the held-out ones of these 10 are for training."""
    monkeypatch.setattr(tfds_datasets, "HELDOUT_SCAN", 10)
    monkeypatch.setattr(tfds_datasets, "CUT_BELOW", 1)
    published("c4/en", "3.1.0", {"train": 30}, 60, tmp_path)
    train, heldout, _ = tfds_datasets.open_tfds("c4/en", epath.Path(tmp_path))
    everything = list(tfds_datasets.TfdsDocuments(tfds_datasets._find_builder("c4/en", epath.Path(tmp_path)), "train"))
    held = set(heldout)
    assert len(everything) == 30
    assert 0 < len(heldout) < 10
    assert held < set(everything[:10])
    assert list(train) == [text for text in everything if text not in held]
    with pytest.raises(IndexError):
        train[30 - len(heldout)]
    assert len(train._numbers) + len(heldout) == 10  # 8 bytes for each of billions of documents would fill the memory


def test_a_split_of_many_shards_opens_more_files_than_a_process_may_at_first(tmp_path):
    paths = [tmp_path / f"a-{i:05d}-of-00040.array_record" for i in range(40)]
    for path in paths:
        path.touch()

    class Source:
        """Keeps a file open for each shard that was read, as array_record's does."""

        def __init__(self):
            self.files = {}

        def __len__(self):
            return len(paths)

        def __getitem__(self, i):
            self.files[i] = paths[i].open()
            return {"text": "x"}

    source, split = Source(), types.SimpleNamespace(filepaths=paths, shard_lengths=[1] * 40)
    info = types.SimpleNamespace(splits={"train": split})
    builder = types.SimpleNamespace(info=info, data_dir=tmp_path, as_data_source=lambda split: source)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 20, limits[1]))
    try:
        documents = tfds_datasets.TfdsDocuments(builder, "train")
        assert len(source.files) == 40
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        for file in source.files.values():
            file.close()
    refused = documents._broken(OSError(24, "Too many open files"), 7)
    assert "a-00000-of-00040.array_record: one of 40 shards, of which each stays open; allow more open files" in refused


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


@pytest.mark.parametrize("key", ["pythonClassName", "python_class_name", "type"])
def test_a_class_in_features_json_is_not_imported(directory, tmp_path, data, monkeypatch, key):
    shutil.copytree(directory, tmp_path / "copy")
    (tmp_path / "planted_features.py").write_text("import pathlib\npathlib.Path(__file__).with_name('ran').touch()\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    path = _shard(tmp_path / "copy").with_name("features.json")
    content = json.loads(path.read_text())
    content["featuresDict"]["features"]["number"] = {key: "planted_features.Number", "content": {}}
    path.write_text(json.dumps(content))
    with pytest.raises(ConfigError, match=r"features\.json names the class 'planted_features\.Number', code that"):
        pipeline.prepare(dataclasses.replace(data, directory=str(tmp_path / "copy")), VOCAB, progress=lambda _: None)
    assert not (tmp_path / "ran").exists()
