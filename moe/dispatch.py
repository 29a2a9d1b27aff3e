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
from moe.gates import pick, top_k
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


def _positions(expert_index: Array, chosen: Array, num_experts: int) -> tuple[Array, Array]:
    """[G,S,K] int32, how many chosen pairs before this one name its expert; and how many all do, [G,E]."""
    groups, tokens, choices = expert_index.shape
    # [G,S,K] → [G,K,S] → [G,K·S]: the order of service.
    in_order = jnp.swapaxes(expert_index, 1, 2).reshape(groups, choices * tokens)
    sent = jnp.swapaxes(chosen, 1, 2).reshape(groups, choices * tokens)
    asks = jax.nn.one_hot(in_order, num_experts, dtype=jnp.int32) * sent[..., None]  # [G,K·S,E]
    before = jnp.cumsum(asks, axis=1) - asks
    position = jnp.sum(before * asks, axis=-1)
    # [G,K·S] → [G,K,S] → [G,S,K]
    return jnp.swapaxes(position.reshape(groups, choices, tokens), 1, 2), jnp.sum(asks, axis=1)


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
