"""Parameters of layers, with their storage as metadata."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P
from jaxtyping import Array

from moe.parallel.partition_specs import (
    REPLICATED,
)


def parameter[V: nnx.Variable[Any]](value: Array, spec: P, *, kind: type[V] = nnx.Param, inputs: int = 0) -> V:
    """A variable of a model, with its storage as metadata.

    Args:
        spec: in roles of mesh axes, an entry for each axis; :data:`REPLICATED`: every device holds all of it.
        kind: class of the variable.
        inputs: number of input axes of a matrix; 0 for anything but a matrix.
    """
    if spec and len(spec) != value.ndim:
        raise ValueError(f"{spec}: must have an entry for each axis of a parameter of shape {value.shape}")
    return kind(value, spec=tuple(spec) or (None,) * value.ndim, inputs=inputs)


def matrix(
    rngs: nnx.Rngs, shape: tuple[int, ...], spec: P, *, fan_in: int, scale: float, inputs: int = 1
) -> nnx.Param[Array]:
    """Float32 parameter from a truncated normal, sigma = sqrt(scale / fan_in), cut at two sigma (Switch 2021,
    section 2.4)."""
    return parameter(draw(rngs.params(), shape, (scale / fan_in) ** 0.5), spec, inputs=inputs)


def draw(key: Array, shape: tuple[int, ...], sigma: float) -> Array:
    """Float32 numbers from a normal with this sigma, cut at two sigma."""
    return jax.nn.initializers.truncated_normal(sigma)(key, shape, jnp.float32)


def zeros(shape: tuple[int, ...], spec: P = REPLICATED, *, inputs: int = 0) -> nnx.Param[Array]:
    """Float32 parameter of zeros."""
    return parameter(jnp.zeros(shape, jnp.float32), spec, inputs=inputs)
