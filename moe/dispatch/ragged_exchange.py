"""Grouped experts on a split expert axis of accelerators: rows sent to their experts, computed, and sent back.

In, within ``shard_map``: a device's rows [R,D] sorted by expert. Out: their outputs, in the same order.

All tokens may choose one device's experts, but mostly a device gets about as many rows as it has of its own. So a wave
of a quarter more is sent, computed and sent back, and a loop, mostly of no trips, does the same with what is left,
keeping nothing for the backward pass. No buffer has room for all rows of all devices.

Letters: R rows of a device, N rows of a wave, X devices of the axis, E experts, D model dim.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from moe.dispatch.grouped_matmul.accelerator import whole_tiles
from moe.dispatch.grouped_matmul.cpu import Chunks

#: Rows of a wave, in shares of a device's own.
ROOM = 5 / 4


def _wave(every: Array, start: Array | int, wave: int) -> tuple[Any, Any, Array]:
    """Which rows go where in a wave, there and back, and how many each of this device's experts gets, [E/X] int32.

    A device's rows for an expert go right behind those of earlier devices: they arrive sorted by expert, and nothing is
    between them. The wave is the N rows from ``start`` on, on whatever device they arrive.

    Args:
        every: [X,E] int32, rows of each device for each expert.
        start: of the wave.
        wave: N.

    Returns:
        Routes: (begin of each slice here, its rows, its begin on the other side, rows of each slice that arrives), [E]
        int32 each, slices for one device following each other.
    """
    me, parts = jax.lax.axis_index("expert"), every.shape[0]
    total = jnp.sum(every, axis=0).reshape(parts, -1)  # [X,E/X]
    first = (jnp.cumsum(total, axis=1) - total).reshape(-1)  # [E], of each expert's rows where it is
    arrival = first + jnp.cumsum(every, axis=0) - every  # [X,E]
    end = jnp.clip(arrival + every, start, start + wave)
    skipped = jnp.maximum(start - arrival, 0)  # rows of earlier waves
    sizes = jnp.maximum(end - jnp.maximum(arrival, start), 0)
    begin = jnp.minimum(jnp.cumsum(every, axis=1) - every + skipped, jnp.sum(every, axis=1, keepdims=True))
    place = jnp.clip(arrival - start, 0, wave)

    def mine(array: Array) -> Array:
        """[X,E] → [X,X,E/X] → [X,E/X] → [E]: of this device's experts, by whom."""
        local = array.reshape(parts, parts, -1)
        return jax.lax.dynamic_index_in_dim(local, me, 1, keepdims=False).reshape(-1)

    there = (begin[me], sizes[me], place[me], mine(sizes))
    back = (mine(place), mine(sizes), mine(begin), sizes[me])
    return there, back, jnp.sum(mine(sizes).reshape(parts, -1), axis=0)


def _carry(rows: Array, onto: Array | int, route: Any) -> Array:
    """rows [R,D] over a route into a buffer [N,D], or into a new one of N rows, undefined where nobody sends."""
    if isinstance(onto, int):
        onto = jax.lax.empty((onto, rows.shape[1]), rows.dtype)
    return jax.lax.ragged_all_to_all(rows, onto, *route, axis_name="expert")


def _further_waves(every: Array, wave: int, carry: Any, body: Callable[[Array, Any], Any]) -> Any:
    """Runs body(start, carry) over all waves but the first, as often on every device as the fullest one needs."""
    parts = every.shape[0]
    most = jnp.max(jnp.sum(every.reshape(parts, parts, -1), axis=(0, 2)))
    # The name is known to moe.pods.
    with jax.named_scope("overflow"):
        return jax.lax.fori_loop(1, (most + wave - 1) // wave, lambda i, carry: body(i * wave, carry), carry)


def in_waves(experts: Any, rows: Array, sizes: Array, matrices: Any) -> Array:
    """rows [R,D] sorted by expert → the experts' outputs [R,D], each computed where its expert is.

    Args:
        experts: static, with ``grouped`` of :class:`moe.dispatch.experts.Experts`.
        rows: [R,D], this device's.
        sizes: [E] int32, its rows for each expert.
        matrices: of this device's E/X experts.
    """
    wave = whole_tiles(math.ceil(rows.shape[0] * ROOM))

    def ffn(matrices: Any, rows: Array, sizes: Array) -> Array:
        return experts.grouped(matrices, rows, sizes, Chunks(()))

    with jax.named_scope("expert_load"):  # the name is known to moe.planner
        every = jax.lax.all_gather(sizes, "expert")
    return _in_waves(ffn, wave, rows, matrices, every)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _in_waves(ffn, wave, rows, matrices, every):
    """rows [R,D] sorted by expert → ffn(matrices, rows, sizes) of each where its expert is, [R,D]."""
    return _in_waves_fwd(ffn, wave, rows, matrices, every)[0]


def _in_waves_fwd(ffn, wave, rows, matrices, every):
    there, back, sizes = _wave(every, 0, wave)
    outputs, backward = jax.vjp(lambda *a: ffn(*a, sizes), matrices, _carry(rows, wave, there))
    outputs = _carry(outputs, rows.shape[0], back)

    def body(start, outputs):
        there, back, sizes = _wave(every, start, wave)
        return _carry(ffn(matrices, _carry(rows, wave, there), sizes), outputs, back)

    return _further_waves(every, wave, outputs, body), (rows, matrices, every, backward)


def _in_waves_bwd(ffn, wave, residuals, gradient):
    rows, matrices, every, backward = residuals
    # The exchange's transpose is the exchange the other way.
    there, back, _ = _wave(every, 0, wave)
    d_matrices, d_rows = backward(_carry(gradient, wave, there))
    d_rows = _carry(d_rows, rows.shape[0], back)

    def body(start, carry):
        d_rows, d_matrices = carry
        there, back, sizes = _wave(every, start, wave)
        _, backward = jax.vjp(lambda *a: ffn(*a, sizes), matrices, _carry(rows, wave, there))
        more, new = backward(_carry(gradient, wave, there))
        return _carry(new, d_rows, back), jax.tree.map(jnp.add, d_matrices, more)

    return *_further_waves(every, wave, (d_rows, d_matrices), body), np.zeros(every.shape, jax.dtypes.float0)


_in_waves.defvjp(_in_waves_fwd, _in_waves_bwd)
