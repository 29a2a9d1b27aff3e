"""Devices of a TPU topology to compile for, on a machine without TPUs.

Needs libtpu, whose compiler runs on any x86 Linux, and a process set up by :func:`moe.platform.use_tpu_compiler` before
JAX was imported.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import itertools
from typing import Any

import jax
from jax.experimental import topologies

from moe.config import ConfigError
from moe.planner.chips import CHIPS, Chip


@dataclasses.dataclass(frozen=True)
class Topology:
    """Devices of one or several pod slices.

    Attributes:
        devices: in libtpu's order; for compilation only.
    """

    name: str
    num_slices: int
    chip: Chip
    devices: tuple[Any, ...]

    @property
    def num_chips(self) -> int:
        """Number of chips in all slices."""
        return len(self.devices) // self.chip.devices


def get_topology(name: str, num_slices: int = 1) -> Topology:
    """Look up a topology.

    Args:
        name: generation, colon, chips per torus dimension.
        num_slices: number of such slices, joined by the data-center network.

    Raises:
        ConfigError: libtpu is not installed, or knows no such topology.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise ConfigError(
            f"--topology={name}: compiling for TPUs needs libtpu, of the version that this JAX names: "
            f'pip install "jax[tpu]=={jax.__version__}"'
        )
    generation, _, shape = name.partition(":")
    if generation not in CHIPS or not shape:
        examples = ", ".join(chip.example for chip in CHIPS.values())
        raise ConfigError(f"--topology={name}: must be GENERATION:AxB or GENERATION:AxBxC; for example {examples}")
    if num_slices < 1:
        raise ConfigError(f"--num_slices={num_slices}: must be at least 1")
    chip = CHIPS[generation]
    options: dict[str, Any] = dict(chip.options)
    if num_slices > 1:
        options["num_slices"] = num_slices
    try:
        devices = topologies.get_topology_desc(name, platform="tpu", **options).devices
    except jax.errors.JaxRuntimeError as error:
        raise ConfigError(
            f"--topology={name}: libtpu rejects it ({str(error).splitlines()[0]}); some that it accepts: "
            f"{', '.join(_known(generation))}"
        ) from error
    return Topology(name, num_slices, chip, tuple(devices))


def _known(generation: str) -> list[str]:
    """Topology names of a generation that libtpu accepts, among sides of 2, 4, 8 and 16 in ascending order."""
    chip, found = CHIPS[generation], []
    dimensions = chip.example.partition(":")[2].count("x") + 1
    shapes = list(itertools.combinations_with_replacement((2, 4, 8, 16), dimensions))
    for shape in [(2, 2, 1), *shapes] if dimensions == 3 else shapes:
        name = f"{generation}:{'x'.join(map(str, shape))}"
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            topologies.get_topology_desc(name, platform="tpu", **dict(chip.options))
            found.append(name)
    return found
