"""Trains the runs of a suite that have no record yet.

Any number of processes may work on one suite at a time, on one machine or on several that share the folder: each takes
the first run that is neither finished nor taken. A run's workdir is ``runs/ARM.steps_N.seed_S.HASH``, an ordinary
workdir of ``main.py``, and resumes after an interruption.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import os
import shutil
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import filelock
import jax

from moe.checkpoints.workdir import read_config
from moe.config import Config, ConfigError
from moe.data import pipeline
from moe.lab import identity, records, results, schedule
from moe.lab.claims.decide import arms_of
from moe.lab.claims.registration import Claim, hashes_at_start
from moe.lab.records import DIVERGED, FINISHED, Key, Record, read_all, run_name
from moe.lab.running import last_tenth, probes
from moe.lab.running.evaluation import Evaluated, Evaluators, outcome
from moe.lab.running.heldout import dropless, with_unseen
from moe.lab.running.programs import Programs
from moe.lab.running.progress import Progress
from moe.lab.suite import Suite
from moe.lab.table import Table
from moe.parallel.mesh import make_mesh
from moe.system.checkout import commit
from moe.training.recovery import DivergedError
from moe.training.step import Program
from moe.training.train import train

RUNS = "runs"
#: Seconds until a process looks again for runs that depend on those of other processes.
_LOOK_AGAIN = 5.0


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


def run_directory(workdir: Path, key: Key, run: str) -> Path:
    """Workdir of a run; another suite may have given it another name before the hash."""
    existing = [path for path in (workdir / RUNS).glob(f"*.{run}") if path.is_dir()]
    return existing[0] if existing else workdir / RUNS / run_name(key, run)


def _lock(workdir: Path, run: str) -> filelock.BaseFileLock:
    """Lock that a process holds while it trains or measures a run."""
    (workdir / RUNS).mkdir(parents=True, exist_ok=True)
    return filelock.FileLock(workdir / RUNS / f"{run}.lock", blocking=False)


def check_start(suite: Suite, claims: Sequence[Claim]) -> None:
    """Check everything that would otherwise fail only after training.

    Raises:
        ConfigError: an unknown probe, a claim about an arm that the suite does not have, or an impossible arm.
    """
    for name, variant in suite.variants.items():
        if unknown := [probe for probe in variant.probes if probe not in probes.PROBES]:
            allowed = ", ".join(probes.PROBES)
            raise ConfigError(f"suite {suite.name!r}, variant {name!r}: no probe {unknown[0]!r}; there are {allowed}")
        dropless(suite.config(name))
    for claim in claims:
        if claim.suite == suite.name and (unknown := sorted(set(arms_of(claim)) - set(suite.variants))):
            raise ConfigError(f"claim {claim.number}: suite {suite.name!r} has no variant {unknown[0]!r}")


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
        """``sweep``: see :meth:`moe.lab.schedule.PlannedRuns.runs`; ``only``: the runs that this process trains."""
        self._suite = suite
        self._workdir = workdir
        self._sweep = sweep
        self._only = only
        self._claims = claims
        self._programs = Programs()
        self._evaluate = Evaluators(suite, self._programs)
        self._models: dict[str, probes.Model] = {}
        self._failed: dict[Key, str] = {}
        self._waiting: dict[Key, Key] = {}  # run → unfinished parent that it needs
        self._unnamed: Key | None = None  # a run whose learning rate is not known yet
        self._others_lead = False  # whether runs of other processes will make further runs known or ready
        self._progress = Progress(suite, workdir)

    def run(self) -> None:
        """Train until every run is finished or taken by another process.

        Raises:
            ConfigError: some runs could not be trained; raised once all others are done.
        """
        while True:
            with self._take() as key:
                if key is not None:
                    self._open_text()
                    try:
                        self._train(key)
                        self._measure(key)
                    except ConfigError as error:
                        self._failed[key] = str(error)
                        self._progress.say(f"failed: {key}: {error}")
            if key is None:
                if not self._others_lead:
                    break
                time.sleep(_LOOK_AGAIN)
        if self._failed:
            key, reason = next(iter(self._failed.items()))
            raise ConfigError(f"{len(self._failed)} runs did not finish; the first, {key}: {reason}")
        if self._waiting:
            key, parent = next(iter(self._waiting.items()))
            raise ConfigError(f"{key}: needs the run {parent}, which is not finished; train that arm too")
        if self._unnamed is not None:
            raise ConfigError(
                f"{self._unnamed.variant}: its learning rate follows from arms that are not trained here; train them "
                "too, or use --nosweep"
            )

    @functools.cache  # noqa: B019 - a worker lives as long as its process
    def _open_text(self) -> None:
        """Open the text of the arms, so that an error in it ends the suite instead of failing every run separately.

        Raises:
            ConfigError: see :func:`moe.data.pipeline.prepare_run` and :func:`moe.lab.records.refuse_other_text`.
        """
        found = schedule.PlannedRuns(self._suite, read_all(self._workdir))
        planned = found.runs(sweep=self._sweep)
        # A run that starts from another reads the text with that one's tokenizer.
        names = {key.variant for key in filter(self._only, planned) if not found.parents(key)}
        texts = {name: self._suite.config(name).data for name in self._suite.variants}
        for data in dict.fromkeys(texts[name] for name in self._suite.variants if name in names):
            arm = next(name for name in names if texts[name] == data)
            versions = pipeline.prepare_run(self._suite.config(arm), progress=self._progress.say).versions
            source = identity.text_source(data)
            same = [key for key in planned if identity.text_source(texts[key.variant]) == source]
            records.refuse_other_text(versions, filter(None, map(found.record, same)))

    @contextlib.contextmanager
    def _take(self) -> Iterator[Key | None]:
        """Yield the first run that is not finished, not taken and whose parents are finished, with its lock held; None
        if there is none, which is final unless runs of other processes lead to more."""
        found = schedule.PlannedRuns(self._suite, read_all(self._workdir))
        planned = list(filter(self._only, found.runs(sweep=self._sweep)))
        done = {key for key in planned if found.record(key)}
        taken, self._waiting = False, {}
        for key in planned:
            if key in done or key in self._failed:
                continue
            if lacking := [parent for parent in found.parents(key).values() if found.record(parent) is None]:
                self._waiting[key] = lacking[0]
                continue
            try:
                held = _lock(self._workdir, found.run(key)).acquire()
            except filelock.Timeout:
                taken = True
                continue
            with held:
                if schedule.PlannedRuns(self._suite, read_all(self._workdir)).record(key) is None:
                    unnamed = filter(self._only, found.unnamed() if self._sweep else ())
                    self._progress.start(key, planned, done, list(unnamed))
                    yield key
                    return
                taken = True  # another process has finished it meanwhile: look again for runs that depend on it
        self._unnamed = next(filter(self._only, found.unnamed() if self._sweep else ()), None)
        self._others_lead = taken and (bool(self._waiting) or self._unnamed is not None)
        yield None

    def _train(self, key: Key) -> None:
        """Train and evaluate a run, and write its record."""
        start, suite = time.monotonic(), self._suite
        found = schedule.PlannedRuns(suite, read_all(self._workdir))
        directory = run_directory(self._workdir, key, found.run(key))
        parents = {role: found.run(parent) for role, parent in found.parents(key).items()}
        folders = {
            role: str(run_directory(self._workdir, parent, found.run(parent)))
            for role, parent in found.parents(key).items()
        }
        hashes = hashes_at_start(self._workdir / RUNS / f"{found.run(key)}.claims.json", self._claims)
        rate, path = key.learning_rate, directory / last_tenth.FILE
        config = suite.config(key.variant, key.seed, steps=key.steps, learning_rate=rate, **folders)
        status, reason, evaluated = FINISHED, "", Evaluated([], [], [], "")
        with self._progress.following(key, directory):
            try:
                train(config, str(directory), make_program=functools.partial(self._recorded, path), quiet=True)
            except DivergedError as error:
                status, reason = DIVERGED, str(error)
        rows = results.run_rows(directory)
        last = last_tenth.losses(path, key.steps)
        rows.append((key.steps, "last_tenth_loss", "", "", statistics.fmean(last)))
        prepared = with_unseen(pipeline.prepare_run(config, progress=lambda _: None), config, suite.unseen)
        if status == FINISHED:
            evaluated = self._evaluate(key, config, prepared, directory)
            status, reason = outcome(evaluated.losses, config.model.vocab_size)
        record = Record(
            *key,
            status=status,
            reason=reason,
            commit=commit(),
            claims=hashes,
            data=prepared.versions,
            hardware=hardware(),
            seconds=time.monotonic() - start,
            costs=suite.costs(key.variant, key.steps),
            rows=rows + evaluated.rows,
            row_domains=evaluated.domains,
            row_losses=evaluated.losses,
            run=found.run(key),
            form=suite.form(key.variant, key.seed, steps=key.steps, learning_rate=rate, parents=parents),
            evaluated=evaluated.how,
            last_losses=last,
        )
        record.write(self._workdir)
        self._prune(key, directory)
        self._progress.finish(key, record)

    def _recorded(self, path: Path, config: Config, mesh: Any, teacher: Any = None) -> Program:
        return last_tenth.recording(self._programs(config, mesh, teacher), path)

    def measure(self) -> None:
        """Measure the missing probes of finished runs, such as runs whose rate was not chosen yet when they ended, if
        their checkpoints still exist and no other process measures them."""
        self._prune_all()
        for record in sorted(Table(self._suite, read_all(self._workdir)).used, key=lambda record: record.key):
            with contextlib.suppress(filelock.Timeout), _lock(self._workdir, record.run):
                self._measure(record.key)

    def _measure(self, key: Key) -> None:
        """Measure the probes that a run lacks, under its lock; runs of a sweep and of a rate that lost have none.

        A probe that cannot be measured, for instance because another suite has pruned the checkpoints that it reads, is
        reported and skipped: an error would end this and every later start.
        """
        if not self._is_probed(key):
            return
        used = Table(self._suite, read_all(self._workdir)).used
        record = next((record for record in used if record.key == key and record.status == FINISHED), None)
        if record is None:
            return
        known = {quantity.partition("/")[0] for quantity in record.probes}
        names = [name for name in self._suite.variants[key.variant].probes if name not in known]
        directory = run_directory(self._workdir, key, record.run)
        if not names or not directory.exists():
            return
        opened = functools.cache(lambda: self._trained(key.variant, directory))  # the probes measure the same routing
        for name in names:
            self._progress.say(f"probe {name} of {key}")
            try:
                trained = opened()
                with jax.set_mesh(trained.model.program.mesh):
                    found = probes.PROBES[name](trained)
            except ConfigError as error:
                self._progress.say(f"not measured: probe {name} of {key}: {error}")
                continue
            measured = {f"{name}/{quantity}": value for quantity, value in found.items()}
            record = dataclasses.replace(record, probes=record.probes | measured)
            record.write(self._workdir)

    def _is_probed(self, key: Key) -> bool:
        """Check whether probes are measured on a run: of an arm that has some, at the longest horizon."""
        return bool(self._suite.variants[key.variant].probes) and key.steps == self._suite.longest

    def _trained(self, variant: str, directory: Path) -> probes.Trained:
        """A run of an arm; the arm's data and programs are kept for its next run."""
        config = read_config(directory)
        mesh = make_mesh(config.mesh)
        with jax.set_mesh(mesh):
            if variant not in self._models:
                self._models.clear()  # one arm's at a time
                self._models[variant] = probes.Model(
                    self._programs(config, mesh), self._suite.primary_domains, self._suite.heldout_rows
                )
        return probes.Trained(directory, self._models[variant])

    def _prune_all(self) -> None:
        """Prune finished runs whose process was killed between writing the record and pruning."""
        for record in Table(self._suite, read_all(self._workdir)).used:
            directory = run_directory(self._workdir, record.key, record.run)
            if directory.exists():
                with contextlib.suppress(filelock.Timeout), _lock(self._workdir, record.run):
                    self._prune(record.key, directory)

    def _prune(self, key: Key, directory: Path) -> None:
        """Keep only the last checkpoint, unless probes may read earlier ones."""
        if self._is_probed(key):
            return
        for step in results.checkpoint_steps(directory)[:-1]:
            shutil.rmtree(directory / "checkpoints" / str(step))


def hardware() -> str:
    """Devices, and the cores that this process may use."""
    devices = f"{jax.device_count()} x {jax.devices()[0].device_kind}"
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    return devices + (f", CPU cores {json.dumps(cores)}" if jax.default_backend() == "cpu" and cores else "")
