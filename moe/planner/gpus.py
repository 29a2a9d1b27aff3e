"""Memory, FLOP/s and bandwidths of GPUs and of the machines that hold them, with their sources.

Sources: [A100] NVIDIA A100 80GB SXM and DGX A100 datasheets (HDR InfiniBand, 200 Gb/s a GPU); [H100] NVIDIA H100 SXM
and DGX H100 datasheets (NDR, 400 Gb/s a GPU); [H200] NVIDIA H200 and DGX H200 datasheets; [B200] NVIDIA DGX B200
datasheet; [NVL72] NVIDIA GB200 NVL72 datasheet; [gcp] Google Cloud's page on GPU machine types; [aws] the pages of
EC2 P4, P5 and P6 instances; [azure] the page of the ND H100 v5 series. Peaks are of dense bfloat16 matmuls.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from moe.parallel.device_kinds import DEVICE_KINDS
from moe.planner.hardware import Hardware

TARGETS = Path(__file__).parent / "targets"


@dataclasses.dataclass(frozen=True)
class Gpu(Hardware):
    """One kind of GPU, in machines of its vendor.

    Attributes:
        name: "a100", "h100", ...
        memory: bytes.
        peak: dense bfloat16 FLOP/s.
        memory_bandwidth: bytes/s.
        nvlink: bytes/s in one direction between GPUs of an NVLink domain.
        network: bytes/s in one direction of a GPU's share of the network between NVLink domains.
        host: bytes/s in one direction to the host's memory: PCIe 4.0 or 5.0 x16, or half of a GB200's NVLink-C2C.
        domain: GPUs of a full NVLink domain; a host is a domain if it has fewer in all.
        source: of the figures.
        matmuls: source of XLA's rates of matmuls.
        matmul_share: those rates over the peak.
        grouped_matmul: a grouped matmul costs the FLOPs of its rows, not of all rows for each expert.
        devices: JAX devices of a GPU.
        clock: Hz of the compiler's estimates, which are in microseconds.
        condition: seconds that a loop's condition takes if it depends on the data: the host waits for its copy and then
            launches the next kernel (assumed).
    """

    name: str
    memory: int
    peak: float
    memory_bandwidth: float
    nvlink: float
    network: float
    domain: int
    source: str
    matmuls: str
    matmul_share: float
    host: float = 64e9
    grouped_matmul: bool = True
    devices: int = 1
    clock: float = 1e6
    condition: float = 20e-6

    @property
    def estimate(self) -> str:
        """Source of the compiler's estimate of time."""
        return f"XLA's cost model, matmuls at {self.matmuls}"

    def axis_bandwidth(self, stride: int, size: int) -> float:
        """Bytes/s of a device along a mesh axis with that distance between its members."""
        return self.nvlink if stride * size <= self.domain else self.network


#: XLA's TFLOP/s in bfloat16 over the peak.
_H100, _B200 = 780 / 989, 1417 / 2250


def _gpu(
    name: str, kind: str, memory: int, nvlink: float, source: str, matmuls: str, matmul_share: float, **more: Any
) -> Gpu:
    """A GPU of a kind (:mod:`moe.parallel.device_kinds`), with its memory and network; hosts of eight on 400 Gb/s each,
    unless ``more`` says otherwise."""
    device = DEVICE_KINDS[kind]
    rates = {"peak": device.known_peak, "memory_bandwidth": device.known_bandwidth}
    more = {"network": 50e9, "domain": 8, **more}
    return Gpu(name, memory, nvlink=nvlink, source=source, matmuls=matmuls, matmul_share=matmul_share, **rates, **more)


_TABLE = (
    _gpu("a100", "A100", 85_100_068_864, 300e9, "[A100]", "0.8 of the peak (assumed)", 0.8, network=25e9, host=32e9),
    _gpu("h100", "H100", 84_942_979_072, 450e9, "[H100]", "rates measured on H100", _H100),
    _gpu("h200", "H200", 151_397_597_184, 450e9, "[H200]", "rates measured on H100", _H100),
    _gpu("b200", "B200", 191_514_411_008, 900e9, "[B200]", "rates measured on B200", _B200),
    _gpu("gb200", "GB200", 197_897_748_480, 900e9, "[NVL72]", "rates measured on B200", _B200, domain=72, host=225e9),
)

GPUS: dict[str, Gpu] = {gpu.name: gpu for gpu in _TABLE}


@dataclasses.dataclass(frozen=True)
class Machine:
    """A cloud's machine type.

    Attributes:
        gpu: key of :data:`GPUS`.
        count: GPUs a machine.
        network: bytes/s in one direction of a GPU's share of the machine's network.
        source: of the figures.
    """

    gpu: str
    count: int
    network: float
    source: str


MACHINES: dict[str, Machine] = {
    "a2-ultragpu-8g": Machine("a100", 8, 100e9 / 8 / 8, "[gcp] 100 Gb/s a machine"),
    "a3-highgpu-8g": Machine("h100", 8, 800e9 / 8 / 8, "[gcp] 4 x 200 Gb/s for GPUs"),
    "a3-megagpu-8g": Machine("h100", 8, 1600e9 / 8 / 8, "[gcp] 8 x 200 Gb/s for GPUs"),
    "a3-ultragpu-8g": Machine("h200", 8, 3200e9 / 8 / 8, "[gcp] 8 x 400 Gb/s for GPUs"),
    "a4-highgpu-8g": Machine("b200", 8, 3200e9 / 8 / 8, "[gcp] 8 x 400 Gb/s for GPUs"),
    "a4x-highgpu-4g": Machine("gb200", 4, 1600e9 / 8 / 4, "[gcp] 4 x 400 Gb/s for GPUs"),
    "p4de.24xlarge": Machine("a100", 8, 400e9 / 8 / 8, "[aws] 400 Gb/s a machine"),
    "p5.48xlarge": Machine("h100", 8, 3200e9 / 8 / 8, "[aws] 3200 Gb/s a machine"),
    "p5en.48xlarge": Machine("h200", 8, 3200e9 / 8 / 8, "[aws] 3200 Gb/s a machine"),
    "p6-b200.48xlarge": Machine("b200", 8, 3200e9 / 8 / 8, "[aws] 3200 Gb/s a machine"),
    "nd96isr-h100-v5": Machine("h100", 8, 3200e9 / 8 / 8, "[azure] 400 Gb/s a GPU"),
}


def target_config(gpu: str) -> str:
    """The compile target of a GPU, a stream_executor.GpuTargetConfigProto as text."""
    return (TARGETS / f"{gpu}.textproto").read_text()


def compiler_options(gpu: str) -> dict[str, str | bool]:
    """Options that make XLA state the estimated time of each fusion."""
    options: dict[str, str | bool] = {"xla_gpu_collect_cost_model_stats": True}
    if gpu == "a100":  # XLA has no measured tables of it and does not compile without
        options["xla_gpu_experimental_matmul_perf_table_path"] = str(TARGETS / "a100_matmuls.textproto")
        options["xla_gpu_experimental_collective_perf_table_path"] = str(TARGETS / "a100_collectives.textproto")
    return options
