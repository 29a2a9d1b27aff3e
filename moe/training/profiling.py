"""Profiler trace of some steps of a run, ``--profile=STEP:COUNT``.

The trace is ``WORKDIR/profile/plugins/profile/steps_A-B/HOST.xplane.pb``; view it with
``tensorboard --logdir=WORKDIR/profile`` and its plugin (``pip install xprof``). The train step is wrapped, so the
loop needs no profiling code.
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

from moe.atomic_files import write_atomic
from moe.config import ConfigError
from moe.fields import whole_number
from moe.training.step import Program, build


@dataclasses.dataclass(frozen=True)
class Steps:
    """Range of steps to trace, both ends included."""

    first: int
    last: int


def parse(text: str, num_steps: int) -> Steps:
    """Parse STEP:COUNT.

    Args:
        text: value of the flag.
        num_steps: length of the run.

    Raises:
        ConfigError: malformed text, or steps beyond the run.
    """
    step, count = (whole_number(number) for number in text.partition(":")[::2])
    if not step or not count:
        raise ConfigError(
            f"--profile={text}: must be STEP:COUNT, two numbers from 1 on, such as 10:3 for steps 10 to 12"
        )
    last = step + count - 1
    if last > num_steps:
        raise ConfigError(f"--profile={text}: ends at step {last}, but train.num_steps is {num_steps}")
    return Steps(step, last)


@contextlib.contextmanager
def profiled(steps: Steps | None, workdir: str) -> Iterator[Callable[..., Program]]:
    """Context manager that gives the ``make_program`` argument of :func:`moe.training.loop.train`.

    A run resumed after those steps traces nothing; a run that ends among them keeps the partial trace.

    Args:
        steps: steps to trace; None: none.
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
        self._step: int | None = None  # the last step started
        self._local: tempfile.TemporaryDirectory[str] | None = None  # output of the running trace

    def around(self, train_step: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap a train step: start the trace before the first step of the range, stop it after the last."""

        def traced(state: Any, batch: Any) -> Any:
            # Read from the device once: reading it every step would wait for the previous step.
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
        # One name for all processes of a run; the default is a time, which would differ between them.
        options.session_id = f"steps_{self._steps.first}-{self._steps.last}"
        self._local = tempfile.TemporaryDirectory()
        jax.profiler.start_trace(self._local.name, profiler_options=options)

    def stop(self) -> None:
        """Stop the trace, if one is running, and move its files to the workdir."""
        if self._local is None:
            return
        with self._local as local:
            self._local = None
            jax.profiler.stop_trace()
            for path in Path(local).rglob("*.xplane.pb"):
                target = self._folder / path.relative_to(local)
                if jax.process_count() > 1:  # processes of one host would use the same name
                    target = target.with_name(f"{jax.process_index():05d}_{path.name}")
                target.parent.mkdir(parents=True, exist_ok=True)
                write_atomic(target, path.read_bytes())
