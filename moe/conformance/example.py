"""The layer that ``moe conform`` checks where no other is named: a template to replace by yours, in plain JAX."""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


def layer(
    weights: Mapping[str, jax.Array], x: Float[Array, "G S D"], mask: Bool[Array, "G S"]
) -> tuple[Float[Array, "G S D"], dict[str, jax.Array]]:
    """Top-2 of the softmax, not renormalised, without a capacity; every expert computes every token.

    Args:
        weights: ``router`` [D,E], ``gate`` and ``up`` [E,D,F], ``down`` [E,F,D].
        x: inputs.
        mask: real tokens; the others neither get an output nor count in a loss.

    Returns:
        The output, and whatever else should be compared: losses, choices, weights.
    """
    router_probs = jax.nn.softmax(x @ weights["router"], axis=-1)
    combine_weights, expert_index = jax.lax.top_k(router_probs, 2)
    hidden = jax.nn.silu(jnp.einsum("gsd,edf->gsef", x, weights["gate"])) * jnp.einsum(
        "gsd,edf->gsef", x, weights["up"]
    )
    outputs = jnp.einsum("gsef,efd->gsed", hidden, weights["down"])
    chosen = jnp.take_along_axis(outputs, expert_index[..., None], axis=2)
    y = jnp.where(mask[..., None], jnp.sum(chosen * combine_weights[..., None], axis=2), 0)
    num_experts, tokens = router_probs.shape[-1], jnp.sum(mask)
    assignments = jax.nn.one_hot(expert_index, num_experts).sum(2) * mask[..., None]
    fraction = jnp.sum(assignments, (0, 1)) / (2 * tokens)  # f of Switch (2021), equation 5
    mean_probability = jnp.sum(router_probs * mask[..., None], (0, 1)) / tokens  # P of equation 6
    return y, {"balance_loss": num_experts * jnp.sum(fraction * mean_probability)}
