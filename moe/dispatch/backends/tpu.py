"""Grouped FFN by ``lax.ragged_dot``, with tiles for TPUs."""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.experimental.pallas.ops.tpu.megablox.gmm import gmm as megablox_gmm
from jax.experimental.xla_metadata import set_xla_metadata
from jaxtyping import Float, Int

from moe.dispatch import quantized
from moe.dispatch.ffn import ExpertWeights, ffn
from moe.parallel import target

#: Rows in the smallest tile of accelerators' kernels. With R not a multiple of it, TPUs' ``lax.ragged_dot`` uses tiles
#: of 8 rows (8200 rows) or, where 8 does not divide R, a dense matmul with E times the work (libtpu 0.0.50.1).
TILE = 128

#: Seconds that a step of a kernel's grid takes beside its work. With it the count below is closer to 152 published
#: times of such kernels on v5e, v5p, v6e and tpu7x than without (docs/accelerator_code.md).
_STEP_SECONDS = 0.35e-6

#: Bytes of a kernel's vector memory that its tiles leave, and the most that they take: larger ones gain little, and XLA
#: takes a minute to compile them.
_OTHER_MEMORY, _LARGEST_TILES = 4 * 2**20, 28 * 2**20

#: Sides of tiles of rows; K and N are split into equal parts of whole lanes.
_TILE_ROWS = (128, 256, 512, 1024)
_LONGEST_SIDE = 4096

_ROWS_CONTRACTED = lax.RaggedDotDimensionNumbers(
    dot_dimension_numbers=(((0,), (0,)), ((), ())), lhs_ragged_dimensions=[0], rhs_group_dimensions=[]
)


def grouped_ffn(
    rows: Float[Array, "R D"],
    group_sizes: Int[Array, " E"],
    weights: ExpertWeights,
    scale: Float[Array, " R"] | None = None,
) -> Float[Array, "R D"]:
    """:func:`moe.dispatch.backends.grouped_ffn` as grouped matmuls."""

    def matmul(rows: Array, matrices: Array, *, transposed: bool = False) -> Array:
        if weights.quantizes(matrices):
            matrices = matrices.swapaxes(1, 2) if transposed else matrices
            return quantized_matmul(rows, matrices, group_sizes, weights.precision)
        return multiply(rows, matrices, group_sizes, transposed=transposed)

    return ffn(rows, weights.joined(), matmul, scale)


def multiply(rows: Array, matrices: Array, sizes: Int[Array, " E"], *, transposed: bool = False) -> Array:
    """Multiply the rows of each group by its matrix, as :func:`grouped_matmul` does."""
    if matrices.shape[1] == 1 and not transposed:
        return multiply_columns(rows, matrices, sizes)
    return grouped_matmul(rows, matrices, sizes, transposed)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def grouped_matmul(rows: Array, matrices: Array, sizes: Int[Array, " E"], transposed: bool = False) -> Array:
    """Multiply the first sizes[0] rows by matrix 0, the next sizes[1] by matrix 1, and so on; further rows of the
    output are undefined.

    Args:
        rows: [R,D].
        matrices: [E,D,F].
        sizes: rows of each group.
        transposed: the matrices are [E,F,D], of which each is transposed.

    Returns:
        [R,F].
    """
    return _multiply(rows, matrices, sizes, transposed=transposed)


def _multiply(rows: Array, matrices: Array, sizes: Array, *, transposed: bool) -> Array:
    num_groups, left, right = matrices.shape
    tiles = _tiles("rows", rows, (num_groups, right, left) if transposed else matrices.shape)
    with _tiling(tiles):
        # ragged_dot's kernel needs the matrices transposed in memory; megablox's reads them in either order.
        if transposed and tiles:
            return megablox_gmm(rows, matrices, sizes, rows.dtype, tiles, transpose_rhs=True)
        matrices = matrices.swapaxes(1, 2) if transposed else matrices
        return lax.ragged_dot(rows, matrices, sizes, preferred_element_type=rows.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def quantized_matmul(
    rows: Float[Array, "R D"], matrices: Float[Array, "E D F"], sizes: Int[Array, " E"], precision: str
) -> Float[Array, "R F"]:
    """:func:`grouped_matmul` of quantised factors (:mod:`moe.dispatch.quantized`)."""
    quantized.check_target(precision)
    values, scales = quantized.quantize(rows, -1, precision)
    factors, factor_scales = quantized.quantize(matrices, 1, precision)
    sums_dtype = quantized.TYPES[precision][1]
    with _tiling(_tiles("rows", values, matrices.shape, sums_dtype)):
        sums = lax.ragged_dot(values, factors, sizes, preferred_element_type=sums_dtype)
    with jax.default_matmul_precision("highest"):
        of_groups = multiply_columns(jnp.ones_like(scales), factor_scales, sizes)
    return (sums * scales * of_groups).astype(rows.dtype)


def multiply_columns(
    rows: Float[Array, "R 1"], matrices: Float[Array, "E 1 F"], sizes: Int[Array, " E"]
) -> Float[Array, "R F"]:
    """:func:`grouped_matmul` of matrices with one row, such as biases, as a matmul with the one-hot groups of all rows;
    further rows of the output are zero. A kernel would fill a whole tile with that row."""
    ends = jnp.cumsum(sizes)
    index = jnp.arange(rows.shape[0])[:, None]
    groups = (index >= ends - sizes) & (index < ends)  # [R,E]
    product = jnp.where(groups, rows, 0) @ matrices[:, 0]
    # Gradients of further rows may be NaN, and NaN times 0 is NaN.
    return jnp.where(index < ends[-1], product, 0)


def _grouped_matmul_fwd(rows, matrices, sizes, transposed):
    return grouped_matmul(rows, matrices, sizes, transposed), (rows, matrices, sizes)


def _grouped_matmul_bwd(transposed, residuals, gradient):
    rows, matrices, sizes = residuals
    left, right = (gradient, rows) if transposed else (rows, gradient)
    d_matrices = _outer_products(left, right, sizes, matrices)
    d_rows = _multiply(gradient, matrices, sizes, transposed=not transposed)
    return d_rows, d_matrices, np.zeros(sizes.shape, jax.dtypes.float0)


grouped_matmul.defvjp(_grouped_matmul_fwd, _grouped_matmul_bwd)


def _outer_products(rows: Array, gradient: Array, sizes: Array, matrices: Array) -> Array:
    """Transposed rows [R,D] of each group by its gradient rows [R,F] → [E,D,F], the gradient of the matrices."""
    with _tiling(_tiles("weights", rows, matrices.shape)):
        return lax.ragged_dot_general(rows, gradient, sizes, _ROWS_CONTRACTED, preferred_element_type=matrices.dtype)


def _quantized_matmul_fwd(rows, matrices, sizes, precision):
    return quantized_matmul(rows, matrices, sizes, precision), (rows, matrices, sizes)


def _quantized_matmul_bwd(precision, residuals, gradient):
    rows, matrices, sizes = residuals
    d_rows = quantized_matmul(gradient, matrices.swapaxes(1, 2), sizes, precision)
    d_matrices = _outer_products(rows, gradient, sizes, matrices)
    return d_rows, d_matrices, np.zeros(sizes.shape, jax.dtypes.float0)


quantized_matmul.defvjp(_quantized_matmul_fwd, _quantized_matmul_bwd)


Kind = Literal["rows", "weights"]
_Tiles = tuple[int, int, int]


def _tiles(kind: Kind, rows: Array, matrices: tuple[int, ...], result: Any = jnp.bfloat16) -> _Tiles | None:
    """Tiles of a kernel; None: XLA's own choice, for factors of more bytes than bfloat16, v2 and v3 (whose matrix units
    lack its kernel), and rows that are no whole tiles."""
    device = target.current()
    peak, bandwidth = device.peak_flops, device.memory_bandwidth
    memory = min(device.kernel_memory - _OTHER_MEMORY, _LARGEST_TILES)
    item = rows.dtype.itemsize
    if item > _ITEM or rows.shape[0] % TILE or peak is None or bandwidth is None:
        return None
    items = item, jnp.dtype(result).itemsize
    return fastest_tiles(kind, rows.shape[0], matrices, peak * _ITEM / item, bandwidth, memory, items)


@functools.lru_cache
def fastest_tiles(
    kind: Kind,
    num_rows: int,
    matrices: tuple[int, ...],
    peak: float,
    bandwidth: float,
    memory: int,
    items: tuple[int, int] = (2, 2),
) -> _Tiles:
    """Tiles (rows, K, N) for which a kernel's count of its work takes least time, of those that fit its memory.

    XLA's own tiles read rows or matrices from memory so often that some kernels would take two to seven times as long
    as their FLOPs at peak.

    Args:
        kind: "rows": rows [R,K] times matrices; "weights": gradients of these.
        num_rows: R.
        matrices: their shape, [E,K,N].
        peak: FLOP/s.
        bandwidth: of the memory, bytes/s.
        memory: bytes of vector memory that tiles may take.
        items: bytes of a number in the factors and in the result.
    """

    def seconds(tiles: _Tiles) -> float:
        steps, flops, moved = grid_work(kind, num_rows, matrices, tiles)
        return max(flops / peak, _ITEM * moved / bandwidth) + steps * _STEP_SECONDS

    row_sides = [side for side in _TILE_ROWS if num_rows % side == 0]
    sides = itertools.product(row_sides, _parts(matrices[1]), _parts(matrices[2]))
    return min((tiles for tiles in sides if _memory(kind, tiles, items) <= memory), key=seconds)


def grid_work(
    kind: Kind, num_rows: int, matrices: tuple[int, ...], tiles: tuple[int, int, int]
) -> tuple[int, float, int]:
    """Steps of a kernel's grid, FLOPs, and numbers moved between memories, for groups of equal size.

    The grid is (N blocks, row blocks of all groups, K blocks), K innermost; for weights (N, K, row blocks), rows
    innermost. A group begins in a block that it shares with the one before. A block is moved when its index changes
    from one step to the next.
    """
    (num_groups, contracted, columns), (tile_rows, tile_k, tile_n) = matrices, tiles
    steps_k, steps_n = math.ceil(contracted / tile_k), math.ceil(columns / tile_n)
    row_blocks = math.ceil(num_rows / tile_rows) + num_groups - 1
    steps = row_blocks * steps_k * steps_n
    if kind == "weights":
        moved = steps * tile_rows * (tile_k + tile_n) + num_groups * steps_k * steps_n * tile_k * tile_n
    else:
        # With all of K in one step, a group's block of the matrix stays for all its row blocks.
        of_matrices = steps if steps_k > 1 else num_groups * steps_n
        moved = steps * tile_rows * tile_k + of_matrices * tile_k * tile_n + row_blocks * steps_n * tile_rows * tile_n
    return steps, 2.0 * steps * tile_rows * tile_k * tile_n, moved


#: Bytes of a bfloat16 number.
_ITEM = 2


def _memory(kind: Kind, tiles: _Tiles, items: tuple[int, int]) -> int:
    """Bytes of both factors and the result, two of each for transfers beside the work, and of a float32 sum; for
    weights also of what is added to it, as XLA allocates for some tiles."""
    tile_rows, tile_k, tile_n = tiles
    factor, result = items
    left = tile_rows * tile_k
    right = tile_k * tile_n
    out = tile_rows * tile_n
    moved = 2 * (factor * (left + right) + result * out)
    return moved + (8 * right if kind == "weights" else 4 * out)


def _parts(size: int) -> list[int]:
    """Lengths of the equal parts, in whole lanes, that a dimension can be split into."""
    lanes = target.LANES
    lengths = {math.ceil(size / parts / lanes) * lanes for parts in range(1, math.ceil(size / lanes) + 1)}
    return sorted(length for length in lengths if length <= _LONGEST_SIDE)


def _tiling(tiles: tuple[int, int, int] | None) -> contextlib.AbstractContextManager[Any]:
    """Set the tiles of the kernels traced in this context, as metadata that :mod:`moe.planner.hlo` reads too."""
    return set_xla_metadata(ragged_dot_tiling=",".join(map(str, tiles))) if tiles else contextlib.nullcontext()
