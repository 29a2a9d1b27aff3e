"""Time of grouped matmuls' kernels, which carry no estimate of the compiler. Counted, not measured.

On GPUs: their FLOPs at the rate of large matmuls. On TPUs: the longer of the grid's steps at peak FLOP/s, with
one partly filled block of rows a group, and the bytes of the blocks that the grid moves, at the memory's bandwidth.
"""

from __future__ import annotations

import math

from moe.dispatch.ragged_exchange import ROUND_SIZE
from moe.planner.chips import Chip
from moe.planner.gpus import Gpu
from moe.planner.records import GroupedMatmul, Program


def total_seconds(program: Program, flops: float, rows: int, chip: Chip | Gpu, *, exchanged: bool) -> float:
    """Seconds of all grouped matmuls of a program on one device, for a balanced router.

    Args:
        program: read from its text, which describes the kernels of TPUs.
        flops: of one device's kernels, all rows of their buffers (:mod:`moe.planner.arithmetic`); used for GPUs.
        rows: filled rows of a device.
        chip: of the device.
        exchanged: rows are exchanged between devices, in buffers that a balanced router does not fill.
    """
    if isinstance(chip, Gpu):  # the kernels skip rows that are not filled
        return flops / (ROUND_SIZE if exchanged else 1.0) / (chip.peak * chip.matmul_share)
    return sum(matmul.count * seconds(matmul, rows, chip) for matmul in program.grouped)


def seconds(matmul: GroupedMatmul, rows: int, chip: Chip) -> float:
    """Seconds of one run of a TPU kernel over that many filled rows, evenly split over the groups, on one device.

    The grid is (N blocks, row blocks of all groups, K blocks), K innermost; for weights (N, K, row blocks), rows
    innermost. A block is moved when its index changes from one step to the next.
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
        # With all of K in one step, a group's block of the matrix stays for all its row blocks.
        matrices = steps if steps_k > 1 else groups * steps_n
        moved = steps * left + matrices * right + tiles * steps_n * out
    flops = 2.0 * steps * tile_rows * tile_k * tile_n
    return max(flops / chip.peak, matmul.itemsize * moved / chip.memory_bandwidth) * chip.devices
