"""A trace of some steps of a run, for TensorBoard's profiler.

In: ``--profile=STEP:COUNT``. Out: ``WORKDIR/profile/plugins/profile/steps_A-B/HOST.xplane.pb``, which
``tensorboard --logdir=WORKDIR/profile`` shows where its plugin (``pip install xprof``) is installed. The loop knows
nothing of it: the train step that it calls starts and stops the trace.
"""

from __future__ import annotations

import contextlib
import dataclasses
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
from etils import epath

from moe.config import ConfigError
from moe.training.step import Program, build


@dataclasses.dataclass(frozen=True)
class Steps:
    """first, …, last: the steps to trace."""

    first: int
    last: int


def parse(text: str, num_steps: int) -> Steps:
    """STEP:COUNT as steps.

    Args:
        text: of the flag.
        num_steps: of the run.

    Raises:
        ConfigError: it is no such text, or the run has no such steps.
    """
    step, _, count = text.partition(":")
    if not (step.isdecimal() and count.isdecimal() and int(step) >= 1 and int(count) >= 1):
        raise ConfigError(
            f"--profile={text}: must be STEP:COUNT, two numbers from 1 on, such as 10:3 for steps 10 to 12"
        )
    last = int(step) + int(count) - 1
    if last > num_steps:
        raise ConfigError(f"--profile={text}: ends at step {last}, but train.num_steps is {num_steps}")
    return Steps(int(step), last)


@contextlib.contextmanager
def profiled(steps: Steps | None, workdir: str) -> Iterator[Callable[..., Program]]:
    """As a context manager, what to give :func:`moe.training.loop.train` as ``make_program``.

    A run that is resumed after those steps traces nothing. One that ends between them keeps what was traced.

    Args:
        steps: to trace; None: none.
        workdir: of the run.
    """
    if steps is None:
        yield build
        return
    tracer = _Tracer(steps, epath.Path(workdir) / "profile")

    def make_program(*arguments: Any) -> Program:
        program = build(*arguments)
        return dataclasses.replace(program, train_step=tracer.around(program.train_step))

    try:
        yield make_program
    finally:
        tracer.stop()


class _Tracer:
    def __init__(self, steps: Steps, folder: epath.Path):
        self._steps, self._folder = steps, folder
        self._step: int | None = None  # the last one begun
        self._local: tempfile.TemporaryDirectory[str] | None = None  # while it runs: where the trace will be written

    def around(self, train_step: Callable[..., Any]) -> Callable[..., Any]:
        """The same step, with the trace begun before and ended after it where that is due."""

        def traced(state: Any, batch: Any) -> Any:
            # Read from the device once: later it would wait for the step before.
            self._step = int(state.step) + 1 if self._step is None else self._step + 1
            inside = self._steps.first <= self._step <= self._steps.last
            if inside and self._local is None:
                jax.block_until_ready(state)
                self._start()
            with jax.profiler.StepTraceAnnotation("train", step_num=self._step):
                result = train_step(state, batch)
            if self._step == self._steps.last and self._local is not None:
                jax.block_until_ready(result)
                self.stop()
            return result

        return traced

    def _start(self) -> None:
        options = jax.profiler.ProfileOptions()
        # All processes of a run under one name; the time of day would differ between them.
        options.session_id = f"steps_{self._steps.first}-{self._steps.last}"
        self._local = tempfile.TemporaryDirectory()
        jax.profiler.start_trace(self._local.name, profiler_options=options)

    def stop(self) -> None:
        """Ends the trace, if one runs, and puts its files where they belong."""
        if self._local is None:
            return
        with self._local as local:
            self._local = None
            jax.profiler.stop_trace()
            for path in Path(local).rglob("*.xplane.pb"):
                target = self._folder / path.relative_to(local)
                if jax.process_count() > 1:  # several on one host would have the same name
                    target = target.with_name(f"{jax.process_index():05d}_{path.name}")
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(path.read_bytes())
