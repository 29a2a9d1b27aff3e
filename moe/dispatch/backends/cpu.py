"""Grouped FFN for CPUs, where XLA turns ``lax.ragged_dot`` into a dense matmul with E times the work: in row blocks."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
from jax import Array
from jaxtyping import Float, Int

from moe.dispatch.backends import row_blocks
from moe.dispatch.backends.row_blocks import RowBlocks
from moe.dispatch.ffn import ExpertWeights
from moe.parallel.parameters import gather_shard

#: Rows in a tile of the kernels.
TILE = 1

#: Rows of experts with a capacity are sorted by expert where nothing is exchanged: it moves as much as filling buffers
#: does, and computes no empty rows.
SORTS_WITH_CAPACITY = True

#: Combine weights are factors of the experts' hidden activations, instead of their outputs.
SCALES_HIDDEN = False


def pack(weights: ExpertWeights) -> ExpertWeights:
    """Return the weights as they are."""
    return weights


def pack_shards(shards: ExpertWeights) -> ExpertWeights:
    """One device's experts, within ``shard_map``, gathered over ``fsdp`` from shards."""
    gate = None if shards.gate is None else gather_shard(shards.gate, 1)
    return dataclasses.replace(shards, up=gather_shard(shards.up, 1), gate=gate, down=gather_shard(shards.down, 2))


def choose_row_blocks(num_rows: int, num_groups: int) -> RowBlocks:
    """Blocks for R rows in E groups."""
    mean = num_rows / num_groups
    # As shares of the mean load: in steps of 1/8 up to a half, then of 1/16, and of 1/32 near 1, where most groups are.
    shares = [*np.arange(0, 1 / 2, 1 / 8), *np.arange(1 / 2, 25 / 16, 1 / 16), *np.arange(7 / 8, 9 / 8, 1 / 32)]
    # XLA's matmul takes five rows at a time; with few rows, code for more sizes costs more than it saves.
    step = 5 if mean >= 64 else 15
    sizes = {max(15, math.ceil(mean * share / step) * step) for share in shares}
    return RowBlocks(tuple(sorted({min(size, num_rows) for size in sizes})))


def grouped_ffn(
    rows: Float[Array, "R D"],
    group_sizes: Int[Array, " E"],
    weights: ExpertWeights,
    scale: Float[Array, " R"] | None = None,
    *,
    expected_rows: int | None = None,
) -> Float[Array, "R D"]:
    """:func:`moe.dispatch.backends.grouped_ffn` in row blocks.

    Args:
        rows, group_sizes, weights, scale: as there.
        expected_rows: sum of the groups' sizes for which blocks are chosen; None: R.
    """
    blocks = choose_row_blocks(expected_rows or rows.shape[0], group_sizes.shape[0])
    return row_blocks.grouped_ffn(blocks, rows, group_sizes, weights, scale)
