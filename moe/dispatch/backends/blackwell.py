"""Grouped matmul for Blackwell GPUs, in Pallas' Mosaic dialect, with the tensor cores' own memory (tcgen05).

A block of the persistent grid has two warpgroups. One warp of the first loads tiles of both factors into a ring of
buffers, another starts their products, which are summed in tensor memory; the second warpgroup writes the sums of one
tile while those of the next are computed. JAX's kernel of this kind (jax.experimental.pallas.ops.gpu,
blackwell_ragged_dot_mgpu.py) takes no transposed matrices, asks the default device for its core count, and cannot be
interpreted, since its blocks work in pairs.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Float, Int

from moe.dispatch.backends.mosaic import load_ahead, scaled
from moe.dispatch.backends.tiles import SUPERTILE, Scales, schedule

#: Rows of a tile, those of one tcgen05 instruction; bytes of each row that are loaded at a time.
_TILE_ROWS, _ROW_BYTES = 128, 128

#: Columns of a tile: the first that divides those of the product. Two tiles' sums fill 512 columns of tensor memory.
_COLUMNS = (256, 192, 128, 64)

#: Steps that are loaded ahead, 48 KiB each at 256 columns, beside 16 KiB for results: 208 of 227 KiB.
_STEPS = 4

#: Columns that are written at a time.
_WRITTEN = 64


def supports(rows: Float[Array, "R K"], columns: int) -> bool:
    """Whether the kernel takes these rows and this number of columns: 16-bit floats or float8, R in multiples of 128, K
    of 64 or 128, N of 64."""
    num_rows, terms = rows.shape
    whole = num_rows % _TILE_ROWS == terms % _terms(rows) == columns % _COLUMNS[-1] == 0
    return whole and rows.dtype in (jnp.bfloat16, jnp.float16, jnp.float8_e4m3fn)


def _terms(factor: Array) -> int:
    """Terms of the sums that are loaded at a time."""
    return _ROW_BYTES // factor.dtype.itemsize


def multiply(
    rows: Float[Array, "R K"],
    matrices: Float[Array, "E A B"],
    sizes: Int[Array, " E"],
    scales: Scales | None = None,
    *,
    transposed: bool,
    cores: int,
) -> Float[Array, "R N"]:
    """Multiply the rows of each group by its matrix; rows outside all groups are undefined.

    Args:
        rows: sorted by group.
        matrices: [E,K,N], or [E,N,K] if transposed, as float8 must be.
        sizes: rows of each group.
        scales: factors of the results, which then are bfloat16.
        transposed: multiply by each matrix transposed.
        cores: streaming multiprocessors of the GPU, each of which runs one block.
    """
    num_rows, columns = rows.shape[0], matrices.shape[1 if transposed else 2]
    tile_columns = next(size for size in _COLUMNS if columns % size == 0)
    terms, dtype = _terms(rows), jnp.bfloat16 if scales else rows.dtype
    of_matrices = (tile_columns, terms) if transposed else (terms, tile_columns)
    tiling, swizzle = plgpu.TilingTransform((8, terms)), plgpu.SwizzleTransform(_ROW_BYTES)  # pyright: ignore[reportAbstractUsage]
    kernel = plgpu.kernel(
        functools.partial(_kernel, transposed=transposed, tile_columns=tile_columns),
        out_type=jax.ShapeDtypeStruct((num_rows, columns), dtype),
        grid=(cores,),
        grid_names=("core",),
        num_threads=2,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
        kernel_name="grouped_matmul",
        scratch_types={
            "left": plgpu.SMEM((_STEPS, _TILE_ROWS, terms), rows.dtype, transforms=(tiling, swizzle)),
            "right": plgpu.SMEM((_STEPS, *of_matrices), rows.dtype, transforms=(tiling, swizzle)),
            "sums": plgpu.TMEM((_TILE_ROWS, 2 * tile_columns), jnp.float32),
            "results": plgpu.SMEM((_TILE_ROWS, _WRITTEN), dtype),
            "loaded": plgpu.Barrier(num_arrivals=2, num_barriers=_STEPS),
            "consumed": plgpu.Barrier(num_barriers=_STEPS, orders_tensor_core=True),
            "summed": plgpu.Barrier(num_barriers=2, orders_tensor_core=True),
            "written": plgpu.Barrier(num_barriers=2, orders_tensor_core=True),
        },
    )
    factors = (scales[0], scales[1].reshape(-1)) if scales else (None, None)
    return kernel(rows, matrices, factors, *schedule(sizes, num_rows, _TILE_ROWS))


def _kernel(
    rows_ref,
    matrices_ref,
    scale_refs,
    group_ref,
    tile_ref,
    start_ref,
    end_ref,
    out_ref,
    *,
    transposed,
    tile_columns,
    left,
    right,
    sums,
    results,
    loaded,
    consumed,
    summed,
    written,
):
    terms_loaded = left.shape[-1]
    tiles_across, loads = out_ref.shape[1] // tile_columns, rows_ref.shape[1] // terms_loaded
    warpgroup = lax.axis_index("warpgroup")

    def load(row: Array, column: Array, group: Array, done: Array) -> None:
        def copy(i: Array, slot: Array) -> None:
            terms = pl.ds(i * terms_loaded, terms_loaded)
            across = pl.ds(column, tile_columns)
            plgpu.copy_gmem_to_smem(rows_ref.at[pl.ds(row, _TILE_ROWS), terms], left.at[slot], loaded.at[slot])
            matrix = matrices_ref.at[group]
            matrix = matrix.at[across, terms] if transposed else matrix.at[terms, across]
            plgpu.copy_gmem_to_smem(matrix, right.at[slot], loaded.at[slot])

        load_ahead(loads, done, _STEPS, consumed, copy)

    def add_up(tile_sums, done: Array) -> None:
        def body(i, _):
            slot = lax.rem(done * loads + i, _STEPS)
            plgpu.barrier_wait(loaded.at[slot])
            matrix = right.at[slot].transpose((1, 0)) if transposed else right.at[slot]
            plgpu.tcgen05_mma(tile_sums, left.at[slot], matrix, consumed.at[slot], accumulate=i > 0)

        lax.fori_loop(0, loads, body, None)
        plgpu.tcgen05_commit_arrive(summed.at[lax.rem(done, 2)])

    def finished(values: Array, row: Array, column: Array, group: Array) -> Array:
        of_rows, of_columns = scale_refs
        if of_rows is None:
            return values
        of_columns = of_columns.at[pl.ds(group * out_ref.shape[1] + column, _WRITTEN)]
        return scaled(values, of_rows.at[pl.ds(row, _TILE_ROWS)], of_columns, plgpu.Layout.TCGEN05)

    def write(tile_sums, row: Array, column: Array, group: Array, first: Array, count: Array) -> None:
        for part in range(0, tile_columns, _WRITTEN):
            values = plgpu.async_load_tmem(tile_sums.at[:, pl.ds(part, _WRITTEN)], layout=plgpu.Layout.TCGEN05)
            values = finished(values, row, column + part, group)
            results[...] = values.astype(results.dtype)
            plgpu.commit_smem()
            write_rows(row, column + part, first, count)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        plgpu.wait_load_tmem()

    def write_rows(row: Array, column: Array, first: Array, count: Array) -> None:
        """Copy ``count`` rows of ``results``: copies have static sizes, so one for each power of two in ``count``."""
        for size in (_TILE_ROWS >> i for i in range(_TILE_ROWS.bit_length())):

            @pl.when(count & size != 0)
            def _(first=first, size=size):
                to = out_ref.at[pl.ds(row + first, size), pl.ds(column, _WRITTEN)]
                plgpu.copy_smem_to_gmem(results.at[pl.ds(first, size)], to)

            first += count & size

    @plgpu.nd_loop((group_ref.shape[0] * tiles_across,), collective_axes="core", init_carry=jnp.int32(0))
    def _(info, carry):
        """One tile; carry: the tiles that this block has done."""
        done = carry
        step, across = plgpu.planar_snake(info.index[0], (group_ref.shape[0], tiles_across), 0, SUPERTILE)
        row, column = tile_ref[step] * _TILE_ROWS, across * tile_columns
        group = group_ref[step]
        first = lax.max(start_ref[step] - row, jnp.int32(0))
        count = lax.min(end_ref[step] - row, jnp.int32(_TILE_ROWS)) - first
        used = count > 0
        slot = lax.rem(done, 2)
        tile_sums = sums.at[:, pl.ds(slot * tile_columns, tile_columns)]

        @pl.when(used & (warpgroup == 0))
        def _():
            @plgpu.warp_map
            def _(warp):
                @pl.when(warp == 0)
                def _():
                    load(row, column, group, done)

                @pl.when(warp == 1)
                def _():
                    @pl.when(done > 1)
                    def _():
                        plgpu.barrier_wait(written.at[slot])

                    add_up(tile_sums, done)

        @pl.when(used & (warpgroup == 1))
        def _():
            plgpu.barrier_wait(summed.at[slot])
            write(tile_sums, row, column, group, first, count)
            plgpu.barrier_arrive(written.at[slot])

        return done + used.astype(jnp.int32)
