"""Files that a user or another program names, local or in a bucket, opened for reading."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import IO

from etils import epath

from moe.system.atomic_files import in_bucket
from moe.system.fields import ConfigError
from moe.system.waiting import first_answer

_LARGEST = 1 << 28  # bytes


def read_small_file(path: str | os.PathLike[str], name: str = "", largest: int = _LARGEST) -> bytes:
    """Content of a config, a tokenizer or the like.

    Args:
        path: local or in a bucket.
        name: of the file in messages; empty: its path.
        largest: limit of the size in bytes.

    Raises:
        ConfigError: there is no such file, it is a folder, FIFO or device, it exceeds the limit, or its
            bucket cannot be reached.
    """
    with open_regular(path, name) as file:
        content = file.read(largest + 1)
    if len(content) > largest:
        raise ConfigError(f"{name or os.fspath(path)}: must be at most {largest} bytes")
    return content


@contextlib.contextmanager
def open_regular(path: str | os.PathLike[str], name: str = "") -> Iterator[IO[bytes]]:
    """Open a file of any size to read its bytes; arguments and errors are those of :func:`read_small_file`."""
    name, file = name or os.fspath(path), epath.Path(path)
    try:
        if not (first_answer(name, file.exists) if in_bucket(path) else file.exists()):
            raise ConfigError(f"{name}: no such file")
        # epath treats everything but folders as files; reading a FIFO waits for ever, and /dev/zero fills the memory.
        if not (file.is_file() if in_bucket(path) else os.path.isfile(file)):
            raise ConfigError(f"{name}: is not a regular file")
        with file.open("rb") as stream:
            yield stream
    except ConfigError:
        raise
    except Exception as error:
        if not in_bucket(path):
            raise
        # Clients of buckets pass on errors of several libraries.
        raise ConfigError(f"{name}: cannot be reached ({type(error).__name__}: {error})") from error
