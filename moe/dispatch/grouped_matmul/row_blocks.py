"""Static numbers of rows that groups of any size are padded to."""

from __future__ import annotations

import dataclasses
import math

import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Int

from moe.parallel import target

#: Rows in the smallest tile of accelerators' kernels. With R not a multiple of it, TPUs' ``lax.ragged_dot`` uses tiles
#: of 8 rows (8200 rows) or, where 8 does not divide R, a dense matmul with E times the work (libtpu 0.0.50.1).
TILE = 128


@dataclasses.dataclass(frozen=True)
class RowBlocks:
    """Static sizes of the blocks of rows that a group is computed in; without any, groups are not padded.

    A group has as many blocks of the largest size as it fills, and before them one of the smallest size that takes the
    rest: an expert's matrices are read, and their gradients written, about once. The sizes lie around the mean load.
    """

    sizes: tuple[int, ...]

    def padded_sizes(self, sizes: Int[Array, " E"]) -> Int[Array, " E"]:
        """Rows of each group after padding; the padding rows must be zero."""
        if not self.sizes:
            return sizes
        first = self.first_block(sizes)
        ladder = jnp.asarray((0, *self.sizes), jnp.int32)
        return sizes - first + ladder[jnp.sum(first[:, None] > ladder, axis=1)]

    def first_block(self, sizes: Int[Array, " E"]) -> Int[Array, " E"]:
        """Rows left for each group's first block when all further ones have the largest size."""
        return jnp.where(sizes > 0, (sizes - 1) % self.sizes[-1] + 1, 0)

    def total_rows(self, num_rows: int, num_groups: int) -> int:
        """The largest sum of :meth:`padded_sizes` of R rows in E groups."""
        surplus = widest = smaller = 0
        for size in self.sizes:
            if size - smaller - 1 > widest:  # only groups of more than `smaller` rows can waste so many
                surplus += (size - smaller - 1 - widest) * min(num_groups, num_rows // (smaller + 1))
                widest = size - smaller - 1
            smaller = size
        return num_rows + surplus


UNPADDED = RowBlocks(())


def choose_row_blocks(num_rows: int, num_groups: int) -> RowBlocks:
    """Blocks for R rows in E groups on CPU; accelerators' kernels take unpadded groups."""
    if not target.is_cpu():
        return UNPADDED
    mean = num_rows / num_groups
    # In shares of the mean load: steps of 1/8 up to a half, then of 1/16, and of 1/32 around it, where most groups are.
    shares = [*np.arange(0, 1 / 2, 1 / 8), *np.arange(1 / 2, 25 / 16, 1 / 16), *np.arange(7 / 8, 9 / 8, 1 / 32)]
    step = 5 if mean >= 64 else 15  # XLA's matmul takes five rows at a time; where rows are few, code costs more
    return RowBlocks(tuple(sorted({max(15, math.ceil(mean * share / step) * step) for share in shares})))


def whole_tiles(num_rows: int) -> int:
    """R rounded up to whole tiles of accelerators' kernels; on CPU R."""
    return num_rows if target.is_cpu() else math.ceil(num_rows / TILE) * TILE
