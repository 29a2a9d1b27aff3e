"""Largest attention scores, computed apart from attention, whose kernels do not return them."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from moe.layers.attention.attend import largest_divisor
from moe.layers.attention.scoring import Scoring
from moe.parallel import partition_specs
from moe.parallel.mesh import axis_of, axis_size, on_mesh

#: Maximum number of queries whose scores are held in memory at once.
_LARGEST_BLOCK = 512


def largest_scores(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B T M H"],
    segment_ids: Int[Array, "B T"],
    key_segment_ids: Int[Array, "B T"],
    scoring: Scoring,
) -> Float[Array, " N"]:
    """Largest factor·query·key of each head over all pairs that attention sees, without padding, in float32.

    No gradient flows through it. It costs one more product of queries and keys, on every mesh: each device computes
    its own rows, heads and queries. −inf where there is no pair.

    Args:
        query, key, segment_ids, key_segment_ids: see :func:`moe.layers.attention.attend.attend`.
        scoring: likewise; biases and sinks are not part of the scores.
    """
    axis, split = axis_of("context"), axis_size("context") > 1

    def local(query: Array, key: Array, segment_ids: Array, key_segment_ids: Array, prefix: Array | None) -> Array:
        first = 0
        if split:
            key, key_segment_ids = (jax.lax.all_gather(x, axis, axis=1, tiled=True) for x in (key, key_segment_ids))
            first = jax.lax.axis_index(axis) * query.shape[1]
        own = dataclasses.replace(scoring, prefix=prefix)
        return _largest(query, key, segment_ids, key_segment_ids, own, first)[:, None]

    query, key = jax.lax.stop_gradient((query, key))
    arrays = query, key, segment_ids, key_segment_ids, scoring.prefix
    if jax.sharding.get_abstract_mesh().empty:
        return jnp.max(local(*arrays), axis=(0, 1))
    heads, row = on_mesh(partition_specs.HEADS), on_mesh(partition_specs.BATCH)
    spread = jax.shard_map(local, in_specs=(heads, heads, row, row, row), out_specs=heads, check_vma=False)
    return jnp.max(spread(*arrays), axis=(0, 1))  # [B,context,N] → [N]


def _largest(
    query: Array,
    key: Array,
    segment_ids: Array,
    key_segment_ids: Array,
    scoring: Scoring,
    first: Array | int,
) -> Float[Array, "B N"]:
    """Largest scores of queries from position ``first`` on, a block of queries at a time."""
    batch, length, heads, head_dim = query.shape
    size = largest_divisor(length, _LARGEST_BLOCK)
    factor = scoring.factor(head_dim)

    def block(inputs: tuple[Array, Array, Array]) -> Array:
        part, documents, start = inputs
        part = part.reshape(batch, size, key.shape[2], -1, head_dim)
        scores = factor * jnp.einsum("bqmnh,bumh->bmnqu", part, key, preferred_element_type=jnp.float32)
        mask = scoring.mask(documents, key_segment_ids, start, 0) & (key_segment_ids > 0)[:, None]
        return jnp.max(scores, axis=(3, 4), where=mask[:, None, None], initial=-jnp.inf).reshape(batch, heads)

    # [B,T,...] → [T/size,B,size,...]
    blocks = [x.reshape(batch, -1, size, *x.shape[2:]).swapaxes(0, 1) for x in (query, segment_ids)]
    starts = first + jnp.arange(0, length, size)
    return jnp.max(jax.lax.map(block, (*blocks, starts)), axis=0)
