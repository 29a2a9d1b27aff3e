"""Grouped matmuls for TPUs in Pallas that finish every tile of products while it is still in vector memory.

XLA's kernel and megablox's write their products: a nonlinearity (:mod:`moe.dispatch.backends.gated`), or the scales of
quantised factors, would be a pass of its own over all rows. XLA's needs a transposed copy of matrices to multiply them
transposed, and megablox's takes no integers.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.experimental.pallas.ops.tpu.megablox.gmm import make_group_metadata
from jaxtyping import Float, Int, Num

from moe.dispatch.backends.tpu_tiles import Tiles
from moe.parallel.target import LANES

_Index = tuple[Any, ...]

#: Lanes of a tile → its float32 products there, scaled.
Products = Callable[[slice], Array]


@dataclasses.dataclass(frozen=True)
class Factors:
    """Both factors of a grouped matmul.

    Attributes:
        rows: [R,K], sorted by group.
        matrices: of the groups, [E,K,N], or [E,N,K] if ``transposed``.
        scales: of quantised rows [R,1], and of quantised matrices, with K of length 1; None: neither is quantised.
        sums_dtype: of the sums of their products.
    """

    rows: Num[Array, "R K"]
    matrices: Array
    transposed: bool = False
    scales: tuple[Array, Array] | None = None
    sums_dtype: Any = jnp.float32

    @property
    def shape(self) -> tuple[int, int, int]:
        """(E, K, N)."""
        groups, first, second = self.matrices.shape
        return (groups, second, first) if self.transposed else (groups, first, second)


@dataclasses.dataclass(frozen=True)
class Operand:
    """An array, or its ShapeDtypeStruct, that a kernel reads or writes one block at a time.

    Attributes:
        block: its shape.
        at: (block of rows, group, block of columns) → index of the block.
    """

    array: Any
    block: tuple[int | None, ...]
    at: Callable[[Any, Any, Any], _Index]


def of_rows(array: Any, rows: int, columns: int) -> Operand:
    """[R,N], in blocks of rows and columns."""
    return Operand(array, (rows, columns), lambda row, group, column: (row, column))


def of_groups(array: Float[Array, "E N"], columns: int) -> Operand:
    """One number per group and column, in blocks of columns of one group."""
    return Operand(array[:, None], (None, 1, columns), lambda row, group, column: (group, 0, column))


def of_each_row(scale: Float[Array, " R"], rows: int) -> Operand:
    """One number per row, along the lanes: an array [R,1] would be padded to as many columns as there are lanes."""
    return Operand(scale[None], (1, rows), lambda row, group, column: (0, row))


def to_columns(block: Any) -> Float[Array, "rows lanes"]:
    """A block of :func:`of_each_row`, with each row's number in all lanes of the row."""
    numbers = block[...]
    return jnp.broadcast_to(numbers, (LANES, numbers.shape[1])).T


def store(ref: Any, lanes: slice, mask: Array, values: Array) -> Array:
    """Write the group's rows of some lanes; returns the numbers written, in float32."""
    rounded = values.astype(ref.dtype).astype(jnp.float32)
    mask = mask[:, : rounded.shape[1]]
    ref[:, lanes] = jnp.where(mask, rounded, ref[:, lanes].astype(jnp.float32)).astype(ref.dtype)
    return rounded


def of_row_blocks(num_rows: int, rows: int, blocks: int) -> Operand:
    """One float32 number per row and block of columns, [blocks,1,R]."""
    array = jax.ShapeDtypeStruct((blocks, 1, num_rows), jnp.float32)
    return Operand(array, (None, 1, rows), lambda row, group, column: (column, 0, row))


def store_of_rows(ref: Any, mask: Array, numbers: Float[Array, "rows lanes"], reduce: Callable[..., Array]) -> None:
    """Write a block of :func:`of_row_blocks`: for the group's rows, the numbers of all lanes reduced to one."""
    of_group = mask.astype(jnp.float32).T[:1] > 0
    ref[...] = jnp.where(of_group, reduce(numbers.T, axis=0, keepdims=True), ref[...])


def run(
    both: Factors,
    sizes: Int[Array, " E"],
    tiles: Tiles,
    inputs: Sequence[Operand],
    outputs: Sequence[Operand],
    finish: Callable[[Products, Array, Sequence[Any], Sequence[Any]], None],
    *,
    transcendentals: int = 0,
    interpret: bool = False,
) -> tuple[Array, ...]:
    """Multiply the rows of each group by its matrix, and ``finish`` every tile.

    A tile of rows that several groups share is visited once for each, one after another.

    Args:
        both: factors.
        sizes: rows of each group.
        tiles: rows, K and N; R and K in whole blocks.
        inputs, outputs: further operands of the kernel.
        finish: (products, rows of the group in the tile [rows,LANES], blocks of the inputs, blocks of the outputs) →
            writes the outputs.
        transcendentals: number of transcendental functions that ``finish`` computes.
        interpret: run in Pallas' interpreter, on any device.
    """
    (num_rows, contracted) = both.rows.shape
    columns = both.shape[2]
    (tile_rows, tile_k, tile_n) = tiles
    steps_k = contracted // tile_k
    assert steps_k * tile_k == contracted
    metadata, steps = make_group_metadata(
        group_sizes=sizes,
        m=num_rows,
        tm=tile_rows,
        start_group=jnp.int32(0),
        num_nonzero_groups=sizes.shape[0],
        visit_empty_groups=False,
    )
    scales = []
    if both.scales is not None:
        of_matrices = both.scales[1].reshape(-1, columns)
        scales = [of_each_row(both.scales[0][:, 0], tile_rows), of_groups(of_matrices, tile_n)]

    def kernel(starts: Any, groups: Any, blocks: Any, left: Any, right: Any, *operands: Any) -> None:
        step, step_k = pl.program_id(1), pl.program_id(2)
        contracting = (1,), (int(both.transposed),)
        sums = lax.dot_general(left[...], right[...], (contracting, ((), ())), preferred_element_type=both.sums_dtype)
        of_scales, operands = operands[: len(scales)], operands[len(scales) :]

        def finish_tile(sums: Array) -> None:
            row = lax.broadcasted_iota(jnp.int32, (tile_rows, LANES), 0) + blocks[step] * tile_rows
            mask = (row >= starts[groups[step]]) & (row < starts[groups[step] + 1])
            of_rows = to_columns(of_scales[0]) if scales else None

            def products(lanes: slice) -> Array:
                part = sums[:, lanes].astype(jnp.float32)
                return part if of_rows is None else part * of_rows[:, : part.shape[1]] * of_scales[1][:, lanes]

            first, last = len(inputs), len(inputs) + len(outputs)
            finish(products, mask, operands[:first], operands[first:last])

        if steps_k == 1:
            return finish_tile(sums)
        kept = operands[-1]
        kept[...] = jnp.where(step_k == 0, sums, kept[...] + sums)
        return pl.when(step_k == steps_k - 1)(lambda: finish_tile(kept[...]))

    def spec(operand: Operand, *, at_k: int | None = None) -> pl.BlockSpec:
        def index(column: Any, step: Any, step_k: Any, starts: Any, groups: Any, blocks: Any) -> _Index:
            at = operand.at(blocks[step], groups[step], column)
            return at if at_k is None else (*at[:at_k], step_k, *at[at_k + 1 :])

        return pl.BlockSpec(operand.block, index)

    rows = of_rows(both.rows, tile_rows, tile_k)
    if both.transposed:
        right = Operand(both.matrices, (None, tile_n, tile_k), lambda row, group, column: (group, column, 0))
    else:
        right = Operand(both.matrices, (None, tile_k, tile_n), lambda row, group, column: (group, 0, column))
    operands = rows, right, *scales, *inputs
    multiply = pl.pallas_call(
        kernel,
        out_shape=[operand.array for operand in outputs],
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(metadata),
            in_specs=[spec(rows, at_k=1), spec(right, at_k=2 if both.transposed else 1), *map(spec, operands[2:])],
            out_specs=[spec(operand) for operand in outputs],
            grid=(math.ceil(columns / tile_n), steps, steps_k),
            scratch_shapes=[pltpu.VMEM((tile_rows, tile_n), both.sums_dtype)] if steps_k > 1 else [],
        ),
        # XLA uses it to overlap exchanges with the kernel, and the planner counts its FLOPs.
        cost_estimate=pl.CostEstimate(
            flops=2 * num_rows * contracted * columns,
            transcendentals=transcendentals,
            bytes_accessed=sum(operand.array.size * operand.array.dtype.itemsize for operand in (*operands, *outputs)),
        ),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary", "arbitrary")),
        interpret=interpret,
    )
    return tuple(multiply(*metadata, *(operand.array for operand in operands)))


def grouped_products(
    both: Factors, sizes: Int[Array, " E"], dtype: Any, tiles: Tiles, *, interpret: bool = False
) -> Float[Array, "R N"]:
    """Rows times the matrices of their groups, scaled; rows beyond the sum of ``sizes`` are undefined."""
    _, _, tile_columns = tiles

    def finish(products: Products, mask: Array, _: Sequence[Any], outputs: Sequence[Any]) -> None:
        for start in range(0, tile_columns, LANES):
            lanes = slice(start, min(start + LANES, tile_columns))
            store(outputs[0], lanes, mask, products(lanes))

    result = jax.ShapeDtypeStruct((both.rows.shape[0], both.shape[2]), dtype)
    (y,) = run(both, sizes, tiles, [], [of_rows(result, tiles[0], tile_columns)], finish, interpret=interpret)
    return y
