"""Reading only the parameters of a checkpoint: for evaluation, fine-tuning, analysis and export."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import sys
from typing import Any, TypedDict, Unpack

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from flax import nnx
from jax.sharding import Mesh

from moe.checkpoints.arrays import array_handler
from moe.checkpoints.integrity import (
    NO_MESH,
    DamagedError,
    compare,
    quiet_orbax,
    saved_checksums,
    unreadable_as_damaged,
)
from moe.checkpoints.manager import (
    complete_steps,
    orbax_folder,
    refuse_special_files,
    refuse_unusable_path,
)
from moe.checkpoints.orbax_threads import no_background_tracebacks
from moe.checkpoints.pinned import base_step
from moe.checkpoints.workdir import read_config
from moe.config import Config, ConfigError, ModelConfig
from moe.models.adapters import merge
from moe.models.factory import abstract_parameters, abstract_selection_biases, abstract_trained
from moe.models.segments import PREDICTION
from moe.models.state import join
from moe.parallel.parameters import parameter_shardings
from moe.parallel.target import host_device
from moe.system.escaping import terminal
from moe.system.sealed_folder import CONFIG
from moe.system.waiting import said_aloud


class ReadOptions(TypedDict, total=False):
    """Choice of a checkpoint of a workdir, and how it is read.

    Attributes:
        mesh: devices to place the arrays on, each reading its shard; default: none, the arrays are NumPy's, and no
            accelerator's memory is used.
        dtype: to cast to; default: as stored.
        step: of the checkpoint; default: the newest.
        only: key path of the parameter or subtree to read; default: all.
    """

    mesh: Mesh | None
    dtype: Any
    step: int | None
    only: tuple[str, ...]


def read_parameters(
    workdir: str | os.PathLike[str], model: ModelConfig, **options: Unpack[ReadOptions]
) -> dict[str, Any]:
    """Read the parameters of a checkpoint of a run or an import, without the optimizer state.

    Args:
        workdir: of a run or an import.
        model: config of the model in the checkpoint.
        **options: see :class:`ReadOptions`.

    Raises:
        ConfigError: the checkpoint is missing, damaged, or holds another model; the parameter is named.
    """
    config = _adapted(workdir)
    if config is None:
        return _read(epath.Path(workdir), "parameters", abstract_parameters(model), **options)
    exact = options | {"dtype": None}  # only the sum is cast: casting its parts would lose small adapters
    base = exact | {"step": base_step(config, workdir)}
    adapters = read_adapters(workdir, dataclasses.replace(config, model=model), **{**exact, "only": ()})
    parameters = read_parameters(config.start.checkpoint, model, **base)
    mesh, dtype = options.get("mesh"), options.get("dtype")
    with contextlib.ExitStack() as stack:
        if mesh is None:
            stack.enter_context(jax.set_mesh(NO_MESH))
            stack.enter_context(jax.default_device(host_device()))
        merged = _merged(parameters, adapters, config.lora.alpha / config.lora.rank, dtype)
    return merged if mesh is not None else jax.tree.map(np.asarray, merged)


def _merged(base: dict[str, Any], adapters: dict[str, Any], scale: float, dtype: Any) -> dict[str, Any]:
    """The sum, cast; an array of the base is freed as soon as it is merged, since a device may lack room for both."""

    def one(path: tuple[Any, ...], array: Any) -> Any:
        (new,) = jax.tree.leaves(merge(_branch(base, tuple(key.key for key in path)), adapters, scale))
        if new is not array and isinstance(array, jax.Array):
            array.delete()
        return new if dtype is None else new.astype(dtype)

    return jax.tree_util.tree_map_with_path(one, base)


def read_adapters(workdir: str | os.PathLike[str], config: Config, **options: Unpack[ReadOptions]) -> dict[str, Any]:
    """Read the adapters of a run that trains them (:func:`moe.models.adapters.initial_adapters`), without their base.

    Args:
        workdir: of the run.
        config: of the run.
        **options: see :class:`ReadOptions`.

    Raises:
        ConfigError: see :func:`read_parameters`.
    """
    return _read(epath.Path(workdir), "parameters", abstract_trained(config.model, config.lora), **options)


def _adapted(workdir: str | os.PathLike[str]) -> Config | None:
    """Config of a workdir whose checkpoints hold adapters; None for other workdirs."""
    config = read_config(workdir) if (epath.Path(workdir) / CONFIG).exists() else None
    return config if config is not None and config.lora.rank else None


def read_base(config: Config, step: int | None, mesh: Mesh) -> tuple[dict[str, Any], dict[str, Any]]:
    """Parameters in float32, and selection biases, of the base of a run that trains adapters.

    Args:
        config: of the run.
        step: of the base's checkpoint (:func:`moe.checkpoints.pinned.base_step`); None: its newest.
        mesh: to place the arrays on.

    Raises:
        ConfigError: the base is missing, or its model is not the run's.
    """
    parameters = read_parameters(config.start.checkpoint, config.model, dtype=np.float32, mesh=mesh, step=step)
    return parameters, read_biases(config.start.checkpoint, config.model, mesh=mesh, step=step)


def read_variables(
    workdir: str | os.PathLike[str], model: ModelConfig, **options: Unpack[ReadOptions]
) -> dict[str, Any]:
    """Read parameters as :func:`read_parameters`, and the routers' selection biases where the model has them."""
    options["step"] = chosen_step(workdir, options.get("step"))  # the same for both, even if the run saves another
    return join(read_parameters(workdir, model, **options), read_biases(workdir, model, **options))


def saved_steps(workdir: str | os.PathLike[str]) -> list[int]:
    """Steps of the checkpoints of a workdir, in order. Raises ConfigError where there are none."""
    steps = complete_steps(epath.Path(workdir))
    if not steps:
        raise ConfigError(f"{workdir}: holds no checkpoints")
    return steps


def chosen_step(workdir: str | os.PathLike[str], step: int | None) -> int:
    """Return ``step``, or for None the step of the newest checkpoint. Raises ConfigError if there is none."""
    steps = saved_steps(workdir)
    if step is not None and step not in steps:
        raise ConfigError(f"{workdir}: holds no checkpoint of step {step}")
    return steps[-1] if step is None else step


def read_biases(workdir: str | os.PathLike[str], model: ModelConfig, **options: Unpack[ReadOptions]) -> dict[str, Any]:
    """Read the routers' selection biases of a checkpoint; an empty dict for a model without them."""
    biases = abstract_selection_biases(model)
    return _read(epath.Path(workdir), "biases", biases, **options) if biases else {}


def _read(workdir: epath.Path, branch: str, variables: nnx.State, **options: Unpack[ReadOptions]) -> dict[str, Any]:
    """Read one field of the TrainState and check it against the shapes that the model expects.

    Args:
        workdir: of a run or an import.
        branch: name of the field.
        variables: of the model, with ShapeDtypeStructs as values.
        **options: see :class:`ReadOptions`.
    """
    refuse_unusable_path(workdir)
    step = chosen_step(workdir, options.get("step"))
    refuse_special_files(workdir / "checkpoints" / str(step))
    where = f"{workdir}: the checkpoint of step {step} to be read"
    with quiet_orbax(), no_background_tracebacks():
        manager = ocp.CheckpointManager(
            orbax_folder(workdir),
            options=ocp.CheckpointManagerOptions(read_only=True),
            item_handlers={"state": array_handler(to_host=options.get("mesh") is None)},
        )
        try:
            with said_aloud(where), unreadable_as_damaged():
                return _read_checked(manager, workdir, branch, variables, options | {"step": step})
        except DamagedError as error:
            raise ConfigError(f"{workdir}: the checkpoint of step {step} is damaged: {error}") from error
        finally:
            manager.close()


def _read_checked(
    manager: ocp.CheckpointManager, workdir: epath.Path, branch: str, variables: nnx.State, options: Any
) -> dict[str, Any]:
    mesh = options.get("mesh")
    dtype = options.get("dtype")
    step = options["step"]
    only = options.get("only", ())
    metadata = manager.item_metadata(step)["state"].tree
    stored = metadata.get(branch, {})
    wanted = nnx.to_pure_dict(variables)
    if PREDICTION not in wanted:  # a model may be read without the layers that predict further tokens
        stored = {name: tree for name, tree in stored.items() if name != PREDICTION}
    _refuse_other_model(stored, wanted, f"{workdir} at step {step}")
    where = parameter_shardings(mesh, variables, host_device())
    stored, wanted, where = (_branch(tree, only) for tree in (stored, wanted, where))

    def restore_args(leaf: Any, placed: Any) -> ocp.ArrayRestoreArgs:
        return ocp.ArrayRestoreArgs(dtype=leaf.dtype, sharding=placed)

    args = jax.tree.map(restore_args, stored, where)
    restore = ocp.args.PyTreeRestore({branch: wanted}, {branch: args}, partial_restore=True)
    restored = manager.restore(step, args=ocp.args.Composite(state=restore))["state"][branch]
    saved = saved_checksums(workdir, step)
    if saved is not None:
        compare({name.removeprefix(f".{branch}"): value for name, value in saved.items()}, restored)
    elif "optimizer" in metadata:
        raise DamagedError("it has no checksums, which every run saves")
    else:
        _say_unchecked(os.fspath(workdir))
    if dtype is not None:  # after the comparison, since the checksums are of the stored dtype
        with jax.set_mesh(NO_MESH) if mesh is None else contextlib.nullcontext():
            restored = jax.tree.map(lambda array: _cast(array, dtype), restored)
    # A program with arrays on several devices would not accept arrays on one.
    return restored if mesh is not None else jax.tree.map(np.asarray, restored)


def _cast(array: Any, dtype: Any) -> Any:
    """An array in another dtype; the given one is freed, since a device may lack room for both trees."""
    if array.dtype == dtype:
        return array
    new = array.astype(dtype)
    array.delete()
    return new


@functools.cache
def _say_unchecked(workdir: str) -> None:
    print(
        f"{terminal(workdir)}: its checkpoint has no checksums, as those that earlier versions imported or averaged; "
        "a damaged number in it would go unnoticed. Make it again to have them",
        file=sys.stderr,
        flush=True,
    )


def _branch(tree: dict[str, Any], path: tuple[str, ...]) -> dict[str, Any]:
    """Drop everything but the subtree at the key path."""
    return {path[0]: _branch(tree[path[0]], path[1:])} if path else tree


def _refuse_other_model(stored: Any, wanted: Any, where: str) -> None:
    def shapes(tree: Any) -> dict[str, tuple[int, ...]]:
        leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda node: not isinstance(node, dict))
        return {".".join(str(key.key) for key in path): tuple(leaf.shape) for path, leaf in leaves}

    saved, expected = shapes(stored), shapes(wanted)
    problems = [
        f"{name} is {saved.get(name, 'absent')} there, {expected.get(name, 'absent')} by the config"
        for name in sorted(saved.keys() | expected.keys())
        if saved.get(name) != expected.get(name)
    ]
    if problems:
        raise ConfigError(f"{where}: holds another model: {'; '.join(problems[:3])}")
