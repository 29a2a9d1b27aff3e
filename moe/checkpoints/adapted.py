"""Runs that train adapters: their checkpoints hold the adapters alone, and the base is that of ``start.checkpoint``."""

from __future__ import annotations

import json
from typing import Any

import jax
from etils import epath

from moe.atomic_files import write_atomic
from moe.checkpoints.manager import complete_steps
from moe.config import Config, ConfigError

BASE_FILE = "base.json"


def pin_base(workdir: epath.Path, config: Config) -> None:
    """Note which checkpoint of the base the adapters of a workdir belong to; the base may be trained further."""
    if jax.process_index() == 0:
        steps = complete_steps(epath.Path(config.start.checkpoint))
        write_atomic(workdir / BASE_FILE, json.dumps({"step": max(steps)}).encode())


def base_step(workdir: epath.Path) -> int | None:
    """Step of the base's checkpoint; None where no adapters have been started.

    Raises:
        ConfigError: the note is damaged.
    """
    path = workdir / BASE_FILE
    if not path.exists():
        return None
    try:
        step: Any = json.loads(path.read_text())["step"]
        return int(step)
    except (ValueError, LookupError, TypeError) as error:
        raise ConfigError(f"{path}: does not name the base's checkpoint ({error}); restore it") from error
