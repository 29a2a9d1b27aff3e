"""Times of grouped matmuls, which carry no estimate of the compiler, with intervals that hold 80 %.

A time is the roofline of the chip, max(FLOPs / peak of the factors' type, bytes / bandwidth), over the share of it that
the published timings of that kernel reach (:mod:`moe.planner.measured`): below 1, as is the fast end of its interval.
v5p's timings are those of one of its two TensorCores; a program that splits the columns over both reaches the same
share of both.

Devices without timings (v2 to v4; H200 and GB200), weight gradients on A100, types other than bfloat16, and kernels
that have the nonlinearity in them, for which only its bytes are added, are priced by analogy, with a wider interval,
and marked so. All is for a balanced router.
"""

from __future__ import annotations

import math

from moe.dispatch.backends import tpu_tiles
from moe.planner import measured
from moe.planner.chips import Chip
from moe.planner.gpus import Gpu
from moe.planner.records import GroupedMatmul, Price

#: Kernels of the table, by the names that :class:`moe.planner.records.GroupedMatmul` has for them.
_KERNELS = {
    "mosaic": "pallas_mosaic_gpu_ragged_dot",
    "triton": "pallas_triton_ragged_dot",
    "tpu": "pallas_mosaic_tpu_ragged_dot",
}

#: Measured device that stands for another one, at the same share of the roofline.
_LIKE = {"h200": "h100", "gb200": "b200", "v2": "v5p", "v3": "v5p", "v4": "v5p"}

#: Further width of an interval, in the logit of the share, for a device, type or kind that was not measured: a quarter
#: of the time at a share of one half.
_ANALOGY = 0.5


def price(matmul: GroupedMatmul, rows: int, chip: Chip | Gpu) -> Price:
    """Time of one run over that many filled rows, evenly split over the groups, on one device."""
    rows = max(rows, 1)
    _, k, n, groups = matmul.sizes
    name = chip.name
    kind = "weights" if matmul.kind == "weights" else "rows"
    shares, is_measured = measured.shares(_LIKE.get(name, name), _KERNELS[matmul.kernel], kind, rows, k, n, groups)
    exact = is_measured and name not in _LIKE and matmul.itemsize == 2 and matmul.kind == kind
    widened = zip(shares, (0.0, 0.0, 0.0) if exact else (0.0, _ANALOGY, -_ANALOGY), strict=True)
    limit = roofline(matmul, rows, chip)
    seconds, low, high = (limit / _shifted(share, by) for share, by in widened)
    flops = 2.0 * rows * k * n
    least = flops / (_peak(matmul, chip) / chip.devices)
    return Price(seconds, low, high, "measured" if exact else "by analogy", flops, least)


def _shifted(share: float, by: float) -> float:
    """The share whose logit differs by that much."""
    return share / (share + (1 - share) * math.exp(-by))


def roofline(matmul: GroupedMatmul, rows: int, chip: Chip | Gpu) -> float:
    """Seconds of one run over that many filled rows at peak FLOP/s or at memory bandwidth, the longer."""
    _, k, n, groups = matmul.sizes
    factors = rows * (k + n) if matmul.kind == "weights" else rows * k + min(groups, rows) * k * n
    results = groups * k * n if matmul.kind == "weights" else rows * n * tpu_tiles.RESULTS[matmul.kind]
    moved = matmul.itemsize * factors + max(matmul.itemsize, 2) * results
    return chip.devices * max(2.0 * rows * k * n / _peak(matmul, chip), moved / chip.memory_bandwidth)


def _peak(matmul: GroupedMatmul, chip: Chip | Gpu) -> float:
    """FLOP/s at peak for factors of this size: of one byte, twice those of bfloat16 on all that multiply them."""
    return chip.peak * (2 if matmul.itemsize == 1 else 1)
