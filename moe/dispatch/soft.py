"""Soft MoE: every slot is a weighted mean of all tokens, every token one of all slots' outputs (2023, section 2)."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float

from moe.dispatch.einsum import mix_slots
from moe.dispatch.experts import Experts
from moe.routing.routing import Routing


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SoftPlan:
    """Weights of tokens in slots and of slots in outputs.

    Attributes:
        dispatch_weights: [G,S,E,C] float32, C slots per expert; sums to 1 over the valid tokens of a group.
        combine_weights: [G,S,E,C] float32; sums to 1 over the slots; 0 for tokens that are not valid.
        kept: [G,S,K] bool; no assignment is dropped.
    """

    dispatch_weights: Array
    combine_weights: Array
    kept: Array


def plan_slots(slot_logits: Float[Array, "G S E C"], routing: Routing, mask: Bool[Array, "G S"]) -> SoftPlan:
    """Weights of a layer's slots.

    Args:
        slot_logits: of every token and slot, float32.
        routing: of the layer; its broken tokens are in no slot.
        mask: real tokens; padding is in no slot.
    """
    valid = mask & ~routing.broken
    weights = soft_weights(jnp.where(valid[..., None, None], slot_logits, 0.0), valid)
    return SoftPlan(*weights, kept=routing.chosen)


def soft_weights(
    slot_logits: Float[Array, "G S E C"], valid: Bool[Array, "G S"]
) -> tuple[Float[Array, "G S E C"], Float[Array, "G S E C"]]:
    """Dispatch weights, a softmax over tokens, and combine weights, a softmax over slots (equations 1 and 3)."""
    valid = valid[..., None, None]
    # A group without valid tokens: softmax over −inf alone would be NaN.
    dispatch = jax.nn.softmax(jnp.where(valid, slot_logits, jnp.finfo(jnp.float32).min), axis=1)
    combine = jax.nn.softmax(slot_logits, axis=(2, 3))
    return jnp.where(valid, dispatch, 0.0), jnp.where(valid, combine, 0.0)


def soft(x: Float[Array, "G S D"], routing: Routing, plan: SoftPlan, experts: Experts) -> Float[Array, "G S D"]:
    """Applies the experts to the slots of a plan; returns float32."""
    del routing
    return mix_slots(x, plan.dispatch_weights, plan.combine_weights, experts)
