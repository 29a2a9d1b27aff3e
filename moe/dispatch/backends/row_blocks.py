"""Grouped FFN as loops over row blocks, by plain matmuls: for groups of any size on CPUs, for large ones on GPUs.

There is one loop for each block size: its trip count depends on the data, its shapes do not, and its carried buffers
are updated in place. A block may extend beyond its group: rows outside are read as zeros and not overwritten.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Float, Int

from moe.dispatch import quantized
from moe.dispatch.ffn import ExpertDropout, ExpertWeights, out_of_hidden
from moe.parallel import target
from moe.parallel.parameters import matmul
from moe.parallel.partition_specs import HIDDEN

#: First word of the loops' names in programs.
SCOPE = "blocks"


@dataclasses.dataclass(frozen=True)
class RowBlocks:
    """Static sizes of the blocks of rows that a group is computed in.

    A group has as many blocks of the largest size as it fills, and before them one of the smallest size that holds the
    rest. So an expert's matrices are read, and their gradients written, about once. Sizes lie around the mean load.
    """

    sizes: tuple[int, ...]

    def padded_sizes(self, sizes: Int[Array, " E"]) -> Int[Array, " E"]:
        """Rows of all blocks of each group."""
        first = self.first_block(sizes)
        ladder = jnp.asarray((0, *self.sizes), jnp.int32)
        return sizes - first + ladder[jnp.sum(first[:, None] > ladder, axis=1)]

    def first_block(self, sizes: Int[Array, " E"]) -> Int[Array, " E"]:
        """Rows left for each group's first block when all further ones have the largest size."""
        return jnp.where(sizes > 0, (sizes - 1) % self.sizes[-1] + 1, 0)

    def total_rows(self, num_rows: int, num_groups: int) -> int:
        """The largest sum of :meth:`padded_sizes` of R rows in E groups."""
        surplus = widest = smaller = 0
        for size in self.sizes:
            if size - smaller - 1 > widest:  # only groups of more than `smaller` rows can waste so many
                surplus += (size - smaller - 1 - widest) * min(num_groups, num_rows // (smaller + 1))
                widest = size - smaller - 1
            smaller = size
        return num_rows + surplus


def grouped_ffn(
    row_blocks: RowBlocks,
    rows: Float[Array, "R D"],
    group_sizes: Int[Array, " E"],
    weights: ExpertWeights,
    scale: Float[Array, " R"] | None = None,
) -> Float[Array, "R D"]:
    """:func:`moe.dispatch.backends.grouped_ffn` in these blocks, both halves of a block at once."""
    column = None if scale is None else scale[:, None]
    plain = dataclasses.replace(weights, dropout=None)
    return _grouped_ffn(row_blocks, rows, column, plain, group_sizes, weights.dropout)


# No index is negative; saying so saves the arithmetic that would wrap it, in hundreds of small programs to compile.
_slice = functools.partial(lax.dynamic_slice_in_dim, allow_negative_indices=False)
_index = functools.partial(lax.dynamic_index_in_dim, keepdims=False, allow_negative_indices=False)
_update_slice = functools.partial(lax.dynamic_update_slice_in_dim, axis=0, allow_negative_indices=False)
_update_index = functools.partial(lax.dynamic_update_index_in_dim, axis=0, allow_negative_indices=False)


def _at(tree: Any, index: Array) -> Any:
    return jax.tree.map(lambda array: _index(array, index), tree)


def _unwritten(tree: Any, sizes: Array, dtype: Any = None) -> Any:
    """Uninitialised buffers of these shapes, for blocks to be written to.

    XLA's CPU cannot make them, and writing zeros first took a twentieth of shape B's time in scripts/bench_moe.py.
    JAX's foreign function "dce_sink" does nothing, so its result keeps whatever the memory holds. The argument differs
    for every buffer and layer: equal calls would be merged into one, whose result XLA then copies.
    """
    leaves, treedef = jax.tree.flatten(tree)

    def buffer(i: int, leaf: Any) -> Array:
        result = jax.ShapeDtypeStruct(leaf.shape, dtype or leaf.dtype)
        if target.current().has_unwritten_buffers:
            return lax.empty(result.shape, result.dtype)
        return jax.ffi.ffi_call("dce_sink", result, vmap_method="broadcast_all")(sizes[0] + i)

    return treedef.unflatten([buffer(i, leaf) for i, leaf in enumerate(leaves)])


@dataclasses.dataclass(frozen=True)
class _Block:
    """Rows of one block.

    Attributes:
        expert: number of its group.
        row: first row, in arrays of all rows.
        slot: first row, in buffers that hold all blocks one after the other.
        size: rows, static.
        inside: [size] bool, rows of the group; None: all are.
        is_first: the first block of its group, static.
    """

    expert: Array
    row: Array
    slot: Array
    size: int
    inside: Array | None
    is_first: bool

    def read(self, rows: Array) -> Array:
        """Its rows of an array, zero outside the group."""
        part = _slice(rows, self.row, self.size)
        return part if self.inside is None else jnp.where(self.inside[:, None], part, 0)

    def read_column(self, column: Array | None) -> Array | None:
        """Its rows of a column; None if there is none."""
        return None if column is None else self.read(column)

    def write(self, rows: Array, part: Array) -> Array:
        """Replace its rows of an array, except those outside the group."""
        if self.inside is not None:
            part = jnp.where(self.inside[:, None], part, _slice(rows, self.row, self.size))
        return _update_slice(rows, part, self.row)


def _for_each_block(
    row_blocks: RowBlocks, sizes: Array, num_rows: int, carry: Any, body: Callable[[Any, _Block], Any]
) -> Any:
    """Run body(carry, block) over all blocks."""
    largest, num_groups = row_blocks.sizes[-1], sizes.shape[0]
    starts = jnp.cumsum(sizes) - sizes
    rest = row_blocks.first_block(sizes)
    padded = row_blocks.padded_sizes(sizes)
    slots = jnp.cumsum(padded) - padded
    # Experts sorted by the size of their first block: each one's rank, then the inverse permutation.
    index = jnp.arange(num_groups, dtype=jnp.int32)
    before = (rest < rest[:, None]) | ((rest == rest[:, None]) & (index < index[:, None]))
    order = jnp.zeros_like(index).at[jnp.sum(before, axis=1)].set(index, unique_indices=True)
    in_order = starts[order], slots[order], rest[order]
    ladder = np.asarray((0, *row_blocks.sizes), np.int32)
    up_to = jnp.sum(rest <= ladder[:, None], axis=1, dtype=jnp.int32)  # experts with first blocks of at most each size
    for number, (smaller, size) in enumerate(itertools.pairwise((0, *row_blocks.sizes))):

        def run(i: Array, carry: Any, size: int = size) -> Any:
            start, slot, count = _at(in_order, i)
            row = jnp.minimum(start, num_rows - size)
            position = jnp.arange(size, dtype=jnp.int32) + (row - start)
            inside = (position >= 0) & (position < count)
            return body(carry, _Block(_at(order, i), row, slot, size, inside, True))

        with _scope("first", smaller, size, largest, num_groups, num_rows):
            carry = lax.fori_loop(up_to[number], up_to[number + 1], run, carry)
    if num_rows <= largest:
        return carry
    further = (sizes - rest) // largest
    ends = jnp.cumsum(further)
    step = jnp.arange(num_rows // largest, dtype=jnp.int32)
    expert = jnp.minimum(jnp.sum(step[:, None] >= ends, axis=1), num_groups - 1)
    offset = (step - (ends - further)[expert]) * largest
    row = (starts + rest)[expert] + offset
    slot = (slots + padded - sizes + rest)[expert] + offset

    def run_further(i: Array, carry: Any) -> Any:
        block = _Block(_at(expert, i), _at(row, i), _at(slot, i), largest, None, False)
        return body(carry, block)

    with _scope("further", largest, num_groups, num_rows):
        return lax.fori_loop(0, ends[-1], run_further, carry)


def _scope(kind: str, *numbers: int) -> contextlib.AbstractContextManager[Any]:
    """A name for a loop over blocks, which :func:`balanced_trips` reads."""
    return jax.named_scope("_".join([SCOPE, kind, *map(str, numbers)]))


def balanced_trips(name: str, rows: int | None = None) -> int | None:
    """Trips of a loop over blocks where all groups have one size.

    Args:
        name: of the loop in a traced or compiled program.
        rows: of all groups; each counts one row more than the mean, as the fullest have; None: groups fill the buffer.

    Returns:
        None for any other loop.
    """
    found = re.search(rf"{SCOPE}_(\w+)\)*(?:/while)?$", name)
    if found is None:
        return None
    kind, *numbers = found.group(1).split("_")
    if kind == "unused":
        return 0
    *bounds, largest, num_groups, num_rows = map(int, numbers)
    last = num_rows // num_groups - 1 if rows is None else rows // num_groups
    return num_groups * (bounds[0] <= last % largest < bounds[1] if kind == "first" else last // largest)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _grouped_ffn(row_blocks, rows, scale, weights, sizes, dropout):
    return _grouped_ffn_fwd(row_blocks, rows, scale, weights, sizes, dropout)[0]


@functools.partial(jax.jit, static_argnums=(0,), inline=True)
def _grouped_ffn_fwd(row_blocks, rows, scale, weights, sizes, dropout):
    slots = row_blocks.total_rows(rows.shape[0], sizes.shape[0])
    first, second = _halves(weights)

    def body(carry, block):
        hidden, outputs = carry
        new = first(block.read(rows), _at(weights.into, block.expert))
        down, drop = _at(weights.down, block.expert), _of_block(dropout, block)
        outputs = block.write(outputs, second(new, down, block.read_column(scale), drop))
        if weights.keeps_hidden:
            hidden = jax.tree.map(lambda array, part: _update_slice(array, part, block.slot), hidden, new)
        return hidden, outputs

    of_slots = jax.ShapeDtypeStruct((slots, rows.shape[1]), rows.dtype)
    hidden = jax.eval_shape(first, of_slots, jax.tree.map(lambda array: array[0], weights.into))
    hidden = hidden if weights.keeps_hidden else None
    carry = _unwritten((hidden, rows), sizes)
    hidden, outputs = _for_each_block(row_blocks, sizes, rows.shape[0], carry, body)
    return outputs, (rows, scale, checkpoint_name(hidden, HIDDEN), weights, sizes, dropout)


def _halves(weights: ExpertWeights) -> tuple[Callable[..., Any], Callable[..., Array]]:
    """Both halves of an expert's FFN: (rows, weights of the hidden layer) → hidden; (hidden, down, factors, dropout) →
    rows."""

    def product(rows: Array, matrix: Array) -> Array:
        if weights.quantizes(matrix):
            return quantized.matmul(rows, matrix, weights.precision)
        return matmul(rows, matrix)

    def down_matmul(hidden: Array, down: Array) -> Array:
        return product(hidden, down.T if weights.down_transposed else down)

    def second(hidden: Any, down: Array, scale: Array | None, dropout: ExpertDropout | None) -> Array:
        factors = None if scale is None else scale[:, 0]
        return out_of_hidden(hidden, down, weights.activation, dropout, down_matmul, factors)

    return functools.partial(weights.into_hidden, matmul=product), second


def _grouped_ffn_bwd(row_blocks, residuals, gradient):
    """Gradients of both halves in one pass, so that a block's hidden gradients stay in the cache."""
    rows, scale, hidden, weights, sizes, dropout = residuals
    first, second = _halves(weights)

    def body(carry, block):
        # The gradient of a block's outputs is read once; that of its rows, of the same shape, overwrites it.
        d_rows, d_scale, d_into, d_down = carry
        drop = _of_block(dropout, block)
        of_block, first_backward = jax.vjp(first, block.read(rows), _at(weights.into, block.expert))
        if weights.keeps_hidden:
            of_block = jax.tree.map(lambda array: _slice(array, block.slot, block.size), hidden)
        operands = of_block, _at(weights.down, block.expert), block.read_column(scale)
        _, second_backward = jax.vjp(functools.partial(second, dropout=drop), *operands)
        d_hidden, new_down, new_scale = second_backward(block.read(d_rows))
        new_rows, new_into = first_backward(d_hidden)
        return (
            block.write(d_rows, new_rows),
            None if scale is None else block.write(d_scale, new_scale),
            _accumulate(d_into, new_into, block),
            _accumulate(d_down, new_down, block),
        )

    carry = (gradient, *_unwritten((scale, weights.into, weights.down), sizes, jnp.float32))
    d_rows, d_scale, d_into, d_down = _for_each_block(row_blocks, sizes, rows.shape[0], carry, body)
    (d_matrices, d_biases), d_down = jax.tree.map(
        lambda new, old: new.astype(old.dtype),
        _zero_unused((d_into, d_down), sizes),
        (weights.into, weights.down),
    )
    d_up, d_gate = d_matrices
    d_weights = dataclasses.replace(weights, up=d_up, gate=d_gate, down=d_down, biases=d_biases)
    return d_rows, d_scale, d_weights, None, None


def _of_block(dropout: ExpertDropout | None, block: _Block) -> ExpertDropout | None:
    if dropout is None or dropout.rows is None:
        return None
    return dataclasses.replace(dropout, rows=_slice(dropout.rows, block.row, block.size))


def _accumulate(sums: Any, new: Any, block: _Block) -> Any:
    """Add a block's gradient of its expert's weights; the first block of an expert overwrites the buffer."""

    def accumulate(total: Array, new: Array) -> Array:
        new = new.astype(total.dtype)
        if not block.is_first:
            new = new + _index(total, block.expert)
        return _update_index(total, new, block.expert)

    return jax.tree.map(accumulate, sums, new)


def _zero_unused(sums: Any, sizes: Array) -> Any:
    """Write zeros as the gradients [E,·,·] of experts without rows, which no block has written."""
    (unused,) = jnp.nonzero(sizes == 0, size=sizes.shape[0])

    def put(i: Array, sums: Any) -> Any:
        return jax.tree.map(lambda total: _update_index(total, jnp.zeros(total.shape[1:]), _at(unused, i)), sums)

    with _scope("unused"):
        return lax.fori_loop(0, jnp.sum(sizes == 0), put, sums)


_grouped_ffn.defvjp(_grouped_ffn_fwd, _grouped_ffn_bwd)
