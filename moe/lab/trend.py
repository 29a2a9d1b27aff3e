"""Line of a contrast over the logarithm of a size, with intervals over seeds, and what it predicts for another size."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

import numpy as np
import scipy.stats

from moe.lab.inference import ALPHA


@dataclasses.dataclass(frozen=True)
class Line:
    """Least squares of one value per run on log size; runs of different sizes have different seeds' data.

    Attributes:
        slope: change of the value when the size grows by a factor of e.
        half_width: of the slope's 95 % interval, with n - 2 degrees of freedom.
        n: runs.
    """

    slope: float
    half_width: float
    n: int
    _centre: tuple[float, float]  # mean log size, mean value
    _spread: float  # residual standard deviation
    _squares: float  # sum of squared deviations of log size

    def predict(self, size: float, seeds: int) -> tuple[float, float]:
        """(value at a size, half-width of the 95 % prediction interval of the mean of so many new runs)."""
        distance = math.log(size) - self._centre[0]
        variance = 1 / seeds + 1 / self.n + distance**2 / self._squares
        return self._centre[1] + self.slope * distance, _quantile(self.n) * self._spread * math.sqrt(variance)


def fit(values: Mapping[float, Sequence[float]]) -> Line:
    """Fit values by size.

    Raises:
        ValueError: fewer than two sizes, or fewer than three runs.
    """
    x = np.asarray([math.log(size) for size, found in values.items() for _ in found])
    y = np.asarray([value for found in values.values() for value in found], float)
    if len(set(x)) < 2 or len(x) < 3:
        raise ValueError(f"{len(set(x))} sizes with {len(x)} runs: a line needs two sizes and three runs")
    squares = float(((x - x.mean()) ** 2).sum())
    slope = float(((x - x.mean()) * y).sum()) / squares
    residuals = y - y.mean() - slope * (x - x.mean())
    spread = math.sqrt(float((residuals**2).sum()) / (len(x) - 2))
    half = _quantile(len(x)) * spread / math.sqrt(squares)
    return Line(slope, half, len(x), (float(x.mean()), float(y.mean())), spread, squares)


def _quantile(runs: int) -> float:
    return float(scipy.stats.t.ppf(1 - ALPHA / 2, runs - 2))
