"""Initialisation of parameters, and gathering them for a matmul."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.sharding import PartitionSpec as P

from moe.parallel.mesh import constrain
from moe.parallel.partition_specs import PARAMETERS, STORED, fit, without

#: Prefix of the named scopes of :func:`gather_for_matmul`, by which the planner finds weight exchanges in compiled
#: programs.
WEIGHTS_SCOPE = "weights."


def gather_for_matmul(name: str, parameter: Array, dtype: Any) -> Array:
    """Cast a parameter and gather its stored shards for a matmul; its gradient is reduce-scattered.

    The shardings are explicit because XLA might otherwise move tokens instead of weights.

    Args:
        name: key of :data:`PARAMETERS`.
        parameter: array of one layer, without the leading layer axis.
        dtype: compute dtype.
    """
    stored = fit(PARAMETERS[name], parameter.shape)
    # One axis at a time: for both at once, XLA for TPUs emits an all-reduce of the zero-padded weight, and another for
    # the gradient, which doubles the traffic and compiles slowly.
    specs, spec = [stored], stored
    for axis in ("fsdp",) if name.startswith("experts.") else reversed(STORED):
        spec = P(*(without(axes, (axis,)) for axes in spec))
        specs.append(spec)

    @jax.custom_vjp
    def gather(weights: Array) -> Array:
        return functools.reduce(constrain, specs[1:], weights)

    gather.defvjp(
        lambda weights: (gather(weights), None),
        lambda _, gradient: (functools.reduce(constrain, specs[-2::-1], gradient),),
    )
    with jax.named_scope(f"{WEIGHTS_SCOPE}{name}"):
        return gather(parameter.astype(dtype))


def matrix(rngs: nnx.Rngs, shape: tuple[int, ...], fan_in: int, scale: float) -> nnx.Param[Array]:
    """Float32 parameter from a truncated normal, sigma = sqrt(scale / fan_in), cut at two sigma (Switch 2021,
    section 2.4)."""
    return nnx.Param(jax.nn.initializers.truncated_normal((scale / fan_in) ** 0.5)(rngs.params(), shape, jnp.float32))


def zeros(shape: tuple[int, ...]) -> nnx.Param[Array]:
    """Float32 parameter of zeros."""
    return nnx.Param(jnp.zeros(shape, jnp.float32))
