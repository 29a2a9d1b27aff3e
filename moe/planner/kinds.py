"""All chips and GPUs that can be planned for, by name."""

from __future__ import annotations

from moe.planner.chips import CHIPS, Chip
from moe.planner.gpus import GPUS, Gpu

KINDS: dict[str, Chip | Gpu] = {**CHIPS, **GPUS}


def kind_of(topology: str) -> str:
    """Key of :data:`KINDS` in the name of a slice: "v5p" of "v5p:4x4x4" and of "2 x v5p:4x4x4"."""
    return topology.rpartition(" x ")[2].partition(":")[0]
