"""Grouped matmul by ``lax.ragged_dot``, with tiles for TPUs."""

from __future__ import annotations

import contextlib
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.experimental.pallas.ops.tpu.megablox.gmm import gmm as megablox_gmm
from jax.experimental.xla_metadata import set_xla_metadata
from jaxtyping import Float, Int

from moe.dispatch.grouped_matmul.row_blocks import TILE
from moe.parallel import target

#: Tiles (rows, K, N) of ``lax.ragged_dot``'s kernel where groups are large, by the start of the device kind; the first
#: entry that matches counts. XLA's own tiles read rows or matrices from memory so often that some kernels would take
#: two to seven times as long as their FLOPs at peak; these take as long, on v6e a quarter more, and fit the vector
#: memory that XLA allows by default (docs/performance.md has the table).
_TILES = {
    "TPU v2": None,  # no bfloat16 kernel for their matrix units
    "TPU v3": None,
    "TPU v6": (1024, 1024, 1024),
    "TPU7": (512, 1024, 1024),
    "TPU": (512, 1024, 512),
}

#: Tiles where those that two groups share would add more than a tenth of the rows, by device kind: half the rows and
#: twice the columns need more bandwidth for their FLOPs, of which v5p has enough.
_TILES_OF_SHORT_GROUPS = {"TPU v5": (256, 1024, 1024)}

_ROWS_CONTRACTED = lax.RaggedDotDimensionNumbers(
    dot_dimension_numbers=(((0,), (0,)), ((), ())), lhs_ragged_dimensions=[0], rhs_group_dimensions=[]
)


@jax.custom_vjp
def grouped_matmul(
    rows: Float[Array, "R D"], matrices: Float[Array, "E D F"], sizes: Int[Array, " E"]
) -> Float[Array, "R F"]:
    """Multiplies the first sizes[0] rows by matrix 0, the next sizes[1] by matrix 1, and so on; further rows of the
    output are undefined."""
    with _tiling(_tiles(rows, matrices.shape[0])):
        return lax.ragged_dot(rows, matrices, sizes, preferred_element_type=rows.dtype)


def _grouped_matmul_fwd(rows, matrices, sizes):
    return grouped_matmul(rows, matrices, sizes), (rows, matrices, sizes)


def _grouped_matmul_bwd(residuals, gradient):
    rows, matrices, sizes = residuals
    tiles = _tiles(rows, matrices.shape[0])
    with _tiling(tiles):
        d_matrices = lax.ragged_dot_general(
            rows, gradient, sizes, _ROWS_CONTRACTED, preferred_element_type=matrices.dtype
        )
        # ragged_dot's kernel needs the matrices transposed in memory; megablox's reads them in either order.
        if tiles:
            d_rows = megablox_gmm(gradient, matrices, sizes, rows.dtype, tiles, transpose_rhs=True)
        else:
            d_rows = lax.ragged_dot(gradient, matrices.swapaxes(1, 2), sizes, preferred_element_type=rows.dtype)
    return d_rows, d_matrices, np.zeros(sizes.shape, jax.dtypes.float0)


grouped_matmul.defvjp(_grouped_matmul_fwd, _grouped_matmul_bwd)


def _tiles(rows: Array, num_groups: int) -> tuple[int, int, int] | None:
    """An entry of the tables where groups have at least four of its tiles of rows; None: XLA's own choice."""
    kind = target.current().device_kind
    tiles = next((tiles for name, tiles in _TILES.items() if kind.startswith(name)), None)
    if tiles is None or rows.dtype != jnp.bfloat16:
        return None
    if (num_groups - 1) * tiles[0] > 0.1 * rows.shape[0]:
        tiles = _TILES_OF_SHORT_GROUPS.get(kind) or tiles
    tile_rows = math.gcd(rows.shape[0], tiles[0])
    few = tile_rows <= TILE or rows.shape[0] < 4 * num_groups * tile_rows
    return None if few else (tile_rows, tiles[1], tiles[2])


def _tiling(tiles: tuple[int, int, int] | None) -> contextlib.AbstractContextManager[Any]:
    """Sets the tiles of the kernels traced in this context, as metadata that :mod:`moe.planner.hlo` reads too."""
    return set_xla_metadata(ragged_dot_tiling=",".join(map(str, tiles))) if tiles else contextlib.nullcontext()
