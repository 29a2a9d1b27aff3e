"""Attention as a loop over blocks of queries, so that T x T scores are never held."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from moe.layers.attention.gpu import runs_cudnn
from moe.layers.attention.masked import masked_attention, visible_keys

_LARGEST_BLOCK = 512


def blocked_attention(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B T M H"],
    value: Float[Array, "B T M H"],
    segment_ids: Int[Array, "B T"],
    sinks: Float[Array, " N"] | None,
    window: int,
) -> Float[Array, "B T N H"]:
    """Same function as :func:`moe.layers.attention.attend.attend`: each block by cuDNN's kernel where GPUs and shapes
    allow it, elsewhere as matmuls whose scores the backward pass recomputes."""
    batch, length, heads, head_dim = query.shape
    size = _block_size(length, _LARGEST_BLOCK)
    positions = jnp.arange(length, dtype=jnp.int32)
    # Documents are given as a mask [size,U]: cuDNN's own form of them, offsets, fixes their number in the shapes.
    implementation = "cudnn" if runs_cudnn(query, size) else None

    @jax.checkpoint
    def block(inputs: tuple[Array, Array, Array]) -> Array:
        part, part_segments, part_positions = inputs
        mask = visible_keys(part_positions, positions, part_segments, segment_ids, window)
        return masked_attention(part, key, value, mask, sinks, implementation)

    # [B,T,...] → [B,T/size,size,...] → [T/size,B,size,...], and back
    def split(x: Array) -> Array:
        return x.reshape(batch, length // size, size, *x.shape[2:]).swapaxes(0, 1)

    parts = jax.lax.map(block, (split(query), split(segment_ids), positions.reshape(-1, size)))
    return parts.swapaxes(0, 1).reshape(batch, length, heads, head_dim)


def _block_size(length: int, largest: int) -> int:
    """The largest divisor of a length up to this."""
    return next(size for size in range(min(length, largest), 0, -1) if length % size == 0)
