"""Dispatch without a capacity: rows sorted by expert."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Float

from moe.dispatch.exchange import exchange_rows
from moe.dispatch.experts import Experts
from moe.dispatch.grouped_matmul.row_blocks import UNPADDED, choose_row_blocks, whole_tiles
from moe.dispatch.plan import Plan, load_per_group
from moe.dispatch.rows import combine_rows, fill_rows, index_tables
from moe.parallel import partition_specs
from moe.parallel.axes import axis_of, axis_size, on_mesh
from moe.parallel.remat import EXPERT_OUTPUTS
from moe.parallel.weights import gather_shard
from moe.routing.routing import Routing


def dropless(x: Float[Array, "G S D"], routing: Routing, plan: Plan, experts: Experts) -> Float[Array, "G S D"]:
    """Sorts all assignments by expert, by counting, and gives each expert exactly its rows; returns float32.

    The cost of a row does not depend on the load of its expert, and assignments that are not chosen have no row. On a
    mesh every device sorts its own tokens and, where experts are split, sends each device the rows of its experts.
    """
    if axis_size(*partition_specs.AXES) == 1:
        return run_sorted_by_expert(x, routing, plan, experts.matrices(x.dtype), experts)
    groups = on_mesh(partition_specs.GROUPS)

    def local(x: Array, routing: Routing, plan: Plan, shards: Any) -> Array:
        (into, biases), out_of = shards
        matrices = (tuple(gather_shard(matrix, 1) for matrix in into), biases), gather_shard(out_of, 2)
        return run_sorted_by_expert(x, routing, plan, matrices, experts)

    up, down = (on_mesh(partition_specs.PARAMETERS[f"experts.{name}"]) for name in ("up", "down"))
    stored = (up, on_mesh(partition_specs.EXPERT_BIASES)), down
    return jax.shard_map(local, in_specs=(groups, groups, groups, stored), out_specs=groups, check_vma=False)(
        x, routing, plan, experts.matrices(x.dtype, stored=True)
    )


def run_sorted_by_expert(
    x: Float[Array, "G S D"], routing: Routing, plan: Plan, matrices: Any, experts: Experts
) -> Float[Array, "G S D"]:
    """Applies one device's part of the experts' matrices to its kept assignments, sorted by expert."""
    groups, tokens, model_dim = x.shape
    load = load_per_group(routing, plan)
    sizes, num_devices = jnp.sum(load, axis=0), axis_size("expert")
    num_rows = whole_tiles(min(routing.expert_index.size, plan.num_experts * groups * plan.capacity))
    row_blocks = choose_row_blocks(num_rows, plan.num_experts) if num_devices == 1 else UNPADDED
    padded_sizes, num_rows = row_blocks.padded_sizes(sizes), row_blocks.total_rows(num_rows, plan.num_experts)
    tables = index_tables(routing, plan, load, jnp.cumsum(padded_sizes) - padded_sizes, num_rows)
    # [G,S,D] → [G·S,D] → rows [R,D], sorted by expert
    rows = fill_rows(x.reshape(groups * tokens, model_dim), *tables)
    if num_devices == 1:
        outputs = experts.grouped(matrices, rows, padded_sizes, row_blocks)
    else:
        outputs = exchange_rows(rows, sizes, matrices, experts, num_devices)
    outputs = checkpoint_name(outputs, EXPERT_OUTPUTS)
    weights = routing.combine_weights.reshape(groups * tokens, -1)
    y = combine_rows(outputs, weights, *tables).reshape(x.shape)
    # The hidden dim is split over ``tensor``: every device of that axis has a partial sum of each output.
    return jax.lax.psum(y, axis_of("tensor")) if axis_size("tensor") > 1 else y
