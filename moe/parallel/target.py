"""Target hardware of the program being traced, and XLA's compiler options for it.

The target is that of the mesh in context, so that programs can be compiled for devices that are absent; without a mesh,
that of the default device. No other module asks for the hardware.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax

from moe.parallel.device_kinds import DeviceKind, device_kind


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
    def kind(self) -> DeviceKind:
        """Rates, memory and abilities of the device."""
        return device_kind(self.device_kind)

    @property
    def compute_capability(self) -> int:
        """Major CUDA compute capability; 0 for unknown devices and for anything but NVIDIA GPUs."""
        if self.platform != "gpu":
            return 0
        device = jax.devices()[0]
        if device.device_kind == self.device_kind:
            major = str(getattr(device, "compute_capability", "")).partition(".")[0]  # AMD's is "gfx90a"
            return int(major) if major.isdigit() else 0
        return self.kind.capability

    @property
    def peak_flops(self) -> float | None:
        """Datasheet FLOP/s of one device in bfloat16, without sparsity; None for CPUs and unknown devices."""
        return self.kind.peak

    @property
    def runs_tpu_kernels(self) -> bool:
        """Whether grouped matmuls in bfloat16, and this project's kernels (:mod:`moe.dispatch.backends.gated`), run on
        it with tiles of our choice: TPUs from v4 on."""
        return self.platform == "tpu" and self.kind.peak is not None and self.kind.runs_kernels

    @property
    def runs_splash_attention(self) -> bool:
        """Whether JAX's attention kernel for TPUs runs on it; v2 and v3 lack its bfloat16 products."""
        return self.platform == "tpu" and self.kind.runs_kernels

    @property
    def kernel_memory(self) -> int:
        """Bytes of vector memory that a kernel on a TPU gets with :func:`compiler_options`."""
        return self.kind.vector_memory * 1024

    @property
    def low_precisions(self) -> tuple[str, ...]:
        """Values of ``model.low_precision`` that make products faster, and on CPUs all of them, for tests; float8 needs
        this project's kernels for Hopper or Blackwell."""
        if self.platform == "cpu":
            return ("int8", "float8", "mxfp8")
        if self.platform == "gpu":
            return ("float8",) if self.compute_capability in (9, 10) and self.num_cores else ()
        return self.kind.low_precisions

    @property
    def has_low_precision_products(self) -> bool:
        """Whether XLA multiplies 8-bit factors without converting them first; not on CPUs."""
        return self.platform != "cpu"

    @property
    def sums_float8_coarsely(self) -> bool:
        """Whether sums of float8 products have, by default, fewer bits than their type: on GPUs."""
        return self.platform == "gpu"

    @property
    def has_ragged_exchange(self) -> bool:
        """Whether XLA has a ragged all-to-all; not on CPUs."""
        return self.platform != "cpu"

    @property
    def has_unwritten_buffers(self) -> bool:
        """Whether XLA can make a buffer without writing to it; not on CPUs."""
        return self.platform != "cpu"

    @property
    def copies_hoisted_buffers(self) -> bool:
        """Whether a buffer that JAX hoists out of a loop is copied, slowly, in every iteration: on TPUs. On GPUs a
        branch, which would prevent it, waits for the host."""
        return self.platform == "tpu"

    @property
    def gathers_ahead(self) -> bool:
        """Whether XLA gathers a layer ahead, and recomputes a layer ahead all that the gathered numbers depend on: on
        GPUs."""
        return self.platform == "gpu"

    @property
    def scatters_in_passes(self) -> bool:
        """Whether a scatter takes passes of its own over the whole array: on GPUs."""
        return self.platform == "gpu"


#: Vector lanes of a TPU; an array's last dimension runs along them, and one that is no multiple leaves some empty.
LANES = 128


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


def is_host(device: Any) -> bool:
    """Whether a device's memory is the host's: a CPU's."""
    return device.platform == "cpu"


def device_memory(device: Any) -> float:
    """Bytes of its memory that a device gives to this process; infinite where it does not say."""
    return (device.memory_stats() or {}).get("bytes_limit", math.inf)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that the memory of the host or of a device is used up."""
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and "RESOURCE_EXHAUSTED" in str(error))


def is_cpu() -> bool:
    """True if the program being traced is for CPUs."""
    return current().platform == "cpu"


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


def compiler_options(name: str, *, stages: int = 1, nested: bool = False) -> dict[str, str | bool | int]:
    """XLA options for a kind of device; none except for TPUs and NVIDIA GPUs.

    Args:
        name: JAX's of the kind.
        stages: of the pipeline.
        nested: the loop over layers is inside the pipeline's loop over turns.

    With its default vector memory, XLA splits a large matmul into windows so small that operands are read, and fused
    inputs computed, several times. Asynchronous exchanges overlap with independent work. docs/log/accelerator_code.md
    has the estimated gains.
    """
    if name.startswith("NVIDIA"):
        return _NVIDIA_OPTIONS | (_NVIDIA_PIPELINE if stages > 1 else {}) | (_NVIDIA_NESTED if nested else {})
    if not name.startswith("TPU"):
        return {}
    kind = device_kind(name)
    options: dict[str, str | bool | int] = {"xla_tpu_enable_async_all_to_all": "true"}
    if kind.sparse_core_exchanges:
        options |= dict.fromkeys(_SPARSE_CORE_EXCHANGES, "true")
    if kind.vector_memory != DeviceKind.vector_memory:  # XLA's default
        options["xla_tpu_scoped_vmem_limit_kib"] = str(kind.vector_memory)
    return options
