"""Origin of a plan: versions of JAX and the compilers, and the source of this package."""

from __future__ import annotations

import hashlib
import importlib.metadata
from pathlib import Path

_ROOT = Path(__file__).parents[1]


def versions() -> list[str]:
    """Versions of JAX and of the compilers."""
    found = []
    for name in ("jax", "jaxlib", "libtpu", "jax-cuda13-plugin"):
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            found.append(f"{name} none")
    return found


def source_hash() -> str:
    """Hash of the package's source and compile targets."""
    digest = hashlib.sha256()
    for path in sorted([*_ROOT.rglob("*.py"), *_ROOT.rglob("*.textproto")]):
        digest.update(f"{path.relative_to(_ROOT)}\0".encode() + path.read_bytes() + b"\0")
    return digest.hexdigest()
