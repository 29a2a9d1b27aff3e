"""Checkpoints of other runs that a run needs from its start to its end: the base of adapters, the teacher.

Both may be trained further meanwhile; a note in the workdir pins the step that the run began with.
"""

from __future__ import annotations

import dataclasses
import json
import os

import jax
import numpy as np
import pydantic
from etils import epath
from jax.experimental import multihost_utils

from moe.checkpoints.manager import complete_steps
from moe.config import Config, ConfigError
from moe.system.atomic_files import write_atomic
from moe.system.foreign_files import Fields, Step, read_json

#: Notes of a workdir.
BASE_FILE, TEACHER_FILE = "base.json", "teacher.json"


class _Note(Fields):
    step: Step


_NOTE = pydantic.TypeAdapter(_Note)


@dataclasses.dataclass(frozen=True)
class PinnedSteps:
    """Steps of the checkpoints that a run needs to its end; None: it needs none.

    Attributes:
        base: of ``start.checkpoint``, whose parameters adapters are added to.
        teacher: of ``distill.teacher``.
    """

    base: int | None
    teacher: int | None

    def note(self, workdir: epath.Path) -> None:
        """Write the notes; to be called before config.json is written, since a later start expects them beside it."""
        for file, step in ((BASE_FILE, self.base), (TEACHER_FILE, self.teacher)):
            if step is not None and jax.process_index() == 0:
                write_atomic(workdir / file, json.dumps({"step": step}))


def pinned_steps(config: Config, workdir: epath.Path | None) -> PinnedSteps:
    """Steps of a run's base and teacher: noted at its start, else the newest.

    Args:
        config: of the run.
        workdir: of the run; None for a new run, whose folder may hold stale notes of a start that failed.

    Raises:
        ConfigError: a damaged note, or a checkpoint that is missing.
    """
    teacher = _step("distill.teacher", config.distill.teacher, workdir and workdir / TEACHER_FILE)
    return PinnedSteps(base_step(config, workdir), teacher)


def base_step(config: Config, workdir: str | os.PathLike[str] | None) -> int | None:
    """Step of the base of adapters, as :func:`pinned_steps`; None for a run without adapters."""
    note = None if workdir is None else epath.Path(workdir) / BASE_FILE
    return _step("start.checkpoint", config.start.checkpoint if config.lora.rank else "", note)


def _step(field: str, source: str, note: epath.Path | None) -> int | None:
    if not source:
        return None
    steps, noted = complete_steps(epath.Path(source)), None if note is None else noted_step(note)
    if noted is None and not steps:
        raise ConfigError(f"{field}={source!r}: holds no checkpoints")
    if noted is not None and noted not in steps:
        raise ConfigError(
            f"{field}={source!r}: this run reads its checkpoint of step {noted}, which is gone; restore it"
        )
    return agreed(steps[-1]) if noted is None else noted


def agreed(newest: int) -> int:
    """The newest step that process 0 found: the other run may save a checkpoint while the processes look.

    All processes call it together.
    """
    if jax.process_count() == 1:
        return newest
    return int(multihost_utils.broadcast_one_to_all(np.int32(newest)))


def noted_step(note: epath.Path) -> int | None:
    """Step of a note; None without one.

    Raises:
        ConfigError: the note is damaged.
    """
    return read_json(note, _NOTE).step if note.exists() else None
