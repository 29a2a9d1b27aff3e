"""Paired differences over seeds, with intervals.

In: one number per seed and arm. Out: a mean difference, its 95 % interval and p-value by Student's t on the paired
differences, and n. A seed is a pair: both arms saw the same text in the same order and, where shapes allow, the same
initial weights.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence

import numpy as np
import scipy.stats
from numpy.typing import ArrayLike

CONFIDENCE = 0.95


@dataclasses.dataclass(frozen=True)
class Effect:
    """A mean over seeds and what is known of it.

    Attributes:
        mean: of the per-seed values.
        low: lower end of the 95 % interval.
        high: upper end.
        p: two-sided, against a mean of zero.
        n: seeds.
    """

    mean: float
    low: float
    high: float
    p: float
    n: int

    def __str__(self) -> str:
        return f"{self.mean:+.4f} [{self.low:+.4f}, {self.high:+.4f}], p = {self.p:.2g}, n = {self.n}"


def effect(values: ArrayLike) -> Effect:
    """Of one value per seed, against zero. Values that are not finite are left out, and n says so.

    With fewer than two seeds the interval is infinite: nothing is decided by one seed.
    """
    kept = np.asarray(values, np.float64)
    kept = kept[np.isfinite(kept)]
    n = len(kept)
    if n < 2:
        return Effect(float(kept[0]) if n else math.nan, -math.inf, math.inf, 1.0, n)
    mean, error = float(kept.mean()), float(kept.std(ddof=1)) / math.sqrt(n)
    if error == 0.0:  # equal in every seed
        return Effect(mean, mean, mean, 1.0 if mean == 0 else 0.0, n)
    half = float(scipy.stats.t.ppf(0.5 + CONFIDENCE / 2, n - 1)) * error
    p = 2 * float(scipy.stats.t.sf(abs(mean) / error, n - 1))
    return Effect(mean, mean - half, mean + half, p, n)


def variance_ratio(first: ArrayLike, second: ArrayLike) -> tuple[float, float]:
    """(variance of first / variance of second, one-sided p of its being below 1), by the F test on two independent
    samples."""
    a, b = np.asarray(first, np.float64), np.asarray(second, np.float64)
    ratio = float(np.var(a, ddof=1) / np.var(b, ddof=1))
    return ratio, float(scipy.stats.f.cdf(ratio, len(a) - 1, len(b) - 1))


def steps_to_reach(curve: Sequence[tuple[int, float]], loss: float) -> float:
    """The step at which a falling curve first reaches a loss, linear between evaluations; inf if it never does."""
    for (before, high), (step, low) in itertools.pairwise(curve):
        if low <= loss:
            return step if high <= low else before + (step - before) * max(0.0, (high - loss) / (high - low))
    return math.inf


def at(curve: Sequence[tuple[float, float]], x: float) -> float:
    """A curve's value at x, linear between points."""
    xs, ys = zip(*curve, strict=True)
    return float(np.interp(x, xs, ys))
