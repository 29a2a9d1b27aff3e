"""Train steps on random tokens, timed in turns."""

from __future__ import annotations

from collections.abc import Mapping

import jax
import numpy as np

from moe.config import Config, ConfigError
from moe.lab.benchmarks import timing
from moe.parallel.mesh import make_mesh
from moe.training import batches
from moe.training.step import Program, build


def random_rows(config: Config) -> dict[str, np.ndarray]:
    """A batch of random tokens, one document per row, of which half is the prefix in a prefix LM."""
    model, rng = config.model, np.random.default_rng(0)

    def column(name: str, shape: tuple[int, ...]) -> np.ndarray:
        positions = np.arange(shape[1])
        match name:
            case "tokens" | "targets":
                return rng.integers(3, model.vocab_size, shape)
            case "encoder_tokens":
                return rng.integers(3, model.encoder_vocab_size or model.vocab_size, shape)
            case "positions" | "encoder_positions":
                return np.broadcast_to(positions, shape)
            case batches.PREFIX_KEY:
                return np.broadcast_to(positions < shape[1] // 2, shape)
            case batches.EXPERTS_KEY:
                every = np.broadcast_to(np.arange(model.moe.num_experts), (*shape[:-1], model.moe.num_experts))
                return rng.permuted(every, axis=-1)[..., : shape[-1]]
            case _:  # segment ids, and the other arrays of a policy's rollouts
                return np.ones(shape)

    shapes = batches.batch_shapes(config).items()
    return {name: column(name, (config.train.batch_size, *shape)).astype(dtype) for name, (shape, dtype) in shapes}


def refuse_more_than_the_model(config: Config) -> None:
    """Raise ConfigError for a run whose step does more than train the model on text: with a teacher, or on answers."""
    if config.distill.teacher or config.objective.has_reference:
        raise ConfigError(
            f"distill.teacher={config.distill.teacher!r}, data.objective={config.data.objective!r}: a step is timed by "
            "itself only on text and without a teacher; use scripts/mfu.py --saves=N, which times the whole run"
        )


class Stepper:
    """A train step with its own state; a call runs one step and waits for it."""

    def __init__(self, program: Program):
        self._step = program.train_step
        self._state, self._batch = program.init(), batches.place(random_rows(program.config), program.mesh)
        jax.block_until_ready(self._state)

    def __call__(self) -> None:
        """Run one step and wait for it."""
        self._state, _ = self._step(self._state, self._batch)
        jax.block_until_ready(self._state)


def processor_seconds(configs: Mapping[str, Config], steps: int) -> dict[str, tuple[float, float, float]]:
    """Processor seconds of a step of each run: quantiles 0.1, 0.5 and 0.9 over the steps.

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
