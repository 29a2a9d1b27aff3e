"""Checkpoints of a run, through Orbax: atomic, written in the background, restored onto any mesh.

A checkpoint at step n holds the :class:`moe.models.state.TrainState` after n steps, the data position, the loop's
own JSON, and checksums of all of them. Retention: the newest ``keep``, the newest ``keep`` at multiples of
``save_every`` steps, multiples of ``keep_every``, and the one with the lowest held-out loss. Nothing is pickled.
"""

from __future__ import annotations

import contextlib
import functools
import os
import re
import sys
from collections.abc import Callable, Iterator
from typing import Any

import grain
import jax
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint.checkpoint_managers import preservation_policy

from moe.checkpoints.arrays import array_handler
from moe.checkpoints.integrity import (
    DamagedError,
    checksums,
    compare,
    quiet_orbax,
    unreadable_as_damaged,
)
from moe.checkpoints.orbax_threads import writers_end_on_error
from moe.checkpoints.retention import LowestLoss, NewestRegular
from moe.config import ConfigError
from moe.data.streams import StreamsHandler, StreamsRestore, StreamsSave
from moe.models.state import TrainState
from moe.system.atomic_files import first_line, from_checked_json, in_bucket, root_cause, to_checked_json, write_atomic
from moe.system.metrics_files import METRICS, iterate_rows
from moe.system.signals import StartAgain
from moe.system.stop_watch import STOP_WATCH
from moe.system.waiting import said_aloud

#: Object that Orbax writes last into a checkpoint in a bucket.
COMMIT = "commit_success.txt"


class RowsLostError(DamagedError):
    """A good checkpoint whose earlier rows of metrics are missing from the metrics file."""


class Checkpoints:
    """The checkpoints under ``workdir/checkpoints``."""

    def __init__(
        self,
        workdir: epath.Path,
        keep: int,
        keep_every: int = 0,
        *,
        save_every: int = 1,
        read_only: bool = False,
        to_host: bool = False,
    ):
        """
        Args:
            workdir: of the run.
            keep: number of newest checkpoints to keep, and of the newest at multiples of ``save_every``.
            keep_every: checkpoints at multiples of this many steps are kept too; 0: none.
            save_every: steps between the run's checkpoints, beside those of interruptions.
            read_only: create and delete nothing.
            to_host: arrays are read whole into the host's memory.
        """
        refuse_unusable_path(workdir)
        if latest := complete_steps(workdir)[-1:]:
            refuse_special_files(workdir / "checkpoints" / str(latest[0]))
        self._workdir = workdir
        self._best = LowestLoss(workdir)
        policies = [preservation_policy.LatestN(keep), NewestRegular(keep, save_every), self._best]
        if keep_every:
            policies.append(preservation_policy.EveryNSteps(keep_every))
        with _as_config_error(workdir, None):
            self._manager = ocp.CheckpointManager(
                orbax_folder(workdir),
                options=ocp.CheckpointManagerOptions(
                    preservation_policy=preservation_policy.AnyPreservationPolicy(policies),
                    create=not read_only,
                    read_only=read_only,
                    cleanup_tmp_directories=not read_only,  # left by a killed run
                    # Otherwise a thread makes the folders, for which the writers wait, five minutes where it fails.
                    async_options=ocp.options.AsyncOptions(create_directories_asynchronously=False),
                ),
                item_handlers={  # pyright: ignore[reportArgumentType]
                    "state": array_handler(to_host=to_host),
                    "data": StreamsHandler(),
                    "memory": ocp.JsonCheckpointHandler(),
                },
            )

    def latest(self) -> int | None:
        """Step of the newest complete checkpoint, or None."""
        return self._manager.latest_step()

    def before(self, step: int, save_every: int) -> list[int]:
        """Steps of the complete checkpoints older than a step, newest first.

        Multiples of ``save_every`` come before checkpoints left by an interruption, which an uninterrupted run would
        not have: both then roll back to the same step.
        """
        older = [saved for saved in self._manager.all_steps() if saved < step]
        return sorted(older, key=lambda saved: (saved % save_every == 0, saved), reverse=True)

    def save(
        self,
        step: int,
        state: TrainState,
        iterator: grain.DatasetIterator | None,
        memory: dict[str, Any],
        heldout_loss: float | None,
    ) -> None:
        """Start writing and return; the state's buffers may be reused at once.

        Args:
            step: steps done.
            state: on the mesh.
            iterator: positioned at the batch of the next step; None: no position is saved.
            memory: JSON of the training loop.
            heldout_loss: at this step, if evaluated.

        Raises:
            ConfigError: this checkpoint, or the previous one, could not be written.
        """
        self._best.losses[step] = heldout_loss
        state = state.stored
        content = {"loop": memory, "checksums": checksums(state)}
        where = f"{self._workdir}: the checkpoint of step {step}, or the one before, to be written"
        with said_aloud(where), _as_config_error(self._workdir, self._manager), STOP_WATCH.unfinished():
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.PyTreeSave(state),
                    memory=ocp.args.JsonSave({"sealed": to_checked_json(content)}),
                    **({} if iterator is None else {"data": StreamsSave(iterator)}),
                ),
                force=True,
            )

    def check(self) -> None:
        """Raise ConfigError if a background write has failed; does not wait."""
        with _as_config_error(self._workdir, self._manager):
            self._manager.check_for_errors()

    def wait(self) -> None:
        """Wait until started writes are on disk. Raises ConfigError if one failed."""
        where = f"{self._workdir}: a checkpoint to be written"
        with said_aloud(where), _as_config_error(self._workdir, self._manager):
            self._manager.wait_until_finished()

    @contextlib.contextmanager
    def finish_on_error(self) -> Iterator[None]:
        """Finish started writes before an error or a second signal leaves the block: its message names the newest
        checkpoint, and nothing is written once the workdir's lock is released."""
        with STOP_WATCH.unfinished(self._manager.is_saving_in_progress):
            try:
                yield
            except BaseException:
                with contextlib.suppress(ConfigError):
                    self.wait()
                raise

    def resume(
        self, state: TrainState, iterator: grain.DatasetIterator | None, say: Callable[[str], Any]
    ) -> tuple[int, TrainState, dict[str, Any]] | None:
        """(step, state, the loop's JSON) of the newest good checkpoint; None if there are no checkpoints.

        Newer damaged ones are moved to ``workdir/damaged`` and reported through ``say``. A checkpoint whose earlier
        rows of metrics are missing is moved too if an older checkpoint has its rows: the run then rewrites them.

        In a multi-process run see :meth:`start_again`.

        Args:
            state: ShapeDtypeStructs with the target shardings (``Program.state``).
            iterator: fresh iterator over the same data, moved to the saved position; None: it is not read.
            say: receives one line per event.

        Raises:
            ConfigError: there are checkpoints, and all are damaged.
        """
        damaged: dict[int, DamagedError] = {}
        steps = sorted(self._manager.all_steps(), reverse=True)
        for step in steps:
            try:
                restored = self.restore(step, state, iterator)
                self._compare_rows(step, restored[1].get("rows"))
            except DamagedError as error:
                damaged[step] = error
                self.start_again(step, error)
                continue
            return self._without(damaged, step, say, restored)
        if lost := [step for step, error in damaged.items() if isinstance(error, RowsLostError)]:
            step = lost[0]
            say(f"{damaged[step]}; no checkpoint has all of its rows, so they stay missing")
            newer = {bad: error for bad, error in damaged.items() if bad > step}
            return self._without(newer, step, say, self.restore(step, state, iterator))
        if damaged:
            listed = "; ".join(f"step {step}: {error}" for step, error in damaged.items())
            raise ConfigError(
                f"{self._workdir / 'checkpoints'}: no checkpoint is good ({listed}); nothing was changed; "
                "restore one from a backup, or use another --workdir"
            )
        return None

    def start_again(self, step: int, error: DamagedError) -> None:
        """In a multi-process run, move a damaged checkpoint away, unless it is the oldest, and raise StartAgain.

        Perhaps only this process sees the damage, and the others wait for it.
        """
        if jax.process_count() > 1 and step != min(self._manager.all_steps()):
            self._set_aside(step, functools.partial(print, file=sys.stderr), str(error))
            raise StartAgain(f"the checkpoint of step {step} is damaged: {error}") from error

    def _without(
        self,
        damaged: dict[int, DamagedError],
        step: int,
        say: Callable[[str], Any],
        found: tuple[TrainState, dict[str, Any]],
    ) -> tuple[int, TrainState, dict[str, Any]]:
        """The result of :meth:`resume`, after the damaged checkpoints are moved away."""
        for bad, error in damaged.items():
            self._set_aside(bad, say, str(error))
        self._manager.reload()
        return step, *found

    def _compare_rows(self, step: int, saved: int | None) -> None:
        """Raise RowsLostError if rows written before the checkpoint are missing from the metrics file.

        Skipped with several processes: one may see an older version of the file than the process that writes it.
        """
        if saved is None or jax.process_count() > 1:
            return
        there = sum(row["step"] <= step for row in iterate_rows(self._workdir / METRICS))
        if there != saved:
            raise RowsLostError(f"{METRICS} has {there} rows up to step {step}, and had {saved} when that was saved")

    def _set_aside(self, step: int, say: Callable[[str], Any], reason: str) -> None:
        """Move a checkpoint to ``workdir/damaged``; it is not deleted, because it may be repairable."""
        folder = self._workdir / "damaged"
        folder.mkdir(exist_ok=True)
        names = (str(step), *(f"{step}_{number}" for number in range(1, 1000)))
        target = folder / next(name for name in names if not (folder / name).exists())
        source = self._workdir / "checkpoints" / str(step)
        try:
            _move(source, target)
        except OSError:
            if source.exists():
                raise
            return  # another process of this run moved it
        say(f"the checkpoint of step {step} is damaged and was moved to {target}: {reason}")

    def restore(
        self, step: int, state: TrainState, iterator: grain.DatasetIterator | None = None
    ) -> tuple[TrainState, dict[str, Any]]:
        """The state and the loop's JSON of a step, verified against their checksums.

        Args:
            step: of a complete checkpoint.
            state: ShapeDtypeStructs with the target shardings (``Program.state``); arrays for which it has
                :data:`moe.checkpoints.integrity.UNREAD` are not read.
            iterator: fresh iterator over the same data, moved to the saved position; None: the position is not read.

        Raises:
            DamagedError: it cannot be read, or differs from what was saved.
            ConfigError: the iterator is over other documents.
            OSError: an I/O error, which says nothing about the content.
        """
        items = {} if iterator is None else {"data": StreamsRestore(iterator)}
        where = f"{self._workdir}: the checkpoint of step {step} to be read"
        with said_aloud(where), quiet_orbax(), unreadable_as_damaged():
            restored = self._manager.restore(
                step,
                args=ocp.args.Composite(state=_restore(state), memory=ocp.args.JsonRestore(), **items),
            )
            memory = from_checked_json(restored["memory"]["sealed"])
            compare(memory["checksums"], restored["state"])
            if (held := int(restored["state"].step)) != step:
                raise DamagedError(f"it holds step {held}")
            return restored["state"], memory["loop"]

    def close(self) -> None:
        """Wait until started writes are on disk, then close. Raises ConfigError if one failed."""
        self.wait()
        self._manager.close()


def _move(source: epath.Path, target: epath.Path) -> None:
    """Rename a checkpoint; in a bucket copy and delete it, its commit object first, so that no part looks complete."""
    if not in_bucket(source):
        source.rename(target)
        return
    files = list(_files(source))
    for path in files:
        write_atomic(target / path.relative_to(source), path.read_bytes())
    for path in sorted(files, key=lambda path: path.name != COMMIT):
        path.unlink()


def _files(folder: epath.Path) -> Iterator[epath.Path]:
    for path in folder.iterdir():
        yield from _files(path) if path.is_dir() else (path,)


def _restore(state: TrainState) -> ocp.args.PyTreeRestore:
    """Restore arguments for a whole state, each device reading its shards; a different shape is an error."""
    state = state.stored
    return ocp.args.PyTreeRestore(state, restore_args=ocp.checkpoint_utils.construct_restore_args(state))


@contextlib.contextmanager
def _as_config_error(workdir: epath.Path, manager: ocp.CheckpointManager | None) -> Iterator[None]:
    """Turn an error of opening or writing checkpoints into ConfigError with the newest good step."""
    try:
        with writers_end_on_error():
            yield
    except ConfigError:
        raise
    except Exception as error:
        if in_bucket(workdir):  # which may refuse to be listed too
            last = "earlier checkpoints stay as they are"
        else:
            steps = complete_steps(workdir)
            last = f"the newest good checkpoint is of step {max(steps)}" if steps else "there is no checkpoint yet"
        what = "a checkpoint could not be written" if manager else "cannot be used"
        advice = "free space or repair it, and the same command continues from there"
        if isinstance(root_cause(error), TimeoutError):  # Orbax measures its waits by the time of day
            advice = (
                "the system's clock was set forward meanwhile, or the storage did not answer in time; "
                "the same command continues from there"
            )
        raise ConfigError(f"--workdir={workdir}: {what} ({first_line(error)}); {last}; {advice}") from error


def refuse_unusable_path(workdir: str | os.PathLike[str]) -> None:
    """Raise ConfigError for a path that Orbax cannot read back: it uses glob patterns, and TensorStore needs UTF-8."""
    path = os.path.abspath(workdir)
    unreadable = [character for character in "*?[]\\" if character in path]
    try:
        path.encode()
    except UnicodeEncodeError:
        unreadable.append("bytes that are not UTF-8")
    if unreadable:
        raise ConfigError(
            f"--workdir={path!a}: checkpoints cannot be kept under a path with {' '.join(unreadable)}; use another name"
        )


def refuse_special_files(folder: epath.Path) -> None:
    """Raise ConfigError for a FIFO, socket or device in a local folder, since reading it may never end."""
    if in_bucket(folder):
        return
    for place, _, names in os.walk(folder):
        for name in names:
            path = os.path.join(place, name)
            if os.path.exists(path) and not os.path.isfile(path):
                raise ConfigError(f"{path}: is not a regular file")


def orbax_folder(workdir: epath.Path) -> epath.Path:
    """The folder of a workdir's checkpoints as an absolute path, which Orbax needs."""
    path = os.fspath(workdir)
    return epath.Path(path if in_bucket(path) else os.path.abspath(path)) / "checkpoints"


def complete_steps(workdir: epath.Path) -> list[int]:
    """Steps of the completely written checkpoints, in order: in a bucket those with Orbax's commit object, elsewhere
    all, because they are renamed when complete."""
    folder = workdir / "checkpoints"
    paths = [path for path in folder.iterdir() if re.fullmatch("[0-9]+", path.name)] if folder.is_dir() else []
    return sorted(int(path.name) for path in paths if not in_bucket(path) or (path / COMMIT).exists())
