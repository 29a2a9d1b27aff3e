"""Token rows gathered into expert buffers and combined again; gradients are gathers too.

Two index tables, each the inverse of the other, say which assignment a row holds and which row an assignment has. With
both, forward and backward are gathers; without the custom gradients XLA would scatter-add.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float, Int, Shaped

from moe.dispatch.plan import Plan
from moe.routing.routing import Routing


def index_tables(
    routing: Routing, plan: Plan, load: Int[Array, "G E"], starts: Int[Array, " E"], num_rows: int
) -> tuple[Int[Array, " R"], Int[Array, "GS K"]]:
    """Rows of assignments, when expert e's rows begin at starts[e] and follow group by group.

    Args:
        routing: to dispatch.
        plan: of it.
        load: kept assignments of each group and expert.
        starts: first row of each expert.
        num_rows: R.

    Returns:
        assignment_of_row (G·S·K for an empty row) and row_of_assignment (R for one that is not kept).
    """
    groups, tokens, choices = plan.kept.shape
    first = starts + jnp.cumsum(load, axis=0) - load  # [G,E]
    row = jnp.take_along_axis(first[:, None], routing.expert_index, axis=-1) + plan.position_in_expert
    # [G,S,K] → [G·S,K]
    row_of_assignment = jnp.where(plan.kept, row, num_rows).reshape(groups * tokens, choices)
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
    x: Float[Array, "S D"], assignment_of_row: Int[Array, " R"], row_of_assignment: Int[Array, "S K"]
) -> Float[Array, "R D"]:
    """Each row's token; zero for an empty row."""
    return take_rows(x, assignment_of_row // row_of_assignment.shape[-1])


def _fill_rows_fwd(x, assignment_of_row, row_of_assignment):
    return fill_rows(x, assignment_of_row, row_of_assignment), (assignment_of_row, row_of_assignment)


def _fill_rows_bwd(tables, gradient):
    return _sum_choices(gradient, tables[1], None).astype(gradient.dtype), *map(no_gradient, tables)


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
    d_rows = (take_rows(gradient, assignment_of_row // weights.shape[-1]) * scale[:, None]).astype(rows.dtype)
    columns = [jnp.sum(gradient * take_rows(rows, index), axis=-1) for index in row_of_assignment.T]
    return d_rows, jnp.stack(columns, axis=-1), no_gradient(assignment_of_row), no_gradient(row_of_assignment)


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


def no_gradient(index: Array) -> np.ndarray:
    """Cotangent of an integer array."""
    return np.zeros(index.shape, jax.dtypes.float0)


fill_rows.defvjp(_fill_rows_fwd, _fill_rows_bwd)
combine_rows.defvjp(_combine_rows_fwd, _combine_rows_bwd)
