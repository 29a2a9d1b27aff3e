"""Processor time of a train step of each arm, measured in turns on one machine, in a file beside a suite's records."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import pydantic

from moe.system.atomic_files import write_atomic
from moe.system.foreign_files import Positive, read_json

FILE = "step_seconds.json"


@dataclasses.dataclass(frozen=True)
class StepSeconds:
    """Processor seconds of a train step, summed over threads.

    Attributes:
        arms: name → quantiles 0.1, 0.5 and 0.9 over the measured steps.
        steps: number of measured steps of each arm.
        hardware: devices and cores.
        commit: commit of the source.
    """

    arms: Mapping[str, tuple[Positive, Positive, Positive]]
    steps: int
    hardware: str
    commit: str

    def write(self, directory: Path) -> None:
        """Write to a suite's folder."""
        directory.mkdir(parents=True, exist_ok=True)
        write_atomic(directory / FILE, _SCHEMA.dump_json(self, indent=2) + b"\n")


_SCHEMA = pydantic.TypeAdapter(StepSeconds)


def read(directory: Path) -> StepSeconds | None:
    """Read the measurement in a suite's folder; None without one. Raises ConfigError if the file is not one."""
    path = directory / FILE
    return read_json(path, _SCHEMA) if path.exists() else None
