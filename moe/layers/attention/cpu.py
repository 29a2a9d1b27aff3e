"""Causal attention on CPU: blocks of queries, each against the keys it may see, with a custom gradient.

XLA, given all T x T scores at once, also computes the masked half and writes scores a dozen times in layouts that its
matmuls then copy. Here a block leaves out keys that none of its queries sees, scores have the layout the matmuls want,
and the backward pass recomputes them, which costs less than reading them from memory. In the shapes below, n is the
number of query heads per key/value head and Q the number of queries in a block.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float, Int

from moe.layers.attention.scoring import sees

#: Blocks of a row: 9/16 of T x T is computed. More blocks gain little and take long to compile.
_BLOCKS = 8

#: Fewest queries of a block.
_SMALLEST_BLOCK = 32


def _blocks(length: int, window: int) -> list[tuple[int, int, int]]:
    """(first query, end of queries, first key that any of them sees) of each block."""
    size = max(-(-length // _BLOCKS), _SMALLEST_BLOCK)
    starts = range(0, length, size)
    return [(start, min(start + size, length), max(start - window + 1, 0) if window else 0) for start in starts]


def _matmul(left: Array, right: Array, contract: tuple[int, int]) -> Array:
    """Contract these axes of [B,M,·,·] and [B,M,·,·], in float32."""
    dims = (((contract[0],), (contract[1],)), ((0, 1), (0, 1)))
    return lax.dot_general(left, right, dims, preferred_element_type=jnp.float32)


def _by_head(x: Array, heads_per_key: int) -> Array:
    """[B,T,M·n,H] → [B,M,n,T,H]."""
    return x.reshape(*x.shape[:2], -1, heads_per_key, x.shape[-1]).transpose(0, 2, 3, 1, 4)


def _by_token(x: Array) -> Array:
    """[B,M,n,T,H] → [B,T,M·n,H]."""
    x = x.transpose(0, 3, 1, 2, 4)
    return x.reshape(*x.shape[:2], -1, x.shape[-1])


def _rows(x: Array, start: int, stop: int) -> Array:
    """[B,M,n,T,H] → [B,M,n·Q,H] of a block."""
    x = x[:, :, :, start:stop]
    return x.reshape(*x.shape[:2], -1, x.shape[-1])


def _scores(
    query: Array, keys: Array, segment_ids: Array, window: int, scale: float, block: tuple[int, int, int]
) -> Array:
    """Scores [B,M,n,Q,U] of a block in float32, −inf where a query does not see a key."""
    start, stop, first = block
    batch, heads, groups = query.shape[:3]
    scores = _matmul(_rows(query, start, stop), keys, (3, 3))
    distance = jnp.arange(start, stop)[:, None] - jnp.arange(first, stop)
    visible = sees(distance, window)
    visible &= segment_ids[:, start:stop, None] == segment_ids[:, None, first:stop]  # [B,Q,U]
    scores = scores.reshape(batch, heads, groups, stop - start, stop - first) * scale
    return jnp.where(visible[:, None, None], scores, -jnp.inf)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def causal_attention(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B T M H"],
    value: Float[Array, "B T M V"],
    segment_ids: Int[Array, "B T"],
    sinks: Float[Array, " N"] | None,
    window: int,
    scale: float,
) -> Float[Array, "B T N V"]:
    """Same function as :func:`moe.layers.attention.attend.attend`."""
    return _forward(query, key, value, segment_ids, sinks, window, scale)[0]


def _forward(query, key, value, segment_ids, sinks, window, scale):
    heads_per_key, dtype = query.shape[2] // key.shape[2], query.dtype
    queries = _by_head(query, heads_per_key)
    keys = key.swapaxes(1, 2)
    values = value.swapaxes(1, 2)
    sink = None if sinks is None else sinks.astype(jnp.float32).reshape(-1, heads_per_key, 1, 1)  # [M,n,1,1]
    outputs, normalisers = [], []
    for start, stop, first in _blocks(query.shape[1], window):
        scores = _scores(queries, keys[:, :, first:stop], segment_ids, window, scale, (start, stop, first))
        largest = jnp.max(scores, axis=-1, keepdims=True)  # finite, because a query sees itself
        largest = largest if sink is None else jnp.maximum(largest, sink)
        weights = jnp.exp(scores - largest)
        total = jnp.sum(weights, axis=-1, keepdims=True)
        total = total if sink is None else total + jnp.exp(sink - largest)
        # [B,M,n,Q,U] → [B,M,n·Q,U], times [B,M,U,H] → [B,M,n,Q,H]
        rows = weights.astype(dtype).reshape(*weights.shape[:2], -1, stop - first)
        output = _matmul(rows, values[:, :, first:stop], (3, 2))
        outputs.append((output.reshape(*weights.shape[:4], -1) / total).astype(dtype))
        normalisers.append(largest + jnp.log(total))
    output = _by_token(jnp.concatenate(outputs, axis=3))
    return output, (query, key, value, segment_ids, sinks, output, jnp.concatenate(normalisers, axis=3))


def _backward(window, scale, residuals, gradient):
    query, key, value, segment_ids, sinks, output, normaliser = residuals
    length = query.shape[1]
    heads_per_key = query.shape[2] // key.shape[2]
    dtype = query.dtype
    queries = _by_head(query, heads_per_key)
    keys = key.swapaxes(1, 2)
    values = value.swapaxes(1, 2)
    gradients = _by_head(gradient, heads_per_key)
    # Σ_u weight·d_weight of a query equals output·d_output: [B,T,N] → [B,M,n,T,1]
    inner = _by_head(jnp.sum(gradient.astype(jnp.float32) * output, axis=-1, keepdims=True), heads_per_key)
    d_queries = []
    d_keys = jnp.zeros(keys.shape, jnp.float32)
    d_values = jnp.zeros(values.shape, jnp.float32)
    for start, stop, first in _blocks(length, window):
        block_keys, block_values = keys[:, :, first:stop], values[:, :, first:stop]
        scores = _scores(queries, block_keys, segment_ids, window, scale, (start, stop, first))
        weights = jnp.exp(scores - normaliser[:, :, :, start:stop])
        rows = _rows(gradients, start, stop)
        d_weights = _matmul(rows, block_values, (3, 3)).reshape(weights.shape)
        d_scores = weights * (d_weights - inner[:, :, :, start:stop]) * scale
        # [B,M,n,Q,U] → [B,M,n·Q,U]
        weights, d_scores = (x.astype(dtype).reshape(*x.shape[:2], -1, stop - first) for x in (weights, d_scores))
        d_query = _matmul(d_scores, block_keys, (3, 2))
        d_queries.append(d_query.reshape(*queries.shape[:3], stop - start, -1))
        outside = ((0, 0), (0, 0), (first, length - stop), (0, 0))  # [B,M,U,H] → [B,M,T,H]
        d_keys += jnp.pad(_matmul(d_scores, _rows(queries, start, stop), (2, 2)), outside)
        d_values += jnp.pad(_matmul(weights, rows, (2, 2)), outside)
    d_sinks = None
    if sinks is not None:  # the sink's weight times its d_score, which is −inner since it has no value
        weights = jnp.exp(sinks.astype(jnp.float32).reshape(-1, heads_per_key, 1, 1) - normaliser)
        d_sinks = -jnp.sum(weights * inner, axis=(0, 3, 4)).reshape(-1).astype(sinks.dtype)
    return (
        _by_token(jnp.concatenate(d_queries, axis=3)).astype(dtype),
        d_keys.swapaxes(1, 2).astype(dtype),
        d_values.swapaxes(1, 2).astype(dtype),
        None,
        d_sinks,
    )


causal_attention.defvjp(_forward, _backward)
