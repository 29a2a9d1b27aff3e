"""Exchange of rows between the devices of the expert axis."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from moe.dispatch.experts import Experts
from moe.dispatch.grouped_matmul.grouped_ffn import chunks
from moe.dispatch.ragged_exchange import in_waves
from moe.dispatch.rows import fill_rows
from moe.parallel import target


def exchange_rows(rows: Array, sizes: Array, matrices: Any, experts: Experts, parts: int) -> Array:
    """rows [R,D] sorted by expert → the experts' outputs [R,D], each computed where its expert is.

    A device may be sent all rows of all X devices, and has room for them: [X·R,D], those of device s from s·R on.

    Args:
        rows: [R,D].
        sizes: [E] int32.
        matrices: of E/X experts.
        experts: the FFN.
        parts: X, devices that the experts are split over.
    """
    if not target.is_cpu():
        return in_waves(experts, rows, sizes, matrices)
    num_rows = rows.shape[0]
    sent = sizes.reshape(parts, -1)  # [X,E/X]
    received = jax.lax.all_to_all(sent, "expert", 0, 0, tiled=True)  # [X,E/X], by whom
    arrived = _send(rows, jnp.sum(sent, axis=1))
    # Sorted by expert: for each of X·R places, its row; for each row, its place.
    pieces = chunks(num_rows, received.shape[1])  # R on average, whatever the most
    room, total = pieces.padded_sizes(jnp.sum(received, axis=0)), pieces.total(parts * num_rows, received.shape[1])
    ends = jnp.cumsum(received, axis=1)  # [X,E/X]
    index = jnp.arange(num_rows, dtype=jnp.int32)[:, None, None]
    expert = jnp.sum(index >= ends, axis=-1).T  # [R,X,E/X] → [X,R]
    shift = jnp.cumsum(room) - room + jnp.cumsum(received, axis=0) - received - (ends - received)
    row = jnp.take_along_axis(shift, jnp.minimum(expert, shift.shape[1] - 1), axis=1) + index[:, 0].T
    # [X,R] → [X·R,1]: a place holds one pair
    row_of_place = jnp.where(expert < shift.shape[1], row, total).reshape(-1, 1)
    place_of_row = jnp.full((total,), row_of_place.size, jnp.int32)
    places = jnp.arange(row_of_place.size, dtype=jnp.int32)
    place_of_row = place_of_row.at[row_of_place[:, 0]].set(places, mode="drop", unique_indices=True)
    outputs = experts.grouped(matrices, fill_rows(arrived, place_of_row, row_of_place), room, pieces)
    # Back: the same tables the other way round.
    outputs = fill_rows(outputs, row_of_place[:, 0], place_of_row[:, None])
    return _send_back(outputs, jnp.sum(sent, axis=1))


def _send(rows: Array, sent: Array) -> Array:
    """rows [R,D], sorted by the device they go to → places [X·R,D], from device s at s·R; sizes [X] int32.

    XLA's CPU has no ragged exchange: as many places for each device as all rows would need.
    """
    places = fill_rows(rows, *_place_tables(sent, rows.shape[0]))
    return jax.lax.all_to_all(places, "expert", 0, 0, tiled=True)


def _send_back(places: Array, sent: Array) -> Array:
    """places [X·R,D] → rows [R,D]: undoes :func:`_send`."""
    row_of_place, place_of_row = _place_tables(sent, places.shape[0] // sent.shape[0])
    return fill_rows(jax.lax.all_to_all(places, "expert", 0, 0, tiled=True), place_of_row[:, 0], row_of_place[:, None])


def _place_tables(sent: Array, num_rows: int) -> tuple[Array, Array]:
    """row_of_place [X·R] (R: none), place_of_row [R,1] (X·R: none): device d's rows go to places d·R, d·R+1, …"""
    ends = jnp.cumsum(sent)
    row = jnp.arange(num_rows, dtype=jnp.int32)
    to = jnp.sum(row[:, None] >= ends, axis=1)
    begin = ends - sent
    place = jnp.where(
        to < sent.shape[0], to * num_rows + row - begin[jnp.minimum(to, sent.shape[0] - 1)], sent.shape[0] * num_rows
    )
    row_of_place = jnp.where(row < sent[:, None], begin[:, None] + row, num_rows)  # [X,R]
    return row_of_place.reshape(-1), place[:, None]
