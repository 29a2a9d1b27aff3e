"""Held-out losses of a trained run of a suite, and whether it diverged."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from moe.config import Config
from moe.data import pipeline
from moe.lab import results
from moe.lab.records import DIVERGED, DROPLESS, FINISHED, OWN, PRIMARY, Key
from moe.lab.running.heldout import RowLosses, dropless, mixed_rows
from moe.lab.suite import Suite
from moe.parallel.mesh import make_mesh
from moe.training.step import Program


class Evaluated(NamedTuple):
    """Held-out losses of a run.

    Attributes:
        losses: nats per target of each held-out row at the last step.
        domains: domain of each row.
        rows: means at all steps that were evaluated.
        how: with which capacity the rows were measured: ``OWN`` or ``DROPLESS``.
    """

    losses: list[float]
    domains: list[str]
    rows: list[results.Row]
    how: str


class Evaluators:
    """Evaluates runs of a suite; programs and rows of an arm are kept for its next run."""

    def __init__(self, suite: Suite, programs: Callable[..., Program]):
        """``programs``: see :class:`moe.lab.running.programs.Programs`."""
        self._suite, self._programs = suite, programs
        self._arms: dict[str, tuple[RowLosses, RowLosses | None]] = {}

    def __call__(self, key: Key, config: Config, prepared: pipeline.Prepared, directory: Path) -> Evaluated:
        """Losses without drops, since arms differ in capacity; at the arm's own capacity for the last checkpoint
        only."""
        mesh, primary = make_mesh(config.mesh), self._suite.primary_domains or config.data.domains
        trained = [name for name in prepared.domains if name not in self._suite.unseen]
        with jax.set_mesh(mesh):
            if key.variant not in self._arms:
                self._arms[key.variant] = self._arm(config, prepared, trained, mesh)
            free, own = self._arms[key.variant]
            # Learning curves are drawn only for the longest horizon and the suite's seeds.
            curve = key.steps == self._suite.longest and key.seed in self._suite.seeds
            steps = results.checkpoint_steps(directory, config.train.save_every) if curve else [key.steps]
            losses = {step: free(directory, step) for step in steps}
            rows = _mixed_rows("loss", losses, free.rows.domains, primary or trained)
            own_losses = losses[key.steps] if own is None else own(directory, key.steps)
            domains = free.rows.domains if own is None else own.rows.domains
            rows += _mixed_rows("own_loss", {key.steps: own_losses}, domains, primary or trained)
        how = OWN if dropless(config) is None else DROPLESS
        return Evaluated(losses[key.steps].tolist(), free.rows.domains, rows, how)

    def _arm(
        self, config: Config, prepared: pipeline.Prepared, trained: Sequence[str], mesh: Any
    ) -> tuple[RowLosses, RowLosses | None]:
        """Row losses without drops on all domains, and at the arm's own capacity (None without one) on trained domains.

        Under a capacity every batch is mixed as in training.
        """
        count, free = self._suite.heldout_rows, dropless(config) or config
        every = RowLosses(self._programs(free, mesh), mixed_rows(prepared, config, count))
        if free == config:
            return every, None
        return every, RowLosses(self._programs(config, mesh), mixed_rows(prepared, config, count, trained))


def _mixed_rows(
    quantity: str, losses: dict[int, np.ndarray], domains: list[str], primary: Sequence[str]
) -> list[results.Row]:
    """Mean loss per domain and over the primary domains, at every evaluated step."""
    rows = []
    for step, values in losses.items():
        means = {name: float(values[[d == name for d in domains]].mean()) for name in dict.fromkeys(domains)}
        rows += [(step, quantity, name, "", value) for name, value in means.items()]
        rows.append((step, quantity, PRIMARY, "", statistics.fmean(means[name] for name in primary)))
    return rows


def outcome(losses: Sequence[float], vocab_size: int) -> tuple[str, str]:
    """(status, reason): diverged if a loss is not finite, or more than a nat worse on average than a uniform guess."""
    if not np.isfinite(losses).all():
        return DIVERGED, "held-out loss not finite at the last step"
    if np.mean(losses) > math.log(vocab_size) + 1:
        return DIVERGED, f"held-out loss {np.mean(losses):.2f}, more than a nat above that of a uniform guess"
    return FINISHED, ""
