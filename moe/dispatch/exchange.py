"""Exchange of rows between peers on the expert axis, within ``shard_map``: every row goes to the device that has its
expert, and the expert's output comes back.

Accelerators send slices of unequal size by ragged all-to-all, in rounds. Each round exchanges 1.25x the local rows. A
while loop handles overflow and keeps nothing for the backward pass; with balanced routing it runs zero times. No buffer
holds all rows of all devices.

XLA's CPU has no ragged all-to-all. There each device sends every other one a buffer of R slots, so that a device
receives [X·R,D], the rows of device s from slot s·R on.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from moe.dispatch.backends import cpu, grouped_ffn, whole_tiles
from moe.dispatch.buffers import Tables, fill_rows, take_rows, with_inverse
from moe.dispatch.ffn import ExpertDropout, ExpertWeights
from moe.dispatch.peers import Peers, Route
from moe.dispatch.sorting import weighted_outputs
from moe.parallel import target

#: Rows of an exchange round, as a multiple of a device's own.
ROUND_SIZE = 5 / 4

#: Scope of the loop over further rounds, by which the planner recognises it in a compiled program.
OVERFLOW_SCOPE = "overflow"

#: Scope of the all-gather of the devices' loads, which is not an all-gather of tokens.
LOAD_SCOPE = "expert_load"

#: Scope of all-gathers and reduce-scatters of tokens, by which the planner tells them from those of weights.
ROUTED_SCOPE = "tokens_to_experts"


def exchanged_outputs(
    x: Float[Array, "S D"],
    combine_weights: Float[Array, "S K"],
    tables: Tables,
    sizes: Int[Array, " E"],
    weights: ExpertWeights,
    peers: Peers,
) -> Float[Array, "S D"]:
    """:func:`moe.dispatch.sorting.weighted_outputs` with experts on several devices.

    Args:
        x: this device's tokens.
        combine_weights, tables: of their assignments, as there.
        sizes: rows for each expert of the peers.
        weights: of this device's experts.
        peers: the X devices that exchange rows.
    """
    if peers.size == 1:
        return weighted_outputs(x, combine_weights, tables, sizes, weights)
    apply, keeps = functools.partial(_exchanged, peers), weights.keeps_outputs
    return weighted_outputs(x, combine_weights, tables, sizes, weights, apply=apply, keeps_outputs=keeps)


def _exchanged(
    peers: Peers, rows: Float[Array, "R D"], sizes: Int[Array, " E"], weights: ExpertWeights, scale: Array | None
) -> Float[Array, "R D"]:
    """The experts' outputs for rows, times the rows' factors ``scale`` [R] if given."""
    if not target.current().has_ragged_exchange:
        return _exchange_in_slots(rows, sizes, weights, peers)
    with jax.named_scope(LOAD_SCOPE):
        loads = peers.gather(sizes)
    round_size = whole_tiles(math.ceil(rows.shape[0] * ROUND_SIZE))
    plain = dataclasses.replace(weights, dropout=None)
    return _run_in_rounds(round_size, peers, rows, scale, plain, loads, weights.dropout)


# --- Ragged, in rounds -----------------------------------------------------------------------------------------------


def _round(
    loads: Int[Array, "X E"], me: Array, start: Array | int, round_size: int
) -> tuple[Route, Route, Int[Array, " e"]]:
    """Routes of one round's rows to their experts and back, and the number of rows for each of this device's experts.

    A device's rows for an expert are placed directly after those of earlier devices: they arrive sorted by expert,
    without gaps. The round consists of the rows that arrive at positions from ``start`` on, on every device.

    Args:
        loads: rows of each device for each expert.
        me: number of this device.
        start: first arrival position of the round.
        round_size: rows of a round.
    """
    num_devices = loads.shape[0]
    total = jnp.sum(loads, axis=0).reshape(num_devices, -1)  # [X,E/X]
    first = (jnp.cumsum(total, axis=1) - total).reshape(-1)  # [E], first row of each expert on its device
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


def further_rounds(most: Array, round_size: int, carry: Any, body: Callable[[Array, Any], Any]) -> Any:
    """Run body(start, carry) for all rounds but the first, on every device as often as the fullest device needs.

    Args:
        most: rows of the fullest device.
        round_size: rows of a round.
    """
    with jax.named_scope(OVERFLOW_SCOPE):
        rounds = (most + round_size - 1) // round_size
        return jax.lax.fori_loop(1, rounds, lambda i, carry: body(i * round_size, carry), carry)


def _most(loads: Int[Array, "X E"]) -> Int[Array, ""]:
    """Rows that the fullest device receives."""
    num_devices = loads.shape[0]
    return jnp.max(jnp.sum(loads.reshape(num_devices, num_devices, -1), axis=(0, 2)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _run_in_rounds(round_size, peers, rows, scale, weights, loads, dropout):
    """Outputs of the experts for this device's rows [R,D], computed on the experts' devices, times factors [R] if
    given."""
    return _run_in_rounds_fwd(round_size, peers, rows, scale, weights, loads, dropout)[0]


def _arrive(
    round_size: int,
    peers: Peers,
    route: Route,
    sizes: Array,
    dropout: ExpertDropout | None,
    rows: Array,
    scale: Array | None,
) -> tuple[Callable[..., Array], Array, Array | None]:
    """Send rows and factors over a route; return the FFN of what arrives, as a function of weights, rows and factors,
    then the rows and factors that arrived."""
    if dropout is not None:
        numbers = peers.send(dropout.assignments[:, None], round_size, route)
        dropout = dataclasses.replace(dropout, rows=numbers[:, 0])

    def ffn(weights: ExpertWeights, rows: Array, scale: Array | None) -> Array:
        return grouped_ffn(rows, sizes, dataclasses.replace(weights, dropout=dropout), scale)

    return ffn, peers.send(rows, round_size, route), _send_numbers(peers, scale, round_size, route)


def _send_numbers(peers: Peers, numbers: Array | None, onto: Array | int | None, route: Route) -> Array | None:
    """Send one number per row, [R]; None if there are none."""
    if numbers is None or onto is None:
        return None
    onto = onto if isinstance(onto, int) else onto[:, None]
    return peers.send(numbers[:, None], onto, route)[:, 0]


def _run_in_rounds_fwd(round_size, peers, rows, scale, weights, loads, dropout):
    there, back, sizes = _round(loads, peers.me, 0, round_size)
    ffn, *arrived = _arrive(round_size, peers, there, sizes, dropout, rows, scale)
    outputs, backward = jax.vjp(ffn, weights, *arrived)
    outputs = peers.send(outputs, rows.shape[0], back)

    def body(start, outputs):
        there, back, sizes = _round(loads, peers.me, start, round_size)
        ffn, *arrived = _arrive(round_size, peers, there, sizes, dropout, rows, scale)
        return peers.send(ffn(weights, *arrived), outputs, back)

    outputs = further_rounds(_most(loads), round_size, outputs, body)
    return outputs, (rows, scale, weights, loads, dropout, backward)


def _run_in_rounds_bwd(round_size, peers, residuals, gradient):
    rows, scale, weights, loads, dropout, backward = residuals
    # The transpose of an exchange is the exchange in the other direction.
    there, back, _ = _round(loads, peers.me, 0, round_size)
    d_weights, *new = backward(peers.send(gradient, round_size, there))
    d_rows = peers.send(new[0], rows.shape[0], back)
    d_scale = _send_numbers(peers, new[1], rows.shape[0], back)

    def of_round(start):
        there, back, sizes = _round(loads, peers.me, start, round_size)
        ffn, *arrived = _arrive(round_size, peers, there, sizes, dropout, rows, scale)
        _, backward = jax.vjp(ffn, weights, *arrived)
        return back, backward(peers.send(gradient, round_size, there))

    def place_rows(start, carry):
        back, (_, *new) = of_round(start)
        return peers.send(new[0], carry[0], back), _send_numbers(peers, new[1], carry[1], back)

    def add_weights(start, d_weights):
        return jax.tree.map(jnp.add, d_weights, of_round(start)[1][0])

    # Two loops: after a joint one, whatever uses the rows' gradients would wait for the gradients of the weights.
    most = _most(loads)
    d_rows, d_scale = further_rounds(most, round_size, (d_rows, d_scale), place_rows)
    return d_rows, d_scale, further_rounds(most, round_size, d_weights, add_weights), None, None


_run_in_rounds.defvjp(_run_in_rounds_fwd, _run_in_rounds_bwd)


# --- In slots, on CPU ------------------------------------------------------------------------------------------------


def _exchange_in_slots(
    rows: Float[Array, "R D"], sizes: Int[Array, " E"], weights: ExpertWeights, peers: Peers
) -> Float[Array, "R D"]:
    sent = sizes.reshape(peers.size, -1)  # [X,E/X]
    received = peers.swap(sent)  # [X,E/X], by sender
    slot_tables = _slot_tables(jnp.sum(sent, axis=1), rows.shape[0])
    row_of_slot, slot_of_row = slot_tables
    arrived = peers.swap(fill_rows(rows, *slot_tables))
    group_sizes = jnp.sum(received, axis=0)
    sorted_tables = _sorted_tables(received, rows.shape[0], arrived.shape[0])
    slot_of_sorted, sorted_of_slot = sorted_tables
    if weights.dropout is not None:
        numbers = peers.swap(take_rows(weights.dropout.assignments, row_of_slot))
        weights = weights.at(take_rows(numbers, slot_of_sorted))
    # A device receives as many rows as it sends, on average.
    arrived = fill_rows(arrived, *sorted_tables)
    outputs = cpu.grouped_ffn(arrived, group_sizes, weights, expected_rows=rows.shape[0])
    # Back to slots, and to rows: each pair of tables in reverse order.
    outputs = peers.swap(fill_rows(outputs, sorted_of_slot[:, 0], slot_of_sorted[:, None]))
    return fill_rows(outputs, slot_of_row[:, 0], row_of_slot[:, None])


def _sorted_tables(
    received: Int[Array, "X e"], num_rows: int, total_rows: int
) -> tuple[Int[Array, " N"], Int[Array, "XR 1"]]:
    """slot_of_row (X·R: none) and row_of_slot (N: none), which sort received slots by this device's e experts."""
    ends = jnp.cumsum(received, axis=1)  # [X,E/X]
    index = jnp.arange(num_rows, dtype=jnp.int32)[:, None, None]
    expert = jnp.sum(index >= ends, axis=-1).T  # [R,X,E/X] → [X,R]
    sizes = jnp.sum(received, axis=0)
    shift = jnp.cumsum(sizes) - sizes + jnp.cumsum(received, axis=0) - received - (ends - received)
    row = jnp.take_along_axis(shift, jnp.minimum(expert, shift.shape[1] - 1), axis=1) + index[:, 0].T
    # [X,R] → [X·R,1]: a slot holds one assignment
    row_of_slot = jnp.where(expert < shift.shape[1], row, total_rows).reshape(-1, 1)
    return with_inverse(row_of_slot, total_rows)


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
