"""The hardware that the program being traced is for: the one place that asks.

The mesh in context says it, so that a program can be compiled for devices that are absent; without a mesh, the default
device does.
"""

from __future__ import annotations

import dataclasses

import jax


@dataclasses.dataclass(frozen=True)
class Target:
    """A kind of device.

    Attributes:
        platform: "cpu", "tpu" or "gpu".
        device_kind: name as JAX gives it, such as "TPU v5" or "NVIDIA H100 80GB HBM3".
    """

    platform: str
    device_kind: str

    @property
    def compute_capability(self) -> int:
        """Major CUDA compute capability, 0 where the device is no NVIDIA GPU or is unknown."""
        if self.platform != "gpu":
            return 0
        device = jax.devices()[0]
        if device.device_kind == self.device_kind:
            major = str(getattr(device, "compute_capability", "")).partition(".")[0]  # AMD's is "gfx90a"
            return int(major) if major.isdigit() else 0
        return next((major for name, major in _CAPABILITIES.items() if name in self.device_kind), 0)


#: Major compute capability by a part of the device kind, for devices that are absent.
_CAPABILITIES = {"A100": 8, "H100": 9, "H200": 9, "B200": 10}


def current() -> Target:
    """The target of the program being traced."""
    device = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None) or jax.devices()[0]
    return Target(device.platform, device.device_kind)


def is_cpu() -> bool:
    """Whether the program being traced is for CPUs."""
    return current().platform == "cpu"
