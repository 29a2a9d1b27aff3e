"""Train steps on random tokens, timed in turns."""

from __future__ import annotations

from collections.abc import Mapping

import jax
import numpy as np

from moe.benchmarks import timing
from moe.config import Config
from moe.parallel.mesh import make_mesh
from moe.training.batches import place
from moe.training.step import Program, build


def random_rows(config: Config) -> dict[str, np.ndarray]:
    """A batch of random tokens, one document per row."""
    shape = (config.train.batch_size, config.data.sequence_length)
    tokens = np.random.default_rng(0).integers(3, config.model.vocab_size, shape).astype(np.int32)
    positions = np.broadcast_to(np.arange(shape[1], dtype=np.int32), shape)
    return {"tokens": tokens, "targets": tokens, "segment_ids": np.ones_like(tokens), "positions": positions}


class Stepper:
    """A train step with its own state; a call runs one step and waits for it."""

    def __init__(self, program: Program):
        self._step = program.train_step
        self._state, self._batch = program.init(), place(random_rows(program.config), program.mesh)
        jax.block_until_ready(self._state)

    def __call__(self) -> None:
        """Run one step and wait for it."""
        self._state, _ = self._step(self._state, self._batch)
        jax.block_until_ready(self._state)


def processor_seconds(configs: Mapping[str, Config], steps: int) -> dict[str, tuple[float, float, float]]:
    """Processor time of a step of each run: a tenth, half and nine tenths of the steps took at most so long.

    Steps are measured in turns, so that a busy moment of the machine affects all runs.
    """
    steppers = {}
    for name, config in configs.items():
        mesh = make_mesh(config.mesh)
        with jax.set_mesh(mesh):
            steppers[name] = Stepper(build(config, mesh))
    found = {}
    for name, seconds in timing.in_turns(steppers, steps).items():
        low, middle, high = np.quantile(seconds.processor, (0.1, 0.5, 0.9))
        found[name] = float(low), float(middle), float(high)
    return found
