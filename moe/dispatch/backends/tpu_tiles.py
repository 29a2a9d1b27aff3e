"""Tiles of grouped matmuls on TPUs, by a count of the work that a kernel's grid does with them."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from typing import Literal

from moe.parallel import target

#: "rows": rows [R,K] times matrices; "weights": gradients of these; "activated" and "gradients": rows times matrices
#: with the nonlinearity of a gated FFN or its gradient in the kernel (:mod:`moe.dispatch.backends.gated`).
Kind = Literal["rows", "weights", "activated", "gradients"]

#: Rows, K and N.
Tiles = tuple[int, int, int]

#: Rows in the smallest tile of accelerators' kernels. With R not a multiple of it, TPUs' ``lax.ragged_dot`` uses tiles
#: of 8 rows (8200 rows) or, where 8 does not divide R, a dense matmul with E times the work (libtpu 0.0.50.1).
TILE = 128

#: Numbers that a kernel reads or writes for each of its products, beside its factors: with the nonlinearity a pair of
#: products and one hidden activation; with its gradient a pair of products, their gradients and the activation.
RESULTS: dict[Kind, float] = {"rows": 1, "weights": 1, "activated": 1.5, "gradients": 5}

#: Kinds whose tiles hold all of K: the compiler then computes the nonlinearity beside the matmul of the same step.
_WHOLE: tuple[Kind, ...] = ("activated", "gradients")

#: Seconds that a step of a kernel's grid takes beside its work. With it the count below is closer to 152 published
#: times of such kernels on v5e, v5p, v6e and tpu7x than without (docs/log/accelerator_code.md).
_STEP_SECONDS = 0.35e-6

#: Bytes of a kernel's vector memory that its tiles leave, and the most that they take: larger ones gain little, and XLA
#: takes a minute to compile them.
_OTHER_MEMORY, _LARGEST_TILES = 4 * 2**20, 28 * 2**20

#: Sides of tiles of rows; K and N are split into equal parts of whole lanes.
_TILE_ROWS = (128, 256, 512, 1024)
_LONGEST_SIDE = 4096

#: Bytes of a bfloat16 number.
_ITEM = 2


@dataclasses.dataclass(frozen=True)
class Device:
    """Rates and memory of the device that a kernel runs on.

    Attributes:
        peak: FLOP/s in bfloat16.
        bandwidth: of the memory, bytes/s.
        memory: bytes of vector memory that tiles may take.
        cores: that share a kernel; each has its own blocks of N.
    """

    peak: float
    bandwidth: float
    memory: int
    cores: int = 1

    @classmethod
    def current(cls) -> Device | None:
        """The target of the program being traced; None for v2 and v3, whose matrix units lack XLA's kernel."""
        device, kind = target.current(), target.current().kind
        if not device.runs_tpu_kernels:
            return None
        memory = min(device.kernel_memory - _OTHER_MEMORY, _LARGEST_TILES)
        return cls(kind.known_peak, kind.known_bandwidth, memory, kind.cores)


@functools.lru_cache
def fastest_tiles(
    kind: Kind, num_rows: int, matrices: tuple[int, ...], device: Device, item: int = _ITEM
) -> Tiles | None:
    """Tiles for which a kernel's count of its work takes least time, of those that fit its memory; None: none fit.

    XLA's own tiles read rows or matrices from memory so often that some kernels would take two to seven times as long
    as their FLOPs at peak.

    Args:
        num_rows: R.
        matrices: their shape, [E,K,N].
        item: bytes of a number in the factors.
    """
    _, contracted, columns = matrices

    def seconds(tiles: Tiles) -> float:
        steps, flops, moved = grid_work(kind, num_rows, matrices, tiles, device.cores, item)
        work = max(flops * item / (_ITEM * device.peak), item * moved / device.bandwidth)
        return work + steps / device.cores * _STEP_SECONDS

    row_sides = [side for side in _TILE_ROWS if num_rows % side == 0]
    of_k = [contracted] if kind in _WHOLE else _parts(contracted, target.LANES)
    if item < _ITEM:  # our kernel's blocks of K are whole (moe.dispatch.backends.tpu_kernel)
        of_k = [contracted, *(length for length in of_k if contracted % length == 0)]
    of_n = _parts(columns, 2 * target.LANES if kind == "activated" else target.LANES)
    fitting = (
        tiles for tiles in itertools.product(row_sides, of_k, of_n) if _memory(kind, tiles, item) <= device.memory
    )
    return min(fitting, key=seconds, default=None)


def grid_work(
    kind: Kind, num_rows: int, matrices: tuple[int, ...], tiles: Tiles, cores: int = 1, item: int = _ITEM
) -> tuple[int, float, float]:
    """Steps of a kernel's grid, FLOPs, and numbers of ``item`` bytes, as the factors have, moved between memories, for
    groups of equal size.

    The grid is (N blocks, row blocks of all groups, K blocks), K innermost; for weights (N, K, row blocks), rows
    innermost. A group begins in a block that it shares with the one before. A block is moved when its index changes
    from one step to the next. Blocks of N are split over the cores: what one core does while another has none left is
    counted as if that one did it too.
    """
    (num_groups, contracted, columns), (tile_rows, tile_k, tile_n) = matrices, tiles
    steps_k, steps_n = math.ceil(contracted / tile_k), math.ceil(columns / tile_n / cores) * cores
    row_blocks = math.ceil(num_rows / tile_rows) + num_groups - 1
    steps = row_blocks * steps_k * steps_n
    if kind == "weights":
        moved = steps * tile_rows * (tile_k + tile_n) + num_groups * steps_k * steps_n * tile_k * tile_n
    else:
        # With all of K in one step, a group's block of the matrix stays for all its row blocks.
        of_matrices = steps if steps_k > 1 else num_groups * steps_n
        results = _of_factors(kind, item) * row_blocks * steps_n * tile_rows * tile_n
        moved = steps * tile_rows * tile_k + of_matrices * tile_k * tile_n + results
    return steps, 2.0 * steps * tile_rows * tile_k * tile_n, moved


def _memory(kind: Kind, tiles: Tiles, item: int) -> float:
    """Bytes of both factors and the results, two of each for transfers beside the work, and of a float32 sum; for
    weights also of what is added to it, as XLA allocates for some tiles."""
    tile_rows, tile_k, tile_n = tiles
    left = tile_rows * tile_k
    right = tile_k * tile_n
    out = tile_rows * tile_n
    moved = 2 * item * (left + right + _of_factors(kind, item) * out)
    return moved + (8 * right if kind == "weights" else 4 * out)


def _of_factors(kind: Kind, item: int) -> float:
    """Results, in numbers of ``item`` bytes: quantised factors have results in bfloat16."""
    return RESULTS[kind] * max(1.0, _ITEM / item)


def _parts(size: int, unit: int) -> list[int]:
    """Lengths of the equal parts, in whole units, that a dimension can be split into."""
    lengths = {math.ceil(size / parts / unit) * unit for parts in range(1, math.ceil(size / unit) + 1)}
    return sorted(length for length in lengths if length <= _LONGEST_SIDE)
