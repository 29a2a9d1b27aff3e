"""Shared parts of the grouped matmuls in Pallas' Mosaic dialect: the ring of buffers, and the scales of results."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu


def load_ahead(loads: int, done: Array, steps: int, consumed: Any, copy: Callable[[Array, Array], None]) -> None:
    """Load the parts of a tile's factors into a ring of buffers, each once its buffer's previous part is consumed.

    Args:
        loads: number of parts of a tile.
        done: number of tiles before this one.
        steps: number of buffers in the ring.
        consumed: barriers of the buffers.
        copy: (part, buffer) → None, starts a copy.
    """

    def body(i, _):
        load = done * loads + i
        slot = lax.rem(load, steps)

        @pl.when(load >= steps)
        def _():
            plgpu.barrier_wait(consumed.at[slot])

        copy(i, slot)

    lax.fori_loop(0, loads, body, None)


def scaled(values: Array, of_rows: Any, of_columns: Any, layout: Any) -> Array:
    """Multiply sums [R,N] of quantised factors by the scales of their rows and columns, in the GPU's memory."""
    for axis, scales in enumerate((of_rows, of_columns)):
        factors = plgpu.load(scales, layout=layout.reduce(1 - axis), optimized=False)
        values *= lax.broadcast_in_dim(factors, values.shape, [axis])
    return values
