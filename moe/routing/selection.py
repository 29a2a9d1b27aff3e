"""Helpers that gates share: top-k without a gather over tokens, group limits."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Int


def pick(scores: Float[Array, "*batch E"], index: Int[Array, "*batch K"]) -> Float[Array, "*batch K"]:
    """Select entries of the last axis; the gradient is elementwise instead of a scatter."""
    # [...,1,E] where [...,K,E] → [...,K]
    chosen = index[..., None] == jnp.arange(scores.shape[-1])
    return jnp.sum(jnp.where(chosen, scores[..., None, :], 0.0), axis=-1)


def top_k(scores: Float[Array, "*batch E"], k: int) -> tuple[Float[Array, "*batch K"], Int[Array, "*batch K"]]:
    """Values and indices of the k highest scores, ties to the lower index; ``jax.lax.top_k`` as k rounds of argmax.

    XLA's partitioner cannot split ``lax.top_k`` over tokens: on a mesh every device would gather all logits and route
    all tokens. It can split reductions over E. The argmax is written as the lowest index that has the maximum because
    XLA on CPU runs ``jnp.argmax``, a reduction of (value, index) pairs, on one core and ten times slower.
    """
    num_experts = scores.shape[-1]
    experts = jnp.arange(num_experts)
    remaining, indices = jax.lax.stop_gradient(scores), []
    for _ in range(k):
        highest = jnp.max(remaining, axis=-1, keepdims=True)
        indices.append(jnp.min(jnp.where(remaining == highest, experts, num_experts - 1), axis=-1))
        remaining = jnp.where(indices[-1][..., None] == experts, -jnp.inf, remaining)
    index = jnp.stack(indices, axis=-1)
    return pick(scores, index), index


def rank(scores: Float[Array, "*batch N"]) -> Int[Array, "*batch N"]:
    """Rank of each entry of the last axis: 0 for the highest, ties to the lower index."""
    order = jnp.argsort(-scores, axis=-1, stable=True)
    return jnp.argsort(order, axis=-1).astype(jnp.int32)


def limit_to_groups(
    scores: Float[Array, "*batch E"], groups: int, kept: int, scores_per_group: int
) -> Float[Array, "*batch E"]:
    """Scores with −∞ outside the kept groups; a group is ranked by the sum of its ``scores_per_group`` highest
    (1: DeepSeek-V2 2024, section 2.2.2; 2: DeepSeek-V3 2024, section 2.1.2)."""
    if kept == groups:
        return scores
    # [...,E] → [...,groups,E/groups]
    by_group = scores.reshape(*scores.shape[:-1], groups, -1)
    values, _ = top_k(by_group, min(scores_per_group, by_group.shape[-1]))
    _, kept_index = top_k(jnp.sum(values, axis=-1), kept)
    is_kept = jnp.any(kept_index[..., None] == jnp.arange(groups), axis=-2)
    return jnp.where(is_kept[..., None], by_group, -jnp.inf).reshape(scores.shape)


def quantile(
    values: Float[Array, "G S E"], mask: Bool[Array, "G S"], share: Float[Array, ""] | float
) -> Float[Array, " E"]:
    """Largest q of each expert such that at most this share of the masked-in tokens has a value below q.

    Found by narrowing an interval to a sixteenth, six times: each time the counts at 15 points are summed over all
    tokens, so that a mesh exchanges counts and no token. The error is 2⁻²⁴ of the values' range.
    """
    inside = mask[..., None]
    low = jnp.min(jnp.where(inside, values, jnp.inf), axis=(0, 1))
    high = jnp.max(jnp.where(inside, values, -jnp.inf), axis=(0, 1))
    low, high = (jnp.where(jnp.isfinite(bound), bound, 0.0) for bound in (low, high))
    steps = jnp.arange(17) / 16
    for _ in range(6):
        points = low[:, None] + (high - low)[:, None] * steps  # [E,17]
        below = jnp.sum(inside[..., None] & (values[..., None] < points[:, 1:-1]), axis=(0, 1))  # [E,15]
        last = jnp.sum(below <= share * jnp.sum(mask), axis=-1, keepdims=True)
        low, high = (jnp.take_along_axis(points, last + i, axis=-1)[:, 0] for i in (0, 1))
    return low
