"""The cache directory data.directory: its lock, and its disk errors as config errors."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from etils import epath

from moe.config import ConfigError


@contextlib.contextmanager
def disk_errors(directory: epath.Path, raised: type[Exception] = OSError) -> Iterator[None]:
    """Converts an exception of type `raised`, such as a full disk's, to a ConfigError that names data.directory."""
    try:
        yield
    except ConfigError:
        raise
    except raised as error:
        strerror, filename = getattr(error, "strerror", None), getattr(error, "filename", None)
        reason = strerror or " ".join(str(error).split())[:300] or type(error).__name__
        raise ConfigError(
            f"data.directory={os.fspath(directory)!r}: cannot be written ({reason}"
            f"{f': {filename}' if filename else ''}); free or repair the disk and run the same command again"
        ) from error


@contextlib.contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Holds the directory's lock, so that one of several processes prepares the data and the others reuse it.

    Creates the directory if it is missing, and removes it again if an error leaves it empty.

    Raises:
      ConfigError: the directory cannot be created or written.
    """
    made = [path for path in (directory, *directory.parents) if not path.exists()]
    try:
        directory.mkdir(parents=True, exist_ok=True)
        file = open(directory / ".lock", "w")  # noqa: SIM115
    except OSError as error:
        raise ConfigError(f"data.directory={os.fspath(directory)!r}: cannot be written ({error.strerror})") from error
    with file:
        fcntl.flock(file, fcntl.LOCK_EX)  # the kernel releases it when the file closes, also when the process is killed
        try:
            yield
        except ConfigError:
            if made and os.listdir(directory) == [".lock"]:
                (directory / ".lock").unlink()
                for path in made:
                    path.rmdir()
            raise
