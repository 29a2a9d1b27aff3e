"""Grouped FFN: rows sorted by expert, each through its expert's matrices, with static shapes and any group sizes.

In: rows [R,D] in which expert e's are the ``sizes[e]`` from ``starts[e]`` on; rows of no expert cost nothing. Out: rows
of the same layout. Nothing here knows of tokens or gates. There is one switch, :func:`in_chunks`: ``lax.ragged_dot``
where the hardware has it, and on CPU, where XLA makes of it a dense matmul with E times the work, a loop over chunks.

Letters: R rows, E experts, D model dim, F hidden dim.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.experimental.layout import Layout, with_layout_constraint
from jax.experimental.xla_metadata import set_xla_metadata

#: Rows in a tile of ``lax.ragged_dot``'s kernel on TPUs, if R is a multiple of it. With 8200 rows the tile has 8, and
#: with 100, which 8 does not divide, there is no kernel but E times the work (libtpu 0.0.50.1).
_TILE = 128
#: Tiles (rows, K, N) of that kernel where groups are large, by the first words of the device kind, the first that fits.
#: XLA's own choices read rows or matrices from memory so often that some kernels would take two to seven times as long
#: as their FLOPs at peak; these need as long, on v6e a quarter more, and the vector memory that XLA allows by default
#: (docs/performance.md has the table).
_TILES = {
    "TPU v2": None,  # their matrix units have no kernel for bfloat16 that Mosaic knows
    "TPU v3": None,
    "TPU v6": (1024, 1024, 1024),
    "TPU7": (512, 1024, 1024),
    "TPU": (512, 1024, 512),
}

#: (rows [R,D], matrices) → whatever the backward pass needs; matrices of all experts, or of one within a chunk
First = Callable[[Array, Any, Callable[[Array, Array], Array]], Any]
#: (what First returned, matrices) → rows [R,D]
Second = Callable[[Any, Any, Callable[[Array, Array], Array]], Array]


def in_chunks() -> bool:
    """Whether the program being traced is for CPUs: by the mesh in context, which may be of hardware that is not here,
    otherwise by what is."""
    return _device_kind().lower() == "cpu"


def _device_kind() -> str:
    device = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
    return jax.devices()[0].device_kind if device is None else device.device_kind


@dataclasses.dataclass(frozen=True)
class Chunks:
    """The static sizes of the pieces that groups are worked off in; without :func:`in_chunks` none, and no padding.

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


def chunks(num_rows: int, num_groups: int) -> Chunks:
    """For R rows in E groups."""
    if not in_chunks():
        return Chunks(())
    mean = num_rows / num_groups
    # Of the mean load: 1/8 apart up to its half, then 1/16, and in the middle, where most groups are, 1/32.
    shares = [*np.arange(0, 1 / 2, 1 / 8), *np.arange(1 / 2, 25 / 16, 1 / 16), *np.arange(7 / 8, 9 / 8, 1 / 32)]
    step = 5 if mean >= 64 else 15  # XLA's matmul takes five rows at a time; where rows are few, code costs more
    return Chunks(tuple(sorted({max(15, math.ceil(mean * share / step) * step) for share in shares})))


def grouped_ffn(
    first: First,
    second: Second | None,
    rows: Array,
    into: Any,
    out_of: Any,
    starts: Array,
    sizes: Array,
    pieces: Chunks,
) -> Any:
    """second(first(rows)), every group with its expert's matrices.

    Args:
        first: static; rows → hidden activations before the nonlinearity.
        second: static; those → rows. None: stop before it.
        rows: [R,D]; zero where :meth:`Chunks.padded_sizes` made room.
        into: matrices of first, [E,·,·] each.
        out_of: matrices of second, [E,·,·] each.
        starts: [E] int32, ascending; without :func:`in_chunks` the groups must touch.
        sizes: [E] int32, as :meth:`Chunks.padded_sizes` returned them.
        pieces: static, those that padded them.
    """
    if pieces.sizes:
        return _chunked(first, second, pieces, rows, into, out_of, starts, sizes)
    matmul = _grouped_matmul(sizes)
    hidden = first(rows, into, matmul)
    return hidden if second is None else second(hidden, out_of, matmul)


def whole_tiles(num_rows: int) -> int:
    """R rounded up to what kernels of accelerators like."""
    return num_rows if in_chunks() else math.ceil(num_rows / _TILE) * _TILE


def _grouped_matmul(sizes: Array) -> Callable[[Array, Array], Array]:
    """rows [R,D], matrices [E,D,F] → [R,F]; what comes out for rows of no group is undefined."""
    return lambda rows, matrices: _ragged_dot(rows, matrices, sizes)


def _tiles(rows: Array, num_groups: int) -> tuple[int, int, int] | None:
    """An entry of :data:`_TILES`, where groups have at least four of its tiles of rows; None: what XLA chooses."""
    tiles = next((tiles for name, tiles in _TILES.items() if _device_kind().startswith(name)), None)
    if tiles is None or rows.dtype != jnp.bfloat16:
        return None
    tile_rows = math.gcd(rows.shape[0], tiles[0])
    few = tile_rows <= _TILE or rows.shape[0] < 4 * num_groups * tile_rows
    return None if few else (tile_rows, *tiles[1:])


def _named(tiles: tuple[int, int, int] | None) -> contextlib.AbstractContextManager[Any]:
    """The kernels of what is traced within have these tiles, and say so to :mod:`moe.pods.hlo`."""
    return set_xla_metadata(ragged_dot_tiling=",".join(map(str, tiles))) if tiles else contextlib.nullcontext()


@jax.custom_vjp
def _ragged_dot(rows: Array, matrices: Array, sizes: Array) -> Array:
    with _named(_tiles(rows, matrices.shape[0])):
        return lax.ragged_dot(rows, matrices, sizes, preferred_element_type=rows.dtype)


def _ragged_dot_fwd(rows, matrices, sizes):
    return _ragged_dot(rows, matrices, sizes), (rows, matrices, sizes)


def _ragged_dot_bwd(residuals, gradient):
    rows, matrices, sizes = residuals
    tiles = _tiles(rows, matrices.shape[0])
    with _named(tiles):
        d_matrices = lax.ragged_dot_general(
            rows, gradient, sizes, _ROWS_CONTRACTED, preferred_element_type=matrices.dtype
        )
        # ragged_dot's kernel takes matrices in one order alone, and would get a transposed copy; megablox's takes both.
        if tiles:
            # Not everybody needs Pallas.
            from jax.experimental.pallas.ops.tpu.megablox.gmm import gmm as megablox

            d_rows = megablox(gradient, matrices, sizes, rows.dtype, tiles, transpose_rhs=True)
        else:
            d_rows = lax.ragged_dot(gradient, matrices.swapaxes(1, 2), sizes, preferred_element_type=rows.dtype)
    return d_rows, d_matrices, np.zeros(sizes.shape, jax.dtypes.float0)


_ROWS_CONTRACTED = lax.RaggedDotDimensionNumbers(
    dot_dimension_numbers=(((0,), (0,)), ((), ())), lhs_ragged_dimensions=[0], rhs_group_dimensions=[]
)
_ragged_dot.defvjp(_ragged_dot_fwd, _ragged_dot_bwd)


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
def _chunked(first, second, pieces, rows, into, out_of, starts, sizes):
    return _chunked_fwd(first, second, pieces, rows, into, out_of, starts, sizes)[0]


def _chunked_fwd(first, second, pieces, rows, into, out_of, starts, sizes):
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


def _chunked_bwd(first, second, pieces, residuals, gradient):
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


_chunked.defvjp(_chunked_fwd, _chunked_bwd)
