"""Writing of npz files, and reading of those that a crash, an edit or another program may have changed."""

from __future__ import annotations

import io
import os
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from etils import epath

from moe.system.atomic_files import write_atomic
from moe.system.fields import ConfigError


def write_arrays(path: epath.Path | Path, arrays: Mapping[str, Any]) -> None:
    """Write arrays as a compressed npz file, as :func:`moe.system.atomic_files.write_atomic` does."""
    content = io.BytesIO()
    np.savez_compressed(content, **arrays)
    write_atomic(path, content.getvalue())


#: Limit of the unpacked size: this many bytes, or this multiple of the file's size if that is more.
_UNPACKED, _RATIO = 1 << 28, 100


def read_arrays(path: str | os.PathLike[str], name: str = "") -> dict[str, np.ndarray]:
    """The arrays of an npz file, which are numbers or booleans.

    Args:
        path: local.
        name: of the file in messages; empty: its path.

    Raises:
        ConfigError: no such file, not an npz file, arrays of another type, or arrays that would fill the memory.
    """
    name = name or os.fspath(path)
    if not os.path.isfile(path):  # reading a FIFO waits for ever
        raise ConfigError(f"{name}: {'is not a regular file' if os.path.lexists(path) else 'no such file'}")
    try:
        with zipfile.ZipFile(path) as packed:
            members = [member.filename for member in packed.infolist()]
            size = sum(member.file_size for member in packed.infolist())
        if size > max(_UNPACKED, _RATIO * os.path.getsize(path)):
            raise ValueError(f"it would unpack to {size:,} bytes")
        if len(set(members)) < len(members):
            raise ValueError("two arrays have one name")
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as archive:
            arrays = {key: archive[key] for key in archive.files}
    except (
        OSError,
        ValueError,
        LookupError,
        TypeError,
        EOFError,
        RuntimeError,
        zipfile.BadZipFile,
        zlib.error,
    ) as error:
        raise ConfigError(f"{name}: not a readable npz file of arrays ({_sentence(error)})") from error
    except MemoryError as error:
        raise ConfigError(f"{name}: has an array that does not fit into memory") from error
    for key, array in arrays.items():
        if not isinstance(array, np.ndarray) or array.dtype.kind not in "biuf":
            kind = getattr(array, "dtype", type(array).__name__)
            raise ConfigError(f"{name}: {key} is of type {kind}, must be real numbers or booleans")
    return arrays


def _sentence(error: Exception) -> str:
    return f"{type(error).__name__}: {error}" if isinstance(error, LookupError) else str(error)
