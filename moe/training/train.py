"""Training of a model from a config: open, start, loop, report.

The workdir receives ``config.json``, the tokenizer, ``metrics.jsonl``, ``timing.jsonl``, ``tensorboard/``,
``checkpoints/`` and, at the end, ``report.txt`` and ``training.png``. A second call continues from the newest good
checkpoint, whatever ended the first one: docs/runs.md lists what can go wrong and what happens then.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.experimental import multihost_utils

from moe.checkpoints.workdir import disk_errors
from moe.config import Config, to_dict
from moe.data import pipeline
from moe.models.state import TrainState
from moe.system.metrics_files import MetricsWriter
from moe.system.signals import StopSignals
from moe.training.loop import Loop, Start
from moe.training.open_run import open_run
from moe.training.progress import Console, Progress
from moe.training.report import finish
from moe.training.start_run import start_run
from moe.training.step import Program, build


def train(
    config: Config,
    workdir: str,
    devices: Sequence[Any] | None = None,
    *,
    make_program: Callable[..., Program] = build,
    allow_changes: bool = False,
    quiet: bool = False,
) -> None:
    """Run or resume training, then write the report.

    Args:
        config: from :func:`moe.config.parse.from_config_dict`.
        workdir: folder of a file system, created if missing, or gs://BUCKET/NAME.
        devices: devices of the mesh; None: all.
        make_program: :func:`moe.training.step.build`, or a caching version for callers that train many runs.
        allow_changes: let a run go on with other values of :data:`moe.checkpoints.workdir.CHANGEABLE_FIELDS`, which
            its changes.jsonl then records.
        quiet: print nothing and show no progress.

    Raises:
        ConfigError: before anything is compiled or written, if the config does not fit the devices, the data or the
            run already in the workdir; later, if the disk, the data or the numbers prevent further steps.
        Stopped: a SystemExit, after SIGTERM or Ctrl-C; the checkpoint of the last step is on disk.
    """
    console = Console(quiet)
    with contextlib.ExitStack() as resources:
        signals = resources.enter_context(StopSignals())
        run = open_run(config, workdir, devices, console, resources, allow_changes=allow_changes)
        if run.is_finished:
            console.say(f"{workdir} is done: {config.train.num_steps} steps were trained. Its report:\n")
            console.say(run.report())
            return
        start = start_run(run, console, resources, make_program)
        with disk_errors(run.directory), start.checkpoints.finish_on_error():
            state = _train_steps(start, signals, console)
            start.checkpoints.close()
        if jax.process_index() == 0:
            with disk_errors(run.directory):
                finish(start.program, state, start.prepared, run.directory, start.step, console.say)
        # JAX aborts all processes if one leaves five minutes before another.
        multihost_utils.sync_global_devices("report written")


def _train_steps(start: Start, signals: StopSignals, console: Console) -> TrainState:
    """The state after the last step."""
    config = start.program.config
    num_steps = config.train.num_steps
    if start.step == num_steps:  # a run that was shortened to its newest checkpoint has rows of later steps
        MetricsWriter(start.directory, start.step, to_dict(config)).close()
        return start.state
    epochs = pipeline.epochs_per_step(start.prepared, config)
    shown = Progress(start.step, num_steps, not console.shows, epochs, config.train.batches_until)
    console.stage("compiling the train step (later starts find it in train.compilation_cache)")
    return Loop(start, signals, shown).run(start.state)
