"""The state of a run that a checkpoint holds."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np
import optax
from jax import Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Everything on the devices that a resumed run needs.

    Attributes:
        step: [] int32, optimizer steps done.
        parameters: nested dict of float32 arrays.
        biases: nested dict of the routers' selection biases, which no gradient reaches; empty with most gates.
        optimizer: Optax state.
        rng: [2] uint32, key of the run's routing noise; step n uses fold_in(rng, n).
    """

    step: Array
    parameters: dict[str, Any]
    biases: dict[str, Any]
    optimizer: Any
    rng: Array

    @property
    def variables(self) -> dict[str, Any]:
        """Parameters and biases in one nested dict: all that the model is made of."""
        return join(self.parameters, self.biases)


def join(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    """Two nested dicts without a common leaf as one."""
    joined = dict(first)
    for name, value in second.items():
        joined[name] = join(joined[name], value) if name in joined else value
    return joined


def at_step(optimizer: Any, step: Any) -> Any:
    """An optimizer's state whose learning rate is that of a step; nothing else in it moves."""

    def move(node: Any) -> Any:
        return node._replace(count=step) if isinstance(node, optax.ScaleByScheduleState) else node

    return jax.tree.map(move, optimizer, is_leaf=lambda node: isinstance(node, optax.ScaleByScheduleState))


def rolled_back(state: TrainState, step: int) -> TrainState:
    """An earlier state that goes on at a later step: its routing noise and learning rate are that step's."""

    def count() -> Array:  # made twice: the train step reuses the buffers of its arguments
        return jax.device_put(np.asarray(step, np.int32), state.step.sharding)

    return dataclasses.replace(state, step=count(), optimizer=at_step(state.optimizer, count()))
