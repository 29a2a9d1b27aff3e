"""Checkpoints of a run, kept by Orbax: atomic, written in the background, restored onto whatever mesh is there.

A checkpoint at step n holds the :class:`moe.step.TrainState` after n steps, the Grain iterator's position, and a
small JSON of what the loop itself remembers. Retention: the newest ``keep_checkpoints``, and the one with the lowest
held-out loss. Nothing in a checkpoint is code, and none of it is unpickled.
"""

from __future__ import annotations

from typing import Any

import grain
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint.checkpoint_managers import preservation_policy

from moe.step import TrainState


class Checkpoints:
    """The checkpoints under ``workdir/checkpoints``."""

    def __init__(self, workdir: epath.Path, keep: int, *, read_only: bool = False):
        policy = preservation_policy.AnyPreservationPolicy(
            [
                preservation_policy.LatestN(keep),
                # Ascending order, reversed: the last one is the lowest loss.
                preservation_policy.BestN(
                    get_metric_fn=lambda metrics: metrics["heldout_loss"],
                    reverse=True,
                    n=1,
                    keep_checkpoints_without_metrics=False,
                ),
            ]
        )
        self._manager = ocp.CheckpointManager(
            workdir / "checkpoints",
            options=ocp.CheckpointManagerOptions(preservation_policy=policy, create=not read_only, read_only=read_only),
        )

    def latest(self) -> int | None:
        """Step of the newest complete checkpoint, or None."""
        return self._manager.latest_step()

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
        """
        self._manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(state),
                data=grain.checkpoint.CheckpointSave(iterator),
                memory=ocp.args.JsonSave(memory),
            ),
            metrics=None if heldout_loss is None else {"heldout_loss": heldout_loss},
            force=True,
        )

    def restore(
        self, step: int, state: TrainState, iterator: grain.DatasetIterator
    ) -> tuple[TrainState, dict[str, Any]]:
        """The state and the loop's JSON of a step; the iterator is moved to its place.

        Args:
            step: from :meth:`latest`.
            state: ShapeDtypeStructs with the shardings to restore to (:attr:`moe.step.Program.state`).
            iterator: a fresh one of the same data.
        """
        restored = self._manager.restore(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardRestore(state),
                data=grain.checkpoint.CheckpointRestore(iterator),
                memory=ocp.args.JsonRestore(),
            ),
        )
        return restored["state"], restored["memory"]

    def restore_state(self, step: int, state: TrainState) -> TrainState:
        """The state alone."""
        return self._manager.restore(step, args=ocp.args.Composite(state=ocp.args.StandardRestore(state)))["state"]

    def close(self) -> None:
        """Waits until what was started is on disk."""
        self._manager.wait_until_finished()
        self._manager.close()
