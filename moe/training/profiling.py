"""Measurements of the machine of a run: the rate of matmuls, memory, and profiler traces.

``--profile=STEP:COUNT`` traces some steps, to ``WORKDIR/profile/plugins/profile/steps_A-B/HOST.xplane.pb``; view it
with ``tensorboard --logdir=WORKDIR/profile`` and its plugin (``pip install xprof``). The train step is wrapped, so the
loop needs no profiling code.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from etils import epath

from moe.config import ConfigError
from moe.parallel import target
from moe.parallel.partition_specs import shard_bytes
from moe.system.atomic_files import write_atomic
from moe.system.fields import whole_number
from moe.training.step import Program, build


def measured_matmul_rate(
    dtype: str = "float32", size: int | None = None, repeats: int = 5, chain: int | None = None
) -> float:
    """FLOP/s of large square matmuls on one device, measured now.

    Args:
        size: rows of a matrix; None: 2048 on CPU, 8192 on accelerators.
        repeats: number of measurements; their median is used.
        chain: matmuls of one program; None: 1 on CPU, 16 on accelerators, where a single one would measure the launch.
    """
    on_cpu = target.is_cpu()
    size = size or (2048 if on_cpu else 8192)
    chain = chain or (1 if on_cpu else 16)
    # Every row of the factor sums to 1, so that products stay finite however long the chain.
    factor = jnp.full((size, size), 1.0 / size, dtype)
    multiply = jax.jit(functools.partial(_multiply, chain=chain))
    multiply(factor, factor).block_until_ready()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        multiply(factor, factor).block_until_ready()
        times.append(time.perf_counter() - start)
    return 2 * size**3 * chain / statistics.median(times)


def _multiply(matrix: jax.Array, factor: jax.Array, chain: int) -> jax.Array:
    return jax.lax.fori_loop(0, chain, lambda _, product: product @ factor, matrix) if chain > 1 else matrix @ factor


_SMALLER = "a smaller model or train.batch_size, more devices"


def refuse_too_large(program: Program, teacher: Any = None) -> None:
    """Raise ConfigError if the training state, a teacher and one layer's activations exceed its devices' memory, or
    what is kept in the host's memory exceeds that; allocate nothing.

    The devices of a CPU share the machine's memory.

    Args:
        teacher: variables of the second model, if there is one.
    """
    devices, config = program.mesh.local_devices, program.config

    # Activations [B,T,D] of a microbatch and their gradient.
    activations = 2 * shard_bytes(program.batch["tokens"]) * config.model.d_model // config.train.accumulation_steps
    on_cpu = target.is_host(devices[0])
    needed = shard_bytes((program.state, teacher), host=on_cpu) + activations
    host = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if on_cpu:
        needed *= len(devices)
        available = host
    else:
        available = target.device_memory(devices[0])
    if needed > available:
        raise ConfigError(
            f"model: training state and activations need {needed / 2**30:,.1f} GiB where there are "
            f"{available / 2**30:,.1f} GiB; {_SMALLER}, or a larger train.accumulation_steps need less"
        )
    kept = (shard_bytes(program.state, host=True) - shard_bytes(program.state)) * len(devices)
    if kept > host:
        raise ConfigError(
            f"optimizer.memory=host: needs {kept / 2**30:,.1f} GiB of the host's {host / 2**30:,.1f} GiB; "
            "optimizer.memory=device, or more hosts, need less"
        )


@contextlib.contextmanager
def out_of_memory_as_config_error() -> Iterator[None]:
    """Turn the devices' out-of-memory errors into ConfigError."""
    try:
        yield
    except (MemoryError, jax.errors.JaxRuntimeError) as error:
        if not target.is_out_of_memory(error):
            raise
        raise ConfigError(f"model: does not fit in memory; {_SMALLER}, or model.remat=full need less") from error


@dataclasses.dataclass(frozen=True)
class Steps:
    """Range of steps to trace, both ends included."""

    first: int
    last: int


def parse(text: str, num_steps: int) -> Steps:
    """Parse STEP:COUNT.

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
def profiled(
    steps: Steps | None, workdir: str, make: Callable[..., Program] = build
) -> Iterator[Callable[..., Program]]:
    """Context manager that gives the ``make_program`` argument of :func:`moe.training.train.train`.

    A run resumed after those steps traces nothing; a run that ends among them keeps the partial trace.

    Args:
        steps: steps to trace; None: none.
    """
    if steps is None:
        yield make
        return
    tracer = _Tracer(steps, epath.Path(workdir) / "profile")

    def make_program(*arguments: Any) -> Program:
        program = make(*arguments)
        return dataclasses.replace(program, train_step=tracer.around(program.train_step))

    try:
        yield make_program
    finally:
        tracer.stop()


class _Tracer:
    def __init__(self, steps: Steps, folder: epath.Path):
        self._steps = steps
        self._folder = folder
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
