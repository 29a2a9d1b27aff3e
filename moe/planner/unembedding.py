"""Shares of the peak that the cross-entropy under an unembedding reaches, from published timings.

``unembedding.csv`` has 304 timings of it on H100, v5p, v6e and tpu7x, each the best of several implementations. The
exponentials, sums and logits in memory that come with its matmuls keep all of them below the peak: .92 of it on v5p,
.71 on v6e and tpu7x, .63 on H100. The compiler's estimate of our matmuls is shorter than that on some chips and then
replaced. Other devices have the share of one of these.
"""

from __future__ import annotations

import csv
import functools
import math
from pathlib import Path

from moe.planner.kinds import KINDS
from moe.planner.measured import DEVICES

PATH = Path(__file__).with_name("unembedding.csv")

#: Measured device that stands for another one.
_LIKE = {
    **{"v2": "v5p", "v3": "v5p", "v4": "v5p", "v5e": "v5p"},
    **{"a100": "h100", "h200": "h100", "b200": "h100", "gb200": "h100"},
}

_MATMULS = {"forward": 1, "backward": 3}


def share(name: str) -> float:
    """Share of the peak, FLOPs of forward and backward pass together over their time.

    Args:
        name: key of :data:`moe.planner.kinds.KINDS`.
    """
    forward, backward = (_share(_LIKE.get(name, name), kind) for kind in _MATMULS)
    return 4 / (1 / forward + 3 / backward)


@functools.cache
def _share(name: str, kind: str) -> float:
    """Geometric mean of a device's timings of a pass."""
    logs = []
    with PATH.open() as file:
        for row in csv.DictReader(line for line in file if not line.startswith("#")):
            if (row["device"], row["kind"]) == (DEVICES[name], kind):
                flops = 2.0 * _MATMULS[kind] * int(row["rows"]) * int(row["columns"]) * int(row["vocabulary"])
                logs.append(math.log(flops / (float(row["milliseconds"]) / 1e3) / KINDS[name].device_peak))
    return math.exp(sum(logs) / len(logs))
