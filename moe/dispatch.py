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
import math
from collections.abc import Callable
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from moe import sharding
from moe.routing import Routing


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


def make_plan(routing: Routing, capacity: int) -> Plan:
    """First come, first served in each group: all first choices in token order, then all second choices, and so on
    (GShard 2020, algorithm 1)."""
    num_experts = routing.router_logits.shape[-1]
    groups, tokens, choices = routing.expert_index.shape
    # [G,S,K] → [G,K,S] → [G,K·S]: the order of service.
    in_order = jnp.swapaxes(routing.expert_index, 1, 2).reshape(groups, choices * tokens)
    chosen = jnp.swapaxes(routing.chosen, 1, 2).reshape(groups, choices * tokens)
    asks = jax.nn.one_hot(in_order, num_experts, dtype=jnp.int32) * chosen[..., None]  # [G,K·S,E]
    before = jnp.cumsum(asks, axis=1) - asks
    position = jnp.sum(before * asks, axis=-1)
    # [G,K·S] → [G,K,S] → [G,S,K]
    position = jnp.swapaxes(position.reshape(groups, choices, tokens), 1, 2)
    return Plan(position, routing.chosen & (position < capacity), capacity, num_experts)


# Gather mode. Two index tables, each the other's inverse: which pair fills a slot, and which slot holds a pair. Both
# directions, forward and backward, are then gathers; without the custom gradients XLA would scatter-add.


def _slot_tables(routing: Routing, plan: Plan) -> tuple[Array, Array]:
    """pair_of_slot [G,E·C] int32 (S·K: empty) and slot_of_pair [G,S,K] int32 (E·C: not kept)."""
    groups, tokens, choices = plan.kept.shape
    num_slots = plan.num_experts * plan.capacity
    slot = routing.expert_index * plan.capacity + plan.position_in_expert
    slot_of_pair = jnp.where(plan.kept, slot, num_slots)
    pairs = jnp.arange(tokens * choices, dtype=jnp.int32)

    def invert(slots: Array) -> Array:  # [S·K] → [E·C]
        return jnp.full((num_slots,), tokens * choices, jnp.int32).at[slots].set(pairs, mode="drop")

    # [G,S,K] → [G,S·K]
    return jax.vmap(invert)(slot_of_pair.reshape(groups, tokens * choices)), slot_of_pair


def _take(rows: Array, index: Array) -> Array:
    """rows [R,D], index [...] → [...,D]; zero where the index is R or more."""
    return rows.at[index].get(mode="fill", fill_value=0)


@jax.custom_vjp
def _fill_slots(x: Array, pair_of_slot: Array, slot_of_pair: Array) -> Array:
    """x [S,D] → slots [E·C,D]."""
    choices = slot_of_pair.shape[-1]
    return _take(x, pair_of_slot // choices)


def _fill_slots_fwd(x, pair_of_slot, slot_of_pair):
    return _fill_slots(x, pair_of_slot, slot_of_pair), (pair_of_slot, slot_of_pair)


def _fill_slots_bwd(tables, gradient):
    pair_of_slot, slot_of_pair = tables
    return jnp.sum(_take(gradient, slot_of_pair), axis=1), _no_gradient(pair_of_slot), _no_gradient(slot_of_pair)


@jax.custom_vjp
def _read_slots(slots: Array, pair_of_slot: Array, slot_of_pair: Array) -> Array:
    """slots [E·C,D] → pairs [S,K,D], zero for pairs not kept."""
    return _take(slots, slot_of_pair)


def _read_slots_fwd(slots, pair_of_slot, slot_of_pair):
    return _read_slots(slots, pair_of_slot, slot_of_pair), (pair_of_slot, slot_of_pair)


def _read_slots_bwd(tables, gradient):
    pair_of_slot, slot_of_pair = tables
    # [S,K,D] → [S·K,D]
    pairs = gradient.reshape(-1, gradient.shape[-1])
    return _take(pairs, pair_of_slot), _no_gradient(pair_of_slot), _no_gradient(slot_of_pair)


def _no_gradient(index: Array) -> np.ndarray:
    return np.zeros(index.shape, jax.dtypes.float0)


_fill_slots.defvjp(_fill_slots_fwd, _fill_slots_bwd)
_read_slots.defvjp(_read_slots_fwd, _read_slots_bwd)


class Experts(Protocol):
    """What a mode asks of the experts: the same FFNs over either layout of rows."""

    def batched(self, rows: Array) -> Array:
        """[E,R,D] → [E,R,D]: expert e over its R rows."""
        ...

    def grouped(self, rows: Array, group_sizes: Array) -> Array:
        """[R,D], [E] int32 → [R,D]: the first group_sizes[0] rows by expert 0, the next by expert 1, and so on."""
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
    """Moves rows by index: no arithmetic on tokens but the weighted sum at the end."""
    groups, _, model_dim = x.shape
    pair_of_slot, slot_of_pair = _slot_tables(routing, plan)
    slots = jax.vmap(_fill_slots)(x, pair_of_slot, slot_of_pair)  # [G,E·C,D]
    # [G,E·C,D] → [G,E,C,D] → [E,G,C,D]
    slots = slots.reshape(groups, plan.num_experts, plan.capacity, model_dim).swapaxes(0, 1)
    outputs = _exchange(slots, experts)
    # [E,G,C,D] → [G,E,C,D] → [G,E·C,D]
    outputs = outputs.swapaxes(0, 1).reshape(groups, plan.num_experts * plan.capacity, model_dim)
    pairs = jax.vmap(_read_slots)(outputs, pair_of_slot, slot_of_pair)  # [G,S,K,D]
    return jnp.einsum("gskd,gsk->gsd", pairs, routing.combine_weights, preferred_element_type=jnp.float32)


def dropless(x: Array, routing: Routing, plan: Plan, experts: Experts) -> Array:
    """Sorts all pairs by expert, by counting, and gives each expert exactly its rows: no capacity, nothing dropped.

    A row costs what it costs whatever the load of its expert; pairs that are not chosen have no row.
    """
    groups, tokens, model_dim = x.shape
    choices = plan.kept.shape[-1]
    num_rows = groups * tokens * choices
    is_expert = routing.expert_index[..., None] == jnp.arange(plan.num_experts)  # [G,S,K,E], never stored
    load = jnp.sum(is_expert & plan.kept[..., None], axis=(1, 2), dtype=jnp.int32)  # [G,E]
    # Expert by expert and, within one, group by group: [G,E] → [E,G] → [E·G], summed → [E,G] → [G,E]
    by_expert = load.T.reshape(-1)
    first = (jnp.cumsum(by_expert) - by_expert).reshape(plan.num_experts, groups).T
    row = jax.vmap(lambda first, expert: first[expert])(first, routing.expert_index) + plan.position_in_expert
    row_of_pair = jnp.where(plan.kept, row, num_rows).reshape(groups * tokens, choices)
    pair_of_row = (
        jnp.full((num_rows,), num_rows, jnp.int32)
        .at[row_of_pair.reshape(-1)]
        .set(jnp.arange(num_rows, dtype=jnp.int32), mode="drop")
    )
    # [G,S,D] → [G·S,D] → rows [R,D], R = G·S·K
    rows = _fill_slots(x.reshape(groups * tokens, model_dim), pair_of_row, row_of_pair)
    outputs = experts.grouped(rows, jnp.sum(load, axis=0))
    pairs = _read_slots(outputs, pair_of_row, row_of_pair).reshape(groups, tokens, choices, model_dim)
    return jnp.einsum("gskd,gsk->gsd", pairs, routing.combine_weights, preferred_element_type=jnp.float32)


def einsum(x: Array, routing: Routing, plan: Plan, experts: Experts) -> Array:
    """Moves rows by one-hot matmuls over [G,S,E,C] (GShard 2020, algorithm 2)."""
    expert = jax.nn.one_hot(routing.expert_index, plan.num_experts, dtype=jnp.float32)  # [G,S,K,E]
    slot = jax.nn.one_hot(jnp.where(plan.kept, plan.position_in_expert, -1), plan.capacity, dtype=jnp.float32)
    dispatch_mask = jnp.einsum("gske,gskc->gsec", expert, slot)
    combine_weights = jnp.einsum("gske,gskc,gsk->gsec", expert, slot, routing.combine_weights)
    outputs = _exchange(jnp.einsum("gsec,gsd->egcd", dispatch_mask.astype(x.dtype), x), experts)
    return jnp.einsum("gsec,egcd->gsd", combine_weights, outputs, preferred_element_type=jnp.float32)


#: (x [G,S,D], Routing, Plan, Experts) → y [G,S,D] float32: Σ_k weight·expert output, 0 for dropped
MODES: dict[str, Callable[[Array, Routing, Plan, Experts], Array]] = {
    "gather": gather,
    "einsum": einsum,
    "dropless": dropless,
}
