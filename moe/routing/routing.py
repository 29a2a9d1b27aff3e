"""Routing decisions of a batch: experts and weights of every token."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Bool, Float

from moe.config import ConfigError
from moe.routing.interface import Gate, GateInputs, GateOutput


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Routing:
    """Assignments of one MoE layer, a plain pytree: it can be saved, and replayed in the same layer under another
    dispatch mode or mesh.

    Attributes:
        expert_index: [G,S,K] int32, experts of a token, first choice first.
        combine_weights: [G,S,K] float32, factor of each expert's output; 0 where not chosen.
        chosen: [G,S,K] bool, False for padding, broken tokens and assignments that the gate does not send.
        router_logits: [G,S,E] float32; zeros for broken tokens.
        router_probs: [G,S,E] float32, softmax of the logits over E, or the gate's own probabilities.
        broken: [G,S] bool, real tokens with a NaN or infinite router or noise logit; they are not routed.
        smooth_load: [G,S,E] float32, differentiable probability of being chosen; None: not defined by the gate.
    """

    expert_index: Array
    combine_weights: Array
    chosen: Array
    router_logits: Array
    router_probs: Array
    broken: Array
    smooth_load: Array | None = None


def route(
    gate: Gate,
    router_logits: Float[Array, "G S E"],
    mask: Bool[Array | np.ndarray, "G S"],
    *,
    experts_per_token: int,
    **inputs: Any,
) -> Routing:
    """Apply a gate, and mask out padding and tokens with non-finite logits.

    Args:
        gate: the routing rule.
        router_logits: cast to float32.
        mask: True for real tokens; padding is never chosen and has zero weights.
        experts_per_token: K, at most E.
        **inputs: further fields of :class:`moe.routing.interface.GateInputs`, such as ``rng``.
    """
    router_logits, mask = router_logits.astype(jnp.float32), jnp.asarray(mask)
    finite = jnp.all(jnp.isfinite(router_logits), axis=-1)
    if inputs.get("noise_logits") is not None:
        finite &= jnp.all(jnp.isfinite(inputs["noise_logits"]), axis=-1)
        inputs["noise_logits"] = jnp.where(finite[..., None], inputs["noise_logits"], 0.0)
    router_logits = jnp.where(finite[..., None], router_logits, 0.0)
    valid = mask & finite
    output = gate.choose(router_logits, GateInputs(mask=valid, experts_per_token=experts_per_token, **inputs))
    if not isinstance(output, GateOutput) or output.weights.shape != output.expert_index.shape:
        raise ConfigError(f"gate {gate.source!r}: must return a GateOutput with expert_index and weights of one shape")
    chosen = jnp.broadcast_to(valid[..., None], output.expert_index.shape)
    if output.accepted is not None:
        chosen = chosen & output.accepted
    return Routing(
        expert_index=output.expert_index.astype(jnp.int32),
        combine_weights=jnp.where(chosen, output.weights, 0.0),
        chosen=chosen,
        router_logits=router_logits,
        router_probs=jax.nn.softmax(router_logits, axis=-1) if output.probs is None else output.probs,
        broken=mask & ~finite,
        smooth_load=output.smooth_load,
    )
