"""Cells and tables of a report."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import numpy as np

from moe.escaping import markdown_cell
from moe.lab.table import Table


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [f"| {' | '.join(map(markdown_cell, header))} |", "|" + "---|" * len(header)]
    return "\n".join(lines + [f"| {' | '.join(map(markdown_cell, row))} |" for row in rows])


def mean_sd(values: Sequence[float], digits: int = 4) -> str:
    """Mean ± standard deviation; a dash without values."""
    if not len(values):
        return "–"
    spread = f" ± {np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else ""
    return f"{np.mean(values):.{digits}f}{spread}"


def loss_cell(found: Table, variant: str, steps: int) -> str:
    """Mean ± standard deviation of the primary loss over finished runs, and how many diverged."""
    losses = [found.record(variant, steps, seed).primary_loss for seed in found.seeds(steps, variant)]
    finite = [loss for loss in losses if math.isfinite(loss)]
    diverged = f", {len(losses) - len(finite)} diverged" if len(finite) < len(losses) else ""
    return f"{mean_sd(finite)} (n = {len(losses)}{diverged})"
