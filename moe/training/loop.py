"""The training loop: batch, train step, log, evaluate, save, stop."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from etils import epath

from moe.checkpoints.integrity import is_finite
from moe.checkpoints.manager import Checkpoints
from moe.config import Config, ConfigError, to_dict
from moe.data import pipeline
from moe.models.state import TrainState
from moe.system import process
from moe.system.guarded import is_own
from moe.system.metrics_files import METRICS, TIMING, MetricsWriter
from moe.system.signals import StopSignals
from moe.training import progress
from moe.training.batches import joined, place
from moe.training.evaluation import Heldout, evaluate
from moe.training.metric_writers import find_writers
from moe.training.metrics import StepClock, Throughput, mean_row, step_metrics
from moe.training.optimizer import averaged_weights
from moe.training.own_code import PureCode
from moe.training.recovery import DivergedError, Health, Recovery, next_batch
from moe.training.step import Program
from moe.training.update import TrainMetrics


@dataclasses.dataclass(frozen=True)
class Start:
    """Everything that the loop begins with.

    Attributes:
        prepared: documents and tokenizer.
        iterator: positioned at the batch of the next step.
        heldout: loads the batches of every evaluation.
        directory: the workdir.
        step: steps done.
        state: after these steps.
        saved: JSON that :class:`Loop` left in the checkpoint of that step; empty at step 0.
        own_code: checked again when all programs are traced.
    """

    program: Program
    prepared: pipeline.Prepared
    iterator: Any
    heldout: Callable[[], Heldout]
    checkpoints: Checkpoints
    directory: epath.Path
    step: int
    state: TrainState
    saved: dict[str, Any]
    own_code: PureCode


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


class Loop:
    """For each step: batch, train step; then, when due: log, evaluate, save, stop. Always in this order.

    A checkpoint at step n therefore comes after all rows of step n, and its iterator stands at batch n+1. ``pending``
    are the metrics since the last logged row; they are saved too, so that a resumed run writes the same next row.
    """

    def __init__(self, start: Start, signals: StopSignals, shown: progress.Progress):
        """
        Args:
            signals: checked at the end of every step.
            shown: progress on standard error.
        """
        self._program = start.program
        self._iterator = start.iterator
        self._heldout = start.heldout
        self._checkpoints = start.checkpoints
        self._directory = start.directory
        self._start = start.step
        self._own_code = start.own_code
        self._signals = signals
        self._progress = shown
        self._config = start.program.config.train
        self._pending: list[Any] = start.saved.get("pending", [])
        self._health = Health(self._config.spike_sigmas, self._config, start.saved.get("health"))
        self._recovery = Recovery(start.program, start.checkpoints)
        self._throughput = Throughput(start.program.config)
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
                    count = config.rows_at(step) // config.rows_read
                    batch = joined([next_batch(self._iterator, step, self._checkpoints) for _ in range(count)])
                state, metrics = self._program.train_step(state, place(batch, self._program.mesh))
                self._pending.append(metrics)
                if step == first:
                    jax.block_until_ready(metrics)
                    refuse_wrong_choices(self._program.config, metrics, step)
                    self._progress.write(f"[{process.seconds_running():6.1f} s] step {step}, the first one, is done")
                    self._compile_evaluation(state)
                    self._own_code.check()
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
        steps_timed, until = self._clock.steps, self._config.batches_until
        batches = (until(step) - until(step - steps_timed)) / steps_timed
        timing = self._throughput.row(*self._clock.lap(), batches)
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
