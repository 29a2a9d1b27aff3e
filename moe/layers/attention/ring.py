"""Ring attention (Liu et al. 2023, arXiv 2310.01889): where rows are split over devices, keys and values pass from
device to device, and no device holds those of a whole row.

Each device adds what its queries find in the keys that it has to sums of exp(score), relative to the largest score so
far, while it receives the next. The backward pass sends keys, values and their gradients around the ring again, so that
only a device's own heads are kept for it. Both run within ``shard_map``.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from moe.layers.attention.scoring import Scoring

#: Score that counts as no score, in place of an infinity, whose differences are no numbers.
_NONE = float(jnp.finfo(jnp.float32).min)


@dataclasses.dataclass(frozen=True)
class Ring:
    """Devices that have the parts of a row, in order, and what a causal query sees.

    Attributes:
        axis: of the mesh.
        size: number of devices.
        window: positions that a query sees, its own included; 0: all before it.
        factor: of query·key.
        block: queries whose scores are held at once; divides the positions of a device.
    """

    axis: str
    size: int
    window: int
    factor: float
    block: int

    def steps(self, length: int) -> int:
        """Number of parts of ``length`` positions that hold the keys of a device's queries."""
        return min(self.size, 1 + -(-(self.window - 1) // length)) if self.window else self.size

    def send(self, tree: Any, by: int = 1) -> Any:
        """Send arrays to the device ``by`` places further on the ring."""
        pairs = [(i, (i + by) % self.size) for i in range(self.size)]
        return jax.tree.map(lambda x: lax.ppermute(x, self.axis, pairs), tree)

    def around(self, step: Callable[[Any, Any, Array], tuple[Any, Any]], parts: Any, sums: Any, length: int) -> Any:
        """Run ``parts, sums = step(parts, sums, position of the first key)`` for the parts of a row, from a device's
        own backwards; return the last parts, on the device where they then are, and the sums."""
        place, count = lax.axis_index(self.axis), self.steps(length)

        def first_key(i: Array | int) -> Array:
            return (place - i) % self.size * length

        def turn(carry: Any, i: Array) -> tuple[Any, None]:
            parts, sums = step(carry[0], carry[1], first_key(i))
            return (self.send(parts), sums), None

        (parts, sums), _ = lax.scan(turn, (parts, sums), jnp.arange(count - 1))
        return step(parts, sums, first_key(count - 1))

    def split(self, x: Array) -> Array:
        """[B,T,...] → [blocks,B,block,...]."""
        return x.reshape(x.shape[0], -1, self.block, *x.shape[2:]).swapaxes(0, 1)

    def join(self, x: Array) -> Array:
        """Undo :meth:`split`."""
        x = x.swapaxes(0, 1)
        return x.reshape(x.shape[0], -1, *x.shape[3:])

    def starts(self, length: int) -> Int[Array, " blocks"]:
        """Position of each block's first query."""
        return lax.axis_index(self.axis) * length + jnp.arange(0, length, self.block)

    def scores(self, query: Array, key: Array, documents: tuple[Array, Array], start: Array, first_key: Array) -> Any:
        """Scores of a block [B,M,J,t,u] in float32, and which of them count."""
        scores = jnp.einsum("btmjh,bumh->bmjtu", query, key, preferred_element_type=jnp.float32) * self.factor
        return scores, Scoring(self.window).mask(*documents, start, first_key)[:, None, None]


@functools.partial(jax.custom_vjp, nondiff_argnums=(6,))
def ring_attention(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B T M H"],
    value: Float[Array, "B T M V"],
    segment_ids: Int[Array, "B T"],
    key_segment_ids: Int[Array, "B T"],
    sinks: Float[Array, " N"] | None,
    ring: Ring,
) -> Float[Array, "B T N V"]:
    """Causal attention of one device's queries to the keys of the whole row; arguments are those of
    :func:`moe.layers.attention.attend.attend`, of this device's part of the row."""
    return _forward(query, key, value, segment_ids, key_segment_ids, sinks, ring)[0]


def _forward(
    query: Array, key: Array, value: Array, segment_ids: Array, key_segment_ids: Array, sinks: Any, ring: Ring
):
    """Heads, and the logarithm [blocks,B,M,J,t] of each query's sum."""
    length, queries = query.shape[1], ring.split(_grouped(query, key))
    blocks = queries, ring.split(segment_ids), ring.starts(length)
    shape = (*queries.shape[:2], *queries.shape[3:5], ring.block)  # [blocks,B,M,J,t]
    largest, total = jnp.full(shape, _NONE), jnp.zeros(shape)
    if sinks is not None:  # a key with this score and no value
        largest = jnp.broadcast_to(sinks.astype(jnp.float32).reshape(*shape[2:4], 1), shape)
        total = jnp.ones(shape)
    sums = largest, total, jnp.zeros((*shape, value.shape[-1]))

    def step(parts: Any, sums: Any, first_key: Array) -> tuple[Any, Any]:
        key, value, documents = parts

        def block(inputs: Any) -> Any:
            (query, own, start), (largest, total, heads) = inputs
            scores, seen = ring.scores(query, key, (own, documents), start, first_key)
            highest = jnp.maximum(largest, jnp.max(jnp.where(seen, scores, _NONE), axis=-1))
            weights = jnp.where(seen, jnp.exp(scores - highest[..., None]), 0.0)
            kept = jnp.exp(largest - highest)
            found = jnp.einsum(
                "bmjtu,bumv->bmjtv", weights.astype(value.dtype), value, preferred_element_type=jnp.float32
            )
            return highest, total * kept + jnp.sum(weights, axis=-1), heads * kept[..., None] + found

        return parts, lax.map(block, (blocks, sums))

    _, (largest, total, heads) = ring.around(step, (key, value, key_segment_ids), sums, length)
    heads = jnp.moveaxis(heads / total[..., None], -2, 2)  # [blocks,B,t,M,J,V]
    heads = ring.join(heads).reshape(*query.shape[:3], -1).astype(query.dtype)
    return heads, largest + jnp.log(total)


def _grouped(query: Array, key: Array) -> Array:
    """[B,T,N,H] → [B,T,M,J,H], the J heads that share a head of keys together."""
    return query.reshape(*query.shape[:2], key.shape[2], -1, query.shape[-1])


def _keep(*inputs: Any) -> tuple[Array, Any]:
    heads, logarithm = _forward(*inputs)
    return heads, (inputs[:-1], heads, logarithm)


def _gradients(ring: Ring, kept: Any, gradient: Array) -> tuple[Any, ...]:
    (query, key, value, segment_ids, key_segment_ids, sinks), heads, logarithm = kept
    length = query.shape[1]
    d_heads = ring.split(_grouped(gradient, key))
    # Σ_v heads·gradient, what the softmax takes from the gradient of every weight: [blocks,B,M,J,t].
    both = _grouped(heads.astype(jnp.float32) * gradient.astype(jnp.float32), key)
    delta = jnp.moveaxis(ring.split(jnp.sum(both, axis=-1)), 2, -1)
    queries = ring.split(_grouped(query, key))
    blocks = queries, ring.split(segment_ids), ring.starts(length), logarithm, d_heads, delta

    def step(parts: Any, d_queries: Array, first_key: Array) -> tuple[Any, Array]:
        key, value, documents, *sums = parts

        def block(sums: Any, inputs: Any) -> tuple[Any, Array]:
            (query, own, start, logarithm, d_head, delta), d_query = inputs
            scores, seen = ring.scores(query, key, (own, documents), start, first_key)
            weights = jnp.where(seen, jnp.exp(scores - logarithm[..., None]), 0.0)
            d_weights = jnp.einsum("btmjv,bumv->bmjtu", d_head, value, preferred_element_type=jnp.float32)
            d_scores = (weights * (d_weights - delta[..., None]) * ring.factor).astype(query.dtype)
            product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
            d_key = sums[0] + product("bmjtu,btmjh->bumh", d_scores, query)
            d_value = sums[1] + product("bmjtu,btmjv->bumv", weights.astype(value.dtype), d_head)
            return (d_key, d_value), d_query + product("bmjtu,bumh->btmjh", d_scores, key)

        sums, d_queries = lax.scan(block, tuple(sums), (blocks, d_queries))
        return (key, value, documents, *sums), d_queries

    zeros = tuple(jnp.zeros(x.shape, jnp.float32) for x in (key, value))
    parts, d_queries = ring.around(
        step, (key, value, key_segment_ids, *zeros), jnp.zeros(queries.shape, jnp.float32), length
    )
    d_key, d_value = ring.send(parts[3:], 1 - ring.steps(length))  # home
    d_sinks = None
    if sinks is not None:
        share = jnp.exp(sinks.astype(jnp.float32).reshape(*delta.shape[2:4], 1) - logarithm)
        d_sinks = -jnp.sum(share * delta, axis=(0, 1, 4)).reshape(sinks.shape).astype(sinks.dtype)
    d_query = ring.join(d_queries).reshape(query.shape).astype(query.dtype)
    return d_query, d_key.astype(key.dtype), d_value.astype(value.dtype), None, None, d_sinks


ring_attention.defvjp(_keep, _gradients)
