"""Times of moving rows by index, from published timings, with intervals that hold 80 %.

``row_movement.csv`` has 28 timings of gathers and of sums of gathered rows on H100, v5p, v6e and tpu7x. A time is that
of reading and writing each row once at memory bandwidth, over the share of it that the large gathers reach: fitted as
the mean logit of a device, with the spread within all of them. Small ones have costs of their own and are left out; so
are the sums, which our programs do not run. v6e's are faster than its memory where the source fits a chip's vector
memory, which that of a train step does not: its share is taken as close to 1. Other devices are priced by analogy.
"""

from __future__ import annotations

import csv
import functools
import math
from pathlib import Path

import numpy as np

from moe.planner.kinds import KINDS
from moe.planner.measured import DEVICES
from moe.planner.records import Price

PATH = Path(__file__).with_name("row_movement.csv")

#: Measured device that stands for another one, at the same share of its bandwidth.
_LIKE = {
    **{"v2": "v5p", "v3": "v5p", "v4": "v5p", "v5e": "v5p"},
    **{"a100": "h100", "h200": "h100", "b200": "h100", "gb200": "h100"},
}

#: Bytes read and written from which on a timing counts.
_LARGE = 64 * 10**6

#: Largest share taken as measured.
_LARGEST_SHARE = 0.95

#: Further width of an interval, in the logit of the share, for a device that was not measured.
_ANALOGY = 0.5


def price(name: str) -> Price:
    """Time per second that reading and writing the rows once takes at memory bandwidth.

    Args:
        name: key of :data:`moe.planner.kinds.KINDS`.
    """
    by_device = {device: np.array(logits) for device, logits in _logits().items()}
    deviations = np.concatenate([logits - logits.mean() for logits in by_device.values()])
    spread = math.sqrt(float((deviations**2).sum()) / (len(deviations) - len(by_device)))
    middle = float(by_device[_LIKE.get(name, name)].mean())
    width = 1.4 * spread + (_ANALOGY if name in _LIKE else 0.0)  # Student's t at 0.9, 8 degrees of freedom
    seconds, low, high = (1 + math.exp(-(middle + by)) for by in (0.0, width, -width))
    return Price(seconds, low, high, "by analogy" if name in _LIKE else "measured")


@functools.cache
def _logits() -> dict[str, list[float]]:
    """Logits of the shares of the large gathers, by device."""
    found: dict[str, list[float]] = {}
    with PATH.open() as file:
        table = list(csv.DictReader(line for line in file if not line.startswith("#")))
    for row in table:
        moved = 2 * 2 * int(row["rows"]) * int(row["columns"])
        if row["kind"] == "gather" and moved >= _LARGE:
            name = next(name for name, device in DEVICES.items() if device == row["device"])
            at_bandwidth = moved / KINDS[name].device_bandwidth
            share = min(at_bandwidth / (float(row["milliseconds"]) / 1e3), _LARGEST_SHARE)
            found.setdefault(name, []).append(math.log(share / (1 - share)))
    return found
