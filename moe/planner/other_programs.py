"""Memory of the programs of a run besides its train step: initialisation, restoring and evaluation."""

from __future__ import annotations

from typing import Any

import jax

from moe.config import Config, validate_mesh
from moe.layers.attention.attend import checked_for_target
from moe.parallel.mesh import make_mesh
from moe.parallel.partition_specs import shard_bytes
from moe.planner import memory_errors
from moe.planner.chips import GiB
from moe.planner.memory_errors import DoesNotFitError
from moe.planner.topology import Topology
from moe.training import step as train_step_module

TRAINING = "train step"
EVALUATION = "evaluation"
INITIALISATION = "initialisation"
RESTORING = "restoring"


def memory(config: Config, topology: Topology) -> dict[str, int]:
    """Bytes of a device while a run makes its first state, restores a checkpoint, and evaluates beside that state.

    Initialisation and evaluation are compiled. A restored checkpoint needs its arrays, and of an optimizer in the
    host's memory the largest, whose checksum is computed on the device.

    Raises:
        DoesNotFitError: one of them needs more memory than a device has.
        ConfigError: the config does not fit the mesh.
    """
    mesh = make_mesh(config.mesh, topology.devices)
    validate_mesh(config, mesh.shape)
    with jax.set_mesh(mesh), checked_for_target():
        built = train_step_module.build(config, mesh)
        optimizer = shard_bytes(built.state.optimizer)
        state = shard_bytes(built.state)
        rows = config.train.microbatch_rows * mesh.shape.get("pipeline", 1)
        batch = {
            key: jax.ShapeDtypeStruct((rows, *array.shape[1:]), array.dtype, sharding=array.sharding)
            for key, array in built.batch.items()
        }
        variables = jax.eval_shape(lambda held: held.variables, built.state)
        token_bytes = jax.ShapeDtypeStruct((config.model.vocab_size,), jax.numpy.int32)
        evaluation = _compiled(config, topology, built.eval_step, variables, batch, token_bytes)
        initialisation = _compiled(config, topology, built.initialise, config.seed)
    stored = [shard_bytes(leaf, host=True) for leaf in jax.tree.leaves(built.state.optimizer)]
    fetched = max(stored, default=0) if config.optimizer.memory == "host" else 0
    found = {EVALUATION: evaluation + optimizer, INITIALISATION: initialisation, RESTORING: state + fetched}
    for name, size in found.items():
        if size > topology.capacity:
            over = (size - topology.capacity) / GiB
            raise DoesNotFitError(
                f"does not fit: {name} takes {size / GiB:.2f} GiB a device of {topology.capacity / GiB:.2f}, "
                f"{over:.2f} GiB too much",
                size,
            )
    return found


def _compiled(config: Config, topology: Topology, function: Any, *arguments: Any) -> int:
    """Bytes of a device that a compiled function takes. Raises DoesNotFitError where the compiler refuses it."""
    try:
        compiled = function.lower(*arguments).compile(compiler_options=dict(topology.compiler_options) or None)
    except jax.errors.JaxRuntimeError as error:
        raise memory_errors.explained(config, error) from error
    found = compiled.memory_analysis()
    held = found.argument_size_in_bytes + found.output_size_in_bytes - found.alias_size_in_bytes
    return held + found.temp_size_in_bytes + found.generated_code_size_in_bytes


def words(programs: dict[str, int], train_step: int) -> str:
    """The memory of all programs in a sentence, the largest first.

    Args:
        programs: from :func:`memory`.
        train_step: bytes of the train step.
    """
    ordered = sorted((programs | {TRAINING: train_step}).items(), key=lambda pair: -pair[1])
    listed = ", ".join(f"{name} {size / GiB:.2f} GiB" for name, size in ordered)
    return f"Memory by program: {listed}; {ordered[0][0]} needs the most"
