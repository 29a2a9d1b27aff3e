"""Memory, FLOP/s and bandwidths of TPU generations, with their sources.

Sources: [cloud] the Cloud TPU documentation's page of that generation
(read in 2026: peak, memory, memory bandwidth, bidirectional ICI bandwidth per chip, DCN bandwidth); [v4] Jouppi et al.
2023, "TPU v4: An Optically Reconfigurable Supercomputer", table 4 (links of v3 and v4); [v2] Jouppi et al. 2020, "A
Domain Specific Supercomputer for Training Deep Neural Networks" (v2); [v7] the vendor's announcement of Ironwood, 2025
(memory and ICI bandwidth); [book] Austin et al. 2025, "How to Scale Your Model", part 2 (PCIe).
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from moe.parallel.device_kinds import DEVICE_KINDS
from moe.planner.hardware import Hardware

GiB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip(Hardware):
    """One TPU generation.

    Attributes:
        name: prefix of libtpu's topology names.
        memory: HBM bytes a chip.
        peak: bfloat16 FLOP/s a chip.
        memory_bandwidth: HBM bytes/s a chip.
        link: ICI bytes/s in one direction of one link; a chip has two links per torus dimension.
        wraps_at: a torus dimension closes to a ring if its size is a multiple of this; otherwise it is a line.
        dcn: bytes/s a chip between slices.
        host: bytes/s a chip in one direction to its host's memory; 15 GB/s typically, 32 of v6e [book].
        matmul_share: of the peak; the compiler's cycles say more.
        condition: seconds to evaluate a loop's condition that depends on the data, which a TPU does by itself.
        devices: JAX devices a chip; 2 where each TensorCore is a device of its own.
        cores: TensorCores that share a device.
        grouped_matmul: a grouped matmul costs the FLOPs of its rows, not of all rows for each expert.
        flops_per_cycle: of a chip's matrix units in bfloat16; peak divided by it is the clock.
        example: name of a topology.
        options: further arguments of ``get_topology_desc`` that make devices look as they do on hardware.
        source: of the figures.
    """

    name: str
    memory: int
    peak: float
    memory_bandwidth: float
    link: float
    wraps_at: int
    dcn: float
    devices: int
    flops_per_cycle: int
    example: str
    source: str
    options: tuple[tuple[str, Any], ...] = ()
    host: float = 15e9
    cores: int = 1
    grouped_matmul: bool = True
    matmul_share: float = 1.0
    condition: float = 0.0

    @property
    def estimate(self) -> str:
        """Source of the compiler's estimate of time."""
        return "the compiler's cycles"

    def axis_bandwidth(self, stride: int, size: int) -> float:
        """Bytes/s of a device along a mesh axis of neighbours, whatever its stride: 2 are joined by a link, 4 by a
        ring, which has two, 16 by two rings, and so on as the torus has dimensions."""
        links = min(math.log2(max(size, 2)), 2 * len(self.example.split("x")))
        return links * self.link / self.devices

    @property
    def clock(self) -> float:
        """Hz."""
        return self.peak / self.flops_per_cycle


_MXU = 2 * 128 * 128  # FLOP a cycle of one 128 x 128 matrix unit


def _chip(name: str, kind: str, devices: int = 1, **network: Any) -> Chip:
    """A chip of JAX devices of a kind (:mod:`moe.parallel.device_kinds`), with its memory and network."""
    device = DEVICE_KINDS[kind]
    rates = {"peak": devices * device.known_peak, "memory_bandwidth": devices * device.known_bandwidth}
    return Chip(name, devices=devices, cores=device.cores, grouped_matmul=device.runs_kernels, **rates, **network)


# Where no page gives a DCN figure, v5e's is assumed.
_TABLE = (
    _chip(
        "v2", "TPU v2", 2, memory=16 * GiB, link=62e9, wraps_at=16, dcn=25e9 / 8,
        flops_per_cycle=2 * _MXU, example="v2:16x16", source="[v2]; DCN assumed",
    ),
    _chip(
        "v3", "TPU v3", 2, memory=32 * GiB, link=70e9, wraps_at=32, dcn=25e9 / 8,
        flops_per_cycle=4 * _MXU, example="v3:32x32", source="[cloud], [v4]; DCN assumed",
    ),
    _chip(
        "v4", "TPU v4", memory=32 * GiB, link=50e9, wraps_at=4, dcn=25e9 / 8,
        flops_per_cycle=8 * _MXU, example="v4:4x4x4", source="[cloud], [v4]; DCN assumed",
        options=(("chip_config_name", "megacore"),),
    ),
    _chip(
        "v5e", "TPU v5 lite", memory=16 * GiB, link=50e9, wraps_at=16, dcn=25e9 / 8,
        flops_per_cycle=4 * _MXU, example="v5e:16x16", source="[cloud]: 400 GB/s on 4 ports",
    ),
    _chip(
        "v5p", "TPU v5", memory=95 * GiB, link=100e9, wraps_at=4, dcn=50e9 / 8,
        flops_per_cycle=8 * _MXU, example="v5p:4x4x4", source="[cloud]: 1200 GB/s, 3D torus",
    ),
    _chip(
        "v6e", "TPU v6", memory=32 * GiB, link=100e9, wraps_at=16, dcn=100e9 / 8,
        flops_per_cycle=16 * _MXU, example="v6e:16x16", source="[cloud]: 800 GB/s on 4 ports", host=32e9,
    ),
    _chip(
        "tpu7x", "TPU7", 2, memory=192 * GiB, link=100e9, wraps_at=4, dcn=100e9 / 8,
        flops_per_cycle=32 * _MXU, example="tpu7x:4x4x4", source="[cloud], [v7]",
    ),
)  # fmt: skip

CHIPS: dict[str, Chip] = {chip.name: chip for chip in _TABLE}
