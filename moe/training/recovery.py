"""Warnings about skipped updates, loss spikes and dead experts; rollback after a streak of skipped updates.

Warnings depend only on the logged metrics, so that a resumed run gives the same ones.
"""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from moe.checkpoints.integrity import DamagedError
from moe.checkpoints.manager import Checkpoints
from moe.config import ConfigError, TrainConfig
from moe.models.state import TrainState, continue_at
from moe.training.step import Program

HISTORY = 64  # number of recent losses in the running median
MIN_HISTORY = 16  # losses needed before a spike is reported


class Health:
    """Running statistics of a run; they are saved in its checkpoints."""

    def __init__(self, spike_sigmas: float, train: TrainConfig, memory: dict[str, Any] | None = None):
        """
        Args:
            spike_sigmas: report a loss this many deviations above the running median; 0: never.
            train: rows of every step, to compute positions in the data.
            memory: result of :meth:`memory` from a checkpoint.
        """
        self._sigmas = spike_sigmas
        self._train = train
        self._losses: list[float] = list((memory or {}).get("losses", ()))
        self._dead: list[list[int]] = list((memory or {}).get("dead", ()))
        self.skipped_in_a_row = 0  # at the last step seen

    def memory(self) -> dict[str, Any]:
        """State as JSON, for a checkpoint."""
        return {"losses": self._losses, "dead": self._dead}

    def look(self, step: int, steps: list[dict[str, Any]], row: dict[str, Any]) -> list[dict[str, Any]]:
        """Warnings of a logged row, in step order.

        Args:
            step: step of the row, which is the last of the steps.
            steps: metrics of each step since the previous row.
            row: their mean.

        Returns:
            dicts with ``what`` (skipped, spike or dead), numbers, and a readable ``text``.
        """
        warnings = []
        for at, metrics in enumerate(steps, start=step - len(steps) + 1):
            if metrics["skipped"]:
                self.skipped_in_a_row += 1
                warnings.append(self._skipped(at, metrics))
                continue
            self.skipped_in_a_row = 0
            warnings += self._spike(at, metrics["cross_entropy"])
        return warnings + self._newly_dead(row.get("expert_load"), len(steps))

    def _skipped(self, at: int, metrics: dict[str, Any]) -> dict[str, Any]:
        loss, norm = metrics["loss"], metrics["gradient_norm"]
        first, after = self._train.rows_until(at - 1), self._train.rows_until(at)  # step n takes the n-th batch
        text = (
            f"step {at}: loss {loss}, gradient norm {norm}: the update is skipped "
            f"(rows {first} to {after - 1} of the run's data)"
        )
        return {"what": "skipped", "at": at, "first_row": first, "loss": loss, "gradient_norm": norm, "text": text}

    def _spike(self, at: int, loss: float) -> list[dict[str, Any]]:
        warnings = []
        if len(self._losses) >= MIN_HISTORY and self._sigmas:
            median = float(np.median(self._losses))
            # 1.4826 times the median absolute deviation estimates sigma of a normal distribution, robust to earlier
            # spikes.
            sigma = 1.4826 * float(np.median(np.abs(np.subtract(self._losses, median))))
            if loss > median + self._sigmas * sigma > median:
                text = (
                    f"step {at}: loss {loss:.4f} is {(loss - median) / sigma:.0f} sigma above its median {median:.4f}"
                )
                warnings.append(
                    {"what": "spike", "at": at, "loss": loss, "median": median, "sigma": sigma, "text": text}
                )
        self._losses = [*self._losses, loss][-HISTORY:]
        return warnings

    def _newly_dead(self, expert_load: Any, steps: int) -> list[dict[str, Any]]:
        """(MoE layer, expert) pairs that received no token in this row but did in the previous one."""
        if expert_load is None:
            return []
        load = np.asarray(expert_load)
        dead = np.argwhere(load == 0).tolist()
        known = set(map(tuple, self._dead))  # of thousands in a large model
        new = [pair for pair in dead if tuple(pair) not in known]
        self._dead = dead
        if not new:
            return []
        shown = ", ".join(f"{layer}/{expert}" for layer, expert in new[:8]) + (", ..." if len(new) > 8 else "")
        text = (
            f"no token in the last {steps} steps for {len(new)} more of {load.size} experts (MoE layer/expert {shown})"
        )
        return [{"what": "dead", "experts": new, "text": text}]


class Recovery:
    """Rolls back to an earlier checkpoint when too many updates in a row are skipped."""

    def __init__(self, program: Program, checkpoints: Checkpoints):
        self._program = program
        self._checkpoints = checkpoints
        self._tried: int | None = None  # checkpoint that this streak was already rolled back to
        self._handled = 0  # skipped updates of this streak that led to that rollback
        self._at = 0  # step of that rollback

    def after(self, step: int, skipped: int, state: TrainState) -> tuple[TrainState, list[dict[str, Any]]]:
        """Return the state to continue with after a logged step, and a warning if it was rolled back.

        Step number and data continue where they are, so that the bad batches are left behind. If the streak continues,
        the next rollback goes one checkpoint further back.

        Args:
            skipped: consecutive skipped updates, up to this step.
            state: deleted if another is restored.

        Raises:
            DivergedError: train.on_skipped_steps is "stop", or no good checkpoint is left.
        """
        config = self._program.config.train
        first = step - skipped + 1
        if first > self._at:  # no streak, or one that began after the last rollback
            self._tried, self._handled = None, 0
        if skipped - self._handled < config.max_skipped_steps:
            return state, []
        trouble = f"step {step}: the last {skipped} updates were skipped, from step {first} on"
        remedy = "look at the rows of kind 'warning' in metrics.jsonl; a lower optimizer.learning_rate may help"
        if config.on_skipped_steps == "stop":
            raise DivergedError(f"{trouble}, and train.on_skipped_steps is 'stop': {remedy}")
        self._checkpoints.wait()
        for leaf in jax.tree.leaves(state.stored):  # a device may lack room for two states
            leaf.delete()
        for saved in self._checkpoints.before(self._tried or first, config.save_every):
            try:
                good, _ = self._checkpoints.restore(saved, self._program.state)
            except DamagedError as error:
                self._checkpoints.start_again(saved, error)
                continue
            self._tried = saved
            self._handled = skipped
            self._at = step
            text = f"{trouble}: parameters and optimizer are those of step {saved} again"
            return continue_at(state.restored(good), step), [{"what": "rollback", "to": saved, "text": text}]
        raise DivergedError(f"{trouble}, and no checkpoint is left to roll back to: {remedy}")


class DivergedError(ConfigError):
    """A run that cannot go on, or end, because its updates or its parameters are not finite."""


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
