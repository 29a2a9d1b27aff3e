"""Dispatch by one-hot matmuls (GShard 2020, algorithm 2)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from moe.dispatch.experts import Experts, apply_experts
from moe.dispatch.plan import Plan
from moe.routing.routing import Routing


def einsum(x: Float[Array, "G S D"], routing: Routing, plan: Plan, experts: Experts) -> Float[Array, "G S D"]:
    """Moves rows by one-hot matmuls over [G,S,E,C]; returns float32."""
    expert = jax.nn.one_hot(routing.expert_index, plan.num_experts, dtype=jnp.float32)  # [G,S,K,E]
    slot = jax.nn.one_hot(jnp.where(plan.kept, plan.position_in_expert, -1), plan.capacity, dtype=jnp.float32)
    dispatch_mask = jnp.einsum("gske,gskc->gsec", expert, slot)
    combine_weights = jnp.einsum("gske,gskc,gsk->gsec", expert, slot, routing.combine_weights)
    return mix_slots(x, dispatch_mask, combine_weights, experts)


def mix_slots(
    x: Float[Array, "G S D"],
    dispatch_weights: Float[Array, "G S E C"],
    combine_weights: Float[Array, "G S E C"],
    experts: Experts,
) -> Float[Array, "G S D"]:
    """Fills slots with weighted sums of tokens, and tokens with weighted sums of the experts' outputs, in float32."""
    outputs = apply_experts(jnp.einsum("gsec,gsd->egcd", dispatch_weights.astype(x.dtype), x), experts)
    return jnp.einsum("gsec,egcd->gsd", combine_weights, outputs, preferred_element_type=jnp.float32)
