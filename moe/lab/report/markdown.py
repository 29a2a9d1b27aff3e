"""Cells of a report's tables."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from moe.lab.table import Table


def mean_sd(values: Sequence[float]) -> str:
    """Mean ± standard deviation; a dash without values."""
    if not len(values):
        return "–"
    spread = f" ± {np.std(values, ddof=1):.4f}" if len(values) > 1 else ""
    return f"{np.mean(values):.4f}{spread}"


def loss_cell(found: Table, variant: str, steps: int) -> str:
    """Mean ± standard deviation of the primary loss over finished runs, and how many diverged."""
    losses = [found.record(variant, steps, seed).primary_loss for seed in found.seeds(steps, variant)]
    finite = [loss for loss in losses if math.isfinite(loss)]
    diverged = f", {len(losses) - len(finite)} diverged" if len(finite) < len(losses) else ""
    return f"{mean_sd(finite)} (n = {len(losses)}{diverged})"
