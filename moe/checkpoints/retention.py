"""Which checkpoints of a run are kept, beside the newest of all and the multiples of a number of steps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from etils import epath
from orbax.checkpoint.checkpoint_managers import preservation_policy

from moe.system.metrics_files import METRICS, iterate_rows


class LowestLoss(preservation_policy.PreservationPolicy):
    """Keep the checkpoint with the lowest held-out loss, as recorded in ``metrics.jsonl``.

    Orbax's own BestN would store the same number a second time.
    """

    def __init__(self, workdir: epath.Path):
        rows = iterate_rows(workdir / METRICS, "heldout/all")
        self.losses: dict[int, float | None] = {row["step"]: row["loss"] for row in rows}

    def should_preserve(
        self, checkpoints: Sequence[preservation_policy.PolicyCheckpointInfo], *, context: Any
    ) -> Sequence[bool]:
        """For each checkpoint, whether it is the best."""
        del context
        losses = {info.step: self.losses.get(info.step) for info in checkpoints}
        finite = {step: loss for step, loss in losses.items() if loss is not None and np.isfinite(loss)}
        best = min(finite, key=lambda step: finite[step]) if finite else None
        return [info.step == best for info in checkpoints]


class NewestRegular(preservation_policy.PreservationPolicy):
    """Keep the newest checkpoints at multiples of ``save_every`` steps, also where interruptions have saved newer ones.

    So a run that was interrupted rolls back to the same step as one that was not.
    """

    def __init__(self, keep: int, save_every: int):
        self._keep, self._save_every = keep, save_every

    def should_preserve(
        self, checkpoints: Sequence[preservation_policy.PolicyCheckpointInfo], *, context: Any
    ) -> Sequence[bool]:
        """For each checkpoint, whether it is one of them."""
        del context
        regular = sorted(info.step for info in checkpoints if info.step % self._save_every == 0)
        return [info.step in regular[-self._keep :] for info in checkpoints]
