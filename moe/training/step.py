"""The programs of a run: the train step and the evaluation step, jitted with their shardings."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from jax.typing import ArrayLike

from moe.config import Config, ModelConfig, stacks
from moe.layers.handed_on import first_handed
from moe.layers.mixers import table
from moe.layers.moe_layer import replace_gate
from moe.layers.router import SelectionBias
from moe.models import pipeline
from moe.models.adapters import initial_adapters
from moe.models.factory import Model, abstract_model, create_model, variable_specs
from moe.models.stages import Schedule
from moe.models.state import AdaptedState, TrainState, state_specs
from moe.parallel import partition_specs, target
from moe.routing.interface import Gate
from moe.routing.own_gates import probe
from moe.routing.own_rules import probe_rule
from moe.system.guarded import is_own
from moe.training import host_memory
from moe.training.batches import Batch, batch_shapes
from moe.training.losses import describe_auxiliary
from moe.training.optimizer import in_steps, learning_rate_schedule, make_optimizer, probe_own, signal_shapes
from moe.training.update import EvalMetrics, Parts, TrainMetrics, eval_step, train_step

#: A teacher's model config and variables.
Teacher = tuple[ModelConfig, dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class Program:
    """The jitted functions of a run, compiled on first call, and the shapes and shardings of their arguments.

    Attributes:
        initialise: seed → TrainState at step 0.
        init_optimizer: trained parameters → optimizer state before the first update.
        train_step: (TrainState, Batch) → (TrainState, TrainMetrics); donates the old state.
        eval_step: (variables, Batch, token_bytes [V] int32) → EvalMetrics; deterministic.
        state: TrainState of ShapeDtypeStructs with shardings.
        batch: Batch of ShapeDtypeStructs with shardings.
        traced: the operations of train_step and eval_step, traced anew in each call.
        about: line about the objective, printed when a run begins; empty: none.
    """

    config: Config
    mesh: Mesh
    graphdef: nnx.GraphDef[Model]
    initialise: Callable[[ArrayLike], TrainState]
    init_optimizer: Callable[[dict[str, Any]], Any]
    train_step: Callable[[TrainState, Batch], tuple[TrainState, TrainMetrics]]
    eval_step: Callable[[dict[str, Any], Batch, ArrayLike], EvalMetrics]
    state: TrainState
    batch: dict[str, jax.ShapeDtypeStruct]
    traced: Callable[[], tuple[Any, ...]]
    about: str = ""

    def init(self) -> TrainState:
        """Random state at step 0, from the config's seed."""
        return self.initialise(self.config.seed)

    def model(self, variables: dict[str, Any]) -> Model:
        """NNX module over these variables (:attr:`TrainState.variables`)."""
        return nnx.merge(self.graphdef, variables)


def compiler_options(config: Config, mesh: Mesh) -> dict[str, str | bool | int]:
    """XLA options of a run's programs on these devices."""
    stages = mesh.shape.get("pipeline", 1)
    nested = stages > 1 and config.model.scan_layers and Schedule.of(config, stages).repeats > 1
    return target.compiler_options(mesh.devices.flat[0].device_kind, stages=stages, nested=nested)


def build(
    config: Config,
    mesh: Mesh,
    teacher: Teacher | None = None,
    *,
    gate: Gate | None = None,
) -> Program:
    """Build the programs of a run; nothing is compiled yet.

    Args:
        config: validated against the mesh (:func:`moe.config.validate_mesh`).
        mesh: from :func:`moe.parallel.mesh.make_mesh`.
        teacher: model of ``config.distill``, whose probabilities are soft targets, or the objective's reference model.
        gate: replaces the gate that ``config.model.moe.gate`` names in every MoE layer.
    """
    _probe_own_gates(config)
    if config.model.mixer is not None:
        table.probe(config.model, config.model.mixer)
    pipeline.check(config, mesh.shape)
    teacher_model, teacher_variables = teacher or (config.model, None)
    optimizer = make_optimizer(config.optimizer, config.train.num_steps, None if config.lora.rank else config.model)
    parts = Parts(
        config,
        _graphdef(config.model, gate),
        _graphdef(teacher_model),
        in_steps(config.optimizer, optimizer),
        learning_rate_schedule(config.optimizer, config.train.num_steps),
        config.objective,
    )
    init = functools.partial(_init, parts)
    shapes = jax.eval_shape(init, 0)
    optimizer_shapes = jax.eval_shape(optimizer.init, shapes.parameters)
    probed = signal_shapes(config.optimizer, config.model)
    probe_own(config.optimizer, optimizer, shapes.parameters, optimizer_shapes, probed)
    state_shardings = partition_specs.shardings(mesh, state_specs(config, shapes))
    if config.optimizer.memory == "host":
        stored = jax.tree.map(host_memory.stored, shapes.optimizer, state_shardings.optimizer)
        state_shardings = dataclasses.replace(state_shardings, optimizer=stored)
    variable_shardings = partition_specs.shardings(mesh, variable_specs(config.model))
    batch_sharding, replicated = partition_specs.shardings(mesh, (partition_specs.BATCH, partition_specs.REPLICATED))
    options = compiler_options(config, mesh) or None
    step_shardings: tuple[Any, ...] = (state_shardings, batch_sharding)
    if teacher_variables is not None:
        step_shardings += (partition_specs.shardings(mesh, variable_specs(teacher_model)),)
    jitted_step = jax.jit(
        functools.partial(train_step, parts),
        in_shardings=step_shardings,
        out_shardings=(state_shardings, replicated),
        donate_argnums=0,
        compiler_options=options,
    )
    batch = {
        key: jax.ShapeDtypeStruct((config.train.batch_size, *shape), dtype, sharding=batch_sharding)
        for key, (shape, dtype) in batch_shapes(config).items()
    }

    def traced() -> tuple[Any, ...]:  # without shardings, so that each mesh may be in context
        given = (batch,) if teacher_variables is None else (batch, teacher_variables)
        rows, *teaching = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), given)
        variables = jax.eval_shape(lambda state: state.variables, shapes)
        bytes_of_ids = jax.ShapeDtypeStruct((config.model.vocab_size,), jnp.int32)
        trained = jax.make_jaxpr(functools.partial(train_step, parts))(shapes, rows, *teaching)
        evaluated = jax.make_jaxpr(functools.partial(eval_step, parts.graphdef))(variables, rows, bytes_of_ids)
        return trained, evaluated

    return Program(
        config=config,
        mesh=mesh,
        graphdef=parts.graphdef,
        initialise=jax.jit(init, out_shardings=state_shardings),
        init_optimizer=jax.jit(parts.optimizer.init, out_shardings=state_shardings.optimizer),
        train_step=jitted_step
        if teacher_variables is None
        else lambda state, batch: jitted_step(state, batch, teacher_variables),
        eval_step=jax.jit(
            functools.partial(eval_step, parts.graphdef),
            in_shardings=(variable_shardings, batch_sharding, replicated),
            out_shardings=replicated,
            compiler_options=options,
        ),
        state=jax.tree.map(
            lambda shape, sharding: jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=sharding),
            shapes,
            state_shardings,
        ),
        batch=batch,
        traced=traced,
        about=_about(config),
    )


def _about(config: Config) -> str:
    """Line about the objective and the auxiliary losses."""
    about = config.objective.about(config)
    return f"objective: {about}; auxiliary losses: {describe_auxiliary(config.model.moe)}" if about else ""


#: Most numbers in the logits with which a user's gate is probed.
_PROBED = 1 << 24


def _probe_own_gates(config: Config) -> None:
    """Refuse a gate of a user's module that cannot route the groups of this run; see
    :func:`moe.routing.own_gates.probe`. The first step checks all of its tokens."""
    model, moe = config.model, config.model.moe
    columns = moe.num_experts + moe.null_experts
    shapes = [(2, 8)]
    for length in {config.data.sequence_length, *([config.data.input_length] if model.encoder_layers else [])}:
        size = moe.group_size or length
        groups = config.train.batch_size * length // size
        if fitting := min(groups, _PROBED // (size * columns)):
            shapes.append((fitting, size))
    for layers in stacks(model).values():
        first_handed(moe, layers, (1, 1))
    for gate in set(moe.gates):
        if is_own(gate):
            probe(gate, moe.num_experts, null_experts=moe.null_experts, shapes=shapes)
            probe_rule(gate, columns)


def _graphdef(model: ModelConfig, gate: Gate | None = None) -> nnx.GraphDef[Model]:
    abstract = abstract_model(model)
    if gate is not None:
        replace_gate(abstract, gate)
    return nnx.graphdef(abstract)


def _init(parts: Parts, seed: ArrayLike) -> TrainState:
    """Random state at step 0. The seed is an argument so that runs of several seeds share one compiled program."""
    parameter_key, noise_key = jax.random.split(jax.random.key(seed))
    model = create_model(parts.config.model, rngs=nnx.Rngs(params=parameter_key))
    base = nnx.state(model, nnx.Param)
    biases = nnx.to_pure_dict(nnx.state(model, SelectionBias))
    lora = parts.config.lora
    parameters = nnx.to_pure_dict(initial_adapters(base, lora, parameter_key) if lora.rank else base)
    state = TrainState(
        jnp.zeros((), jnp.int32), parameters, biases, parts.optimizer.init(parameters), jax.random.key_data(noise_key)
    )
    if not lora.rank:
        return state
    return AdaptedState(**vars(state), base=nnx.to_pure_dict(base), scale=lora.alpha / lora.rank)
