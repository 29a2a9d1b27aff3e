"""Recovery during training: rollback after a streak of skipped updates, and errors of reading data."""

from __future__ import annotations

import contextlib
from typing import Any

import numpy as np

from moe.checkpoints.integrity import DamagedError
from moe.checkpoints.manager import Checkpoints
from moe.checkpoints.state import TrainState, continue_at
from moe.config import ConfigError
from moe.training.step import Program


class Recovery:
    """Rolls back to an earlier checkpoint when too many updates in a row are skipped."""

    def __init__(self, program: Program, checkpoints: Checkpoints):
        self._program, self._checkpoints = program, checkpoints
        self._tried: int | None = None  # checkpoint that this streak was already rolled back to
        self._handled = 0  # skipped updates of this streak that led to that rollback

    def after(self, step: int, skipped: int, state: TrainState) -> tuple[TrainState, list[dict[str, Any]]]:
        """Return the state to continue with after a logged step, and a warning if it was rolled back.

        Step number and data continue where they are, so that the bad batches are left behind. If the streak continues,
        the next rollback goes one checkpoint further back.

        Args:
            step: the logged step.
            skipped: consecutive skipped updates, up to this step.
            state: after this step.

        Raises:
            ConfigError: train.on_skipped_steps is "stop", or no good checkpoint is left.
        """
        config = self._program.config.train
        if not skipped:
            self._tried, self._handled = None, 0
        if skipped - self._handled < config.max_skipped_steps:
            return state, []
        first = step - skipped + 1
        trouble = f"step {step}: the last {skipped} updates were skipped, from step {first} on"
        remedy = "look at the rows of kind 'warning' in metrics.jsonl; a lower optimizer.learning_rate may help"
        if config.on_skipped_steps == "stop":
            raise ConfigError(f"{trouble}, and train.on_skipped_steps is 'stop': {remedy}")
        self._checkpoints.wait()
        for saved in self._checkpoints.before(self._tried or first, config.save_every):
            with contextlib.suppress(DamagedError):
                good, _ = self._checkpoints.restore(saved, self._program.state)
                self._tried, self._handled = saved, skipped
                text = f"{trouble}: parameters and optimizer are those of step {saved} again"
                return continue_at(state.restored(good), step), [{"what": "rollback", "to": saved, "text": text}]
        raise ConfigError(f"{trouble}, and no checkpoint is left to roll back to: {remedy}")


def next_batch(iterator: Any, step: int, checkpoints: Checkpoints) -> dict[str, np.ndarray]:
    """The batch of a step. Raises ConfigError if the data cannot be read."""
    try:
        return next(iterator)
    except (OSError, ValueError, RuntimeError, LookupError) as error:
        checkpoints.wait()
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:300]
        raise ConfigError(
            f"data.dataset: the batch of step {step} cannot be read ({reason}); restore the file or prepare the data "
            f"again, and the same command continues from step {checkpoints.latest() or 0}"
        ) from error
