"""Model of the interconnect: the time of a collective. An estimate.

Only bytes over links count: no latency, no congestion between different exchanges, no protocol overhead. w is a link's
bandwidth in one direction; devices that share a chip share its links evenly.

- A group that spans k of a torus dimension's n chips has a ring there if k = n and the dimension wraps (2w usable),
  else a line (w). If its members are s chips apart, s groups share each link, and each gets 1/s.
- all-gather, reduce-scatter of b bytes over g devices: b·(g−1)/g over the sum of its dimensions' bandwidths; all-reduce
  twice that.
- all-to-all of b bytes a device: the traffic that must cross the middle of each dimension, k·b/(8w) on a ring and
  k·b/(4w) on a line, times s; the slowest dimension decides.
- A permutation to a neighbour: b/w, times s.
- Devices on one chip exchange through its memory. Between slices, every byte that must leave a slice goes at the
  chip's share of the data-center network.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from moe.planner.chips import Chip
from moe.planner.program import Collective


def seconds(collective: Collective, devices: Sequence[Any], chip: Chip) -> float:
    """Duration of one run of a collective.

    Args:
        collective: with its group read.
        devices: the flattened mesh.
        chip: of the devices.
    """
    group = [devices[position] for position in collective.group]
    if len(group) < 2:
        return 0.0
    passes = 2.0 if collective.kind == "all-reduce" else 1.0
    slices = len({getattr(device, "slice_index", 0) for device in group})
    if slices > 1:
        return passes * collective.bytes * (slices - 1) / slices / (chip.dcn / chip.devices)
    coordinates = np.array([device.coords for device in group])
    extent = np.array([device.coords for device in devices]).max(axis=0) + 1
    link = chip.link / chip.devices
    bandwidth, crossing, stride_of_slowest = 0.0, 0.0, 1
    for dimension in range(coordinates.shape[1]):
        places = np.unique(coordinates[:, dimension])
        if len(places) < 2:
            continue
        ring = len(places) == extent[dimension] and extent[dimension] % chip.wraps_at == 0
        stride = int(np.diff(places).min())
        bandwidth += (2 if ring else 1) * link / stride
        crossing = max(crossing, len(places) / (8 if ring else 4) * stride)
        stride_of_slowest = max(stride_of_slowest, stride)
    if bandwidth == 0.0:
        return passes * collective.bytes / chip.memory_bandwidth
    if collective.kind in ("all-to-all", "ragged-all-to-all"):
        return collective.bytes * crossing / link
    if collective.kind == "collective-permute":
        return collective.bytes * stride_of_slowest / link
    return passes * collective.bytes * (len(group) - 1) / len(group) / bandwidth
