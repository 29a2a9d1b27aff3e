"""The cache directory data.directory: its lock, and its disk errors as config errors."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path

from etils import epath

from moe.config import ConfigError
from moe.system.atomic_files import lock

#: Name of the lock.
LOCK = ".lock"

#: What a user can do who may not write what another one keeps there.
_SHARE = "let its owner share it (chmod -R g+rwX), or use another data.directory"


@contextlib.contextmanager
def disk_errors(directory: epath.Path, raised: type[Exception] = OSError) -> Iterator[None]:
    """Convert an exception of type `raised`, such as a full disk's, to a ConfigError that names data.directory."""
    try:
        yield
    except ConfigError:
        raise
    except raised as error:
        strerror, filename = getattr(error, "strerror", None), getattr(error, "filename", None)
        reason = strerror or " ".join(str(error).split())[:300] or type(error).__name__
        advice = (
            _SHARE if isinstance(error, PermissionError) else "free or repair the disk and run the same command again"
        )
        raise ConfigError(
            f"data.directory={os.fspath(directory)!r}: cannot be written ({reason}"
            f"{f': {filename}' if filename else ''}); {advice}"
        ) from error


def remove_unfinished(folder: Path, pattern: str) -> None:
    """Remove temporary folders that killed processes left, whose names fit a pattern; call it under the lock."""
    for path in folder.glob(pattern):
        shutil.rmtree(path, ignore_errors=True)


@contextlib.contextmanager
def locked_directory(directory: Path, *, shared: bool = False) -> Iterator[None]:
    """Hold the directory's lock, so that one of several processes prepares the data and the others reuse it.

    A shared lock keeps out only the process that prepares.

    Creates the directory if it is missing, and removes it again if an error leaves it empty. A read-only directory is
    not locked, because nothing can be prepared there; nor is one on a file system without locks, where one process has
    to prepare the data before several start.

    Raises:
      ConfigError: the directory cannot be created or locked, or its .lock is a link, not a regular file, or another
        user's who keeps it private.
    """
    made: list[Path] = []
    try:
        made = [path for path in (directory, *directory.parents) if not path.exists()]
        directory.mkdir(parents=True, exist_ok=True)
        descriptor = _open_lock(directory / LOCK)
    except (OSError, ValueError) as error:  # ValueError: a zero byte or half a character in the path
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"data.directory={os.fspath(directory)!r}: cannot be written ({reason})") from error
    if descriptor is None:
        yield
        return
    try:
        _lock(descriptor, directory, fcntl.LOCK_SH if shared else fcntl.LOCK_EX)
        yield
    except ConfigError:
        if made and os.listdir(directory) == [LOCK]:
            (directory / LOCK).unlink()
            for path in made:
                path.rmdir()
        raise
    finally:
        os.close(descriptor)


def _lock(descriptor: int, directory: Path, operation: int) -> None:
    """Wait for the lock of an open file, if its file system has locks."""
    try:
        lock(descriptor, operation)
    except OSError as error:
        # NFS gives no exclusive lock of a file that another user may only read.
        advice = _SHARE if error.errno == errno.EBADF else "repair the disk, or use another directory"
        raise ConfigError(
            f"data.directory={os.fspath(directory)!r}: cannot be locked ({error.strerror}); {advice}"
        ) from error


def _open_lock(path: Path) -> int | None:
    """Open or create the lock file without following links or truncating; None in a read-only directory."""
    flags = os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        try:
            descriptor = os.open(path, flags | os.O_RDWR | os.O_CREAT, 0o666)
        except PermissionError:
            if not os.access(path.parent, os.W_OK):
                return None
            descriptor = os.open(path, flags | os.O_RDONLY)  # another user's, with whom the directory is shared
    except OSError as error:
        if error.errno == errno.EROFS and path.parent.is_dir():
            return None
        if error.errno == errno.ELOOP:
            raise OSError(errno.ELOOP, ".lock is a symbolic link; delete it") from error
        if error.errno == errno.EACCES:
            raise OSError(errno.EACCES, f"{error.strerror}: {path}; {_SHARE}") from error
        raise
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, ".lock is not a regular file; delete it")
    return descriptor
