"""Parameters: how they are initialised, and gathered for a matmul."""

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


def use(name: str, parameter: Array, dtype: Any) -> Array:
    """A parameter as a matmul wants it: cast, then gathered where it is stored split; its gradient is scattered back.

    Said explicitly because XLA, left to itself, may move the tokens instead of the weights.

    Args:
        name: key of :data:`PARAMETERS`.
        parameter: one layer's array, without the leading layer axis.
        dtype: of the computation.
    """
    stored = fit(PARAMETERS[name], parameter.shape)
    # One axis after the other: over both at once XLA for TPUs makes an all-reduce of it, of the whole weight padded
    # with zeros, and sums the gradient by another; that is twice the traffic, and code that takes long to compile.
    parts, whole = [stored], stored
    for axis in ("fsdp",) if name.startswith("experts.") else reversed(STORED):
        whole = P(*(without(axes, (axis,)) for axes in whole))
        parts.append(whole)

    @jax.custom_vjp
    def gather(weights: Array) -> Array:
        return functools.reduce(constrain, parts[1:], weights)

    gather.defvjp(
        lambda weights: (gather(weights), None),
        lambda _, gradient: (functools.reduce(constrain, parts[-2::-1], gradient),),
    )
    with jax.named_scope(f"weights.{name}"):  # by this a compiled program's exchanges of weights are told apart
        return gather(parameter.astype(dtype))


def matrix(rngs: nnx.Rngs, shape: tuple[int, ...], fan_in: int, scale: float) -> nnx.Param[Array]:
    """A float32 parameter drawn from a truncated normal, sigma = sqrt(scale / fan_in), cut at two sigma
    (Switch 2021, section 2.4)."""
    return nnx.Param(jax.nn.initializers.truncated_normal((scale / fan_in) ** 0.5)(rngs.params(), shape, jnp.float32))


def zeros(shape: tuple[int, ...]) -> nnx.Param[Array]:
    """A float32 parameter of zeros: a bias."""
    return nnx.Param(jnp.zeros(shape, jnp.float32))
