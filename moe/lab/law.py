"""A law of the loss in the number of experts and the size of the model, or its training tokens.

L = L∞ + exp(d + a·log N + b·log E + c·log N·log E): the bilinear form of Clark et al. 2022 (equation 2), where N is the
number of parameters of the model with one expert; tokens D take its place where all arms have one size. It is added to
an irreducible loss L∞, without which a power law does not describe several horizons. c > 0: experts help less the
larger the model, or the longer the training.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import scipy.optimize

NAMES = ("d", "a", "b", "c")


@dataclasses.dataclass(frozen=True)
class Law:
    """A least-squares fit of the log of the reducible loss.

    Attributes:
        floor: L∞, between 0 and the lowest loss.
        coefficients: d, a, b, c; without b and c, or without a and c, where the points have one number of experts or
            one size, by :attr:`names`.
        names: of the coefficients.
        errors: standard errors of the coefficients at this floor; NaN without residual degrees of freedom.
        residuals: (experts, parameters or tokens) → observed less fitted loss.
        sd: residual standard deviation of the loss; NaN without residual degrees of freedom.
    """

    floor: float
    coefficients: tuple[float, ...]
    names: tuple[str, ...]
    errors: tuple[float, ...]
    residuals: Mapping[tuple[int, int], float]
    sd: float


def fit(losses: Mapping[tuple[int, int], float]) -> Law | None:
    """The law of (experts, parameters or tokens) → mean loss; None if the points do not determine it.

    The floor is the one with the smallest sum of squared residuals of the loss, by a bounded search in which the other
    coefficients follow by linear least squares; with as many points as coefficients it is 0.
    """
    points, observed = list(losses), np.asarray(list(losses.values()), float)
    names, design = _design(points)
    if len(points) < len(names) or np.linalg.matrix_rank(design) < len(names):
        return None
    spare = len(points) - len(names) - 1

    def misfit(floor: float) -> float:
        return float(np.sum(_residuals(design, observed, floor)[1] ** 2))

    floor = 0.0
    if spare >= 0:
        search: Any = scipy.optimize.minimize_scalar(
            misfit, bounds=(0.0, float(observed.min()) * 0.999), method="bounded"
        )
        floor = float(search.x) if search.fun < misfit(0.0) else 0.0
    solution, residuals = _residuals(design, observed, floor)
    variance = float(residuals @ residuals) / spare if spare > 0 else math.nan
    # The fit is of the log of the reducible loss, whose derivative with respect to the loss is 1 / (L - L∞).
    scale = float(np.mean(1 / (observed - floor) ** 2))
    errors = np.sqrt(variance * scale * np.diag(np.linalg.inv(design.T @ design)))
    pairs = dict(zip(points, residuals.tolist(), strict=True))
    return Law(floor, tuple(solution), names, tuple(errors), pairs, math.sqrt(variance))


#: Bootstrap resamples, each of as many seeds with replacement.
_RESAMPLES = 200


def intervals(seeds: Sequence[Mapping[tuple[int, int], float]]) -> dict[str, tuple[float, float]]:
    """Coefficient → 95 % interval over seeds, by the bootstrap of whole seeds; empty for fewer than three.

    Args:
        seeds: losses of every point, for each seed.
    """
    if len(seeds) < 3:
        return {}
    draws = np.random.default_rng(0).integers(len(seeds), size=(_RESAMPLES, len(seeds)))
    found = []
    for drawn in draws:
        fitted = fit({point: float(np.mean([seeds[i][point] for i in drawn])) for point in seeds[0]})
        if fitted is not None:
            found.append(dict(zip(fitted.names, fitted.coefficients, strict=True)))
    ends = {name: np.quantile([values[name] for values in found], (0.025, 0.975)) for name in found[0]} if found else {}
    return {name: (float(low), float(high)) for name, (low, high) in ends.items()}


def _residuals(design: np.ndarray, observed: np.ndarray, floor: float) -> tuple[np.ndarray, np.ndarray]:
    """(coefficients, observed less fitted loss) at a floor."""
    solution = np.linalg.lstsq(design, np.log(observed - floor))[0]
    return solution, observed - floor - np.exp(design @ solution)


def _design(points: list[tuple[int, int]]) -> tuple[tuple[str, ...], np.ndarray]:
    """Names of the coefficients that the points can determine, and the columns of their terms."""
    experts, sizes = np.log(np.asarray(points, float).reshape(-1, 2)).T
    columns = {"d": np.ones_like(sizes), "a": sizes, "b": experts, "c": sizes * experts}
    lacking = {"a", "c"} if len(set(sizes.tolist())) < 2 else set[str]()
    if len(set(experts.tolist())) < 2:
        lacking |= {"b", "c"}
    names = tuple(name for name in NAMES if name not in lacking)
    return names, np.stack([columns[name] for name in names], axis=1)
