"""Tiles of rows that kernels for GPUs compute, with the groups that they belong to."""

from __future__ import annotations

import math

import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

#: Scales of quantised factors (:func:`moe.dispatch.quantized.quantize`): of the rows, and of each matrix's columns.
Scales = tuple[Float[Array, " R"], Float[Array, "E N"]]

#: Tiles of rows that run side by side over the same columns, so that both factors stay in the L2 cache.
SUPERTILE = 8

#: Share of rows that tiles shared by two groups may add.
_SURPLUS = 0.1


def tile_rows(num_rows: int, num_groups: int) -> int:
    """Rows of a tile: the largest power of two from 16 to 128 that divides R and whose shared tiles add little work.

    Groups start anywhere, so up to E-1 tiles are computed twice, for two groups each.
    """
    sizes = [size for size in (128, 64, 32, 16) if num_rows % size == 0]
    return next((size for size in sizes if size * (num_groups - 1) <= _SURPLUS * num_rows), sizes[-1])


def schedule(sizes: Array, num_rows: int, block: int) -> tuple[Array, Array, Array, Array]:
    """For each step: its group, its tile of rows, the group's first row and its end. Steps after the last tile, which
    fill up the last supertile, have an empty group."""
    steps = math.ceil((num_rows // block + sizes.shape[0] - 1) / SUPERTILE) * SUPERTILE
    ends = jnp.cumsum(sizes)
    starts = ends - sizes
    first, counts = tiles_of_groups(starts, ends, block)
    step_ends = jnp.cumsum(counts)
    step = jnp.arange(steps, dtype=jnp.int32)
    group = jnp.minimum(jnp.sum(step[:, None] >= step_ends, axis=1), sizes.shape[0] - 1).astype(jnp.int32)
    used = step < step_ends[-1]
    tile = jnp.where(used, first[group] + step - (step_ends - counts)[group], 0)
    return group, tile, jnp.where(used, starts[group], 0), jnp.where(used, ends[group], 0)


def tiles_of_groups(starts: Array, ends: Array, block: int) -> tuple[Array, Array]:
    """First tile of each group, and how many it touches."""
    return starts // block, jnp.where(ends > starts, (ends + block - 1) // block - starts // block, 0)
