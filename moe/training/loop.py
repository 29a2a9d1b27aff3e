"""Trains a model from a config: read from top to bottom, it is what happens.

In: a validated :class:`moe.config.Config` and a workdir. Out, in the workdir: ``config.json``, ``tokenizer.model``,
``metrics.jsonl``, ``timing.jsonl``, ``tensorboard/``, ``checkpoints/``, and at the end ``report.txt`` and
``training.png``. Calling it again on the same workdir goes on where the newest good checkpoint stands, whatever ended
the run before: docs/restarts.md tells what can go wrong, and what then happens.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
import tqdm
from etils import epath

from moe.atomic_files import write_whole
from moe.checkpoints.integrity import DamagedError
from moe.checkpoints.lock import locked
from moe.checkpoints.manager import Checkpoints, complete_steps, errors_said_once
from moe.checkpoints.parameters import read_config
from moe.checkpoints.state import TrainState, rolled_back
from moe.config import Config, ConfigError, to_dict, validate_mesh
from moe.data import pipeline
from moe.metrics_files import METRICS, TIMING, MetricsWriter, read_rows, to_python
from moe.models import flops, sampling
from moe.parallel.mesh import local_rows, make_mesh
from moe.routing import balancing
from moe.signals import StopSignals
from moe.training import matmul_rate, report, warm_start
from moe.training.evaluation import Heldout, evaluate, load_heldout
from moe.training.health import Health
from moe.training.step import Program, TrainMetrics, build, place

#: Fields that say how to run, not what is learnt: they may change when a run is resumed.
_FREE_FIELDS = (
    "data.directory",
    "mesh.",
    "model.remat",
    "model.scan_layers",
    "model.moe.dispatch",
    "train.keep_checkpoints",
    "train.keep_every",
    "train.max_skipped_steps",
    "train.on_skipped_steps",
    "train.sample_tokens",
    "train.save_every",
)


def train(
    config: Config,
    workdir: str,
    devices: Sequence[Any] | None = None,
    *,
    make_program: Callable[..., Program] = build,
    quiet: bool = False,
) -> None:
    """Runs or resumes training, then reports.

    Args:
        config: from :func:`moe.routing.resolve.from_config_dict`.
        workdir: a folder, made if missing; of a file system, which may be a mounted bucket.
        devices: of the mesh; None: all.
        make_program: :func:`moe.training.step.build`, or one that remembers, for a caller that trains many runs.
        quiet: say nothing and draw no bar.

    Raises:
        ConfigError: before anything is compiled or written, if the config does not fit the devices, the data or the
            run already in the workdir; later, if the disk, the data or the numbers let no step follow.
        Stopped: a SystemExit, after SIGTERM or Ctrl-C; the checkpoint of the last step is on disk.
    """
    say = print if jax.process_index() == 0 and not quiet else lambda *_: None
    if "://" in workdir:
        raise ConfigError(
            f"--workdir={workdir}: must be a folder of a file system, since rows are appended and files renamed there; "
            "mount the bucket and name the folder (docs/pods.md)"
        )
    mesh = make_mesh(config.mesh, devices)
    validate_mesh(config, mesh.shape)
    warm_start.check(config)
    directory = epath.Path(workdir)
    with contextlib.ExitStack() as held:
        signals = held.enter_context(StopSignals())
        there = (directory / "config.json").exists()
        if there:
            refuse_other_run(config, directory)
            held.enter_context(locked(directory))
        elif steps := complete_steps(directory):
            raise ConfigError(
                f"--workdir={workdir}: holds a checkpoint of step {steps[-1]}, but no config.json that says of what it "
                "is; put that back, or use another workdir"
            )
        prepared = pipeline.prepare(config.data, config.model.vocab_size, progress=say)
        held.enter_context(jax.set_mesh(mesh))
        held.enter_context(errors_said_once())
        program = make_program(config, mesh, warm_start.teacher(config, mesh))
        heldout = load_heldout(program, prepared)
        iterator = pipeline.train_iterator(
            prepared,
            config.data,
            batch_size=config.train.batch_size,
            seed=config.seed,
            rows=local_rows(mesh, config.train.batch_size),
        )
        with _disk(directory):
            directory.mkdir(parents=True, exist_ok=True)
        if not there:
            held.enter_context(locked(directory))
        with _disk(directory):
            _write_once(config, prepared, directory, new=not there)
            checkpoints = Checkpoints(directory, config.train.keep_checkpoints, config.train.keep_every)
        total, active = flops.count_parameters(config.model)
        axes = " x ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
        say(f"model: {total:,} parameters, {active:,} active per token; mesh: {axes} ({jax.default_backend()})")
        with _disk(directory):
            found = checkpoints.resume(program.state, iterator, say)
        if found is None:
            step, state, memory = 0, warm_start.first_state(program), {}
        else:
            step, state, memory = found
            say(f"resuming {workdir} at step {step} of {config.train.num_steps}")
        if step < config.train.num_steps:
            with _disk(directory), checkpoints.settled(), signals.at_steps():
                state = _loop(program, state, iterator, heldout, checkpoints, directory, step, memory, signals, quiet)
        checkpoints.close()
        if jax.process_index() == 0:
            with _disk(directory):
                _finish(program, state, prepared, directory, say)


def _loop(
    program: Program,
    state: TrainState,
    iterator: Any,
    heldout: Heldout,
    checkpoints: Checkpoints,
    directory: epath.Path,
    start: int,
    memory: dict[str, Any],
    signals: StopSignals,
    quiet: bool,
) -> TrainState:
    """Batch, step; then, when due: log, evaluate, save, stop. In this order, always.

    A checkpoint at step n therefore comes after all rows of step n, and its iterator stands at batch n+1. ``pending``
    are the metrics since the last logged row; they are saved too, so that a resumed run writes the same next row.
    """
    config = program.config.train
    tokens = config.batch_size * program.config.data.sequence_length
    model_flops = tokens * flops.train_flops_per_token(program.config.model, program.config.data.sequence_length)
    peak = matmul_rate.measured_matmul_rate(program.config.model.dtype) * jax.device_count()
    if jax.default_backend() == "cpu":
        peak /= jax.device_count()  # fake devices share the processor's cores
    clock = _Clock()
    pending: list[Any] = memory.get("pending", [])
    health = Health(config.spike_sigmas, config.batch_size, memory.get("health"))
    recovery = _Recovery(program, checkpoints)
    with (
        contextlib.closing(MetricsWriter(directory, start)) as writer,
        tqdm.tqdm(
            total=config.num_steps,
            initial=start,
            unit="step",
            dynamic_ncols=True,
            smoothing=0.1,
            disable=quiet or jax.process_index() != 0,
        ) as bar,
    ):
        for step in range(start + 1, config.num_steps + 1):
            last = step == config.num_steps
            with clock:
                batch = _next(iterator, step, checkpoints)
            state, metrics = program.train_step(state, place(batch, program.mesh))
            pending.append(metrics)
            bar.update()
            if step % config.log_every == 0 or last:
                steps, pending = [_plain(metrics) for metrics in pending], []
                row = _mean_row(steps)
                seconds, waited = clock.lap()
                timing = {
                    "step_seconds": seconds,
                    "tokens_per_second": tokens / seconds,
                    "mfu": model_flops / seconds / peak,
                    "data_wait_share": waited / seconds,
                }
                warnings = health.look(step, steps, row)
                writer.write(step, "train", row)
                if np.any(row.get("broken_tokens", 0)):
                    bar.write(
                        f"step {step}: tokens without finite router logits, per MoE layer: {row['broken_tokens']}"
                    )
                writer.write(step, "timing", timing, file=TIMING)
                bar.set_postfix_str(
                    f"loss {row['cross_entropy']:.3f}, {timing['tokens_per_second']:,.0f} tokens/s, "
                    f"MFU {timing['mfu']:.2f}"
                )
                checkpoints.check()
                state, more = recovery.after(step, health.skipped_in_a_row, state)
                for warning in warnings + more:
                    writer.write(step, "warning", warning)
                    bar.write(f"warning: {warning['text']}")
            loss = None
            if step % config.eval_every == 0 or last:
                results = evaluate(program, state.variables, heldout)
                loss = results["all"]["loss"]
                for domain, values in results.items():
                    writer.write(step, f"heldout/{domain}", values)
                clock.restart()
            stop = signals.due(step)
            if step % config.save_every == 0 or last or stop:
                pending = [_plain(metrics) for metrics in pending]
                # What is saved is good: while updates are skipped the trouble may be in the parameters themselves.
                skipping = pending[-1]["skipped"] if pending else health.skipped_in_a_row
                if not skipping or last:
                    memory = {"pending": pending, "health": health.memory(), "rows": writer.rows[METRICS]}
                    writer.sync()
                    checkpoints.save(step, state, iterator, memory, loss)
                clock.restart()
            if stop and not last:
                checkpoints.close()
                bar.write(f"{stop} after step {step}; the same command goes on from step {checkpoints.latest() or 0}")
                raise stop
    return state


class _Recovery:
    """What follows when updates are skipped time after time."""

    def __init__(self, program: Program, checkpoints: Checkpoints):
        self._program, self._checkpoints = program, checkpoints
        self._tried: int | None = None  # the checkpoint that this streak went back to already
        self._borne = 0  # skipped steps of this streak that were answered by going back

    def after(self, step: int, skipped: int, state: TrainState) -> tuple[TrainState, list[dict[str, Any]]]:
        """At a logged step: the state to go on with, and a warning if it is another one.

        Steps and data go on where they are, so that the bad batches are left behind. A streak that goes on after it
        goes back one checkpoint further.

        Args:
            step: the logged one.
            skipped: updates skipped in a row, up to this step.
            state: after this step.

        Raises:
            ConfigError: by config, or because there is no good checkpoint to go back to.
        """
        config = self._program.config.train
        if not skipped:
            self._tried, self._borne = None, 0
        if skipped - self._borne < config.max_skipped_steps:
            return state, []
        first = step - skipped + 1
        trouble = f"step {step}: the last {skipped} updates were skipped, from step {first} on"
        remedy = "look at the rows of kind 'warning' in metrics.jsonl; a lower optimizer.learning_rate may help"
        if config.on_skipped_steps == "stop":
            raise ConfigError(f"{trouble}, and train.on_skipped_steps is 'stop': {remedy}")
        self._checkpoints.wait()
        for saved in self._checkpoints.before(self._tried or first, config.save_every):
            with contextlib.suppress(DamagedError):
                good, _ = self._checkpoints.restore(saved, self._program.state)
                self._tried, self._borne = saved, skipped
                text = f"{trouble}: parameters and optimizer are those of step {saved} again"
                return rolled_back(good, step), [{"what": "rollback", "to": saved, "text": text}]
        raise ConfigError(f"{trouble}, and no checkpoint is left to go back to: {remedy}")


def _next(iterator: Any, step: int, checkpoints: Checkpoints) -> dict[str, np.ndarray]:
    """The batch of a step. Raises ConfigError if its text cannot be read."""
    try:
        return next(iterator)
    except (OSError, ValueError, RuntimeError, LookupError) as error:
        checkpoints.wait()
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:300]
        raise ConfigError(
            f"data.dataset: the batch of step {step} cannot be read ({reason}); put the file back or prepare the data "
            f"again, and the same command goes on from step {checkpoints.latest() or 0}"
        ) from error


class _Clock:
    """Seconds per step, without what evaluation and saving take, and how much of that was waiting for data."""

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        self._start, self._waited, self._steps = time.perf_counter(), 0.0, 0

    def __enter__(self) -> None:
        self._steps += 1
        self._entered = time.perf_counter()

    def __exit__(self, *_: Any) -> None:
        self._waited += time.perf_counter() - self._entered

    def lap(self) -> tuple[float, float]:
        """(seconds per step, of which waited) since the last restart or lap."""
        steps = max(self._steps, 1)
        result = (time.perf_counter() - self._start) / steps, self._waited / steps
        self.restart()
        return result


def _plain(metrics: TrainMetrics | dict[str, Any]) -> dict[str, Any]:
    """One step's metrics as JSON; waits for the step to end. What a checkpoint gave back is JSON already."""
    if isinstance(metrics, dict):
        return metrics
    values = to_python(dataclasses.asdict(metrics))
    layers = values.pop("layers") or {}
    return values | layers


def _mean_row(steps: list[dict[str, Any]]) -> dict[str, Any]:
    """Mean over the steps since the last row, and per layer what follows from the mean load.

    Steps whose update was skipped are counted in ``skipped`` and are in no mean, unless there is no other.
    """
    sound = [values for values in steps if not values["skipped"]] or steps
    row = {name: np.mean([values[name] for values in sound], axis=0).tolist() for name in steps[0]}
    row["skipped"] = sum(int(values["skipped"]) for values in steps)
    if "expert_load" in row:
        load = np.asarray(row["expert_load"])
        row["max_violation"] = balancing.max_violation(load).tolist()
        row["dead_experts"] = balancing.dead_experts(load).tolist()
    return row


def _finish(program: Program, state: TrainState, prepared: pipeline.Prepared, directory: epath.Path, say: Any) -> None:
    """Table, sample and picture, from the last evaluation and the final parameters; once."""
    if (directory / "report.txt").exists():
        say(f"{directory} is done: {program.config.train.num_steps} steps were trained. Its report:\n")
        say((directory / "report.txt").read_text())
        return
    config = program.config
    rows = read_rows(directory / METRICS)
    final = [row for row in rows if row["step"] == config.train.num_steps and row["kind"].startswith("heldout/")]
    if not final:
        raise ConfigError(f"{directory / METRICS}: has lost the last evaluation, which the report shows; put it back")
    results = {row["kind"].removeprefix("heldout/"): row for row in final}
    unigram = {domain: pipeline.unigram_nll(prepared, config.data, domain) for domain in prepared.domains}
    unigram = report.unigram_over_all(results, unigram)
    text = report.table(results, unigram)
    if config.train.sample_tokens and jax.process_count() == 1:
        text += "\n\n" + _sample(program, state, prepared)
    report.figure(directory / "training.png", rows, unigram)
    write_whole(directory / "report.txt", (text + "\n").encode())
    say("\n" + text + f"\n\nIn {directory}: report.txt, training.png, {METRICS}, tensorboard/, checkpoints/")


def _sample(program: Program, state: TrainState, prepared: pipeline.Prepared) -> str:
    """A continuation of the first words of each domain's first held-out document."""
    tokenizer = prepared.tokenizer
    prompts = [tokenizer.encode(prepared.heldout[domain][0][:2000])[:31] for domain in prepared.domains]
    start = [tokenizer.bos_id] if tokenizer.bos_id >= 0 else []
    prompts = [np.concatenate([start, prompt]).astype(np.int32) for prompt in prompts]
    config = program.config
    text = sampling.sample(
        config.model, state.variables, prompts, config.train.sample_tokens, sampling.Sampling(seed=config.seed)
    )
    shown = [
        f"a continuation, {domain}:\n{tokenizer.decode(prompt)} >>> {tokenizer.decode(continuation)}"
        for domain, prompt, continuation in zip(prepared.domains, prompts, text, strict=True)
    ]
    return "\n\n".join(shown)


def _flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for name, value in tree.items():
        flat |= _flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat


def refuse_other_run(config: Config, directory: epath.Path) -> None:
    """A workdir belongs to one config."""
    theirs, ours = (_flatten(json.loads(json.dumps(to_dict(tree)))) for tree in (read_config(directory), config))
    differing = [
        f"{name} (there {theirs[name]!r}, here {ours[name]!r})"
        for name in sorted(ours)
        if theirs[name] != ours[name] and not name.startswith(_FREE_FIELDS)
    ]
    if differing:
        raise ConfigError(
            f"--workdir={directory}: holds a run with another config; use another workdir, "
            f"or set back {'; '.join(differing)}"
        )


def _write_once(config: Config, prepared: pipeline.Prepared, directory: epath.Path, *, new: bool) -> None:
    """The tokenizer and the config, which the checkpoints need beside them; with its config there, a run is begun."""
    if jax.process_index() != 0:
        return
    for name, content in prepared.tokenizer.files.items():
        if new or not (directory / name).exists():
            write_whole(directory / name, content)
        elif (directory / name).read_bytes() != content:
            raise ConfigError(f"{directory / name}: is not the tokenizer of this run; delete it to get that back")
    if new:
        write_whole(directory / "config.json", json.dumps(to_dict(config), indent=2).encode())


@contextlib.contextmanager
def _disk(directory: epath.Path) -> Iterator[None]:
    """A full, read-only or failing disk, as a sentence."""
    try:
        yield
    except OSError as error:
        raise ConfigError(
            f"--workdir={directory}: {error.strerror or error} ({error.filename or 'while writing'}); the same command "
            f"goes on from step {max(complete_steps(directory), default=0)} when that is mended"
        ) from error
