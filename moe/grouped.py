"""Grouped matmul: rows sorted by expert, each times its expert's matrix, with static shapes and any group sizes.

In: rows [R,D] of which the first ``sum(group_sizes)`` are expert 0's, then expert 1's, and so on; the rest is padding.
Out: [R,F]. Nothing here knows of tokens or gates.

Letters: R rows, E experts, D and F the dims of a matrix, N rows of one block.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

#: Rows of one step of the CPU loop: few enough that an expert's last, partly empty block wastes little, many enough
#: that the matmul pays for reading the expert's matrix.
BLOCK = 128


@jax.custom_vjp
def grouped_matmul(rows: Array, weights: Array, group_sizes: Array) -> Array:
    """rows [R,D] · weights [E,D,F] → [R,F], row r with the matrix of its group; 0 beyond ``sum(group_sizes)``.

    Args:
        rows: [R,D], sorted by group.
        weights: [E,D,F] of the same dtype.
        group_sizes: [E] int32, summing to at most R.
    """
    return _rows_by_weights(rows, weights, group_sizes, transpose=False)


def _forward(rows, weights, group_sizes):
    return grouped_matmul(rows, weights, group_sizes), (rows, weights, group_sizes)


def _backward(residuals, gradient):
    rows, weights, group_sizes = residuals
    d_rows = _rows_by_weights(gradient, weights, group_sizes, transpose=True)
    d_weights = _rows_by_rows(rows, gradient, group_sizes)
    return d_rows, d_weights, np.zeros(group_sizes.shape, jax.dtypes.float0)


grouped_matmul.defvjp(_forward, _backward)


def _rows_by_weights(rows: Array, weights: Array, group_sizes: Array, *, transpose: bool) -> Array:
    """[R,D] · [E,D,F] → [R,F]; with ``transpose`` [R,F] · [E,D,F] → [R,D]."""

    def ragged(rows: Array, weights: Array, group_sizes: Array) -> Array:
        weights = weights.swapaxes(1, 2) if transpose else weights
        return lax.ragged_dot(rows, weights, group_sizes, preferred_element_type=rows.dtype)

    return lax.platform_dependent(
        rows,
        weights,
        group_sizes,
        cpu=functools.partial(_rows_by_weights_in_blocks, transpose=transpose),
        default=ragged,
    )


def _rows_by_rows(rows: Array, gradient: Array, group_sizes: Array) -> Array:
    """[R,D]ᵀ · [R,F] within each group → [E,D,F]."""

    def ragged(rows: Array, gradient: Array, group_sizes: Array) -> Array:
        numbers = lax.RaggedDotDimensionNumbers(
            dot_dimension_numbers=(((0,), (0,)), ((), ())), lhs_ragged_dimensions=[0], rhs_group_dimensions=[]
        )
        return lax.ragged_dot_general(rows, gradient, group_sizes, numbers, preferred_element_type=rows.dtype)

    return lax.platform_dependent(rows, gradient, group_sizes, cpu=_rows_by_rows_in_blocks, default=ragged)


# On CPU lax.ragged_dot is a masked dense matmul with E times the work. One loop over blocks of N rows does only the
# work there is: its trip count depends on the data, its shapes do not.


def _blocks(group_sizes: Array, num_rows: int) -> tuple[int, Array, Array, Array, Array]:
    """N, how many blocks, and for each its expert, its first row and its number of rows."""
    size = min(BLOCK, num_rows)
    blocks = -(-group_sizes // size)
    block_ends = jnp.cumsum(blocks)
    index = jnp.arange(num_rows // size + group_sizes.shape[0], dtype=jnp.int32)
    expert = jnp.sum(index[:, None] >= block_ends, axis=1, dtype=jnp.int32)
    ends = jnp.cumsum(group_sizes)
    clipped = jnp.minimum(expert, group_sizes.shape[0] - 1)
    start = (ends - group_sizes)[clipped] + (index - (block_ends - blocks)[clipped]) * size
    return size, block_ends[-1], expert, start, jnp.minimum(ends[clipped] - start, size)


def _block_at(rows: Array, start: Array, count: Array, size: int) -> tuple[Array, Array, Array]:
    """A window of N rows that holds rows [start, start+count), where it begins, and a mask [N,1] of those rows."""
    begin = jnp.minimum(start, rows.shape[0] - size)
    row = begin + jnp.arange(size)
    inside = (row >= start) & (row < start + count)
    return lax.dynamic_slice_in_dim(rows, begin, size), begin, inside[:, None]


def _rows_by_weights_in_blocks(rows: Array, weights: Array, group_sizes: Array, *, transpose: bool) -> Array:
    size, number, expert, start, count = _blocks(group_sizes, rows.shape[0])

    def body(i: Array, out: Array) -> Array:
        block, begin, inside = _block_at(rows, start[i], count[i], size)
        matrix = lax.dynamic_index_in_dim(weights, expert[i], keepdims=False)
        product = lax.dot_general(block, matrix, (((1,), (1 if transpose else 0,)), ((), ())))
        old = lax.dynamic_slice_in_dim(out, begin, size)
        return lax.dynamic_update_slice_in_dim(out, jnp.where(inside, product, old), begin, 0)

    out = jnp.zeros((rows.shape[0], weights.shape[1 if transpose else 2]), rows.dtype)
    return lax.fori_loop(0, number, body, out)


def _rows_by_rows_in_blocks(rows: Array, gradient: Array, group_sizes: Array) -> Array:
    size, number, expert, start, count = _blocks(group_sizes, rows.shape[0])

    def body(i: Array, out: Array) -> Array:
        block, _, inside = _block_at(rows, start[i], count[i], size)
        other, _, _ = _block_at(gradient, start[i], count[i], size)
        product = lax.dot_general(
            jnp.where(inside, block, 0), other, (((0,), (0,)), ((), ())), preferred_element_type=jnp.float32
        )
        old = lax.dynamic_index_in_dim(out, expert[i], keepdims=False)
        return lax.dynamic_update_index_in_dim(out, old + product, expert[i], 0)

    out = jnp.zeros((group_sizes.shape[0], rows.shape[1], gradient.shape[1]), jnp.float32)
    return lax.fori_loop(0, number, body, out).astype(rows.dtype)
