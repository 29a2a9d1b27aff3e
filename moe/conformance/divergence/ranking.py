"""Choice of K experts by their scores, within the best groups, and which two scores decided it."""

from __future__ import annotations

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class Ranking:
    """Rule of a gate that takes the K highest scores within the best groups, as
    :meth:`moe.routing.interface.Selecting.select` does.

    Attributes:
        groups: equal groups of consecutive experts.
        kept: groups from which a token may choose.
        scores_per_group: highest scores whose sum ranks a group.
    """

    groups: int = 1
    kept: int = 1
    scores_per_group: int = 1

    def sums(self, scores: np.ndarray) -> np.ndarray:
        """[...,groups]: what ranks the groups of scores [...,E]."""
        by_group = np.sort(np.reshape(scores, (*scores.shape[:-1], self.groups, -1)), axis=-1)
        return by_group[..., -self.scores_per_group :].sum(axis=-1)

    def errors_of_sums(self, scores: np.ndarray, errors: np.ndarray) -> np.ndarray:
        """[...,groups,draws]: errors of :meth:`sums`, of scores [...,E] with errors [...,E,draws]."""
        moved = self.sums(np.moveaxis(scores[..., None] + errors, -1, -2))
        return np.moveaxis(moved - self.sums(scores)[..., None, :], -2, -1)

    def kept_groups(self, scores: np.ndarray) -> np.ndarray:
        """[...,kept]: the best groups, the lower one first among equals."""
        return highest(self.sums(np.asarray(scores, np.float64)), self.kept)

    def choose(self, scores: np.ndarray, k: int) -> np.ndarray:
        """[...,K]: the chosen experts of scores [...,E]."""
        return highest(self.limited(np.asarray(scores, np.float64)), k)

    def limited(self, scores: np.ndarray) -> np.ndarray:
        """Scores with −∞ outside the kept groups."""
        if self.kept == self.groups:
            return scores
        kept = (self.kept_groups(scores)[..., None] == np.arange(self.groups)).any(axis=-2)
        return np.where(np.repeat(kept, scores.shape[-1] // self.groups, axis=-1), scores, -np.inf)


def highest(scores: np.ndarray, k: int) -> np.ndarray:
    """[...,k]: indices of the k highest scores, the lower index first among equals."""
    return np.argsort(-np.asarray(scores, np.float64), axis=-1, kind="stable")[..., :k]
