"""A law of the loss in the number of experts and training tokens, fitted to a suite of both.

log L = d + a·log D + b·log E + c·log D·log E: the bilinear form of Clark et al. 2022 (equation 2) with tokens D in the
place of parameters, which are the same for all arms. c > 0: experts help less the longer the training.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

import numpy as np

NAMES = ("d", "a", "b", "c")


@dataclasses.dataclass(frozen=True)
class Law:
    """A least-squares fit.

    Attributes:
        coefficients: d, a, b, c.
        errors: their standard errors; NaN without a spare point.
        residuals: (experts, tokens) → observed less fitted log loss.
        sd: residual standard deviation of the log loss.
    """

    coefficients: tuple[float, ...]
    errors: tuple[float, ...]
    residuals: Mapping[tuple[int, int], float]
    sd: float

    def loss(self, experts: int, tokens: int) -> float:
        """Loss that the law gives."""
        return math.exp(float(_design([(experts, tokens)])[0] @ np.asarray(self.coefficients)))


def fit(losses: Mapping[tuple[int, int], float]) -> Law | None:
    """The law of (experts, tokens) → mean loss; None if the points do not determine it."""
    points = list(losses)
    design = _design(points)
    if len(points) < len(NAMES) or np.linalg.matrix_rank(design) < len(NAMES):
        return None
    observed = np.log([losses[point] for point in points])
    solution = np.linalg.lstsq(design, observed)[0]
    residuals = observed - design @ solution
    spare = len(points) - len(NAMES)
    variance = float(residuals @ residuals) / spare if spare else math.nan
    errors = np.sqrt(variance * np.diag(np.linalg.inv(design.T @ design)))
    return Law(tuple(solution), tuple(errors), dict(zip(points, residuals, strict=True)), math.sqrt(variance))


def _design(points: list[tuple[int, int]]) -> np.ndarray:
    experts, tokens = np.log(np.asarray(points, float)).T
    return np.stack([np.ones_like(tokens), tokens, experts, tokens * experts], axis=1)
