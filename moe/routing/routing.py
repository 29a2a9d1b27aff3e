"""The routing decision for a batch of tokens: experts and weights."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from moe.routing.gates import Given
from moe.routing.registry import Gate


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Routing:
    """What a gate decided for every token.

    A value: it can be kept and given to the same layers again, under another dispatch mode or mesh.

    Attributes:
        expert_index: [G,S,K] int32, the experts of a token, first choice first.
        combine_weights: [G,S,K] float32, what each expert's output is multiplied by; 0 where not chosen.
        chosen: [G,S,K] bool, False where the token is not sent: padding, or a choice the gate declined.
        router_logits: [G,S,E] float32; zeros for a token in ``broken``.
        router_probs: [G,S,E] float32, softmax of the logits over E, or the gate's own (:class:`moe.routing.gates.Choice`).
        broken: [G,S] bool, real tokens with a NaN or infinite logit, of noise too; they are sent nowhere.
        smooth_load: [G,S,E] float32, differentiable probability of being chosen; None: the gate has none.
    """

    expert_index: Array
    combine_weights: Array
    chosen: Array
    router_logits: Array
    router_probs: Array
    broken: Array
    smooth_load: Array | None = None


def route(gate: Gate, router_logits: Array, mask: Array, *, experts_per_token: int, **given: Any) -> Routing:
    """Applies a gate and takes padding, and tokens whose logits are not finite, out.

    Args:
        gate: an entry of :data:`GATES`.
        router_logits: [G,S,E], cast to float32.
        mask: [G,S] bool, True for real tokens. Padding is never chosen and has zero weights.
        experts_per_token: K, at most E.
        **given: the other fields of :class:`moe.routing.gates.Given`, such as ``rng``.
    """
    router_logits = router_logits.astype(jnp.float32)
    finite = jnp.all(jnp.isfinite(router_logits), axis=-1)
    if given.get("noise_logits") is not None:
        finite &= jnp.all(jnp.isfinite(given["noise_logits"]), axis=-1)
        given["noise_logits"] = jnp.where(finite[..., None], given["noise_logits"], 0.0)
    router_logits = jnp.where(finite[..., None], router_logits, 0.0)
    sound = mask & finite
    choice = gate.choose(router_logits, Given(mask=sound, experts_per_token=experts_per_token, **given))
    chosen = jnp.broadcast_to(sound[..., None], choice.expert_index.shape)
    if choice.accepted is not None:
        chosen = chosen & choice.accepted
    return Routing(
        expert_index=choice.expert_index.astype(jnp.int32),
        combine_weights=jnp.where(chosen, choice.weights, 0.0),
        chosen=chosen,
        router_logits=router_logits,
        router_probs=jax.nn.softmax(router_logits, axis=-1) if choice.probs is None else choice.probs,
        broken=mask & ~finite,
        smooth_load=choice.smooth_load,
    )
