"""The plan of a dispatch: which assignment takes which position of its expert's buffer, and which are dropped."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Int

from moe.config import MoEConfig
from moe.routing.routing import Routing
from moe.routing.selection import pick, top_k


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Plan:
    """Buffer positions of one layer's assignments.

    Attributes:
        position_in_expert: [G,S,K] int32, position of the assignment in its expert's buffer of that group.
        kept: [G,S,K] bool, chosen assignments whose position is below the capacity.
        capacity: C, static.
        num_experts: E, static.
    """

    position_in_expert: Array
    kept: Array
    capacity: int = dataclasses.field(metadata={"static": True})
    num_experts: int = dataclasses.field(metadata={"static": True})


def expert_capacity(capacity_factor: float, experts_per_token: int, group_size: int, num_experts: int) -> int:
    """C = ceil(capacity_factor·K·S/E), at least 1 and at most S, since no token is sent to an expert twice."""
    # The inner rounding keeps 1.1 * 2 * 40 / 8 = 11.000000000000002 from becoming 12.
    exact = round(capacity_factor * experts_per_token * group_size / num_experts, 9)
    return max(1, min(group_size, math.ceil(exact)))


def layer_capacity(config: MoEConfig, group_size: int, *, train: bool = True) -> int:
    """C of a layer: ``expert_capacity`` where it is set, else by its capacity factor."""
    if config.expert_capacity:
        return min(config.expert_capacity, group_size)
    factor = config.capacity_factor if train else config.eval_capacity_factor
    return expert_capacity(factor, config.experts_per_token, group_size, config.num_experts)


def plan_assignments(
    config: MoEConfig, routing: Routing, capacity: int, *, rng: Array | None = None
) -> tuple[Routing, Plan]:
    """Applies a layer's dispatch mode, drop policy and overflow rule to a routing.

    Args:
        config: of the layer.
        routing: of the layer.
        capacity: C; unused by the mode dropless.
        rng: key of the random drop policy.

    Returns:
        The routing to dispatch, which differs from the given one where an overflowing assignment was given to another
        expert, and its plan.
    """
    _, tokens, choices = routing.chosen.shape
    if config.dispatch == "dropless":
        capacity = tokens * choices
    # The order of assignments matters only if some can be dropped.
    drop_policy = config.drop_policy if capacity < tokens else "position"
    plan = make_plan(routing, capacity, drop_policy=drop_policy, rng=rng)
    return overflow_to_next(routing, plan) if config.overflow_to_next else (routing, plan)


def make_plan(routing: Routing, capacity: int, *, drop_policy: str = "position", rng: Array | None = None) -> Plan:
    """Fills each group's buffers with all first choices in token order, then all second choices, and so on
    (GShard 2020, algorithm 1).

    Args:
        routing: of one layer.
        capacity: C.
        drop_policy: the order of the tokens: position, probability (largest combine weight first) or random.
        rng: key of the random order; None: the same order every time.
    """
    expert_index, chosen = routing.expert_index, routing.chosen
    order = _token_order(routing, drop_policy, rng)
    if order is not None:
        expert_index, chosen = (
            jnp.take_along_axis(array, order[..., None], axis=1) for array in (expert_index, chosen)
        )
    num_experts = routing.router_logits.shape[-1]
    position, _ = _positions(expert_index, chosen, num_experts)
    if order is not None:
        position = jnp.take_along_axis(position, jnp.argsort(order, axis=1)[..., None], axis=1)
    return Plan(position, routing.chosen & (position < capacity), capacity, num_experts)


def _token_order(routing: Routing, drop_policy: str, rng: Array | None) -> Int[Array, "G S"] | None:
    """The tokens of each group by falling priority; None: their order in the group."""
    if drop_policy == "position":
        return None
    if drop_policy == "probability":
        # The router's probability, not the weight: renormalised weights do not compare between tokens.
        probs = pick(routing.router_probs, routing.expert_index)
        priority = jax.lax.stop_gradient(jnp.max(jnp.where(routing.chosen, probs, 0.0), axis=-1))
    else:
        priority = jax.random.uniform(jax.random.key(0) if rng is None else rng, routing.chosen.shape[:2])
    return jnp.argsort(-priority, axis=1, stable=True)


#: Assignments compared pairwise within a block; earlier blocks contribute their counts per expert.
_BLOCK = 64


def _positions(
    expert_index: Int[Array, "G S K"], chosen: Bool[Array, "G S K"], num_experts: int
) -> tuple[Int[Array, "G S K"], Int[Array, "G E"]]:
    """How many earlier chosen assignments go to the same expert (0 where not chosen), and each expert's total.

    A running sum over the one-hot [G,K·S,E] would be memory traffic: here it runs over blocks of assignments.
    """
    groups, tokens, choices = expert_index.shape
    # [G,S,K] → [G,K,S] → [G,K·S]: the order in which buffers are filled.
    expert = jnp.swapaxes(jnp.where(chosen, expert_index, num_experts), 1, 2).reshape(groups, choices * tokens)
    size = min(_BLOCK, choices * tokens)
    expert = jnp.pad(expert, ((0, 0), (0, -expert.shape[1] % size)), constant_values=num_experts)
    expert = expert.reshape(groups, -1, size)  # [G,K·S] → [G,n,K·S/n]
    index = jnp.arange(size)
    same = expert[..., :, None] == expert[..., None, :]
    within = jnp.sum(same & (index[:, None] > index), axis=-1, dtype=jnp.int32)
    by_block = jnp.sum(expert[..., None] == jnp.arange(num_experts), axis=2, dtype=jnp.int32)  # [G,n,E]
    up_to = jnp.cumsum(by_block, axis=1)
    position = jnp.take_along_axis(up_to - by_block, expert, axis=-1, mode="fill", fill_value=0) + within
    position = jnp.where(expert < num_experts, position, 0)
    # [G,n,K·S/n] → [G,K·S] → [G,K,S] → [G,S,K]
    position = position.reshape(groups, -1)[:, : choices * tokens].reshape(groups, choices, tokens)
    return jnp.swapaxes(position, 1, 2), up_to[:, -1]


def overflow_to_next(routing: Routing, plan: Plan) -> tuple[Routing, Plan]:
    """Retries each dropped assignment once on the token's next-best expert, after all others ("no token left behind",
    Switch 2021, appendix B, one round of it).

    The n-th overflowing choice of a token tries its n-th best expert by ``router_probs`` among those it has not chosen.
    Its weight is multiplied by p(new)/p(old), so that an un-renormalised weight p stays a p.
    """
    choices, num_experts = routing.expert_index.shape[-1], plan.num_experts
    overflows = routing.chosen & ~plan.kept
    tried = jnp.any(routing.expert_index[..., None] == jnp.arange(num_experts), axis=-2)  # [G,S,E]
    _, further = top_k(jnp.where(tried, -jnp.inf, routing.router_probs), choices)
    nth = jnp.cumsum(overflows, axis=-1) - overflows  # [G,S,K], earlier choices of the token that overflowed
    next_index = jnp.take_along_axis(further, nth, axis=-1)
    position, _ = _positions(next_index, overflows, num_experts)
    _, demand = _positions(routing.expert_index, routing.chosen, num_experts)
    taken = jnp.minimum(demand, plan.capacity)  # [G,E]
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


def load_per_group(routing: Routing, plan: Plan) -> Int[Array, "G E"]:
    """How many assignments of a group each expert keeps."""
    # [G,S,K,E] is compared and summed at once, never stored.
    to_expert = routing.expert_index[..., None] == jnp.arange(plan.num_experts)
    return jnp.sum(to_expert & plan.kept[..., None], axis=(1, 2), dtype=jnp.int32)
