"""Grouped matmul of float8 factors for Hopper GPUs, in Pallas' Mosaic dialect (wgmma).

Two warpgroups multiply one half each of a tile's rows, a third loads tiles of both factors into a ring of buffers.
Hopper's tensor cores sum products of float8 in fewer bits than float32 has, so the sums of each buffer, 128 terms, are
added up outside of them (DeepSeek-V3 2024, section 3.3.2). JAX's kernel for Hopper (ragged_dot_mgpu.py) writes results
in the dtype of the factors.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Float, Int

from moe.dispatch.backends.mosaic import load_ahead, scaled
from moe.dispatch.backends.tiles import SUPERTILE, Scales, schedule

#: Rows of a tile, half of them for each warpgroup; its columns; terms that are loaded at a time, a byte each.
TILE_ROWS = 128
TILE_COLUMNS = 128
TERMS = 128

#: Steps that are loaded ahead, 32 KiB each, beside 32 KiB for results: 192 of 227 KiB.
_STEPS = 5


def multiply(
    rows: Float[Array, "R K"],
    matrices: Float[Array, "E N K"],
    sizes: Int[Array, " E"],
    scales: Scales,
    *,
    cores: int,
) -> Float[Array, "R N"]:
    """Multiply the rows of each group by its matrix, transposed, to bfloat16; rows outside all groups are undefined.

    Args:
        rows: float8, sorted by group; R, K and N in whole tiles.
        matrices: float8, transposed.
        sizes: rows of each group.
        scales: of the rows and of the columns of each matrix, factors of the results.
        cores: streaming multiprocessors of the GPU, each of which runs one block.
    """
    (num_rows, _), columns = rows.shape, matrices.shape[1]
    transforms = plgpu.TilingTransform((8, TERMS)), plgpu.SwizzleTransform(128)  # pyright: ignore[reportAbstractUsage]
    kernel = plgpu.kernel(
        _kernel,
        out_type=jax.ShapeDtypeStruct((num_rows, columns), jnp.bfloat16),
        grid=(cores,),
        grid_names=("core",),
        num_threads=3,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
        kernel_name="grouped_matmul",
        scratch_types={
            "left": plgpu.SMEM((_STEPS, TILE_ROWS, TERMS), rows.dtype, transforms=transforms),
            "right": plgpu.SMEM((_STEPS, TILE_COLUMNS, TERMS), rows.dtype, transforms=transforms),
            "results": plgpu.SMEM((TILE_ROWS, TILE_COLUMNS), jnp.bfloat16),
            "loaded": plgpu.Barrier(num_arrivals=2, num_barriers=_STEPS),
            "consumed": plgpu.Barrier(num_arrivals=2, num_barriers=_STEPS),
        },
    )
    of_rows, of_columns = scales
    return kernel(rows, matrices, of_rows, of_columns.reshape(-1), *schedule(sizes, num_rows, TILE_ROWS))


def _kernel(
    rows_ref,
    matrices_ref,
    row_scales_ref,
    column_scales_ref,
    group_ref,
    tile_ref,
    start_ref,
    end_ref,
    out_ref,
    *,
    left,
    right,
    results,
    loaded,
    consumed,
):
    tiles_across, loads = out_ref.shape[1] // TILE_COLUMNS, rows_ref.shape[1] // TERMS
    warpgroup, half = lax.axis_index("warpgroup"), TILE_ROWS // 2

    def load(row: Array, across: pl.Slice, group: Array, done: Array) -> None:
        def copy(i: Array, slot: Array) -> None:
            terms = pl.ds(i * TERMS, TERMS)
            of_rows, of_matrix = rows_ref.at[pl.ds(row, TILE_ROWS), terms], matrices_ref.at[group, across, terms]
            plgpu.copy_gmem_to_smem(of_rows, left.at[slot], loaded.at[slot])
            plgpu.copy_gmem_to_smem(of_matrix, right.at[slot], loaded.at[slot])

        load_ahead(loads, done, _STEPS, consumed, copy)

    def add_up(own: pl.Slice, done: Array) -> Array:
        def body(i, total):
            slot = lax.rem(done * loads + i, _STEPS)
            plgpu.barrier_wait(loaded.at[slot])

            def product(sums):
                plgpu.wgmma(sums, left.at[slot, own], right.at[slot].transpose((1, 0)))
                return sums[...]

            of_step = pl.run_scoped(product, plgpu.WGMMAAccumulatorRef((half, TILE_COLUMNS)))
            plgpu.barrier_arrive(consumed.at[slot])
            return total + of_step

        zeros = plgpu.layout_cast(jnp.zeros((half, TILE_COLUMNS), jnp.float32), plgpu.Layout.WGMMA)
        return lax.fori_loop(0, loads, body, zeros)

    def write(own: pl.Slice, row: Array, across: pl.Slice, start: Array, count: Array) -> None:
        """Copy ``count`` of a half's results: copies have static sizes, so one for each power of two in ``count``."""
        for size in (half >> i for i in range(half.bit_length())):

            @pl.when(count & size != 0)
            def _(start=start, size=size):
                part = results.at[pl.ds(own.start + start, size)]
                plgpu.copy_smem_to_gmem(part, out_ref.at[pl.ds(row + start, size), across])

            start += count & size
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    @plgpu.nd_loop((group_ref.shape[0] * tiles_across,), collective_axes="core", init_carry=jnp.int32(0))
    def _(info, carry):
        """One tile; carry: the tiles that this block has done."""
        done = carry
        step, across = plgpu.planar_snake(info.index[0], (group_ref.shape[0], tiles_across), 0, SUPERTILE)
        row, columns = tile_ref[step] * TILE_ROWS, pl.ds(across * TILE_COLUMNS, TILE_COLUMNS)
        group = group_ref[step]
        used = end_ref[step] > start_ref[step]

        @pl.when(used & (warpgroup == 2))
        def _():
            load(row, columns, group, done)

        @pl.when(used & (warpgroup < 2))
        def _():
            own = pl.ds(warpgroup * half, half)
            sums = add_up(own, done)
            first = row + own.start
            of_rows = row_scales_ref.at[pl.ds(first, half)]
            of_columns = column_scales_ref.at[pl.ds(group * out_ref.shape[1] + columns.start, TILE_COLUMNS)]
            sums = scaled(sums, of_rows, of_columns, plgpu.Layout.WGMMA)
            results[own] = sums.astype(results.dtype)
            plgpu.commit_smem()
            begin = lax.clamp(jnp.int32(0), start_ref[step] - first, jnp.int32(half))
            end = lax.clamp(jnp.int32(0), end_ref[step] - first, jnp.int32(half))
            write(own, first, columns, begin, end - begin)

        return done + used.astype(jnp.int32)
