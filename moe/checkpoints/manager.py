"""Checkpoints of a run, kept by Orbax: atomic, written in the background, restored onto whatever mesh is there.

A checkpoint at step n holds the :class:`moe.checkpoints.state.TrainState` after n steps, the place in the data, what the loop
itself remembers, and a checksum of all three: Orbax and TensorStore do not notice a flipped bit in an array. Retention:
the newest ``keep``, multiples of ``keep_every`` steps, and the one with the lowest held-out loss. Nothing in a
checkpoint is code, and none of it is unpickled.
"""

from __future__ import annotations

import contextlib
import logging
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import grain
import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging as absl_logging
from etils import epath
from orbax.checkpoint.checkpoint_managers import preservation_policy

from moe.atomic_files import seal, unseal
from moe.checkpoints.integrity import DamagedError, checksums, compare, damage, first_line, quiet
from moe.checkpoints.state import TrainState
from moe.config import ConfigError
from moe.data.streams import StreamsHandler, StreamsRestore, StreamsSave
from moe.metrics_files import METRICS, read_rows
from moe.signals import START_AGAIN, Stopped


class RowsLostError(DamagedError):
    """A checkpoint that is good, but comes after rows of metrics that are not there any more."""


class Checkpoints:
    """The checkpoints under ``workdir/checkpoints``."""

    def __init__(self, workdir: epath.Path, keep: int, keep_every: int = 0, *, read_only: bool = False):
        """
        Args:
            workdir: of the run.
            keep: newest checkpoints kept.
            keep_every: steps, whose multiples are kept too; 0: none.
            read_only: for a look at another run.
        """
        self._workdir = workdir
        self._best = _LowestLoss(workdir)
        policies = [preservation_policy.LatestN(keep), self._best]
        if keep_every:
            policies.append(preservation_policy.EveryNSteps(keep_every))
        with _said_in_a_sentence(workdir, None):
            self._manager = ocp.CheckpointManager(
                workdir / "checkpoints",
                options=ocp.CheckpointManagerOptions(
                    preservation_policy=preservation_policy.AnyPreservationPolicy(policies),
                    create=not read_only,
                    read_only=read_only,
                    cleanup_tmp_directories=not read_only,  # what a killed run was writing
                ),
                item_handlers={  # pyright: ignore[reportArgumentType]
                    # zstd makes a state a tenth smaller, for four times the processor's time of a save.
                    "state": ocp.PyTreeCheckpointHandler(use_compression=False),
                    "data": StreamsHandler(),
                    "memory": ocp.JsonCheckpointHandler(),
                },
            )

    def latest(self) -> int | None:
        """Step of the newest complete checkpoint, or None."""
        return self._manager.latest_step()

    def before(self, step: int, save_every: int) -> list[int]:
        """Steps of the complete checkpoints older than a step, the newest first.

        Multiples of ``save_every`` come before those that an interruption left, which another run would not have.
        """
        older = [saved for saved in self._manager.all_steps() if saved < step]
        return sorted(older, key=lambda saved: (saved % save_every == 0, saved), reverse=True)

    def save(
        self,
        step: int,
        state: TrainState,
        iterator: grain.DatasetIterator,
        memory: dict[str, Any],
        heldout_loss: float | None,
    ) -> None:
        """Starts writing and returns; the state's arrays may be reused at once.

        Args:
            step: optimizer steps done.
            state: on the mesh.
            iterator: at the batch that the next step will take.
            memory: JSON of the training loop.
            heldout_loss: at this step, if it was evaluated.

        Raises:
            ConfigError: this checkpoint, or the one before, could not be written.
        """
        self._best.losses[step] = heldout_loss
        content = {"loop": memory, "checksums": checksums(state)}
        with _said_in_a_sentence(self._workdir, self._manager):
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.PyTreeSave(state),
                    data=StreamsSave(iterator),
                    memory=ocp.args.JsonSave({"sealed": seal(content)}),
                ),
                force=True,
            )

    def check(self) -> None:
        """Cheap. Raises ConfigError if what is being written in the background has failed."""
        with _said_in_a_sentence(self._workdir, self._manager):
            self._manager.check_for_errors()

    def wait(self) -> None:
        """Returns when what was started is on disk. Raises ConfigError if it could not be written."""
        with _said_in_a_sentence(self._workdir, self._manager):
            self._manager.wait_until_finished()

    @contextlib.contextmanager
    def settled(self) -> Iterator[None]:
        """An error within is told only when it is clear which checkpoints there are."""
        try:
            yield
        except Exception:
            with contextlib.suppress(ConfigError):
                self.wait()
            raise

    def resume(
        self, state: TrainState, iterator: grain.DatasetIterator, say: Callable[[str], Any]
    ) -> tuple[int, TrainState, dict[str, Any]] | None:
        """(step, state, the loop's JSON) of the newest good checkpoint, or None if there is none at all.

        Damaged ones that are newer are set aside in ``workdir/damaged``, and ``say`` is told so. So is one that comes
        after rows of metrics that are lost, if an older one has its rows: the run writes them again.

        In a run of several processes one of them may see the damage alone: it sets the checkpoint aside and asks for a
        new start.

        Args:
            state: ShapeDtypeStructs with the shardings to restore to (:attr:`moe.training.step.Program.state`).
            iterator: a fresh one of the same data; it is moved to its place.
            say: told in a line.

        Raises:
            ConfigError: there are checkpoints, and not one of them is good.
        """
        damaged: dict[int, DamagedError] = {}
        steps = sorted(self._manager.all_steps(), reverse=True)
        for step in steps:
            try:
                found = self.restore(step, state, iterator)
                self._compare_rows(step, found[1].get("rows"))
            except DamagedError as error:
                damaged[step] = error
                if jax.process_count() > 1 and step != steps[-1]:
                    self._set_aside(step, say, str(error))
                    raise Stopped(START_AGAIN, f"the checkpoint of step {step} is damaged") from error
                continue
            return self._without(damaged, step, say, found)
        if lost := [step for step, error in damaged.items() if isinstance(error, RowsLostError)]:
            step = lost[0]
            say(f"{damaged[step]}; no checkpoint has all of its rows, and those stay lost")
            newer = {bad: error for bad, error in damaged.items() if bad > step}
            return self._without(newer, step, say, self.restore(step, state, iterator))
        if damaged:
            listed = "; ".join(f"step {step}: {error}" for step, error in damaged.items())
            raise ConfigError(
                f"{self._workdir / 'checkpoints'}: no checkpoint is good ({listed}); nothing was changed; "
                "put one back from a copy, or use another --workdir"
            )
        return None

    def _without(
        self,
        damaged: dict[int, DamagedError],
        step: int,
        say: Callable[[str], Any],
        found: tuple[TrainState, dict[str, Any]],
    ) -> tuple[int, TrainState, dict[str, Any]]:
        """What :meth:`resume` returns, when the damaged ones are out of the way."""
        for bad, error in damaged.items():
            self._set_aside(bad, say, str(error))
        self._manager.reload()
        return step, *found

    def _compare_rows(self, step: int, saved: int | None) -> None:
        """Raises RowsLostError if rows that were written before the checkpoint are not in the metrics any more.

        (Of several processes one might see an older file than the one that wrote it.)
        """
        there = sum(row["step"] <= step for row in read_rows(self._workdir / METRICS))
        if saved not in (None, there) and jax.process_count() == 1:
            raise RowsLostError(f"{METRICS} has {there} rows up to step {step}, and had {saved} when that was saved")

    def _set_aside(self, step: int, say: Callable[[str], Any], reason: str) -> None:
        """Moved, never deleted: somebody may mend it."""
        folder = self._workdir / "damaged"
        folder.mkdir(exist_ok=True)
        names = (str(step), *(f"{step}_{number}" for number in range(1, 1000)))
        target = folder / next(name for name in names if not (folder / name).exists())
        source = self._workdir / "checkpoints" / str(step)
        try:
            source.rename(target)
        except OSError:
            if source.exists():
                raise
            return  # another process of this run has done it
        say(f"the checkpoint of step {step} is damaged and now lies in {target}: {reason}")

    def restore(
        self, step: int, state: TrainState, iterator: grain.DatasetIterator | None = None
    ) -> tuple[TrainState, dict[str, Any]]:
        """The state and the loop's JSON of a step, known to be what was saved.

        Args:
            step: of a complete checkpoint.
            state: ShapeDtypeStructs with the shardings to restore to (:attr:`moe.training.step.Program.state`).
            iterator: a fresh one of the same data, which is moved to its place; None: the data's place is not read.

        Raises:
            DamagedError: it cannot be read, or is not what was saved.
            ConfigError: the iterator is over other documents.
            OSError: it may be good, but this process cannot get at it.
        """
        items = {} if iterator is None else {"data": StreamsRestore(iterator)}
        with quiet(), damage():
            restored = self._manager.restore(
                step,
                args=ocp.args.Composite(state=_restore(state), memory=ocp.args.JsonRestore(), **items),
            )
            memory = unseal(restored["memory"]["sealed"])
            compare(memory["checksums"], restored["state"])
            if restored["state"].step != step:
                raise DamagedError(f"it is of step {int(restored['state'].step)}")
            return restored["state"], memory["loop"]

    def restore_state(self, step: int, state: TrainState) -> TrainState:
        """The state alone, as it is: without a look at its checksums, which what others wrote does not have."""
        return self._manager.restore(step, args=ocp.args.Composite(state=_restore(state)))["state"]

    def close(self) -> None:
        """Waits until what was started is on disk. Raises ConfigError if it could not be written."""
        self.wait()
        self._manager.close()


def _restore(state: TrainState) -> ocp.args.PyTreeRestore:
    """The whole of a state, each device reading its shards; an array of another shape is refused."""
    return ocp.args.PyTreeRestore(state, restore_args=ocp.checkpoint_utils.construct_restore_args(state))


@contextlib.contextmanager
def errors_said_once() -> Iterator[None]:
    """Without the tracebacks that Orbax's threads log of what is raised as well, and TensorStore of what comes late."""

    def keep(record: logging.LogRecord) -> bool:
        return not (record.exc_info and "orbax" in record.pathname)

    def late(unraisable: Any) -> None:
        if str(unraisable.exc_value) != "Event loop is closed":
            hook(unraisable)

    hook, sys.unraisablehook = sys.unraisablehook, late
    absl_logging.get_absl_logger().addFilter(keep)
    try:
        yield
    finally:
        absl_logging.get_absl_logger().removeFilter(keep)
        sys.unraisablehook = hook


class _LowestLoss(preservation_policy.PreservationPolicy):
    """Keeps the checkpoint with the lowest held-out loss, which ``metrics.jsonl`` remembers from one start to the next.

    (Orbax's BestN asks for metrics of Orbax's own, a second place for the same number.)
    """

    def __init__(self, workdir: epath.Path):
        self.losses: dict[int, float | None] = {
            row["step"]: row["loss"] for row in read_rows(workdir / METRICS) if row["kind"] == "heldout/all"
        }

    def should_preserve(
        self, checkpoints: Sequence[preservation_policy.PolicyCheckpointInfo], *, context: Any
    ) -> Sequence[bool]:
        del context
        losses = {info.step: self.losses.get(info.step) for info in checkpoints}
        known = {step: loss for step, loss in losses.items() if loss is not None and np.isfinite(loss)}
        best = min(known, key=lambda step: known[step]) if known else None
        return [info.step == best for info in checkpoints]


@contextlib.contextmanager
def _said_in_a_sentence(workdir: epath.Path, manager: ocp.CheckpointManager | None) -> Iterator[None]:
    """An error of writing, as a sentence with the step from which the run can go on."""
    try:
        yield
    except ConfigError:
        raise
    except Exception as error:
        steps = complete_steps(workdir)
        last = f"the newest good checkpoint is of step {max(steps)}" if steps else "there is no checkpoint yet"
        what = "a checkpoint could not be written" if manager else "cannot be used"
        raise ConfigError(
            f"--workdir={workdir}: {what} ({first_line(error)}); {last}; "
            "make room or repair it, and the same command goes on from there"
        ) from error


def complete_steps(workdir: epath.Path) -> list[int]:
    """Steps of the checkpoints that were written to their end."""
    folder = workdir / "checkpoints"
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    return sorted(int(name) for name in names if re.fullmatch("[0-9]+", name))
