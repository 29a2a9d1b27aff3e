"""Optimizer state in host memory: where its arrays are stored, and the link that fetches them for an update."""

from __future__ import annotations

from typing import Any

import jax
import optax
from jax.sharding import NamedSharding

from moe.config import ConfigError


def fetched(optimizer: optax.GradientTransformationExtraArgs) -> optax.GradientTransformationExtraArgs:
    """Fetch the state to the device after the gradients, whose ``norm=`` is known then."""

    def update(updates: Any, state: Any, params: Any = None, **known: Any) -> tuple[Any, Any]:
        # Fetched earlier, it would be in memory together with the activations.
        stored, norm = jax.lax.optimization_barrier((state, known["norm"]))
        state = jax.device_put(stored, jax.memory.Space.Device)
        return optimizer.update(updates, state, params, **known | {"norm": norm})

    return optax.GradientTransformationExtraArgs(optimizer.init, update)


def stored(shape: jax.ShapeDtypeStruct, sharding: NamedSharding) -> NamedSharding:
    """Where an array of the state is stored; counters stay on the device.

    Raises:
        ConfigError: JAX does not know the memories of these devices, as of absent GPUs.
    """
    placed = sharding.with_memory_kind("pinned_host") if shape.ndim else sharding
    if shape.ndim and placed.memory_kind != "pinned_host":
        raise ConfigError(
            "optimizer.memory=host: must be device in a plan for GPUs: JAX 0.12 does not know memories of absent ones"
        )
    return placed
