"""Grouped matmuls in Pallas' Triton dialect, which compile for Ampere, Hopper and Blackwell GPUs."""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from moe.dispatch.backends.tiles import SUPERTILE, schedule, tile_rows, tiles_of_groups

#: Output tile, bytes of a contraction step, stages and warps of the Triton kernels. 128 x 128 x 64 in bfloat16 does 64
#: FLOPs for each byte it loads, about what an A100's L2 cache needs (312 TFLOP/s over about 5 TB/s), and three stages
#: of 32 KiB fit the shared memory of every GPU from Ampere on (99 KiB at least).
_TILE = 128
_STEP_BYTES = 128
_STAGES = 3
_WARPS = 8


def multiply(rows: Array, matrices: Array, sizes: Array, *, transposed: bool, interpret: bool) -> Array:
    """Rows [R,K] of each group by its matrix, [E,K,N], or [E,N,K] if transposed → [R,N]; K and N in multiples of 16."""
    (num_rows, contracted), num_groups = rows.shape, matrices.shape[0]
    columns = matrices.shape[1 if transposed else 2]
    block = tile_rows(num_rows, num_groups)
    steps = schedule(sizes, num_rows, block)
    tile_columns, tile_contracted = _divisor(columns, _TILE), _divisor(contracted, _STEP_BYTES // rows.dtype.itemsize)
    kernel = functools.partial(
        _multiply_kernel, tiles=(block, tile_columns, tile_contracted), transposed=transposed, columns=columns
    )
    return pl.pallas_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct((num_rows, columns), rows.dtype),
        grid=(len(steps[0]) * (columns // tile_columns),),
        compiler_params=plgpu.CompilerParams(num_warps=_WARPS, num_stages=_STAGES),
        interpret=interpret,
        name="grouped_matmul",
    )(rows, matrices, *steps)


def _multiply_kernel(
    rows_ref, matrices_ref, group_ref, tile_ref, start_ref, end_ref, out_ref, *, tiles, transposed, columns
):
    block, tile_columns, tile_contracted = tiles
    # Programs run down SUPERTILE tiles of rows, then over to the next columns.
    program, width = pl.program_id(0), SUPERTILE * (columns // tile_columns)
    step = program // width * SUPERTILE + program % SUPERTILE
    column = program % width // SUPERTILE * tile_columns
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


def outer_products(rows: Array, gradient: Array, sizes: Array, *, interpret: bool) -> Array:
    """Transposed rows [R,D] of each group by its gradient rows [R,F] → [E,D,F]."""
    (num_rows, left) = rows.shape
    right = gradient.shape[1]
    num_groups = sizes.shape[0]
    block = min(64, tile_rows(num_rows, num_groups))
    tile_left, tile_right = _divisor(left, _TILE), _divisor(right, _TILE)
    ends = jnp.cumsum(sizes)
    first, counts = tiles_of_groups(ends - sizes, ends, block)
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
    """Largest power of two that divides ``size`` and is at most ``largest``, itself a power of two."""
    return math.gcd(size, largest)
