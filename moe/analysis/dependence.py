"""Mutual information of the first expert and a label (domain, token id, syntax class), against permutations of rows.

Neighbouring tokens are not independent samples: experts and labels are both autocorrelated along a text. A null
distribution that permutes single tokens would find a dependence between any two such sequences. So whole rows of labels
are permuted, each rotated by a random offset, which preserves the autocorrelation within rows.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np
from scipy import special


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
        """Mean of ``nmi`` over permutations, with the entropies as observed."""
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
    x: np.ndarray, y: np.ndarray, rows: np.ndarray, *, shuffles: int, rng: np.random.Generator
) -> Dependence:
    """Measures the mutual information of x and the label y, against permutations of the rows of labels.

    Args:
        x: [n] non-negative integers in reading order: first experts.
        y: [n] labels; tokens with a negative one are ignored.
        rows: [n] numbers of the tokens' rows. Rows are exchangeable, tokens of a row are not.
        shuffles: permutations.
        rng: random generator of the permutations.

    Raises:
        ValueError: no token has a label.
    """
    counted = y >= 0
    if not counted.any():
        raise ValueError("dependence: needs a token with a label")
    x = np.unique(x, return_inverse=True)[1]
    y = np.where(counted, np.unique(y[counted], return_inverse=True)[1][np.cumsum(counted) - 1], -1)
    observed = mutual_information(x[counted], y[counted])
    null = np.empty(shuffles)
    for i, labels in enumerate(_permuted(y, rows, shuffles, rng)):
        null[i] = mutual_information(x[labels >= 0], labels[labels >= 0])
    reached = int((null >= observed * (1 - 1e-12)).sum())  # equal tables may differ by rounding
    return Dependence(
        information=observed,
        x_entropy=_entropy(x[counted]),
        y_entropy=_entropy(y[counted]),
        null_mean=float(null.mean()),
        null_std=float(np.std(null, ddof=1)) if shuffles > 1 else 0.0,
        p_value=(1 + reached) / (1 + shuffles),
        samples=int(counted.sum()),
        values=len(np.unique(y[counted])),
    )


def _permuted(y: np.ndarray, rows: np.ndarray, shuffles: int, rng: np.random.Generator) -> Iterator[np.ndarray]:
    """Yield labels [n] that come from another row, rotated by a random offset; −1 where that row has no token."""
    _, row, lengths = np.unique(rows, return_inverse=True, return_counts=True)
    order = np.argsort(row, kind="stable")
    column = np.empty(len(y), np.int64)
    column[order] = np.arange(len(y)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    longest = int(lengths.max())
    table = np.full((len(lengths), longest), -1)
    table[row, column] = y
    for _ in range(shuffles):
        source, offset = rng.permutation(len(lengths)), rng.integers(longest, size=len(lengths))
        yield table[source[row], (column + offset[row]) % longest]


def mutual_information(x: np.ndarray, y: np.ndarray) -> float:
    """Plug-in estimate of I(x;y) in nats, for [n] non-negative integers: H(x) + H(y) - H(x,y)."""
    if not len(x):
        return 0.0
    joint = np.bincount(x.astype(np.int64) * (int(y.max()) + 1) + y)
    return max(_entropy(x) + _entropy(y) - _entropy_of(joint), 0.0)


def frequent(labels: np.ndarray, at_least: int) -> np.ndarray:
    """[n] bool: the labels with at least that many occurrences among these n."""
    _, number, counts = np.unique(labels, return_inverse=True, return_counts=True)
    return counts[number] >= at_least


def _entropy(values: np.ndarray) -> float:
    return _entropy_of(np.bincount(values))


def _entropy_of(counts: np.ndarray) -> float:
    return float(special.entr(counts / counts.sum()).sum())
