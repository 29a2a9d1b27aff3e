"""Training losses: cross-entropy of the next token, soft targets, and the auxiliary terms of the MoE layers."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jaxtyping import Float, Int

from moe.config import MoEConfig
from moe.layers.call import Report
from moe.parallel import partition_specs, target
from moe.parallel.mesh import TOKEN_AXES, axis_size, constrain
from moe.parallel.parameters import read_as
from moe.routing.balancing import AUXILIARY, PER_ASSIGNMENT, LayerReport, auxiliary_losses, step_target

#: Named scope of the chunked loss, by which the planner finds it in a compiled program.
LOSS_SCOPE = "loss"


def cross_entropy(
    logits: Float[Array, "B T V"], targets: Int[Array, "B T"], axis: int | None = None
) -> tuple[Float[Array, "*rows"], Int[Array, "*rows"]]:
    """Sum over positions of −log p(target), in nats and float32, and the number of positions with a target.

    Args:
        targets: negative where there is nothing to predict, here and below.
        axis: 1 for sums per row; None for one over all rows.
    """
    return jnp.sum(_token_losses(logits, targets), axis=axis), jnp.sum(targets >= 0, axis=axis)


def _token_losses(logits: Array, targets: Array) -> Array:
    """−log p(target) [B,T] in float32, 0 without a target."""
    has_target = targets >= 0
    logits = logits.astype(jnp.float32)
    if target.current().scatters_in_passes:  # as the gradient of a look-up is
        is_target = jnp.arange(logits.shape[-1]) == targets[..., None]
        losses = jax.nn.logsumexp(logits, axis=-1) - jnp.sum(jnp.where(is_target, logits, 0.0), axis=-1)
    else:
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.where(has_target, targets, 0))
    return jnp.where(has_target, losses, 0.0)


#: Tokens per device whose logits are in memory at once: 128 MiB in float32 at a vocabulary of 32,768.
_CHUNK = 1024


@jax.custom_vjp
def linear_cross_entropy(
    hidden: Float[Array, "B T D"], matrix: Float[Array, "D V"], targets: Int[Array, "B T"]
) -> tuple[Float[Array, ""], Int[Array, ""]]:
    """:func:`cross_entropy` of ``hidden @ matrix`` in chunks of positions, without [B,T,V] in memory.

    The gradient is computed in the forward pass, chunk by chunk, up to the incoming factor, so that logits are
    computed once (as in Liger-Kernel, Hsu et al. 2024).
    """
    with jax.named_scope(LOSS_SCOPE):
        chunks = _chunks(hidden, targets)
        nll, known = jax.lax.map(lambda chunk: cross_entropy(_logits(chunk[0], matrix), chunk[1]), chunks)
    return jnp.sum(nll), jnp.sum(known)


def row_cross_entropy(
    hidden: Float[Array, "B T D"], matrix: Float[Array, "D V"], targets: Int[Array, "B T"]
) -> tuple[Float[Array, " B"], Int[Array, " B"]]:
    """:func:`linear_cross_entropy` of each row: nats and number of targets; for evaluation."""
    with jax.named_scope(LOSS_SCOPE):
        chunks = _chunks(hidden, targets)
        sums = jax.lax.map(lambda chunk: cross_entropy(_logits(chunk[0], matrix), chunk[1], axis=1), chunks)
    # [C,B·X] → [B·X] → [B], with X parts of a row on as many devices
    nll, known = (jnp.sum(jnp.sum(part, axis=0).reshape(len(targets), -1), axis=1) for part in sums)
    return nll, known


def _chunks(hidden: Array, targets: Array) -> tuple[Array, Array]:
    """[C,B,P,D] and [C,B,P]: C chunks of P positions; the last one is padded with positions that have no target.

    Parts of a row on several devices count as rows.
    """
    parts = axis_size("context")
    # [B,T,...] → [B·X,T/X,...]
    hidden, targets = (
        constrain(x.reshape(len(x) * parts, -1, *x.shape[2:]), partition_specs.GROUPS) if parts > 1 else x
        for x in (hidden, targets)
    )
    batch, length, _ = hidden.shape
    rows = -(-batch // axis_size(*TOKEN_AXES))  # per device
    count = -(-length // max(_CHUNK // rows, 1))
    size = -(-length // count)
    surplus = ((0, 0), (0, count * size - length))

    # [B,T,...] → [B,C·P,...] → [B,C,P,...] → [C,B,P,...]
    def split(x: Array) -> Array:
        return x.reshape(batch, count, size, *x.shape[2:]).swapaxes(0, 1)

    return split(jnp.pad(hidden, (*surplus, (0, 0)))), split(jnp.pad(targets, surplus, constant_values=-1))


def _joined(chunks: Array, shape: tuple[int, ...]) -> Array:
    """[C,B·X,P,...] of :func:`_chunks` → [B·X,C,P,...] → [B·X,C·P,...] → [B,T,...], without the padding."""
    rows = chunks.swapaxes(0, 1)
    rows = rows.reshape(rows.shape[0], -1, *rows.shape[3:])
    return rows[:, : shape[1] // axis_size("context")].reshape(shape)


def _logits(hidden: Array, matrix: Array) -> Array:
    return constrain(hidden @ matrix, partition_specs.CHUNK_LOGITS)


def _with_gradient(hidden, matrix, targets):
    shards = axis_size(*TOKEN_AXES)

    def chunk(sums, inputs):
        part, part_targets = inputs
        logits, back = jax.vjp(lambda part: _logits(part, matrix), part)
        nll, d_logits, known = _softmax_gradient(logits, part_targets)
        # Each device accumulates over its own tokens, [B,P,·] → [X,B/X,P,·]; one sum over devices after the last chunk.
        by_device = [x.reshape(shards, -1, *x.shape[1:]) for x in (part, d_logits)]
        product = jnp.einsum("xbpd,xbpv->xdv", *by_device, preferred_element_type=jnp.float32)
        d_matrix = constrain(sums + product, partition_specs.PARTIAL_LOGITS_MATRIX)
        return d_matrix, (nll, known, *back(d_logits))

    with jax.named_scope(LOSS_SCOPE):
        zeros = constrain(jnp.zeros((shards, *matrix.shape)), partition_specs.PARTIAL_LOGITS_MATRIX)
        d_matrix, (nll, known, d_hidden) = jax.lax.scan(chunk, zeros, _chunks(hidden, targets))
        d_hidden = _joined(d_hidden, hidden.shape)
        d_matrix = jnp.sum(d_matrix, axis=0).astype(matrix.dtype)
    return (jnp.sum(nll), jnp.sum(known)), (d_hidden, d_matrix)


def _softmax_gradient(logits: Array, targets: Array) -> tuple[Array, Array, Array]:
    """:func:`cross_entropy` and its gradient [B,P,V] in the logits' dtype."""
    nll, back, known = jax.vjp(lambda logits: cross_entropy(logits, targets), logits, has_aux=True)
    (gradient,) = back(jnp.ones_like(nll))
    return nll, gradient, known


def _scaled(residuals, cotangents):
    d_hidden, d_matrix = ((x * cotangents[0]).astype(x.dtype) for x in residuals)
    return d_hidden, d_matrix, None


linear_cross_entropy.defvjp(_with_gradient, _scaled)


def token_cross_entropy(
    hidden: Float[Array, "B T D"], matrix: Float[Array, "D V"], targets: Int[Array, "B T"]
) -> Float[Array, "B T"]:
    """−log p(target) of ``hidden @ matrix``, 0 without a target; logits are computed again for the gradient, and the
    matrix's gradients of the chunks are added in float32."""
    exact = matrix.astype(jnp.float32)

    @jax.checkpoint
    def chunk(inputs: tuple[Array, Array]) -> Array:
        return _token_losses(_logits(inputs[0], read_as(exact, matrix)), inputs[1])

    with jax.named_scope(LOSS_SCOPE):
        nll = jax.lax.map(chunk, _chunks(hidden, targets))
    return _joined(nll, targets.shape)


def soft_cross_entropy(
    logits: Float[Array, "B T V"], teacher_logits: Float[Array, "B T V"], targets: Int[Array, "B T"]
) -> Float[Array, ""]:
    """Sum over positions with a target of −Σ_v p_teacher(v) log p(v), nats (Hinton et al. 2015, temperature 1); the
    teacher's logits receive no gradient."""
    probs = jax.nn.softmax(jax.lax.stop_gradient(teacher_logits).astype(jnp.float32), axis=-1)
    losses = optax.softmax_cross_entropy(logits.astype(jnp.float32), probs)
    return jnp.sum(jnp.where(targets >= 0, losses, 0.0))


@dataclasses.dataclass(frozen=True)
class Sums:
    """Sums of an objective over a batch; the step divides each by
    :meth:`moe.config.objectives.Objective.count`.

    Attributes:
        loss: minimised, without auxiliary terms.
        cross_entropy: logged under this name.
        terms: further numbers to log, by name.
    """

    loss: Array
    cross_entropy: Array
    terms: dict[str, Array] = dataclasses.field(default_factory=dict)


def describe_auxiliary(moe: MoEConfig) -> str:
    """The auxiliary terms of a run and their weights, in words."""
    weights = {name: getattr(moe.losses, weight) for weight, name in AUXILIARY.values()}
    used = [f"{name} x {weight:g}" for name, weight in weights.items() if weight]
    return f"on ({', '.join(used)})" if used and moe.gate is not None else "off"


def auxiliary_loss(layers: LayerReport | None, config: MoEConfig) -> Array:
    """Sum of weighted auxiliary terms over the MoE layers (Switch 2021, section 2.2).

    Args:
        layers: reports with a leading axis [L], or None in a dense model.
    """
    return total({} if layers is None else auxiliary_losses(layers, config.losses))


def total(losses: Mapping[str, Array]) -> Array:
    """Sum of weighted losses over their names and layers."""
    return sum(map(jnp.sum, losses.values()), jnp.zeros((), jnp.float32))


def of_one_batch(signal: Any) -> Any:
    """A signal of a step without microbatches: a LayerReport without the selection biases that single tokens need,
    which are large."""
    if not isinstance(signal, LayerReport):
        return signal
    return dataclasses.replace(signal, sums=dataclasses.replace(signal.sums, needed=None))


def over_microbatches(report: Report) -> Report:
    """Report of a step from those of its microbatches, stacked over a leading axis: means of metrics, the largest of
    other signals, and of LayerReports :func:`mean_reports`."""
    metrics = jax.tree.map(lambda values: jnp.mean(values, axis=0), report.metrics)
    signals = {
        name: mean_reports(value) if isinstance(value, LayerReport) else jnp.max(value, axis=0)
        for name, value in report.signals.items()
    }
    return report.replace(metrics=metrics, signals=signals)


def mean_reports(reports: LayerReport) -> LayerReport:
    """One report of a step's microbatches, stacked over a leading axis.

    Losses are means over microbatches, as in the objective. Metrics are those of all tokens together: shares of
    assignments, means over tokens, and ``broken_tokens`` as a sum; so is the selection bias that would have balanced
    them, if the reports have what each token needs.
    """
    needed, reports = reports.sums.needed, of_one_batch(reports)
    mean = jax.tree.map(lambda values: jnp.mean(values, axis=0), reports)
    if needed is not None:
        target = step_target(needed, reports.sums.tokens)
        mean = dataclasses.replace(mean, sums=dataclasses.replace(mean.sums, bias_target=target))

    def together(name: str, counts: Array) -> Array:
        values = getattr(reports, name)
        shares = counts / jnp.maximum(jnp.sum(counts, axis=0), 1)
        return jnp.sum(values * shares.reshape(shares.shape + (1,) * (values.ndim - shares.ndim)), axis=0)

    metrics = {name: together(name, reports.sums.assignments) for name in PER_ASSIGNMENT}
    metrics |= {name: together(name, reports.sums.tokens) for name in ("router_entropy", "active_experts")}
    return dataclasses.replace(mean, broken_tokens=jnp.sum(reports.broken_tokens, axis=0), **metrics)
