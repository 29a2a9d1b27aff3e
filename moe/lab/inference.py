"""Paired differences over seeds: intervals, equivalence, variances, power, and corrections for many tests.

Arms are paired by seed: both see the same text in the same order. Differences are in nats per token unless stated
otherwise.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import scipy.optimize
import scipy.stats
from numpy.typing import ArrayLike

CONFIDENCE = 0.95
ALPHA = 1 - CONFIDENCE
POWER = 0.8
#: Largest number of seeds that :func:`seeds_needed` considers.
MOST_SEEDS = 1000
#: With fewer seeds than this the bootstrap resamples rows only.
FEW_SEEDS = 3
_BOOTSTRAP_DRAWS = 2000


@dataclasses.dataclass(frozen=True)
class Effect:
    """A mean over seeds with its interval.

    Attributes:
        mean: of the per-seed values.
        low: lower end of the 95 % interval.
        high: upper end.
        p: two-sided p-value against a mean of zero.
        n: seeds.
        sd: standard deviation over seeds; NaN for one seed.
    """

    mean: float
    low: float
    high: float
    p: float
    n: int
    sd: float = math.nan

    def __str__(self) -> str:
        if self.n < 2:
            return f"{self.mean:+.4f}, n = {self.n}: no interval"
        return f"{self.mean:+.4f} [{self.low:+.4f}, {self.high:+.4f}], n = {self.n}"


def effect(values: ArrayLike) -> Effect:
    """Mean of one value per seed with a Student's t interval.

    A value that is not finite is a diverged run and makes the mean and the interval undefined: the caller reports it as
    an outcome. One seed has no interval.
    """
    values = np.asarray(values, np.float64)
    n = len(values)
    if n == 0 or not np.isfinite(values).all():
        return Effect(math.nan, -math.inf, math.inf, 1.0, n)
    if n == 1:
        return Effect(float(values[0]), -math.inf, math.inf, 1.0, 1)
    mean, sd = float(values.mean()), float(values.std(ddof=1))
    if np.ptp(values) <= 1e-14 * abs(mean):  # equal up to rounding, of which SciPy warns
        return Effect(mean, mean, mean, 1.0 if mean == 0 else 0.0, n, 0.0)
    test: Any = scipy.stats.ttest_1samp(values, 0.0)
    interval = test.confidence_interval(CONFIDENCE)
    return Effect(mean, float(interval.low), float(interval.high), float(test.pvalue), n, sd)


def share(values: ArrayLike, wholes: ArrayLike) -> Effect:
    """Mean of ``values`` as a share of that of ``wholes``, paired by seed, with Fieller's interval (1954).

    The interval has every share r for which a paired t test does not reject a zero mean of values - r·wholes. It is
    unbounded where the mean of the wholes does not differ significantly from zero. The p-value is that of the mean of
    ``values`` against zero.
    """
    a, b = np.asarray(values, np.float64), np.asarray(wholes, np.float64)
    n = len(a)
    of_values = effect(a)
    whole = float(b.mean()) if len(b) else math.nan
    mean = of_values.mean / whole if whole else math.nan
    unbounded = Effect(mean, -math.inf, math.inf, of_values.p, n)
    if n < 2 or not (np.isfinite(a).all() and np.isfinite(b).all()):
        return unbounded
    # mean(a - r·b)² ≤ t²/n · var(a - r·b): a quadratic in r, bounded where its leading coefficient is positive.
    covariance = np.cov(a, b) * scipy.stats.t.ppf(1 - ALPHA / 2, n - 1) ** 2 / n
    square = b.mean() ** 2 - covariance[1, 1]
    middle = a.mean() * b.mean() - covariance[0, 1]
    constant = a.mean() ** 2 - covariance[0, 0]
    if square <= 0:
        return unbounded
    half = math.sqrt(max(middle**2 - square * constant, 0.0))
    return Effect(mean, (middle - half) / square, (middle + half) / square, of_values.p, n)


def smallest_detectable(sd: float, n: int) -> float:
    """Smallest mean difference that a two-sided paired t test of n seeds finds with a power of :data:`POWER`.

    Solves P(|T'| > t(1 - α/2, n - 1)) = power for T' noncentral t with noncentrality δ·√n / sd.
    """
    if n < 2 or not sd > 0:
        return math.inf if n < 2 else 0.0 if sd == 0 else math.inf
    critical = scipy.stats.t.ppf(1 - ALPHA / 2, n - 1)

    def shortfall(noncentrality: float) -> float:
        # For large noncentralities SciPy gives NaN; there the upper tail is 1 and the lower one 0.
        upper = np.nan_to_num(scipy.stats.nct.sf(critical, n - 1, noncentrality), nan=1.0)
        lower = np.nan_to_num(scipy.stats.nct.cdf(-critical, n - 1, noncentrality), nan=0.0)
        return float(upper + lower - POWER)

    noncentrality: Any = scipy.optimize.brentq(shortfall, 1e-6, 100.0)
    return float(noncentrality) * sd / math.sqrt(n)


def smallest_margin(sd: float, n: int) -> float:
    """Margin around zero that contains the 95 % interval of n seeds with probability :data:`POWER` if there is no
    difference: (t(1 - α/2, n - 1) + t((1 + power)/2, n - 1))·sd/√n (two one-sided tests, Schuirmann 1987)."""
    if n < 2:
        return math.inf
    quantiles = scipy.stats.t.ppf([1 - ALPHA / 2, (1 + POWER) / 2], n - 1)
    return float(quantiles.sum()) * sd / math.sqrt(n)


def seeds_needed(sd: float, difference: float) -> int:
    """Seeds that a paired t test needs to detect a difference; MOST_SEEDS + 1 if :data:`MOST_SEEDS` are too few."""
    for n in itertools.chain(range(2, 50), range(50, MOST_SEEDS + 1, 10)):
        if smallest_detectable(sd, n) <= abs(difference):
            return n
    return MOST_SEEDS + 1


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down adjusted p-values, in the order given (Holm 1979)."""
    order = np.argsort(p_values, kind="stable")
    adjusted, running = [0.0] * len(order), 0.0
    for rank, index in enumerate(order):
        running = max(running, min(1.0, (len(order) - rank) * p_values[index]))
        adjusted[index] = float(running)
    return adjusted


def pitman_morgan(first: ArrayLike, second: ArrayLike) -> tuple[float, float]:
    """(variance of first / variance of second, one-sided p-value for a ratio below 1) for paired samples.

    The correlation of sum and difference is zero if the two variances are equal (Pitman 1939, Morgan 1939).
    """
    a, b = np.asarray(first, np.float64), np.asarray(second, np.float64)
    ratio = float(np.var(a, ddof=1) / np.var(b, ddof=1))
    if len(a) < 3:
        return ratio, 1.0
    test: Any = scipy.stats.pearsonr(a + b, a - b, alternative="less")
    return ratio, float(test.pvalue)


def pooled(losses: Mapping[str, Mapping[int, float]], baseline: str) -> dict[str, Effect]:
    """Each arm's difference to the baseline in the model loss = arm + seed + noise, fitted to all arms at once.

    The residual variance is shared by all arms, so that few seeds still give many degrees of freedom. Arms may lack
    seeds.

    Args:
        losses: arm → seed → loss.
        baseline: arm that the others are compared with.

    Returns:
        arm → effect; empty if no degree of freedom is left.
    """
    cells = [(arm, seed, loss) for arm, by_seed in losses.items() for seed, loss in by_seed.items()]
    cells = [cell for cell in cells if math.isfinite(cell[2])]
    arms = [arm for arm in losses if arm != baseline and any(cell[0] == arm for cell in cells)]
    seeds = sorted({seed for _, seed, _ in cells})
    design = np.asarray([[arm == a for a in arms] + [seed == s for s in seeds] for arm, seed, _ in cells], float)
    observed = np.asarray([loss for *_, loss in cells])
    if not arms or len(cells) <= design.shape[1] or np.linalg.matrix_rank(design) < design.shape[1]:
        return {}
    degrees = len(cells) - design.shape[1]
    solution = np.linalg.lstsq(design, observed)[0]
    variance = float(((observed - design @ solution) ** 2).sum()) / degrees
    covariance = variance * np.linalg.inv(design.T @ design)
    found = {}
    for index, arm in enumerate(arms):
        mean, error = float(solution[index]), math.sqrt(covariance[index, index])
        half = float(scipy.stats.t.ppf(1 - ALPHA / 2, degrees)) * error
        p = 2 * float(scipy.stats.t.sf(abs(mean) / error, degrees)) if error > 0 else float(mean == 0)
        n = sum(cell[0] == arm for cell in cells)
        found[arm] = Effect(mean, mean - half, mean + half, p, n, error * math.sqrt(n))
    return found


def bootstrap(differences: ArrayLike, groups: Sequence[str]) -> tuple[float, float]:
    """95 % percentile interval of a mean difference over seeds and held-out rows, both resampled.

    Seeds are drawn with replacement unless there are fewer than three, and rows with replacement within each group,
    the same for all seeds. The statistic is the mean over groups of the mean over their rows.

    Args:
        differences: [seeds, rows] loss of an arm less that of the baseline.
        groups: domain of each row.
    """
    rng = np.random.default_rng(0)
    values = np.asarray(differences, np.float64)
    members = [np.flatnonzero(np.asarray(groups) == name) for name in dict.fromkeys(groups)]
    means = np.empty(_BOOTSTRAP_DRAWS)
    for draw in range(_BOOTSTRAP_DRAWS):
        few = len(values) < FEW_SEEDS
        seeds = np.arange(len(values)) if few else rng.integers(len(values), size=len(values))
        weights = np.bincount(seeds, minlength=len(values)) / len(values)
        over_seeds = weights @ values
        means[draw] = np.mean([over_seeds[rng.choice(rows, len(rows))].mean() for rows in members])
    low, high = np.quantile(means, [ALPHA / 2, 1 - ALPHA / 2])
    return float(low), float(high)


@dataclasses.dataclass(frozen=True)
class Censored:
    """Median of a positive quantity over seeds, for some of which it is known only to exceed a bound.

    Attributes:
        median: infinite if half of the seeds or more are censored.
        low: lower end of a distribution-free interval (order statistics).
        high: upper end; infinite if that order statistic is censored.
        coverage: exact coverage of the interval, 1 - 2·P(Binomial(n, 1/2) < k).
        censored: number of censored seeds.
        n: seeds.
    """

    median: float
    low: float
    high: float
    coverage: float
    censored: int
    n: int


def censored_median(values: Sequence[float]) -> Censored:
    """Median and exact interval from order statistics; a censored value is infinite.

    The interval is the narrowest symmetric one with at least 95 % coverage, or the whole range if there is none.
    """
    ordered, n = sorted(values), len(values)
    middle = ordered[n // 2] if n % 2 else (ordered[n // 2 - 1] + ordered[n // 2]) / 2
    best = 1
    for k in range(1, n // 2 + 1):
        if 1 - 2 * scipy.stats.binom.cdf(k - 1, n, 0.5) >= CONFIDENCE:
            best = k
    coverage = 1 - 2 * float(scipy.stats.binom.cdf(best - 1, n, 0.5)) if n > 1 else 0.0
    return Censored(middle, ordered[best - 1], ordered[n - best], coverage, sum(map(math.isinf, values)), n)


def steps_to_reach(curve: Sequence[tuple[int, float]], loss: float) -> float:
    """Step at which a falling curve first reaches a loss, linear between evaluations; infinite if it never does.

    If the first evaluation is already at or below the loss, its step is returned.
    """
    if curve and curve[0][1] <= loss:
        return curve[0][0]
    for (before, high), (step, low) in itertools.pairwise(curve):
        if low <= loss:
            return before + (step - before) * (high - loss) / (high - low)
    return math.inf


@dataclasses.dataclass(frozen=True)
class Crossing:
    """Tokens from which an arm's mean difference to the baseline is below zero.

    Attributes:
        tokens: interpolated in log tokens; NaN if the sign does not change.
        low: earliest token count that the pointwise interval allows.
        high: latest one; infinite if the difference is not shown to be below zero at the last horizon.
    """

    tokens: float
    low: float
    high: float


def crossing(tokens: Sequence[int], effects: Sequence[Effect]) -> Crossing:
    """Where the mean difference falls through zero, and where the two ends of its pointwise interval do."""

    def root(values: Sequence[float], *, missing: float) -> float:
        if values[0] <= 0:
            return 0.0
        for (t0, v0), (t1, v1) in itertools.pairwise(zip(tokens, values, strict=True)):
            if v0 > 0 >= v1:
                if not (math.isfinite(v0) and math.isfinite(v1)):
                    return float(t1)
                share = v0 / (v0 - v1)
                return math.exp(math.log(t0) + share * (math.log(t1) - math.log(t0)))
        return missing

    point = root([e.mean for e in effects], missing=math.nan)
    low = root([e.low for e in effects], missing=math.inf)
    return Crossing(point, low, root([e.high for e in effects], missing=math.inf))
