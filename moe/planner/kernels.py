"""How long a grouped matmul takes, whose kernel the compiler gives no cycles. A count, not a measurement.

In: a :class:`moe.planner.hlo.GroupedMatmul` and the rows that it finds. Out: seconds: the longer of its grid's steps at
peak FLOP/s, one partly filled tile of rows for each group included, and of the windows that its grid moves at the
memory's bandwidth. What else may slow a kernel shows in neither.
"""

from __future__ import annotations

import math

from moe.planner.chips import Chip
from moe.planner.hlo import GroupedMatmul


def seconds(matmul: GroupedMatmul, rows: int, chip: Chip) -> float:
    """Seconds of one run of a grouped matmul's kernel over that many rows, groups alike, on one device.

    Its grid is (N tiles, row tiles of all groups, K tiles), K innermost; for weights (N, K, row tiles), rows innermost.
    A window is moved when its place changes from one step to the next.
    """
    _, k, n, groups = matmul.sizes
    tile_rows, tile_k, tile_n = matmul.tiles
    steps_k, steps_n = math.ceil(k / tile_k), math.ceil(n / tile_n)
    tiles = math.ceil(rows / tile_rows) + groups - 1
    steps = tiles * steps_k * steps_n
    left, right, out = tile_rows * tile_k, tile_k * tile_n, tile_rows * tile_n
    if matmul.kind == "weights":
        left, right, out = tile_rows * tile_k, tile_rows * tile_n, tile_k * tile_n
        moved = steps * (left + right) + groups * steps_k * steps_n * out
    else:
        # With all of K in one step, a group's window of the matrix stays for all its row tiles.
        matrices = steps if steps_k > 1 else groups * steps_n
        moved = steps * left + matrices * right + tiles * steps_n * out
    flops = 2.0 * steps * tile_rows * tile_k * tile_n
    return max(flops / chip.peak, matmul.itemsize * moved / chip.memory_bandwidth) * chip.devices
