"""One update of the parameters, and the evaluation of one batch, as they are traced."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax import Array
from jax.typing import ArrayLike

from moe.config import Config
from moe.config.objectives import Objective
from moe.layers.call import Report
from moe.models import pipeline
from moe.models.decoder import Output
from moe.models.factory import Model
from moe.models.state import TrainState
from moe.parallel import partition_specs
from moe.parallel.mesh import axis_size, constrain
from moe.routing.balancing import BalanceSums, LayerReport, auxiliary_losses, balance_weights, over_step
from moe.training.batches import Batch, forward
from moe.training.losses import of_one_batch, over_microbatches, row_cross_entropy, total
from moe.training.optimizer import gradient_norm, link_metrics, signals
from moe.training.rules import update_routers


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainMetrics:
    """Metrics of one step over its whole batch.

    Attributes:
        loss: [] the objective plus weighted auxiliary terms; the objective is the cross_entropy, or with a teacher or
            prediction layers their weighted sum with it.
        cross_entropy: [] nats per target; of an objective on answers, its loss.
        gradient_norm: [] L2 norm over all trained parameters, before clipping and the factors of a base model.
        learning_rate: [] of the schedule, before the factors of a base model.
        skipped: [] float32, 1 if the loss or a gradient was not finite or a spike and nothing was updated, else 0.
        layers: LayerReport with leading axis [L], or None in a dense model.
        terms: further numbers of the objective by name, [] each, what layers report as ``Report.metrics``, and with
            QK-clip ``largest_score``, [L] by layer with attention, and ``clipped_heads``, [] of all layers.
    """

    loss: Array
    cross_entropy: Array
    gradient_norm: Array
    learning_rate: Array
    skipped: Array
    layers: LayerReport | None
    terms: dict[str, Array]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class EvalMetrics:
    """Sums over the rows of one held-out batch.

    Attributes:
        nll: [B] nats.
        targets: [B] int32, number of targets.
        target_bytes: [] int32, UTF-8 bytes of the targets' text.
        layers: LayerReport with leading axis [L], or None in a dense model.
    """

    nll: Array
    targets: Array
    target_bytes: Array
    layers: LayerReport | None


@dataclasses.dataclass(frozen=True)
class Parts:
    """Static parts of a run that the traced functions share."""

    config: Config
    graphdef: nnx.GraphDef[Model]
    teacher_graphdef: nnx.GraphDef[Model]
    optimizer: optax.GradientTransformationExtraArgs
    schedule: optax.Schedule
    objective: Objective

    @property
    def signals(self) -> tuple[str, ...]:
        """Names of what the step reads of the layers."""
        return ("layers", *signals(self.config.optimizer))

    def of_rows(self, rows: int) -> Parts:
        """Parts of a step whose batch has so many rows, in microbatches of the same size: those of batch ramp-up have
        fewer than others."""
        train = self.config.train
        if rows == train.batch_size:
            return self
        train = train.of_rows(rows, rows // train.microbatch_rows)
        return dataclasses.replace(self, config=dataclasses.replace(self.config, train=train))


def train_step(
    parts: Parts, state: TrainState, batch: Batch, teacher_variables: dict[str, Any] | None = None
) -> tuple[TrainState, TrainMetrics]:
    """Compute gradients, then update, unless the optimizer skips the update of this step."""
    if parts.config.train.rampup_rows:
        parts = parts.of_rows(len(batch["tokens"]))
    rng = jax.random.fold_in(jax.random.wrap_key_data(state.rng), state.step)
    (loss, (cross_entropy, terms), report), gradients = _gradients(parts, state, batch, rng, teacher_variables)
    norm = gradient_norm(parts.config.optimizer, gradients)
    known = {"step": state.step, "loss": loss, "norm": norm, "report": report}
    optimizer: Any
    updates, optimizer = parts.optimizer.update(gradients, state.optimizer, state.parameters, **known)
    routers = update_routers(parts.config, state.biases, report, optimizer.applied)
    parameters: Any = optax.apply_updates(state.parameters, updates)
    following = TrainState(state.step + 1, parameters, routers, optimizer.state, state.rng)
    terms = terms | report.metrics | link_metrics(parts.config.optimizer, report)
    learning_rate = jnp.asarray(parts.schedule(state.step))
    skipped = 1.0 - optimizer.applied.astype(jnp.float32)
    layers = report.signals.get("layers")
    return state.restored(following), TrainMetrics(loss, cross_entropy, norm, learning_rate, skipped, layers, terms)


def _gradients(
    parts: Parts, state: TrainState, batch: Batch, rng: Array, teacher_variables: dict[str, Any] | None
) -> tuple[tuple[Array, tuple[Array, dict[str, Array]], Report], Any]:
    """(loss, cross-entropy and terms, report) and gradients of a batch, in ``accumulation_steps`` microbatches."""
    microbatches = parts.config.train.accumulation_steps
    count = parts.objective.count(batch)

    def loss_of(parameters, microbatch, key, totals=None):
        model = nnx.merge(parts.graphdef, dataclasses.replace(state, parameters=parameters).variables)
        output = forward(model, microbatch, train=True, rng=_noise_key(parts, key), signals=parts.signals)
        teacher = None
        if teacher_variables is not None:
            taught_by = nnx.merge(parts.teacher_graphdef, teacher_variables)
            teacher = taught_by, forward(taught_by, microbatch)
        return _loss(parts, model, output, microbatch, count, teacher, totals)

    value_and_grad = jax.value_and_grad(loss_of, has_aux=True)
    if microbatches == 1:
        (loss, (shown, report)), gradients = value_and_grad(state.parameters, batch, rng)
        signals = {name: of_one_batch(value) for name, value in report.signals.items()}
        return (loss, shown, report.replace(signals=signals)), gradients

    def accumulate(sums, inputs):
        microbatch, index = inputs
        result = value_and_grad(state.parameters, microbatch, jax.random.fold_in(rng, index), totals)
        (loss, ((nll, terms), report)), gradients = result
        return jax.tree.map(jnp.add, sums, (loss, nll, gradients)), (terms, report)

    # [B,T,...] → [B/A,A,T,...] → [A,B/A,T,...]: microbatch i takes every A-th row, so that each device keeps its rows.
    split = jax.tree.map(lambda x: x.reshape(-1, microbatches, *x.shape[1:]).swapaxes(0, 1), batch)
    if axis_size("pipeline") > 1:
        loss = functools.partial(_loss, parts)
        (loss, shown, report), gradients = pipeline.gradients(
            parts.config, parts.graphdef, loss, state, split, rng, count, parts.signals
        )
        return (loss, shown, over_microbatches(report)), gradients
    split = jax.tree.map(lambda x: constrain(x, partition_specs.MICROBATCHES), split)
    losses = parts.config.model.moe.losses
    totals = _balance_totals(parts, state, split, rng) if losses.scope == "step" and losses.balance else None
    zeros = (jnp.zeros(()), jnp.zeros(()), jax.tree.map(jnp.zeros_like, state.parameters))
    (loss, nll, gradients), (terms, report) = jax.lax.scan(accumulate, zeros, (split, jnp.arange(microbatches)))
    terms = jax.tree.map(lambda values: jnp.sum(values, axis=0), terms)
    return (loss, (nll, terms), over_microbatches(report)), gradients


def _noise_key(parts: Parts, rng: Array) -> Array | None:
    """The key of routing noise and dropout, None for an objective without them."""
    return rng if parts.objective.noise else None


def _balance_totals(parts: Parts, state: TrainState, split: Batch, rng: Array) -> BalanceSums | None:
    """Sums of every layer over all microbatches, by a forward pass of each with the same noise as its gradient."""

    def measure(_, inputs):
        microbatch, index = inputs
        model = nnx.merge(parts.graphdef, state.variables)
        key = _noise_key(parts, jax.random.fold_in(rng, index))
        layers = forward(model, microbatch, train=True, rng=key).layers
        return None, None if layers is None else layers.sums  # what tokens need is not read of them

    _, sums = jax.lax.scan(measure, None, (split, jnp.arange(parts.config.train.accumulation_steps)))
    return jax.tree.map(lambda values: jnp.sum(values, axis=0), sums)


def _loss(
    parts: Parts,
    model: Model,
    output: Output,
    batch: Batch,
    count: Array,
    teacher: tuple[Model, Output] | None = None,
    totals: BalanceSums | None = None,
) -> tuple[Array, tuple[tuple[Array, dict[str, Array]], Report]]:
    """A microbatch's share of the loss, and (its shares of cross-entropy and terms, the layers' report); with the
    totals of the step, its load-balancing loss is over the step."""
    config = parts.config
    sums = parts.objective.sums(config, model, output, batch, teacher)
    loss, *shown = jax.tree.map(lambda x: x / jnp.maximum(count, 1), (sums.loss, sums.cross_entropy, sums.terms))
    shown = tuple(shown)
    report, microbatches = output.report.replace(handed={}, losses={}), config.train.accumulation_steps
    losses = output.report.losses
    if totals is not None:
        moe = config.model.moe
        weights = balance_weights(moe.num_experts, moe.null_experts, moe.losses.null)
        layers = over_step(report.signals["layers"], totals, weights, microbatches)
        losses = losses | auxiliary_losses(layers, moe.losses)
        report = report.replace(signals=report.signals | {"layers": layers})
    return loss + total(losses) / microbatches, (shown, report)


def eval_step(
    graphdef: nnx.GraphDef[Model], variables: dict[str, Any], batch: Batch, token_bytes: ArrayLike
) -> EvalMetrics:
    """Sums over a held-out batch; no routing noise, no dropout."""
    model = nnx.merge(graphdef, variables)
    output = forward(model, batch)
    nll, num_targets = row_cross_entropy(output.hidden, model.output_matrix(), batch["targets"])
    has_target = batch["targets"] >= 0
    sizes = jnp.where(has_target, jnp.asarray(token_bytes)[jnp.where(has_target, batch["targets"], 0)], 0)
    return EvalMetrics(nll, num_targets, jnp.sum(sizes), output.layers)
