"""Dispatch by one-hot matmuls, and Soft MoE's mixing."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array

from moe.dispatch.experts import Experts, apply_experts
from moe.dispatch.plan import Plan
from moe.routing.routing import Routing


def einsum(x: Array, routing: Routing, plan: Plan, experts: Experts) -> Array:
    """Moves rows by one-hot matmuls over [G,S,E,C] (GShard 2020, algorithm 2)."""
    expert = jax.nn.one_hot(routing.expert_index, plan.num_experts, dtype=jnp.float32)  # [G,S,K,E]
    slot = jax.nn.one_hot(jnp.where(plan.kept, plan.position_in_expert, -1), plan.capacity, dtype=jnp.float32)
    dispatch_mask = jnp.einsum("gske,gskc->gsec", expert, slot)
    combine_weights = jnp.einsum("gske,gskc,gsk->gsec", expert, slot, routing.combine_weights)
    return mix(x, dispatch_mask, combine_weights, experts)


def mix(x: Array, dispatch_weights: Array, combine_weights: Array, experts: Experts) -> Array:
    """x [G,S,D], weights [G,S,E,C] of tokens in slots and of slots in outputs → y [G,S,D] float32."""
    outputs = apply_experts(jnp.einsum("gsec,gsd->egcd", dispatch_weights.astype(x.dtype), x), experts)
    return jnp.einsum("gsec,egcd->gsd", combine_weights, outputs, preferred_element_type=jnp.float32)


def soft_weights(slot_logits: Array, mask: Array) -> tuple[Array, Array]:
    """Dispatch and combine weights of Soft MoE: softmax over tokens, softmax over slots (2023, equations 1 and 3).

    Args:
        slot_logits: [G,S,E,P] float32, P slots per expert.
        mask: [G,S] bool; padding is in no slot and takes nothing.
    """
    real = mask[..., None, None]
    # Where a group has no real token, softmax over nothing would be NaN.
    dispatch = jax.nn.softmax(jnp.where(real, slot_logits, jnp.finfo(jnp.float32).min), axis=1)
    combine = jax.nn.softmax(slot_logits, axis=(2, 3))
    return jnp.where(real, dispatch, 0.0), jnp.where(real, combine, 0.0)
