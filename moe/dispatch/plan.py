"""Buffer positions: which assignment takes which row of its expert."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
from jax import Array

from moe.routing.gates import pick, top_k
from moe.routing.routing import Routing


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
