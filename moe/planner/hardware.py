"""Rates of one JAX device of a chip or GPU."""

from __future__ import annotations


class Hardware:
    """Base of the tables' entries (:class:`moe.planner.chips.Chip`, :class:`moe.planner.gpus.Gpu`).

    Attributes:
        name: key of the table, such as "v5p" or "h100".
        memory: bytes a chip.
        peak: bfloat16 FLOP/s a chip.
        memory_bandwidth: bytes/s a chip.
        devices: JAX devices a chip.
    """

    name: str
    memory: int
    peak: float
    memory_bandwidth: float
    devices: int

    @property
    def device_memory(self) -> int:
        """Bytes of one device."""
        return self.memory // self.devices

    @property
    def device_peak(self) -> float:
        """bfloat16 FLOP/s of one device."""
        return self.peak / self.devices

    @property
    def device_bandwidth(self) -> float:
        """Bytes/s of one device's memory."""
        return self.memory_bandwidth / self.devices
