"""Exchange of rows between the devices of the expert axis."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from moe.dispatch.experts import Experts
from moe.dispatch.grouped_matmul.row_blocks import choose_row_blocks
from moe.dispatch.ragged_exchange import run_experts_in_rounds
from moe.dispatch.rows import fill_rows
from moe.parallel import target
from moe.parallel.axes import axis_of


def exchange_rows(
    rows: Float[Array, "R D"], sizes: Int[Array, " E"], matrices: Any, experts: Experts, num_devices: int
) -> Float[Array, "R D"]:
    """Runs the experts on this device's rows, sorted by expert, each on the device that has the expert.

    Called within ``shard_map``. Accelerators exchange by ragged all-to-all. XLA's CPU has none: there each device sends
    every other one a buffer of R slots, so that a device receives [X·R,D], the rows of device s from slot s·R on.

    Args:
        rows: of this device.
        sizes: rows for each expert.
        matrices: of this device's E/X experts.
        experts: the FFNs.
        num_devices: X, devices that the experts are split over.
    """
    if not target.is_cpu():
        return run_experts_in_rounds(experts, rows, sizes, matrices)
    num_rows = rows.shape[0]
    sent = sizes.reshape(num_devices, -1)  # [X,E/X]
    received = jax.lax.all_to_all(sent, axis_of("expert"), 0, 0, tiled=True)  # [X,E/X], by sender
    arrived = _send(rows, jnp.sum(sent, axis=1))
    num_experts = received.shape[1]
    row_blocks = choose_row_blocks(num_rows, num_experts)  # a device receives R rows on average
    padded_sizes = row_blocks.padded_sizes(jnp.sum(received, axis=0))
    total_rows = row_blocks.total_rows(num_devices * num_rows, num_experts)
    tables = _sorted_tables(received, padded_sizes, num_rows, total_rows)
    slot_of_row, row_of_slot = tables
    outputs = experts.grouped(matrices, fill_rows(arrived, slot_of_row, row_of_slot), padded_sizes, row_blocks)
    # Back to slots: the same tables with their parts exchanged.
    outputs = fill_rows(outputs, row_of_slot[:, 0], slot_of_row[:, None])
    return _send_back(outputs, jnp.sum(sent, axis=1))


def _sorted_tables(
    received: Int[Array, "X e"], padded_sizes: Int[Array, " e"], num_rows: int, total_rows: int
) -> tuple[Int[Array, " N"], Int[Array, "XR 1"]]:
    """slot_of_row (X·R: none) and row_of_slot (N: none), which sort received slots by this device's e experts."""
    ends = jnp.cumsum(received, axis=1)  # [X,E/X]
    index = jnp.arange(num_rows, dtype=jnp.int32)[:, None, None]
    expert = jnp.sum(index >= ends, axis=-1).T  # [R,X,E/X] → [X,R]
    shift = jnp.cumsum(padded_sizes) - padded_sizes + jnp.cumsum(received, axis=0) - received - (ends - received)
    row = jnp.take_along_axis(shift, jnp.minimum(expert, shift.shape[1] - 1), axis=1) + index[:, 0].T
    # [X,R] → [X·R,1]: a slot holds one assignment
    row_of_slot = jnp.where(expert < shift.shape[1], row, total_rows).reshape(-1, 1)
    slot_of_row = jnp.full((total_rows,), row_of_slot.size, jnp.int32)
    slots = jnp.arange(row_of_slot.size, dtype=jnp.int32)
    return slot_of_row.at[row_of_slot[:, 0]].set(slots, mode="drop", unique_indices=True), row_of_slot


def _send(rows: Float[Array, "R D"], sent: Int[Array, " X"]) -> Float[Array, "XR D"]:
    """Sends rows sorted by receiving device, ``sent`` of them to each; those of sender s arrive from slot s·R on."""
    slots = fill_rows(rows, *_slot_tables(sent, rows.shape[0]))
    return jax.lax.all_to_all(slots, axis_of("expert"), 0, 0, tiled=True)


def _send_back(slots: Float[Array, "XR D"], sent: Int[Array, " X"]) -> Float[Array, "R D"]:
    """The inverse of :func:`_send`."""
    row_of_slot, slot_of_row = _slot_tables(sent, slots.shape[0] // sent.shape[0])
    return fill_rows(
        jax.lax.all_to_all(slots, axis_of("expert"), 0, 0, tiled=True), slot_of_row[:, 0], row_of_slot[:, None]
    )


def _slot_tables(sent: Int[Array, " X"], num_rows: int) -> tuple[Int[Array, " XR"], Int[Array, "R 1"]]:
    """row_of_slot (R: none) and slot_of_row (X·R: none): the rows for device d are in slots d·R, d·R+1, …"""
    ends = jnp.cumsum(sent)
    row = jnp.arange(num_rows, dtype=jnp.int32)
    to = jnp.sum(row[:, None] >= ends, axis=1)
    begin = ends - sent
    slot = jnp.where(
        to < sent.shape[0], to * num_rows + row - begin[jnp.minimum(to, sent.shape[0] - 1)], sent.shape[0] * num_rows
    )
    row_of_slot = jnp.where(row < sent[:, None], begin[:, None] + row, num_rows)  # [X,R]
    return row_of_slot.reshape(-1), slot[:, None]
