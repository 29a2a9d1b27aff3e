"""Gathers of token rows into expert buffers and back, with gathers as gradients."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from moe.dispatch.plan import Plan
from moe.routing.routing import Routing

# Rows in and out. Two index tables, each the other's inverse: which pair has a row, and which row holds a pair. Both
# directions, forward and backward, are then gathers; without the custom gradients XLA would scatter-add.


def load_per_group(routing: Routing, plan: Plan) -> Array:
    """[G,E] int32, how many pairs of a group each expert keeps."""
    # [G,S,K,E] is compared and summed at once, never stored.
    named = routing.expert_index[..., None] == jnp.arange(plan.num_experts)
    return jnp.sum(named & plan.kept[..., None], axis=(1, 2), dtype=jnp.int32)


def index_tables(routing: Routing, plan: Plan, load: Array, starts: Array, num_rows: int) -> tuple[Array, Array]:
    """Where each pair's row is, when expert e's rows begin at starts[e] and go group by group.

    Args:
        routing: expert_index [G,S,K].
        plan: of it.
        load: [G,E].
        starts: [E] int32.
        num_rows: R.

    Returns:
        pair_of_row [R] int32 (G·S·K: none) and row_of_pair [G·S,K] int32 (R: not kept).
    """
    groups, tokens, choices = plan.kept.shape
    first = starts + jnp.cumsum(load, axis=0) - load  # [G,E]
    row = jnp.take_along_axis(first[:, None], routing.expert_index, axis=-1) + plan.position_in_expert
    # [G,S,K] → [G·S,K]
    row_of_pair = jnp.where(plan.kept, row, num_rows).reshape(groups * tokens, choices)
    num_pairs = row_of_pair.size
    pair_of_row = jnp.full((num_rows,), num_pairs, jnp.int32)
    pairs = jnp.arange(num_pairs, dtype=jnp.int32)
    return pair_of_row.at[row_of_pair.reshape(-1)].set(pairs, mode="drop", unique_indices=True), row_of_pair


def take_rows(rows: Array, index: Array) -> Array:
    """rows [R,D], index [...] → [...,D]; zero where the index is R or more."""
    return rows.at[index].get(mode="fill", fill_value=0)


@jax.custom_vjp
def fill_rows(x: Array, pair_of_row: Array, row_of_pair: Array) -> Array:
    """x [S,D] → rows [R,D], zero where there is no pair."""
    return take_rows(x, pair_of_row // row_of_pair.shape[-1])


def _fill_rows_fwd(x, pair_of_row, row_of_pair):
    return fill_rows(x, pair_of_row, row_of_pair), (pair_of_row, row_of_pair)


def _fill_rows_bwd(tables, gradient):
    return _sum_choices(gradient, tables[1], None).astype(gradient.dtype), *map(no_gradient, tables)


@jax.custom_vjp
def combine_rows(rows: Array, weights: Array, pair_of_row: Array, row_of_pair: Array) -> Array:
    """rows [R,D], weights [S,K] float32 → [S,D] float32, each token's weighted sum; nothing of pairs not kept."""
    del pair_of_row
    return _sum_choices(rows, row_of_pair, weights)


def _combine_rows_fwd(rows, weights, pair_of_row, row_of_pair):
    return combine_rows(rows, weights, pair_of_row, row_of_pair), (rows, weights, pair_of_row, row_of_pair)


def _combine_rows_bwd(residuals, gradient):
    rows, weights, pair_of_row, row_of_pair = residuals
    scale = weights.reshape(-1).at[pair_of_row].get(mode="fill", fill_value=0)
    d_rows = (take_rows(gradient, pair_of_row // weights.shape[-1]) * scale[:, None]).astype(rows.dtype)
    columns = [jnp.sum(gradient * take_rows(rows, index), axis=-1) for index in row_of_pair.T]
    return d_rows, jnp.stack(columns, axis=-1), no_gradient(pair_of_row), no_gradient(row_of_pair)


def _sum_choices(rows: Array, row_of_pair: Array, weights: Array | None) -> Array:
    """[R,D], [S,K] → [S,D] float32. One choice at a time: each is a gather fused with its product and sum, and no
    [S,K,D] is ever written."""
    total = None
    for choice, index in enumerate(row_of_pair.T):
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
