"""What keeps experts busy, and the numbers that tell whether they are.

In: a :class:`moe.routing.Routing`, which tokens are real, which choices found room. Out: the load-balancing loss,
the router z-loss and a :class:`LayerReport` per layer. Padding counts in none of them. Everything is float32 and
taken over all tokens of the (micro)batch, so that no value depends on groups or mesh.

Letters: G groups, S tokens per group, E experts, K choices per token.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from moe.routing import Routing


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LayerReport:
    """Routing of one MoE layer over one batch; stacked over layers it gains a leading axis.

    Attributes:
        load_balancing_loss: [] raw, 1 at perfect balance, E when all go to one expert.
        router_z_loss: [] raw.
        expert_load: [E] share of the chosen (token, choice) pairs that each expert was asked to take; sums to 1.
        fraction_tokens_dropped: [] share of the chosen pairs that found no room.
        router_entropy: [] mean entropy of router_probs, nats.
    """

    load_balancing_loss: Array
    router_z_loss: Array
    expert_load: Array
    fraction_tokens_dropped: Array
    router_entropy: Array


def count_per_expert(expert_index: Array, counted: Array, num_experts: int) -> Array:
    """[E] float32: how many counted pairs name each expert. expert_index and counted: [..., K]."""
    return jnp.sum(jax.nn.one_hot(expert_index, num_experts) * counted[..., None], axis=tuple(range(expert_index.ndim)))


def token_mean(values: Array, mask: Array) -> Array:
    """Mean of values [G,S,...] over the tokens of mask [G,S]; 0 if there are none."""
    weights = mask.astype(jnp.float32).reshape(mask.shape + (1,) * (values.ndim - mask.ndim))
    return jnp.sum(values * weights, axis=(0, 1)) / jnp.maximum(jnp.sum(mask), 1)


def load_balancing_loss(routing: Routing, mask: Array, *, first_choice: bool = False) -> Array:
    """E·Σ_e f_e·P_e, f_e the share of choices sent to e, P_e the mean probability of e (Switch 2021, equations 4-6).

    1 at perfect balance whatever K is, since f sums to 1. GShard's ℓ_aux (2020, algorithm 1) is this over first
    choices alone, divided by E². The gradient flows through P only.

    Args:
        routing: of one layer.
        mask: [G,S] bool, real tokens.
        first_choice: count first choices alone, as GShard does.
    """
    num_experts = routing.router_probs.shape[-1]
    columns = slice(0, 1 if first_choice else None)
    counts = count_per_expert(routing.expert_index[..., columns], routing.chosen[..., columns], num_experts)
    share = counts / jnp.maximum(jnp.sum(counts), 1.0)
    return num_experts * jnp.sum(jax.lax.stop_gradient(share) * token_mean(routing.router_probs, mask))


def router_z_loss(router_logits: Array, mask: Array) -> Array:
    """Mean over real tokens of logsumexp(logits)² (ST-MoE 2022, equation 5). router_logits: [G,S,E]; mask: [G,S]."""
    return token_mean(jnp.square(jax.nn.logsumexp(router_logits, axis=-1)), mask)


def report(routing: Routing, mask: Array, kept: Array, *, first_choice: bool) -> LayerReport:
    """All numbers of one layer.

    Args:
        routing: of the layer.
        mask: [G,S] bool, real tokens.
        kept: [G,S,K] bool, chosen pairs that found room.
        first_choice: as in :func:`load_balancing_loss`.
    """
    num_experts = routing.router_probs.shape[-1]
    counts = count_per_expert(routing.expert_index, routing.chosen, num_experts)
    num_chosen = jnp.maximum(jnp.sum(routing.chosen), 1)
    entropy = -jnp.sum(routing.router_probs * jax.nn.log_softmax(routing.router_logits, axis=-1), axis=-1)
    return LayerReport(
        load_balancing_loss=load_balancing_loss(routing, mask, first_choice=first_choice),
        router_z_loss=router_z_loss(routing.router_logits, mask),
        expert_load=counts / num_chosen,
        fraction_tokens_dropped=1.0 - (jnp.sum(kept) + (jnp.sum(routing.chosen) == 0)) / num_chosen,
        router_entropy=token_mean(entropy, mask),
    )


def max_violation(expert_load: ArrayLike) -> Array:
    """(max load − mean)/mean over the last axis (loss-free balancing 2024, section 2.1). expert_load: [...,E]."""
    return jnp.max(jnp.asarray(expert_load), axis=-1) * jnp.shape(expert_load)[-1] - 1.0


def dead_experts(expert_load: ArrayLike) -> Array:
    """How many experts took no token. expert_load: [...,E]."""
    return jnp.sum(jnp.asarray(expert_load) == 0, axis=-1)
