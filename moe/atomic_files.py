"""Atomic writes of small files, and JSON that carries its own checksum."""

from __future__ import annotations

import json
import os
import zlib
from pathlib import Path
from typing import Any

from etils import epath


def in_bucket(path: epath.Path | Path) -> bool:
    """True for a path like gs://bucket/name: without appends, renames of folders or locks."""
    return "://" in os.fspath(path)


def write_atomic(path: epath.Path | Path, content: bytes) -> None:
    """Create or replace a file in one step: a reader, or a crash, sees the old content or the new, never a part.

    The content goes to ``PATH.tmp`` first, which is then renamed; only one process may write a path at a time. In a
    bucket an object appears whole, or not at all.
    """
    if in_bucket(path):
        path.write_bytes(content)
        return
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.write_bytes(content)
    temporary.replace(path)


def to_checked_json(content: Any) -> str:
    """JSON of {content, crc32}: a flipped bit in a number still parses as a number, and the checksum catches it."""
    return json.dumps({"content": content, "crc32": _crc32(content)})


def from_checked_json(text: str) -> Any:
    """Return the content of a text made by :func:`to_checked_json`.

    Raises:
        ValueError: the text is not JSON, or its checksum does not match.
    """
    tree = json.loads(text)
    if not isinstance(tree, dict) or tree.keys() != {"content", "crc32"} or tree["crc32"] != _crc32(tree["content"]):
        raise ValueError("its checksum does not match")
    return tree["content"]


def _crc32(content: Any) -> int:
    return zlib.crc32(json.dumps(content).encode())
