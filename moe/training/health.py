"""Warnings about skipped updates, loss spikes and dead experts.

They depend on the logged metrics alone, so that a resumed run gives the same warnings.
"""

from __future__ import annotations

from typing import Any

import numpy as np

HISTORY = 64  # number of recent losses in the running median
MIN_HISTORY = 16  # losses needed before a spike is reported


class Health:
    """Running statistics of a run; they are saved in its checkpoints."""

    def __init__(self, spike_sigmas: float, rows_per_step: int, memory: dict[str, Any] | None = None):
        """
        Args:
            spike_sigmas: report a loss this many deviations above the running median; 0: never.
            rows_per_step: B, to compute positions in the data.
            memory: result of :meth:`memory` from a checkpoint.
        """
        self._sigmas, self._rows = spike_sigmas, rows_per_step
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
        first = (at - 1) * self._rows  # step n always takes the n-th batch
        text = (
            f"step {at}: loss {loss}, gradient norm {norm}: the update is skipped "
            f"(rows {first} to {first + self._rows - 1} of the run's data)"
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
        new = [pair for pair in dead if pair not in self._dead]
        self._dead = dead
        if not new:
            return []
        shown = ", ".join(f"{layer}/{expert}" for layer, expert in new[:8]) + (", ..." if len(new) > 8 else "")
        text = (
            f"no token in the last {steps} steps for {len(new)} more of {load.size} experts (MoE layer/expert {shown})"
        )
        return [{"what": "dead", "experts": new, "text": text}]
