"""Reading of small files, and of Python files, that a user names."""

from __future__ import annotations

import importlib.util
import os
import sys
import types
from pathlib import Path

from etils import epath

from moe.fields import ConfigError, require
from moe.waiting import first_answer

_LARGEST = 1 << 28  # bytes

#: Schemes of remote paths that etils.epath reads.
SCHEMES = ("gs", "s3", "az", "hf")


def check_path(field: str, path: str) -> None:
    """Raise a ConfigError for a URL whose scheme etils.epath does not read, or that lacks a bucket or a slash."""
    scheme, found, rest = path.partition(":/")
    remote = found and (scheme in SCHEMES or rest.startswith("/"))
    good = scheme in SCHEMES and rest.startswith("/") and rest.strip("/")
    allowed = f"must be a path, or one of {', '.join(SCHEMES)} before :// and a bucket"
    require(not remote or bool(good), field, path, allowed)


def read_small_file(path: str | os.PathLike[str], name: str = "", largest: int = _LARGEST) -> bytes:
    """Content of a config, a tokenizer or the like.

    Args:
        path: local or in a bucket.
        name: of the file in messages; empty: its path.
        largest: size in bytes.

    Raises:
        ConfigError: there is no such file, it is a folder, FIFO or device, it has more bytes than that, or its
            bucket cannot be reached.
    """
    name = name or os.fspath(path)
    if "://" not in os.fspath(path):
        return _read(epath.Path(path), name, largest)
    try:
        return _read(epath.Path(path), name, largest)
    except ConfigError:
        raise
    except Exception as error:  # clients of buckets pass on errors of several libraries
        raise ConfigError(f"{name}: cannot be reached ({type(error).__name__}: {error})") from error


def _read(file: epath.Path, name: str, largest: int) -> bytes:
    if not (first_answer(name, file.exists) if "://" in os.fspath(file) else file.exists()):
        raise ConfigError(f"{name}: no such file")
    # epath takes whatever is no folder for a file; reading a FIFO waits for ever, /dev/zero fills the memory.
    if not (file.is_file() if "://" in os.fspath(file) else os.path.isfile(file)):
        raise ConfigError(f"{name}: is not a regular file")
    if file.stat().length > largest:
        raise ConfigError(f"{name}: must be at most {largest} bytes")
    return file.read_bytes()


def load_python_file(path: str | os.PathLike[str]) -> types.ModuleType:
    """Run a Python file, such as a config or a suite, from whatever folder; it may import its neighbours."""
    extend_import_path(path)
    spec = importlib.util.spec_from_file_location(f"file_{Path(path).stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def extend_import_path(path: str | os.PathLike[str]) -> None:
    """Find the modules that a Python file may import: of the package that holds it, then those beside it."""
    folder = Path(path).resolve().parent
    package = folder
    while (package / "__init__.py").exists():
        package = package.parent
    for place in (package, folder):
        if str(place) not in sys.path:
            sys.path.append(str(place))
