"""Initialisation of parameters, and gathering them for a matmul."""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jax.sharding import PartitionSpec as P

from moe.parallel import target
from moe.parallel.axes import AXES, axis_of, axis_size
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


def gather_shard(shard: Array, dim: int) -> Array:
    """Gather a weight over ``fsdp`` from each device's shard, within ``shard_map``; its gradient is reduce-scattered.

    Args:
        shard: of one device, in the compute dtype.
        dim: that is split.
    """
    with jax.named_scope(f"{WEIGHTS_SCOPE}shards"):
        for groups in _hops(axis_size("fsdp")):
            shard = jax.lax.all_gather(shard, axis_of("fsdp"), axis=dim, tiled=True, axis_index_groups=groups)
    return shard


def _hops(size: int) -> list[list[list[int]] | None]:
    """Groups of the gathers that follow each other: one gather of all, or two where the axis spans a 3D torus.

    XLA for TPUs has no all-gather over three torus dimensions: it adds up arrays padded with zeros, at twice the bytes
    and a write of each array. So the last dimension is gathered first, then the plane of the other two. In slices of
    the default shapes (4x4x4, 4x4x8, ... 8x16x16) the last dimension is the cube root of the chips, rounded up.
    """
    if size < 2:
        return []
    if size < 16 or not target.current().has_3d_torus or size * axis_size("data") < axis_size(*AXES):
        return [None]
    side = 2 ** math.ceil(math.log2(size) / 3)
    if size % side:
        return [None]
    places = np.arange(size).reshape(-1, side)
    return [places.tolist(), places.T.tolist()]


def matrix(rngs: nnx.Rngs, shape: tuple[int, ...], fan_in: int, scale: float) -> nnx.Param[Array]:
    """Float32 parameter from a truncated normal, sigma = sqrt(scale / fan_in), cut at two sigma (Switch 2021,
    section 2.4)."""
    return nnx.Param(jax.nn.initializers.truncated_normal((scale / fan_in) ** 0.5)(rngs.params(), shape, jnp.float32))


def zeros(shape: tuple[int, ...]) -> nnx.Param[Array]:
    """Float32 parameter of zeros."""
    return nnx.Param(jnp.zeros(shape, jnp.float32))
