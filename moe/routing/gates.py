"""The rules of the papers: router logits in, experts and weights out. Pure functions, float32, one per gate.

In: ``router_logits`` [G,S,E] and whatever else a rule looks at (:class:`Given`). Out: a :class:`Choice`, before padding
is taken out. :mod:`moe.routing` names the gates and keeps their papers' constants.

Letters: G groups, S tokens per group, E experts, K choices per token, C expert capacity.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array


@dataclasses.dataclass(frozen=True)
class Given:
    """What a rule may look at beside the logits.

    Attributes:
        mask: [G,S] bool, real tokens.
        experts_per_token: K.
        rng: key of what the rule draws; None: deterministic, as in evaluation.
        expert_capacity: C, how many tokens an expert takes under expert choice; 0: K·S/E, rounded up.
        expert_groups: into which the experts are split, in order.
        kept_expert_groups: groups that one token may choose from.
        renormalise: whether the chosen weights are divided by their sum, where the rule leaves it open.
        routing_scale: factor of all weights.
        noise_logits: [G,S,E] float32, x·W_noise of noisy top-k; None: no noise.
        selection_bias: [E] float32, added to the scores for the choice alone; None: zeros.
        token_ids: [G,S] int32, for gates that route by identity.
    """

    mask: Array
    experts_per_token: int
    rng: Array | None = None
    expert_capacity: int = 0
    expert_groups: int = 1
    kept_expert_groups: int = 1
    renormalise: bool = False
    routing_scale: float = 1.0
    noise_logits: Array | None = None
    selection_bias: Array | None = None
    token_ids: Array | None = None


class Choice(NamedTuple):
    """What a rule decided.

    Attributes:
        expert_index: [G,S,K] int32, first choice first.
        weights: [G,S,K] float32.
        accepted: [G,S,K] bool, False for a choice the rule does not send; None: all are sent.
        probs: [G,S,E] float32, the probabilities that balancing losses use; None: softmax of the logits.
        smooth_load: [G,S,E] float32, differentiable probability of being chosen; None: the rule has none.
    """

    expert_index: Array
    weights: Array
    accepted: Array | None = None
    probs: Array | None = None
    smooth_load: Array | None = None


def pick(scores: Array, index: Array) -> Array:
    """scores [...,E] at index [...,K] → [...,K]; its gradient is elementwise instead of a scatter."""
    # [...,1,E] where [...,K,E] → [...,K]
    chosen = index[..., None] == jnp.arange(scores.shape[-1])
    return jnp.sum(jnp.where(chosen, scores[..., None, :], 0.0), axis=-1)


def top_k(scores: Array, k: int) -> tuple[Array, Array]:
    """``jax.lax.top_k`` as k rounds of argmax: scores [...,E] → values [...,K], indices [...,K]; of equals the lower.

    XLA's partitioner cannot split ``lax.top_k`` over tokens: on a mesh every device would gather everyone's logits and
    route all tokens. Reductions over E it splits. An argmax here is the lowest index that has the maximum: XLA's CPU
    computes ``jnp.argmax``, a reduction of pairs, value by value on one core, ten times as long.
    """
    num_experts = scores.shape[-1]
    experts = jnp.arange(num_experts)
    remaining, indices = jax.lax.stop_gradient(scores), []
    for _ in range(k):
        highest = jnp.max(remaining, axis=-1, keepdims=True)
        indices.append(jnp.min(jnp.where(remaining == highest, experts, num_experts - 1), axis=-1))
        remaining = jnp.where(indices[-1][..., None] == experts, -jnp.inf, remaining)
    index = jnp.stack(indices, axis=-1)
    return pick(scores, index), index


def rank(scores: Array) -> Array:
    """[...,N] → [...,N] int32: 0 for the highest of the last axis, ties to the lower index."""
    order = jnp.argsort(-scores, axis=-1, stable=True)
    return jnp.argsort(order, axis=-1).astype(jnp.int32)


def _weigh(weights: Array, given: Given) -> Array:
    """Chosen weights [...,K], divided by their sum if so given, times the scale."""
    if given.renormalise:
        # As DeepSeek's code, against a sum of sigmoids that underflows.
        weights = weights / (jnp.sum(weights, axis=-1, keepdims=True) + 1e-20)
    return weights * given.routing_scale


def _within_groups(scores: Array, given: Given, best: int) -> Array:
    """scores [...,E] with −∞ outside the kept groups, a group's score being the sum of its ``best`` highest scores."""
    groups, kept = given.expert_groups, given.kept_expert_groups
    if kept >= groups:
        return scores
    # [...,E] → [...,groups,E/groups]
    by_group = scores.reshape(*scores.shape[:-1], groups, -1)
    values, _ = top_k(by_group, min(best, by_group.shape[-1]))
    _, kept_index = top_k(jnp.sum(values, axis=-1), kept)
    open_groups = jnp.any(kept_index[..., None] == jnp.arange(groups), axis=-2)
    return jnp.where(open_groups[..., None], by_group, -jnp.inf).reshape(scores.shape)


def dense_mixture(router_logits: Array, given: Given) -> Choice:
    """Every token to every expert, weighted by the softmax: y = Σ_e p_e E_e(x) (Jacobs et al. 1991, equation 1)."""
    del given
    expert_index = jnp.broadcast_to(jnp.arange(router_logits.shape[-1]), router_logits.shape)
    return Choice(expert_index, jax.nn.softmax(router_logits, axis=-1))


def noisy_topk(router_logits: Array, given: Given) -> Choice:
    """softmax(KeepTopK(H, k)), H = x·W_g + N(0,1)·softplus(x·W_noise) (Shazeer 2017, equations 3-5).

    With noise, ``smooth_load`` is P(x,i), the probability that i stays chosen if its noise alone is drawn again
    (equations 8 and 9). Without a key, H = x·W_g.
    """
    k, num_experts = given.experts_per_token, router_logits.shape[-1]
    if given.rng is None or given.noise_logits is None:
        top_logits, expert_index = top_k(router_logits, k)
        return Choice(expert_index, jax.nn.softmax(top_logits, axis=-1))
    # Where softplus underflows to 0, the quotient below and its gradient would be NaN.
    deviation = jnp.maximum(jax.nn.softplus(given.noise_logits), 1e-9)
    noisy = router_logits + jax.random.normal(given.rng, router_logits.shape) * deviation
    # One more than K, for what i must beat if it is itself among the first K; with K = E there is nothing to beat.
    top_logits, top_index = top_k(noisy, min(k + 1, num_experts))
    expert_index, smooth_load = top_index[..., :k], None
    if k < num_experts:
        chosen = noisy >= top_logits[..., k - 1 : k]
        to_beat = jnp.where(chosen, top_logits[..., k : k + 1], top_logits[..., k - 1 : k])
        smooth_load = jax.scipy.stats.norm.cdf((router_logits - to_beat) / deviation)
    return Choice(expert_index, jax.nn.softmax(top_logits[..., :k], axis=-1), smooth_load=smooth_load)


def softmax_top_k(router_logits: Array, given: Given) -> Choice:
    """Top-k of the full softmax, kept as it is, so that at k = 1 the router learns (Switch 2021, equation 2;
    DeepSeekMoE 2024, equations 9-11). Limited to groups by their best expert (DeepSeek-V2 2024, section 2.2.2)."""
    probs = jax.nn.softmax(router_logits, axis=-1)
    _, expert_index = top_k(_within_groups(probs, given, best=1), given.experts_per_token)
    return Choice(expert_index, _weigh(pick(probs, expert_index), given))


def softmax_sampled(router_logits: Array, given: Given) -> Choice:
    """K experts drawn without replacement in proportion to the softmax, weighted by it (Switch 2021, appendix C,
    "sample softmax"). The draw is the top-k of logits + Gumbel noise (Gumbel-max), limited to groups as there. Without
    a key, the top-k."""
    probs = jax.nn.softmax(router_logits, axis=-1)
    noise = 0.0 if given.rng is None else jax.random.gumbel(given.rng, router_logits.shape)
    _, expert_index = top_k(_within_groups(router_logits + noise, given, best=1), given.experts_per_token)
    return Choice(expert_index, _weigh(pick(probs, expert_index), given))


def gshard(router_logits: Array, given: Given) -> Choice:
    """Top-2 renormalised over the two; the second is sent if 2·g2 > U(0,1) (GShard 2020, algorithm 1).

    Without a key every second expert is sent. A declined second expert leaves the first one's weight as it is.
    """
    top_probs, expert_index = top_k(jax.nn.softmax(router_logits, axis=-1), given.experts_per_token)
    weights = top_probs / jnp.sum(top_probs, axis=-1, keepdims=True)
    accepted = None
    if given.rng is not None:
        sent = 2.0 * weights[..., 1] > jax.random.uniform(given.rng, weights.shape[:-1])
        accepted = jnp.ones_like(expert_index, bool).at[..., 1].set(sent)
    return Choice(expert_index, weights, accepted)


#: A later choice of this renormalised weight or more is always sent (ST-MoE 2022, appendix D).
ST_MOE_THRESHOLD = 0.2


def st_moe(router_logits: Array, given: Given) -> Choice:
    """Top-n renormalised over the n; each choice but the first is sent with probability min(1, weight / 0.2)
    (ST-MoE 2022, appendix D). Without a key all are sent."""
    top_probs, expert_index = top_k(jax.nn.softmax(router_logits, axis=-1), given.experts_per_token)
    weights = top_probs / jnp.sum(top_probs, axis=-1, keepdims=True)
    accepted = None
    if given.rng is not None:
        sent = weights > ST_MOE_THRESHOLD * jax.random.uniform(given.rng, weights.shape)
        accepted = sent.at[..., 0].set(True)
    return Choice(expert_index, weights, accepted)


def mixtral(router_logits: Array, given: Given) -> Choice:
    """Top-k of the logits, weights their softmax: Softmax(TopK(x·W_g)) (Mixtral 2024, section 2.1)."""
    top_logits, expert_index = top_k(router_logits, given.experts_per_token)
    return Choice(expert_index, jax.nn.softmax(top_logits, axis=-1))


def deepseek_v3(router_logits: Array, given: Given) -> Choice:
    """Sigmoid scores s; top-k of s + b within the kept groups, weighted by s alone, renormalised and scaled
    (DeepSeek-V3 2024, equations 12-16). A group's score is the sum of its two highest s + b (section 2.1.2).

    ``probs`` are s over its sum, as the sequence-wise balance loss takes them (equation 19).
    """
    scores = jax.nn.sigmoid(router_logits)
    biased = scores if given.selection_bias is None else scores + given.selection_bias
    _, expert_index = top_k(_within_groups(biased, given, best=2), given.experts_per_token)
    probs = scores / (jnp.sum(scores, axis=-1, keepdims=True) + 1e-20)
    return Choice(expert_index, _weigh(pick(scores, expert_index), given), probs=probs)


def expert_choice(router_logits: Array, given: Given) -> Choice:
    """Each expert takes its C highest tokens by the softmax over experts (Expert Choice 2022, equations 1 and 2).

    K is E here, the choice of expert e standing in column e: a token may be taken by any number of experts.
    """
    groups, tokens, num_experts = router_logits.shape
    capacity = given.expert_capacity or -(-given.experts_per_token * tokens // num_experts)
    probs = jax.nn.softmax(router_logits, axis=-1)
    # Padding comes last: [G,S,E] → [G,E,S], ranked over S → [G,S,E]
    eligible = jnp.where(given.mask[..., None], jax.lax.stop_gradient(probs), -1.0)
    taken = jnp.swapaxes(rank(jnp.swapaxes(eligible, 1, 2)), 1, 2) < capacity
    expert_index = jnp.broadcast_to(jnp.arange(num_experts), (groups, tokens, num_experts))
    return Choice(expert_index, probs, taken)


def hash_tokens(router_logits: Array, given: Given) -> Choice:
    """K experts by a fixed random function of the token's id, weighted equally (Hash Layers 2021, section 3).

    The hash is murmur3's finalizer over (id, expert): the experts of an id are those of its K highest hashes.
    """
    if given.token_ids is None:
        raise ValueError("the gate 'hash' routes by token id: pass token_ids")
    num_experts = router_logits.shape[-1]
    pairs = given.token_ids[..., None].astype(jnp.uint32) * num_experts + jnp.arange(num_experts, dtype=jnp.uint32)
    h = pairs + jnp.uint32(0x9E3779B9)
    for factor in (0x85EBCA6B, 0xC2B2AE35):
        h = (h ^ (h >> 16)) * jnp.uint32(factor)
    # 24 bits are exact in float32.
    _, expert_index = top_k(((h ^ (h >> 16)) >> 8).astype(jnp.float32), given.experts_per_token)
    return _equal_weights(expert_index)


def random_experts(router_logits: Array, given: Given) -> Choice:
    """K experts drawn uniformly for every token, weighted equally: a baseline. Without a key, always the same draw."""
    rng = jax.random.key(0) if given.rng is None else given.rng
    _, expert_index = top_k(jax.random.uniform(rng, router_logits.shape), given.experts_per_token)
    return _equal_weights(expert_index)


def balanced(router_logits: Array, given: Given) -> Choice:
    """The real tokens of a group take the experts round-robin, K each: for benchmarks, where no load may differ.

    Weights are the softmax over the experts so chosen: a router is computed and learns, but decides nothing.
    """
    groups, tokens, num_experts = router_logits.shape
    k = given.experts_per_token
    nth = jnp.cumsum(given.mask, axis=1) - 1 + tokens * jnp.arange(groups)[:, None]  # [G,S]
    expert_index = (nth[..., None] * k + jnp.arange(k)) % num_experts
    return Choice(expert_index, jax.nn.softmax(pick(router_logits, expert_index), axis=-1))


def _equal_weights(expert_index: Array) -> Choice:
    return Choice(expert_index, jnp.full(expert_index.shape, 1.0 / expert_index.shape[-1], jnp.float32))
