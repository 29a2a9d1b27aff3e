"""Experts on a split expert axis of accelerators: rows are sent to their experts by ragged all-to-all and back.

All tokens may choose one device's experts, but usually a device receives about as many rows as it has of its own. So an
exchange round of a quarter more rows is sent, computed and sent back, and a loop, usually of no iterations, does the
same with what is left and keeps nothing for the backward pass. No buffer holds all rows of all devices.
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
from jaxtyping import Float, Int

from moe.dispatch.experts import Experts
from moe.dispatch.grouped_matmul.row_blocks import UNPADDED, whole_tiles
from moe.parallel.axes import axis_of

#: Rows of an exchange round, as a multiple of a device's own.
ROUND_SIZE = 5 / 4

#: Scope of the loop over further rounds, by which the planner recognises it in a compiled program.
OVERFLOW_SCOPE = "overflow"

#: Scope of the all-gather of the devices' loads, which is not an all-gather of tokens.
LOAD_SCOPE = "expert_load"

#: Offsets and sizes of ``jax.lax.ragged_all_to_all``: [E] int32 each, slices for one device following each other.
Route = tuple[Array, Array, Array, Array]


def run_experts_in_rounds(
    experts: Experts, rows: Float[Array, "R D"], sizes: Int[Array, " E"], matrices: Any
) -> Float[Array, "R D"]:
    """Runs the experts on this device's rows, sorted by expert, each on the device that has the expert.

    Args:
        experts: static.
        rows: of this device.
        sizes: rows for each expert.
        matrices: of this device's E/X experts.
    """
    round_size = whole_tiles(math.ceil(rows.shape[0] * ROUND_SIZE))

    def ffn(matrices: Any, rows: Array, sizes: Array) -> Array:
        return experts.grouped(matrices, rows, sizes, UNPADDED)

    with jax.named_scope(LOAD_SCOPE):
        loads = jax.lax.all_gather(sizes, axis_of("expert"))
    return _run_in_rounds(ffn, round_size, rows, matrices, loads)


def _round(loads: Int[Array, "X E"], start: Array | int, round_size: int) -> tuple[Route, Route, Int[Array, " e"]]:
    """Routes of one round's rows to their experts and back, and the rows each of this device's experts receives.

    A device's rows for an expert are placed right behind those of earlier devices: they arrive sorted by expert,
    without gaps. The round consists of the rows that arrive at positions from ``start`` on, on every device.

    Args:
        loads: rows of each device for each expert.
        start: first arrival position of the round.
        round_size: rows of a round.
    """
    me, num_devices = jax.lax.axis_index(axis_of("expert")), loads.shape[0]
    total = jnp.sum(loads, axis=0).reshape(num_devices, -1)  # [X,E/X]
    first = (jnp.cumsum(total, axis=1) - total).reshape(-1)  # [E], of each expert's rows on its device
    arrival = first + jnp.cumsum(loads, axis=0) - loads  # [X,E]
    end = jnp.clip(arrival + loads, start, start + round_size)
    skipped = jnp.maximum(start - arrival, 0)  # rows of earlier rounds
    sizes = jnp.maximum(end - jnp.maximum(arrival, start), 0)
    begin = jnp.minimum(jnp.cumsum(loads, axis=1) - loads + skipped, jnp.sum(loads, axis=1, keepdims=True))
    position = jnp.clip(arrival - start, 0, round_size)

    def mine(array: Array) -> Array:
        """[X,E] → [X,X,E/X] → [X,E/X] → [E]: of this device's experts, by sender."""
        local = array.reshape(num_devices, num_devices, -1)
        return jax.lax.dynamic_index_in_dim(local, me, 1, keepdims=False).reshape(-1)

    there = (begin[me], sizes[me], position[me], mine(sizes))
    back = (mine(position), mine(sizes), mine(begin), sizes[me])
    return there, back, jnp.sum(mine(sizes).reshape(num_devices, -1), axis=0)


def _exchange(rows: Float[Array, "R D"], onto: Float[Array, "N D"] | int, route: Route) -> Float[Array, "N D"]:
    """Sends rows over a route onto a buffer, or onto a new one of N rows that is undefined where nothing arrives."""
    if isinstance(onto, int):
        onto = jax.lax.empty((onto, rows.shape[1]), rows.dtype)
    return jax.lax.ragged_all_to_all(rows, onto, *route, axis_name=axis_of("expert"))


def _further_rounds(loads: Int[Array, "X E"], round_size: int, carry: Any, body: Callable[[Array, Any], Any]) -> Any:
    """Runs body(start, carry) for all rounds but the first, on every device as often as the fullest one needs."""
    num_devices = loads.shape[0]
    most = jnp.max(jnp.sum(loads.reshape(num_devices, num_devices, -1), axis=(0, 2)))
    with jax.named_scope(OVERFLOW_SCOPE):
        rounds = (most + round_size - 1) // round_size
        return jax.lax.fori_loop(1, rounds, lambda i, carry: body(i * round_size, carry), carry)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _run_in_rounds(ffn, round_size, rows, matrices, loads):
    """ffn(matrices, rows, sizes) of this device's rows [R,D], each on its expert's device."""
    return _run_in_rounds_fwd(ffn, round_size, rows, matrices, loads)[0]


def _run_in_rounds_fwd(ffn, round_size, rows, matrices, loads):
    there, back, sizes = _round(loads, 0, round_size)
    outputs, backward = jax.vjp(lambda *a: ffn(*a, sizes), matrices, _exchange(rows, round_size, there))
    outputs = _exchange(outputs, rows.shape[0], back)

    def body(start, outputs):
        there, back, sizes = _round(loads, start, round_size)
        return _exchange(ffn(matrices, _exchange(rows, round_size, there), sizes), outputs, back)

    return _further_rounds(loads, round_size, outputs, body), (rows, matrices, loads, backward)


def _run_in_rounds_bwd(ffn, round_size, residuals, gradient):
    rows, matrices, loads, backward = residuals
    # The transpose of an exchange is the exchange in the other direction.
    there, back, _ = _round(loads, 0, round_size)
    d_matrices, d_rows = backward(_exchange(gradient, round_size, there))
    d_rows = _exchange(d_rows, rows.shape[0], back)

    def body(start, carry):
        d_rows, d_matrices = carry
        there, back, sizes = _round(loads, start, round_size)
        _, backward = jax.vjp(lambda *a: ffn(*a, sizes), matrices, _exchange(rows, round_size, there))
        more, new = backward(_exchange(gradient, round_size, there))
        return _exchange(new, d_rows, back), jax.tree.map(jnp.add, d_matrices, more)

    d_rows, d_matrices = _further_rounds(loads, round_size, (d_rows, d_matrices), body)
    return d_rows, d_matrices, np.zeros(loads.shape, jax.dtypes.float0)


_run_in_rounds.defvjp(_run_in_rounds_fwd, _run_in_rounds_bwd)
