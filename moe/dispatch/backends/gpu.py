"""Grouped FFN for NVIDIA GPUs, by Pallas kernels that compute only the tiles that groups have.

XLA turns ``lax.ragged_dot`` into a dense matmul with E times the work there. On Hopper, rows are multiplied by JAX's
own Mosaic kernel. All else is in Pallas' Triton dialect, which compiles for Ampere, Hopper and Blackwell: JAX's other
Mosaic kernels ask the default device for its core count and so cannot be compiled for absent GPUs.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Float, Int

from moe.dispatch import quantized
from moe.dispatch.backends import tpu
from moe.dispatch.ffn import ExpertWeights, ffn
from moe.parallel import target

#: Share of rows that tiles shared by two groups may add.
_SURPLUS = 0.1

#: Output tile, bytes of a contraction step, stages and warps of the Triton kernels. 128 x 128 x 64 in bfloat16 does 64
#: FLOPs for each byte it loads, about what an A100's L2 cache needs (312 TFLOP/s over about 5 TB/s), and three stages
#: of 32 KiB fit the shared memory of every GPU from Ampere on (99 KiB at least).
_TILE, _STEP_BYTES, _STAGES, _WARPS = 128, 128, 3, 8

#: Tiles of rows that run side by side over the same columns, so that both operands stay in the L2 cache.
_SUPERTILE = 8

#: Tiles of JAX's Hopper kernel: two operands of 128 x 64 bfloat16 are 32 KiB a step, four steps and the output tile fit
#: 227 KiB of shared memory.
_HOPPER_COLUMNS, _HOPPER_CONTRACTED, _HOPPER_STEPS, _HOPPER_GRID = 128, 64, 4, 8


def grouped_ffn(
    rows: Float[Array, "R D"],
    group_sizes: Int[Array, " E"],
    weights: ExpertWeights,
    scale: Float[Array, " R"] | None = None,
) -> Float[Array, "R D"]:
    """:func:`moe.dispatch.backends.grouped_ffn` as grouped matmuls, by ``lax.ragged_dot`` where these kernels do not
    take the shapes."""

    if weights.precision != "none":
        quantized.check_target(weights.precision)

    def matmul(rows: Array, matrices: Array, *, transposed: bool = False) -> Array:
        if supports(rows, matrices):
            return grouped_matmul(rows, matrices, group_sizes, False, transposed)
        return tpu.multiply(rows, matrices, group_sizes, transposed=transposed)

    return ffn(rows, weights.joined(), matmul, scale)


def supports(rows: Float[Array, "R D"], matrices: Float[Array, "E D F"]) -> bool:
    """Whether the kernels take these shapes: an NVIDIA GPU from Ampere on, R, D and F in multiples of 16."""
    sizes = (rows.shape[0], *matrices.shape[1:])
    return target.current().compute_capability >= 8 and all(size % 16 == 0 for size in sizes)


def tile_rows(num_rows: int, num_groups: int) -> int:
    """Rows of a tile: the largest power of two from 16 to 128 that divides R and whose shared tiles add little work.

    Groups start anywhere, so up to E-1 tiles are computed twice, for two groups each.
    """
    sizes = [size for size in (128, 64, 32, 16) if num_rows % size == 0]
    return next((size for size in sizes if size * (num_groups - 1) <= _SURPLUS * num_rows), sizes[-1])


def computed_rows(num_rows: int, num_groups: int) -> int:
    """The most rows that one of the three matmuls computes for R rows, shared tiles counted twice."""
    return num_rows + tile_rows(num_rows, num_groups) * (num_groups - 1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def grouped_matmul(
    rows: Array, matrices: Array, sizes: Int[Array, " E"], interpret: bool = False, transposed: bool = False
) -> Array:
    """:func:`moe.dispatch.backends.tpu.grouped_matmul` by these kernels.

    Args:
        rows, matrices, sizes, transposed: as there.
        interpret: run the Triton kernels on the CPU, for tests.
    """
    return _multiply(rows, matrices, sizes, transposed=transposed, interpret=interpret)


def _grouped_matmul_fwd(rows, matrices, sizes, interpret, transposed):
    return grouped_matmul(rows, matrices, sizes, interpret, transposed), (rows, matrices, sizes)


def _grouped_matmul_bwd(interpret, transposed, residuals, gradient):
    rows, matrices, sizes = residuals
    d_rows = _multiply(gradient, matrices, sizes, transposed=not transposed, interpret=interpret)
    left, right = (gradient, rows) if transposed else (rows, gradient)
    d_matrices = _outer_products(left, right, sizes, interpret=interpret).astype(matrices.dtype)
    return d_rows, d_matrices, np.zeros(sizes.shape, jax.dtypes.float0)


grouped_matmul.defvjp(_grouped_matmul_fwd, _grouped_matmul_bwd)


def _multiply(rows: Array, matrices: Array, sizes: Array, *, transposed: bool, interpret: bool) -> Array:
    """Rows [R,K] of each group by its matrix, [E,K,N], or [E,N,K] if transposed → [R,N]."""
    (num_rows, contracted), num_groups = rows.shape, matrices.shape[0]
    columns = matrices.shape[1 if transposed else 2]
    hopper = target.current().compute_capability == 9 and not interpret and rows.dtype in (jnp.bfloat16, jnp.float16)
    if hopper and contracted % _HOPPER_CONTRACTED == columns % _HOPPER_COLUMNS == num_rows % 64 == 0:
        # Optional: not in every supported release of JAX, and it imports JAX's test utilities.
        from jax.experimental.pallas.ops.gpu import ragged_dot_mgpu  # noqa: PLC0415

        return ragged_dot_mgpu.ragged_dot(
            rows,
            matrices,
            group_sizes=sizes,
            block_m=max(64, tile_rows(num_rows, num_groups)),
            block_n=_HOPPER_COLUMNS,
            block_k=_HOPPER_CONTRACTED,
            max_concurrent_steps=_HOPPER_STEPS,
            grid_block_n=_HOPPER_GRID,
            transpose_rhs=transposed,
        )
    block = tile_rows(num_rows, num_groups)
    steps = num_rows // block + num_groups - 1
    tile_columns, tile_contracted = _divisor(columns, _TILE), _divisor(contracted, _STEP_BYTES // rows.dtype.itemsize)
    kernel = functools.partial(
        _multiply_kernel, tiles=(block, tile_columns, tile_contracted), transposed=transposed, columns=columns
    )
    return pl.pallas_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct((num_rows, columns), rows.dtype),
        grid=(math.ceil(steps / _SUPERTILE) * _SUPERTILE * (columns // tile_columns),),
        compiler_params=plgpu.CompilerParams(num_warps=_WARPS, num_stages=_STAGES),
        interpret=interpret,
        name="grouped_matmul",
    )(rows, matrices, *_schedule(sizes, block, math.ceil(steps / _SUPERTILE) * _SUPERTILE))


def _schedule(sizes: Array, block: int, steps: int) -> tuple[Array, Array, Array, Array]:
    """For each step its group and its tile of rows, and for each step the group's first row and its end. Steps beyond
    the last tile have an empty group."""
    ends = jnp.cumsum(sizes)
    starts = ends - sizes
    first, counts = _tiles_of_groups(starts, ends, block)
    step_ends = jnp.cumsum(counts)
    step = jnp.arange(steps, dtype=jnp.int32)
    group = jnp.minimum(jnp.sum(step[:, None] >= step_ends, axis=1), sizes.shape[0] - 1).astype(jnp.int32)
    used = step < step_ends[-1]
    tile = jnp.where(used, first[group] + step - (step_ends - counts)[group], 0)
    return group, tile, jnp.where(used, starts[group], 0), jnp.where(used, ends[group], 0)


def _tiles_of_groups(starts: Array, ends: Array, block: int) -> tuple[Array, Array]:
    """First tile of each group, and how many it touches."""
    return starts // block, jnp.where(ends > starts, (ends + block - 1) // block - starts // block, 0)


def _multiply_kernel(
    rows_ref, matrices_ref, group_ref, tile_ref, start_ref, end_ref, out_ref, *, tiles, transposed, columns
):
    block, tile_columns, tile_contracted = tiles
    # Programs run down _SUPERTILE tiles of rows, then over to the next columns.
    program, width = pl.program_id(0), _SUPERTILE * (columns // tile_columns)
    step = program // width * _SUPERTILE + program % _SUPERTILE
    column = program % width // _SUPERTILE * tile_columns
    group = group_ref[step]
    start = start_ref[step]
    end = end_ref[step]
    row = pl.multiple_of(tile_ref[step] * block, block)

    @pl.when(end > start)
    def _():
        def body(i, total):
            contracted = pl.ds(i * tile_contracted, tile_contracted)
            left = plgpu.load(rows_ref.at[pl.ds(row, block), contracted])
            if transposed:
                right = plgpu.load(matrices_ref.at[group, pl.ds(column, tile_columns), contracted])
            else:
                right = plgpu.load(matrices_ref.at[group, contracted, pl.ds(column, tile_columns)])
            return total + plgpu.dot(left, right, trans_b=transposed)

        zeros = jnp.zeros((block, tile_columns), jnp.float32)
        total = lax.fori_loop(0, rows_ref.shape[1] // tile_contracted, body, zeros)
        index = row + jnp.arange(block)
        mask = ((index >= start) & (index < end))[:, None]
        out = out_ref.at[pl.ds(row, block), pl.ds(column, tile_columns)]
        plgpu.store(out, total.astype(out_ref.dtype), mask=jnp.broadcast_to(mask, total.shape))


def _outer_products(rows: Array, gradient: Array, sizes: Array, *, interpret: bool) -> Array:
    """Transposed rows [R,D] of each group by its gradient rows [R,F] → [E,D,F]."""
    (num_rows, left) = rows.shape
    right = gradient.shape[1]
    num_groups = sizes.shape[0]
    block = min(64, tile_rows(num_rows, num_groups))
    tile_left, tile_right = _divisor(left, _TILE), _divisor(right, _TILE)
    ends = jnp.cumsum(sizes)
    first, counts = _tiles_of_groups(ends - sizes, ends, block)
    return pl.pallas_call(
        functools.partial(_outer_kernel, tiles=(block, tile_left, tile_right)),
        out_shape=jax.ShapeDtypeStruct((num_groups, left, right), rows.dtype),
        grid=(left // tile_left, right // tile_right, num_groups),
        compiler_params=plgpu.CompilerParams(num_warps=_WARPS, num_stages=_STAGES),
        interpret=interpret,
        name="grouped_outer_products",
    )(rows, gradient, first, counts, ends - sizes, ends)


def _outer_kernel(rows_ref, gradient_ref, first_ref, count_ref, start_ref, end_ref, out_ref, *, tiles):
    block, tile_left, tile_right = tiles
    group = pl.program_id(2)
    first = first_ref[group]
    start = start_ref[group]
    end = end_ref[group]
    left = pl.ds(pl.program_id(0) * tile_left, tile_left)
    right = pl.ds(pl.program_id(1) * tile_right, tile_right)

    def body(i, total):
        row = pl.multiple_of((first + i) * block, block)
        index = row + jnp.arange(block)
        valid = ((index >= start) & (index < end))[:, None]  # both operands: other rows may hold NaN
        x = plgpu.load(rows_ref.at[pl.ds(row, block), left], mask=jnp.broadcast_to(valid, (block, tile_left)), other=0)
        g = plgpu.load(
            gradient_ref.at[pl.ds(row, block), right], mask=jnp.broadcast_to(valid, (block, tile_right)), other=0
        )
        return total + plgpu.dot(x, g, trans_a=True)

    total = lax.fori_loop(0, count_ref[group], body, jnp.zeros((tile_left, tile_right), jnp.float32))
    plgpu.store(out_ref.at[group, left, right], total.astype(out_ref.dtype))


def _divisor(size: int, largest: int) -> int:
    """The largest power of two up to this that divides a size."""
    return math.gcd(size, largest)
