"""Target hardware of the program being traced, and XLA's compiler options for it.

The target is that of the mesh in context, so that programs can be compiled for devices that are absent; without a mesh,
that of the default device. No other module asks for the hardware.
"""

from __future__ import annotations

import dataclasses
import math
import types
from collections.abc import Mapping
from typing import Any

import jax


@dataclasses.dataclass(frozen=True)
class Target:
    """Kind of device.

    Attributes:
        platform: "cpu", "tpu" or "gpu".
        device_kind: JAX's name of it, such as "TPU v5" or "NVIDIA H100 80GB HBM3".
        num_cores: number of streaming multiprocessors of a GPU; 0 where JAX does not report it.
    """

    platform: str
    device_kind: str
    num_cores: int = 0

    @property
    def compute_capability(self) -> int:
        """Major CUDA compute capability; 0 for unknown devices and for anything but NVIDIA GPUs."""
        if self.platform != "gpu":
            return 0
        device = jax.devices()[0]
        if device.device_kind == self.device_kind:
            major = str(getattr(device, "compute_capability", "")).partition(".")[0]  # AMD's is "gfx90a"
            return int(major) if major.isdigit() else 0
        return next((major for name, major in _CAPABILITIES.items() if name in self.device_kind), 0)

    @property
    def has_3d_torus(self) -> bool:
        """True for TPUs whose chips form a three-dimensional torus."""
        return self.device_kind in ("TPU v4", "TPU v5", "TPU7x")

    @property
    def peak_flops(self) -> float | None:
        """Datasheet FLOP/s of one device in bfloat16, without sparsity; None for CPUs and unknown devices."""
        return next((peak for name, peak in PEAK_FLOPS.items() if name in self.device_kind), None)

    @property
    def memory_bandwidth(self) -> float | None:
        """Datasheet bytes/s of one device's memory; None for anything but TPUs with grouped matmuls in bfloat16."""
        return next((rate for name, rate in MEMORY_BANDWIDTH.items() if name in self.device_kind), None)

    @property
    def tensor_cores(self) -> int:
        """Number of TensorCores that one TPU device has, which share every kernel."""
        return next((cores for name, cores in TENSOR_CORES.items() if name in self.device_kind), 1)

    @property
    def has_gated_kernels(self) -> bool:
        """Whether this project's kernels for TPUs (:mod:`moe.dispatch.backends.gated`) run on it."""
        return self.platform == "tpu" and self.memory_bandwidth is not None

    @property
    def kernel_memory(self) -> int:
        """Bytes of vector memory that a kernel on a TPU gets with :func:`compiler_options`."""
        kibibytes = (size for kind, size in _SCOPED_VMEM_KIB.items() if self.device_kind.startswith(kind))
        return next(kibibytes, _DEFAULT_VMEM_KIB) * 1024


#: Vector lanes of a TPU; an array's last dimension runs along them, and one that is no multiple leaves some empty.
LANES = 128

#: Datasheet FLOP/s of one JAX device in bfloat16, without sparsity, by a substring of the device kind; the first match
#: counts. Half a chip for TPU v2, v3 and 7x, whose two cores are devices of their own. Sources: the Cloud TPU
#: documentation's page of each generation, and NVIDIA's datasheets (A100 and H100, SXM unless named PCIe; H200; B200).
PEAK_FLOPS: Mapping[str, float] = types.MappingProxyType(
    {
        "TPU v2": 23e12,
        "TPU v3": 61.5e12,
        "TPU v4": 275e12,
        "TPU v5 lite": 197e12,
        "TPU v5": 459e12,
        "TPU v6": 918e12,
        "TPU7": 1153.5e12,
        "A100": 312e12,
        "H100 PCIe": 756e12,
        "H100": 989e12,
        "H200": 989e12,
        "B200": 2250e12,
    }
)

#: Datasheet bytes/s of the memory of one TPU device, from v4 on; half a chip for 7x. Sources as above.
MEMORY_BANDWIDTH: Mapping[str, float] = types.MappingProxyType(
    {"TPU v4": 1200e9, "TPU v5 lite": 819e9, "TPU v5": 2765e9, "TPU v6": 1638e9, "TPU7": 3685e9}
)

#: TensorCores that share one TPU device, where JAX has more than one in a device ("megacore").
TENSOR_CORES: Mapping[str, int] = types.MappingProxyType({"TPU v4": 2, "TPU v5 lite": 1, "TPU v5": 2})

#: Major compute capability by a substring of the device kind, for devices that are absent.
_CAPABILITIES = {"A100": 8, "A30": 8, "A10": 8, "L40": 8, "L4": 8, "H100": 9, "H200": 9, "B200": 10, "B300": 10}


def current() -> Target:
    """Return the target of the program being traced."""
    device = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
    if device is not None:
        return Target(device.platform, device.device_kind, device.num_cores or 0)
    device = jax.devices()[0]
    return Target(device.platform, device.device_kind, getattr(device, "core_count", 0))


def host_device() -> Any:
    """The device whose memory is the host's; this process's first one where JAX_PLATFORMS leaves out the CPU."""
    try:
        return jax.local_devices(backend="cpu")[0]
    except RuntimeError:
        return jax.local_devices()[0]


def device_memory(device: Any) -> float:
    """Bytes of its memory that a device gives to this process; infinite where it does not say."""
    return (device.memory_stats() or {}).get("bytes_limit", math.inf)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that the memory of the host or of a device is used up."""
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and "RESOURCE_EXHAUSTED" in str(error))


def is_cpu() -> bool:
    """True if the program being traced is for CPUs."""
    return current().platform == "cpu"


#: Vector memory of a core that one fusion or kernel may use, KiB, by prefix of the device kind; the first match counts.
_DEFAULT_VMEM_KIB = 16384
_SCOPED_VMEM_KIB = {"TPU v5 lite": 65536, "TPU v5": 32768, "TPU v6": 98304, "TPU7": 49152}


#: Options for all-gathers and reduce-scatters on the SparseCores, beside the work of the TensorCores; without
#: them XLA for v6e writes a reduce-scatter as an all-reduce and a slice. MaxText's recipes for v5p use those for
#: all-gathers (src/maxtext/configs/tpu/v5p). On v7 they are the default.
_SPARSE_CORE_EXCHANGES = (
    "xla_sc_disable_megacore_partitioning",
    "xla_tpu_use_tc_device_shape_on_sc",
    "xla_tpu_enable_sparse_core_collective_offload_all_gather",
    "xla_tpu_enable_sparse_core_collective_offload_2d_all_gather",
    "xla_tpu_enable_sparse_core_collective_offload_reduce_scatter",
    "xla_tpu_enable_sparse_core_collective_offload_nd_reduce_scatter",
)
_KINDS_WITH_SPARSE_CORES = ("TPU v5", "TPU v6 lite")


#: The latency-hiding scheduler, off by default, starts exchanges early; without it programs wait for nearly all.
#: By default it runs one exchange at a time, although NVLink and the network between hosts are separate. Level O1
#: gathers a layer's weights during the work of the layer before. By default the scheduler may plan for 0.95 of 0.8 of a
#: device's memory, and it overestimates what programs need; where it sees too little memory, it starts exchanges late
#: and recomputes.
_NVIDIA_OPTIONS = {
    "xla_gpu_enable_latency_hiding_scheduler": True,
    "xla_gpu_experimental_parallel_collective_overlap_limit": 4,
    "optimization_level": "O1",
    "xla_gpu_memory_limit_slop_factor": 200,
}


#: In a pipeline a turn's exchanges have one layer's work to hide behind, so they start as soon as they can. A loop
#: counts as all exchanges in it: if few were allowed, none could overlap with the experts' further rounds.
_NVIDIA_PIPELINE = {
    "xla_gpu_experimental_collective_start_as_early_as_possible": True,
    "xla_gpu_experimental_parallel_collective_overlap_limit": 64,
}


#: XLA of JAX 0.12 unrolls two iterations of a loop into one, and aborts ("call graph must have been flattened") where
#: that is a loop over layers inside a pipeline's loop over turns.
_NVIDIA_NESTED = {"xla_gpu_enable_while_loop_unrolling": "WHILE_LOOP_UNROLLING_NO_UNROLL"}


def compiler_options(device_kind: str, *, stages: int = 1, nested: bool = False) -> dict[str, str | bool | int]:
    """XLA options for a kind of device, by JAX's name of it; none except for TPUs and NVIDIA GPUs.

    Args:
        stages: of the pipeline.
        nested: the loop over layers is inside the pipeline's loop over turns.

    With its default vector memory, XLA splits a large matmul into windows so small that operands are read, and fused
    inputs computed, several times. Asynchronous exchanges overlap with independent work. docs/log/accelerator_code.md
    has the estimated gains.
    """
    if device_kind.startswith("NVIDIA"):
        return _NVIDIA_OPTIONS | (_NVIDIA_PIPELINE if stages > 1 else {}) | (_NVIDIA_NESTED if nested else {})
    if not device_kind.startswith("TPU"):
        return {}
    options: dict[str, str | bool | int] = {"xla_tpu_enable_async_all_to_all": "true"}
    if device_kind in _KINDS_WITH_SPARSE_CORES:
        options |= dict.fromkeys(_SPARSE_CORE_EXCHANGES, "true")
    for prefix, kibibytes in _SCOPED_VMEM_KIB.items():
        if device_kind.startswith(prefix):
            return options | {"xla_tpu_scoped_vmem_limit_kib": str(kibibytes)}
    return options
