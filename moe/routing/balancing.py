"""What keeps experts busy, and the numbers that tell whether they are.

In: a :class:`moe.routing.routing.Routing`, which tokens are real, which choices found room. Out: the balancing losses, the
router z-loss, a :class:`LayerReport` per layer, and the next selection bias of loss-free balancing. Padding counts in
none of them. Everything is float32 and taken over all tokens of the (micro)batch, wherever they are: no value depends
on the mesh. How each loss is normalised, here and elsewhere: ``docs/gates.md``.

Letters: G groups, S tokens per group, E experts, K choices per token.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from moe.routing.routing import Routing


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LayerReport:
    """Routing of one MoE layer over one batch; stacked over layers it gains a leading axis.

    Attributes:
        load_balancing_loss: [] raw, 1 at perfect balance, E when all go to one expert.
        device_balance_loss: [] raw, the same over groups of experts.
        importance_loss: [] raw, 0 at perfect balance.
        load_loss: [] raw, 0 at perfect balance.
        router_z_loss: [] raw.
        broken_tokens: [] how many real tokens had a NaN or infinite router logit.
        expert_load: [E] share of the chosen (token, choice) pairs that each expert was asked to take; sums to 1.
        fraction_tokens_dropped: [] share of the chosen pairs that found no room.
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


def count_per_expert(expert_index: Array, counted: Array, num_experts: int) -> Array:
    """[E] float32: how many counted pairs name each expert. expert_index and counted: [..., K]."""
    return jnp.sum(jax.nn.one_hot(expert_index, num_experts) * counted[..., None], axis=tuple(range(expert_index.ndim)))


def token_mean(values: Array, mask: Array) -> Array:
    """Mean of values [G,S,...] over the tokens of mask [G,S]; 0 if there are none."""
    weights = mask.astype(jnp.float32).reshape(mask.shape + (1,) * (values.ndim - mask.ndim))
    return jnp.sum(values * weights, axis=(0, 1)) / jnp.maximum(jnp.sum(mask), 1)


def _shares(routing: Routing, mask: Array, parts: int, first_choice: bool) -> tuple[Array, Array, Array]:
    """f [parts,E], P [parts,E] and which parts have tokens [parts], for equal runs of the batch's tokens."""
    num_experts = routing.router_probs.shape[-1]
    columns = slice(0, 1 if first_choice else None)

    def split(array: Array) -> Array:  # [G,S,...] → [parts,G·S/parts,...]
        return array.reshape(parts, -1, *array.shape[2:])

    chosen = split(routing.chosen[..., columns])
    is_expert = jax.nn.one_hot(split(routing.expert_index[..., columns]), num_experts) * chosen[..., None]
    counts = jnp.sum(is_expert, axis=(1, 2))  # [parts,E]
    share = counts / jnp.maximum(jnp.sum(counts, axis=-1, keepdims=True), 1.0)
    tokens = split(mask)
    total = jnp.sum(jnp.where(tokens[..., None], split(routing.router_probs), 0.0), axis=1)
    probability = total / jnp.maximum(jnp.sum(tokens, axis=1), 1)[:, None]
    return jax.lax.stop_gradient(share), probability, jnp.any(tokens, axis=1)


def load_balancing_loss(
    routing: Routing, mask: Array, *, first_choice: bool = False, parts: int = 1, expert_groups: int = 0
) -> Array:
    """E·Σ_e f_e·P_e, f_e the share of choices sent to e, P_e the mean probability of e (Switch 2021, equations 4-6).

    1 at perfect balance whatever K is, since f sums to 1. GShard's ℓ_aux (2020, algorithm 1) is this over first
    choices alone, per group, divided by E². DeepSeek's Σ f P (DeepSeekMoE 2024, equations 12-14; V3 2024, equations
    17-20) is this, per sequence in V3. Over groups of experts it is DeepSeekMoE's device-level loss (equations 15-17):
    with n groups, n·Σ_i (Σ_{e in i} f_e)(Σ_{e in i} P_e). The gradient flows through P only.

    Args:
        routing: of one layer.
        mask: [G,S] bool, real tokens.
        first_choice: count first choices alone, as GShard does.
        parts: equal runs of tokens, in order, over which the loss is taken and then averaged: 1 for the whole batch,
            G for groups, B for sequences. Parts of padding alone do not count.
        expert_groups: n; 0: every expert is its own.
    """
    share, probability, present = _shares(routing, mask, parts, first_choice)
    if expert_groups:
        # [parts,E] → [parts,n,E/n] → [parts,n]
        share, probability = (
            jnp.sum(values.reshape(parts, expert_groups, -1), axis=-1) for values in (share, probability)
        )
    losses = share.shape[-1] * jnp.sum(share * probability, axis=-1)
    return jnp.sum(losses * present) / jnp.maximum(jnp.sum(present), 1)


def squared_variation(values: Array) -> Array:
    """CV², variance over squared mean, of values [E]; 0 if all are 0."""
    mean = jnp.mean(values)
    return jnp.where(mean > 0, jnp.var(values) / jnp.maximum(jnp.square(mean), jnp.finfo(jnp.float32).tiny), 0.0)


def importance_loss(routing: Routing) -> Array:
    """CV(Importance)², Importance_e = Σ_x G(x)_e, the sum of weights given to e (Shazeer 2017, equations 6 and 7)."""
    num_experts = routing.router_probs.shape[-1]
    weights = jax.nn.one_hot(routing.expert_index, num_experts) * routing.combine_weights[..., None]
    return squared_variation(jnp.sum(weights, axis=(0, 1, 2)))


def load_loss(routing: Routing, mask: Array) -> Array:
    """CV(Load)², Load_e = Σ_x P(x,e) (Shazeer 2017, equations 10 and 11).

    Where the gate has no smooth P(x,e) (any but noisy top-k, and that one without noise) the choices themselves are
    counted: a number to read, without a gradient.
    """
    if routing.smooth_load is None:
        counts = count_per_expert(routing.expert_index, routing.chosen, routing.router_probs.shape[-1])
        return squared_variation(jax.lax.stop_gradient(counts))
    return squared_variation(jnp.sum(jnp.where(mask[..., None], routing.smooth_load, 0.0), axis=(0, 1)))


def router_z_loss(router_logits: Array, mask: Array) -> Array:
    """Mean over real tokens of logsumexp(logits)² (ST-MoE 2022, equation 5). router_logits: [G,S,E]; mask: [G,S]."""
    return token_mean(jnp.square(jax.nn.logsumexp(router_logits, axis=-1)), mask)


def report(
    routing: Routing,
    mask: Array,
    kept: Array,
    *,
    first_choice: bool = False,
    parts: int = 1,
    expert_groups: int = 1,
) -> LayerReport:
    """All numbers of one layer.

    Args:
        routing: of the layer.
        mask: [G,S] bool, real tokens.
        kept: [G,S,K] bool, chosen pairs that found room.
        first_choice: as in :func:`load_balancing_loss`.
        parts: as there.
        expert_groups: of the device-level loss.
    """
    num_experts = routing.router_probs.shape[-1]
    counts = count_per_expert(routing.expert_index, routing.chosen, num_experts)
    num_chosen = jnp.maximum(jnp.sum(routing.chosen), 1)
    sound = mask & ~routing.broken
    entropy = jnp.sum(jax.scipy.special.entr(routing.router_probs), axis=-1)
    return LayerReport(
        load_balancing_loss=load_balancing_loss(routing, sound, first_choice=first_choice, parts=parts),
        device_balance_loss=load_balancing_loss(routing, sound, expert_groups=expert_groups),
        importance_loss=importance_loss(routing),
        load_loss=load_loss(routing, sound),
        router_z_loss=router_z_loss(routing.router_logits, sound),
        broken_tokens=jnp.sum(routing.broken).astype(jnp.float32),
        expert_load=counts / num_chosen,
        fraction_tokens_dropped=jnp.sum(routing.chosen & ~kept) / num_chosen,
        router_entropy=token_mean(entropy, sound),
    )


def next_selection_bias(bias: Array, expert_load: Array, rate: float) -> Array:
    """b_e + u·sign(mean load − load_e) (loss-free balancing 2024, algorithm 1). bias and expert_load: [...,E]."""
    return bias + rate * jnp.sign(jnp.mean(expert_load, axis=-1, keepdims=True) - expert_load)


def max_violation(expert_load: Array | np.ndarray) -> Array | np.ndarray:
    """[...,E] shares → [...] (max − mean) / mean, 0 at balance (loss-free balancing 2024, section 2.1)."""
    return expert_load.max(axis=-1) * expert_load.shape[-1] - 1.0


def dead_experts(expert_load: Array | np.ndarray) -> Array | np.ndarray:
    """[...,E] shares → [...] how many experts took no token."""
    return (expert_load == 0).sum(axis=-1)
