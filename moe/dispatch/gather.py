"""Dispatch by index."""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
from jax import Array

from moe.dispatch.dropless import run_sorted_by_expert
from moe.dispatch.experts import Experts, apply_experts
from moe.dispatch.plan import Plan
from moe.dispatch.rows import combine_rows, fill_rows, index_tables, load_per_group
from moe.parallel import partition_specs, target
from moe.parallel.mesh import axis_size
from moe.routing.routing import Routing


def gather(x: Array, routing: Routing, plan: Plan, experts: Experts) -> Array:
    """Moves rows by index: no arithmetic on tokens but the weighted sum at the end.

    The groups of one device share a buffer for each expert, filled from its start: [E,P,R,D], P devices with tokens
    and R rows for all of their groups. A device's part is then contiguous in either order of E and P, so nothing is
    transposed. One CPU exchanges nothing and needs no room for what is not there: it sorts the kept pairs by expert.
    """
    if target.is_cpu() and axis_size(*partition_specs.AXES) == 1:
        return run_sorted_by_expert(x, routing, plan, experts.matrices(x.dtype), experts)
    groups, tokens, model_dim = x.shape
    parts = math.gcd(groups, axis_size(*partition_specs.TOKEN_AXES))
    num_rows = groups // parts * plan.capacity
    starts = jnp.arange(plan.num_experts, dtype=jnp.int32) * num_rows
    # [G,...] → [P,G/P,...]
    split = functools.partial(jax.tree.map, lambda array: array.reshape(parts, groups // parts, *array.shape[1:]))
    load = split(load_per_group(routing, plan))
    tables = jax.vmap(functools.partial(index_tables, starts=starts, num_rows=plan.num_experts * num_rows))(
        split(routing), split(plan), load
    )
    # [G,S,·] → [P,G/P·S,·]
    x = x.reshape(parts, -1, model_dim)
    weights = routing.combine_weights.reshape(parts, x.shape[1], -1)
    rows = jax.vmap(fill_rows)(x, *tables)
    # [P,E·R,D] → [P,E,R,D] → [E,P,R,D]
    rows = rows.reshape(parts, plan.num_experts, num_rows, model_dim).swapaxes(0, 1)
    outputs = apply_experts(rows, experts)
    # [E,P,R,D] → [P,E,R,D] → [P,E·R,D]
    outputs = outputs.swapaxes(0, 1).reshape(parts, plan.num_experts * num_rows, model_dim)
    return jax.vmap(combine_rows)(outputs, weights, *tables).reshape(groups, tokens, model_dim)
