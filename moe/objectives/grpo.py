"""Group relative policy optimisation from rollouts whose experts are replayed.

A token with probability ratio r = π/π_old and advantage A has the loss ::

    −min(r A, clip(r, 1 − clip_low, 1 + clip_high) A) + kl (ρ − ln ρ − 1),   ρ = π_ref/π

(DeepSeekMath, Shao et al. 2024, arXiv 2402.03300, equations 3 and 4; two bounds as in DAPO, Yu et al. 2025,
arXiv 2503.14476, equation 8). The loss is a mean over tokens (DAPO), a mean over completions of means over tokens
(GRPO), or a sum over tokens divided by the completions and a constant (Dr. GRPO, Liu et al. 2025, arXiv 2503.20783).

The model runs without noise and with the experts that the rollouts recorded (rollout routing replay, Ma et al. 2025,
arXiv 2510.11370): weights and gradients are its own router's.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from moe.config import PolicyConfig

#: Bound of ln r and ln ρ: exp of more is useless in float32 (Tunix has the same).
_LARGEST_LOG_RATIO = 20.0
#: A ratio above this, or below its inverse, counts as extreme (Ma et al. 2025).
EXTREME = 2.0


def token_terms(
    policy: PolicyConfig,
    log_probs: Float[Array, "B T"],
    old: Float[Array, "B T"],
    advantages: Float[Array, "B T"],
    reference: Float[Array, "B T"] | None,
) -> dict[str, Float[Array, "B T"]]:
    """Loss of each token, and the numbers that :meth:`moe.objectives.policy.Policy.sums` logs.

    Log-probabilities are 0, and so is the advantage, where there is no target.

    Args:
        policy: settings.
        log_probs: of the policy.
        old: of the sampling policy, recorded when the tokens were sampled.
        advantages: of their completions.
        reference: of the reference model; None: there is none.
    """
    ratio = jnp.exp(jnp.clip(log_probs - old, -_LARGEST_LOG_RATIO, _LARGEST_LOG_RATIO))
    clipped = jnp.clip(ratio, 1 - policy.clip_low, 1 + policy.clip_high)
    gain = jnp.minimum(ratio * advantages, clipped * advantages)
    terms = {
        "loss": -gain,
        "ratio": ratio,
        "clipped": clipped * advantages < ratio * advantages,
        "extreme": (ratio > EXTREME) | (ratio < 1 / EXTREME),
        "old_kl": divergence(old, log_probs),
    }
    if reference is not None:
        terms["kl"] = divergence(log_probs, reference)
        terms["loss"] += policy.kl * terms["kl"]
    return {name: values.astype(jnp.float32) for name, values in terms.items()}


def divergence(log_probs: Float[Array, "B T"], other: Float[Array, "B T"]) -> Float[Array, "B T"]:
    """ρ − ln ρ − 1 with ρ = other/π: an estimate of KL(π ‖ other) by one sample of π, never negative (Schulman's
    k3)."""
    log_ratio = jnp.clip(other - log_probs, -_LARGEST_LOG_RATIO, _LARGEST_LOG_RATIO)
    # In float32, exp(x) - x - 1 is only rounding where x, in a policy near the other, is below 0.001.
    return jnp.expm1(log_ratio) - log_ratio


def token_weights(
    has_target: Bool[Array, "B T"], segment_ids: Int[Array, "B T"], *, per_completion: bool
) -> Float[Array, "B T"]:
    """1 for each token with a target, or 1 over the number of targets of its completion."""
    present = has_target.astype(jnp.float32)
    if not per_completion:
        return present
    most = segment_ids.shape[1] + 1

    def of_row(present: Array, segments: Array) -> Array:
        return present / jnp.maximum(jax.ops.segment_sum(present, segments, most)[segments], 1)

    return jax.vmap(of_row)(present, segment_ids)
