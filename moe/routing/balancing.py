"""Balancing losses, router z-loss, and routing metrics of one layer.

All values are float32, exclude padding, and are taken over all tokens of the (micro)batch, so they do not depend on the
mesh. docs/gates.md compares the normalisation of the losses with other libraries.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Bool, Float, Int

from moe.routing.interface import BalanceCounts
from moe.routing.routing import Routing
from moe.routing.selection import top_k


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LayerReport:
    """Losses and metrics of one MoE layer over one batch; stacked over layers they gain a leading axis.

    Attributes:
        load_balancing_loss: [] unweighted, 1 at perfect balance, E when all tokens go to one expert.
        device_balance_loss: [] unweighted, the same over groups of experts.
        importance_loss: [] unweighted, 0 at perfect balance.
        load_loss: [] unweighted, 0 at perfect balance.
        router_z_loss: [] unweighted.
        broken_tokens: [] number of real tokens with a NaN or infinite router logit.
        expert_load: [E] share of the chosen assignments that name each expert, dropped ones included; sums to 1.
        fraction_tokens_dropped: [] share of the chosen assignments beyond the capacity.
        router_entropy: [] mean entropy of router_probs, nats.
    """

    load_balancing_loss: Array
    device_balance_loss: Array
    importance_loss: Array
    load_loss: Array
    router_z_loss: Array
    broken_tokens: Array
    expert_load: Array
    fraction_tokens_dropped: Array
    router_entropy: Array


def count_per_expert(
    expert_index: Int[Array, "*batch K"], counted: Bool[Array, "*batch K"], num_experts: int
) -> Float[Array, " E"]:
    """Number of counted assignments of each expert."""
    return jnp.sum(jax.nn.one_hot(expert_index, num_experts) * counted[..., None], axis=tuple(range(expert_index.ndim)))


def token_mean(values: Float[Array, "G S *rest"], mask: Bool[Array, "G S"]) -> Float[Array, "*rest"]:
    """Mean over the masked-in tokens; 0 if there are none."""
    weights = mask.astype(jnp.float32).reshape(mask.shape + (1,) * (values.ndim - mask.ndim))
    return jnp.sum(values * weights, axis=(0, 1)) / jnp.maximum(jnp.sum(mask), 1)


def _shares(routing: Routing, mask: Array, parts: int, counts: BalanceCounts) -> tuple[Array, Array, Array]:
    """f [parts,E], P [parts,E], and which parts have tokens [parts], for equal consecutive parts of the batch."""
    num_experts = routing.router_probs.shape[-1]
    chosen, expert_index = routing.chosen, routing.expert_index
    if counts == "first_choice":
        chosen, expert_index = chosen[..., :1], expert_index[..., :1]
    elif counts == "top_scores":
        _, expert_index = top_k(routing.router_probs, expert_index.shape[-1])

    def split(array: Array) -> Array:  # [G,S,...] → [parts,G·S/parts,...]
        return array.reshape(parts, -1, *array.shape[2:])

    is_expert = jax.nn.one_hot(split(expert_index), num_experts) * split(chosen)[..., None]
    load = jnp.sum(is_expert, axis=(1, 2))  # [parts,E]
    share = load / jnp.maximum(jnp.sum(load, axis=-1, keepdims=True), 1.0)
    tokens = split(mask)
    total = jnp.sum(jnp.where(tokens[..., None], split(routing.router_probs), 0.0), axis=1)
    probability = total / jnp.maximum(jnp.sum(tokens, axis=1), 1)[:, None]
    return jax.lax.stop_gradient(share), probability, jnp.any(tokens, axis=1)


def load_balancing_loss(
    routing: Routing,
    mask: Bool[Array, "G S"],
    *,
    counts: BalanceCounts = "assignments",
    parts: int = 1,
    expert_groups: int = 0,
) -> Float[Array, ""]:
    """E·Σ_e f_e·P_e, f_e the share of assignments to e, P_e the mean probability of e (Switch 2021, equations 4-6).

    1 at perfect balance for every K, since f sums to 1. The gradient flows through P only. The same value elsewhere:
    GShard's ℓ_aux (2020, algorithm 1) is this over first choices, per group, divided by E². DeepSeek's Σ f P
    (DeepSeekMoE 2024, equations 12-14; V3 2024, equations 17-20) is this, per sequence in V3. DeepSeekMoE's
    device-level loss (equations 15-17) is this over n groups of experts: n·Σ_i (Σ_{e in i} f_e)(Σ_{e in i} P_e).

    Args:
        routing: assignments of one layer.
        mask: real tokens.
        counts: what f counts: all assignments, first choices only (GShard), or the top-K of the router probabilities
            without selection bias and group limits (DeepSeek-V3 2024, equation 18).
        parts: number of equal consecutive parts of the tokens; the loss is the mean over parts: 1 for the whole batch,
            G for groups, B for sequences. Parts without real tokens do not count.
        expert_groups: n; 0: no groups.
    """
    share, probability, present = _shares(routing, mask, parts, counts)
    if expert_groups:
        # [parts,E] → [parts,n,E/n] → [parts,n]
        share, probability = (
            jnp.sum(values.reshape(parts, expert_groups, -1), axis=-1) for values in (share, probability)
        )
    losses = share.shape[-1] * jnp.sum(share * probability, axis=-1)
    return jnp.sum(losses * present) / jnp.maximum(jnp.sum(present), 1)


def squared_variation(values: Float[Array, " E"]) -> Float[Array, ""]:
    """CV², the variance divided by the squared mean; 0 if all values are 0."""
    mean = jnp.mean(values)
    return jnp.where(mean > 0, jnp.var(values) / jnp.maximum(jnp.square(mean), jnp.finfo(jnp.float32).tiny), 0.0)


def importance_loss(routing: Routing) -> Float[Array, ""]:
    """CV(Importance)², Importance_e = Σ_x G(x)_e, the sum of the weights of e (Shazeer 2017, equations 6 and 7)."""
    num_experts = routing.router_probs.shape[-1]
    weights = jax.nn.one_hot(routing.expert_index, num_experts) * routing.combine_weights[..., None]
    return squared_variation(jnp.sum(weights, axis=(0, 1, 2)))


def load_loss(routing: Routing, mask: Bool[Array, "G S"]) -> Float[Array, ""]:
    """CV(Load)², Load_e = Σ_x P(x,e) (Shazeer 2017, equations 10 and 11).

    Only noisy top-k with noise has a smooth P(x,e). Otherwise Load_e is the number of assignments, a metric without a
    gradient.
    """
    if routing.smooth_load is None:
        counts = count_per_expert(routing.expert_index, routing.chosen, routing.router_probs.shape[-1])
        return squared_variation(jax.lax.stop_gradient(counts))
    return squared_variation(jnp.sum(jnp.where(mask[..., None], routing.smooth_load, 0.0), axis=(0, 1)))


def router_z_loss(router_logits: Float[Array, "G S E"], mask: Bool[Array, "G S"]) -> Float[Array, ""]:
    """Mean over real tokens of logsumexp(logits)² (ST-MoE 2022, equation 5)."""
    return token_mean(jnp.square(jax.nn.logsumexp(router_logits, axis=-1)), mask)


def report(
    routing: Routing,
    mask: Bool[Array, "G S"],
    kept: Bool[Array, "G S K"],
    *,
    counts: BalanceCounts = "assignments",
    parts: int = 1,
    expert_groups: int = 1,
) -> LayerReport:
    """All losses and metrics of one layer.

    Args:
        routing: assignments of the layer.
        mask: real tokens.
        kept: chosen assignments within the capacity.
        counts: see :func:`load_balancing_loss`.
        parts: see :func:`load_balancing_loss`.
        expert_groups: number of groups of the device-level loss.
    """
    num_experts = routing.router_probs.shape[-1]
    load = count_per_expert(routing.expert_index, routing.chosen, num_experts)
    num_chosen = jnp.maximum(jnp.sum(routing.chosen), 1)
    valid = mask & ~routing.broken
    entropy = jnp.sum(jax.scipy.special.entr(routing.router_probs), axis=-1)
    return LayerReport(
        load_balancing_loss=load_balancing_loss(routing, valid, counts=counts, parts=parts),
        device_balance_loss=load_balancing_loss(routing, valid, expert_groups=expert_groups),
        importance_loss=importance_loss(routing),
        load_loss=load_loss(routing, valid),
        router_z_loss=router_z_loss(routing.router_logits, valid),
        broken_tokens=jnp.sum(routing.broken).astype(jnp.float32),
        expert_load=load / num_chosen,
        fraction_tokens_dropped=jnp.sum(routing.chosen & ~kept) / num_chosen,
        router_entropy=token_mean(entropy, valid),
    )


def next_selection_bias(
    bias: Float[Array, "*layers E"], expert_load: Float[Array, "*layers E"], rate: float
) -> Float[Array, "*layers E"]:
    """Updated bias b_e + u·sign(mean load − load_e), u the rate (loss-free balancing 2024, algorithm 1)."""
    return bias + rate * jnp.sign(jnp.mean(expert_load, axis=-1, keepdims=True) - expert_load)


def max_violation(expert_load: Array | np.ndarray) -> Array | np.ndarray | np.generic:
    """(max − mean) / mean over experts, 0 at balance (loss-free balancing 2024, section 2.1); [...,E] → [...]."""
    return expert_load.max(axis=-1) * expert_load.shape[-1] - 1.0


def dead_experts(expert_load: Array | np.ndarray) -> Array | np.ndarray | np.generic:
    """Number of experts without an assignment; [...,E] → [...]."""
    return (expert_load == 0).sum(axis=-1)
