"""Which candidate of a search to compile next: predictions of rate and memory, corrected by the plans made so far.

Two Bayesian linear regressions:

- the logarithm of seconds a row over the rough guess (:func:`moe.planner.candidates.guess_seconds`), on the remat
  policy, the dispatch mode, the logarithms of the mesh's axes and of the rows a device;
- memory over its estimate (:mod:`moe.planner.fit`): a factor for what does not depend on the rows, and one for
  activations by policy, mode and whether experts exchange rows.

The next candidate has the largest expected improvement: that of its time over the best so far (Jones et al. 1998,
"Efficient Global Optimization of Expensive Black-Box Functions", equation 15), times the probability that it fits.
Until a program fits, it has the largest rate times that probability.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any

import numpy as np

from moe.dispatch.modes import CONFIG_MODES
from moe.parallel.partition_specs import REMAT_POLICIES
from moe.planner.candidates import Candidate

#: Prior standard deviations of time, in the logarithm: of the error common to all guesses, of a policy or mode, of a
#: doubling of an axis or of the rows; and of the residual.
_COMMON = 1.0
_CHOICE = 0.2
_DOUBLING = 0.1
_NOISE = 0.03

#: Prior standard deviations of memory's factors: of what does not depend on the rows, of all activations, of those of a
#: policy or mode or with an exchange; and of the residual, in units of the estimate.
_FIXED_FACTOR = 0.1
_COMMON_FACTOR = 0.1
_CHOSEN_FACTOR = 0.05
_NOISE_OF_MEMORY = 0.02

#: Assumed need over available memory of a program that does not fit, where the compiler does not state it.
_OVER = 1.15


#: Share of a normal distribution below each value.
_cumulative = np.vectorize(statistics.NormalDist().cdf, otypes=[float])


class _Regression:
    """Bayesian linear regression with a normal prior of deviation 1 for every weight."""

    def __init__(self, features: np.ndarray, noise: float):
        self._features, self._noise, self._known = features, noise, dict[int, float]()

    def learn(self, index: int, value: float) -> None:
        """Take the value of a row into account."""
        self._known[index] = value

    def predict(self) -> tuple[np.ndarray, np.ndarray]:
        """Mean and deviation of every row."""
        known = list(self._known)
        every, seen = self._features, self._features[known]
        prior = np.sum(every**2, axis=1)
        if not known:
            return np.zeros(len(every)), np.sqrt(prior)
        solved = np.linalg.solve(seen @ seen.T + self._noise**2 * np.eye(len(known)), seen @ every.T).T
        means = solved @ np.array([self._known[index] for index in known])
        return means, np.sqrt(np.maximum(prior - np.sum(solved * (every @ seen.T), axis=1), 0.0))


class Guide:
    """Order of the candidates that are not compiled yet."""

    def __init__(self, found: Sequence[Candidate], capacity: float = math.inf):
        """
        Args:
            found: candidates.
            capacity: bytes of a device's memory.
        """
        self._found, self._left, self._best = found, set(range(len(found))), math.inf
        self._times = _Regression(np.array([_features(candidate) for candidate in found]), _NOISE)
        self._guesses = np.log([_guess(candidate) for candidate in found])
        self._estimates = np.array([max(candidate.fixed + candidate.activations, 1) for candidate in found])
        shares = np.array([candidate.activations for candidate in found]) / self._estimates
        chosen = np.array([[*_chosen(candidate), candidate.config.mesh.expert > 1] for candidate in found])
        of_activations = np.column_stack([np.full(len(found), _COMMON_FACTOR), _CHOSEN_FACTOR * chosen])
        features = np.column_stack([_FIXED_FACTOR * (1 - shares), shares[:, None] * of_activations])
        self._memory, self._capacity = _Regression(features, _NOISE_OF_MEMORY), capacity

    def learn(self, index: int, plan: dict[str, Any]) -> None:
        """Take a plan, or its error, into account."""
        self._left.discard(index)
        if "error" not in plan:
            seconds = math.log(_seconds_a_row(self._found[index], plan["step_seconds"]))
            self._times.learn(index, seconds - self._guesses[index])
            self._best = min(self._best, seconds)
            if "memory_total" in plan:
                self._memory.learn(index, plan["memory_total"] / self._estimates[index] - 1)
        elif "memory_least" in plan and math.isfinite(self._capacity):
            least = max(plan["memory_least"] or _OVER * self._capacity, self._capacity) / self._estimates[index] - 1
            if least > self._memory.predict()[0][index]:  # otherwise it says nothing new
                self._memory.learn(index, least)

    def order(self) -> list[int]:
        """Candidates that are left, the most promising first."""
        means, deviations = self._memory.predict()
        spare = self._capacity / self._estimates - 1 - means
        fits = _cumulative(spare / np.hypot(deviations, _NOISE_OF_MEMORY))
        means, deviations = self._times.predict()
        seconds, deviations = means + self._guesses, np.hypot(deviations, _NOISE)
        if math.isfinite(self._best):
            ratios = (self._best - seconds) / deviations
            density = np.exp(-(ratios**2) / 2) / math.sqrt(2 * math.pi)
            gains = fits * deviations * (ratios * _cumulative(ratios) + density)
        else:
            gains = fits / np.exp(seconds)
        return sorted(self._left, key=lambda index: (-gains[index], index))


def _seconds_a_row(candidate: Candidate, seconds: float) -> float:
    return seconds / candidate.config.train.batch_size


def _guess(candidate: Candidate) -> float:
    return _seconds_a_row(candidate, candidate.seconds)


def _chosen(candidate: Candidate) -> list[bool]:
    """One indicator for each policy and mode."""
    model = candidate.config.model
    policies = [model.remat == policy for policy in REMAT_POLICIES]
    return policies + [model.moe.dispatch == mode for mode in CONFIG_MODES]


def _features(candidate: Candidate) -> list[float]:
    """Features times the prior deviations of their weights."""
    mesh = candidate.config.mesh
    rows = candidate.config.train.batch_size / (mesh.data * mesh.fsdp * mesh.expert)
    sizes = (mesh.data, mesh.fsdp, mesh.expert, mesh.tensor, rows)
    choices = [_CHOICE * chosen for chosen in _chosen(candidate)]
    return [_COMMON, *choices, *(_DOUBLING * math.log2(size) for size in sizes)]
