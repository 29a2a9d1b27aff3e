"""The device mesh, and constraints on the mesh in context."""

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
from moe.parallel.partition_specs import AXES, BATCH


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh over all devices, with -1 filled in.

    Raises:
        ConfigError: if the sizes do not multiply to the number of devices.
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes = [getattr(config, axis) for axis in AXES]
    fixed = int(np.prod([size for size in sizes if size != -1]))
    sizes = [len(devices) // fixed if size == -1 else size for size in sizes]
    if int(np.prod(sizes)) != len(devices):
        given = ", ".join(f"mesh.{axis}={getattr(config, axis)}" for axis in AXES)
        raise ConfigError(
            f"{given}: the sizes must multiply to the number of devices, {len(devices)}; "
            "set one of them to -1 to fill it"
        )
    return Mesh(_arrange(sizes, devices), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def _arrange(sizes: Sequence[int], devices: Sequence[Any]) -> np.ndarray:
    """Devices as an array of the mesh's sizes, neighbours on the network being neighbours on an axis.

    A torus axis may be shared by two mesh axes: 8 x 8 on a 4x4x4 torus is otherwise refused. Between TPU slices there
    is only the data-center network, so ``data`` is the axis that crosses it.
    """
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if slices == 1:
        return mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    if sizes[0] % slices:
        raise ConfigError(f"mesh.data={sizes[0]}: must be a multiple of the {slices} TPU slices, which it spans")
    return mesh_utils.create_hybrid_device_mesh(
        (sizes[0] // slices, *sizes[1:]), (slices, 1, 1, 1), devices, allow_split_physical_axes=True
    )


def constrain(x: Array, spec: P) -> Array:
    """Pins how x lies on the mesh in context (``jax.set_mesh``); without one, as on a laptop, does nothing."""
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, spec)


def local_rows(mesh: Mesh, rows: int) -> np.ndarray:
    """Numbers [b] of those of a batch's rows that this process's devices hold; where ``tensor`` spans processes, two
    hold the same."""
    indices = NamedSharding(mesh, BATCH).addressable_devices_indices_map((rows,)).values()
    return np.unique(np.concatenate([np.arange(rows)[index] for index in indices]))


def axis_size(*axes: str) -> int:
    """Into how many parts these axes of the mesh in context split an array; 1 without a mesh."""
    sizes = jax.sharding.get_abstract_mesh().shape
    return int(np.prod([sizes.get(axis, 1) for axis in axes]))
