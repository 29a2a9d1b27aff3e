"""The dispatcher moves: tokens to expert buffers and back. It knows nothing of gates.

In: x [G,S,D] and a :class:`moe.routing.Routing`. A :class:`Plan` gives every chosen (token, choice) pair its slot in
its expert's buffer, or none when the buffer is full; a mode in :data:`MODES` carries x there and the experts'
outputs back. All modes compute the same function.

The exchange between devices is not written here: buffers are annotated group-sharded on the tokens' side and
expert-sharded on the experts' side, and XLA's partitioner puts one all-to-all between them (GShard 2020, section 3).

Letters: G groups, S tokens per group, E experts, C expert capacity, K choices per token, D model dim.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from moe import sharding
from moe.gates import pick, top_k
from moe.grouped import Chunks, chunks, in_chunks, whole_tiles
from moe.routing import Routing
from moe.waves import in_waves


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Plan:
    """Slots of one batch.

    Attributes:
        position_in_expert: [G,S,K] int32, row of the pair in its expert's buffer of that group.
        kept: [G,S,K] bool, chosen pairs whose position is below the capacity.
        capacity: C, static.
        num_experts: E, static.
    """

    position_in_expert: Array
    kept: Array
    capacity: int = dataclasses.field(metadata={"static": True})
    num_experts: int = dataclasses.field(metadata={"static": True})


def expert_capacity(capacity_factor: float, experts_per_token: int, group_size: int, num_experts: int) -> int:
    """C = ceil(capacity_factor·K·S/E), with the K; at most S, since no token names an expert twice, at least 1."""
    # The inner rounding keeps 1.1 * 2 * 40 / 8 = 11.000000000000002 from becoming 12.
    exact = round(capacity_factor * experts_per_token * group_size / num_experts, 9)
    return max(1, min(group_size, math.ceil(exact)))


#: Who is served first where an expert's buffer is too small: the earlier token, the token with the largest weight
#: (V-MoE 2021, section 4, "batch prioritized routing"), or a random one.
DROP_POLICIES = ("position", "probability", "random")


def make_plan(routing: Routing, capacity: int, *, drop_policy: str = "position", rng: Array | None = None) -> Plan:
    """First come, first served in each group: all first choices in token order, then all second choices, and so on
    (GShard 2020, algorithm 1).

    Args:
        routing: of one layer.
        capacity: C.
        drop_policy: the order of the tokens, one of :data:`DROP_POLICIES`.
        rng: key of the random order; None: always the same order.
    """
    expert_index, chosen = routing.expert_index, routing.chosen
    order = _service_order(routing, drop_policy, rng)
    if order is not None:
        expert_index, chosen = (
            jnp.take_along_axis(array, order[..., None], axis=1) for array in (expert_index, chosen)
        )
    num_experts = routing.router_logits.shape[-1]
    position, _ = _positions(expert_index, chosen, num_experts)
    if order is not None:
        position = jnp.take_along_axis(position, jnp.argsort(order, axis=1)[..., None], axis=1)
    return Plan(position, routing.chosen & (position < capacity), capacity, num_experts)


def _service_order(routing: Routing, drop_policy: str, rng: Array | None) -> Array | None:
    """[G,S] int32, the tokens in the order of service; None: as they stand."""
    if drop_policy == "position":
        return None
    if drop_policy == "probability":
        priority = jax.lax.stop_gradient(jnp.max(routing.combine_weights, axis=-1))
    else:
        priority = jax.random.uniform(jax.random.key(0) if rng is None else rng, routing.chosen.shape[:2])
    return jnp.argsort(-priority, axis=1, stable=True)


#: Pairs that are counted one against another; those of earlier blocks are counted by expert.
_BLOCK = 64


def _positions(expert_index: Array, chosen: Array, num_experts: int) -> tuple[Array, Array]:
    """[G,S,K] int32, how many chosen pairs before this one name its expert (0 if it is not chosen itself); and how many
    all do, [G,E].

    The running sum over pairs of a one-hot [G,K·S,E] would be memory traffic: here it runs over blocks of pairs.
    """
    groups, tokens, choices = expert_index.shape
    # [G,S,K] → [G,K,S] → [G,K·S]: the order of service.
    asked = jnp.swapaxes(jnp.where(chosen, expert_index, num_experts), 1, 2).reshape(groups, choices * tokens)
    size = min(_BLOCK, choices * tokens)
    asked = jnp.pad(asked, ((0, 0), (0, -asked.shape[1] % size)), constant_values=num_experts)
    asked = asked.reshape(groups, -1, size)  # [G,K·S] → [G,n,K·S/n]
    pair = jnp.arange(size)
    same = asked[..., :, None] == asked[..., None, :]
    within = jnp.sum(same & (pair[:, None] > pair), axis=-1, dtype=jnp.int32)
    by_block = jnp.sum(asked[..., None] == jnp.arange(num_experts), axis=2, dtype=jnp.int32)  # [G,n,E]
    up_to = jnp.cumsum(by_block, axis=1)
    position = jnp.take_along_axis(up_to - by_block, asked, axis=-1, mode="fill", fill_value=0) + within
    position = jnp.where(asked < num_experts, position, 0)
    # [G,n,K·S/n] → [G,K·S] → [G,K,S] → [G,S,K]
    position = position.reshape(groups, -1)[:, : choices * tokens].reshape(groups, choices, tokens)
    return jnp.swapaxes(position, 1, 2), up_to[:, -1]


def overflow_to_next(routing: Routing, plan: Plan) -> tuple[Routing, Plan]:
    """Gives each pair that found no room one more try, at the token's next best expert, after everybody else
    ("no token left behind", Switch 2021, appendix B, one round of it).

    The n-th overflowing choice of a token tries its n-th best expert by ``router_probs`` among those it has not named.
    Its weight is multiplied by p(new)/p(old), so that an un-renormalised weight p stays a p.
    """
    choices, num_experts = routing.expert_index.shape[-1], plan.num_experts
    overflows = routing.chosen & ~plan.kept
    named = jnp.any(routing.expert_index[..., None] == jnp.arange(num_experts), axis=-2)  # [G,S,E]
    _, further = top_k(jnp.where(named, -jnp.inf, routing.router_probs), choices)
    nth = jnp.cumsum(overflows, axis=-1) - overflows  # [G,S,K], how many choices of the token overflowed before
    next_index = jnp.take_along_axis(further, nth, axis=-1)
    position, _ = _positions(next_index, overflows, num_experts)
    _, asked = _positions(routing.expert_index, routing.chosen, num_experts)
    taken = jnp.minimum(asked, plan.capacity)  # [G,E]
    position = position + jnp.take_along_axis(taken[:, None], next_index, axis=-1)
    old, new = (pick(routing.router_probs, index) for index in (routing.expert_index, next_index))
    factor = jnp.where(overflows, new / jnp.where(overflows & (old > 0), old, 1.0), 1.0)
    routing = dataclasses.replace(
        routing,
        expert_index=jnp.where(overflows, next_index, routing.expert_index).astype(jnp.int32),
        combine_weights=routing.combine_weights * factor,
    )
    position = jnp.where(overflows, position, plan.position_in_expert)
    kept = plan.kept | (overflows & (position < plan.capacity))
    return routing, dataclasses.replace(plan, position_in_expert=position, kept=kept)


# Rows in and out. Two index tables, each the other's inverse: which pair has a row, and which row holds a pair. Both
# directions, forward and backward, are then gathers; without the custom gradients XLA would scatter-add.


def _load(routing: Routing, plan: Plan) -> Array:
    """[G,E] int32, how many pairs of a group each expert keeps."""
    # [G,S,K,E] is compared and summed at once, never stored.
    named = routing.expert_index[..., None] == jnp.arange(plan.num_experts)
    return jnp.sum(named & plan.kept[..., None], axis=(1, 2), dtype=jnp.int32)


def _tables(routing: Routing, plan: Plan, load: Array, starts: Array, num_rows: int) -> tuple[Array, Array]:
    """Where each pair's row is, when expert e's rows begin at starts[e] and go group by group.

    Args:
        routing: expert_index [G,S,K].
        plan: of it.
        load: [G,E].
        starts: [E] int32.
        num_rows: R.

    Returns:
        pair_of_row [R] int32 (G·S·K: none) and row_of_pair [G·S,K] int32 (R: not kept).
    """
    groups, tokens, choices = plan.kept.shape
    first = starts + jnp.cumsum(load, axis=0) - load  # [G,E]
    row = jnp.take_along_axis(first[:, None], routing.expert_index, axis=-1) + plan.position_in_expert
    # [G,S,K] → [G·S,K]
    row_of_pair = jnp.where(plan.kept, row, num_rows).reshape(groups * tokens, choices)
    num_pairs = row_of_pair.size
    pair_of_row = jnp.full((num_rows,), num_pairs, jnp.int32)
    pairs = jnp.arange(num_pairs, dtype=jnp.int32)
    return pair_of_row.at[row_of_pair.reshape(-1)].set(pairs, mode="drop", unique_indices=True), row_of_pair


def _take(rows: Array, index: Array) -> Array:
    """rows [R,D], index [...] → [...,D]; zero where the index is R or more."""
    return rows.at[index].get(mode="fill", fill_value=0)


@jax.custom_vjp
def _fill(x: Array, pair_of_row: Array, row_of_pair: Array) -> Array:
    """x [S,D] → rows [R,D], zero where there is no pair."""
    return _take(x, pair_of_row // row_of_pair.shape[-1])


def _fill_fwd(x, pair_of_row, row_of_pair):
    return _fill(x, pair_of_row, row_of_pair), (pair_of_row, row_of_pair)


def _fill_bwd(tables, gradient):
    return _sum_choices(gradient, tables[1], None).astype(gradient.dtype), *map(_no_gradient, tables)


@jax.custom_vjp
def _combine(rows: Array, weights: Array, pair_of_row: Array, row_of_pair: Array) -> Array:
    """rows [R,D], weights [S,K] float32 → [S,D] float32, each token's weighted sum; nothing of pairs not kept."""
    del pair_of_row
    return _sum_choices(rows, row_of_pair, weights)


def _combine_fwd(rows, weights, pair_of_row, row_of_pair):
    return _combine(rows, weights, pair_of_row, row_of_pair), (rows, weights, pair_of_row, row_of_pair)


def _combine_bwd(residuals, gradient):
    rows, weights, pair_of_row, row_of_pair = residuals
    scale = weights.reshape(-1).at[pair_of_row].get(mode="fill", fill_value=0)
    d_rows = (_take(gradient, pair_of_row // weights.shape[-1]) * scale[:, None]).astype(rows.dtype)
    columns = [jnp.sum(gradient * _take(rows, index), axis=-1) for index in row_of_pair.T]
    return d_rows, jnp.stack(columns, axis=-1), _no_gradient(pair_of_row), _no_gradient(row_of_pair)


def _sum_choices(rows: Array, row_of_pair: Array, weights: Array | None) -> Array:
    """[R,D], [S,K] → [S,D] float32. One choice at a time: each is a gather fused with its product and sum, and no
    [S,K,D] is ever written."""
    total = None
    for choice, index in enumerate(row_of_pair.T):
        term = _take(rows, index).astype(jnp.float32)
        term = term if weights is None else term * weights[:, choice, None]
        total = term if total is None else total + term
    assert total is not None
    return total


def _no_gradient(index: Array) -> np.ndarray:
    return np.zeros(index.shape, jax.dtypes.float0)


_fill.defvjp(_fill_fwd, _fill_bwd)
_combine.defvjp(_combine_fwd, _combine_bwd)


class Experts(Protocol):
    """What a mode asks of the experts: the same FFNs over either layout of rows."""

    def batched(self, rows: Array) -> Array:
        """[E,R,D] → [E,R,D]: expert e over its R rows."""
        ...

    def matrices(self, dtype: Any) -> Any:
        """All weights in that dtype, [E,·,·] each, split by ``sharding.EXPERT_MATRICES``."""
        ...

    def grouped(self, matrices: Any, rows: Array, sizes: Array, pieces: Chunks) -> Array:
        """[R,D], [E] int32 → [R,D]: the first sizes[0] rows by expert 0, the next by expert 1, and so on."""
        ...


def _exchange(expert_inputs: Array, experts: Experts) -> Array:
    """[E,G,C,D] group-sharded → experts, expert-sharded → [E,G,C,D] group-sharded."""
    expert_inputs = sharding.constrain(expert_inputs, sharding.GROUPED_SLOTS)
    expert_inputs = sharding.constrain(expert_inputs, sharding.EXPERT_SLOTS)
    num_experts, groups, capacity, model_dim = expert_inputs.shape
    # [E,G,C,D] → [E,G·C,D] and back
    outputs = experts.batched(expert_inputs.reshape(num_experts, groups * capacity, model_dim))
    outputs = outputs.reshape(num_experts, groups, capacity, model_dim)
    outputs = sharding.constrain(outputs, sharding.EXPERT_SLOTS)
    return sharding.constrain(outputs, sharding.GROUPED_SLOTS)


def gather(x: Array, routing: Routing, plan: Plan, experts: Experts) -> Array:
    """Moves rows by index: no arithmetic on tokens but the weighted sum at the end.

    The groups of one device share a buffer for each expert, filled from its start: [E,P,R,D], P devices with tokens
    and R rows for all of their groups. A device's part is then contiguous in either order of E and P, so nothing is
    transposed. One CPU exchanges nothing and needs no room for what is not there: it sorts the kept pairs by expert.
    """
    if in_chunks() and sharding.axis_size(*sharding.AXES) == 1:
        return _sorted_by_expert(x, routing, plan, experts.matrices(x.dtype), experts)
    groups, tokens, model_dim = x.shape
    parts = math.gcd(groups, sharding.axis_size(*sharding.TOKEN_AXES))
    num_rows = groups // parts * plan.capacity
    starts = jnp.arange(plan.num_experts, dtype=jnp.int32) * num_rows
    # [G,...] → [P,G/P,...]
    split = functools.partial(jax.tree.map, lambda array: array.reshape(parts, groups // parts, *array.shape[1:]))
    load = split(_load(routing, plan))
    tables = jax.vmap(functools.partial(_tables, starts=starts, num_rows=plan.num_experts * num_rows))(
        split(routing), split(plan), load
    )
    # [G,S,·] → [P,G/P·S,·]
    x = x.reshape(parts, -1, model_dim)
    weights = routing.combine_weights.reshape(parts, x.shape[1], -1)
    rows = jax.vmap(_fill)(x, *tables)
    # [P,E·R,D] → [P,E,R,D] → [E,P,R,D]
    rows = rows.reshape(parts, plan.num_experts, num_rows, model_dim).swapaxes(0, 1)
    outputs = _exchange(rows, experts)
    # [E,P,R,D] → [P,E,R,D] → [P,E·R,D]
    outputs = outputs.swapaxes(0, 1).reshape(parts, plan.num_experts * num_rows, model_dim)
    return jax.vmap(_combine)(outputs, weights, *tables).reshape(groups, tokens, model_dim)


def dropless(x: Array, routing: Routing, plan: Plan, experts: Experts) -> Array:
    """Sorts all pairs by expert, by counting, and gives each expert exactly its rows: no capacity, nothing dropped.

    A row costs what it costs whatever the load of its expert; pairs that are not chosen have no row. On a mesh every
    device sorts its own tokens, and where experts are split, sends each device the rows of its experts.
    """
    matrices = experts.matrices(x.dtype)
    if sharding.axis_size(*sharding.AXES) == 1:
        return _sorted_by_expert(x, routing, plan, matrices, experts)
    tokens = jax.tree.map(lambda _: sharding.BATCH, (routing, plan))
    return jax.shard_map(
        functools.partial(_sorted_by_expert, experts=experts),
        in_specs=(sharding.BATCH, *tokens, sharding.EXPERT_MATRICES),
        out_specs=sharding.BATCH,
        check_vma=False,
    )(x, routing, plan, matrices)


def _sorted_by_expert(x: Array, routing: Routing, plan: Plan, matrices: Any, experts: Experts) -> Array:
    """One device's tokens, their kept pairs sorted by expert, through its part of the experts' matrices."""
    groups, tokens, model_dim = x.shape
    load = _load(routing, plan)
    sizes, parts = jnp.sum(load, axis=0), sharding.axis_size("expert")
    num_rows = whole_tiles(min(routing.expert_index.size, plan.num_experts * groups * plan.capacity))
    pieces = chunks(num_rows, plan.num_experts) if parts == 1 else Chunks(())
    room, num_rows = pieces.padded_sizes(sizes), pieces.total(num_rows, plan.num_experts)
    tables = _tables(routing, plan, load, jnp.cumsum(room) - room, num_rows)
    # [G,S,D] → [G·S,D] → rows [R,D], sorted by expert
    rows = _fill(x.reshape(groups * tokens, model_dim), *tables)
    if parts == 1:
        outputs = experts.grouped(matrices, rows, room, pieces)
    else:
        outputs = _on_their_devices(rows, sizes, matrices, experts, parts)
    weights = routing.combine_weights.reshape(groups * tokens, -1)
    y = _combine(outputs, weights, *tables).reshape(x.shape)
    # The hidden dim is split over ``tensor``: every device there has a part of each output.
    return jax.lax.psum(y, "tensor") if sharding.axis_size("tensor") > 1 else y


def _on_their_devices(rows: Array, sizes: Array, matrices: Any, experts: Experts, parts: int) -> Array:
    """rows [R,D] sorted by expert → the experts' outputs [R,D], each computed where its expert is.

    A device may be sent all rows of all X devices, and has room for them: [X·R,D], those of device s from s·R on.

    Args:
        rows: [R,D].
        sizes: [E] int32.
        matrices: of E/X experts.
        experts: the FFN.
        parts: X, devices that the experts are split over.
    """
    if not in_chunks():
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
    outputs = experts.grouped(matrices, _fill(arrived, place_of_row, row_of_place), room, pieces)
    # Back: the same tables the other way round.
    outputs = _fill(outputs, row_of_place[:, 0], place_of_row[:, None])
    return _send_back(outputs, jnp.sum(sent, axis=1))


def _send(rows: Array, sent: Array) -> Array:
    """rows [R,D], sorted by the device they go to → places [X·R,D], from device s at s·R; sizes [X] int32.

    XLA's CPU has no ragged exchange: as many places for each device as all rows would need.
    """
    places = _fill(rows, *_place_tables(sent, rows.shape[0]))
    return jax.lax.all_to_all(places, "expert", 0, 0, tiled=True)


def _send_back(places: Array, sent: Array) -> Array:
    """places [X·R,D] → rows [R,D]: undoes :func:`_send`."""
    row_of_place, place_of_row = _place_tables(sent, places.shape[0] // sent.shape[0])
    return _fill(jax.lax.all_to_all(places, "expert", 0, 0, tiled=True), place_of_row[:, 0], row_of_place[:, None])


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


def einsum(x: Array, routing: Routing, plan: Plan, experts: Experts) -> Array:
    """Moves rows by one-hot matmuls over [G,S,E,C] (GShard 2020, algorithm 2)."""
    expert = jax.nn.one_hot(routing.expert_index, plan.num_experts, dtype=jnp.float32)  # [G,S,K,E]
    slot = jax.nn.one_hot(jnp.where(plan.kept, plan.position_in_expert, -1), plan.capacity, dtype=jnp.float32)
    dispatch_mask = jnp.einsum("gske,gskc->gsec", expert, slot)
    combine_weights = jnp.einsum("gske,gskc,gsk->gsec", expert, slot, routing.combine_weights)
    return mix(x, dispatch_mask, combine_weights, experts)


def mix(x: Array, dispatch_weights: Array, combine_weights: Array, experts: Experts) -> Array:
    """x [G,S,D], weights [G,S,E,C] of tokens in slots and of slots in outputs → y [G,S,D] float32."""
    outputs = _exchange(jnp.einsum("gsec,gsd->egcd", dispatch_weights.astype(x.dtype), x), experts)
    return jnp.einsum("gsec,egcd->gsd", combine_weights, outputs, preferred_element_type=jnp.float32)


def soft_weights(slot_logits: Array, mask: Array) -> tuple[Array, Array]:
    """Dispatch and combine weights of Soft MoE: softmax over tokens, softmax over slots (2023, equations 1 and 3).

    Args:
        slot_logits: [G,S,E,P] float32, P slots per expert.
        mask: [G,S] bool; padding is in no slot and takes nothing.
    """
    real = mask[..., None, None]
    # Where a group has no real token, softmax over nothing would be NaN.
    dispatch = jax.nn.softmax(jnp.where(real, slot_logits, jnp.finfo(jnp.float32).min), axis=1)
    combine = jax.nn.softmax(slot_logits, axis=(2, 3))
    return jnp.where(real, dispatch, 0.0), jnp.where(real, combine, 0.0)


#: (x [G,S,D], Routing, Plan, Experts) → y [G,S,D] float32: Σ_k weight·expert output, 0 for dropped
MODES: dict[str, Callable[[Array, Routing, Plan, Experts], Array]] = {
    "gather": gather,
    "einsum": einsum,
    "dropless": dropless,
}
