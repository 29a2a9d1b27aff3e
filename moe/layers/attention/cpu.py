"""Causal attention on CPU: blocks of queries, each against no more keys than it may see, and a gradient of its own.

In: query [B,T,N,H], key and value [B,T,M,H], documents [B,T]. Out: [B,T,N,H]. XLA, given all T x T scores at once,
multiplies and exponentiates the half that is masked, and writes them a dozen times in layouts its matmuls then copy.
Here the blocks leave out what no query of theirs sees, the scores lie as the matmuls want them, and the backward pass
makes them again from the queries and keys, which costs less than to fetch them from memory.

Letters: B batch, T sequence, N query heads, M key/value heads, G query heads of one key/value head, H head dim, Q
queries of a block, U keys of a block.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

_BLOCKS = 8  # of a row: 9/16 of T x T; more of them gain little and take long to compile


_LEAST = 32  # queries of a block


def _blocks(length: int, window: int) -> list[tuple[int, int, int]]:
    """(first query, query after the last, first key that any of them sees) of each block."""
    size = max(-(-length // _BLOCKS), _LEAST)
    starts = range(0, length, size)
    return [(start, min(start + size, length), max(start - window + 1, 0) if window else 0) for start in starts]


def _matmul(left: Array, right: Array, contract: tuple[int, int]) -> Array:
    """[B,M,·,·] by [B,M,·,·] over these axes, in float32."""
    dims = (((contract[0],), (contract[1],)), ((0, 1), (0, 1)))
    return lax.dot_general(left, right, dims, preferred_element_type=jnp.float32)


def _by_head(x: Array, groups: int) -> Array:
    """[B,T,M·G,H] → [B,M,G,T,H]."""
    return x.reshape(*x.shape[:2], -1, groups, x.shape[-1]).transpose(0, 2, 3, 1, 4)


def _by_token(x: Array) -> Array:
    """[B,M,G,T,H] → [B,T,M·G,H]."""
    x = x.transpose(0, 3, 1, 2, 4)
    return x.reshape(*x.shape[:2], -1, x.shape[-1])


def _rows(x: Array, start: int, stop: int) -> Array:
    """[B,M,G,T,H] → a block's [B,M,G·Q,H]."""
    x = x[:, :, :, start:stop]
    return x.reshape(*x.shape[:2], -1, x.shape[-1])


def _scores(query: Array, keys: Array, segment_ids: Array, window: int, block: tuple[int, int, int]) -> Array:
    """A block's scores [B,M,G,Q,U] in float32, −inf where a query does not see a key."""
    start, stop, first = block
    batch, heads, groups, _, head_dim = query.shape
    scores = _matmul(_rows(query, start, stop), keys, (3, 3))
    distance = jnp.arange(start, stop)[:, None] - jnp.arange(first, stop)
    seen = (distance >= 0) & ((distance < window) if window else True)
    seen &= segment_ids[:, start:stop, None] == segment_ids[:, None, first:stop]  # [B,Q,U]
    scores = scores.reshape(batch, heads, groups, stop - start, stop - first) * head_dim**-0.5
    return jnp.where(seen[:, None, None], scores, -jnp.inf)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def causal_attention(query: Array, key: Array, value: Array, segment_ids: Array, window: int) -> Array:
    """As :func:`moe.layers.attention.attend.attend`."""
    return _forward(query, key, value, segment_ids, window)[0]


def _forward(query, key, value, segment_ids, window):
    groups, dtype = query.shape[2] // key.shape[2], query.dtype
    queries, keys, values = _by_head(query, groups), key.swapaxes(1, 2), value.swapaxes(1, 2)
    outputs, normalisers = [], []
    for start, stop, first in _blocks(query.shape[1], window):
        scores = _scores(queries, keys[:, :, first:stop], segment_ids, window, (start, stop, first))
        largest = jnp.max(scores, axis=-1, keepdims=True)  # finite: a query sees itself
        weights = jnp.exp(scores - largest)
        total = jnp.sum(weights, axis=-1, keepdims=True)
        # [B,M,G,Q,U] → [B,M,G·Q,U], times [B,M,U,H], → [B,M,G,Q,H]
        rows = weights.astype(dtype).reshape(*weights.shape[:2], -1, stop - first)
        output = _matmul(rows, values[:, :, first:stop], (3, 2))
        outputs.append((output.reshape(*weights.shape[:4], -1) / total).astype(dtype))
        normalisers.append(largest + jnp.log(total))
    output = _by_token(jnp.concatenate(outputs, axis=3))
    return output, (query, key, value, segment_ids, output, jnp.concatenate(normalisers, axis=3))


def _backward(window, residuals, gradient):
    query, key, value, segment_ids, output, normaliser = residuals
    length, groups, dtype, scale = query.shape[1], query.shape[2] // key.shape[2], query.dtype, query.shape[-1] ** -0.5
    queries, keys, values = _by_head(query, groups), key.swapaxes(1, 2), value.swapaxes(1, 2)
    gradients = _by_head(gradient, groups)
    # Σ_u weight·d_weight of each query is its output · d_output: [B,T,N] → [B,M,G,T,1]
    inner = _by_head(jnp.sum(gradient.astype(jnp.float32) * output, axis=-1, keepdims=True), groups)
    d_queries, d_keys, d_values = [], jnp.zeros(keys.shape, jnp.float32), jnp.zeros(values.shape, jnp.float32)
    for start, stop, first in _blocks(length, window):
        block_keys, block_values = keys[:, :, first:stop], values[:, :, first:stop]
        scores = _scores(queries, block_keys, segment_ids, window, (start, stop, first))
        weights = jnp.exp(scores - normaliser[:, :, :, start:stop])
        rows = _rows(gradients, start, stop)
        d_weights = _matmul(rows, block_values, (3, 3)).reshape(weights.shape)
        d_scores = weights * (d_weights - inner[:, :, :, start:stop]) * scale
        # [B,M,G,Q,U] → [B,M,G·Q,U]
        weights, d_scores = (x.astype(dtype).reshape(*x.shape[:2], -1, stop - first) for x in (weights, d_scores))
        d_query = _matmul(d_scores, block_keys, (3, 2))
        d_queries.append(d_query.reshape(*queries.shape[:3], stop - start, -1))
        outside = ((0, 0), (0, 0), (first, length - stop), (0, 0))  # [B,M,U,H] → [B,M,T,H]
        d_keys += jnp.pad(_matmul(d_scores, _rows(queries, start, stop), (2, 2)), outside)
        d_values += jnp.pad(_matmul(weights, rows, (2, 2)), outside)
    return (
        _by_token(jnp.concatenate(d_queries, axis=3)).astype(dtype),
        d_keys.swapaxes(1, 2).astype(dtype),
        d_values.swapaxes(1, 2).astype(dtype),
        np.zeros(segment_ids.shape, jax.dtypes.float0),
    )


causal_attention.defvjp(_forward, _backward)
