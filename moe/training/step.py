"""The state of a run and the compiled programs that change and read it; the only train step there is.

In: a :class:`moe.config.Config` and a mesh. Out: a :class:`Program` with ``init``, ``train_step`` and ``eval_step``,
all jitted with their shardings, and the shapes of their arguments, so that a program can also be compiled for
hardware that is not here.

Letters: B batch, T sequence, L MoE layers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax import Array
from jax.sharding import Mesh, NamedSharding
from jax.typing import ArrayLike

from moe.checkpoints.state import TrainState, at_step, join
from moe.config import Config, ModelConfig
from moe.layers.moe_layer import replace_gate
from moe.models.decoder import Transformer
from moe.models.stack import selection_biases
from moe.parallel import partition_specs, target
from moe.parallel.mesh import constrain
from moe.routing.balancing import LayerReport, next_selection_bias
from moe.routing.interface import Gate
from moe.routing.router import SelectionBias
from moe.training.losses import auxiliary_loss, linear_cross_entropy, mean_reports, soft_cross_entropy
from moe.training.optimizer import gradient_norm, learning_rate_schedule, make_optimizer

#: tokens, targets, segment_ids, positions: [B,T] int32 (see moe.data.pipeline)
Batch = dict[str, Array]


BATCH_KEYS = ("tokens", "targets", "segment_ids", "positions")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainMetrics:
    """Of one step, over its whole batch.

    Attributes:
        loss: [] cross_entropy plus weighted auxiliary terms.
        cross_entropy: [] nats per target.
        gradient_norm: [] of what is trained, before clipping.
        learning_rate: [].
        skipped: [] float32, 1 if the loss or a gradient was not finite, and nothing was updated; else 0.
        layers: LayerReport with leading axis [L], or None.
    """

    loss: Array
    cross_entropy: Array
    gradient_norm: Array
    learning_rate: Array
    skipped: Array
    layers: LayerReport | None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class EvalMetrics:
    """Sums over one held-out batch.

    Attributes:
        nll: [] nats.
        targets: [] int32, how many.
        target_bytes: [] int32, UTF-8 bytes those targets stand for.
        layers: LayerReport with leading axis [L], or None.
    """

    nll: Array
    targets: Array
    target_bytes: Array
    layers: LayerReport | None


@dataclasses.dataclass(frozen=True)
class Program:
    """Compiled on first call; arguments and results lie on the mesh as their shardings say.

    Attributes:
        initialise: seed → TrainState at step 0.
        train_step: (TrainState, Batch) → (TrainState, TrainMetrics); the old state's buffers are reused.
        eval_step: (variables, Batch, token_bytes [V] int32) → EvalMetrics; deterministic.
        state: TrainState of ShapeDtypeStructs with shardings.
        batch: Batch of ShapeDtypeStructs with shardings.
    """

    config: Config
    mesh: Mesh
    graphdef: nnx.GraphDef[Transformer]
    initialise: Callable[[ArrayLike], TrainState]
    train_step: Callable[[TrainState, Batch], tuple[TrainState, TrainMetrics]]
    eval_step: Callable[[dict[str, Any], Batch, ArrayLike], EvalMetrics]
    state: TrainState
    batch: dict[str, jax.ShapeDtypeStruct]

    def init(self) -> TrainState:
        """The state at step 0 of the config's seed."""
        return self.initialise(self.config.seed)

    def model(self, variables: dict[str, Any]) -> Transformer:
        """The NNX module over these variables (:attr:`TrainState.variables`)."""
        return nnx.merge(self.graphdef, variables)


def build(
    config: Config, mesh: Mesh, teacher: tuple[ModelConfig, dict[str, Any]] | None = None, *, gate: Gate | None = None
) -> Program:
    """The programs of a run.

    Args:
        config: resolved and validated, against the mesh too (:func:`moe.config.checks.validate_mesh`).
        mesh: from :func:`moe.parallel.mesh.make_mesh`.
        teacher: a model and its variables, whose probabilities are targets too; see ``config.distill``.
        gate: used in every MoE layer instead of the one that ``config.model.moe.gate`` names.
    """
    optimizer = make_optimizer(config.optimizer, config.train.num_steps)
    schedule = learning_rate_schedule(config.optimizer, config.train.num_steps)
    microbatches, bias_update_rate = config.train.accumulation_steps, config.model.moe.bias_update_rate
    abstract_model = nnx.eval_shape(lambda: Transformer(config.model, rngs=nnx.Rngs(0)))
    if gate is not None:
        replace_gate(abstract_model, gate)
    graphdef = nnx.graphdef(abstract_model)

    def init(seed: ArrayLike) -> TrainState:  # an argument, so that runs of several seeds share one compiled program
        parameter_key, noise_key = jax.random.split(jax.random.key(seed))
        model = Transformer(config.model, rngs=nnx.Rngs(params=parameter_key))
        parameters = nnx.to_pure_dict(nnx.state(model, nnx.Param))
        biases = nnx.to_pure_dict(nnx.state(model, SelectionBias))
        return TrainState(
            jnp.zeros((), jnp.int32), parameters, biases, optimizer.init(parameters), jax.random.key_data(noise_key)
        )

    teacher_model, teacher_variables = teacher or (config.model, None)
    teacher_graphdef = nnx.graphdef(nnx.eval_shape(lambda: Transformer(teacher_model, rngs=nnx.Rngs(0))))

    def teach(variables: dict[str, Any], batch: Batch) -> Array:
        """The teacher's logits [B,T,V]."""
        model = nnx.merge(teacher_graphdef, variables)
        return model(batch["tokens"], batch["segment_ids"], batch["positions"]).logits

    def loss_and_report(parameters, biases, batch: Batch, rng: Array, num_targets: Array, teaching=None):
        """This microbatch's share of the batch's loss."""
        model = nnx.merge(graphdef, join(parameters, biases))
        output = model(batch["tokens"], batch["segment_ids"], batch["positions"], train=True, rng=rng)
        nll, _ = linear_cross_entropy(output.hidden, model.output_matrix(), batch["targets"])
        share = loss = nll / jnp.maximum(num_targets, 1)
        if teaching is not None:
            soft = soft_cross_entropy(output.logits, teach(teaching, batch), batch["targets"])
            loss += config.distill.soft_share * (soft - nll) / jnp.maximum(num_targets, 1)
        return loss + auxiliary_loss(output.layers, config.model.moe) / microbatches, (share, output.layers)

    def train_step(state: TrainState, batch: Batch, teaching=None) -> tuple[TrainState, TrainMetrics]:
        rng = jax.random.fold_in(jax.random.wrap_key_data(state.rng), state.step)
        num_targets = jnp.sum(batch["targets"] >= 0)
        value_and_grad = jax.value_and_grad(loss_and_report, has_aux=True)
        if microbatches == 1:
            (loss, (ce, layers)), gradients = value_and_grad(
                state.parameters, state.biases, batch, rng, num_targets, teaching
            )
        else:

            def accumulate(sums, inputs):
                microbatch, index = inputs
                result = value_and_grad(
                    state.parameters, state.biases, microbatch, jax.random.fold_in(rng, index), num_targets, teaching
                )
                (loss, (ce, layers)), gradients = result
                return jax.tree.map(jnp.add, sums, (loss, ce, gradients)), layers

            # [B,T] → [B/A,A,T] → [A,B/A,T]: microbatch i takes every A-th row, so that each device keeps its rows.
            split = jax.tree.map(lambda x: x.reshape(-1, microbatches, x.shape[-1]).swapaxes(0, 1), batch)
            split = jax.tree.map(lambda x: constrain(x, partition_specs.MICROBATCHES), split)
            zeros = (jnp.zeros(()), jnp.zeros(()), jax.tree.map(jnp.zeros_like, state.parameters))
            (loss, ce, gradients), layers = jax.lax.scan(accumulate, zeros, (split, jnp.arange(microbatches)))
            layers = mean_reports(layers)
        norm = gradient_norm(config.optimizer, gradients)
        finite = jnp.isfinite(loss) & jnp.isfinite(norm)
        metrics = TrainMetrics(
            loss, ce, norm, jnp.asarray(schedule(state.step)), 1.0 - finite.astype(jnp.float32), layers
        )
        biases = state.biases
        if biases:
            # Outside the gradient, from the loads of this step: loss-free balancing.
            loads = selection_biases(config.model, layers.expert_load)
            biases = jax.tree.map(lambda b, load: next_selection_bias(b, load, bias_update_rate), biases, loads)
        # One branch runs. (Selecting old or new leaf by leaf reads and copies more; optax.apply_if_finite also keeps
        # counters in the optimizer's state, and in the end applies what is not finite.)
        parameters, optimizer_state, biases = jax.lax.cond(
            finite,
            lambda: (*update(gradients, norm, state), biases),
            lambda: (state.parameters, at_step(state.optimizer, state.step + 1), state.biases),
        )
        return TrainState(state.step + 1, parameters, biases, optimizer_state, state.rng), metrics

    def update(gradients: Any, norm: Array, state: TrainState) -> tuple[Any, Any]:
        """(parameters, optimizer's state) after a step."""
        updates, optimizer_state = optimizer.update(gradients, state.optimizer, state.parameters, norm=norm)
        return optax.apply_updates(state.parameters, updates), optimizer_state

    def eval_step(variables: dict[str, Any], batch: Batch, token_bytes: ArrayLike) -> EvalMetrics:
        model = nnx.merge(graphdef, variables)
        output = model(batch["tokens"], batch["segment_ids"], batch["positions"])
        nll, num_targets = linear_cross_entropy(output.hidden, model.output_matrix(), batch["targets"])
        known = batch["targets"] >= 0
        sizes = jnp.where(known, jnp.asarray(token_bytes)[jnp.where(known, batch["targets"], 0)], 0)
        return EvalMetrics(nll, num_targets, jnp.sum(sizes), output.layers)

    shapes = jax.eval_shape(init, 0)
    state_shardings = partition_specs.shardings(mesh, partition_specs.parameter_specs(shapes))
    batch_sharding = NamedSharding(mesh, partition_specs.BATCH)
    replicated = NamedSharding(mesh, partition_specs.REPLICATED)
    rows = jax.ShapeDtypeStruct(
        (config.train.batch_size, config.data.sequence_length), jnp.int32, sharding=batch_sharding
    )
    step_shardings: tuple[Any, ...] = (state_shardings, batch_sharding)
    if teacher_variables is not None:
        step_shardings += (partition_specs.shardings(mesh, partition_specs.parameter_specs(teacher_variables)),)
    options = target.compiler_options(mesh.devices.flat[0].device_kind) or None
    jitted_step = jax.jit(
        train_step,
        in_shardings=step_shardings,
        out_shardings=(state_shardings, replicated),
        donate_argnums=0,
        compiler_options=options,
    )
    return Program(
        config=config,
        mesh=mesh,
        graphdef=graphdef,
        initialise=jax.jit(init, out_shardings=state_shardings),
        train_step=jitted_step
        if teacher_variables is None
        else lambda state, batch: jitted_step(state, batch, teacher_variables),
        eval_step=jax.jit(
            eval_step,
            in_shardings=(state_shardings.variables, batch_sharding, replicated),
            out_shardings=replicated,
            compiler_options=options,
        ),
        state=jax.tree.map(
            lambda shape, where: jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=where),
            shapes,
            state_shardings,
        ),
        batch={key: rows for key in BATCH_KEYS},
    )


def place(batch: dict[str, Any], mesh: Mesh) -> Batch:
    """This process's rows of a batch (numpy [b,T]) as global arrays [B,T] on the mesh."""
    where = NamedSharding(mesh, partition_specs.BATCH)
    return {key: jax.make_array_from_process_local_data(where, batch[key]) for key in BATCH_KEYS}
