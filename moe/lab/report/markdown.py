"""Cells of a report's tables."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence

import numpy as np

from moe.lab import inference
from moe.lab.table import Table


def mean_sd(values: Sequence[float]) -> str:
    """Mean ± standard deviation; a dash without values."""
    if not len(values):
        return "–"
    spread = f" ± {np.std(values, ddof=1):.4f}" if len(values) > 1 else ""
    return f"{np.mean(values):.4f}{spread}"


def loss_cell(found: Table, variant: str, steps: int) -> str:
    """Mean ± standard deviation of the primary loss over finished runs, and how many diverged."""
    losses = found.losses(variant, steps).values()
    finite = [loss for loss in losses if math.isfinite(loss)]
    diverged = f", {len(losses) - len(finite)} diverged" if len(finite) < len(losses) else ""
    return f"{mean_sd(finite)} (n = {len(losses)}{diverged})"


def share_cell(losses: Mapping[int, float], base: Mapping[int, float], whole: Mapping[int, float]) -> str:
    """Share of the difference between two arms that a third one makes up, from losses by seed, on the seeds of all
    three.

    A dash without common seeds; no interval where the difference between the two is not significant.
    """
    seeds = sorted(losses.keys() & base.keys() & whole.keys())
    found = inference.share([losses[s] - base[s] for s in seeds], [whole[s] - base[s] for s in seeds])
    if not math.isfinite(found.mean) or found.mean == 0:  # 0 for the baseline itself
        return "–" if found.mean else "0%"
    interval = f"[{found.low:.0%}, {found.high:.0%}]" if math.isfinite(found.low) else "without bounds"
    return f"{found.mean:.0%} {interval}, n = {found.n}"


def share_note(base: str, whole: str, about: str = "") -> str:
    """Sentence on what :func:`share_cell` shows; ``about``: what the whole is."""
    named = f"{whole} ({about})" if about else whole
    return (
        f"Share: the part of the difference between {base} and {named} that an arm makes up, on the seeds that all "
        "three have, with Fieller's interval."
    )


def spans(numbers: Sequence[int]) -> str:
    """Whole numbers as spans: ``5 to 9, 100``."""
    groups = itertools.groupby(enumerate(sorted(numbers)), lambda pair: pair[1] - pair[0])
    found = [[number for _, number in group] for _, group in groups]
    return ", ".join(f"{span[0]}" if len(span) == 1 else f"{span[0]} to {span[-1]}" for span in found)
