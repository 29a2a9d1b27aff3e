"""Which candidate of a search to compile next: predictions of rate and memory, corrected by the plans made so far.

The logarithm of seconds a row over the rough guess (:func:`moe.planner.candidates.guess_seconds`) is a Bayesian linear
regression on the remat policy, the dispatch mode, the logarithms of the mesh's axes and of the rows a device. The next
candidate has the lowest prediction less 1.5 standard deviations, of those whose memory is predicted to fit.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from moe.dispatch.modes import CONFIG_MODES
from moe.parallel.partition_specs import REMAT_POLICIES
from moe.planner.candidates import Candidate

#: Deviations, in the logarithm: of all guesses together, of a policy or mode, of a doubling of an axis or of the rows;
#: and of what the regression cannot say.
_COMMON, _CHOICE, _DOUBLING, _NOISE = 1.0, 0.25, 0.15, 0.03

#: Deviations below the prediction at which candidates are compared, so that what is unknown is tried.
_BOLDNESS = 1.5

#: Bytes in use over the bound of activations, before a program was compiled; and by how much more than the memory that
#: there was a program that did not fit is taken to need.
_SPILL, _OVER = 1.3, 1.15


class Guide:
    """Order of the candidates that are not compiled yet."""

    def __init__(self, found: Sequence[Candidate], capacity: float = math.inf):
        """
        Args:
            found: candidates.
            capacity: bytes of a device's memory.
        """
        self._found, self._capacity = found, capacity
        self._features = np.array([_features(candidate) for candidate in found])
        self._known: dict[int, float] = {}
        self._left = set(range(len(found)))
        self._spill: dict[tuple[str, str], float] = {}

    def learn(self, index: int, plan: dict[str, Any]) -> None:
        """Take a plan, or its error, into account."""
        self._left.discard(index)
        candidate, kind = self._found[index], _kind(self._found[index])
        of_activations = max(candidate.activations, 1)
        if "error" not in plan:
            self._known[index] = math.log(_seconds_a_row(candidate, plan["step_seconds"]) / _guess(candidate))
            if "memory_total" in plan:
                self._spill[kind] = max((plan["memory_total"] - candidate.fixed) / of_activations, 0.0)
        elif plan["error"].startswith("does not fit"):
            least = _OVER * (self._capacity - candidate.fixed) / of_activations
            self._spill[kind] = max(self._spill.get(kind, _SPILL), least)

    def order(self) -> list[int]:
        """Candidates that are left, the most promising first; those that should not fit come last."""
        means, deviations = self._predict()
        bounds = means - _BOLDNESS * deviations + np.log([_guess(candidate) for candidate in self._found])
        return sorted(self._left, key=lambda index: (not self._fits(index), bounds[index], index))

    def _fits(self, index: int) -> bool:
        candidate = self._found[index]
        others = sum(self._spill.values()) / len(self._spill) if self._spill else _SPILL
        spill = self._spill.get(_kind(candidate), others)
        return candidate.fixed + spill * candidate.activations <= self._capacity

    def _predict(self) -> tuple[np.ndarray, np.ndarray]:
        """Mean and deviation of each candidate's logarithm of seconds over the guess."""
        known = list(self._known)
        every, seen = self._features, self._features[known]
        prior = np.sum(every**2, axis=1)
        if not known:
            return np.zeros(len(every)), np.sqrt(prior)
        solved = np.linalg.solve(seen @ seen.T + _NOISE**2 * np.eye(len(known)), seen @ every.T).T
        means = solved @ np.array([self._known[index] for index in known])
        return means, np.sqrt(np.maximum(prior - np.sum(solved * (every @ seen.T), axis=1), 0.0))


def _kind(candidate: Candidate) -> tuple[str, str]:
    return candidate.config.model.remat, candidate.config.model.moe.dispatch


def _seconds_a_row(candidate: Candidate, seconds: float) -> float:
    return seconds / candidate.config.train.batch_size


def _guess(candidate: Candidate) -> float:
    return _seconds_a_row(candidate, candidate.seconds)


def _features(candidate: Candidate) -> list[float]:
    """Features times the prior deviations of their weights."""
    model, mesh = candidate.config.model, candidate.config.mesh
    chosen = [_CHOICE * (model.remat == policy) for policy in REMAT_POLICIES]
    chosen += [_CHOICE * (model.moe.dispatch == mode) for mode in CONFIG_MODES]
    rows = candidate.config.train.batch_size / (mesh.data * mesh.fsdp * mesh.expert)
    sizes = (mesh.data, mesh.fsdp, mesh.expert, mesh.tensor, rows)
    return [_COMMON, *chosen, *(_DOUBLING * math.log2(size) for size in sizes)]
