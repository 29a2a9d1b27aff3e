"""data.directory: its lock, its disk, what is cached there."""

# ruff: noqa: F811
import dataclasses
import errno
import fcntl
import os
import subprocess
from pathlib import Path

import fsspec
import pytest

from moe.config import ConfigError
from moe.data import pipeline
from tests.helpers import mounted
from tests.text_fixtures import VOCAB, data, folder  # noqa: F401


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


def test_a_file_system_without_locks_is_usable(folder, tmp_path, monkeypatch):
    config, _, _ = folder

    def flock(*_):
        raise OSError(errors[0], os.strerror(errors[0]))

    monkeypatch.setattr(fcntl, "flock", flock)
    errors = [errno.EIO]
    with pytest.raises(ConfigError, match=r"data\.directory='.*cache': cannot be locked \(Input/output error\)"):
        pipeline.prepare(config, VOCAB, progress=lambda _: None)
    assert not (tmp_path / "cache").exists()
    errors = [errno.ENOLCK]
    pipeline.prepare(config, VOCAB, progress=lambda _: None)


def test_only_a_process_that_prepares_keeps_the_others_out(folder, monkeypatch):
    """All hosts of a pod open prepared data at the same time."""
    config, _, _ = folder
    operations, flock = [], fcntl.flock
    monkeypatch.setattr(fcntl, "flock", lambda file, operation: operations.append(operation) or flock(file, operation))
    first = pipeline.prepare(config, VOCAB, progress=lambda _: None)
    assert operations == [fcntl.LOCK_EX]
    second = pipeline.prepare(config, VOCAB, progress=lambda _: None)
    assert operations[1:] == [fcntl.LOCK_SH]
    assert second.versions == first.versions
    assert second.tokenizer.model_bytes == first.tokenizer.model_bytes
    Path(config.dataset, "books", "0.txt").write_text("another text\n" * 9)
    said = []
    pipeline.prepare(config, VOCAB, progress=said.append)
    assert operations[2:] == [fcntl.LOCK_SH, fcntl.LOCK_EX]
    assert "indexing" in said[0]


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


def test_a_bucket_whose_library_is_missing_is_refused(data, monkeypatch):
    def missing(*_, **__):
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr(fsspec, "filesystem", missing)
    for field in ("dataset", "directory"):
        with pytest.raises(ConfigError, match=f"data.{field}='s3://bucket/x': cannot be reached .*s3fs"):
            pipeline.prepare(dataclasses.replace(data, **{field: "s3://bucket/x"}), VOCAB)
