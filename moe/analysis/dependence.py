"""Mutual information of the first expert and a label (domain, token id, syntax class), against permutations."""

from __future__ import annotations

import dataclasses

import numpy as np
from scipy import stats

from moe.analysis.permutation import permutation_test


@dataclasses.dataclass(frozen=True)
class Dependence:
    """Mutual information of two discrete variables, and the same after permutations. Entropies in nats.

    The plug-in estimate is biased upward, by about (|x| − 1)(|y| − 1) / 2n; the bias is large for many rare values such
    as token ids. The null has the same bias, so compare observed − null.

    Attributes:
        information: I(x;y).
        x_entropy: H(x), the experts' entropy.
        y_entropy: H(y), the label's entropy.
        null_mean: mean of I over permutations.
        null_std: standard deviation of I over permutations.
        p_value: one-sided, from the permutations.
        samples: n.
        values: number of different labels.
    """

    information: float
    x_entropy: float
    y_entropy: float
    null_mean: float
    null_std: float
    p_value: float
    samples: int
    values: int

    def _over(self, information: float, entropy: float) -> float:
        return information / entropy if entropy > 0 else 0.0

    @property
    def nmi(self) -> float:
        """2 I / (H(x) + H(y)), in [0,1]."""
        return self._over(self.information, (self.x_entropy + self.y_entropy) / 2)

    @property
    def nmi_null(self) -> float:
        """Mean of ``nmi`` over permutations (of units of equal size, which leave the entropies unchanged)."""
        return self._over(self.null_mean, (self.x_entropy + self.y_entropy) / 2)

    @property
    def nmi_null_std(self) -> float:
        """Standard deviation of ``nmi`` over permutations."""
        return self._over(self.null_std, (self.x_entropy + self.y_entropy) / 2)

    @property
    def nmi_debiased(self) -> float:
        """nmi − nmi_null."""
        return self.nmi - self.nmi_null

    @property
    def explained(self) -> float:
        """(I − null) / H(x): share of the expert's entropy explained by the label.

        The denominator is the same for every label, so labels of few and of many values are comparable; nmi is low for
        any label whose entropy is far from H(x).
        """
        return self._over(self.information - self.null_mean, self.x_entropy)


def dependence(
    x: np.ndarray,
    y: np.ndarray,
    *,
    shuffles: int,
    rng: np.random.Generator,
    units: np.ndarray | None = None,
) -> Dependence:
    """Measures the mutual information of x and the label y, against permutations of the labels.

    Args:
        x: [n] non-negative integers: first experts.
        y: [n] non-negative integers: labels.
        shuffles: permutations.
        rng: random generator of the permutations.
        units: [n] numbers of the exchangeable units, all tokens of which have one label. A domain is a property of a
            whole row, so its label is permuted over rows. None: tokens are exchangeable.

    Raises:
        ValueError: two tokens of a unit have different labels.
    """
    x, y = (np.unique(values, return_inverse=True)[1] for values in (x, y))
    if units is None:
        number, labels = np.arange(len(y)), y
    else:
        _, first, number = np.unique(units, return_index=True, return_inverse=True)
        labels = y[first]
        if not np.array_equal(labels[number], y):
            raise ValueError("dependence: all tokens of a unit must have the same label")

    def information(permuted: np.ndarray) -> float:
        return mutual_information(x, permuted[number])

    test = permutation_test(labels, information, permutations=shuffles, rng=rng)
    return Dependence(
        information=test.observed,
        x_entropy=_entropy(x),
        y_entropy=_entropy(y),
        null_mean=test.mean,
        null_std=test.std,
        p_value=test.p_value,
        samples=len(x),
        values=len(np.unique(y)),
    )


def mutual_information(x: np.ndarray, y: np.ndarray) -> float:
    """Plug-in estimate of I(x;y) in nats, for [n] non-negative integers: H(x) + H(y) - H(x,y)."""
    joint = np.bincount(x.astype(np.int64) * (int(y.max()) + 1) + y)
    return max(_entropy(x) + _entropy(y) - float(stats.entropy(joint)), 0.0)


def frequent(labels: np.ndarray, at_least: int) -> np.ndarray:
    """[n] bool: the labels with at least that many occurrences among these n."""
    _, number, counts = np.unique(labels, return_inverse=True, return_counts=True)
    return counts[number] >= at_least


def _entropy(values: np.ndarray) -> float:
    return float(stats.entropy(np.bincount(values)))
