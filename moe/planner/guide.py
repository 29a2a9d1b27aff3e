"""Which candidate of a search to compile next: predictions of rate and memory, corrected by the plans made so far.

Two Bayesian linear regressions:

- the logarithm of seconds a row over the rough guess (:func:`moe.planner.candidates.guess_seconds`), on the remat
  policy, the dispatch mode, the logarithms of the mesh's axes and of the rows a device;
- memory over its bound (:mod:`moe.planner.fit`): a factor for parameters, optimizer and gradients together, and one for
  activations by policy and mode.

The next candidate has the lowest prediction of time less 1.5 standard deviations, of those whose memory is predicted to
fit.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from moe.dispatch.modes import CONFIG_MODES
from moe.parallel.partition_specs import REMAT_POLICIES
from moe.planner.candidates import Candidate

#: Deviations of time, in the logarithm: of all guesses together, of a policy or mode, of a doubling of an axis or of
#: the rows; and of what the regression cannot say.
_COMMON, _CHOICE, _DOUBLING, _NOISE = 1.0, 0.25, 0.15, 0.03

#: The factor on the bound's activations that is expected before a program was compiled.
_EXPECTED = 1.3

#: Deviations of memory's factors: of parameters, optimizer and gradients, of all activations, of those of a policy or
#: mode; and of what the regression cannot say, in units of the bound.
_FIXED_FACTOR, _COMMON_FACTOR, _CHOSEN_FACTOR, _NOISE_OF_MEMORY = 0.3, 0.7, 0.2, 0.02

#: Deviations below the prediction at which candidates are compared, so that what is unknown is tried.
_BOLDNESS = 1.5

#: By how much more than the memory that there was a program is taken to need, where the compiler does not say.
_OVER = 1.15


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
        self._found, self._left = found, set(range(len(found)))
        self._times = _Regression(np.array([_features(candidate) for candidate in found]), _NOISE)
        self._guesses = np.log([_guess(candidate) for candidate in found])
        self._bounds = np.array([max(candidate.fixed + candidate.activations, 1) for candidate in found])
        shares = np.array([candidate.activations for candidate in found]) / self._bounds
        chosen = np.array([_chosen(candidate) for candidate in found])
        of_activations = np.column_stack([np.full(len(found), _COMMON_FACTOR), _CHOSEN_FACTOR * chosen])
        features = np.column_stack([_FIXED_FACTOR * (1 - shares), shares[:, None] * of_activations])
        self._memory = _Regression(features, _NOISE_OF_MEMORY)
        self._expected, self._capacity = 1 + (_EXPECTED - 1) * shares, capacity

    def learn(self, index: int, plan: dict[str, Any]) -> None:
        """Take a plan, or its error, into account."""
        self._left.discard(index)
        if "error" not in plan:
            seconds = math.log(_seconds_a_row(self._found[index], plan["step_seconds"]))
            self._times.learn(index, seconds - self._guesses[index])
            memory = plan.get("memory_total")
        elif "memory_least" in plan:
            memory = max(plan["memory_least"] or _OVER * self._capacity, self._capacity)
        else:
            memory = None
        if memory and math.isfinite(memory):
            self._memory.learn(index, memory / self._bounds[index] - self._expected[index])

    def order(self) -> list[int]:
        """Candidates that are left, the most promising first; those that should not fit come last."""
        means, deviations = self._times.predict()
        best = means - _BOLDNESS * deviations + self._guesses
        fits = np.maximum(self._memory.predict()[0] + self._expected, 1.0) * self._bounds <= self._capacity
        return sorted(self._left, key=lambda index: (not fits[index], best[index], index))


def _seconds_a_row(candidate: Candidate, seconds: float) -> float:
    return seconds / candidate.config.train.batch_size


def _guess(candidate: Candidate) -> float:
    return _seconds_a_row(candidate, candidate.seconds)


def _chosen(candidate: Candidate) -> list[bool]:
    """Which policy and mode it is."""
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
