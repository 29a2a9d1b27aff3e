"""Runs that train adapters: their checkpoints hold the adapters alone, and the base is that of ``start.checkpoint``."""

from __future__ import annotations

import json

import jax
import pydantic
from etils import epath

from moe.atomic_files import write_atomic
from moe.checkpoints.manager import complete_steps
from moe.config import Config
from moe.foreign_files import Fields, Step, read_json

#: Notes in a workdir of the steps at which other checkpoints are read: the base of adapters, the teacher.
BASE_FILE, TEACHER_FILE = "base.json", "teacher.json"


class _Note(Fields):
    step: Step


_NOTE = pydantic.TypeAdapter(_Note)


def pin_base(workdir: epath.Path, config: Config) -> None:
    """Note which checkpoint of the base the adapters of a workdir belong to; the base may be trained further."""
    note_step(workdir / BASE_FILE, max(complete_steps(epath.Path(config.start.checkpoint))))


def note_step(path: epath.Path, step: int) -> None:
    """Note the step of another checkpoint, which may be trained further."""
    if jax.process_index() == 0:
        write_atomic(path, json.dumps({"step": step}))


def base_step(workdir: epath.Path) -> int | None:
    """Step of the base's checkpoint; None where no adapters have been started."""
    return noted_step(workdir / BASE_FILE)


def noted_step(path: epath.Path) -> int | None:
    """Step of a note; None without one.

    Raises:
        ConfigError: the note is damaged.
    """
    if not path.exists():
        return None
    return read_json(path, _NOTE).step
