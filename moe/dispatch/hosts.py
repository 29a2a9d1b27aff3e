"""Exchange in two steps, where the expert axis spans several hosts: a token goes over the network once to each host
that has some of its experts, to the device in the same place on that host, and from there to its experts over the
host's own links; there its outputs are summed and return as one row (DeepSeek-V3 2024, section 3.2.2; DeepEP;
HybridEP).

A device receives tokens in slots: those from the device in the same place on host s begin at slot s·S, in order. The
assignments of received tokens are sorted and exchanged like a device's own, in windows of 1.25x the number of a
device's own. As in :mod:`moe.dispatch.exchange`, a while loop handles the rest and keeps nothing for the backward pass;
with balanced routing it runs zero times.
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
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Float, Int

from moe.dispatch import quantized
from moe.dispatch.backends import whole_tiles
from moe.dispatch.buffers import Tables, fill_rows, positions, sum_rows, take_rows, with_inverse
from moe.dispatch.exchange import LOAD_SCOPE, ROUND_SIZE, ROUTED_SCOPE, exchanged_outputs, further_rounds
from moe.dispatch.ffn import ExpertWeights
from moe.dispatch.peers import EVERYONE, Peers, Route
from moe.parallel import target
from moe.parallel.mesh import axis_of
from moe.routing.interface import ROUTES


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Assignments:
    """Choices of tokens.

    Attributes:
        expert: [S,K] int32; E where an assignment is not kept.
        weight: [S,K] float32.
        number: [S,K] int32, of the assignment in the batch; None without dropout.
    """

    expert: Array
    weight: Array
    number: Array | None


def apply_by_host(
    x: Float[Array, "S D"], chosen: Assignments, num_experts: int, hosts: int, weights: ExpertWeights
) -> Float[Array, "S D"]:
    """Each token's weighted sum of its experts' outputs, in float32.

    Args:
        x: this device's tokens.
        chosen: their assignments.
        num_experts: E.
        hosts: H, the number that the expert axis spans.
        weights: of this device's experts; the rows of their dropout are not read.
    """
    dropout = weights.dropout
    x, weights = _ready_together((x, dataclasses.replace(weights, dropout=None)))
    weights = dataclasses.replace(weights, dropout=dropout)
    peers = Peers(hosts, across=True)
    with jax.named_scope(LOAD_SCOPE):
        received = peers.gather(chosen)  # [H,S,K], of the devices whose tokens may come here
    num_local = num_experts // hosts
    there, back, rows_of_visits, slots_of_tokens = _routes(received.expert // num_local, peers)
    rows_of_visits, slots_of_tokens = checkpoint_name((rows_of_visits, slots_of_tokens), ROUTES)
    network = _Network(peers, slots_of_tokens[0].shape[0], weights.sent_precision)
    routes = rows_of_visits, there, back
    local = _in_slots(received, slots_of_tokens, num_local, peers)
    y = _apply_in_windows(_to_slots(network, x, routes), local, num_local, weights, Peers(hosts))
    return _from_slots(network, y.astype(x.dtype), routes)


def apply_to_gathered(
    x: Float[Array, "S D"], chosen: Assignments, num_experts: int, weights: ExpertWeights
) -> Float[Array, "S D"]:
    """:func:`apply_by_host` with every device treated as a host: an all-gather sends every token to all devices, and a
    reduce-scatter returns the sums over experts, in the compute dtype ("ring of experts" in MaxText).

    Each way a token's row is sent X - 1 times instead of K (X - 1)/X, but only between neighbours on a ring.
    """
    axis, num_local = axis_of("expert"), num_experts // EVERYONE.size
    with jax.named_scope(LOAD_SCOPE):
        received = EVERYONE.gather(chosen)  # [X,S,K]
    with jax.named_scope(ROUTED_SCOPE):
        slots = jax.lax.all_gather(x, axis, tiled=True)  # [X·S,D]
    local = _of_experts_here(received, num_local, EVERYONE)
    y = _apply_in_windows(slots, local, num_local, weights, Peers(EVERYONE.size))
    with jax.named_scope(ROUTED_SCOPE):
        return jax.lax.psum_scatter(y.astype(x.dtype), axis, tiled=True).astype(jnp.float32)


def _of_experts_here(received: Assignments, num_local: int, peers: Peers) -> Assignments:
    """Flatten assignments [X,S,K] to [X·S,K], and number this peer's ``num_local`` experts from 0; experts of other
    peers become ``num_local``."""
    flat = jax.tree.map(lambda array: array.reshape(-1, array.shape[-1]), received)
    expert = flat.expert - peers.me * num_local
    here = (expert >= 0) & (expert < num_local)
    return dataclasses.replace(flat, expert=jnp.where(here, expert, num_local))


@jax.custom_vjp
def _ready_together(tree: Any) -> Any:
    """Return the same arrays, with gradients that become available together: those of the experts' matrices are then
    computed while those of the tokens are sent back, and their inputs are not kept for longer."""
    return tree


_ready_together.defvjp(lambda tree: (tree, None), lambda _, gradients: (jax.lax.optimization_barrier(gradients),))


def balanced_visits(hosts: int, choices: int, groups: int = 1, kept_groups: int = 1) -> float:
    """Mean number of hosts that a token goes to, if its K experts are uniformly random: c·(1 − (1 − 1/c)^K), where c is
    the mean number of hosts that have experts of the groups that the token keeps.

    Args:
        hosts: number that the expert axis spans.
        choices: K.
        groups: number of groups of consecutive experts.
        kept_groups: number of groups that a token may choose from.
    """
    if hosts <= groups:
        # A host has groups/hosts groups, and possibly none of them is kept.
        others = groups - groups // hosts
        candidates = hosts * (1 - math.comb(others, kept_groups) / math.comb(groups, kept_groups))
    else:
        candidates = kept_groups * hosts / groups
    return candidates * (1 - (1 - 1 / candidates) ** choices)


# --- Between hosts ---------------------------------------------------------------------------------------------------


def _routes(host: Int[Array, "H S K"], peers: Peers) -> tuple[Route, Route, Tables, Tables]:
    """Routes of this device's rows to the slots of its peers and back, tables of its rows by visit and of its slots.

    A row is a token's visit to a host. On accelerators rows follow one another; on CPUs those for host h begin at h·S.

    Args:
        host: of each peer's assignments; H where they are not kept.
        peers: in the same place of every host.
    """
    hosts, tokens, choices = host.shape
    visits = jnp.any(host[..., None] == jnp.arange(hosts), axis=2)  # [H,S,H]
    counts = jnp.sum(visits, axis=1, dtype=jnp.int32)  # [H,H], rows of each device for each host
    place = jnp.cumsum(visits, axis=1, dtype=jnp.int32) - visits  # [H,S,H]
    slots = jnp.arange(hosts, dtype=jnp.int32) * tokens
    if target.current().has_ragged_exchange:
        num_rows, starts = min(hosts, choices) * tokens, jnp.cumsum(counts, axis=1) - counts
    else:
        num_rows, starts = hosts * tokens, jnp.broadcast_to(slots, counts.shape)
    me = peers.me
    mine, to_me = functools.partial(jnp.take, indices=me, axis=0), functools.partial(jnp.take, indices=me, axis=-1)
    row = jnp.where(mine(visits), mine(starts) + mine(place), num_rows)  # [S,H]
    slot = jnp.where(to_me(visits), slots[:, None] + to_me(place), hosts * tokens)  # [H,S]
    there = mine(starts), mine(counts), jnp.broadcast_to(me * tokens, (hosts,)), to_me(counts)
    back = slots, to_me(counts), to_me(starts), mine(counts)
    return there, back, with_inverse(row, num_rows), with_inverse(slot.reshape(-1, 1), hosts * tokens)


@dataclasses.dataclass(frozen=True)
class _Network:
    """Transfer of tokens to the slots of the devices in the same place on every host.

    Attributes:
        peers: these devices.
        num_slots: number of slots of each.
        precision: in which tokens, and gradients of returned rows, are sent; a value of ``model.low_precision``.
    """

    peers: Peers
    num_slots: int
    precision: str


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _to_slots(network: _Network, x: Float[Array, "S D"], routes: Any) -> Float[Array, "N D"]:
    """Tokens in this device's slots, undefined where nothing arrives.

    Args:
        routes: rows by visit, and the routes of rows there and back.
    """
    tables, there, _ = routes
    # Packed before tokens are copied to a row for every visit.
    rows = fill_rows(quantized.pack(x, network.precision), *tables)
    arrived = network.peers.deliver(rows, network.num_slots, there)
    return quantized.unpack(arrived, network.precision, x.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _from_slots(network: _Network, y: Float[Array, "N D"], routes: Any) -> Float[Array, "S D"]:
    """Sum over each token's slots, in float32."""
    tables, _, back = routes
    rows = network.peers.deliver(y, tables[0].shape[0], back)
    return sum_rows(rows, *tables)


def _to_slots_bwd(network, residuals, gradient):
    no_token, routes = residuals
    return _from_slots(network, gradient, routes).astype(no_token.dtype), None


def _from_slots_bwd(network, residuals, gradient):
    no_slot, routes = residuals
    # Separate tables: XLA would make these rows in one fusion with those of the tokens, and send neither before both.
    own = jax.lax.optimization_barrier(routes)
    return _to_slots(network, gradient.astype(no_slot.dtype), own), None


_to_slots.defvjp(lambda network, x, routes: (_to_slots(network, x, routes), (x[:0], routes)), _to_slots_bwd)
_from_slots.defvjp(lambda network, y, routes: (_from_slots(network, y, routes), (y[:0], routes)), _from_slots_bwd)


def _in_slots(received: Assignments, tables: Tables, num_local: int, peers: Peers) -> Assignments:
    """Assignments of the tokens in this device's slots, to the experts of its host, numbered from its first."""
    flat = _of_experts_here(received, num_local, peers)
    token_of_slot = tables[0]
    return Assignments(
        flat.expert.at[token_of_slot].get(mode="fill", fill_value=num_local),
        fill_rows(flat.weight, *tables),
        None if flat.number is None else take_rows(flat.number, token_of_slot),
    )


# --- Within a host ---------------------------------------------------------------------------------------------------


def _apply_in_windows(
    slots: Float[Array, "N D"], chosen: Assignments, num_local: int, weights: ExpertWeights, peers: Peers
) -> Float[Array, "N D"]:
    """Weighted sums of the outputs of a host's experts for the tokens in this device's slots, in float32.

    Args:
        slots: tokens; undefined where nothing arrived.
        chosen: their assignments, to the host's experts.
        num_local: number of experts of the host.
        weights: of this device's experts; the rows of their dropout are not read.
        peers: devices of the host.
    """
    kept = chosen.expert < num_local
    place, totals = positions(chosen.expert[None], kept[None], num_local)
    ends = jnp.cumsum(totals[0])
    first = jnp.take(ends - totals[0], chosen.expert, mode="clip")
    tables = with_inverse(jnp.where(kept, first + place[0], kept.size), kept.size)
    ends, tables = checkpoint_name((ends, tables), ROUTES)
    with jax.named_scope(LOAD_SCOPE):
        most = jax.lax.pmax(ends[-1], axis_of("expert"))
    size = whole_tiles(min(kept.size, math.ceil(kept.size / peers.hosts * ROUND_SIZE)))
    operands = (slots, chosen.weight), dataclasses.replace(weights, dropout=None)
    dropout = None if chosen.number is None else weights.at(chosen.number).dropout
    index = tables, ends, dropout
    return _sum_windows(functools.partial(_window, size, peers), size, operands, index, most)


def _window(size: int, peers: Peers, start: Array | int, operands: Any, index: Any) -> Float[Array, "N D"]:
    """Part of the sums: at most ``size`` of the sorted assignments, from ``start`` on."""
    (slots, scale), weights = operands
    (assignment_of_row, row_of_assignment), ends, dropout = index
    padded = jnp.pad(assignment_of_row, (0, size), constant_values=row_of_assignment.size)
    assignment_of_row = jax.lax.dynamic_slice_in_dim(padded, start, size)
    kept = row_of_assignment < row_of_assignment.size
    inside = kept & (row_of_assignment >= start) & (row_of_assignment < start + size)
    # Computed before they are read: XLA hoists the array of fill values out of a pipeline's loop over turns, and would
    # sum the rows of all chunks of tokens, which share it, in one fusion, so that none returns before the last arrives.
    tables = jax.lax.optimization_barrier((assignment_of_row, jnp.where(inside, row_of_assignment - start, size)))
    sizes = jnp.diff(jnp.clip(ends, start, start + size), prepend=start)
    weights = dataclasses.replace(weights, dropout=dropout)
    return exchanged_outputs(slots, scale, tables, sizes, weights, peers)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _sum_windows(
    window: Callable[[Array | int, Any, Any], Array], size: int, operands: Any, index: Any, most: Array
) -> Array:
    """Sum of window(start, operands, index) over the windows that the fullest device needs."""
    return _sum_windows_fwd(window, size, operands, index, most)[0]


def _sum_windows_fwd(window, size, operands, index, most):
    first, backward = jax.vjp(lambda operands: window(0, operands, index), operands)
    total = further_rounds(most, size, first, lambda start, total: total + window(start, operands, index))
    return total, (operands, index, most, backward)


def _sum_windows_bwd(window, size, residuals, gradient):
    operands, index, most, backward = residuals

    def add(part, start, sums):
        _, backward = jax.vjp(lambda operands: window(start, operands, index), operands)
        return jax.tree.map(jnp.add, sums, backward(gradient)[0][part])

    # Two loops: after a joint one, whatever uses the tokens' gradients would wait for the gradients of the weights.
    of_tokens, of_weights = backward(gradient)[0]
    of_tokens = further_rounds(most, size, of_tokens, functools.partial(add, 0))
    of_weights = further_rounds(most, size, of_weights, functools.partial(add, 1))
    return (of_tokens, of_weights), None, None


_sum_windows.defvjp(_sum_windows_fwd, _sum_windows_bwd)
