"""Load-balancing coefficients: the one place that converts between the normalisations of other code and ours.

Our loss is 1 at perfect balance in each layer and summed over the L MoE layers. Hugging Face's is one for all layers
together and K at perfect balance, hence the factor K / L. DeepSeek's is normalised as ours.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array

from moe.config import ModelConfig, sparse_layers
from moe.interop.families.family import Family
from moe.routing.balancing import count_per_expert
from moe.routing.routing import Routing


def weight_here(family: Family, coefficient: float, model: ModelConfig) -> float:
    """``model.moe.load_balancing_weight`` that weighs as much at balance as the family's coefficient."""
    return coefficient * _factor(family, model)


def coefficient_there(family: Family, model: ModelConfig) -> float:
    """The family's coefficient for ``model.moe.load_balancing_weight``; the reverse of :func:`weight_here`."""
    return round(model.moe.load_balancing_weight / _factor(family, model), 12)


def _factor(family: Family, model: ModelConfig) -> float:
    if family.balance_scale == "per layer":
        return 1.0
    return model.moe.experts_per_token / sum(sparse_layers(model))


def load_balancing_loss(routing: Routing) -> Array:
    """Hugging Face's auxiliary loss over all MoE layers together: E·Σ_e (Σ_k f_ke)·P_e, K at perfect balance.

    f_ke is the share of tokens whose k-th choice is e and P_e the mean probability of e, both over the tokens of all
    layers; every token counts, as it does there without an attention mask.

    Args:
        routing: arrays [L,G,S,...], from ``model(tokens, return_routing=True).routing``.
    """
    num_experts = routing.router_probs.shape[-1]
    tokens = routing.router_probs.size // num_experts
    counts = count_per_expert(routing.expert_index, jnp.ones_like(routing.chosen), num_experts)
    mean_probs = jnp.mean(routing.router_probs, axis=(0, 1, 2))
    return num_experts * jnp.sum(counts / tokens * mean_probs)
