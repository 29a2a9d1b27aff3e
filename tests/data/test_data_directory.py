"""data.directory: its lock, its disk, what is cached there."""

# ruff: noqa: F811
import dataclasses
import errno
import fcntl
import os
import subprocess
from pathlib import Path

import fsspec
import pandas as pd
import pytest

from moe.config import ConfigError, DataConfig
from moe.data import directory, folders, pipeline
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

    def lock(file, operation):
        number = file if isinstance(file, int) else file.fileno()
        if Path(f"/proc/self/fd/{number}").readlink().name == ".lock":  # not that of a file being written
            operations.append(operation)
        return flock(file, operation)

    monkeypatch.setattr(fcntl, "flock", lock)
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
    (path,) = (tmp_path / "cache" / "tokenizers").glob("*.model")
    whole = path.read_bytes()
    for damaged in (whole[:1000], whole.replace(b"<s>", b"<t>", 1)):  # the second is another vocabulary
        path.write_bytes(damaged)
        with pytest.raises(ConfigError, match=rf"{path.name}: a damaged cached tokenizer; delete it"):
            pipeline.prepare(config, VOCAB, progress=lambda _: None)
    path.with_name(f"{path.name}.sha256").unlink()  # earlier versions wrote none
    path.write_bytes(whole)
    pipeline.prepare(config, VOCAB, progress=lambda _: None)


def test_users_who_share_the_directory_may_read_each_other_s_index(folder, tmp_path, monkeypatch):
    """An index has the permissions of the umask; one that another user keeps private is not called damaged."""
    config, _, _ = folder
    pipeline.prepare(config, VOCAB, progress=lambda _: None)
    (index,) = (tmp_path / "cache" / "folders").iterdir()
    plain = tmp_path / "plain"
    plain.mkdir()
    assert index.stat().st_mode == plain.stat().st_mode
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: "folders" not in os.fspath(path) and access(path, mode))
    with pytest.raises(ConfigError, match=rf"{index.name}: cannot be read by this user"):
        pipeline.prepare(config, VOCAB, progress=lambda _: None)


def test_a_lock_that_another_user_made_is_held_too(folder, tmp_path, monkeypatch):
    """It may be read and not written; without it, two users who share the directory prepared the data at once."""
    config, _, _ = folder
    path = tmp_path / "cache" / ".lock"
    path.parent.mkdir()
    path.touch()
    open_file, private = os.open, []

    def refuse(name, flags, *rest, **options):
        if os.fspath(name) == str(path) and (flags & os.O_RDWR or private):
            raise PermissionError(errno.EACCES, "Permission denied")
        return open_file(name, flags, *rest, **options)

    monkeypatch.setattr(os, "open", refuse)
    with directory.locked_directory(path.parent), path.open() as other, pytest.raises(BlockingIOError):
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
    private.append(True)
    with pytest.raises(ConfigError, match=r"data\.directory=.*\.lock; let its owner share it"):
        pipeline.prepare(config, VOCAB, progress=lambda _: None)
    monkeypatch.setattr(os, "access", lambda *_: False)  # nothing can be prepared there
    with directory.locked_directory(path.parent):
        pass
    with pytest.raises(ConfigError, match=r"cannot be written .*; let its owner share it"), directory.disk_errors(path):
        raise PermissionError(errno.EACCES, "Permission denied", "folders")


def test_a_directory_that_fills_while_a_table_is_copied_is_named(tmp_path, monkeypatch):
    """The source of a Parquet file is not blamed."""
    (tmp_path / "text").mkdir()
    table = pd.DataFrame({"text": [f"document {number} " * 9 for number in range(9)]})
    table.to_parquet(tmp_path / "text" / "a.parquet")

    def fill(source, target):
        del source
        raise OSError(errno.ENOSPC, "No space left on device", os.fspath(target))

    monkeypatch.setattr(folders.columns, "copy_columns", fill)
    data = DataConfig(dataset=str(tmp_path / "text"), directory=str(tmp_path / "cache"))
    with pytest.raises(
        ConfigError, match=r"data\.directory=.*cannot be written \(No space left on device: .*table-00000"
    ):
        pipeline.prepare(data, VOCAB, progress=lambda _: None)


def test_a_bucket_whose_library_is_missing_is_refused(data, monkeypatch):
    def missing(*_, **__):
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr(fsspec, "filesystem", missing)
    for field in ("dataset", "directory"):
        with pytest.raises(ConfigError, match=f"data.{field}='s3://bucket/x': cannot be reached .*s3fs"):
            pipeline.prepare(dataclasses.replace(data, **{field: "s3://bucket/x"}), VOCAB)
