"""The optimizer state of another run's checkpoint, or the moving average of the weights in it."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh

from moe.checkpoints.integrity import UNREAD, DamagedError, quiet_orbax, saved_checksums
from moe.checkpoints.manager import Checkpoints
from moe.config import Config, ConfigError, MeshConfig
from moe.config.references import refuse_modules
from moe.parallel.mesh import make_mesh
from moe.parallel.target import host_device
from moe.training.optimizer import is_average
from moe.training.step import build


def read_optimizer(
    source: Config, workdir: str, field: str, step: int, mesh: Mesh | None = None, *, average_only: bool = False
) -> Any:
    """Optimizer state of a run's checkpoint, checked by its checksums; its parameters are not read.

    Args:
        source: config of the run.
        field: field or flag that needs it, for messages.
        step: of the checkpoint.
        mesh: to place the arrays on, each device reading its shard; None: the arrays are NumPy's, and no accelerator's
            memory is used.
        average_only: read only the moving average of the weights; other arrays are
            :data:`moe.checkpoints.integrity.UNREAD`.

    Raises:
        ConfigError: an import, which has none, a damaged checkpoint, or an optimizer of a module that was not allowed.
    """
    refuse_modules({"optimizer.name": source.optimizer.name}, f"{workdir}: ")
    placed_on = make_mesh(MeshConfig(data=1), [host_device()]) if mesh is None else mesh
    on_devices = dataclasses.replace(source.optimizer, memory="device")
    with jax.set_mesh(placed_on):
        state = build(dataclasses.replace(source, mesh=MeshConfig(data=1), optimizer=on_devices), placed_on).state
    with quiet_orbax():  # warns that the folder is only read, as asked
        checkpoints = Checkpoints(epath.Path(workdir), 1, read_only=True, to_host=mesh is None)
    parts: dict[str, Any] = {name: jax.tree.map(_unread, getattr(state, name)) for name in ("parameters", "biases")}
    if average_only:
        parts["optimizer"] = jax.tree.map(_unless_average, state.optimizer, is_leaf=is_average)
    try:
        saved = saved_checksums(epath.Path(workdir), step) or {}
        if not any(name.startswith(".optimizer") for name in saved):
            raise ConfigError(f"{field}: {workdir} holds no optimizer state, as an import does not")
        optimizer = checkpoints.restore(step, dataclasses.replace(state, **parts))[0].optimizer
    except DamagedError as error:
        raise ConfigError(f"{field}: the checkpoint of step {step} in {workdir}: {error}") from error
    return optimizer if mesh is not None else jax.tree.map(_as_numpy, optimizer)


def _unread(leaf: Any) -> Any:
    del leaf
    return UNREAD


def _unless_average(node: Any) -> Any:
    return node if is_average(node) else UNREAD


def _as_numpy(leaf: Any) -> Any:
    return leaf if leaf is UNREAD else np.asarray(leaf)
