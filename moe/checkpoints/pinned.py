"""Checkpoints of other runs that a run needs from its start to its end: the base of adapters, the teacher.

Both may be trained further, or replaced, meanwhile; a note in the workdir pins the step that the run began with and a
digest of its parameters.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os

import jax
import numpy as np
import pydantic
from etils import epath
from jax.experimental import multihost_utils

from moe.checkpoints.integrity import DamagedError, saved_checksums
from moe.checkpoints.manager import complete_steps
from moe.config import Config, ConfigError
from moe.system.atomic_files import write_atomic
from moe.system.foreign_files import Fields, Step, read_json

#: Notes of a workdir.
BASE_FILE, TEACHER_FILE = "base.json", "teacher.json"


class Note(Fields):
    """A checkpoint; ``digest`` is empty for one without checksums, and in notes of earlier versions."""

    step: Step
    digest: str = ""


_NOTE = pydantic.TypeAdapter(Note)


@dataclasses.dataclass(frozen=True)
class PinnedSteps:
    """Steps of the checkpoints that a run needs to its end; None: it needs none.

    Attributes:
        base: of ``start.checkpoint``, whose parameters adapters are added to.
        teacher: of ``distill.teacher``.
        notes: file → content that pins them.
    """

    base: int | None
    teacher: int | None
    notes: dict[str, str]

    def note(self, workdir: epath.Path) -> None:
        """Write the notes, and delete those of a start that failed; to be called before config.json is written, since a
        later start expects them beside it."""
        for file in (BASE_FILE, TEACHER_FILE) if jax.process_index() == 0 else ():
            if file in self.notes:
                write_atomic(workdir / file, self.notes[file])
            else:
                (workdir / file).unlink(missing_ok=True)


def pinned_steps(config: Config, workdir: epath.Path | None) -> PinnedSteps:
    """Steps of a run's base and teacher: noted at its start, else the newest.

    Args:
        config: of the run.
        workdir: of the run; None for a new run, whose folder may hold stale notes of a start that failed.

    Raises:
        ConfigError: a damaged note, or a checkpoint that is missing or another one.
    """
    teacher = _step("distill.teacher", config.distill.teacher, workdir and workdir / TEACHER_FILE)
    base = base_step(config, workdir)
    pinned = ((BASE_FILE, config.start.checkpoint, base), (TEACHER_FILE, config.distill.teacher, teacher))
    notes = {
        file: json.dumps({"step": step, "digest": digest(epath.Path(source), step)})
        for file, source, step in pinned
        if step is not None
    }
    return PinnedSteps(base, teacher, notes)


def base_step(config: Config, workdir: str | os.PathLike[str] | None) -> int | None:
    """Step of the base of adapters, as :func:`pinned_steps`; None for a run without adapters."""
    note = None if workdir is None else epath.Path(workdir) / BASE_FILE
    return _step("start.checkpoint", config.start.checkpoint if config.lora.rank else "", note)


def _step(field: str, source: str, note: epath.Path | None) -> int | None:
    if not source:
        return None
    steps = complete_steps(epath.Path(source))
    noted = None if note is None else read_note(note)
    if noted is None:
        if not steps:
            raise ConfigError(f"{field}={source!r}: holds no checkpoints")
        return agreed(steps[-1])
    if noted.step not in steps:
        raise ConfigError(
            f"{field}={source!r}: this run reads its checkpoint of step {noted.step}, which is gone; restore it"
        )
    if noted.digest and noted.digest != digest(epath.Path(source), noted.step):
        raise ConfigError(
            f"{field}={source!r}: its checkpoint of step {noted.step} is not the one that this run began with, whose "
            "parameters were others; restore that one"
        )
    return noted.step


def digest(workdir: epath.Path, step: int) -> str:
    """Hash of the checksums of a checkpoint's parameters and selection biases, and of the base of its adapters; empty
    for a checkpoint without checksums.

    Raises:
        ConfigError: they cannot be read.
    """
    try:
        sums = saved_checksums(workdir, step)
    except DamagedError as error:
        raise ConfigError(f"{workdir}: the checkpoint of step {step} is damaged: {error}") from error
    if sums is None:
        return ""
    base = read_note(workdir / BASE_FILE)
    of_model = sorted((name, value) for name, value in sums.items() if name.startswith((".parameters", ".biases")))
    return hashlib.sha256(json.dumps([base and base.digest, of_model]).encode()).hexdigest()[:32]


def agreed(newest: int) -> int:
    """The newest step that process 0 found: the other run may save a checkpoint while the processes look.

    All processes call it together.
    """
    if jax.process_count() == 1:
        return newest
    return int(multihost_utils.broadcast_one_to_all(np.int32(newest)))


def read_note(path: epath.Path) -> Note | None:
    """Read a note; None without one. Raises ConfigError for a damaged one."""
    return read_json(path, _NOTE) if path.exists() else None
