"""Expert buffers: the position of each assignment, which ones are dropped, and rows moved in and out by index."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Int, Shaped

from moe.config import MoEConfig
from moe.config.exchange import AllGather, AllToAll
from moe.parallel.mesh import axis_size
from moe.routing.interface import pick, top_k
from moe.routing.routing import Routing

#: assignment_of_row [R] (S·K for an empty row) and row_of_assignment [S,K] (R for one that is not kept).
Tables = tuple[Array, Array]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class BufferPlan:
    """Buffer positions of one layer's assignments.

    Attributes:
        position_in_expert: [G,S,K] int32, position of the assignment in its expert's buffer of that group.
        kept: [G,S,K] bool, chosen assignments whose position is below the capacity.
        capacity: C, static.
        num_experts: E, static.
        exchange: of dropless dispatch; positions count within one of its chunks. Static.
    """

    position_in_expert: Array
    kept: Array
    capacity: int = dataclasses.field(metadata={"static": True})
    num_experts: int = dataclasses.field(metadata={"static": True})
    exchange: AllToAll | AllGather = dataclasses.field(default=AllToAll(), metadata={"static": True})


def expert_capacity(capacity_factor: float, experts_per_token: int, group_size: int, num_experts: int) -> int:
    """C = ceil(capacity_factor·K·S/E), at least 1 and at most S, since no token is sent to an expert twice."""
    # The inner rounding keeps 1.1 * 2 * 40 / 8 = 11.000000000000002 from becoming 12.
    exact = round(capacity_factor * experts_per_token * group_size / num_experts, 9)
    return max(1, min(group_size, math.ceil(exact)))


def layer_capacity(config: MoEConfig, group_size: int, *, train: bool = True) -> int:
    """C of a layer: ``capacity.fixed`` where it is set, otherwise computed from the capacity factor.

    With N experts without an FFN, the factor multiplies what an FFN expert gets at balance: factor·τ·K·S / (τ·E + N)
    (MoE++ 2024, equation 8).
    """
    if config.capacity.fixed:
        return min(config.capacity.fixed, group_size)
    factor = config.capacity.train if train else config.capacity.eval
    return expert_capacity(factor * config.ffn_share, config.experts_per_token, group_size, config.num_experts)


def plan_assignments(
    config: MoEConfig, routing: Routing, capacity: int, *, rng: Array | None = None
) -> tuple[Routing, BufferPlan]:
    """Apply a layer's dispatch mode, drop policy and overflow rule to a routing.

    Args:
        capacity: C; unused by the mode dropless.
        rng: key of the random drop policy.

    Returns:
        The routing to dispatch, which differs from the given one where an overflowing assignment was given to another
        expert, and its plan.
    """
    _, tokens, choices = routing.chosen.shape
    if config.dispatch == "dropless":
        expert_devices = axis_size("expert")
        if expert_devices == 1:
            return routing, make_plan(routing, tokens * choices)
        return routing, plan_in_chunks(routing, tokens * choices, config.exchange_of(tokens, expert_devices))
    # The order of assignments matters only if some can be dropped.
    drop_policy = config.drop_policy if capacity < tokens else "position"
    plan = make_plan(routing, capacity, drop_policy=drop_policy, rng=rng)
    return overflow_to_next(routing, plan) if config.overflow_to_next else (routing, plan)


def make_plan(
    routing: Routing, capacity: int, *, drop_policy: str = "position", rng: Array | None = None
) -> BufferPlan:
    """Fill each group's buffers with all first choices in token order, then all second choices, and so on
    (GShard 2020, algorithm 1).

    Args:
        capacity: C.
        drop_policy: the order of the tokens: position, probability (the router's largest one among the chosen experts,
            descending) or random.
        rng: key of the random order; None: the same order every time.
    """
    expert_index, chosen = routing.expert_index, routing.chosen
    order = _token_order(routing, drop_policy, rng)
    if order is not None:
        expert_index, chosen = (
            jnp.take_along_axis(array, order[..., None], axis=1) for array in (expert_index, chosen)
        )
    num_experts = routing.router_logits.shape[-1]
    position, _ = positions(expert_index, chosen, num_experts)
    if order is not None:
        position = jnp.take_along_axis(position, jnp.argsort(order, axis=1)[..., None], axis=1)
    return BufferPlan(position, routing.chosen & (position < capacity), capacity, num_experts)


def plan_in_chunks(routing: Routing, capacity: int, exchange: AllToAll | AllGather) -> BufferPlan:
    """Plan each chunk of a group's tokens as a group of its own."""
    # [G,S,·] → [G·n,S/n,·]
    parts = jax.tree.map(lambda array: array.reshape(array.shape[0] * exchange.chunks, -1, *array.shape[2:]), routing)
    plan = make_plan(parts, capacity)
    whole = jax.tree.map(lambda array: array.reshape(routing.chosen.shape), plan)
    return dataclasses.replace(whole, exchange=exchange)


def _token_order(routing: Routing, drop_policy: str, rng: Array | None) -> Int[Array, "G S"] | None:
    """Token indices of each group by descending priority; None: the order of the group."""
    if drop_policy == "position":
        return None
    if drop_policy == "probability":
        # The router's probability, not the weight: renormalised weights are not comparable between tokens.
        probs = pick(routing.router_probs, routing.expert_index)
        priority = jax.lax.stop_gradient(jnp.max(jnp.where(routing.chosen, probs, 0.0), axis=-1))
    else:
        priority = jax.random.uniform(jax.random.key(0) if rng is None else rng, routing.chosen.shape[:2])
    return jnp.argsort(-priority, axis=1, stable=True)


#: Assignments compared pairwise within a block; earlier blocks contribute their counts per expert.
_BLOCK = 64


def positions(
    expert_index: Int[Array, "G S K"], chosen: Bool[Array, "G S K"], num_experts: int
) -> tuple[Int[Array, "G S K"], Int[Array, "G E"]]:
    """How many earlier chosen assignments go to the same expert (0 where not chosen), and each expert's total.

    A running sum over the one-hot [G,K·S,E] would be bound by memory traffic, so it runs over blocks of assignments.
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


def overflow_to_next(routing: Routing, plan: BufferPlan) -> tuple[Routing, BufferPlan]:
    """Retry each dropped assignment once on the token's next-best expert, after all others ("no token left behind",
    Switch 2021, appendix B, one round of it).

    The n-th overflowing choice of a token tries its n-th best expert by ``router_probs`` among those it has not chosen.
    Its weight is multiplied by p(new)/p(old), so that a weight p(old), not renormalised, becomes p(new).
    """
    choices, num_experts = routing.expert_index.shape[-1], plan.num_experts
    overflows = routing.chosen & ~plan.kept
    tried = jnp.any(routing.expert_index[..., None] == jnp.arange(num_experts), axis=-2)  # [G,S,E]
    _, further = top_k(jnp.where(tried, -jnp.inf, routing.router_probs), choices)
    nth = jnp.cumsum(overflows, axis=-1) - overflows  # [G,S,K], earlier choices of the token that overflowed
    next_index = jnp.take_along_axis(further, nth, axis=-1)
    position, _ = positions(next_index, overflows, num_experts)
    _, demand = positions(routing.expert_index, routing.chosen, num_experts)
    taken = jnp.minimum(demand, plan.capacity)  # [G,E]
    position = position + jnp.take_along_axis(taken[:, None], next_index, axis=-1)
    old, new = (pick(routing.router_probs, index) for index in (routing.expert_index, next_index))
    # The gradient of the quotient is divided by the square of p(old), which must not underflow.
    factor = jnp.where(overflows, new / jnp.where(overflows & (old > 1e-18), old, 1.0), 1.0)
    routing = dataclasses.replace(
        routing,
        expert_index=jnp.where(overflows, next_index, routing.expert_index).astype(jnp.int32),
        combine_weights=routing.combine_weights * factor,
    )
    position = jnp.where(overflows, position, plan.position_in_expert)
    kept = plan.kept | (overflows & (position < plan.capacity))
    return routing, dataclasses.replace(plan, position_in_expert=position, kept=kept)


def assignment_numbers(routing: Routing) -> Int[Array, "G S K"]:
    """Number of each assignment in the batch."""
    return jnp.arange(routing.expert_index.size, dtype=jnp.int32).reshape(routing.expert_index.shape)


def load_per_group(routing: Routing, plan: BufferPlan) -> Int[Array, "G E"]:
    """How many assignments of a group each expert keeps."""
    # The comparison [G,S,K,E] is fused with the sum and never stored.
    to_expert = routing.expert_index[..., None] == jnp.arange(plan.num_experts)
    return jnp.sum(to_expert & plan.kept[..., None], axis=(1, 2), dtype=jnp.int32)


def index_tables(
    routing: Routing, plan: BufferPlan, load: Int[Array, "G E"], starts: Int[Array, " E"], num_rows: int
) -> Tables:
    """Map assignments to rows, where expert e's rows begin at starts[e], one group after another.

    Args:
        load: kept assignments of each group and expert.
        starts: first row of each expert.
        num_rows: R.

    Returns:
        Tables of the G·S tokens.
    """
    groups, tokens, choices = plan.kept.shape
    first = starts + jnp.cumsum(load, axis=0) - load  # [G,E]
    row = jnp.take_along_axis(first[:, None], routing.expert_index, axis=-1) + plan.position_in_expert
    # [G,S,K] → [G·S,K]
    return with_inverse(jnp.where(plan.kept, row, num_rows).reshape(groups * tokens, choices), num_rows)


def with_inverse(row_of_assignment: Int[Array, "S K"], num_rows: int) -> Tables:
    """Both tables for R rows; an assignment whose row number is R or more has no row."""
    size = row_of_assignment.size
    empty = jnp.full((num_rows,), size, jnp.int32)
    assignments = jnp.arange(size, dtype=jnp.int32)
    assignment_of_row = empty.at[row_of_assignment.reshape(-1)].set(assignments, mode="drop", unique_indices=True)
    return assignment_of_row, row_of_assignment


def take_rows(rows: Shaped[Array, "R ..."], index: Int[Array, "*N"]) -> Shaped[Array, "*N ..."]:
    """Rows at an index; zero where the index is R or more."""
    return rows.at[index].get(mode="fill", fill_value=0)


@jax.custom_vjp
def fill_rows(
    x: Shaped[Array, "S D"], assignment_of_row: Int[Array, " R"], row_of_assignment: Int[Array, "S K"]
) -> Shaped[Array, "R D"]:
    """Copy each row's token. An empty row gets an arbitrary token: neither outputs nor gradients read it, and to set
    it to zero would cost a pass over the rows."""
    return _tokens_of_rows(x, assignment_of_row, row_of_assignment.shape[-1])


def _tokens_of_rows(x: Shaped[Array, "S D"], assignment_of_row: Int[Array, " R"], choices: int) -> Shaped[Array, "R D"]:
    return x.at[assignment_of_row // choices].get(mode="clip")


def _fill_rows_fwd(x, assignment_of_row, row_of_assignment):
    return fill_rows(x, assignment_of_row, row_of_assignment), (assignment_of_row, row_of_assignment)


def _fill_rows_bwd(tables, gradient):
    return _sum_choices(gradient, tables[1], None).astype(gradient.dtype), None, None


@jax.custom_vjp
def sum_rows(
    rows: Float[Array, "R D"], assignment_of_row: Int[Array, " R"], row_of_assignment: Int[Array, "S K"]
) -> Float[Array, "S D"]:
    """Each token's sum of its rows, in float32; assignments that are not kept add nothing. The backward pass does not
    read the rows; the gradient of an empty row is an arbitrary token's, as in :func:`fill_rows`."""
    del assignment_of_row
    return _sum_choices(rows, row_of_assignment, None)


def _sum_rows_fwd(rows, assignment_of_row, row_of_assignment):
    return sum_rows(rows, assignment_of_row, row_of_assignment), (rows[:0], assignment_of_row, row_of_assignment)


def _sum_rows_bwd(residuals, gradient):
    no_rows, *tables = residuals
    # Cast to the rows' dtype before it is copied to the rows, which halves the bytes.
    d_rows = _tokens_of_rows(gradient.astype(no_rows.dtype), tables[0], tables[1].shape[-1])
    return d_rows, None, None


@jax.custom_vjp
def weights_of_rows(
    weights: Float[Array, "S K"], assignment_of_row: Int[Array, " R"], row_of_assignment: Int[Array, "S K"]
) -> Float[Array, " R"]:
    """Each row's combine weight; 0 for an empty row."""
    del row_of_assignment
    return take_rows(weights.reshape(-1), assignment_of_row)


def _weights_of_rows_fwd(weights, *tables):
    return weights_of_rows(weights, *tables), tables


def _weights_of_rows_bwd(tables, gradient):
    return take_rows(gradient, tables[1]), None, None


@jax.custom_vjp
def combine_rows(
    rows: Float[Array, "R D"],
    weights: Float[Array, "S K"],
    assignment_of_row: Int[Array, " R"],
    row_of_assignment: Int[Array, "S K"],
) -> Float[Array, "S D"]:
    """Each token's weighted sum of its rows, in float32; assignments that are not kept add nothing."""
    del assignment_of_row
    return _sum_choices(rows, row_of_assignment, weights)


def _combine_rows_fwd(rows, weights, assignment_of_row, row_of_assignment):
    y = combine_rows(rows, weights, assignment_of_row, row_of_assignment)
    return y, (rows, weights, assignment_of_row, row_of_assignment)


def _combine_rows_bwd(residuals, gradient):
    rows, weights, assignment_of_row, row_of_assignment = residuals
    scale = weights.reshape(-1).at[assignment_of_row].get(mode="fill", fill_value=0)
    # Cast to the rows' dtype before it is copied to the rows, which halves the bytes. The scale of empty rows is 0.
    of_rows = _tokens_of_rows(gradient.astype(rows.dtype), assignment_of_row, weights.shape[-1])
    d_rows = (of_rows * scale[:, None]).astype(rows.dtype)
    columns = [jnp.sum(gradient * take_rows(rows, index), axis=-1) for index in row_of_assignment.T]
    return d_rows, jnp.stack(columns, axis=-1), None, None


def _sum_choices(
    rows: Float[Array, "R D"], row_of_assignment: Int[Array, "S K"], weights: Float[Array, "S K"] | None
) -> Float[Array, "S D"]:
    """Sum over choices in float32, one choice at a time: each is a gather fused with its product and sum, and no
    [S,K,D] is ever written."""
    total = None
    for choice, index in enumerate(row_of_assignment.T):
        term = take_rows(rows, index).astype(jnp.float32)
        term = term if weights is None else term * weights[:, choice, None]
        total = term if total is None else total + term
    assert total is not None
    return total


fill_rows.defvjp(_fill_rows_fwd, _fill_rows_bwd)
sum_rows.defvjp(_sum_rows_fwd, _sum_rows_bwd)
weights_of_rows.defvjp(_weights_of_rows_fwd, _weights_of_rows_bwd)
combine_rows.defvjp(_combine_rows_fwd, _combine_rows_bwd)
