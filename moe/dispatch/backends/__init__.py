"""Grouped FFN: rows sorted by expert, each through its expert, with static shapes and groups of any size."""

from __future__ import annotations

import math
import types

from jax import Array
from jaxtyping import Float, Int

from moe.dispatch.backends import cpu, gpu, tpu, tpu_tiles
from moe.dispatch.ffn import ExpertWeights
from moe.parallel import target


def backend() -> types.ModuleType:
    """The kernels of the target: a loop over row blocks on CPUs, grouped matmuls on accelerators."""
    if target.is_cpu():
        return cpu
    return gpu if target.current().platform == "gpu" else tpu


def grouped_ffn(
    rows: Float[Array, "R D"],
    group_sizes: Int[Array, " E"],
    weights: ExpertWeights,
    scale: Float[Array, " R"] | None = None,
) -> Float[Array, "R D"]:
    """Apply expert 0 to the first group_sizes[0] rows, expert 1 to the next group_sizes[1], and so on.

    Args:
        rows: sorted by expert; R comes from :func:`whole_tiles`.
        group_sizes: rows of each expert. The output of rows beyond their sum is undefined.
        weights: of the experts, gathered, with the dropout of these rows.
        scale: factors of the outputs; not on CPUs.
    """
    factors = () if scale is None else (scale,)
    return backend().grouped_ffn(rows, group_sizes, weights, *factors)


def whole_tiles(num_rows: int) -> int:
    """R rounded up to whole tiles of accelerators' kernels; on CPU R."""
    return num_rows if target.is_cpu() else math.ceil(num_rows / tpu_tiles.TILE) * tpu_tiles.TILE
