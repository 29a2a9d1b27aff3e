"""Load-balancing coefficients: the one place that converts between the normalisations of other code and ours.

Our loss is 1 per layer at perfect balance and summed over the L MoE layers. Hugging Face's is a single loss over all
layers together, K at perfect balance, hence the factor K / L. DeepSeek's is normalised as ours. For Switch's
encoder-decoder, Hugging Face takes the mean over the layers of each of the two stacks, hence 2 / L.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array

from moe.config import ModelConfig, sparse_layers, stacks
from moe.interop.families.family import Family
from moe.routing.balancing import count_per_expert
from moe.routing.interface import top_k
from moe.routing.routing import Routing


def weight_here(family: Family, coefficient: float, model: ModelConfig) -> float:
    """``model.moe.losses.balance`` that weighs as much at balance as the family's coefficient."""
    return coefficient * _factor(family, model)


def coefficient_there(family: Family, model: ModelConfig) -> float:
    """The family's coefficient for ``model.moe.losses.balance``; the reverse of :func:`weight_here`."""
    return round(model.moe.losses.balance / _factor(family, model), 12)


def _factor(family: Family, model: ModelConfig) -> float:
    if family.balance_scale == "per layer":
        return 1.0
    if family.balance_scale == "per stack":
        return sum(any(kind.sparse for kind in kinds) for kinds in stacks(model).values()) / sum(sparse_layers(model))
    return model.moe.experts_per_token / sum(sparse_layers(model))


def load_balancing_loss(routing: Routing) -> Array:
    """Hugging Face's auxiliary loss over all MoE layers together: E·Σ_e (Σ_k f_ke)·P_e, K at perfect balance.

    P_e is the mean of the softmax of the router logits and f_ke the share of tokens whose k-th highest logit is e,
    both over the tokens of all layers, whatever the gate's rule; every token counts, as in Hugging Face without an
    attention mask.

    Args:
        routing: arrays [L,G,S,...], from ``model(tokens, return_routing=True).routing``.
    """
    num_experts = routing.router_logits.shape[-1]
    tokens = routing.router_logits.size // num_experts
    _, highest = top_k(routing.router_logits, routing.expert_index.shape[-1])
    counts = count_per_expert(highest, jnp.ones_like(highest, bool), num_experts)
    mean_probs = jnp.mean(jax.nn.softmax(routing.router_logits, axis=-1), axis=(0, 1, 2))
    return num_experts * jnp.sum(counts / tokens * mean_probs)


def switch_losses(routing: Routing | None) -> tuple[Array, Array]:
    """Hugging Face's (router z-loss, balance loss) of one stack of a Switch encoder-decoder; padding counts.

    Both are means over the stack's layers; the balance loss is taken within each row, 1 at perfect balance. Hugging
    Face leaves a stack in which every layer is MoE out of its sum over stacks; here it has these losses.

    Args:
        routing: of one stack, arrays [L,B,T,...]; None: a stack without MoE layers.
    """
    if routing is None:
        return jnp.zeros(()), jnp.zeros(())
    # Gather the layers of each row: [L,B,T,E] → [B,L,T,E]
    logits = jnp.moveaxis(routing.router_logits, 0, 1)
    num_experts = logits.shape[-1]
    counted = jax.nn.one_hot(jnp.moveaxis(routing.expert_index[..., 0], 0, 1), num_experts)
    products = jnp.mean(counted, axis=(1, 2)) * jnp.mean(jax.nn.softmax(logits, axis=-1), axis=(1, 2))
    return jnp.mean(jax.nn.logsumexp(logits, axis=-1) ** 2), num_experts**2 * jnp.mean(products)
