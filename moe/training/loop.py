"""Training of a model from a config, in the order in which things happen.

The workdir receives ``config.json``, the tokenizer, ``metrics.jsonl``, ``timing.jsonl``, ``tensorboard/``,
``checkpoints/`` and, at the end, ``report.txt`` and ``training.png``. A second call continues from the newest good
checkpoint, whatever ended the first one: docs/runs.md lists what can go wrong and what happens then.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from moe.checkpoints.integrity import is_finite
from moe.checkpoints.manager import Checkpoints, no_background_tracebacks, refuse_unusable_path
from moe.checkpoints.noted_code import edited_code, note_code
from moe.checkpoints.pinned import pinned_steps
from moe.checkpoints.workdir import (
    CONFIG,
    REPORT,
    disk_errors,
    holds_run,
    is_finished,
    latest_change,
    locked_workdir,
    read_config,
    record_changes,
    refuse_other_run,
    write_run_files,
)
from moe.config import Config, ConfigError, sparse_layers, to_dict, validate_mesh
from moe.data import folders, pipeline, streams
from moe.data.preparation import describe_shares
from moe.dispatch import modes
from moe.models import flops
from moe.models.pipeline import check as pipeline_check
from moe.models.state import TrainState
from moe.parallel.mesh import local_rows, make_mesh, rows_by_process
from moe.routing.routing import is_own
from moe.system import process
from moe.system.atomic_files import first_line, in_bucket
from moe.system.metrics_files import METRICS, TIMING, MetricsWriter, iterate_rows
from moe.system.reading import read_small_file
from moe.system.signals import StopSignals
from moe.system.waiting import first_answer
from moe.training import profiling, progress, warm_start
from moe.training.agreement import refuse_other_inputs, refuse_other_workdir
from moe.training.batches import place
from moe.training.evaluation import Heldout, check_domains, evaluate, load_heldout
from moe.training.metric_writers import find_writers
from moe.training.metrics import StepClock, Throughput, mean_row, step_metrics
from moe.training.optimizer import averaged_weights
from moe.training.recovery import DivergedError, Health, Recovery, next_batch
from moe.training.report import finish, prompts
from moe.training.step import Program, TrainMetrics, build
from moe.training.teacher import read_teacher


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
    shows = jax.process_index() == 0 and not quiet
    say, stage = (progress.say, progress.stage) if shows else (lambda _: None, lambda _: None)
    directory = _folder(workdir)
    folders.refuse_inside(config.data.dataset, workdir)
    mesh = make_mesh(config.mesh, devices)
    validate_mesh(config, mesh.shape)
    pipeline_check(config, mesh.shape)  # before rows are given to processes, as below
    find_writers(config.train.writers)
    with contextlib.ExitStack() as stack:
        signals = stack.enter_context(StopSignals())
        refuse_other_workdir(directory)
        started = (directory / CONFIG).exists()
        # Before the lock, so that nothing is written into a folder that is refused.
        new = not holds_run(directory)
        if new:
            warm_start.check(config)
        config = _with_streams(config, mesh, None if new else read_config(directory), say)
        changes = {} if new else refuse_other_run(config, directory, allow_changes=allow_changes)
        if started:
            stack.enter_context(locked_workdir(directory))
        if not new and not changes and is_finished(config, directory):
            say(f"{directory} is done: {config.train.num_steps} steps were trained. Its report:\n")
            say(read_small_file(directory / REPORT).decode(errors="replace"))
            return
        stage("preparing the data")
        prepared = pipeline.prepare_run(config, tokenizer=warm_start.tokenizer(config, directory), progress=say)
        check_domains(prepared)
        if shows:
            for line in pipeline.describe_sizes(prepared, config.data):
                say(line)
        refuse_other_inputs(config, prepared)
        if config.train.sample_tokens:
            prompts(config, prepared)
        stack.enter_context(jax.set_mesh(mesh))
        stack.enter_context(no_background_tracebacks())
        stack.enter_context(profiling.out_of_memory_as_config_error())
        stage("making the model")
        pinned = pinned_steps(config, None if new else directory)
        teacher = read_teacher(config, mesh, prepared.tokenizer, pinned.teacher)
        program = make_program(config, mesh, teacher)
        profiling.refuse_too_large(program, teacher and teacher[1])
        heldout = functools.cache(lambda: load_heldout(program, prepared))  # at the first evaluation
        rows = local_rows(mesh, config.train.batch_size)
        iterator = pipeline.train_iterator(
            prepared, config.data, batch_size=config.train.batch_size, seed=config.seed, rows=rows
        )
        stack.callback(iterator.close)  # its thread would abort the process if it were still at work at the exit
        if new:
            iterator.start_prefetch()  # reads the first batch while the rest is built
        state = None
        if new or config.lora.rank:  # a checkpoint holds the adapters without their base
            state = warm_start.first_state(program, say, pinned.base)
        with disk_errors(directory):
            directory.mkdir(parents=True, exist_ok=True)
            if not started:
                stack.enter_context(locked_workdir(directory))
            if new and jax.process_index() == 0 and holds_run(directory):
                raise ConfigError(f"--workdir={workdir}: another run was started in it just now; use another one")
            pinned.note(directory)
            write_run_files(config, prepared.tokenizer.files, directory, new=new)
            checkpoints = Checkpoints(
                directory, config.train.keep_checkpoints, config.train.keep_every, save_every=config.train.save_every
            )
            refuse_other_workdir(directory)  # again, since process 0 has now written the config of a new run
        say(_description(program))
        if program.about:
            say(program.about)
        if config.data.weights:
            say(describe_shares(config.data, prepared.domains))
        with disk_errors(directory):
            checkpoint = checkpoints.resume(program.state, iterator, say)
        if checkpoint is None:
            step, saved = 0, {}
            state = state or warm_start.first_state(program, say, pinned.base)
        else:
            step, restored, saved = checkpoint
            state = state.restored(restored) if state is not None else restored
            say(f"resuming {workdir} at step {step} of {config.train.num_steps}")
        with disk_errors(directory):
            _apply_changes(config, changes | edited_code(config, directory), step, directory, say)
            note_code(config, directory)
        with disk_errors(directory), checkpoints.finish_on_error():
            if step < config.train.num_steps:
                shown = progress.Progress(
                    step, config.train.num_steps, quiet, pipeline.epochs_per_step(prepared, config)
                )
                loop = _Loop(program, iterator, heldout, checkpoints, directory, signals, step, saved, shown)
                stage("compiling the train step (later starts find it in train.compilation_cache)")
                state = loop.run(state)
            else:  # a run that was shortened to its newest checkpoint has rows of later steps
                MetricsWriter(directory, step, to_dict(config)).close()
            checkpoints.close()
        if jax.process_index() == 0:
            with disk_errors(directory):
                finish(program, state, prepared, directory, say)
        # JAX aborts all processes if one leaves five minutes before another.
        multihost_utils.sync_global_devices("report written")


def _with_streams(config: Config, mesh: Mesh, begun: Config | None, say: Callable[[str], Any]) -> Config:
    """Fill in the number of document streams if the config leaves it open: that of the run that is resumed; for a new
    run whose processes cannot share the default number, the smallest that they can."""
    if config.data.streams:
        return config
    number, size = 0, config.train.batch_size
    if begun is not None:
        number = begun.data.streams
    elif jax.process_count() > 1:
        needed = streams.least_number(size, rows_by_process(mesh, size).values())
        if needed > streams.default_number(size):
            number = needed
            say(f"data.streams: {number}, so that each process has whole streams")
    return dataclasses.replace(config, data=dataclasses.replace(config.data, streams=number))


def _folder(workdir: str) -> epath.Path:
    """The workdir as a path. Raises ConfigError for one that cannot hold a run."""
    directory = epath.Path(workdir)
    if not in_bucket(directory):
        refuse_unusable_path(workdir)
        whole = directory.absolute()
        existing = next(place for place in (whole, *whole.parents) if place.exists())
        # An existing folder is tested by taking its lock, whose error has the system's reason.
        if not existing.is_dir() or (existing != whole and not os.access(existing, os.W_OK | os.X_OK)):
            raise ConfigError(f"--workdir={workdir}: cannot be written ({existing} is not a writable folder)")
    elif not workdir.startswith("gs://"):  # the only one for which Orbax writes arrays
        raise ConfigError(f"--workdir={workdir}: must be a folder of a file system, or gs://BUCKET/NAME")
    else:
        try:
            first_answer(workdir, directory.exists)
        except Exception as error:  # gcsfs passes on errors of several libraries
            raise ConfigError(
                f"--workdir={workdir}: cannot be reached ({first_line(error)}); it needs credentials and "
                "`pip install gcsfs google-cloud-storage`"
            ) from error
    return directory


def _description(program: Program) -> str:
    """Lines on model and mesh, and on how assignments reach their experts."""
    model = program.config.model
    total, active = flops.count_parameters(model)
    axes = " x ".join(f"{axis} {size}" for axis, size in program.mesh.shape.items())
    text = f"model: {total:,} parameters, {active:,} active per token; mesh: {axes} ({jax.default_backend()})"
    if not any(sparse_layers(model)):
        return text
    hosts = model.moe.hosts(program.mesh.shape["expert"])
    if hosts > 1 and model.sent_precision != "none":
        text += (
            f"\nrows to experts on other hosts (model.moe.exchange_hosts={model.moe.exchange_hosts}) are rounded to "
            f"{model.sent_precision}; on another mesh those would be other rows"
        )
    return f"{text}\ndispatch: {modes.describe(model.moe.dispatch)}"


def _apply_changes(
    config: Config, changes: dict[str, list[Any]], step: int, directory: epath.Path, say: Callable[[str], Any]
) -> None:
    """Record changed settings; a report of fewer steps is deleted, since it will be written again."""
    if step > config.train.num_steps:
        raise ConfigError(f"train.num_steps={config.train.num_steps}: the run has done {step} steps already")
    if step == config.train.num_steps and "train.num_steps" in changes:
        kinds = {row["kind"] for row in iterate_rows(directory / METRICS) if row["step"] == step}
        for kind, missing in (("heldout/all", "evaluated"), ("train", "logged")):  # the report shows both rows
            if kind not in kinds:
                raise ConfigError(f"train.num_steps={step}: this step was not {missing}; end the run at a later one")
    if step < (latest := latest_change(directory)):
        say(f"steps {step + 1} to {latest} are trained again, with the settings that were changed at step {latest}")
    record_changes(config, changes, step, directory)
    for name, (old, new) in changes.items():
        say(f"changed from step {step} on: {name} {old!r} to {new!r}")
    if step < config.train.num_steps and jax.process_index() == 0:
        (directory / REPORT).unlink(missing_ok=True)


def refuse_wrong_choices(config: Config, metrics: TrainMetrics, step: int) -> None:
    """Refuse a user's gate that assigns wrong experts to tokens of a start's first step.

    Raises:
        ConfigError: the gate and the layers are named.
    """
    own = [type(gate).__name__ for gate in config.model.moe.gates if is_own(gate)]
    if own and metrics.layers is not None and (counts := np.asarray(metrics.layers.broken_tokens)).any():
        raise ConfigError(
            f"gate {', '.join(own)}: step {step} has {_broken(config)}, per MoE layer: {counts.astype(int).tolist()}"
        )


def _broken(config: Config) -> str:
    """Description of broken tokens."""
    choices = ", or with an expert twice, one that does not exist, or a weight that is negative or not finite"
    return f"tokens without finite router logits{choices if any(map(is_own, config.model.moe.gates)) else ''}"


class _Loop:
    """For each step: batch, train step; then, when due: log, evaluate, save, stop. Always in this order.

    A checkpoint at step n therefore comes after all rows of step n, and its iterator stands at batch n+1. ``pending``
    are the metrics since the last logged row; they are saved too, so that a resumed run writes the same next row.
    """

    def __init__(
        self,
        program: Program,
        iterator: Any,
        heldout: Callable[[], Heldout],
        checkpoints: Checkpoints,
        directory: epath.Path,
        signals: StopSignals,
        start: int,
        saved: dict[str, Any],
        shown: progress.Progress,
    ):
        """
        Args:
            iterator: positioned at the batch of the next step.
            heldout: batches of every evaluation.
            signals: checked at the end of every step.
            start: steps done.
            saved: JSON that :meth:`_save` left in the checkpoint of that step.
            shown: progress on standard error.
        """
        self._program = program
        self._iterator = iterator
        self._heldout = heldout
        self._checkpoints = checkpoints
        self._directory = directory
        self._signals = signals
        self._start = start
        self._progress = shown
        self._config = program.config.train
        self._pending: list[Any] = saved.get("pending", [])
        self._health = Health(self._config.spike_sigmas, self._config.batch_size, saved.get("health"))
        self._recovery = Recovery(program, checkpoints)
        self._throughput = Throughput(program.config)
        self._clock = StepClock()
        self._timed = True  # False: the next row counts the compilation

    def run(self, state: TrainState) -> TrainState:
        """Train to the last step and return the final state."""
        config = self._config
        first = self._start + 1
        end = self._config.num_steps + 1
        writers = find_writers(config.writers)
        with (
            contextlib.ExitStack() as after_first,
            contextlib.closing(
                MetricsWriter(self._directory, self._start, to_dict(self._program.config), writers)
            ) as self._writer,
            contextlib.closing(self._progress),
        ):
            for step in range(first, end):
                last = step == config.num_steps
                with self._clock:
                    batch = next_batch(self._iterator, step, self._checkpoints)
                state, metrics = self._program.train_step(state, place(batch, self._program.mesh))
                self._pending.append(metrics)
                if step == first:
                    jax.block_until_ready(metrics)
                    refuse_wrong_choices(self._program.config, metrics, step)
                    self._progress.write(f"[{process.seconds_running():6.1f} s] step {step}, the first one, is done")
                    self._compile_evaluation(state)
                    after_first.enter_context(self._signals.at_steps())
                    self._timed = step % config.log_every != 0 and not last
                    if self._timed:  # later rows do not count the compilation
                        self._clock.restart()
                self._progress.advance()
                if step % config.log_every == 0 or last:
                    state = self._log(step, state)
                loss = self._evaluate(step, state) if step % config.eval_every == 0 or last else None
                self._progress.show(step)
                stop = self._signals.due(step)
                if step % config.save_every == 0 or last or stop:
                    self._save(step, state, loss, last)
                if stop and not last:
                    self._checkpoints.close()
                    newest = self._checkpoints.latest() or 0
                    self._progress.write(f"{stop} after step {step}; the same command continues from step {newest}")
                    raise stop
        return state

    def _log(self, step: int, state: TrainState) -> TrainState:
        """Write the row of the pending steps; return the state to continue with, an earlier one after a rollback."""
        steps, self._pending = [step_metrics(metrics) for metrics in self._pending], []
        row = mean_row(steps)
        timing = self._throughput.row(*self._clock.lap())
        self._clock.restart()  # the first row measures the matmul rate
        warnings = self._health.look(step, steps, row)
        self._writer.write(step, "train", row)
        if np.any(row.get("broken_tokens", 0)):
            self._progress.write(f"step {step}: {_broken(self._program.config)}, per MoE layer: {row['broken_tokens']}")
        self._writer.write(step, "timing", timing, file=TIMING)
        self._progress.logged(row, timing if self._timed else None)
        self._timed = True
        self._warn(step, warnings)  # before an error that refers to them
        self._checkpoints.check()
        state, rollbacks = self._recovery.after(step, self._health.skipped_in_a_row, state)
        self._warn(step, rollbacks)
        return state

    def _warn(self, step: int, warnings: list[dict[str, Any]]) -> None:
        for warning in warnings:
            self._writer.write(step, "warning", warning)
            self._progress.write(f"warning: {warning['text']}")

    def _evaluate(self, step: int, state: TrainState) -> float:
        """Write a row per domain; return the held-out loss over all domains."""
        results = evaluate(self._program, state.variables, self._heldout())
        for domain, values in results.items():
            self._writer.write(step, f"heldout/{domain}", values)
        optimizer = self._program.config.optimizer
        if optimizer.ema_decay:
            averaged = dataclasses.replace(state, parameters=averaged_weights(optimizer, state.optimizer))
            of_average = evaluate(self._program, averaged.variables, self._heldout())
            for domain, values in of_average.items():
                self._writer.write(step, f"heldout_ema/{domain}", values)
            results["all"] |= {"ema": of_average["all"]["loss"]}
        self._progress.evaluated(results["all"])
        self._clock.restart()
        return results["all"]["loss"]

    def _compile_evaluation(self, state: TrainState) -> None:
        """Compile the evaluation while a signal may end the run at once: later, steps would be lost."""
        batch = next(batch for batches in self._heldout().batches.values() for batch in batches)
        arguments = state.variables, place(batch, self._program.mesh), self._heldout().token_bytes
        jax.block_until_ready(self._program.eval_step(*arguments))

    def _save(self, step: int, state: TrainState, heldout_loss: float | None, last: bool) -> None:
        """Start a checkpoint, unless updates are being skipped: the cause may be in the parameters themselves.

        Raises:
            DivergedError: this is the last step, and the parameters are not finite.
        """
        self._pending = [step_metrics(metrics) for metrics in self._pending]
        skipping = self._pending[-1]["skipped"] if self._pending else self._health.skipped_in_a_row
        finite = is_finite((state.parameters, state.biases))
        if last and not finite:
            raise DivergedError(
                f"step {step}: the parameters are not finite, so that the run cannot end here; a lower "
                "optimizer.learning_rate may help (--change)"
            )
        if finite and (not skipping or last):
            saved = {"pending": self._pending, "health": self._health.memory(), "rows": self._writer.rows[METRICS]}
            self._writer.sync()
            self._checkpoints.save(step, state, self._iterator, saved, heldout_loss)
        self._clock.restart()
