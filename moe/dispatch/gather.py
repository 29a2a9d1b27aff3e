"""Dispatch by index into capacity buffers."""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from moe.dispatch.dropless import run_sorted_by_expert
from moe.dispatch.experts import Experts, apply_experts
from moe.dispatch.plan import Plan, load_per_group
from moe.dispatch.rows import combine_rows, fill_rows, index_tables
from moe.parallel import partition_specs, target
from moe.parallel.axes import axis_size
from moe.routing.routing import Routing


def gather(x: Float[Array, "G S D"], routing: Routing, plan: Plan, experts: Experts) -> Float[Array, "G S D"]:
    """Moves rows by index: no arithmetic on tokens but the weighted sum at the end, in float32.

    The groups of one device share a buffer for each expert, filled from its start: [E,X,R,D], X devices with tokens
    and R rows for all groups of one. A device's part is contiguous in either order of E and X, so nothing is
    transposed. A single CPU exchanges nothing and computes no empty rows: it sorts the kept assignments by expert.
    """
    if target.is_cpu() and axis_size(*partition_specs.AXES) == 1:
        return run_sorted_by_expert(x, routing, plan, experts.matrices(x.dtype), experts)
    groups, tokens, model_dim = x.shape
    num_devices = math.gcd(groups, axis_size(*partition_specs.TOKEN_AXES))
    num_rows = groups // num_devices * plan.capacity
    starts = jnp.arange(plan.num_experts, dtype=jnp.int32) * num_rows
    # [G,...] → [X,G/X,...]
    split = functools.partial(
        jax.tree.map, lambda array: array.reshape(num_devices, groups // num_devices, *array.shape[1:])
    )
    load = split(load_per_group(routing, plan))
    tables = jax.vmap(functools.partial(index_tables, starts=starts, num_rows=plan.num_experts * num_rows))(
        split(routing), split(plan), load
    )
    # [G,S,·] → [X,G/X·S,·]
    x = x.reshape(num_devices, -1, model_dim)
    weights = routing.combine_weights.reshape(num_devices, x.shape[1], -1)
    rows = jax.vmap(fill_rows)(x, *tables)
    # [X,E·R,D] → [X,E,R,D] → [E,X,R,D]
    rows = rows.reshape(num_devices, plan.num_experts, num_rows, model_dim).swapaxes(0, 1)
    outputs = apply_experts(rows, experts)
    # [E,X,R,D] → [X,E,R,D] → [X,E·R,D]
    outputs = outputs.swapaxes(0, 1).reshape(num_devices, plan.num_experts * num_rows, model_dim)
    return jax.vmap(combine_rows)(outputs, weights, *tables).reshape(groups, tokens, model_dim)
