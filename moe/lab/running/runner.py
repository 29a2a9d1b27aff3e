"""Trains the runs of a suite that have no record yet.

Any number of processes may work on one suite at a time, on one machine or on several that share the folder: each takes
the first run that is neither finished nor taken. A run's workdir is ``runs/ARM/steps_N/lr_X/seed_S``, an ordinary
workdir of ``main.py``, and resumes after an interruption.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import shutil
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import filelock
import jax
import numpy as np
from etils import epath

from moe.checkpoints.workdir import read_config
from moe.config import Config, ConfigError, DistillConfig, StartConfig
from moe.data import pipeline
from moe.lab import plan, results
from moe.lab.claims.registration import Claim
from moe.lab.records import DIVERGED, FINISHED, PRIMARY, Key, Record, commit, read_all
from moe.lab.running import probes
from moe.lab.running.heldout import RowLosses, mixed_rows
from moe.lab.running.progress import Progress
from moe.lab.suite import Suite
from moe.lab.table import Table
from moe.metrics_files import METRICS, read_rows
from moe.parallel.mesh import make_mesh
from moe.training.loop import train
from moe.training.step import Program, build

RUNS = "runs"


class Programs:
    """Compiled programs by config; runs that differ only in seed and starting point share one."""

    def __init__(self) -> None:
        self._programs: dict[Config, Program] = {}

    def __call__(self, config: Config, mesh: Any, teacher: Any = None) -> Program:
        """See :func:`moe.training.step.build`."""
        if teacher is not None:  # the teacher's variables are part of the program
            return build(config, mesh, teacher)
        key = dataclasses.replace(config, seed=0, start=StartConfig(), distill=DistillConfig())
        if key not in self._programs:
            self._programs[key] = build(config, mesh)
        return dataclasses.replace(self._programs[key], config=config)


def only(suite: Suite, arms: Sequence[str], horizons: Sequence[str]) -> Callable[[Key], bool]:
    """Predicate of runs of the given arms and numbers of steps; an empty sequence stands for all.

    Raises:
        ConfigError: an arm or horizon that the suite does not have.
    """
    for flag, given, known in (("arms", arms, suite.variants), ("horizons", horizons, map(str, suite.steps))):
        known = list(known)
        if unknown := [name for name in given if name not in known]:
            raise ConfigError(f"--{flag}={','.join(unknown)}: must be among {', '.join(known)}")
    return lambda key: (not arms or key.variant in arms) and (not horizons or str(key.steps) in horizons)


def run_directory(workdir: Path, key: Key) -> Path:
    """Workdir of a run."""
    return workdir / RUNS / key.path


class Worker:
    """One process that trains runs of a suite, one after another."""

    def __init__(
        self,
        suite: Suite,
        workdir: Path,
        claims: Sequence[Claim],
        *,
        sweep: bool = True,
        only: Callable[[Key], bool] = lambda _: True,
    ):
        """``sweep``: see :func:`moe.lab.plan.runs`; ``only``: which of the planned runs this process trains."""
        self._suite, self._workdir, self._sweep, self._only = suite, workdir, sweep, only
        self._hashes = {str(claim.number): claim.hash for claim in claims if claim.suite == suite.name}
        self._programs = Programs()
        self._row_losses: dict[str, RowLosses] = {}
        self._failed: dict[Key, str] = {}
        self._progress = Progress(suite, workdir)

    def run(self) -> None:
        """Train until every run is finished or taken by another process.

        Raises:
            ConfigError: runs that could not be trained, after all others were.
        """
        while True:
            with self._take() as key:
                if key is None:
                    break
                try:
                    self._train(key)
                except ConfigError as error:
                    self._failed[key] = str(error)
                    self._progress.say(f"failed: {key}: {error}")
        if self._failed:
            key, reason = next(iter(self._failed.items()))
            raise ConfigError(f"{len(self._failed)} runs did not finish; the first, {key}: {reason}")

    @contextlib.contextmanager
    def _take(self) -> Iterator[Key | None]:
        """The first run that is not finished, not taken and whose parents are finished; None if there is none."""
        finished = read_all(self._workdir)
        planned = list(filter(self._only, plan.runs(self._suite, finished, sweep=self._sweep)))
        done = {record.key for record in finished}
        for key in planned:
            needed = plan.parents(self._suite, finished, key).values()
            if key in done or key in self._failed or not done.issuperset(needed):
                continue
            directory = run_directory(self._workdir, key)
            directory.parent.mkdir(parents=True, exist_ok=True)
            try:
                held = filelock.FileLock(f"{directory}.lock", blocking=False).acquire()
            except filelock.Timeout:
                continue
            with held:
                if key not in {record.key for record in read_all(self._workdir)}:
                    self._progress.start(key, planned, done)
                    yield key
                    return
        yield None

    def _train(self, key: Key) -> None:
        """Train and evaluate a run, and write its record."""
        start = time.monotonic()
        directory = run_directory(self._workdir, key)
        parents = plan.parents(self._suite, read_all(self._workdir), key)
        where = {field: str(run_directory(self._workdir, parent)) for field, parent in parents.items()}
        rate = key.learning_rate
        config = self._suite.config(key.variant, key.seed, steps=key.steps, learning_rate=rate, **where)
        status, reason, row_losses, domains = FINISHED, "", [], []
        with self._progress.following(key, directory):
            try:
                train(config, str(directory), make_program=self._programs, quiet=True)
            except ConfigError as error:
                if not _skipping(directory):
                    raise
                status, reason = DIVERGED, str(error)
        rows = results.run_rows(directory)
        versions = pipeline.prepare(config.data, config.model.vocab_size, progress=lambda _: None).versions
        if status == FINISHED:
            mixed, losses = self._evaluate(key, config, directory)
            domains, row_losses = mixed.domains, losses[key.steps].tolist()
            rows += _mixed_rows(losses, domains, self._suite.primary_domains)
            status, reason = _outcome(losses[key.steps], config.model.vocab_size)
        Record(
            *key,
            status,
            reason,
            commit(),
            self._hashes,
            versions,
            hardware(),
            time.monotonic() - start,
            self._suite.costs(key.variant, key.steps),
            rows,
            domains,
            row_losses,
        ).write(self._workdir)
        self._prune(key, directory)
        self._progress.finish(key, status, row_losses)

    def _evaluate(self, key: Key, config: Config, directory: Path) -> tuple[Any, dict[int, np.ndarray]]:
        """(held-out rows, checkpoint step → loss of each row)."""
        mesh = make_mesh(config.mesh)
        with jax.set_mesh(mesh):
            if key.variant not in self._row_losses:
                prepared = pipeline.prepare(config.data, config.model.vocab_size, progress=lambda _: None)
                mixed = mixed_rows(prepared, config, self._suite.heldout_rows)
                self._row_losses[key.variant] = RowLosses(self._programs(config, mesh), mixed)
            evaluate = self._row_losses[key.variant]
            # Learning curves are drawn for the longest horizon alone, and for the seeds of the comparisons.
            curve = key.steps == self._suite.longest and key.seed in self._suite.seeds
            steps = results.checkpoint_steps(directory, config.train.save_every) if curve else [key.steps]
            return evaluate.rows, {step: evaluate(directory, step) for step in steps}

    def measure(self) -> None:
        """Measure the probes that finished runs of the longest horizon lack, where their checkpoints still exist.

        Runs of a sweep and of rates that lost are left out, and those that another process measures at the moment.
        """
        models: dict[str, probes.Model] = {}
        for key in sorted(record.key for record in Table(self._suite, read_all(self._workdir)).used):
            directory = run_directory(self._workdir, key)
            if key.steps == self._suite.longest and directory.exists():
                with contextlib.suppress(filelock.Timeout), filelock.FileLock(f"{directory}.lock", blocking=False):
                    self._measure(key, directory, models)

    def _measure(self, key: Key, directory: Path, models: dict[str, probes.Model]) -> None:
        """Measure the probes that one run lacks, now that no other process does."""
        record = next(record for record in read_all(self._workdir) if record.key == key)
        known = {quantity.partition("/")[0] for quantity in record.probes}
        names = [name for name in self._suite.variants[key.variant].probes if name not in known]
        if not names or record.status != FINISHED:
            return
        trained = self._trained(key.variant, directory, models)  # shared by the probes, which measure the same routing
        for name in names:
            self._progress.say(f"probe {name} of {key}")
            with jax.set_mesh(trained.model.program.mesh):
                found = probes.PROBES[name](trained)
            measured = {f"{name}/{quantity}": value for quantity, value in found.items()}
            record = dataclasses.replace(record, probes=record.probes | measured)
            record.write(self._workdir)

    def _trained(self, variant: str, directory: Path, models: dict[str, probes.Model]) -> probes.Trained:
        """A run of an arm, and in ``models`` what all runs of the arm share."""
        config = read_config(directory)
        mesh = make_mesh(config.mesh)
        with jax.set_mesh(mesh):
            if variant not in models:
                models.clear()  # one arm's data and programs at a time
                models[variant] = probes.Model(
                    self._programs(config, mesh), self._suite.primary_domains, self._suite.heldout_rows
                )
        return probes.Trained(directory, models[variant])

    def _prune(self, key: Key, directory: Path) -> None:
        """Keep only the last checkpoint, unless the arm has probes, which may read earlier ones."""
        if self._suite.variants[key.variant].probes and key.steps == self._suite.longest:
            return
        for step in results.checkpoint_steps(directory)[:-1]:
            shutil.rmtree(directory / "checkpoints" / str(step))


def _mixed_rows(
    losses: dict[int, np.ndarray], domains: list[str], primary: Sequence[str]
) -> list[tuple[int, str, str, str, float]]:
    """Mean loss per domain and over the primary domains (empty: all), at every evaluated step."""
    rows = []
    for step, values in losses.items():
        means = {name: float(values[[d == name for d in domains]].mean()) for name in dict.fromkeys(domains)}
        rows += [(step, "loss", name, "", value) for name, value in means.items()]
        rows.append((step, "loss", PRIMARY, "", statistics.fmean(means[name] for name in primary or means)))
    return rows


def _outcome(losses: np.ndarray, vocab_size: int) -> tuple[str, str]:
    """(status, reason): diverged if a loss is not finite, or more than a nat worse on average than a uniform guess."""
    if not np.isfinite(losses).all():
        return DIVERGED, "held-out loss not finite at the last step"
    if losses.mean() > math.log(vocab_size) + 1:
        return DIVERGED, f"held-out loss {losses.mean():.2f}, more than a nat above that of a uniform guess"
    return FINISHED, ""


def _skipping(directory: Path) -> bool:
    """True if the last logged training row had skipped updates: the run stopped because it diverged."""
    rows = [row for row in read_rows(epath.Path(directory) / METRICS) if row["kind"] == "train"]
    return bool(rows and rows[-1]["skipped"])


def hardware() -> str:
    """Devices, and the cores that this process may use."""
    devices = f"{jax.device_count()} x {jax.devices()[0].device_kind}"
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    return devices + (f", CPU cores {json.dumps(cores)}" if jax.default_backend() == "cpu" and cores else "")
