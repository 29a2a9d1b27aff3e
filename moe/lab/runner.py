"""Runs what a suite is missing, one run after another, and keeps each in a workdir of its own.

In: a :class:`moe.lab.suite.Suite` and a workdir. Out: ``workdir/runs/VARIANT/seed_N/``, each a workdir of
``main.py`` (resumable, readable by every script), with ``done.json`` once its probes are measured too. Runs of one
variant differ in the seed alone and share one compiled program. A variant that starts from another comes after it, and
stays in the same shard.
"""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import tqdm
from etils import epath
from tensorboardX import SummaryWriter

from moe.atomic_files import write_atomic
from moe.checkpoints.workdir import refuse_other_run
from moe.config import Config, ConfigError, DistillConfig, StartConfig
from moe.lab import probes
from moe.lab.suite import Suite
from moe.metrics_files import METRICS, read_rows
from moe.parallel.mesh import make_mesh
from moe.training.loop import train
from moe.training.step import Program, build

DONE = "done.json"


@dataclasses.dataclass(frozen=True)
class Run:
    """One variant with one seed."""

    variant: str
    seed: int
    config: Config
    directory: Path

    @property
    def name(self) -> str:
        """For people."""
        return f"{self.variant}, seed {self.seed}"

    @property
    def done(self) -> bool:
        """Whether it is trained and probed."""
        return (self.directory / DONE).exists()


def run_directory(workdir: Path, variant: str, seed: int) -> Path:
    """Of one run of a suite."""
    return workdir / "runs" / variant / f"seed_{seed}"


def plan(suite: Suite, workdir: Path, seeds: Sequence[int] | None = None) -> list[Run]:
    """All runs of a suite: parents first, then variant by variant, so that seeds share a program."""
    parents = {p for v in suite.variants.values() for p in (v.starts_from, v.teacher) if p}
    ordered = sorted(suite.variants, key=lambda name: name not in parents)
    runs = []
    for variant in ordered:
        for seed in suite.seeds if seeds is None else seeds:
            chosen = suite.variants[variant]
            where = {
                field: str(run_directory(workdir, parent, seed)) if parent else ""
                for field, parent in (("starts_from", chosen.starts_from), ("teacher", chosen.teacher))
            }
            runs.append(Run(variant, seed, suite.config(variant, seed, **where), run_directory(workdir, variant, seed)))
    return runs


def shard(suite: Suite, runs: Sequence[Run], index: int, count: int) -> list[Run]:
    """The index-th of count parts of about equal cost; whoever starts from another run stays with it."""

    def family(run: Run) -> tuple[str, int]:
        chosen = suite.variants[run.variant]
        root = chosen.starts_from or chosen.teacher or run.variant
        return root, run.seed

    families: dict[tuple[str, int], list[Run]] = {}
    for run in runs:
        families.setdefault(family(run), []).append(run)
    # Whole variants first, so that a part compiles few programs: part i takes families i·n/count to (i+1)·n/count.
    members = list(families.values())
    taken = members[index * len(members) // count : (index + 1) * len(members) // count]
    return sorted((run for member in taken for run in member), key=runs.index)


class Programs:
    """:func:`moe.training.step.build` for many runs: those that differ in seed and start alone get one compiled program."""

    def __init__(self) -> None:
        self._key: Config | None = None
        self._program: Program | None = None

    def __call__(self, config: Config, mesh: Any, teacher: Any = None) -> Program:
        """As :func:`moe.training.step.build`."""
        if teacher is not None:  # whose variables are part of the program
            return build(config, mesh, teacher)
        key = dataclasses.replace(config, seed=0, start=StartConfig(), distill=DistillConfig())
        if key != self._key or self._program is None:
            self._key, self._program = key, build(config, mesh)
        return dataclasses.replace(self._program, config=config)


def run_missing(suite: Suite, runs: Sequence[Run]) -> None:
    """Trains and probes the runs that are not done, with a bar over all of them, in FLOPs.

    Raises:
        ConfigError: a run that cannot go on; the others are tried first.
    """
    programs, failed = Programs(), {}
    models: dict[str, probes.Model] = {}
    flops = {variant: suite.costs(variant)["flops"] for variant in {run.variant for run in runs}}
    with tqdm.tqdm(
        total=sum(flops[run.variant] for run in runs),
        unit="FLOP",
        unit_scale=True,
        dynamic_ncols=True,
        smoothing=0,
        initial=sum(flops[run.variant] for run in runs if run.done),
        desc=suite.name,
    ) as bar:
        for run in runs:
            if run.done:
                refuse_other_run(run.config, epath.Path(run.directory))
                continue
            bar.set_postfix_str(run.name)
            try:
                _run(suite, run, programs, models)
            except ConfigError as error:
                failed[run.name] = str(error)
                bar.write(f"{run.name}: {error}")
            bar.update(flops[run.variant])
    if failed:
        first = next(iter(failed))
        raise ConfigError(f"{len(failed)} of {len(runs)} runs did not finish; the first, {first}: {failed[first]}")


def _run(suite: Suite, run: Run, programs: Programs, models: dict[str, probes.Model]) -> None:
    start = time.monotonic()
    train(run.config, str(run.directory), make_program=programs, quiet=True)
    measured: dict[str, float] = {}
    if names := suite.variants[run.variant].probes:
        mesh = make_mesh(run.config.mesh)
        with jax.set_mesh(mesh):
            if run.variant not in models:
                models.clear()  # the variant before is done with
                models[run.variant] = probes.Model(programs(run.config, mesh), suite.primary)
            trained = probes.Trained(run.directory, models[run.variant])
            for name in names:
                measured |= {f"{name}/{quantity}": value for quantity, value in probes.PROBES[name](trained).items()}
    _write_hparams(suite, run)
    done = {"probes": measured, "seconds": time.monotonic() - start, "devices": _devices()}
    write_atomic(run.directory / DONE, json.dumps(done, indent=1).encode())


def _devices() -> str:
    return f"{jax.device_count()} x {jax.devices()[0].device_kind}"


def _write_hparams(suite: Suite, run: Run) -> None:
    """What TensorBoard's HParams view compares: overrides beside the last held-out losses."""
    final: dict[str, float] = {}
    for row in read_rows(epath.Path(run.directory) / METRICS):
        if row["kind"].startswith("heldout/") and math.isfinite(row["loss"]):
            final[f"final/{row['kind']}"] = row["loss"]
    parameters = {name: _plain(value) for name, value in suite.variants[run.variant].overrides.items()}
    with SummaryWriter(str(run.directory / "tensorboard")) as board:
        board.add_hparams(
            {"variant": run.variant, "seed": run.seed, **parameters}, final, "hparams", run.config.train.num_steps
        )


def _plain(value: Any) -> Any:
    return value if isinstance(value, bool | int | float | str) else str(value)
