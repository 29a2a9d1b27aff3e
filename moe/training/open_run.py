"""Opening of a run: its devices and its workdir are checked against its config; nothing is written."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Callable, Sequence
from typing import Any

import jax
from etils import epath
from jax.sharding import Mesh

from moe.checkpoints.manager import refuse_unusable_path
from moe.checkpoints.workdir import (
    REPORT,
    Contents,
    contents,
    is_finished,
    locked_workdir,
    read_config,
    refuse_other_run,
)
from moe.config import Config, ConfigError, validate_mesh
from moe.data import folders, streams
from moe.models.pipeline import check as pipeline_check
from moe.parallel.mesh import make_mesh, rows_by_process
from moe.system.atomic_files import first_line, in_bucket
from moe.system.reading import read_small_file
from moe.system.waiting import first_answer
from moe.training import warm_start
from moe.training.agreement import refuse_other_workdir
from moe.training.metric_writers import find_writers
from moe.training.progress import Console


@dataclasses.dataclass(frozen=True)
class OpenRun:
    """A run that may begin or go on.

    Attributes:
        config: with the number of document streams.
        directory: the workdir.
        mesh: of its devices.
        contents: what the workdir held when the run was opened, which decides what the start reads and writes.
        changes: field → [old, new] of the settings that this start changes.
    """

    config: Config
    directory: epath.Path
    mesh: Mesh
    contents: Contents
    changes: dict[str, list[Any]]

    @property
    def is_finished(self) -> bool:
        """Whether nothing is left to do."""
        return self.contents.is_run and not self.changes and is_finished(self.config, self.directory)

    def report(self) -> str:
        """Text of a finished run's report."""
        return read_small_file(self.directory / REPORT).decode(errors="replace")


def open_run(
    config: Config,
    workdir: str,
    devices: Sequence[Any] | None,
    console: Console,
    resources: contextlib.ExitStack,
    *,
    allow_changes: bool,
) -> OpenRun:
    """Check config, devices and workdir. See :func:`moe.training.train.train`.

    Args:
        resources: receives the lock of a workdir that exists.
    """
    directory = _folder(workdir)
    folders.refuse_inside(config.data.dataset, workdir)
    mesh = make_mesh(config.mesh, devices)
    validate_mesh(config, mesh.shape)
    pipeline_check(config, mesh.shape)  # before rows are given to processes, as below
    find_writers(config.train.writers)
    refuse_other_workdir(directory)
    # Before the lock, so that nothing is written into a folder that is refused.
    held = contents(directory)
    if not held.is_run:
        warm_start.check(config)
    config = _with_streams(config, mesh, read_config(directory) if held.is_run else None, console.say)
    changes = refuse_other_run(config, directory, allow_changes=allow_changes) if held.is_run else {}
    if held >= Contents.CONFIG:
        resources.enter_context(locked_workdir(directory))
    return OpenRun(config, directory, mesh, held, changes)


def _with_streams(config: Config, mesh: Mesh, begun: Config | None, say: Callable[[str], Any]) -> Config:
    """Fill in the number of document streams if the config leaves it open: that of the run that is resumed; for a new
    run whose processes cannot share the default number, the smallest that they can."""
    if config.data.streams:
        return config
    number, size = 0, config.train.rows_read
    if begun is not None:
        number = begun.data.streams
    elif jax.process_count() > 1:
        needed = streams.least_number(size, rows_by_process(mesh, size).values())
        if needed > streams.default_number(size):
            number = needed
            say(f"data.streams: {number}, so that each process has whole streams")
    return dataclasses.replace(config, data=dataclasses.replace(config.data, streams=number))


def _folder(workdir: str) -> epath.Path:
    """The workdir as a path. Raises ConfigError for one that cannot hold a run."""
    directory = epath.Path(workdir)
    if not in_bucket(directory):
        refuse_unusable_path(workdir)
        whole = directory.absolute()
        existing = next(place for place in (whole, *whole.parents) if place.exists())
        # An existing folder is tested by taking its lock, whose error has the system's reason.
        if not existing.is_dir() or (existing != whole and not os.access(existing, os.W_OK | os.X_OK)):
            raise ConfigError(f"--workdir={workdir}: cannot be written ({existing} is not a writable folder)")
    elif not workdir.startswith("gs://"):  # the only one for which Orbax writes arrays
        raise ConfigError(f"--workdir={workdir}: must be a folder of a file system, or gs://BUCKET/NAME")
    else:
        try:
            first_answer(workdir, directory.exists)
        except Exception as error:  # gcsfs passes on errors of several libraries
            raise ConfigError(
                f"--workdir={workdir}: cannot be reached ({first_line(error)}); it needs credentials and "
                "`pip install gcsfs google-cloud-storage`"
            ) from error
    return directory
