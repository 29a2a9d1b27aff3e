"""Model of the interconnect: the time of a collective. An estimate.

Of TPUs:

Only bytes over links count: no latency, no congestion between different exchanges. w is nine tenths of a link's
bandwidth in one direction, the share that exchanges of large arrays reach; devices that share a chip share its links
evenly.

- A group that spans k of a torus dimension's n chips has a ring there if k = n and the dimension wraps (2w usable),
  else a line (w). If its members are s chips apart, s groups share each link, and each gets 1/s.
- all-gather, reduce-scatter of b bytes over g devices: b·(g−1)/g over the sum of its dimensions' bandwidths; all-reduce
  twice that.
- If both devices of a chip are in the group, its links carry what both gather or add once: each has all of w.
- If the compiler states one-way rings that share the bytes evenly, the slowest of them: a ring works in phases, each
  over one dimension of k chips, and passes (k−1) times what a device has so far, at w/s; its last phase passes most.
- all-to-all of b bytes a device: the traffic that must cross the middle of each dimension, k·b/(8w) on a ring and
  k·b/(4w) on a line, times s; the slowest dimension decides.
- A permutation to a neighbour: b/w, times s.
- Devices on one chip exchange through its memory. Between slices, every byte that must leave a slice goes at the
  chip's share of the data-center network.

Of GPUs, with v and w nine tenths of a GPU's bandwidths in one direction of NVLink and of the network between NVLink
domains (hosts, or racks of GB200), for a group of g GPUs in h domains, m = g/h in each:

- all-gather, reduce-scatter of b bytes: the longer of b·(g−1)/g over v and b·(h−1)/h over m·w, because the GPUs of a
  domain fetch different parts from the network and exchange them by NVLink; all-reduce twice that.
- all-to-all of b bytes a device: the longer of b·(m−1)/g over v and b·(g−m)/g over w.
- A permutation: b/w if it leaves a domain, else b/v.

To and from the host's memory: b over the link to the host, for each direction and device apart.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from moe.planner.chips import Chip
from moe.planner.gpus import Gpu
from moe.planner.records import HOST, Collective

#: Share of a link's bandwidth that exchanges of large arrays reach.
USABLE = 0.9


def seconds(collective: Collective, devices: Sequence[Any], chip: Chip | Gpu) -> float:
    """Duration of one run of a collective.

    Args:
        collective: with its group read.
        devices: the flattened mesh.
        chip: of the devices.
    """
    if collective.axes == (HOST,):
        return collective.bytes / (chip.host / chip.devices)
    group = [devices[position] for position in collective.group]
    if len(group) < 2:
        return 0.0
    if isinstance(chip, Gpu):
        return _seconds_of_gpus(collective, group, chip)
    passes = 2.0 if collective.kind == "all-reduce" else 1.0
    slices = _slices(group)
    if slices > 1:
        # A permutation sends all of a device's bytes to one other; the other kinds send each slice its share.
        sent = 1.0 if collective.kind == "collective-permute" else (slices - 1) / slices
        return passes * collective.bytes * sent / (chip.dcn / chip.devices)
    dimensions = _dimensions(group, devices, chip)
    per_chip = len(group) / len({tuple(device.coords) for device in group})
    link = USABLE * chip.link / chip.devices
    if not dimensions:
        return passes * collective.bytes / chip.memory_bandwidth
    if collective.kind in ("all-to-all", "ragged-all-to-all"):
        crossing = max(size / (8 if wraps else 4) * stride for size, stride, wraps in dimensions)
        return collective.bytes * crossing / link
    if collective.kind == "collective-permute":
        return collective.bytes * max(stride for _, stride, _ in dimensions) / link
    link *= per_chip  # the devices of a chip that are in the group receive the same bytes
    size = collective.bytes
    bandwidth = sum((2 if wraps else 1) * link / stride for _, stride, wraps in dimensions)
    by_dimensions = size * (len(group) - 1) / len(group) / bandwidth
    by_rings = [_ring_seconds(phases, collective, dimensions, link) for phases in collective.rings]
    return passes * max([by_dimensions, *by_rings])


def _dimensions(group: Sequence[Any], devices: Sequence[Any], chip: Chip) -> list[tuple[int, int, bool]]:
    """(chips, their distance, whether they form a ring) in each dimension of the torus along which a group extends."""
    coordinates = np.array([device.coords for device in group])
    extent = np.array([device.coords for device in devices]).max(axis=0) + 1
    found = []
    for dimension in range(coordinates.shape[1]):
        places = np.unique(coordinates[:, dimension])
        if len(places) > 1:
            stride = int(np.diff(places).min())
            # A part of a ring whose members are equally far apart all around it is a ring too.
            whole = len(places) * stride == extent[dimension]
            found.append((len(places), stride, whole and extent[dimension] % chip.wraps_at == 0))
    return found


def _ring_seconds(
    phases: tuple[int, ...], collective: Collective, dimensions: list[tuple[int, int, bool]], link: float
) -> float:
    """Seconds of the part of an exchange that one of its rings carries, in phases of these sizes.

    A phase over as many chips as a dimension has is along it, of equal ones first along that of the nearest chips; any
    other phase is as slow as the farthest neighbours.
    """
    strides = sorted((size, stride) for size, stride, _ in dimensions)
    order = phases[::-1] if collective.kind == "reduce-scatter" else phases
    part, time = collective.bytes / len(collective.rings) / math.prod(phases), 0.0
    for size in order:
        along = next((each for each in strides if each[0] == size), None)
        if along:
            strides.remove(along)
        stride = along[1] if along else max(stride for _, stride, _ in dimensions)
        time += (size - 1) * part * stride / link
        part *= size
    return time


def link(collective: Collective, devices: Sequence[Any], chip: Chip | Gpu) -> str:
    """The link that a collective's bytes pass through; those on different links do not wait for one another.

    Each direction to the host's memory, NVLink inside a domain, the network between domains, a slice's torus, and the
    network between slices. A collective over GPUs of several domains counts for the network alone.
    """
    if collective.axes == (HOST,):
        return collective.kind
    group = [devices[position] for position in collective.group]
    if isinstance(chip, Gpu):
        return "network" if _domains(group, chip) > 1 else "NVLink"
    return "network" if _slices(group) > 1 else "torus"


def _domains(group: Sequence[Any], chip: Gpu) -> int:
    return len({device.id // chip.domain for device in group})


def _slices(group: Sequence[Any]) -> int:
    return len({getattr(device, "slice_index", 0) for device in group})


def _seconds_of_gpus(collective: Collective, group: Sequence[Any], chip: Gpu) -> float:
    size, members = collective.bytes / USABLE, len(group)
    domains = _domains(group, chip)
    each = members / domains
    if collective.kind in ("all-to-all", "ragged-all-to-all"):
        return max(size * (each - 1) / members / chip.nvlink, size * (members - each) / members / chip.network)
    if collective.kind == "collective-permute":
        return size / (chip.network if domains > 1 else chip.nvlink)
    passes = 2.0 if collective.kind == "all-reduce" else 1.0
    by_nvlink = size * (members - 1) / members / chip.nvlink if each > 1 else 0.0
    by_network = size * (domains - 1) / domains / (each * chip.network)
    return passes * max(by_nvlink, by_network)
