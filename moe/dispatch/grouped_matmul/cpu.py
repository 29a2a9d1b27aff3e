"""Grouped matmul as a loop over blocks of rows, for CPUs."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.experimental.layout import Layout, with_layout_constraint

#: (rows [R,D], matrices) → whatever the backward pass needs; matrices of all experts, or of one within a chunk
First = Callable[[Array, Any, Callable[[Array, Array], Array]], Any]


#: (what First returned, matrices) → rows [R,D]
Second = Callable[[Any, Any, Callable[[Array, Array], Array]], Array]


@dataclasses.dataclass(frozen=True)
class Chunks:
    """The static sizes of the pieces that groups are worked off in; without :func:`moe.parallel.target.is_cpu` none, and no padding.

    A group's first chunk is its size rounded up to one of them, and every further one is the largest: an expert's
    matrices are read, and their gradients written, about once. The sizes lie around the mean load, where most are.
    """

    sizes: tuple[int, ...]

    def padded_sizes(self, sizes: Array) -> Array:
        """Rows to set aside for groups of these sizes, [E] int32; the surplus must be zero."""
        if not self.sizes:
            return sizes
        first = self.first(sizes)
        ladder = jnp.asarray((0, *self.sizes), jnp.int32)
        return sizes - first + ladder[jnp.sum(first[:, None] > ladder, axis=1)]

    def first(self, sizes: Array) -> Array:
        """[E] rows left for the first chunk when all further ones are of the largest size."""
        return jnp.where(sizes > 0, (sizes - 1) % self.sizes[-1] + 1, 0)

    def total(self, num_rows: int, num_groups: int) -> int:
        """The most that :meth:`padded_sizes` of R rows in E groups can sum to."""
        surplus = widest = smaller = 0
        for size in self.sizes:
            if size - smaller - 1 > widest:  # only groups of more than `smaller` rows can waste so many
                surplus += (size - smaller - 1 - widest) * min(num_groups, num_rows // (smaller + 1))
                widest = size - smaller - 1
            smaller = size
        return num_rows + surplus


# The loop over chunks. One while loop for each size of chunk: its trip count depends on the data, its shapes do not,
# and its carried buffers are updated in place.


@jax.custom_vjp
def _matmul(rows: Array, matrix: Array) -> Array:
    """[N,D] · [D,F] → [N,F], one expert's."""
    return rows @ matrix


def _matmul_bwd(residuals, gradient):
    rows, matrix = residuals
    # XLA's CPU folds a transposition into the matmul: its kernel for a transposed left operand takes a tenth longer,
    # and in bfloat16 there is none, but float32 at half the speed. A layout that is asked for is no fold: [N,D] →
    # [D,N], written out; behind a barrier, as else what computes the rows is fused into it and runs column by column.
    left = with_layout_constraint(lax.optimization_barrier(rows).T, Layout(major_to_minor=(0, 1)))
    return lax.dot_general(gradient, matrix, (((1,), (1,)), ((), ()))), left @ gradient


_matmul.defvjp(lambda rows, matrix: (_matmul(rows, matrix), (rows, matrix)), _matmul_bwd)


def _for_each_chunk(
    pieces: Chunks, starts: Array, sizes: Array, num_rows: int, carry: Any, body: Callable[..., Any]
) -> Any:
    """Runs body(carry, expert, start, N, whether the expert's first) over all chunks; N is static."""
    most, num_groups = pieces.sizes[-1], sizes.shape[0]
    rest = pieces.first(sizes)
    # Experts by the size of their first chunk: how many come before each, then the inverse of that.
    index = jnp.arange(num_groups, dtype=jnp.int32)
    before = (rest < rest[:, None]) | ((rest == rest[:, None]) & (index < index[:, None]))
    order = jnp.zeros_like(index).at[jnp.sum(before, axis=1)].set(index, unique_indices=True)
    for size in pieces.sizes:
        if size > num_rows:  # no group has so many
            break
        begin, end = jnp.sum(rest < size, dtype=jnp.int32), jnp.sum(rest <= size, dtype=jnp.int32)

        def run(i: Array, carry: Any, size: int = size) -> Any:
            return body(carry, order[i], starts[order[i]], size, True)

        carry = lax.fori_loop(begin, end, run, carry)
    if num_rows <= most:
        return carry
    further = (sizes - rest) // most
    ends = jnp.cumsum(further)
    step = jnp.arange(num_rows // most, dtype=jnp.int32)
    expert = jnp.minimum(jnp.sum(step[:, None] >= ends, axis=1), num_groups - 1)
    start = (starts + rest)[expert] + (step - (ends - further)[expert]) * most
    return lax.fori_loop(0, ends[-1], lambda i, carry: body(carry, expert[i], start[i], most, False), carry)


def _at(tree: Any, index: Array) -> Any:
    return jax.tree.map(lambda array: lax.dynamic_index_in_dim(array, index, keepdims=False), tree)


def _rows_at(tree: Any, start: Array, size: int) -> Any:
    return jax.tree.map(lambda array: lax.dynamic_slice_in_dim(array, start, size), tree)


def _set_rows(tree: Any, start: Array, rows: Any) -> Any:
    return jax.tree.map(lambda array, new: lax.dynamic_update_slice_in_dim(array, new, start, 0), tree, rows)


def _unwritten(tree: Any, sizes: Array, dtype: Any = None) -> Any:
    """Buffers to write chunks to, holding whatever is there. XLA's CPU has no such thing, and zeros, which chunks then
    overwrite, took a twentieth of shape B's time. JAX's target for "used, do not remove" does nothing: also not to a
    result, if it is given one. Its argument, an own number from each layer's load, keeps XLA from making one call of
    equal ones, whose result it would then copy."""
    leaves, treedef = jax.tree.flatten(tree)

    def buffer(i: int, leaf: Any) -> Array:
        result = jax.ShapeDtypeStruct(leaf.shape, dtype or leaf.dtype)
        return jax.ffi.ffi_call("dce_sink", result, vmap_method="broadcast_all")(sizes[0] + i)

    return treedef.unflatten([buffer(i, leaf) for i, leaf in enumerate(leaves)])


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def grouped_ffn_in_blocks(first, second, pieces, rows, into, out_of, starts, sizes):
    """Grouped FFN as loops over row blocks, both stages per block."""
    return _grouped_ffn_in_blocks_fwd(first, second, pieces, rows, into, out_of, starts, sizes)[0]


def _grouped_ffn_in_blocks_fwd(first, second, pieces, rows, into, out_of, starts, sizes):
    one = functools.partial(jax.tree.map, lambda array: jax.ShapeDtypeStruct(array.shape[1:], array.dtype))
    hidden = jax.eval_shape(lambda rows, matrices: first(rows, matrices, _matmul), rows, one(into))
    outputs = () if second is None else rows

    def body(carry, expert, start, size, _):
        hidden, outputs = carry
        new = first(_rows_at(rows, start, size), _at(into, expert), _matmul)
        if second is not None:
            outputs = _set_rows(outputs, start, second(new, _at(out_of, expert), _matmul))
        return _set_rows(hidden, start, new), outputs

    hidden, outputs = _for_each_chunk(pieces, starts, sizes, rows.shape[0], _unwritten((hidden, outputs), sizes), body)
    kept = () if second is None else hidden
    return hidden if second is None else outputs, (rows, kept, into, out_of, starts, sizes)


def _grouped_ffn_in_blocks_bwd(first, second, pieces, residuals, gradient):
    """Both stages back in one pass: of a chunk's hidden gradients nothing leaves the cache."""
    rows, hidden, into, out_of, starts, sizes = residuals

    def body(carry, expert, start, size, fresh):
        # The gradient of a chunk's outputs is read once, and that of its rows, of the same shape, takes its place.
        d_rows, d_into, d_out_of = carry
        d_hidden = _rows_at(gradient if second is None else d_rows, start, size)
        if second is not None:
            _, backward = jax.vjp(
                lambda hidden, matrices: second(hidden, matrices, _matmul),
                _rows_at(hidden, start, size),
                _at(out_of, expert),
            )
            d_hidden, new = backward(d_hidden)
            d_out_of = _accumulate(d_out_of, expert, new, fresh)
        _, backward = jax.vjp(
            lambda rows, matrices: first(rows, matrices, _matmul), _rows_at(rows, start, size), _at(into, expert)
        )
        new_rows, new = backward(d_hidden)
        return _set_rows(d_rows, start, new_rows), _accumulate(d_into, expert, new, fresh), d_out_of

    d_rows = _unwritten(rows, sizes) if second is None else gradient
    carry = (d_rows, *_unwritten((into, out_of), sizes, jnp.float32))
    d_rows, d_into, d_out_of = _for_each_chunk(pieces, starts, sizes, rows.shape[0], carry, body)
    d_into, d_out_of = _zero_unused((d_into, d_out_of), sizes)
    d_into, d_out_of = jax.tree.map(lambda new, old: new.astype(old.dtype), (d_into, d_out_of), (into, out_of))
    none = np.zeros(sizes.shape, jax.dtypes.float0)
    return d_rows, d_into, d_out_of, none, none


def _accumulate(sums: Any, expert: Array, new: Any, fresh: bool) -> Any:
    """Adds a chunk's gradient of its expert's matrices, or, for the first chunk, puts it there unread."""

    def accumulate(total: Array, new: Array) -> Array:
        new = new.astype(total.dtype)
        if not fresh:
            new = new + lax.dynamic_index_in_dim(total, expert, keepdims=False)
        return lax.dynamic_update_index_in_dim(total, new, expert, 0)

    return jax.tree.map(accumulate, sums, new)


def _zero_unused(sums: Any, sizes: Array) -> Any:
    """The gradients [E,·,·] of experts without rows, which no chunk has written."""
    (unused,) = jnp.nonzero(sizes == 0, size=sizes.shape[0])

    def put(i: Array, sums: Any) -> Any:
        return jax.tree.map(
            lambda total: lax.dynamic_update_index_in_dim(total, jnp.zeros(total.shape[1:]), unused[i], 0), sums
        )

    return lax.fori_loop(0, jnp.sum(sizes == 0), put, sums)


grouped_ffn_in_blocks.defvjp(_grouped_ffn_in_blocks_fwd, _grouped_ffn_in_blocks_bwd)
