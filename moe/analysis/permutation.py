"""Permutation test of a statistic, by SciPy."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
from scipy import stats


@dataclasses.dataclass(frozen=True)
class PermutationTest:
    """A statistic, its distribution over permutations of the data, and the one-sided p-value."""

    observed: float
    mean: float
    std: float
    p_value: float


def permutation_test(
    values: np.ndarray, statistic: Callable[[np.ndarray], float], *, permutations: int, rng: np.random.Generator
) -> PermutationTest:
    """Compares statistic(values) with its distribution over permutations; exact if few permutations are distinct.

    Args:
        values: [n], the exchangeable values.
        statistic: [n] → number; large values count against the null hypothesis.
        permutations: number of random permutations.
        rng: random generator of the permutations.
    """
    test = stats.permutation_test(
        (values,),
        statistic,
        permutation_type="pairings",
        n_resamples=permutations,
        batch=1,
        alternative="greater",
        rng=rng,
    )
    null = test.null_distribution
    std = float(np.std(null, ddof=1)) if len(null) > 1 else 0.0
    return PermutationTest(float(test.statistic), float(np.mean(null)), std, float(test.pvalue))
