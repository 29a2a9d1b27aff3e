"""Model FLOPs utilisation of a config's train step: `python scripts/mfu.py [--config=FILE] [--steps=N]`.

Prints the rate of one large matmul and that of the step, measured in turns in one process on random tokens.
Alternatives:

`--remat=none,dots,full` prints bytes and step time of each policy, timed in turns.
`--compile_layers=4,32` prints how long the step takes to compile with each number of layers.
`--saves=N` trains as main.py does, on the config's data in a folder that is thrown away, until N checkpoints were
saved, and prints the share of the bare step's speed that data, logs and saving leave; timed in turns.
`--seeds=N` also times N runs as one vmapped program, on one device: whether seeds should train together.
"""

from pathlib import Path

from moe.system import process

if __name__ == "__main__":
    process.prepare()

import dataclasses
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any, cast

from absl import flags

from moe.programs import cli

_CONFIG = cli.define_config(Path(__file__).parents[1] / "configs" / "quickstart.py")
_STEPS = flags.DEFINE_integer("steps", 20, "Train steps that are timed.", lower_bound=3)
_SEEDS = flags.DEFINE_integer("seeds", 1, "Runs in one vmapped program, timed too if more than one.", lower_bound=1)
_REMAT = flags.DEFINE_list("remat", [], "Policies of model.remat to compare.")
_LAYERS = flags.DEFINE_list("compile_layers", [], "Numbers of layers whose compilation is timed.")
_SAVES = flags.DEFINE_integer("saves", 0, "Checkpoints of a real run to compare with the bare step.", lower_bound=0)


def utilisation(config: Any, mesh: Any) -> None:
    """Print MFU, and with --seeds the time of several seeds in one vmapped program."""
    import jax
    import numpy as np

    from moe.lab.benchmarks import timing
    from moe.lab.benchmarks.train_steps import Stepper, random_rows
    from moe.models import flops
    from moe.parallel import target
    from moe.training import profiling
    from moe.training.step import build

    program = build(config, mesh)
    rates: list[float] = []
    calls = {
        "step": Stepper(program),
        "matmul": lambda: rates.append(profiling.measured_matmul_rate(config.model.dtype, repeats=1)),
    }
    if _SEEDS.value > 1:
        states = [jax.vmap(program.initialise)(np.arange(_SEEDS.value))]
        rows = random_rows(config)
        batches = jax.tree.map(lambda x: np.broadcast_to(x, (_SEEDS.value, *x.shape)), rows)
        vmapped = jax.jit(jax.vmap(program.train_step), donate_argnums=0)

        def together() -> None:
            states.append(vmapped(states.pop(), batches)[0])
            jax.block_until_ready(states)

        calls["together"] = together
    seconds = {name: times.clock for name, times in timing.in_turns(calls, _STEPS.value).items()}
    rates = [rate * program.mesh.size for rate in rates]  # each device ran the matmul whole
    step, rate = statistics.median(seconds["step"]), statistics.median(rates[1:])
    tokens = config.tokens_per_step
    per_step = flops.train_flops(config)
    total, active = flops.count_parameters(config.model)
    print(f"parameters: {total:,} total, {active:,} active; {process.allocator()}")
    print(f"model FLOPs per step of {tokens:,} tokens: {per_step / 1e9:.1f} GFLOP")
    print(f"step: {spread(seconds['step'])}")
    print(f"matmul rate: median {rate / 1e9:.0f} GFLOP/s, {min(rates) / 1e9:.0f} to {max(rates) / 1e9:.0f}")
    print(f"step rate: {per_step / step / 1e9:.0f} GFLOP/s, {tokens / step:,.0f} tokens/s")
    print(
        f"MFU: {per_step / step / rate:.2f} by medians, {per_step / min(seconds['step']) / max(rates):.2f} by the best"
    )
    peak = target.current().peak_flops
    if peak:
        share = per_step / step / (peak * program.mesh.size)
        print(f"MFU against the datasheet's {peak / 1e12:.0f} TFLOP/s in bfloat16: {share:.2f}")
    if _SEEDS.value > 1:
        vmapped_step = statistics.median(seconds["together"])
        print(
            f"{_SEEDS.value} seeds vmapped: median {vmapped_step * 1e3:.0f} ms, "
            f"{vmapped_step / step / _SEEDS.value:.2f} x as long as one after another"
        )


def spread(seconds: list[float]) -> str:
    """Median, minimum and maximum as text."""
    return (
        f"median {statistics.median(seconds) * 1e3:.0f} ms of {len(seconds)}, "
        f"{min(seconds) * 1e3:.0f} to {max(seconds) * 1e3:.0f}"
    )


def with_model(config: Any, **changes: Any) -> Any:
    """The config with changed fields of its model, validated."""

    return dataclasses.replace(config, model=dataclasses.replace(config.model, **changes))


def remat(config: Any, mesh: Any) -> None:
    """Print memory and step time of each remat policy."""
    from moe.lab.benchmarks import timing
    from moe.lab.benchmarks.train_steps import Stepper
    from moe.training.step import build

    programs = {policy: build(with_model(config, remat=policy), mesh) for policy in _REMAT.value}
    sizes = {
        policy: cast(Any, program.train_step).lower(program.state, program.batch).compile().memory_analysis()
        for policy, program in programs.items()
    }
    times = timing.in_turns({policy: Stepper(program) for policy, program in programs.items()}, _STEPS.value)
    for policy, seconds in times.items():
        values, size = seconds.clock, sizes[policy]
        print(
            f"{policy:5} {size.temp_size_in_bytes / 2**20:7.0f} MiB beside the state's "
            f"{size.alias_size_in_bytes / 2**20:.0f}; step {spread(values)}"
        )


def compilation(config: Any, mesh: Any) -> None:
    """Print seconds to trace, lower and compile, after an unmeasured warm-up of the first number of layers."""
    import jax

    from moe.config import ConfigError
    from moe.system.fields import whole_number
    from moe.training.step import build

    for number in _LAYERS.value:
        if not whole_number(number):
            raise ConfigError(f"--compile_layers={','.join(_LAYERS.value)}: {number!r} must be a positive integer")
    seconds: dict[int, list[float]] = {int(layers): [] for layers in _LAYERS.value}
    for turn in range(3):
        for layers, values in seconds.items():
            jax.clear_caches()
            start = time.perf_counter()
            program = build(with_model(config, num_layers=layers), mesh)
            cast(Any, program.train_step).lower(program.state, program.batch).compile()
            if turn > 0 or layers != next(iter(seconds)):
                values.append(time.perf_counter() - start)
    least = min(next(iter(seconds.values())))
    for layers, values in seconds.items():
        print(
            f"{layers} layers: {', '.join(f'{value:.1f}' for value in values)} s to compile; "
            f"{min(values) / least:.2f} x the first"
        )


class Alternating:
    """Inserts bare steps with their own state into a run, halfway between checkpoints, when the last one is written."""

    def __init__(self, every: int):
        self._every, self._calls = every, 0
        self.run: list[float] = []  # seconds per step, from one insertion to the next
        self.bare: list[float] = []
        self._start = 0.0

    def make_program(self, *arguments: Any) -> Any:
        """:func:`moe.training.step.build`, with steps inserted."""
        from moe.lab.benchmarks.train_steps import Stepper
        from moe.training.step import build

        program = build(*arguments)
        self._stepper = Stepper(program)
        self._stepper()
        return dataclasses.replace(program, train_step=self._around(program.train_step))

    def _around(self, train_step: Any) -> Any:
        def step(state: Any, batch: Any) -> Any:
            import jax

            if self._calls % self._every == self._every // 2:
                jax.block_until_ready(state)
                if self._calls > self._every:
                    self.run.append((time.perf_counter() - self._start) / self._every)
                self.bare += timed_again(self._stepper, max(self._every // 4, 3))
                self._start = time.perf_counter()
            self._calls += 1
            return train_step(state, batch)

        return step


def timed_again(call: Callable[[], Any], repeats: int) -> list[float]:
    """Seconds of each of several calls."""
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return seconds


def whole_run(config: Any) -> None:
    """Print a run's speed as a share of the bare step's."""
    from moe.training.train import train

    every = config.train.save_every
    num_steps = every * (_SAVES.value + 1)
    settings = dataclasses.replace(config.train, num_steps=num_steps, eval_every=num_steps, sample_tokens=0)
    warmup = min(config.optimizer.warmup_steps, num_steps - 1)
    optimizer = dataclasses.replace(config.optimizer, warmup_steps=warmup)
    turns = Alternating(every)
    with tempfile.TemporaryDirectory() as folder:
        config = dataclasses.replace(config, train=settings, optimizer=optimizer)
        train(config, f"{folder}/run", make_program=turns.make_program, quiet=True)
    bare, run = statistics.fmean(turns.bare), statistics.fmean(turns.run)
    print(f"bare step: mean {bare * 1e3:.0f} ms; {spread(turns.bare)}")
    print(f"in a run: mean {run * 1e3:.0f} ms of {len(turns.run)} times {every} steps, each with a checkpoint")
    print(f"the run keeps {bare / run:.3f} of the bare step's speed")


def main() -> None:
    """Print what the flags ask for."""
    cli.only_with(not _SAVES.value, "is not read with --saves, which trains a run", _STEPS, _SEEDS, _REMAT, _LAYERS)
    cli.only_with(not _REMAT.value, "is not read with --remat", _SEEDS, _LAYERS)
    cli.only_with(not _LAYERS.value, "is not read with --compile_layers, which runs no step", _STEPS, _SEEDS)
    config = cli.load_config(_CONFIG)
    import jax

    from moe.config import validate_mesh
    from moe.lab.benchmarks.train_steps import refuse_more_than_the_model
    from moe.parallel.mesh import make_mesh

    mesh = make_mesh(config.mesh)
    validate_mesh(config, mesh.shape)
    if _SAVES.value:
        whole_run(config)
        return
    refuse_more_than_the_model(config)
    with jax.set_mesh(mesh):
        if _REMAT.value:
            remat(config, mesh)
        elif _LAYERS.value:
            compilation(config, mesh)
        else:
            utilisation(config, mesh)


if __name__ == "__main__":
    cli.run(
        main,
        examples=(
            "python scripts/mfu.py",
            "python scripts/mfu.py --remat=none,dots,full",
        ),
    )
