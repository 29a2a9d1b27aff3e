"""Fixtures of the data tests: the config of a small TFDS dataset, its prepared text, and a folder of text."""

import dataclasses
import json

import numpy as np
import pytest

from moe.config import DataConfig
from moe.data import pipeline
from tests.tiny_text import random_text

VOCAB = 400


@pytest.fixture
def data(directory):
    return DataConfig(
        dataset="tiny_text/split", directory=str(directory), sequence_length=32, shuffle_window=4, heldout_rows=6
    )


@pytest.fixture
def prepared(data):
    return pipeline.prepare(data, VOCAB, progress=lambda _: None)


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
    (root / "notes" / "readme.bin").write_text("no")
    return long, [line["text"] for line in lines]


@pytest.fixture
def folder(tmp_path, data):
    long, lines = _folder(tmp_path / "text")
    config = dataclasses.replace(data, dataset=str(tmp_path / "text"), directory=str(tmp_path / "cache"))
    return config, long, lines


def assert_equal(left, right):
    assert len(left) == len(right)
    for a, b in zip(left, right, strict=True):
        assert a.keys() == b.keys()
        for key in a:
            np.testing.assert_array_equal(a[key], b[key], err_msg=key)
