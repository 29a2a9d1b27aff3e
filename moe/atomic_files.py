"""Small files: there whole or not at all, and JSON that shows when it was altered.

A flipped bit in a number is still a number: so text is made of the JSON and its CRC-32, and JSON of that text.
"""

from __future__ import annotations

import json
import zlib
from pathlib import Path
from typing import Any

from etils import epath


def write_whole(path: epath.Path | Path, content: bytes) -> None:
    """Makes or replaces a file: whoever reads it, and whenever this process is killed, it is the old one or the new.

    What a killed process leaves beside it, PATH.tmp, the next one takes. One process at a time writes a path.
    """
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.write_bytes(content)
    temporary.replace(path)


def seal(content: Any) -> str:
    """JSON of {content, crc32}."""
    return json.dumps({"content": content, "crc32": _crc32(content)})


def unseal(text: str) -> Any:
    """What :func:`seal` was given, as JSON gives it back.

    Raises:
        ValueError: the text is not what seal made.
    """
    tree = json.loads(text)
    if not isinstance(tree, dict) or tree.keys() != {"content", "crc32"} or tree["crc32"] != _crc32(tree["content"]):
        raise ValueError("its checksum does not match")
    return tree["content"]


def _crc32(content: Any) -> int:
    return zlib.crc32(json.dumps(content).encode())
