"""What is minimised: cross-entropy of the next token, plus the named auxiliary terms of the MoE layers.

In: a forward pass's :class:`moe.transformer.Output` and targets [B,T]. Out: a scalar, and every term raw.

Letters: B batch, T sequence, V vocab, L MoE layers.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax
from jax import Array

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


def auxiliary_loss(layers: LayerReport | None, config: MoEConfig) -> Array:
    """Weighted auxiliary terms, summed over the MoE layers (Switch 2021, section 2.2: "for each Switch layer").

    Args:
        layers: reports with a leading axis [L], or None in a dense model.
        config: resolved.
    """
    if layers is None:
        return jnp.zeros((), jnp.float32)
    terms = config.load_balancing_weight * layers.load_balancing_loss + config.z_loss_weight * layers.router_z_loss
    return jnp.sum(terms)


def mean_reports(reports: LayerReport) -> LayerReport:
    """Mean over a leading axis of batches."""
    return jax.tree.map(lambda values: jnp.mean(values, axis=0), reports)
