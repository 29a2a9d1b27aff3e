"""What-if settings of a plan, and the interval of its step."""

from __future__ import annotations

import dataclasses

from moe.config import ConfigError
from moe.planner.chips import Chip
from moe.planner.gpus import Gpu


@dataclasses.dataclass(frozen=True)
class Scenario:
    """Assumptions to change.

    Attributes:
        bandwidth: factor of the network's bandwidths.
        matmul_share: share of the chip's peak that matmuls and grouped matmuls reach, instead of the estimates of the
            compiler and of measured kernels; 0: those estimates.
        skew: rows of the busiest device's experts over the mean; the other devices wait for it.
    """

    bandwidth: float = 1.0
    matmul_share: float = 0.0
    skew: float = 1.0

    def __post_init__(self):
        if not self.bandwidth > 0:
            raise ConfigError(f"--bandwidth={self.bandwidth}: must be a positive factor of the network's bandwidths")
        if not 0 <= self.matmul_share <= 1:
            raise ConfigError(f"--matmul_share={self.matmul_share}: must be a share of the peak, between 0 and 1")
        if not self.skew >= 1:
            raise ConfigError(f"--skew={self.skew}: must be the busiest device's rows over the mean, at least 1")

    def applied(self, chip: Chip | Gpu) -> Chip | Gpu:
        """The chip with the scenario's network."""
        names = ("nvlink", "network") if isinstance(chip, Gpu) else ("link", "dcn")
        return dataclasses.replace(chip, **{name: getattr(chip, name) * self.bandwidth for name in names})

    def words(self) -> str:
        """Assumptions in words; "" if nothing is changed."""
        changed = [
            (self.bandwidth != 1, f"{self.bandwidth:g} x the network's bandwidths"),
            (self.matmul_share, f"matmuls at {self.matmul_share:g} of the peak"),
            (self.skew != 1, f"{self.skew:g} x the mean rows on the busiest device's experts"),
        ]
        return ", ".join(words for is_set, words in changed if is_set)
