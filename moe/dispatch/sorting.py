"""Dropless dispatch on one device: sort the kept assignments by expert, multiply, and sum each token's outputs."""

from __future__ import annotations

from collections.abc import Callable

import jax.numpy as jnp
from jax import Array
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Float, Int

from moe.dispatch.backends import backend, grouped_ffn, whole_tiles
from moe.dispatch.buffers import (
    BufferPlan,
    Tables,
    assignment_numbers,
    combine_rows,
    fill_rows,
    index_tables,
    load_per_group,
    sum_rows,
    take_rows,
    weights_of_rows,
)
from moe.dispatch.ffn import ExpertWeights
from moe.parallel.partition_specs import EXPERT_OUTPUTS
from moe.routing.interface import ROUTES
from moe.routing.routing import Routing

#: (rows sorted by expert, rows of each expert, weights, factors of the outputs or None) → the experts' outputs.
GroupedFFN = Callable[[Array, Array, ExpertWeights, Array | None], Array]
#: Arguments and output of :func:`weighted_outputs`.
WeightedOutputs = Callable[[Array, Array, Tables, Array, ExpertWeights], Array]


def by_sorting(
    x: Float[Array, "G S D"], routing: Routing, plan: BufferPlan, weights: ExpertWeights
) -> Float[Array, "G S D"]:
    """Sort all kept assignments by expert, by counting, and give each expert exactly its rows; returns float32.

    The cost of a row does not depend on the load of its expert, and assignments that are not kept have no row.
    """
    if weights.dropout is not None:
        weights = weights.at(assignment_numbers(routing))
    return sort_and_apply(x, routing, plan, backend().pack(weights.gathered(x.dtype)))


def weighted_outputs(
    x: Float[Array, "S D"],
    combine_weights: Float[Array, "S K"],
    tables: Tables,
    sizes: Int[Array, " E"],
    weights: ExpertWeights,
    *,
    apply: GroupedFFN = grouped_ffn,
    keeps_outputs: bool = False,
) -> Float[Array, "S D"]:
    """Each token's weighted sum of its experts' outputs, in float32.

    Args:
        x: tokens.
        combine_weights: of their assignments.
        tables: of rows sorted by expert (:func:`moe.dispatch.buffers.index_tables`).
        sizes: rows for each expert.
        weights: of the experts; dropout, if any, holds the assignments' numbers in their order.
        apply: the experts.
        keeps_outputs: outputs are kept for the backward pass.
    """
    rows = fill_rows(x, *tables)
    if weights.dropout is not None:
        weights = weights.at(take_rows(weights.dropout.assignments.reshape(-1), tables[0]))
    if keeps_outputs or not backend().SCALES_HIDDEN:
        outputs = apply(rows, sizes, weights, None)
        return combine_rows(checkpoint_name(outputs, EXPERT_OUTPUTS), combine_weights, *tables)
    # Combine weights are applied before the last matmul, so that the backward pass needs no outputs: for the gradients
    # of the weights it would recompute and exchange them again. Where outputs are kept, that gradient is a smaller sum.
    scale = weights_of_rows(combine_weights, *tables)
    return sum_rows(apply(rows, sizes, weights, scale), *tables)


def sort_and_apply(
    x: Float[Array, "G S D"],
    routing: Routing,
    plan: BufferPlan,
    weights: ExpertWeights,
    outputs: WeightedOutputs = weighted_outputs,
) -> Float[Array, "G S D"]:
    """Sort kept assignments by expert, and sum each token's outputs.

    Args:
        weights: packed by the backend; dropout, if any, holds the assignments' numbers [G,S,K].
        outputs: computes the sums from sorted assignments.
    """
    groups, tokens, _ = x.shape
    load = load_per_group(routing, plan)
    sizes = jnp.sum(load, axis=0)
    num_rows = whole_tiles(min(routing.expert_index.size, plan.num_experts * groups * plan.capacity))
    tables = index_tables(routing, plan, load, jnp.cumsum(sizes) - sizes, num_rows)
    sizes, tables = checkpoint_name((sizes, tables), ROUTES)
    # [G,S,·] → [G·S,·]
    flat, combine_weights = (array.reshape(groups * tokens, -1) for array in (x, routing.combine_weights))
    return outputs(flat, combine_weights, tables, sizes, weights).reshape(x.shape)
