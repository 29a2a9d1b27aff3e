"""Device mesh: axes by their roles, processes, and sharding constraints on the mesh in context.

PartitionSpecs name six roles: pipeline, data, fsdp, expert, tensor and context. In our meshes axes have these names.
In another mesh, roles that no axis has are not split, axes that have no role are ignored, and :func:`mesh_roles` says
which axis has which role where the names differ.

Within a pipeline (moe.models.pipeline) the axis ``pipeline`` is Manual, and programs are traced as if the mesh did not
have it: each stage is a mesh of its own. Elsewhere it shards rows.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import math
import os
import types
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax import Array
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from moe.config import ConfigError, MeshConfig
from moe.system.fields import whole_number

#: Roles of mesh axes. ROW_AXES shard rows; TOKEN_AXES shard tokens.
AXES = ("pipeline", "data", "fsdp", "expert", "tensor", "context")
ROW_AXES = ("pipeline", "data", "fsdp", "expert")
TOKEN_AXES = (*ROW_AXES, "context")
_ONLY_WHERE_SPLIT = ("pipeline", "context")  # axes that our meshes omit at size 1

_NO_NAMES: Mapping[str, str] = types.MappingProxyType({})
_names: contextvars.ContextVar[Mapping[str, str]] = contextvars.ContextVar("mesh roles", default=_NO_NAMES)


@contextlib.contextmanager
def mesh_roles(names: Mapping[str, str]) -> Iterator[None]:
    """Give the axis ``names[role]`` of the mesh that role, for programs traced in this context.

    Raises:
        ConfigError: an unknown role, or one axis for two roles.
    """
    for role in names:
        if role not in AXES:
            raise ConfigError(f"mesh_roles={dict(names)!r}: roles are {', '.join(AXES)}")
    if len(set(names.values())) < len(names):
        raise ConfigError(f"mesh_roles={dict(names)!r}: an axis has one role")
    token = _names.set({**_names.get(), **names})
    try:
        yield
    finally:
        _names.reset(token)


def axis_of(role: str) -> str:
    """Name of the mesh axis that has this role; "" if the axis of that name has another role."""
    names = _names.get()
    return "" if role not in names and role in names.values() else names.get(role, role)


def _sizes_in_context() -> dict[str, int]:
    """Size of each axis of the mesh in context, without the axis of the pipeline that is being traced."""
    hidden = axis_of("pipeline") if in_pipeline() else None
    return {axis: size for axis, size in jax.sharding.get_abstract_mesh().shape.items() if axis != hidden}


def in_pipeline() -> bool:
    """Whether the program that is traced is a stage of a pipeline."""
    return axis_of("pipeline") in jax.sharding.get_abstract_mesh().manual_axes


def axis_size(*roles: str) -> int:
    """Number of shards that the axes with these roles make in the mesh in context; 1 without such axes."""
    sizes = _sizes_in_context()
    return math.prod(sizes.get(axis_of(role), 1) for role in roles)


def on_mesh(spec: P, axis_names: tuple[str, ...] | None = None) -> P:
    """The spec with roles replaced by axes of a mesh, without those that it does not have.

    Args:
        spec: in roles.
        axis_names: of the mesh; None: of the mesh in context.
    """
    present = _sizes_in_context() if axis_names is None else axis_names

    def entry(roles: Any) -> Any:
        if roles is None:
            return None
        axes = tuple(axis_of(role) for role in ((roles,) if isinstance(roles, str) else roles))
        return tuple(axis for axis in axes if axis in present)

    return P(*map(entry, spec))


def parse_sizes(entries: Sequence[str], *, remaining: bool = False) -> dict[str, int]:
    """Sizes of axes from the entries of --mesh, each ``axis=size``.

    Args:
        entries: as given.
        remaining: a size may be -1, all remaining devices.

    Raises:
        ConfigError: an unknown axis or an invalid size.
    """
    sizes = {}
    for entry in entries:
        axis, _, size = entry.partition("=")
        if axis not in AXES or not (whole_number(size) or (remaining and size == "-1")):
            raise ConfigError(f"--mesh={entry}: must be axis=size with a positive size, axis one of {', '.join(AXES)}")
        sizes[axis] = int(size)
    return sizes


def axis_sizes(config: MeshConfig, count: int) -> dict[str, int]:
    """Devices per axis of a mesh of ``count`` devices, with -1 replaced; sizes that do not fit remain as they are."""
    sizes = dataclasses.asdict(config)
    fixed = math.prod(size for size in sizes.values() if size != -1)
    return {axis: count // fixed if size == -1 else size for axis, size in sizes.items()}


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """Build the mesh over all devices, with -1 replaced.

    Raises:
        ConfigError: the sizes do not multiply to the number of devices.
    """
    devices = list(jax.devices() if devices is None else devices)
    axes = tuple(axis for axis in AXES if axis not in _ONLY_WHERE_SPLIT or getattr(config, axis) != 1)
    filled = axis_sizes(config, len(devices))
    sizes = [filled[axis] for axis in axes]
    if math.prod(sizes) != len(devices):
        least = math.prod(max(size, 1) for size in sizes)  # -1 became 0 where the others need more devices
        settings = ", ".join(f"mesh.{axis}={getattr(config, axis)}" for axis in axes)
        more = ""
        if devices[0].platform == "cpu" and least > len(devices):
            flag = f"--xla_force_host_platform_device_count={least}"
            more = f"; XLA_FLAGS={flag} in front of the command makes {least} devices of this computer's CPU"
        raise ConfigError(
            f"{settings}: the sizes must multiply to the number of devices, {len(devices)}; "
            f"set one of them to -1 to use all remaining devices{more}"
        )
    return Mesh(_arrange(axes, sizes, devices), axes, axis_types=(AxisType.Auto,) * len(axes))


def _arrange(axes: Sequence[str], sizes: Sequence[int], devices: Sequence[Any]) -> np.ndarray:
    """Arrange devices so that neighbours on a mesh axis are neighbours on the network.

    Two mesh axes may share a torus axis, which 8 x 8 on a 4x4x4 torus needs. Between TPU slices there is only the
    data-center network, so only the first axis, ``data`` or ``pipeline``, spans slices. GPUs are numbered host by host:
    the last axes stay inside a host (where a GPU has a slice index, each host counts as a slice, and any axis may span
    them).
    """
    if devices[0].platform == "gpu":
        return np.array(sorted(devices, key=lambda device: device.id)).reshape(sizes)
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if slices == 1:
        return mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    if sizes[0] % slices:
        raise ConfigError(f"mesh.{axes[0]}={sizes[0]}: must be a multiple of the number of TPU slices, {slices}")
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
    return rows_by_process(mesh, rows)[jax.process_index()]


def rows_by_process(mesh: Mesh, rows: int) -> dict[int, np.ndarray]:
    """Indices [b] of the batch rows on the devices of each process, by its number."""
    held: dict[int, list[np.ndarray]] = {}
    split = NamedSharding(mesh, on_mesh(P(ROW_AXES), mesh.axis_names))
    for device, index in split.devices_indices_map((rows,)).items():
        held.setdefault(device.process_index, []).append(np.arange(*index[0].indices(rows)))
    return {process: np.unique(np.concatenate(parts)) for process, parts in held.items()}


_VARIABLES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")


def join_processes(timeout: int = 100) -> None:
    """Connect this process to the others of its run, as described by the environment.

    On TPU pods, under SLURM and under Open MPI, JAX finds the other processes. Elsewhere JAX_COORDINATOR_ADDRESS
    (host:port of process 0), JAX_NUM_PROCESSES and JAX_PROCESS_ID must be set.

    JAX's preemption service, for which SIGTERM means the end of a later step, is not started: while the first step is
    compiled, the signal ends the run (:meth:`moe.system.signals.StopSignals.at_steps`).

    Args:
        timeout: seconds without a heartbeat after which a process counts as lost, and JAX aborts the others.

    Raises:
        ConfigError: the environment describes no cluster.
    """
    address, count, index = (os.environ.get(name) for name in _VARIABLES)
    gpus = _gpus_of_only_process()
    enabled = jax.config.jax_enable_preemption_service
    jax.config.update("jax_enable_preemption_service", False)
    try:
        if address is None:
            jax.distributed.initialize(local_device_ids=gpus, heartbeat_timeout_seconds=timeout)
        else:
            jax.distributed.initialize(
                address,
                int(count or ""),
                int(index or ""),
                local_device_ids=gpus,
                heartbeat_timeout_seconds=timeout,
            )
    except (ValueError, RuntimeError) as error:
        raise ConfigError(
            f"--distributed: no cluster found ({str(error).splitlines()[0]}); this works on TPU pods, under SLURM or "
            f"Open MPI, or with {', '.join(_VARIABLES)} set"
        ) from error
    finally:
        jax.config.update("jax_enable_preemption_service", enabled)


def _gpus_of_only_process() -> list[int] | None:
    """Ids of the node's GPUs if SLURM or Open MPI started one process on it; None where JAX's own choice is right.

    JAX takes one GPU per process under these launchers, the one with the process's number on its node.
    """
    environment = os.environ
    slurm = environment.get("SLURM_NTASKS"), environment.get("SLURM_STEP_NUM_NODES")
    alone = (None not in slurm and slurm[0] == slurm[1]) or environment.get("OMPI_COMM_WORLD_LOCAL_SIZE") == "1"
    if not alone or "JAX_LOCAL_DEVICE_IDS" in environment:
        return None
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    count = len(visible.split(",")) if visible else int(environment.get("SLURM_GPUS_ON_NODE", "0"))
    return list(range(count)) or None
