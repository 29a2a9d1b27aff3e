"""Devices of a TPU or GPU topology to compile for, on a machine without them.

TPUs need libtpu and a process set up by :func:`moe.system.process.use_tpu_compiler`; NVIDIA GPUs need JAX's CUDA
plugin, no driver. Both compilers run on any x86 Linux.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import itertools
import math
import re
from collections.abc import Mapping
from typing import Any

import jax
from jax.experimental import topologies

from moe.config import ConfigError
from moe.planner import gpus
from moe.planner.chips import CHIPS, Chip
from moe.planner.gpus import GPUS, MACHINES, Gpu


@dataclasses.dataclass(frozen=True)
class Place:
    """A device that is not compiled for: its number, place in its slice's torus, and slice."""

    id: int
    coords: tuple[int, ...] = ()
    slice_index: int = 0


@dataclasses.dataclass(frozen=True)
class Topology:
    """Devices of one or several pod slices, or of hosts with GPUs.

    Attributes:
        name: as libtpu has it, or GPU:HOSTSxDEVICES.
        devices: in the compiler's order; for compilation only, or a :class:`Place` each.
        compiler_options: needed to read estimates from the program.
    """

    name: str
    num_slices: int
    chip: Chip | Gpu
    devices: tuple[Any, ...]
    compiler_options: Mapping[str, str | bool] = dataclasses.field(default_factory=dict)

    @property
    def num_chips(self) -> int:
        """Number of chips in all slices."""
        return len(self.devices) // self.chip.devices

    @property
    def has_own_network(self) -> bool:
        """Whether these are a cloud's machines, with a network other than that of the GPU's standard hosts."""
        return isinstance(self.chip, Gpu) and self.chip.network != GPUS[self.chip.name].network

    @property
    def capacity(self) -> int:
        """Bytes of one device's memory."""
        return self.chip.device_memory

    @property
    def platform(self) -> str:
        """ "tpu" or "gpu"."""
        return "gpu" if isinstance(self.chip, Gpu) else "tpu"


def get_topology(name: str, num_slices: int = 1, *, compiles: bool = True) -> Topology:
    """Look up a topology.

    Args:
        name: ``v5p:4x4x4`` (generation, chips per torus dimension), ``v5p-128`` (a cloud's name of a slice),
            ``h100:8x8`` (GPU, hosts x devices per host) or ``a3-megagpu-8g:8`` (a cloud's machine, hosts).
        num_slices: number of such TPU slices, joined by the data-center network.
        compiles: the devices can be compiled for, which needs the platform's compiler.

    Raises:
        ConfigError: the compiler is not installed, or there is no such topology.
    """
    if num_slices < 1:
        raise ConfigError(f"--num_slices={num_slices}: must be at least 1")
    kind, _, shape = tpu_name(name).partition(":")
    if kind in GPUS or kind in MACHINES:
        if num_slices > 1:
            raise ConfigError(f"--num_slices={num_slices}: must be 1 for GPUs; --topology={name} has the hosts")
        return _gpu_topology(name, kind, shape, compiles)
    return _tpu_topology(name, kind, shape, num_slices, compiles)


#: Prefix of a cloud's slice name: (TPU generation, units per chip in which the number after the prefix counts).
_SLICE_NAMES = {
    **{"v2": ("v2", 2), "v3": ("v3", 2), "v4": ("v4", 2), "v5p": ("v5p", 2)},
    **{"v5litepod": ("v5e", 1), "v5e": ("v5e", 1), "v6e": ("v6e", 1), "tpu7x": ("tpu7x", 2)},
}


def tpu_name(name: str) -> str:
    """Translate a cloud's name of a TPU slice, such as ``v5p-128``; any other name is returned as it is.

    The number counts TensorCores (chips for v5e and v6e), and the slice has the default topology of that many chips:
    powers of two split over the torus dimensions as evenly as possible.

    Raises:
        ConfigError: no slice has that number.
    """
    found = re.fullmatch(rf"({'|'.join(_SLICE_NAMES)})-(\d+)", name)
    if not found:
        return name
    generation, counted = _SLICE_NAMES[found.group(1)]
    chips, rest = divmod(int(found.group(2)), counted)
    if rest or chips < 1 or chips & (chips - 1):
        raise ConfigError(f"--topology={name}: must name a power of two of chips; give other slices by their shape")
    shape = _default_shape(generation, chips)
    if not shape:
        raise ConfigError(f"--topology={name}: must have at least 4 chips")
    return f"{generation}:{shape}"


def of_slices(topology: str, num_slices: int) -> str:
    """Name of several slices, such as 2 x v5p:4x4x4; that of the topology for one slice."""
    return topology if num_slices == 1 else f"{num_slices} x {topology}"


def all_names(topology: str) -> set[str]:
    """The name of a topology, and the names of a cloud whose slices have its shape: v5p:4x4x4 is v5p-128 too."""
    generation, _, shape = topology.partition(":")
    chips = math.prod(map(int, shape.split("x")))
    if generation not in CHIPS or chips & (chips - 1) or _default_shape(generation, chips) != shape:
        return {topology}
    counts = {prefix: counted for prefix, (named, counted) in _SLICE_NAMES.items() if named == generation}
    return {topology, *(f"{prefix}-{chips * counted}" for prefix, counted in counts.items())}


def _default_shape(generation: str, chips: int) -> str:
    """Default shape of a slice of this many chips, a power of two; "" if there is none."""
    dimensions = CHIPS[generation].example.partition(":")[2].count("x") + 1
    if dimensions == 3 and chips <= 4:
        return "2x2x1" if chips == 4 else ""
    sides = [1] * dimensions
    for i in range(int(math.log2(chips))):
        sides[-1 - i % dimensions] *= 2
    return "x".join(map(str, sides))


def _gpu_topology(name: str, kind: str, shape: str, compiles: bool) -> Topology:
    machine = MACHINES.get(kind)
    gpu = machine.gpu if machine else kind
    pattern = r"(\d+)" if machine else r"(\d+)x(\d+)"
    found = re.fullmatch(pattern, shape)
    if not found or 0 in map(int, found.groups()):
        form = "MACHINE:HOSTS, for example a3-megagpu-8g:8" if machine else "GPU:HOSTSxDEVICES, for example h100:8x8"
        raise ConfigError(f"--topology={name}: must be {form}")
    hosts, each = int(found.group(1)), machine.count if machine else int(found.group(2))
    chip = GPUS[gpu]
    if machine:
        chip = dataclasses.replace(chip, network=machine.network)
    if each > chip.domain:
        raise ConfigError(f"--topology={name}: must have at most {chip.domain} devices a host")
    # An NVLink domain is a host, or all hosts of a rack.
    chip = dataclasses.replace(chip, domain=chip.domain // each * each if chip.domain > 8 else each)
    if not compiles:
        return Topology(f"{gpu}:{hosts}x{each}", 1, chip, tuple(map(Place, range(hosts * each))))
    if importlib.util.find_spec("jax_cuda13_plugin") is None:
        raise ConfigError(
            f"--topology={name}: compiling for NVIDIA GPUs needs JAX's CUDA plugin (no GPU or driver): "
            f'pip install "jax[cuda13]=={jax.__version__}"'
        )
    try:
        devices = topologies.get_topology_desc(
            platform="cuda", target_config=gpus.target_config(gpu), topology=f"1x{hosts}x{each}"
        ).devices
    except jax.errors.JaxRuntimeError as error:
        raise ConfigError(f"--topology={name}: the CUDA plugin rejects it ({str(error).splitlines()[0]})") from error
    return Topology(f"{gpu}:{hosts}x{each}", 1, chip, tuple(devices), gpus.compiler_options(gpu))


def _tpu_topology(name: str, generation: str, shape: str, num_slices: int, compiles: bool) -> Topology:
    if generation not in CHIPS or not shape:
        examples = ", ".join([*(chip.example for chip in CHIPS.values()), *(f"{gpu}:8x8" for gpu in GPUS)])
        raise ConfigError(
            f"--topology={name}: must be GENERATION:AxB or GENERATION:AxBxC for TPUs, GPU:HOSTSxDEVICES for GPUs, for "
            f"example {examples}; or a cloud's name: v5p-128, {', '.join(f'{machine}:8' for machine in MACHINES)}"
        )
    if not compiles:
        return _places(name, generation, shape, num_slices)
    if importlib.util.find_spec("libtpu") is None:
        raise ConfigError(
            f"--topology={name}: compiling for TPUs needs libtpu, of the version that this JAX names: "
            f'pip install "jax[tpu]=={jax.__version__}"'
        )
    chip = CHIPS[generation]
    options: dict[str, Any] = dict(chip.options)
    if num_slices > 1:
        options["num_slices"] = num_slices
    name = f"{generation}:{shape}"
    try:
        devices = topologies.get_topology_desc(name, platform="tpu", **options).devices
    except jax.errors.JaxRuntimeError as error:
        raise ConfigError(
            f"--topology={name}: libtpu rejects it ({str(error).splitlines()[0]}); some that it accepts: "
            f"{', '.join(_known(generation))}"
        ) from error
    return Topology(name, num_slices, chip, tuple(devices))


def _places(name: str, generation: str, shape: str, num_slices: int) -> Topology:
    """A TPU topology of any shape with as many dimensions as the generation's torus has."""
    chip = CHIPS[generation]
    dimensions = chip.example.partition(":")[2].count("x") + 1
    sides = [int(side) for side in shape.split("x") if re.fullmatch(r"[1-9]\d{0,3}", side)]
    if len(sides) != dimensions or shape != "x".join(map(str, sides)):
        raise ConfigError(f"--topology={name}: must have {dimensions} sides, as {chip.example}")
    places = [
        (coords, part)
        for part in range(num_slices)
        for coords in itertools.product(*map(range, sides))
        for _ in range(chip.devices)
    ]
    devices = tuple(Place(number, coords, part) for number, (coords, part) in enumerate(places))
    return Topology(f"{generation}:{shape}", num_slices, chip, devices)


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
