"""Grouped FFN: rows sorted by expert, each through its expert's matrices, with static shapes and any group sizes."""

from __future__ import annotations

from typing import Any

from jax import Array
from jaxtyping import Float, Int

from moe.dispatch.grouped_matmul import cpu, gpu, tpu
from moe.dispatch.grouped_matmul.cpu import FirstStage, SecondStage
from moe.dispatch.grouped_matmul.row_blocks import RowBlocks


def grouped_ffn(
    first: FirstStage,
    second: SecondStage | None,
    rows: Float[Array, "R D"],
    first_matrices: Any,
    second_matrices: Any,
    starts: Int[Array, " E"],
    sizes: Int[Array, " E"],
    row_blocks: RowBlocks,
) -> Any:
    """second(first(rows)), every group with its expert's matrices: a loop over row blocks on CPU, grouped matmuls
    elsewhere. The output of rows that belong to no group is undefined.

    Args:
        first: static; rows → hidden activations before the nonlinearity.
        second: static; those → rows. None: the first stage alone.
        rows: sorted by group; zero in the padding of :meth:`RowBlocks.padded_sizes`.
        first_matrices: of the first stage, [E,·,·] each.
        second_matrices: of the second stage, [E,·,·] each.
        starts: first row of each group, ascending; without row blocks there are no gaps between groups.
        sizes: rows of each group, as :meth:`RowBlocks.padded_sizes` returned them.
        row_blocks: static, those that padded them.
    """
    if row_blocks.sizes:
        return cpu.grouped_ffn(first, second, row_blocks, rows, first_matrices, second_matrices, starts, sizes)

    def matmul(rows: Array, matrices: Array) -> Array:
        if matrices.shape[1] == 1:
            return tpu.multiply_columns(rows, matrices, sizes)
        if gpu.supports(rows, matrices):
            return gpu.grouped_matmul(rows, matrices, sizes)
        return tpu.grouped_matmul(rows, matrices, sizes)

    hidden = first(rows, first_matrices, matmul)
    return hidden if second is None else second(hidden, second_matrices, matmul)
