"""Grouped matmul by lax.ragged_dot, for accelerators."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.experimental.xla_metadata import set_xla_metadata

from moe.parallel import target

#: Rows in a tile of ``lax.ragged_dot``'s kernel on TPUs, if R is a multiple of it. With 8200 rows the tile has 8, and
#: with 100, which 8 does not divide, there is no kernel but E times the work (libtpu 0.0.50.1).
_TILE = 128


#: Tiles (rows, K, N) of that kernel where groups are large, by the first words of the device kind, the first that fits.
#: XLA's own choices read rows or matrices from memory so often that some kernels would take two to seven times as long
#: as their FLOPs at peak; these need as long, on v6e a quarter more, and the vector memory that XLA allows by default
#: (docs/performance.md has the table).
_TILES = {
    "TPU v2": None,  # their matrix units have no kernel for bfloat16 that Mosaic knows
    "TPU v3": None,
    "TPU v6": (1024, 1024, 1024),
    "TPU7": (512, 1024, 1024),
    "TPU": (512, 1024, 512),
}


def whole_tiles(num_rows: int) -> int:
    """R rounded up to what kernels of accelerators like."""
    return num_rows if target.is_cpu() else math.ceil(num_rows / _TILE) * _TILE


def grouped_matmul(sizes: Array) -> Callable[[Array, Array], Array]:
    """rows [R,D], matrices [E,D,F] → [R,F]; what comes out for rows of no group is undefined."""
    return lambda rows, matrices: _ragged_dot(rows, matrices, sizes)


def _tiles(rows: Array, num_groups: int) -> tuple[int, int, int] | None:
    """An entry of :data:`_TILES`, where groups have at least four of its tiles of rows; None: what XLA chooses."""
    tiles = next((tiles for name, tiles in _TILES.items() if target.current().device_kind.startswith(name)), None)
    if tiles is None or rows.dtype != jnp.bfloat16:
        return None
    tile_rows = math.gcd(rows.shape[0], tiles[0])
    few = tile_rows <= _TILE or rows.shape[0] < 4 * num_groups * tile_rows
    return None if few else (tile_rows, *tiles[1:])


def _named(tiles: tuple[int, int, int] | None) -> contextlib.AbstractContextManager[Any]:
    """The kernels of what is traced within have these tiles, and say so to :mod:`moe.planner.hlo`."""
    return set_xla_metadata(ragged_dot_tiling=",".join(map(str, tiles))) if tiles else contextlib.nullcontext()


@jax.custom_vjp
def _ragged_dot(rows: Array, matrices: Array, sizes: Array) -> Array:
    with _named(_tiles(rows, matrices.shape[0])):
        return lax.ragged_dot(rows, matrices, sizes, preferred_element_type=rows.dtype)


def _ragged_dot_fwd(rows, matrices, sizes):
    return _ragged_dot(rows, matrices, sizes), (rows, matrices, sizes)


def _ragged_dot_bwd(residuals, gradient):
    rows, matrices, sizes = residuals
    tiles = _tiles(rows, matrices.shape[0])
    with _named(tiles):
        d_matrices = lax.ragged_dot_general(
            rows, gradient, sizes, _ROWS_CONTRACTED, preferred_element_type=matrices.dtype
        )
        # ragged_dot's kernel takes matrices in one order alone, and would get a transposed copy; megablox's takes both.
        if tiles:
            # Not everybody needs Pallas.
            from jax.experimental.pallas.ops.tpu.megablox.gmm import gmm as megablox

            d_rows = megablox(gradient, matrices, sizes, rows.dtype, tiles, transpose_rhs=True)
        else:
            d_rows = lax.ragged_dot(gradient, matrices.swapaxes(1, 2), sizes, preferred_element_type=rows.dtype)
    return d_rows, d_matrices, np.zeros(sizes.shape, jax.dtypes.float0)


_ROWS_CONTRACTED = lax.RaggedDotDimensionNumbers(
    dot_dimension_numbers=(((0,), (0,)), ((), ())), lhs_ragged_dimensions=[0], rhs_group_dimensions=[]
)


_ragged_dot.defvjp(_ragged_dot_fwd, _ragged_dot_bwd)
