"""Times of kernels, which carry no estimate of the compiler, with intervals that hold 80 %.

Grouped matmuls on GPUs: by the published timings of the kernel that the program runs (:mod:`moe.planner.measured`). On
TPUs: the program's own tiles by a formula, the longer of the grid's steps at peak FLOP/s, with one partly filled block
of rows a group, and the bytes of the blocks that the grid moves, at the memory's bandwidth; times a constant for each
generation and kind of product, the median of measured over predicted time of the published timings. Matrices whose
sides are no multiple of 256 (gpt-oss: 2880) are slower than that and taken from the timings themselves. v5p's timings
of that kernel cluster just below half of the chip's peak, where other kernels reach 0.9 of it: they are taken as those
of one of its two TensorCores.

Devices without timings (v2 to v4; H200 and GB200; weight gradients on A100), types other than bfloat16, and kernels
that have the nonlinearity in them, for which nothing is added, are priced by analogy, with a wider interval, and marked
so. All is for a balanced router.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math

import numpy as np

from moe.config import ConfigError
from moe.dispatch.backends import tpu_tiles
from moe.planner import measured
from moe.planner.chips import CHIPS, Chip
from moe.planner.gpus import GPUS, Gpu
from moe.planner.records import GroupedMatmul, Price

#: Kernels of GPUs, by the names that :class:`moe.planner.records.GroupedMatmul` has for them.
_GPU_KERNELS = {"mosaic": "pallas_mosaic_gpu_ragged_dot", "triton": "pallas_triton_ragged_dot"}

#: Measured device that stands for another one, at the same share of the roofline.
_LIKE = {"h200": "h100", "gb200": "b200"}

_TPU_KERNEL = "pallas_mosaic_tpu_ragged_dot"
_GENERATIONS = "v5e", "v5p", "v6e", "tpu7x"  # that were measured
_CORES_IN_USE = {"v5p": 0.5}  # share of the chip in its timings

#: Further width of an interval, in the logarithm, for a device or kind that was not measured.
_ANALOGY = 0.25


def price(matmul: GroupedMatmul, rows: int, chip: Chip | Gpu) -> Price:
    """Time of one run over that many filled rows, evenly split over the groups, on one device."""
    _, k, n, _ = matmul.sizes
    made = _gpu_price(matmul, rows, chip) if isinstance(chip, Gpu) else _tpu_price(matmul, rows, chip)
    return dataclasses.replace(made, flops=2.0 * rows * k * n)


def _tpu_price(matmul: GroupedMatmul, rows: int, chip: Chip) -> Price:
    name = next((name for name in _GENERATIONS if CHIPS[name].peak == chip.peak), "")
    _, k, n, _ = matmul.sizes
    kind: tpu_tiles.Kind = "weights" if matmul.kind == "weights" else "rows"  # that was measured
    width = 0.0 if name and matmul.itemsize == 2 and matmul.kind == kind else _ANALOGY
    if name and matmul.itemsize == 2 and (k % 256 or n % 256):
        # Blocks that are partly filled cost more than the formula says.
        return _measured_tpu_price(matmul, kind, rows, name, width)
    factor, constant_width = _constant(name, kind)
    basis = "by analogy" if width else "formula x constant"
    return _around(factor * formula(matmul, rows, chip), constant_width + width, basis)


def _measured_tpu_price(matmul: GroupedMatmul, kind: str, rows: int, name: str, width: float) -> Price:
    _, k, n, groups = matmul.sizes
    prices = measured.price(name, _TPU_KERNEL, kind, rows, k, n, groups)
    seconds, low, high = (_CORES_IN_USE.get(name, 1.0) * each for each in prices)
    return Price(seconds, low * math.exp(-width), high * math.exp(width), "by analogy" if width else "measured")


def _around(seconds: float, width: float, basis: str) -> Price:
    return Price(seconds, seconds * math.exp(-width), seconds * math.exp(width), basis)


def _gpu_price(matmul: GroupedMatmul, rows: int, chip: Gpu) -> Price:
    name = next(name for name, gpu in GPUS.items() if (gpu.peak, gpu.memory) == (chip.peak, chip.memory))
    device, kernel = _LIKE.get(name, name), _GPU_KERNELS[matmul.kernel]
    _, k, n, groups = matmul.sizes
    rows = max(rows, 1)
    kind, extra = matmul.kind, _ANALOGY if device != name or matmul.itemsize != 2 else 0.0
    try:
        seconds, low, high = measured.price(device, kernel, kind, rows, k, n, groups)
    except ConfigError:  # this kind was not measured: at the share of the roofline of the other
        kind, extra = "rows", _ANALOGY
        seconds, low, high = measured.price(device, kernel, kind, rows, k, n, groups)
    kind = measured.FORWARD if kind == "rows" else measured.WEIGHTS
    seconds_at_limits = measured.roofline(device, kind, rows, k, n, groups)
    matrices = groups if kind == measured.WEIGHTS else min(groups, rows)
    flops, moved = 2.0 * rows * k * n, matmul.itemsize * (rows * (k + n) + matrices * k * n)
    share = max(flops / _peak(matmul, chip), moved / chip.memory_bandwidth) / seconds_at_limits
    wider = math.exp(extra)
    return Price(seconds * share, low * share / wider, high * share * wider, "by analogy" if extra else "measured")


def formula(matmul: GroupedMatmul, rows: int, chip: Chip) -> float:
    """Seconds of one run of a TPU kernel, counted (:func:`moe.dispatch.backends.tpu_tiles.grid_work`)."""
    _, k, n, groups = matmul.sizes
    _, flops, moved = tpu_tiles.grid_work(matmul.kind, rows, (groups, k, n), matmul.tiles, chip.cores, matmul.itemsize)
    return max(flops / _peak(matmul, chip), matmul.itemsize * moved / chip.memory_bandwidth) * chip.devices


def _peak(matmul: GroupedMatmul, chip: Chip | Gpu) -> float:
    """FLOP/s at peak for factors of this size: of one byte, twice those of bfloat16 on all that multiply them."""
    return chip.peak * (2 if matmul.itemsize == 1 else 1)


@functools.cache
def _constant(name: str, kind: tpu_tiles.Kind) -> tuple[float, float]:
    """(factor of the formula, width in the logarithm that holds 80 %); "": of generations that were not measured."""
    logs = np.concatenate([ratios(each, kind) for each in ([name] if name else _GENERATIONS)])
    middle = float(np.median(logs))
    level = min(0.8 * (len(logs) + 1) / len(logs), 1.0)
    return math.exp(middle), float(np.quantile(np.abs(logs - middle), level))


def ratios(name: str, kind: tpu_tiles.Kind) -> np.ndarray:
    """Logarithms of measured time over the formula's at its best tiles, of shapes with 64 rows an expert or more.

    The measured kernels had the best of many tiles too, and one core (:data:`_CORES_IN_USE`).
    """
    chip, logs = dataclasses.replace(CHIPS[name], cores=1), []
    for timing in measured.timings():
        if (timing.device, timing.kernel) != (measured.DEVICES[name], _TPU_KERNEL):
            continue
        if timing.rows >= 64 * timing.experts and (timing.kind == measured.WEIGHTS) == (kind == "weights"):
            sizes = timing.rows, timing.K, timing.N, timing.experts
            tried = (GroupedMatmul(kind, sizes, tiles, 2, 1) for tiles in _TILES if _fits(tiles))
            seconds = min(formula(matmul, timing.rows, chip) for matmul in tried)
            logs.append(math.log(timing.seconds * _CORES_IN_USE.get(name, 1.0) / seconds))
    return np.array(logs)


#: Tiles (rows, K, N) to choose from.
_TILES = tuple(itertools.product((128, 256, 512, 1024), (512, 1024, 2048), (512, 1024, 2048)))


def _fits(tiles: tuple[int, int, int]) -> bool:
    """Whether two blocks of each bfloat16 operand and of the result, and float32 sums, take at most 16 MiB."""
    rows, k, n = tiles
    return 4 * (rows * k + k * n + rows * n) + 4 * rows * n <= 16 * 2**20
