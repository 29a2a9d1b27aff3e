"""Checksums of the small files of a workdir, in its config.json: a flipped bit in a digit is still a number."""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Mapping
from typing import Any

from etils import epath

from moe.system.fields import ConfigError
from moe.system.foreign_files import Json, loads, parse_object
from moe.system.reading import read_small_file

CONFIG = "config.json"
#: Field of config.json beside the sections: ``files``, name → CRC-32 of its bytes, and ``crc32``, that of sections and
#: files. Earlier versions wrote none.
SUMS = "checksums"
_REMEDY = f'restore it, or, if it was edited on purpose, delete "{SUMS}" from {CONFIG}'


def sealed(sections: Mapping[str, Any], files: Mapping[str, int]) -> str:
    """Text of config.json.

    Args:
        sections: of the config, of JSON's types.
        files: sums of further files, :func:`sums` or :func:`read_sums`.
    """
    return json.dumps({**sections, SUMS: {"files": files, "crc32": _crc32([sections, files])}}, indent=2)


def sums(files: Mapping[str, bytes]) -> dict[str, int]:
    """Name → CRC-32 of contents."""
    return {name: zlib.crc32(content) for name, content in files.items()}


def unsealed(content: bytes | str) -> Any:
    """The sections in the content of config.json, as they are where it has no checksums.

    Raises:
        ValueError: it is not JSON, or a checksum does not match. Or RecursionError.
    """
    tree = loads(content.decode() if isinstance(content, bytes) else content)
    if isinstance(tree, dict) and SUMS in tree:
        saved = tree.pop(SUMS)
        if not isinstance(saved, dict) or saved.get("crc32") != _crc32([tree, saved.get("files")]):
            raise ValueError(f"its checksum does not match; {_REMEDY}")
    return tree


def read_sums(folder: epath.Path) -> dict[str, int]:
    """The checksums of files that the config.json of a folder holds; empty where it is no such file."""
    try:
        saved = loads(read_small_file(folder / CONFIG).decode())[SUMS]["files"]
    except (ConfigError, ValueError, LookupError, TypeError, RecursionError):
        return {}
    return saved if isinstance(saved, dict) else {}


def is_there(path: str | os.PathLike[str]) -> bool:
    """Whether there is a file beside a config.json. Raises ConfigError where there is none but the config has its
    checksum, so that nothing else is taken in its place."""
    file = epath.Path(path)
    if file.exists():
        return True
    if file.name in read_sums(file.parent):
        raise ConfigError(
            f"{os.fspath(path)}: is missing, though {CONFIG} has its checksum; restore it, or, if it was deleted on "
            f'purpose, delete "{SUMS}" from {CONFIG}'
        )
    return False


def read_checked(path: str | os.PathLike[str], name: str = "") -> bytes:
    """Read a file beside a config.json as :func:`moe.system.reading.read_small_file` does, and compare its checksum
    with the one that the config holds, if it does. Raises ConfigError."""
    file, content = epath.Path(path), read_small_file(path, name)
    saved = read_sums(file.parent).get(file.name)
    if saved is not None and saved != zlib.crc32(content):
        raise ConfigError(f"{name or os.fspath(path)}: differs from what was written; {_REMEDY}")
    return content


def read_checked_object(path: str | os.PathLike[str]) -> Json:
    """:func:`read_checked` of a JSON object with any fields."""
    return parse_object(read_checked(path), os.fspath(path))


def _crc32(tree: Any) -> int:
    return zlib.crc32(json.dumps(tree, sort_keys=True).encode())
