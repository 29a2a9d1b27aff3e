"""Numbers going wrong: what the logged steps say of the run's health.

In: the metrics of every step, as JSON, once per logged row. Out: warnings (rows of kind "warning"), and how many
updates in a row were skipped. A function of the metrics alone, so that a resumed run warns of the same things.
"""

from __future__ import annotations

from typing import Any

import numpy as np

HISTORY = 64  # losses whose median is the running one


ENOUGH = 16  # of them, before anything is called a spike


class Health:
    """Follows a run; what it remembers between rows is in its checkpoints."""

    def __init__(self, spike_sigmas: float, rows_per_step: int, memory: dict[str, Any] | None = None):
        """
        Args:
            spike_sigmas: a loss so many deviations above the running median is a spike; 0: none is.
            rows_per_step: B, to name the place in the data.
            memory: of an earlier :meth:`memory`.
        """
        self._sigmas, self._rows = spike_sigmas, rows_per_step
        self._losses: list[float] = list((memory or {}).get("losses", ()))
        self._dead: list[list[int]] = list((memory or {}).get("dead", ()))
        self.skipped_in_a_row = 0  # at the last step seen

    def memory(self) -> dict[str, Any]:
        """JSON for a checkpoint."""
        return {"losses": self._losses, "dead": self._dead}

    def look(self, step: int, steps: list[dict[str, Any]], row: dict[str, Any]) -> list[dict[str, Any]]:
        """Warnings of a logged row, in the order of its steps.

        Args:
            step: the row's, which is that of the last of the steps.
            steps: metrics of each step since the row before.
            row: their mean.

        Returns:
            dicts with ``what`` (skipped, spike or dead), numbers, and ``text`` for people.
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
        first = (at - 1) * self._rows  # step n takes the n-th batch, whatever happened before
        text = (
            f"step {at}: loss {loss}, gradient norm {norm}: the update is skipped "
            f"(rows {first} to {first + self._rows - 1} of the run's data)"
        )
        return {"what": "skipped", "at": at, "first_row": first, "loss": loss, "gradient_norm": norm, "text": text}

    def _spike(self, at: int, loss: float) -> list[dict[str, Any]]:
        warnings = []
        if len(self._losses) >= ENOUGH and self._sigmas:
            median = float(np.median(self._losses))
            # The median absolute deviation times 1.4826 is the deviation of a normal distribution, and earlier spikes
            # hardly move it.
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
        """Pairs (MoE layer, expert) without a token in this row that had some in the row before."""
        if expert_load is None:
            return []
        load = np.asarray(expert_load)
        dead = np.argwhere(load == 0).tolist()
        new = [pair for pair in dead if pair not in self._dead]
        self._dead = dead
        if not new:
            return []
        shown = ", ".join(f"{layer}/{expert}" for layer, expert in new[:8]) + (", ..." if len(new) > 8 else "")
        text = (
            f"no token in the last {steps} steps for {len(new)} more of {load.size} experts (MoE layer/expert {shown})"
        )
        return [{"what": "dead", "experts": new, "text": text}]
