"""Grouped FFN: rows sorted by expert, each through its expert, with static shapes and groups of any size."""

from __future__ import annotations

import math
from typing import Any, Protocol, runtime_checkable

from jax import Array
from jaxtyping import Float, Int

from moe.dispatch.backends import cpu, gpu, tpu
from moe.dispatch.ffn import ExpertWeights
from moe.parallel import target


@runtime_checkable
class Backend(Protocol):
    """The experts' products on one platform: a module of this package.

    Attributes:
        TILE: rows in the smallest tile of its kernels.
        SORTS_WITH_CAPACITY: rows of experts with a capacity are sorted too where nothing is exchanged.
        SCALES_HIDDEN: combine weights are factors of the experts' hidden activations, instead of their outputs.
    """

    @property
    def TILE(self) -> int: ...  # noqa: D102
    @property
    def SORTS_WITH_CAPACITY(self) -> bool: ...  # noqa: D102
    @property
    def SCALES_HIDDEN(self) -> bool: ...  # noqa: D102

    def pack(self, weights: ExpertWeights, /) -> ExpertWeights:
        """Gathered weights in the form that :meth:`grouped_ffn` takes."""
        ...

    def pack_shards(self, shards: ExpertWeights, /) -> ExpertWeights:
        """One device's experts in that form, within ``shard_map``, gathered over ``fsdp`` from shards."""
        ...

    def grouped_ffn(self, rows: Array, group_sizes: Array, weights: Any, scale: Array | None = None) -> Array:
        """See :func:`grouped_ffn`."""
        ...


_BACKENDS: dict[str, Backend] = {"cpu": cpu, "gpu": gpu, "tpu": tpu}


def backend() -> Backend:
    """The kernels of the target: a loop over row blocks on CPUs, grouped matmuls on accelerators."""
    return _BACKENDS[target.current().platform]


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
        weights: of the experts, packed by the backend, with the dropout of these rows.
        scale: factors of the outputs.
    """
    return backend().grouped_ffn(rows, group_sizes, weights, scale)


def whole_tiles(num_rows: int) -> int:
    """R rounded up to whole tiles of the target's kernels."""
    tile = backend().TILE
    return math.ceil(num_rows / tile) * tile
