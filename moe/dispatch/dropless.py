"""Dispatch without a capacity: rows sorted by expert."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from moe.dispatch.exchange import exchange_rows
from moe.dispatch.experts import Experts
from moe.dispatch.grouped_matmul.accelerator import whole_tiles
from moe.dispatch.grouped_matmul.cpu import Chunks
from moe.dispatch.grouped_matmul.grouped_ffn import chunks
from moe.dispatch.plan import Plan
from moe.dispatch.rows import combine_rows, fill_rows, index_tables, load_per_group
from moe.parallel import partition_specs
from moe.parallel.mesh import axis_size
from moe.routing.routing import Routing


def dropless(x: Array, routing: Routing, plan: Plan, experts: Experts) -> Array:
    """Sorts all pairs by expert, by counting, and gives each expert exactly its rows: no capacity, nothing dropped.

    A row costs what it costs whatever the load of its expert; pairs that are not chosen have no row. On a mesh every
    device sorts its own tokens, and where experts are split, sends each device the rows of its experts.
    """
    matrices = experts.matrices(x.dtype)
    if axis_size(*partition_specs.AXES) == 1:
        return run_sorted_by_expert(x, routing, plan, matrices, experts)
    tokens = jax.tree.map(lambda _: partition_specs.BATCH, (routing, plan))
    return jax.shard_map(
        functools.partial(run_sorted_by_expert, experts=experts),
        in_specs=(partition_specs.BATCH, *tokens, partition_specs.EXPERT_MATRICES),
        out_specs=partition_specs.BATCH,
        check_vma=False,
    )(x, routing, plan, matrices)


def run_sorted_by_expert(x: Array, routing: Routing, plan: Plan, matrices: Any, experts: Experts) -> Array:
    """One device's tokens, their kept pairs sorted by expert, through its part of the experts' matrices."""
    groups, tokens, model_dim = x.shape
    load = load_per_group(routing, plan)
    sizes, parts = jnp.sum(load, axis=0), axis_size("expert")
    num_rows = whole_tiles(min(routing.expert_index.size, plan.num_experts * groups * plan.capacity))
    pieces = chunks(num_rows, plan.num_experts) if parts == 1 else Chunks(())
    room, num_rows = pieces.padded_sizes(sizes), pieces.total(num_rows, plan.num_experts)
    tables = index_tables(routing, plan, load, jnp.cumsum(room) - room, num_rows)
    # [G,S,D] → [G·S,D] → rows [R,D], sorted by expert
    rows = fill_rows(x.reshape(groups * tokens, model_dim), *tables)
    if parts == 1:
        outputs = experts.grouped(matrices, rows, room, pieces)
    else:
        outputs = exchange_rows(rows, sizes, matrices, experts, parts)
    weights = routing.combine_weights.reshape(groups * tokens, -1)
    y = combine_rows(outputs, weights, *tables).reshape(x.shape)
    # The hidden dim is split over ``tensor``: every device there has a part of each output.
    return jax.lax.psum(y, "tensor") if axis_size("tensor") > 1 else y
