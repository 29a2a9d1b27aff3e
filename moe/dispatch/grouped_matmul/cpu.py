"""Grouped FFN as loops over row blocks, for CPUs, where XLA turns ``lax.ragged_dot`` into a dense matmul with E times
the work.

There is one loop for each block size: its trip count depends on the data, its shapes do not, and its carried buffers
are updated in place.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.experimental.layout import Layout, with_layout_constraint

from moe.dispatch.grouped_matmul.row_blocks import RowBlocks

#: (rows [R,D], matrices, matmul) → hidden activations before the nonlinearity, a pytree of [R,F]. Matrices are of all
#: experts for a grouped matmul, and of one expert within a row block.
FirstStage = Callable[[Array, Any, Callable[[Array, Array], Array]], Any]

#: (hidden activations, matrices, matmul) → rows [R,D].
SecondStage = Callable[[Any, Any, Callable[[Array, Array], Array]], Array]


@jax.custom_vjp
def _matmul(rows: Array, matrix: Array) -> Array:
    """Rows [R,D] of one expert times its matrix [D,F]."""
    return rows @ matrix


def _matmul_bwd(residuals, gradient):
    rows, matrix = residuals
    # XLA's CPU folds a transposition into the matmul, whose kernel for a transposed left operand takes a tenth longer;
    # in bfloat16 it has none and uses float32 at half the speed. A requested layout is not folded: [R,D] → [D,R] is
    # written out. Without the barrier the computation of the rows is fused into that and runs column by column.
    left = with_layout_constraint(lax.optimization_barrier(rows).T, Layout(major_to_minor=(0, 1)))
    return lax.dot_general(gradient, matrix, (((1,), (1,)), ((), ()))), left @ gradient


_matmul.defvjp(lambda rows, matrix: (_matmul(rows, matrix), (rows, matrix)), _matmul_bwd)


def _for_each_block(
    row_blocks: RowBlocks, starts: Array, sizes: Array, num_rows: int, carry: Any, body: Callable[..., Any]
) -> Any:
    """Runs body(carry, expert, start, size, is_first) over all blocks; size and is_first (of its expert) are static."""
    largest, num_groups = row_blocks.sizes[-1], sizes.shape[0]
    rest = row_blocks.first_block(sizes)
    # Experts sorted by the size of their first block: each one's rank, then the inverse permutation.
    index = jnp.arange(num_groups, dtype=jnp.int32)
    before = (rest < rest[:, None]) | ((rest == rest[:, None]) & (index < index[:, None]))
    order = jnp.zeros_like(index).at[jnp.sum(before, axis=1)].set(index, unique_indices=True)
    first_starts = starts[order]
    ladder = np.asarray((0, *row_blocks.sizes), np.int32)
    up_to = jnp.sum(rest <= ladder[:, None], axis=1, dtype=jnp.int32)  # experts with first blocks of at most each size
    for number, size in enumerate(row_blocks.sizes):
        if size > num_rows:  # no group is as large
            break

        def run(i: Array, carry: Any, size: int = size) -> Any:
            return body(carry, _at(order, i), _at(first_starts, i), size, True)

        carry = lax.fori_loop(up_to[number], up_to[number + 1], run, carry)
    if num_rows <= largest:
        return carry
    further = (sizes - rest) // largest
    ends = jnp.cumsum(further)
    step = jnp.arange(num_rows // largest, dtype=jnp.int32)
    expert = jnp.minimum(jnp.sum(step[:, None] >= ends, axis=1), num_groups - 1)
    start = (starts + rest)[expert] + (step - (ends - further)[expert]) * largest
    return lax.fori_loop(
        0, ends[-1], lambda i, carry: body(carry, _at(expert, i), _at(start, i), largest, False), carry
    )


# No index is negative; saying so saves the arithmetic that would wrap it, in hundreds of small programs to compile.
_slice = functools.partial(lax.dynamic_slice_in_dim, allow_negative_indices=False)
_index = functools.partial(lax.dynamic_index_in_dim, keepdims=False, allow_negative_indices=False)
_update_slice = functools.partial(lax.dynamic_update_slice_in_dim, axis=0, allow_negative_indices=False)
_update_index = functools.partial(lax.dynamic_update_index_in_dim, axis=0, allow_negative_indices=False)


def _at(tree: Any, index: Array) -> Any:
    return jax.tree.map(lambda array: _index(array, index), tree)


def _rows_at(tree: Any, start: Array, size: int) -> Any:
    return jax.tree.map(lambda array: _slice(array, start, size), tree)


def _set_rows(tree: Any, start: Array, rows: Any) -> Any:
    return jax.tree.map(lambda array, new: _update_slice(array, new, start), tree, rows)


def _unwritten(tree: Any, sizes: Array, dtype: Any = None) -> Any:
    """Uninitialised buffers of these shapes, for blocks to be written to.

    XLA's CPU offers none, and writing zeros first took a twentieth of shape B's time in scripts/bench_moe.py. JAX's
    foreign function "dce_sink" does nothing, so its result keeps whatever the memory holds. The argument differs for
    every buffer and layer: equal calls would be merged into one, whose result XLA then copies.
    """
    leaves, treedef = jax.tree.flatten(tree)

    def buffer(i: int, leaf: Any) -> Array:
        result = jax.ShapeDtypeStruct(leaf.shape, dtype or leaf.dtype)
        return jax.ffi.ffi_call("dce_sink", result, vmap_method="broadcast_all")(sizes[0] + i)

    return treedef.unflatten([buffer(i, leaf) for i, leaf in enumerate(leaves)])


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def grouped_ffn(first, second, row_blocks, rows, first_matrices, second_matrices, starts, sizes):
    """:func:`moe.dispatch.grouped_matmul.grouped_ffn.grouped_ffn`, both stages of a block at once."""
    return _grouped_ffn_fwd(first, second, row_blocks, rows, first_matrices, second_matrices, starts, sizes)[0]


@functools.partial(jax.jit, static_argnums=(0, 1, 2), inline=True)
def _grouped_ffn_fwd(first, second, row_blocks, rows, first_matrices, second_matrices, starts, sizes):
    one = functools.partial(jax.tree.map, lambda array: jax.ShapeDtypeStruct(array.shape[1:], array.dtype))
    hidden = jax.eval_shape(lambda rows, matrices: first(rows, matrices, _matmul), rows, one(first_matrices))
    outputs = () if second is None else rows

    def body(carry, expert, start, size, _):
        hidden, outputs = carry
        new = first(_rows_at(rows, start, size), _at(first_matrices, expert), jnp.matmul)
        if second is not None:
            outputs = _set_rows(outputs, start, second(new, _at(second_matrices, expert), jnp.matmul))
        return _set_rows(hidden, start, new), outputs

    hidden, outputs = _for_each_block(
        row_blocks, starts, sizes, rows.shape[0], _unwritten((hidden, outputs), sizes), body
    )
    kept = () if second is None else hidden
    return hidden if second is None else outputs, (rows, kept, first_matrices, second_matrices, starts, sizes)


def _grouped_ffn_bwd(first, second, row_blocks, residuals, gradient):
    """Gradients of both stages in one pass, so that a block's hidden gradients stay in the cache."""
    rows, hidden, first_matrices, second_matrices, starts, sizes = residuals

    def body(carry, expert, start, size, is_first):
        # The gradient of a block's outputs is read once; that of its rows, of the same shape, overwrites it.
        d_rows, d_first, d_second = carry
        d_hidden = _rows_at(gradient if second is None else d_rows, start, size)
        if second is not None:
            _, backward = jax.vjp(
                lambda hidden, matrices: second(hidden, matrices, _matmul),
                _rows_at(hidden, start, size),
                _at(second_matrices, expert),
            )
            d_hidden, new = backward(d_hidden)
            d_second = _accumulate(d_second, expert, new, is_first)
        _, backward = jax.vjp(
            lambda rows, matrices: first(rows, matrices, _matmul),
            _rows_at(rows, start, size),
            _at(first_matrices, expert),
        )
        new_rows, new = backward(d_hidden)
        return (
            _set_rows(d_rows, start, new_rows),
            _accumulate(d_first, expert, new, is_first),
            d_second,
        )

    d_rows = _unwritten(rows, sizes) if second is None else gradient
    carry = (d_rows, *_unwritten((first_matrices, second_matrices), sizes, jnp.float32))
    d_rows, d_first, d_second = _for_each_block(row_blocks, starts, sizes, rows.shape[0], carry, body)
    d_first, d_second = _zero_unused((d_first, d_second), sizes)
    d_first, d_second = jax.tree.map(
        lambda new, old: new.astype(old.dtype), (d_first, d_second), (first_matrices, second_matrices)
    )
    none = np.zeros(sizes.shape, jax.dtypes.float0)
    return d_rows, d_first, d_second, none, none


def _accumulate(sums: Any, expert: Array, new: Any, is_first: bool) -> Any:
    """Adds a block's gradient of its expert's matrices; the first block of an expert overwrites the buffer."""

    def accumulate(total: Array, new: Array) -> Array:
        new = new.astype(total.dtype)
        if not is_first:
            new = new + _index(total, expert)
        return _update_index(total, new, expert)

    return jax.tree.map(accumulate, sums, new)


def _zero_unused(sums: Any, sizes: Array) -> Any:
    """Writes zeros as the gradients [E,·,·] of experts without rows, which no block has written."""
    (unused,) = jnp.nonzero(sizes == 0, size=sizes.shape[0])

    def put(i: Array, sums: Any) -> Any:
        return jax.tree.map(lambda total: _update_index(total, jnp.zeros(total.shape[1:]), _at(unused, i)), sums)

    return lax.fori_loop(0, jnp.sum(sizes == 0), put, sums)


grouped_ffn.defvjp(_grouped_ffn_fwd, _grouped_ffn_bwd)
