"""Device mesh, and sharding constraints on the mesh in context."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax import Array
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from moe.config import ConfigError, MeshConfig
from moe.parallel.axes import AXES, on_mesh
from moe.parallel.partition_specs import ROWS


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """Build the mesh over all devices, with -1 replaced.

    Raises:
        ConfigError: the sizes do not multiply to the number of devices.
    """
    devices = list(jax.devices() if devices is None else devices)
    axes = AXES if config.context != 1 else AXES[:-1]
    sizes = [getattr(config, axis) for axis in axes]
    fixed = int(np.prod([size for size in sizes if size != -1]))
    sizes = [len(devices) // fixed if size == -1 else size for size in sizes]
    if int(np.prod(sizes)) != len(devices):
        given = ", ".join(f"mesh.{axis}={getattr(config, axis)}" for axis in axes)
        raise ConfigError(
            f"{given}: the sizes must multiply to the number of devices, {len(devices)}; "
            "set one of them to -1 to use all remaining devices"
        )
    return Mesh(_arrange(sizes, devices), axes, axis_types=(AxisType.Auto,) * len(axes))


def _arrange(sizes: Sequence[int], devices: Sequence[Any]) -> np.ndarray:
    """Arrange devices so that neighbours on a mesh axis are neighbours on the network.

    Two mesh axes may share a torus axis, which 8 x 8 on a 4x4x4 torus needs. Between TPU slices there is only the
    data-center network, so only ``data`` spans slices. GPUs are numbered host by host: the last axes stay inside a host
    (where a GPU has a slice index, each host counts as a slice, and any axis may span them).
    """
    if devices[0].platform == "gpu":
        return np.array(sorted(devices, key=lambda device: device.id)).reshape(sizes)
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if slices == 1:
        return mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    if sizes[0] % slices:
        raise ConfigError(f"mesh.data={sizes[0]}: must be a multiple of the number of TPU slices, {slices}")
    return mesh_utils.create_hybrid_device_mesh(
        (sizes[0] // slices, *sizes[1:]), (slices, *(1,) * (len(sizes) - 1)), devices, allow_split_physical_axes=True
    )


def constrain(x: Array, spec: P) -> Array:
    """Constrain the sharding of x on the mesh in context (``jax.set_mesh``); without a mesh, return x.

    Raises:
        ConfigError: a mesh with Explicit axes.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    if AxisType.Explicit in mesh.axis_types:
        raise ConfigError(
            f"the mesh in context has Explicit axes, {mesh.axis_names}: make it with "
            f"axis_types=(jax.sharding.AxisType.Auto,) * {len(mesh.axis_names)}"
        )
    return jax.lax.with_sharding_constraint(x, on_mesh(spec))


def local_rows(mesh: Mesh, rows: int) -> np.ndarray:
    """Indices [b] of the batch rows on this process's devices; where ``tensor`` spans processes, several share them.

    Raises:
        ConfigError: a row is split over several processes.
    """
    lines = mesh.devices.reshape(-1, mesh.shape.get("context", 1))
    if any(len({device.process_index for device in line}) > 1 for line in lines):
        raise ConfigError(f"mesh.context={mesh.shape['context']}: a row must be on the devices of one process")
    indices = NamedSharding(mesh, on_mesh(ROWS, mesh.axis_names)).addressable_devices_indices_map((rows,)).values()
    return np.unique(np.concatenate([np.arange(rows)[index] for index in indices]))
