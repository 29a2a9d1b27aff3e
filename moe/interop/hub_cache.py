"""Models in the local cache of the Hugging Face hub, by name."""

from __future__ import annotations

import os
import re
from pathlib import Path

from moe.config import ConfigError

_NAME = re.compile(r"[\w.-]+/[\w.-]+")


def find_source(source: str) -> str:
    """The folder of a checkpoint: a path as it is, or the cached snapshot of a model's name, such as org/name.

    Nothing is downloaded.

    Raises:
        ConfigError: there is no such folder, and no cached model of that name.
    """
    if os.path.exists(source) or not _NAME.fullmatch(source):
        return source
    cache = _cache()
    model = cache / f"models--{source.replace('/', '--')}"
    main = model / "refs" / "main"
    names = [main.read_bytes().decode(errors="replace").strip()] if main.is_file() else []
    snapshots = [model / "snapshots" / name for name in names if re.fullmatch(r"\w+", name)]
    snapshots += sorted((model / "snapshots").glob("*"), key=lambda path: path.stat().st_mtime, reverse=True)
    for snapshot in snapshots:
        if (snapshot / "config.json").exists():
            return os.fspath(snapshot)
    raise ConfigError(
        f"--source={source}: no such folder, and not in the cache {cache}; `hf download {source}` (pip install "
        "huggingface_hub) puts it there"
    )


def _cache() -> Path:
    """Where ``huggingface_hub`` keeps its downloads, by its environment variables in its order."""
    variables = os.environ
    home = variables.get("HF_HOME") or os.path.join(variables.get("XDG_CACHE_HOME") or "~/.cache", "huggingface")
    named = variables.get("HF_HUB_CACHE") or variables.get("HUGGINGFACE_HUB_CACHE") or os.path.join(home, "hub")
    return Path(os.path.expandvars(os.path.expanduser(named)))
