"""What is minimised: cross-entropy of the next token, plus the named auxiliary terms of the MoE layers.

In: a forward pass's :class:`moe.transformer.Output` and targets [B,T]. Out: a scalar, and every term raw.

Letters: B batch, T sequence, V vocab, L MoE layers.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax
from jax import Array

from moe import sharding
from moe.balancing import LayerReport
from moe.config import MoEConfig


def cross_entropy(logits: Array, targets: Array) -> tuple[Array, Array]:
    """Sum over positions of −log p(target), nats, in float32, and how many positions had a target.

    Args:
        logits: [B,T,V].
        targets: [B,T] int32; negative where there is nothing to predict.
    """
    known = targets >= 0
    losses = optax.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), jnp.where(known, targets, 0))
    return jnp.sum(jnp.where(known, losses, 0.0)), jnp.sum(known)


#: Positions of a row whose logits are held at once. A vocabulary of 32,000 at 4096 positions is half a gigabyte a row.
_CHUNK = 512


def linear_cross_entropy(hidden: Array, matrix: Array, targets: Array) -> tuple[Array, Array]:
    """:func:`cross_entropy` of ``hidden @ matrix``, without ever holding [B,T,V].

    Rows longer than 512 positions go chunk by chunk; the backward pass computes each chunk's logits again.

    Args:
        hidden: [B,T,D].
        matrix: [D,V].
        targets: [B,T] int32; negative where there is nothing to predict.
    """
    batch, length, _ = hidden.shape
    size = next(size for size in range(min(length, _CHUNK), 0, -1) if length % size == 0)

    def chunk(inputs: tuple[Array, Array]) -> tuple[Array, Array]:
        part, part_targets = inputs
        return cross_entropy(sharding.constrain(part @ matrix, sharding.LOGITS), part_targets)

    if size == length:
        return chunk((hidden, targets))

    # [B,T,...] → [B,T/size,size,...] → [T/size,B,size,...]
    def split(x: Array) -> Array:
        return x.reshape(batch, length // size, size, *x.shape[2:]).swapaxes(0, 1)

    with jax.named_scope("loss"):
        nll, known = jax.lax.map(jax.checkpoint(chunk), (split(hidden), split(targets)))
    return jnp.sum(nll), jnp.sum(known)


def soft_cross_entropy(logits: Array, teacher_logits: Array, targets: Array) -> Array:
    """Sum over the positions of targets of −Σ_v p_teacher(v) log p(v), nats (Hinton et al. 2015, at temperature 1).

    Args:
        logits: [B,T,V].
        teacher_logits: [B,T,V]; no gradient reaches them.
        targets: [B,T] int32; negative where there is nothing to predict.
    """
    probs = jax.nn.softmax(jax.lax.stop_gradient(teacher_logits).astype(jnp.float32), axis=-1)
    losses = optax.softmax_cross_entropy(logits.astype(jnp.float32), probs)
    return jnp.sum(jnp.where(targets >= 0, losses, 0.0))


def auxiliary_loss(layers: LayerReport | None, config: MoEConfig) -> Array:
    """Weighted auxiliary terms, summed over the MoE layers (Switch 2021, section 2.2: "for each Switch layer").

    Args:
        layers: reports with a leading axis [L], or None in a dense model.
        config: resolved.
    """
    if layers is None:
        return jnp.zeros((), jnp.float32)
    terms = (
        config.load_balancing_weight * layers.load_balancing_loss,
        config.device_balance_weight * layers.device_balance_loss,
        config.importance_weight * layers.importance_loss,
        config.load_weight * layers.load_loss,
        config.z_loss_weight * layers.router_z_loss,
    )
    return sum((jnp.sum(term) for term in terms), jnp.zeros((), jnp.float32))


def mean_reports(reports: LayerReport) -> LayerReport:
    """Mean over a leading axis of batches."""
    return jax.tree.map(lambda values: jnp.mean(values, axis=0), reports)
