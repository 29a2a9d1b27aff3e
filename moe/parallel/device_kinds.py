"""Kinds of accelerators: rates, memory and abilities of one JAX device.

Half a chip for TPU v2, v3 and 7x, whose two cores are devices of their own. Sources: the Cloud TPU documentation's page
of each generation, and NVIDIA's datasheets (A100 and H100, SXM unless named PCIe; H200; B200; GB200).
"""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Mapping


@dataclasses.dataclass(frozen=True, kw_only=True)
class DeviceKind:
    """One kind of accelerator.

    Attributes:
        peak: datasheet FLOP/s in bfloat16, without sparsity; None: unknown.
        bandwidth: datasheet bytes/s of its memory; None: unknown.
        cores: TensorCores that share the device and every kernel on it ("megacore").
        runs_kernels: a TPU whose matrix units multiply bfloat16 in Pallas kernels.
        vector_memory: KiB of a TPU core's vector memory that one fusion or kernel may use.
        sparse_core_exchanges: all-gathers and reduce-scatters of a TPU run on its SparseCores only where options ask.
        has_3d_torus: TPU chips form a three-dimensional torus.
        capability: major CUDA compute capability; 0: not an NVIDIA GPU.
        low_precisions: values of ``model.low_precision`` that a TPU's matrix units multiply; libtpu converts others to
            float32 first.
    """

    peak: float | None = None
    bandwidth: float | None = None
    cores: int = 1
    runs_kernels: bool = True
    vector_memory: int = 16384
    sparse_core_exchanges: bool = False
    has_3d_torus: bool = False
    capability: int = 0
    low_precisions: tuple[str, ...] = ()

    @property
    def known_peak(self) -> float:
        """``peak`` of a kind that has one."""
        assert self.peak is not None
        return self.peak

    @property
    def known_bandwidth(self) -> float:
        """``bandwidth`` of a kind that has one."""
        assert self.bandwidth is not None
        return self.bandwidth


_V5E = DeviceKind(peak=197e12, bandwidth=819e9, vector_memory=65536, low_precisions=("int8",))

#: By a part of JAX's name of the kind, such as "TPU v5 lite" or "NVIDIA H100 80GB HBM3"; the first match counts.
DEVICE_KINDS: Mapping[str, DeviceKind] = types.MappingProxyType(
    {
        "TPU v2": DeviceKind(peak=23e12, bandwidth=350e9, runs_kernels=False),
        "TPU v3": DeviceKind(peak=61.5e12, bandwidth=450e9, runs_kernels=False),
        "TPU v4": DeviceKind(peak=275e12, bandwidth=1200e9, cores=2, has_3d_torus=True),
        "TPU v5 lite": _V5E,
        "TPU v5e": _V5E,
        "TPU v5": DeviceKind(
            peak=459e12,
            bandwidth=2765e9,
            cores=2,
            vector_memory=32768,
            sparse_core_exchanges=True,
            has_3d_torus=True,
            low_precisions=("int8",),
        ),
        "TPU v6": DeviceKind(
            peak=918e12,
            bandwidth=1638e9,
            vector_memory=98304,
            sparse_core_exchanges=True,
            low_precisions=("int8",),
        ),
        "TPU7": DeviceKind(
            peak=1153.5e12, bandwidth=3685e9, vector_memory=49152, has_3d_torus=True, low_precisions=("float8",)
        ),
        "A100": DeviceKind(peak=312e12, bandwidth=2039e9, capability=8),
        "A30": DeviceKind(capability=8),
        "A10": DeviceKind(capability=8),
        "L40": DeviceKind(capability=8),
        "L4": DeviceKind(capability=8),
        "H100 PCIe": DeviceKind(peak=756e12, capability=9),
        "H100": DeviceKind(peak=989e12, bandwidth=3352e9, capability=9),
        "H200": DeviceKind(peak=989e12, bandwidth=4800e9, capability=9),
        "GB200": DeviceKind(peak=2500e12, bandwidth=7900e9, capability=10),
        "B200": DeviceKind(peak=2250e12, bandwidth=7700e9, capability=10),
        "B300": DeviceKind(capability=10),
    }
)

_UNKNOWN = DeviceKind()


def device_kind(name: str) -> DeviceKind:
    """The kind of a device by JAX's name of it; one without rates for CPUs and unknown devices."""
    return next((kind for part, kind in DEVICE_KINDS.items() if part in name), _UNKNOWN)
