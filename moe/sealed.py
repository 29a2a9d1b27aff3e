"""JSON that shows when it was altered: a flipped bit in a number is still a number.

In: anything that JSON can hold. Out: text with a CRC-32 of it, and back.
"""

from __future__ import annotations

import json
import zlib
from typing import Any


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
