"""Attention as a loop over blocks of queries, so that T x U scores are never held."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from moe.layers.attention.gpu import runs_cudnn
from moe.layers.attention.relative import bias_of_rows
from moe.layers.attention.scoring import Scoring
from moe.layers.attention.sinks import ADDED, append_sink
from moe.layers.dropout import Dropout

_LARGEST_BLOCK = 512


def blocked_attention(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B U M H"],
    value: Float[Array, "B U M V"],
    segment_ids: Int[Array, "B T"],
    key_segment_ids: Int[Array, "B U"],
    scoring: Scoring,
    *,
    one_block: bool = False,
    first: Int[Array, ""] | int = 0,
) -> Float[Array, "B T N V"]:
    """Same function as :func:`moe.layers.attention.attend.attend`: each block by cuDNN's kernel where GPUs and shapes
    allow it, elsewhere as matmuls whose scores the backward pass recomputes. The queries are those from position
    ``first`` on."""
    batch, length, heads, head_dim = query.shape
    bias, prefix, value_dim = scoring.bias, scoring.prefix, value.shape[-1]
    factor = scoring.factor(head_dim)
    # JAX's function takes heads of one dimension: the shorter ones are padded with zeros.
    query, key, value = (_widen(x, max(head_dim, value_dim)) for x in (query, key, value))
    size = length if one_block else _block_size(length, _LARGEST_BLOCK)
    key_positions = jnp.arange(key.shape[1], dtype=jnp.int32)
    # Documents are given as a mask [size,U]: cuDNN's own form of them, offsets, fixes their number in the shapes.
    plain = bias is None and key.shape[1] % 2 == 0 and not one_block
    width = query.shape[-1] + (0 if scoring.sinks is None else ADDED)
    implementation = "cudnn" if plain and runs_cudnn(query, size, width) else None

    def block(inputs: tuple[Array, Array, Array]) -> Array:
        part, part_segments, start = inputs
        mask = part_segments[:, :, None] == key_segment_ids[:, None, :]
        if scoring.causal:
            distance = start + jnp.arange(size)[:, None] - key_positions  # [size,U]
            visible = scoring.in_window(distance)
            mask &= visible if prefix is None else visible | (prefix[:, None, :] > 0)
        own_bias = None
        if bias is not None:  # of the distances from the last query of the block to the first key, and on
            here = jax.lax.dynamic_slice_in_dim(bias, length - size - start, size + key.shape[1] - 1, axis=1)
            own_bias = bias_of_rows(here, size)[None].astype(part.dtype)
        arrays = part, key, value, mask, own_bias
        if scoring.sinks is not None:
            arrays = append_sink(scoring.sinks, *arrays, factor)
        if scoring.drop.active:
            return _with_dropout(*arrays, factor, scoring.drop, start)[..., :value_dim]
        part, keys, values, mask, own_bias = arrays
        heads = jax.nn.dot_product_attention(
            part, keys, values, own_bias, mask[:, None], scale=factor, implementation=implementation
        )
        return heads[..., :value_dim]

    if size == length and one_block:
        return block((query, segment_ids, jnp.int32(first)))

    # [B,T,...] → [B,T/size,size,...] → [T/size,B,size,...], and back
    def split(x: Array) -> Array:
        return x.reshape(batch, length // size, size, *x.shape[2:]).swapaxes(0, 1)

    starts = first + jnp.arange(0, length, size, dtype=jnp.int32)
    parts = jax.lax.map(jax.checkpoint(block), (split(query), split(segment_ids), starts))
    return parts.swapaxes(0, 1).reshape(batch, length, heads, value_dim)


def _widen(heads: Array, width: int) -> Array:
    """Zeros after the last dimension of every head, up to this width."""
    return jnp.pad(heads, [(0, 0)] * 3 + [(0, width - heads.shape[-1])])


def _with_dropout(
    query: Array,
    key: Array,
    value: Array,
    mask: Array,
    bias: Array | None,
    scale: float,
    drop: Dropout,
    start: Array,
) -> Array:
    """Attention of the queries from ``start`` on, with dropout of its weights, which JAX's own function lacks."""
    batch, length, heads, head_dim = query.shape
    query = query.reshape(batch, length, key.shape[2], -1, head_dim)
    scores = jnp.einsum("btmnh,bumh->bmntu", query, key, preferred_element_type=jnp.float32)
    scores = scores.reshape(batch, heads, length, -1) * scale
    scores = jnp.where(mask[:, None], scores if bias is None else scores + bias, jnp.finfo(jnp.float32).min)
    drop = dataclasses.replace(drop, rng=None if drop.rng is None else jax.random.fold_in(drop.rng, start))
    weights = drop(jax.nn.softmax(scores, axis=-1).astype(value.dtype))
    weights = weights.reshape(batch, key.shape[2], -1, length, key.shape[1])
    return jnp.einsum("bmntu,bumh->btmnh", weights, value).reshape(batch, length, heads, head_dim)


def _block_size(length: int, largest: int) -> int:
    """The largest divisor of a length up to this."""
    return next(size for size in range(min(length, largest), 0, -1) if length % size == 0)
